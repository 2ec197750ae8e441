"""The run folder: made once, resumed exactly, never overwritten by something else, used by one job at a time."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

from ..config.load import dump, load_job, resume_conflicts
from ..config.recipe import Job
from ..errors import CheckpointError
from ..paths import expand

__all__ = ["RunFolder", "run_path"]


def run_path(recipe: Job) -> Path:
    """Where the run of a recipe lies: `run`, or runs/NAME."""
    return Path(expand(recipe.run or f"runs/{recipe.name}"))


class RunFolder:
    """Opens the folder of a run on rank 0: creates it, or checks that this recipe may go on in it."""

    def __init__(self, recipe: Job, *, is_main: bool) -> None:
        self.path = run_path(recipe)
        self._lock: IO[str] | None = None
        if is_main:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = self._take_lock()
            try:
                self._record(recipe)
            except CheckpointError:
                self._lock.close()  # refused: the folder is free for others again
                raise

    def _take_lock(self) -> IO[str]:
        """An advisory lock that goes away with the process, however it ends."""
        lock = (self.path / "lock").open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError(
                f"{self.path} is in use by another job; wait for it, or set run= to another folder"
            ) from error
        return lock

    def _record(self, recipe: Job) -> None:
        path = self.path / "recipe.yaml"
        if path.exists():
            changed = resume_conflicts(load_job(type(recipe), path), recipe)
            if changed:
                lines = "\n".join(f"  {line}" for line in changed[:10])
                raise CheckpointError(
                    f"{self.path} was started with another recipe; on resume only engine, log and checkpoint may change:\n{lines}\n"
                    "set run= to another folder for a run of its own (start.kind=run continues from these weights)"
                )
        temporary = path.with_suffix(".tmp")
        temporary.write_text(dump(recipe))
        os.replace(temporary, path)
