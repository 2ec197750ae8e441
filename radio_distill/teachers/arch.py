"""The few numbers of a transformer from which its FLOPs, parameters and activations follow (`plan/cost.py`)."""

from __future__ import annotations

from ..config.cards import Fields
from ..config.numbers import Count, Positive, Side

__all__ = ["Arch"]


class Windows(Fields):
    side: Side
    """Side of an attention window in tokens; the grid is padded to a multiple of it."""
    num_global: Count
    """Number of blocks that attend over the whole grid instead."""
    rel_pos: bool = False
    """Decomposed relative positions are added to the attention scores (SAM)."""


class Arch(Fields):
    width: Positive
    """Channels of a token."""
    depth: Positive
    """Number of blocks."""
    mlp: Positive
    """Hidden width of the MLP; of one of its two halves where it is gated."""
    gated: bool = False
    """SwiGLU: three matrices instead of two."""
    prefix: Count = 0
    """Class and register tokens."""
    positions: Count = 0
    """Rows of the learned position table."""
    map_pool: bool = False
    """An attention-pooling block makes the summary (SigLIP's MAP head)."""
    windows: Windows | None = None
    """Windowed attention; null: every block sees all tokens."""
