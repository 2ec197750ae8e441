"""The running average of the weights that is evaluated and exported.

Kept in fp32, beside the engine and not in it: at decay 0.9996 a step moves the average by 4e-4 of the difference, which
bf16 (4e-3) would round away. There is no warm-up of the decay.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from ..errors import CheckpointError

__all__ = ["Ema"]


class Ema:
    """average <- decay * average + (1 - decay) * weights, after every optimizer step.

    Parameters are averaged. Buffers (the spectral norms' power iterations, running statistics) are copied: a mean of
    unit vectors is no unit vector. The tensors of `module` are looked up once, so it must be the module that is trained.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self._sources = _tensors(module)
        self._averages = {name: _copy(x) for name, x in self._sources.items()}
        self._averaged = [name for name, x in self._sources.items() if isinstance(x, nn.Parameter)]
        self._copied: dict[torch.dtype, list[str]] = {}
        """By dtype: all of one kind are copied by one operation."""
        for name, x in self._sources.items():
            if not isinstance(x, nn.Parameter):
                self._copied.setdefault(x.dtype, []).append(name)

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the current weights; call it after every optimizer step."""
        if self._averaged:
            torch._foreach_lerp_(
                [self._averages[n] for n in self._averaged], [self._sources[n].float() for n in self._averaged], 1 - self.decay
            )
        for names in self._copied.values():
            torch._foreach_copy_([self._averages[n] for n in names], [self._sources[n] for n in names])

    def state_dict(self) -> dict[str, Tensor]:
        """The average by name: a flat map that safetensors can write and `load_state_dict` of the module can read."""
        return dict(self._averages)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict`'s tensors. Raises CheckpointError when a name or a shape does not fit."""
        _check_names(self._averages, state, "the saved average")
        for name, average in self._averages.items():
            if state[name].shape != average.shape:
                raise CheckpointError(
                    f"the saved average of {name} has shape {tuple(state[name].shape)}, the model has {tuple(average.shape)}; "
                    "use the recipe that wrote the checkpoint"
                )
            average.copy_(state[name])


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers that belong to the module's state, by name."""
    return {_plain(name): x for name, x in module.state_dict(keep_vars=True).items()}


def _plain(name: str) -> str:
    """The name without the level that torch.compile inserts; matching by the full name would skip every tensor in silence."""
    return name.replace("_orig_mod.", "")


def _copy(x: Tensor) -> Tensor:
    return x.detach().float().clone() if x.is_floating_point() else x.detach().clone()


def _check_names(own: Collection[str], other: Collection[str], what: str) -> None:
    missing, unknown = sorted(set(own) - set(other)), sorted(set(other) - set(own))
    if missing or unknown:
        raise CheckpointError(
            f"{what} does not fit the EMA: missing {missing[:3] or 'none'} ({len(missing)}), unknown {unknown[:3] or 'none'} "
            f"({len(unknown)}); use the recipe that wrote the checkpoint, or start.ema=false"
        )
