"""A killed evaluation goes on inside a task, with the numbers of one that was not interrupted, to the last bit."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from radio_distill.eval import progress as module
from radio_distill.eval import runner
from radio_distill.eval.features import FeatureCache, Ranks
from radio_distill.eval.probes.batches import training_batches
from radio_distill.eval.probes.fit import fit
from radio_distill.eval.progress import ProbeFiles, Progress
from radio_distill.eval.runner import run_suite
from radio_distill.eval.suites import Suite
from radio_distill.eval.task import Context, Task
from radio_distill.eval.tasks.classification import LinearProbe
from radio_distill.eval.tasks.detection import Detection
from radio_distill.eval.tasks.multitask import MultitaskProbe
from radio_distill.eval.tasks.segmentation import Segmentation
from radio_distill.eval.tasks.surfaces import Depth

STEPS = 5
TASKS: list[Task] = [
    Segmentation.model_validate({
        "kind": "segmentation", "dataset": "ade20k", "train": "training", "test": "validation",
        "short_side": 42, "steps": STEPS, "batch": 2, "lr": 0.1,
    }),
    Detection.model_validate({
        "kind": "detection", "dataset": "coco2017", "train": "train", "test": "val", "side": 64, "dim": 32, "heads": 4,
        "ffn": 64, "points": 2, "encoder": 1, "decoder": 1, "queries": 12, "denoise": 4, "steps": STEPS, "batch": 2,
    }),
    MultitaskProbe.model_validate({
        "kind": "multitask", "dataset": "nyudv2", "targets": {"semseg": 1.0, "depth": 1.0}, "edge_weight": 0.9,
        "canvas": (64, 64), "input": 42, "steps": STEPS, "batch": 2, "lr": 1e-3,
    }),
    Depth.model_validate({
        "kind": "probe3d_depth", "dataset": "navi", "resolution": 42, "hidden": 8, "epochs": STEPS / 2, "batch": 2,
        "train_images": 4, "test_images": 2,
    }),
    LinearProbe.model_validate({"kind": "linear_probe", "dataset": "imagenet1k", "resolution": 42, "steps": STEPS, "batch": 4}),
]  # fmt: skip


class Killed(BaseException):
    pass


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(
        root="toy", device=torch.device("cpu"), cache=FeatureCache(tmp_path / "features"), limit=4, probes=tmp_path / "probes",
        save_s=0,
    )  # fmt: skip


Write = Callable[[Path, dict[str, Any]], None]


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What was saved last; `kill_at`: the step after whose saving the process ends."""
    seen: dict[str, Any] = {}
    write: Write = module._write

    def writes(path: Path, state: dict[str, Any]) -> None:
        write(path, state)
        seen.update(torch.load(path, weights_only=True))
        if state["step"] == seen.get("kill_at"):
            raise Killed

    monkeypatch.setattr(module, "_write", writes)
    return seen


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
def test_a_task_that_was_killed_goes_on_with_the_same_numbers(
    task: Task, context: Context, saved: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(runner, "_measure_cost", lambda *_: None)
    suite = Suite("made", "Made", "smoke", {"a": task})
    whole = run_suite(suite, ["teacher:toy_clip"], context, tmp_path / "whole.jsonl")
    want = dict(saved)
    assert want["step"] == STEPS
    assert whole.failures == []
    kills = (2, 3, STEPS) if isinstance(task, Segmentation) else (3,)
    for step in kills:
        saved["kill_at"] = step
        with pytest.raises(Killed):
            run_suite(suite, ["teacher:toy_clip"], context, tmp_path / "killed.jsonl")
    saved["kill_at"] = None
    with caplog.at_level("INFO"):
        found = run_suite(suite, ["teacher:toy_clip"], context, tmp_path / "killed.jsonl")
    assert f"going on with the probe after {kills[-1]} steps" in caplog.text
    assert [(r.metric, r.value) for r in found.results] == [(r.metric, r.value) for r in whole.results]
    for part in ("probe", "optimizer", "schedule", "ranks", "mean"):
        assert same(saved[part], want[part]), part
    assert not list(tmp_path.glob("probes/*"))


def same(a: Any, b: Any) -> bool:
    """Whether nested values are equal, tensors bit for bit."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def trained(progress: Progress, *, stop: int | None = None, steps: int = 12) -> tuple[nn.Module, float]:
    """A probe with all that has a state: momentum, BatchNorm, dropout, a schedule."""
    torch.manual_seed(0)
    probe = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 1))
    data = torch.randn(steps, 6, 4, generator=torch.Generator().manual_seed(1))

    def batches() -> Iterator[Tensor]:
        for step in range(progress.step, steps):
            if step == stop:
                raise Killed
            yield data[step]

    mean = fit(
        probe, batches(), lambda net, x: net(x).square().mean(), steps=steps,
        optimizer=torch.optim.AdamW(probe.parameters(), lr=0.1), factor=lambda step: 1 - step / steps, progress=progress,
    )  # fmt: skip
    return probe, mean


@pytest.mark.parametrize("kills", [[1], [7], [3, 4, 11], [0]])
def test_all_that_has_a_state_is_restored(tmp_path: Path, kills: list[int]) -> None:
    want, mean = trained(Progress(None, every_s=0, ranks=Ranks()))
    for stop in kills:
        with pytest.raises(Killed):
            trained(Progress(tmp_path / "p.pt", every_s=0, ranks=Ranks()), stop=stop)
    again = Progress(tmp_path / "p.pt", every_s=0, ranks=Ranks())
    assert again.step == kills[-1]
    found, found_mean = trained(again)
    assert same(found.state_dict(), want.state_dict())
    assert found_mean == mean


def test_a_probe_is_saved_by_the_clock_and_at_its_end_only_when_it_took_long(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress(Path("nowhere"), every_s=60, ranks=Ranks())
    now[0] = 59
    assert not progress.due(5, 10)
    assert not progress.due(10, 10)
    now[0] = 60
    assert progress.due(6, 10)
    progress._saved = 60
    now[0] = 61
    assert not progress.due(7, 10)
    assert progress.due(10, 10)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"no zip" * 50])
def test_a_damaged_file_is_told_and_the_probe_starts_anew(
    tmp_path: Path, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "p.pt"
    with pytest.raises(Killed):
        trained(Progress(path, every_s=0, ranks=Ranks()), stop=4)
    path.write_bytes(damage(path.read_bytes()))
    progress = Progress(path, every_s=0, ranks=Ranks())
    assert progress.step == 0
    assert "p.pt is damaged" in caplog.text


def test_weights_that_are_not_finite_are_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "p.pt"
    probe = nn.Linear(1, 1)
    with pytest.raises(Exception, match="the probe's loss is nan"):
        fit(
            probe, iter([torch.ones(1), torch.full((1,), float("nan"))] * 20), lambda net, x: net(x).sum(), steps=40,
            optimizer=torch.optim.SGD(probe.parameters(), lr=0.1), factor=lambda _: 1.0,
            progress=Progress(path, every_s=0, ranks=Ranks()),
        )  # fmt: skip
    assert torch.load(path, weights_only=True)["step"] == 1


def test_a_disk_that_cannot_be_written_costs_no_result(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    probe, _ = trained(Progress(tmp_path / "file" / "p.pt", every_s=0, ranks=Ranks()))
    assert same(probe.state_dict(), trained(Progress(None, every_s=0, ranks=Ranks()))[0].state_dict())
    assert "cannot be saved" in caplog.text


def test_another_model_setting_or_version_has_files_of_its_own_and_old_ones_go(tmp_path: Path) -> None:
    one = ProbeFiles(tmp_path, {"model_id": "a", "seed": 0}, every_s=1, ranks=Ranks())
    assert one.folder == ProbeFiles(tmp_path, {"seed": 0, "model_id": "a"}, every_s=9, ranks=Ranks()).folder
    assert one.folder != ProbeFiles(tmp_path, {"model_id": "b", "seed": 0}, every_s=1, ranks=Ranks()).folder
    for name, days in (("old", 31), ("kept", 29)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - days * 86400,) * 2)
    ProbeFiles(tmp_path, {}, every_s=1, ranks=Ranks())
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_batches_begin_at_any_number(context: Context) -> None:
    dataset = TASKS[0].datasets(context)[1]

    def drawn(first: int, count: int) -> list[Any]:
        batches = training_batches(dataset, lambda _, rng: rng.integers(1 << 40), batch=2, context=context, first=first)
        return [next(batches) for _ in range(count)]

    assert drawn(3, 3) == drawn(0, 6)[3:]
