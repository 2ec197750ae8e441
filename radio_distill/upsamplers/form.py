"""Choose the parts of an upsampler: ours, or those of FeatSharp's published code (`published.py`) where the two differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from ..align import resize_map
from ..config.upsampler import Network
from ..config.upsampler_recipe import Downsampler
from . import published
from .downsample import AttentionDownsampler, SimpleDownsampler
from .fusion import build_mixer
from .jbu import JBULevel
from .objective import ViewLoss

__all__ = ["OURS", "PUBLISHED", "Form", "form_of"]


@dataclass(frozen=True)
class Form:
    """The parts of which there are two."""

    resize: Callable[[Tensor, tuple[int, int]], Tensor]
    """How images are brought to another size."""
    squash: bool
    """Images of any shape are taken, and squashed to a square."""
    jbu_level: Callable[[], JBULevel]
    mixer: Callable[[Network, int, int], nn.Module]
    """The network, the teacher's channels, those of all inputs -> what fuses them."""
    attention: Callable[[int, int], AttentionDownsampler]
    simple: Callable[[int], SimpleDownsampler]
    loss: type[ViewLoss]

    def downsampler(self, spec: Downsampler, channels: int) -> nn.Module:
        """The learned reduction that an upsampler of a teacher of `channels` channels is trained against."""
        return self.simple(spec.kernel) if spec.kind == "simple" else self.attention(channels, spec.kernel)


OURS = Form(
    resize=resize_map,
    squash=False,
    jbu_level=JBULevel,
    mixer=build_mixer,
    attention=AttentionDownsampler,
    simple=SimpleDownsampler,
    loss=ViewLoss,
)
PUBLISHED = Form(
    resize=published.resize_aliased,
    squash=True,
    jbu_level=published.PublishedLevel,
    mixer=published.published_mixer,
    attention=published.PublishedAttention,
    simple=published.PublishedSimple,
    loss=published.PublishedLoss,
)


def form_of(reference: bool) -> Form:
    """What a recipe's `reference` asks for."""
    return PUBLISHED if reference else OURS
