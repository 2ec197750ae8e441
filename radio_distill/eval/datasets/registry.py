"""Which reader reads which data set: `module:Class` in this package, called with (root, split); toy readers with (split)."""

from __future__ import annotations

__all__ = ["READERS", "TOY_READERS"]

READERS: dict[str, str] = {}
"""By the name that suite cards use."""

TOY_READERS: dict[str, str] = {}
"""By the kind of sample: generated scenes that stand in for every data set of that kind."""
