"""How the views that an upsampler is trained on differ from their image. FS = FeatSharp (paper or code), OURS = our choice."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .cards import Fields
from .numbers import Positive, Scale, Share, Weight

__all__ = ["Jitter", "Outside"]

Outside = Literal["reflect", "black"]
Spread = Annotated[Weight, Field(le=0.2)]


class Jitter(Fields):
    views: Positive = 5
    """Views per image (FS: 5). The teacher sees them all at its own size."""
    zoom: Annotated[Scale, Field(ge=1, le=4)] = 1 / 0.95
    """Largest magnification; drawn log-uniformly between its inverse and this (FS: 1 / 0.95)."""
    shift: Annotated[Weight, Field(lt=0.5)] = 0.1
    """Largest shift along each axis, as a share of the side; drawn uniformly (OURS; FeatUp: 20 of 224 pixels)."""
    whole_patches: bool = True
    """Cut shifts down to whole patches of the teacher (FS: offsets floored to patch multiples)."""
    flip: Share = 0.5
    """Probability of a horizontal flip (FS: listed in the paper, 0 in the code)."""
    rotation: Annotated[Weight, Field(le=45)] = 5.0
    """Largest rotation in degrees either way; drawn uniformly (FS: 5)."""
    perspective: tuple[Spread, Spread] = (0.01, 0.05)
    """Lowest and highest standard deviation of the corners' displacements, as a share of the side, drawn uniformly for each
    view (FS: 0.01 to 0.05). [0, 0]: no perspective."""
    outside: Outside = "reflect"
    """What a view shows beyond the image: its mirror image (OURS), or black (FS). Neither counts in the loss."""
