"""Data sets of the suites, in the layouts that users have on disk, and their counterparts on generated scenes.

A reader lists its items and checks the whole layout when it is opened; pixels are read when an item is asked for.
"""

from .base import Dataset, Subset, missing, open_dataset

__all__ = ["Dataset", "Subset", "missing", "open_dataset"]
