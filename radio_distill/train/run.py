"""The run folder: create it, or resume the run in it; another recipe is refused, and so is a second job at the same time."""

from __future__ import annotations

import json
import logging
from types import TracebackType

from ..config.load import dump, load_job, resume_conflicts
from ..config.recipe import Job
from ..errors import CheckpointError
from ..files import replace_text
from ..fingerprint import Fingerprint, fingerprints
from ..runs import run_path
from . import agree
from .distributed import World
from .integrity import refuse_to_start_over, set_damaged_aside
from .lock import RunLock
from .preempt import Stopped
from .status import start_status, write_status

__all__ = ["RunFolder", "open_run"]

log = logging.getLogger(__name__)


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
        path = self.path / "recipe.yaml"
        if path.exists():
            changed = resume_conflicts(load_job(type(recipe), path), recipe)
            if changed:
                lines = "\n".join(f"  {line}" for line in changed[:10])
                raise CheckpointError(
                    f"{self.path} was started with another recipe; on resume only engine, log, checkpoint and run may change:\n{lines}\n"
                    "set run= to another folder for a run of its own (start.kind=run continues from these weights)"
                )
        self.teachers = fingerprints(recipe)
        self._check_teachers(is_resumed=path.exists())
        replace_text(path, dump(recipe))
        replace_text(
            self.path / TEACHERS, json.dumps({name: was.to_dict() for name, was in self.teachers.items()}, indent=1) + "\n"
        )

    def _check_teachers(self, *, is_resumed: bool) -> None:
        """Refuse other teachers or other code than the run was started with: a card, its weights, its loader or a loss were changed."""
        path = self.path / TEACHERS
        if not path.exists():
            if is_resumed and self.teachers:
                log.warning(
                    "%s is of an older version and has no %s: its teachers are taken to be those of today",
                    *(self.path, TEACHERS),
                )
            return
        try:
            before = {name: Fingerprint.from_dict(values) for name, values in json.loads(path.read_text()).items()}
        except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({error!r}), so it is not known whether the teachers are the same; delete it if they are"
            ) from error
        changed = [
            f"{name}.{d}" for name, now in self.teachers.items() if name in before for d in before[name].differences(now)
        ]
        if changed:
            lines = "\n".join(f"  {line}" for line in changed[:10])
            raise CheckpointError(
                f"{self.path} was started with other teachers or other code; cards, weights or modules have changed:\n{lines}\n"
                "put them back, or set run= to another folder for a run of its own (start.kind=run continues from these weights)"
            )


def open_run(recipe: Job, world: World) -> RunFolder:
    """Create or check the run folder on rank 0, and its newest checkpoint on all ranks; an error is raised everywhere."""
    opened: list[RunFolder] = []
    agree.on_main(lambda: opened.append(RunFolder(recipe, is_main=True, ranks=world.size)))
    run = opened[0] if world.is_main else RunFolder(recipe, is_main=False)
    try:
        set_damaged_aside(run.path, rank=world.rank, ranks=world.size, gather=agree.gather)
        agree.on_main(lambda: refuse_to_start_over(run.path))
    except CheckpointError as error:
        run.__exit__(type(error), error, None)
        raise
    return run
