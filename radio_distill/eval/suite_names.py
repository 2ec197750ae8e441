"""Names of suites and presets, apart from the suites themselves: a slip on the command line is told before their tasks are imported."""

from __future__ import annotations

from ..paths import shipped

__all__ = ["CUSTOM", "PAPER", "suite_names"]

PAPER, CUSTOM = "paper", "custom"
"""The preset whose numbers may be compared with published ones; the name of anything that a user has changed."""

NOT_SUITES = ("paper", "published")
"""Other files in the folder of the suites."""


def suite_names() -> list[str]:
    """The suites that come with the package as cards."""
    return [name for name in shipped("eval") if name not in NOT_SUITES]
