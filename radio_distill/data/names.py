"""Names of samples, from the names of a tar's members: WebDataset's rule, for training, evaluation and `shards` alike."""

from __future__ import annotations

import re
from typing import NamedTuple

from .files import IMAGE_SUFFIXES

__all__ = ["is_image_suffix", "name_of"]

_HIDDEN = re.compile(r"(^|/)(\.[^./][^/]*|__MACOSX|__[^/]*__)/")
"""Members in hidden folders, in what macOS adds, and in what WebDataset takes for notes about the shard (`__NAME__/`)."""


class Name(NamedTuple):
    """The place of a member in its sample."""

    key: str
    """Folder and name up to the first dot: `a/0001.seg.png` belongs to `a/0001`, and `b/0001.jpg` to another sample."""
    suffix: str
    """All after that dot, lower case: `seg.png`."""


def name_of(member: str) -> Name | None:
    """The name of a tar's member; None where it belongs to no sample: hidden files, and names without an extension."""
    folder, _, base = member.rpartition("/")
    stem, _, suffix = base.partition(".")
    if not stem or not suffix or (folder and _HIDDEN.search(member)):
        return None
    return Name(f"{folder}/{stem}" if folder else stem, suffix.lower())


def is_image_suffix(suffix: str) -> bool:
    """Whether a member of a sample is its image: `jpg`, not `seg.png`."""
    return suffix in IMAGE_SUFFIXES
