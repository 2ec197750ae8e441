"""An evaluation on two ranks: the numbers of one rank, every line once, nobody left waiting."""

import os
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from launch import launch
from torch import nn

from radio_distill.errors import DataError
from radio_distill.eval import runner
from radio_distill.eval.__main__ import main
from radio_distill.eval.datasets.base import Dataset, open_dataset
from radio_distill.eval.features import FeatureCache, Ranks
from radio_distill.eval.models import NamedModel
from radio_distill.eval.probes.fit import fit
from radio_distill.eval.progress import Progress
from radio_distill.eval.runner import run_suite
from radio_distill.eval.suites import Suite
from radio_distill.eval.task import Context, Score, Task
from radio_distill.results import read


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


class Fails(Task):
    """A task that fails on some ranks; on the others it waits for all."""

    kind: Literal["fails"] = "fails"
    dataset: str = "any"
    on: tuple[int, ...] = ()

    def datasets(self, context: Context) -> Sequence[Dataset[Any]]:
        return [open_dataset("any", "val", "toy", kind="labelled").limited(4)]

    def passes(self, context: Context) -> float:
        return 1.0

    def run(self, opened: NamedModel, context: Context) -> Iterable[Score]:
        if context.ranks.rank in self.on:
            raise DataError("nothing to measure")
        context.ranks.barrier()
        yield Score("miou", 12.5)


def evaluate(rank: int, folder: str, fails_on: tuple[int, ...]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    ranks = Ranks(rank, 2, dist.barrier)
    context = Context(root="toy", device=torch.device("cpu"), cache=FeatureCache(Path(folder)), ranks=ranks)
    made = Suite("made", "Made", "smoke", {"a": Fails(on=fails_on), "b": Fails()})
    outcome = run_suite(made, ["teacher:toy_dino"], context, Path(folder) / "results.jsonl")
    assert outcome.failures == ["a of teacher:toy_dino: nothing to measure"]
    assert [r.task for r in outcome.results] == ["b"]
    context.ranks.barrier()
    dist.destroy_process_group()


def forked(*arguments: Any) -> None:
    torch.multiprocessing.start_processes(evaluate, args=arguments, nprocs=2, start_method="fork")


def test_a_task_that_fails_on_all_ranks_does_not_stop_the_others(tmp_path: Path) -> None:
    forked(str(tmp_path), (0, 1))
    assert [r.task for r in read(tmp_path / "results.jsonl")] == ["b"]


def test_a_task_that_fails_on_one_rank_ends_them_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "PATIENCE", timedelta(seconds=1))
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="DataError: nothing to measure"):
        forked(str(tmp_path), (1,))


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


def go_on(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    ranks = Ranks(rank, 2, dist.barrier)

    def trained(progress: Progress, stop: int) -> dict[str, torch.Tensor] | None:
        torch.manual_seed(0)
        probe = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 1))
        data = torch.randn(
            9, 4, 3, generator=torch.Generator().manual_seed(rank)
        )  # each rank has BatchNorm statistics of its own
        torch.manual_seed(rank)  # and random numbers
        try:
            fit(
                probe,
                iter(data[progress.step : stop]),
                lambda net, batch: net(batch).square().mean(),
                steps=9,
                optimizer=torch.optim.AdamW(probe.parameters(), lr=0.1),
                factor=lambda step: 1 - step / 9,
                progress=progress,
            )
        except StopIteration:
            return None
        return probe.state_dict()

    path = Path(folder) / "p.pt"
    want = trained(Progress(None, every_s=0, ranks=ranks), stop=9)
    assert want is not None
    assert trained(Progress(path, every_s=0, ranks=ranks), stop=4) is None
    again = Progress(path, every_s=0, ranks=ranks)
    assert again.step == 4
    found = trained(again, stop=9)
    assert found is not None
    assert all(torch.equal(found[name], want[name]) for name in want)
    mine = path if rank == 0 else path.with_name("none.pt")  # a folder that the other rank does not see
    assert Progress(mine, every_s=0, ranks=ranks).step == 0
    dist.destroy_process_group()


def test_a_probe_of_two_ranks_goes_on_with_what_each_of_them_had(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(go_on, (str(tmp_path),), nprocs=2, start_method="fork")
