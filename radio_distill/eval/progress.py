"""How far the training of a probe has come, kept in a file: a killed evaluation goes on inside a task, with the same numbers.

PROBES/KEY/NAME.pt    KEY: of everything that changes the result; NAME: of one probe of the task. Removed when the task's results
                      are written down; what is left for a month, by commands that nobody started again, goes too.

A file holds weights, optimizer, schedule, the losses that count for the mean, and of every rank its BatchNorm statistics and
random numbers. All ranks save and go on together; the first one writes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from ..files import appearing
from ..train.agree import gather
from .features import Ranks

__all__ = ["KEEPS_NOTHING", "ProbeFiles", "Progress"]

log = logging.getLogger(__name__)

FORGOTTEN_S = 30 * 24 * 3600
"""After so long a file of a command that was never started again is removed."""


class ProbeFiles:
    """The files of all probes that one task trains for one model."""

    def __init__(self, root: Path, facts: Mapping[str, Any], *, every_s: float, ranks: Ranks) -> None:
        """facts: all that the result depends on. every_s: seconds between two savings."""
        text = json.dumps(dict(facts), sort_keys=True, default=str)
        self.folder, self.every_s, self.ranks = root / hashlib.sha256(text.encode()).hexdigest()[:24], every_s, ranks
        if ranks.rank == 0:
            _forget_old(root)

    def progress(self, name: str) -> Progress:
        """That of one probe. All ranks call it alike."""
        return Progress(self.folder / f"{name}.pt", every_s=self.every_s, ranks=self.ranks)

    def drop(self) -> None:
        """The task is finished."""
        if self.ranks.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)


class Progress:
    """Of one probe. `step` is the number of steps that were done before; the batches begin there."""

    def __init__(self, path: Path | None, *, every_s: float, ranks: Ranks) -> None:
        self.path, self.every_s, self.ranks = path, every_s, ranks
        self._started = self._saved = time.monotonic()
        self._found = None if path is None else _agreed(_read(path))
        self.step = 0 if self._found is None else int(self._found["step"])

    def restore(
        self, probe: nn.Module, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler
    ) -> tuple[list[Tensor], float]:
        """Put everything back as it was after `step` steps; returns the last losses, and their mean when it was looked at last."""
        found, self._found = self._found, None
        assert found is not None
        own = found["ranks"][self.ranks.rank]
        device = next(probe.parameters()).device
        probe.load_state_dict({**found["probe"], **own["buffers"]})
        optimizer.load_state_dict(found["optimizer"])
        schedule.load_state_dict(found["schedule"])
        torch.set_rng_state(own["rng"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(own["cuda_rng"], device)
        log.info("going on with the probe after %d steps (%s)", found["step"], self.path)
        return list(own["losses"].to(device).unbind()), found["mean"]

    def due(self, step: int, steps: int) -> bool:
        """Whether to save after `step` of `steps`: when the time has come, and at the end of what has taken that long.

        All ranks get the answer of the first. They ask each other only now and then.
        """
        if self.path is None or (self.ranks.world > 1 and self.every_s and step % 10 and step < steps):
            return False
        now = time.monotonic()
        return gather(now - (self._started if step == steps else self._saved) >= self.every_s)[0]

    def save(
        self,
        step: int,
        probe: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        losses: deque[Tensor],
        mean: float,
    ) -> None:
        """Write the file, at once as a whole. All ranks call it alike."""
        device = next(probe.parameters()).device
        weights = probe.state_dict()
        own: dict[str, Any] = {
            "buffers": {name: x.cpu() for name, x in probe.named_buffers() if name in weights},
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            "losses": torch.stack([*losses]).cpu(),
        }
        everyone = gather(own)
        if self.ranks.rank == 0 and self.path is not None:
            state = {
                "step": step,
                "probe": weights,
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "mean": mean,
                "ranks": everyone,
            }
            _write(self.path, state)
        if self.ranks.world > 1:
            self.ranks.barrier()  # nobody looks for the file before it is there
        self._saved = time.monotonic()


KEEPS_NOTHING = Progress(None, every_s=0, ranks=Ranks())
"""Starts at step 0 and saves nothing."""


def _write(path: Path, state: dict[str, Any]) -> None:
    """A disk that is full or read-only costs the going on and no result."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with appearing(path) as part:
            torch.save(state, part)
    except (OSError, RuntimeError) as error:  # torch's writer says RuntimeError for a full disk
        log.warning(
            "the probe's state cannot be saved (%s); training continues, and would restart from step 0 if interrupted", error
        )


def _read(path: Path) -> dict[str, Any] | None:
    """What the file holds; None when it is not there or damaged."""
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        return state if state.keys() >= {"step", "probe", "optimizer", "schedule", "mean", "ranks"} else None
    except (OSError, RuntimeError, ValueError, KeyError, AttributeError, EOFError, UnpicklingError) as error:
        log.warning("%s is damaged (%s); the probe starts anew", path, str(error).partition("\n")[0])
        return None


def _agreed(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """What all ranks have found alike; None when some see another file, or none."""
    return found if len(set(gather(None if found is None else found["step"]))) == 1 else None


def _forget_old(root: Path) -> None:
    for folder in root.glob("*"):
        try:
            if time.time() - folder.stat().st_mtime > FORGOTTEN_S:
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # another command was faster
            continue
