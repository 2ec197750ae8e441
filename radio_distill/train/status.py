"""`radio-distill status RUN`: what a run is doing, from its folder alone (`status.json`, `metrics.jsonl`, `lock`).

Rank 0 writes `status.json` when the run starts, at every log line and save, and when it ends. A process that is killed
writes nothing more; then the free lock shows that no process is running.
"""

from __future__ import annotations

import json
import math
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from ..errors import CheckpointError
from ..files import json_file, replace_text, typed
from ..log.sinks import hours_left, read_metrics
from .lock import Owner, is_held

__all__ = ["Status", "main", "read_status", "render", "start_status", "write_status"]

FILE = "status.json"
WORKING = ("starting", "running")


@dataclass(frozen=True)
class Status:
    """How a run stands; times are seconds since 1970, by the clock of the job's machine."""

    recipe: str
    steps: int
    ranks: int
    owner: Owner
    state: str = "starting"
    """starting, running, finished, stopped (saved, as asked), failed, or lost (killed: found by `read_status`)."""
    reason: str = ""
    step: int = 0
    saved: int = 0
    """Step of the last save; 0: none."""
    saved_at: float = 0.0
    updated_at: float = field(default_factory=time.time)

    def at(self, state: str, step: int | None, saved: int | None, reason: str) -> Status:
        """The same run a little later; None: as it was."""
        now = time.time()
        return replace(
            self,
            state=state,
            reason=reason,
            step=self.step if step is None else step,
            saved=self.saved if saved is None else saved,
            saved_at=self.saved_at if saved is None else now,
            updated_at=now,
        )


def start_status(run: Path, recipe: str, *, steps: int, ranks: int, owner: Owner) -> Status:
    """The status of a run that begins, or goes on: it knows of the saves before."""
    before = _read(run)
    saved, saved_at = (before.saved, before.saved_at) if before else (0, 0.0)
    return Status(recipe, steps, ranks, owner, saved=saved, saved_at=saved_at)


def write_status(run: Path, status: Status) -> None:
    """Replace status.json. A disk that is full or away is no reason to stop a training here: the next save will tell."""
    with suppress(OSError):
        replace_text(run / FILE, json.dumps(asdict(status), indent=1))


def read_status(run: Path) -> Status:
    """How the run stands; the state is `lost` when it says that it works and no process does. Raises CheckpointError."""
    status = _read(run)
    if status is None:
        raise CheckpointError(
            f"{run} has no readable {FILE}; expected the folder of a run that has started, such as runs/stage1"
        )
    if status.state in WORKING and not is_held(run):
        return replace(status, state="lost", reason="no process is at work: killed, or its machine is gone")
    return status


def render(run: Path, status: Status) -> str:
    """A few lines for the console."""
    lines = [f"{run}: {_state(status)}, step {status.step:,} of {status.steps:,} ({status.step / status.steps:.0%})"]
    lines += [f"  reason     {line}" for line in status.reason.splitlines()[:5]]
    rows = read_metrics(run)
    if rows:
        lines.append(f"  last log   {_ago(status.updated_at)}: {_losses(rows[-1])}")
    if rows and status.state == "running":
        lines.append(f"  rate       {rows[-1]['images_per_s']:.4g} images/s, {hours_left(rows[-1])} left")
    saved = f"step {status.saved:,}, {_ago(status.saved_at)}" if status.saved else "nothing yet"
    lines.append(f"  last save  {saved}")
    lines.append(f"  job        {status.owner}; {status.ranks} rank{'s' if status.ranks > 1 else ''}")
    if status.state not in (*WORKING, "finished"):
        lines.append("  run the same command again to resume from the last save")
    return "\n".join(lines)


def main(run: str, *, as_json: bool = False) -> int:
    """Print it; 0 when the run works or is finished, 1 when it stopped before its end."""
    status = read_status(Path(run))
    print(json.dumps(asdict(status), indent=1) if as_json else render(Path(run), status))
    return int(status.state not in (*WORKING, "finished"))


def _read(run: Path) -> Status | None:
    with suppress(CheckpointError), json_file(run / FILE, "the status of a run", advice="start the run") as values:
        status = typed(Status, values)
        return status if math.isfinite(status.updated_at + status.saved_at) else None
    return None


def _state(status: Status) -> str:
    return {"lost": "not running", "stopped": "stopped as asked and saved"}.get(status.state, status.state)


def _losses(row: dict[str, float]) -> str:
    heads = " ".join(f"{name.removeprefix('fidelity/')} {x:.2f}" for name, x in row.items() if name.startswith("fidelity/"))
    return f"step {row['step']:,}, loss {row.get('loss', math.nan):.4f}" + (f", fidelity {heads}" if heads else "")


def _ago(at: float) -> str:
    """Clocks of machines differ: what seems to come from the future is now."""
    seconds = max(0, int(time.time() - at))
    if seconds < 120:
        return f"{seconds} s ago"
    return f"{seconds // 60} minutes ago" if seconds < 7200 else f"{seconds // 3600} hours ago"
