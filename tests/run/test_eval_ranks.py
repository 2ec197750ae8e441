"""An evaluation on two ranks: the numbers of one rank, every line once, nobody left waiting."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launch import launch
from torch import nn

from radio_distill.eval.__main__ import main
from radio_distill.eval.probes.fit import fit
from radio_distill.eval.results import read


def transfer(rank: int, folder: str) -> None:
    os.environ["RADIO_DISTILL_CACHE"] = f"{folder}/cache"
    flags = ["--suite", "transfer", "--model", "teacher:toy_clip", "--data", "toy", "--limit", "16"]
    assert main([*flags, "--out", f"{folder}/results.jsonl", "linear.steps=50", "linear.lr=0.01"]) == 0


def test_two_ranks_measure_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RADIO_DISTILL_CACHE", "")  # put back afterwards
    transfer(0, str(tmp_path / "one"))
    launch(transfer, 2, str(tmp_path / "two"))
    lines = {ranks: [r for r in read(tmp_path / ranks / "results.jsonl") if r.suite == "transfer"] for ranks in ("one", "two")}
    assert [(r.task, r.metric, r.config_hash, r.dataset) for r in lines["two"]] == [
        (r.task, r.metric, r.config_hash, r.dataset) for r in lines["one"]
    ]
    knn, linear = zip(*([r.value for r in lines[ranks]] for ranks in ("one", "two")))
    assert knn[0] == knn[1]
    assert linear[0] == pytest.approx(linear[1], abs=6.26)  # BatchNorm sees half of a batch: one image of 16


def train(rank: int) -> None:
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)
    probe = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
    probe.register_parameter("seldom", nn.Parameter(torch.ones(2)))
    data = torch.randn(8, 3)[4 * rank : 4 * rank + 4] + rank
    fit(
        probe,
        iter([data] * 3),
        lambda net, batch: net(batch).square().mean() + (net.seldom.sum() if rank == 0 else 0.0),
        steps=3,
        optimizer=torch.optim.SGD(probe.parameters(), lr=0.1),
        factor=lambda step: 1.0,
    )
    assert torch.allclose(probe.seldom, torch.full((2,), 1 - 3 * 0.1 / 2))
    everyone: list = [None, None]
    dist.all_gather_object(everyone, {name: value.tolist() for name, value in probe.state_dict().items()})
    assert everyone[0] == everyone[1]
    dist.destroy_process_group()


def test_a_parameter_that_one_rank_alone_has_a_use_for_is_trained_and_all_hold_one_probe() -> None:
    launch(train, 2)
