"""Where metrics go: console, metrics.jsonl, TensorBoard, wandb. Only rank 0 has sinks."""

from __future__ import annotations

import json
import logging
import math
import os
import uuid
from pathlib import Path
from typing import Any

from ..config.recipe import Job, Recipe
from ..files import parse_json, replace_text
from ..loaders import import_extra

__all__ = ["Sinks", "console_line", "hours_left", "read_metrics", "drop_metrics_after"]

log = logging.getLogger(__name__)


class Sinks:
    """Writes one set of metrics to every place the recipe names."""

    def __init__(self, recipe: Job, folder: Path) -> None:
        self._path = folder / "metrics.jsonl"
        self._tensorboard = _tensorboard(folder / "tensorboard") if recipe.log.tensorboard else None
        self._wandb = _wandb(recipe, folder) if recipe.log.wandb else None

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line to metrics.jsonl, and the same scalars to the others."""
        with self._path.open("a") as f:
            f.write(json.dumps({"step": step, **metrics}) + "\n")
        if self._tensorboard is not None:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()
        self._show(metrics, step)

    def picture(self, step: int, name: str, path: Path) -> None:
        """Show a PNG that lies in the run folder also in wandb."""
        if self._wandb is not None:
            import wandb

            self._show({name: wandb.Image(str(path))}, step)

    def _show(self, values: dict[str, Any], step: int) -> None:
        """Hand values to wandb; it being unreachable must not cost a training."""
        if self._wandb is None:
            return
        try:
            self._wandb.log(values, step=step)
        except Exception as error:
            log.warning("wandb does not answer (%s): nothing more is sent to it; metrics.jsonl is still written", error)
            self._wandb = None

    def close(self) -> None:
        """Flush and close."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def console_line(step: int, recipe: Recipe, metrics: dict[str, float]) -> str:
    """One aligned, greppable line. Per teacher: fidelity (target variance / error; 1 is predicting the mean) by partition."""
    fidelity: dict[str, list[str]] = {}
    for partition, part in recipe.partitions.items():
        for teacher in part.teachers:
            fidelity.setdefault(teacher, []).append(f"{metrics[f'fidelity/{partition}/{teacher}']:.2f}")
    heads = " ".join(f"{teacher} {'/'.join(values)}" for teacher, values in fidelity.items())
    return (
        f"step {step:>6}/{recipe.optim.steps}  loss {metrics['loss']:.4f}  fidelity {heads}  grad {metrics['grad_norm']:.2f}  lr {metrics['lr']:.1e}  "
        f"{metrics['images_per_s']:.0f} img/s  data {100 * metrics['time/data']:.0f}%  teachers {100 * metrics['time/teachers']:.0f}%  "
        f"eta {hours_left(metrics)}"
    )


def hours_left(metrics: dict[str, float]) -> str:
    """How long a run of these metrics goes on, such as 1h05."""
    hours, minutes = divmod(int(60 * metrics["time/left_h"]), 60)
    return f"{hours}h{minutes:02d}"


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl; an unfinished last line (a killed process) is left out."""
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [row for row in map(_parse, lines) if row is not None]


def drop_metrics_after(folder: Path, step: int) -> None:
    """Forget lines of steps that a resumed run will do again."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return
    rows = [row for row in read_metrics(folder) if row["step"] <= step]
    replace_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _parse(line: bytes) -> dict[str, float] | None:
    try:
        row = parse_json(line.decode())
    except ValueError:
        return None
    is_row = isinstance(row, dict) and "step" in row and all(isinstance(x, int | float) for x in row.values())
    return row if is_row and math.isfinite(row["step"]) else None


def _tensorboard(folder: Path) -> Any:
    needs = "log.tensorboard=true needs the tensorboard package:"
    return import_extra("torch.utils.tensorboard", needs, extra="tensorboard").SummaryWriter(str(folder))


def _wandb(recipe: Job, folder: Path) -> Any:
    """A wandb run, resumed under the same id; offline unless WANDB_MODE asks for something else."""
    wandb = import_extra("wandb", "log.wandb needs the wandb package:", extra="wandb")
    mode: Any = os.environ.get("WANDB_MODE") or "offline"
    identity = folder / "wandb_id"
    if not identity.exists():
        identity.write_text(uuid.uuid4().hex)
    config = recipe.model_dump(mode="json")
    try:
        return wandb.init(
            project=recipe.log.wandb,
            name=recipe.name,
            id=identity.read_text(),
            resume="allow",
            mode=mode,
            dir=str(folder),
            config=config,
        )
    except Exception as error:  # wandb being unreachable must not cost a training
        log.warning("wandb could not start (%s); metrics.jsonl is still written. WANDB_MODE=offline avoids this.", error)
        return None
