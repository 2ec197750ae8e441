"""Random numbers that belong to a sample and not to the process that happens to see it.

Everything drawn at random for an image on the device (position crop, dropout of a teacher, mosaic offset) is a pure function
of the sample's seed and of what it is drawn for, so the number of ranks, the batch it lies in and a resume change nothing.

Shapes: B samples.
"""

from __future__ import annotations

from zlib import crc32

import torch
from torch import Tensor

__all__ = ["step_seed", "uniform"]

PRIME_1, PRIME_2, PRIME_5 = 11400714785074694791, 14029467366897019727, 2870177450012600261
"""Of XXH64 (Collet)."""
LANE = (1 << 64) - 1


def step_seed(*numbers: int) -> int:
    """63 bits that depend only on whole numbers from 0 to 2^61 - 2 (seed, step, rank): the seed of what a step draws.

    The rounds of XXH64 over one lane a number. CPython happens to hash tuples in the same way, but promises nothing.
    """
    state = PRIME_5
    for number in numbers:
        state = (state + number * PRIME_2) & LANE
        state = ((state << 31 | state >> 33) & LANE) * PRIME_1 & LANE
    return (state + (len(numbers) ^ PRIME_5 ^ 3527539)) & (LANE >> 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


# splitmix64 (Steele, Lea and Flood 2014); int64 products wrap modulo 2^64 on every device.
GAMMA = _signed(0x9E3779B97F4A7C15)
MIX_1 = _signed(0xBF58476D1CE4E5B9)
MIX_2 = _signed(0x94D049BB133111EB)


def uniform(seeds_B: Tensor, *streams: int | str, n: int) -> Tensor:
    """Draw `n` numbers per sample, uniform in [0, 1), as float32 (B, n) on the device of `seeds_B`.

    `seeds_B` is int64 (`Batch.seeds_B`); `streams` say what the numbers are for (names, step, index): other streams give
    independent numbers, the same ones give the same numbers on every device.
    """
    state_B = _mix(seeds_B.long() + GAMMA)
    for stream in streams:
        number = crc32(stream.encode()) if isinstance(stream, str) else stream
        state_B = _mix((state_B ^ number) + GAMMA)
    steps_n = torch.arange(1, n + 1, device=seeds_B.device) * GAMMA
    bits_Bn = _shift(_mix(state_B[:, None] + steps_n), 40)  # the upper 24 bits: exact in float32
    return bits_Bn.float() * 2.0**-24


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * MIX_1
    x = (x ^ _shift(x, 27)) * MIX_2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
