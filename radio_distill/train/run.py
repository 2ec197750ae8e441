"""The run folder: create it, or resume the run in it; another recipe is refused, and so is a second job at the same time."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from ..config.load import dump, load_job, resume_conflicts
from ..config.recipe import Job
from ..errors import CheckpointError, RadioDistillError, TeacherError
from ..files import DAMAGE, parse_json, replace_text
from ..fingerprint import Fingerprint, fingerprints
from ..runs import run_path
from . import agree
from .distributed import World
from .integrity import refuse_to_start_over, set_damaged_aside
from .lock import RunLock
from .preempt import Stopped
from .status import start_status, write_status

__all__ = ["RunFolder", "check_resume", "check_teachers", "open_run"]

log = logging.getLogger(__name__)


RECIPE = "recipe.yaml"
TEACHERS = "teachers.json"
"""Which teachers the run was started with, and which code of the user's."""


class RunFolder:
    """Opens the folder of a run on rank 0: creates it, or checks that this recipe may go on in it.

    As a context it says in `status.json` how the work in it ended, and lets others use the folder then.
    """

    def __init__(self, recipe: Job, *, is_main: bool, ranks: int = 1) -> None:
        self.path = run_path(recipe)
        self.teachers: dict[str, Fingerprint] = {}
        """Of the recipe's teachers and of the user's code, as `teachers.json` has them; on rank 0."""
        self._lock: RunLock | None = None
        if not is_main:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = RunLock(self.path)
            self._record(recipe)
            self._status = start_status(self.path, recipe.name, steps=recipe.optim.steps, ranks=ranks, owner=self._lock.owner)
            self.note("starting")
        except OSError as error:
            self.close()
            raise CheckpointError(
                f"{self.path} cannot be used as a run folder ({error}); expected a folder that this user may write to, or a path at "
                "which one can be made: set run="
            ) from error
        except Exception:
            self.close()  # refused: the folder is free for others again
            raise

    def note(self, state: str, *, step: int | None = None, saved: int | None = None, reason: str = "") -> None:
        """Write down how the run stands, on rank 0; what is not given stays as it was."""
        if self._lock is not None:
            self._status = self._status.at(state, step, saved, reason)
            write_status(self.path, self._status)

    def check_owner(self) -> None:
        """Raise CheckpointError when another job has taken the folder over; on rank 0."""
        if self._lock is not None:
            self._lock.check()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._lock is None:
            return
        if error is not None and self._lock.is_ours():
            if isinstance(error, Stopped):
                self.note("stopped")
                log.info("stopped as asked before the first step; the same command starts with the statistics again")
            else:
                self.note("failed", reason=f"{type(error).__name__}: {error}")
        self.close()

    def close(self) -> None:
        """Let others use the folder."""
        if self._lock is not None:
            self._lock.release()

    def _record(self, recipe: Job) -> None:
        self.teachers = check_resume(self.path, recipe)
        replace_text(self.path / RECIPE, dump(recipe))
        replace_text(
            self.path / TEACHERS, json.dumps({name: was.to_dict() for name, was in self.teachers.items()}, indent=1) + "\n"
        )


def check_resume(run: Path, recipe: Job) -> dict[str, Fingerprint]:
    """The fingerprints of a recipe's teachers and of the user's code. Raises CheckpointError when the folder holds a run of another
    recipe, or of other teachers or other code: a card, its weights, its loader or a loss were changed."""
    path = run / RECIPE
    changed = resume_conflicts(load_job(type(recipe), path), recipe) if path.exists() else []
    if changed:
        lines = "\n".join(f"  {line}" for line in changed[:10])
        raise CheckpointError(
            f"{run} was started with another recipe; on resume only engine, log, checkpoint and run may change:\n{lines}\n"
            "set run= to another folder for a run of its own (start.kind=run continues from these weights)"
        )
    teachers = fingerprints(recipe)
    check_teachers(run, teachers, is_resumed=path.exists())
    return teachers


def check_teachers(run: Path, teachers: Mapping[str, Fingerprint], *, is_resumed: bool) -> None:
    """Raise CheckpointError when the run in a folder was started with other teachers or code than these."""
    path = run / TEACHERS
    if not path.exists():
        if is_resumed and teachers:
            log.warning("%s is of an older version and has no %s: its teachers are taken to be those of today", run, TEACHERS)
        return
    try:
        before = {name: Fingerprint.from_dict(values) for name, values in parse_json(path.read_text()).items()}
        changed = [f"{name}.{d}" for name, now in teachers.items() if name in before for d in before[name].differences(now)]
    except DAMAGE as error:
        raise CheckpointError(
            f"{path} cannot be read ({error!r}), so it is not known whether the teachers are the same; delete it if they are"
        ) from error
    if changed:
        lines = "\n".join(f"  {line}" for line in changed[:10])
        raise CheckpointError(
            f"{run} was started with other teachers or other code; cards, weights or modules have changed:\n{lines}\n"
            "put them back, or set run= to another folder for a run of its own (start.kind=run continues from these weights)"
        )


def open_run(recipe: Job, world: World) -> RunFolder:
    """Create or check the run folder on rank 0, and its newest checkpoint on all ranks; an error is raised everywhere."""
    opened: list[RunFolder] = []
    agree.on_main(lambda: opened.append(RunFolder(recipe, is_main=True, ranks=world.size)))
    run = opened[0] if world.is_main else RunFolder(recipe, is_main=False)
    try:
        _refuse_other_teachers(run, recipe, world)
        set_damaged_aside(run.path, rank=world.rank, ranks=world.size, gather=agree.gather)
        agree.on_main(lambda: refuse_to_start_over(run.path))
    except RadioDistillError as error:
        run.__exit__(type(error), error, None)
        raise
    return run


def _refuse_other_teachers(run: RunFolder, recipe: Job, world: World) -> None:
    """Raise TeacherError on every rank when a rank has another teacher than the first one, as where a machine holds an old copy."""
    if world.size == 1:
        return
    mine = run.teachers if world.is_main else fingerprints(recipe)  # after the first rank, which has read large weights
    first = agree.gather(mine if world.is_main else None)[0]
    assert first is not None
    found = [f"rank {world.rank}: {name}.{d}" for name, now in mine.items() for d in first[name].differences(now)]
    if different := [text for rank in agree.gather(found) for text in rank]:
        lines = "\n".join(f"  {line}" for line in different[:10])
        raise TeacherError(
            f"ranks have other teachers or other code than rank 0; give all machines the same cards, weights and modules:\n{lines}"
        )
