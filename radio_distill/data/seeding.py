"""Seeds and permutations computed from names and numbers alone, so that they never depend on a process, a rank or a clock."""

from __future__ import annotations

import hashlib
import random
from functools import lru_cache

__all__ = ["sample_seed", "shard_order", "stable_hash"]


def stable_hash(*parts: str | int) -> int:
    """Return 63 bits that depend only on `parts`, in every process and on every machine (Python's own hash does not)."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big") >> 1


def sample_seed(seed: int, source: str, view: int, key: str) -> int:
    """Return the seed of one view (crop, flip) of a sample; 63 bits. `key` is that of reading.py, unique in its source."""
    return stable_hash(stable_hash(seed, source), view, key)


@lru_cache(maxsize=16)
def shard_order(seed: int, epoch: int, num_shards: int) -> tuple[int, ...]:
    """Return the permutation of a source's shards in one epoch; all streams of a source slice the same one."""
    order = list(range(num_shards))
    random.Random(stable_hash(seed, "shards", epoch)).shuffle(order)
    return tuple(order)
