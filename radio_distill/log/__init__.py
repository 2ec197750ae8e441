"""What a run writes down: one console line per interval, metrics.jsonl always, TensorBoard and wandb when asked."""

from .meter import Meter
from .sinks import Sinks

__all__ = ["Meter", "Sinks"]
