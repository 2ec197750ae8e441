"""Checkpoints that are written while training goes on: what is held, and when it counts."""

from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from radio_distill import runs
from radio_distill.errors import CheckpointError
from radio_distill.train import snapshot
from radio_distill.train.writing import Files


def test_what_is_held_does_not_change_and_each_tensor_is_copied_once() -> None:
    weights = torch.arange(6.0)
    state = {"a": weights, "b": [weights.view(6), (weights[:2], 3)], "c": "text"}
    held = Files(copies=True).hold(state)
    weights.zero_()
    assert held["a"].tolist() == [0, 1, 2, 3, 4, 5]
    assert held["b"][0] is held["a"]
    assert held["b"][1][0].tolist() == [0, 1]
    assert held["b"][1][1:] == (3,)
    assert held["c"] == "text"


def test_tensors_that_come_and_go_are_told_apart() -> None:
    files = Files(copies=True)
    assert [files.hold(torch.full((1000,), float(i)))[0].item() for i in range(5)] == [0, 1, 2, 3, 4]


def test_without_copies_only_views_are_copied_of_which_torch_would_save_all(tmp_path: Path) -> None:
    flat = torch.zeros(100_000)
    whole, part = Files(copies=False).hold([flat, flat[:10]])
    assert whole is not part
    assert whole.data_ptr() == flat.data_ptr()
    torch.save(part, tmp_path / "part.pt")
    assert (tmp_path / "part.pt").stat().st_size < 10_000


class Member(SimpleNamespace):
    """As much of a training as a save asks for; writing its files waits for `gate`."""

    def __init__(self, run: Path, *, background: bool = True, fails: bool = False) -> None:
        self.gate, self.fails, self.step, self.notes = Event(), fails, 5, []
        self.weights = torch.zeros(3)
        job = SimpleNamespace(checkpoint=SimpleNamespace(background=background, keep_last=2), name="toy")
        job.engine = SimpleNamespace(zero=1)
        folder = SimpleNamespace(path=run, check_owner=lambda: None, note=lambda *_, **more: self.notes.append(more))
        world = SimpleNamespace(rank=0, size=1, is_main=True)
        streams = SimpleNamespace(positions={"low": self.step})
        module = torch.nn.Linear(1, 1)
        super().__init__(
            job=job, run=folder, world=world, streams=streams, artifact="student", saving=None, failed_together=False, saved_step=-1, saved_at=0.0,
            meter=SimpleNamespace(state=dict), rank_tensors=dict, engine=SimpleNamespace(save=self.save_engine, module=module),
            save_shared=lambda folder, files: None,
        )  # fmt: skip

    @property
    def members(self) -> list[Any]:
        return [self]

    def save_engine(self, folder: Path, tag: str, files: Files) -> None:
        folder.mkdir()
        held = files.hold(self.weights)

        def write() -> None:
            self.gate.wait(10)
            if self.fails:
                raise OSError("disk full")
            torch.save(held, folder / "weights.pt")

        files.later(write)


def test_training_goes_on_and_the_checkpoint_counts_when_it_is_written(tmp_path: Path) -> None:
    t: Any = Member(tmp_path)
    snapshot.save(t)
    t.weights += 1  # the next step
    t.step += 1
    assert not snapshot.is_written(t)
    assert runs.latest(tmp_path) is None
    t.gate.set()
    snapshot.finish(t)
    path = runs.latest(tmp_path)
    assert path is not None
    assert path.name == "step-00000005"
    assert torch.load(path / "engine" / "weights.pt").tolist() == [0, 0, 0]
    assert t.saved_step == 5
    assert t.notes[-1]["saved"] == 5


def test_the_next_save_waits_for_the_one_before(tmp_path: Path) -> None:
    t: Any = Member(tmp_path)
    t.gate.set()
    for step in (5, 6, 6):
        t.step = step
        snapshot.save(t)
    snapshot.finish(t)
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("step-*")) == ["step-00000005", "step-00000006"]


def test_without_background_a_save_is_done_when_it_returns(tmp_path: Path) -> None:
    t: Any = Member(tmp_path, background=False)
    t.gate.set()
    snapshot.save(t)
    assert t.saving is None
    assert runs.latest(tmp_path) is not None


def test_what_fails_in_the_background_is_told_in_the_same_words_and_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    t: Any = Member(tmp_path)
    t.gate.set()
    snapshot.save(t)
    snapshot.finish(t)
    t.step, t.fails = 6, True
    snapshot.save(t)
    told = r"rank 0 could not write .*step-00000006 \(disk full; .*the previous checkpoint is intact"
    with pytest.raises(CheckpointError, match=told):
        snapshot.finish(t)
    assert runs.latest(tmp_path).name == "step-00000005"  # type: ignore[union-attr]


def fails_after_a_save(t: Any) -> None:
    def train() -> None:
        with snapshot.ended_on_failure(t):
            snapshot.save(t)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()


def test_a_rank_that_fails_alone_does_not_wait_for_the_rest_of_its_checkpoint(tmp_path: Path) -> None:
    t: Any = Member(tmp_path)
    t.world.size = 2
    fails_after_a_save(t)
    t.gate.set()
    assert t.saving.written.exception() is not None
    assert not list((tmp_path / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_that_fail_together_finish_their_checkpoint_first(tmp_path: Path, ranks: int) -> None:
    t: Any = Member(tmp_path)
    t.gate.set()
    t.world.size, t.failed_together = ranks, ranks > 1
    fails_after_a_save(t)
    assert runs.latest(tmp_path) is not None


def test_a_failure_of_the_training_is_told_though_its_checkpoint_fails_as_well(tmp_path: Path, caplog: Any) -> None:
    t: Any = Member(tmp_path, fails=True)
    t.gate.set()
    fails_after_a_save(t)
    assert "could not write" in caplog.text
