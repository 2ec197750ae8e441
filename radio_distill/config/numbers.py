"""The numbers of recipes and cards: every one is finite, has a range, and is no `true` or `false`.

Number fields are annotated with these types only (`steps: Positive`), so that a typing slip (`lr: .inf`, `steps: true`,
`size: 1e12`) is reported with file and line before it costs a run.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError, PydanticKnownError

__all__ = [
    "Count",
    "Decay",
    "Factor",
    "Free",
    "HIGHEST_FACTOR",
    "Mean",
    "Positive",
    "Rate",
    "Real",
    "Scale",
    "Seed",
    "Share",
    "Side",
    "Std",
    "Weight",
]


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticKnownError("float_type")
    return value


def _finite(value: Any) -> Any:
    """Every number in free values."""
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        _finite(item)
    if isinstance(value, float) and not math.isfinite(value):
        raise PydanticCustomError("finite_number", "Input should be a finite number")
    return value


NOT_A_BOOL = BeforeValidator(_no_bool)
"""`true` is no number, although it is one to Python."""
FINITE = Field(allow_inf_nan=False)

Positive = Annotated[int, NOT_A_BOOL, Field(gt=0, le=10**9)]
"""A number of things of which there is at least one: steps, images, widths."""
Count = Annotated[int, NOT_A_BOOL, Field(ge=0, le=10**9)]
"""A number of things; 0 where there may be none."""
Side = Annotated[int, NOT_A_BOOL, Field(gt=0, le=2**16)]
"""A length in pixels, tokens or cells."""
HIGHEST_FACTOR = 16
Factor = Annotated[int, NOT_A_BOOL, Field(gt=0, le=HIGHEST_FACTOR)]
"""How many times as fine an upsampler makes a map; levels of it are the prime factors."""
Seed = Annotated[int, NOT_A_BOOL, Field(ge=0, lt=2**63)]
"""Of random numbers."""
Share = Annotated[float, NOT_A_BOOL, FINITE, Field(ge=0, le=1)]
"""A part of a whole, or a probability."""
Decay = Annotated[float, NOT_A_BOOL, FINITE, Field(ge=0, lt=1)]
"""What is kept of a running mean at every step."""
Weight = Annotated[float, NOT_A_BOOL, FINITE, Field(ge=0, le=1e6)]
"""Of a term; 0: it does not count."""
Scale = Annotated[float, NOT_A_BOOL, FINITE, Field(gt=0, le=1e6)]
"""A factor or a length that cannot be 0."""
Rate = Annotated[float, NOT_A_BOOL, FINITE, Field(gt=0, le=100)]
"""A learning rate."""
Mean = Annotated[float, NOT_A_BOOL, FINITE, Field(ge=0, le=1)]
"""Of a pixel channel in [0, 1]."""
Std = Annotated[float, NOT_A_BOOL, FINITE, Field(ge=1e-3, le=10)]
"""Of a pixel channel in [0, 1]; 1/255 and 1 occur, 0 divides by zero and 58 is meant for pixels up to 255."""
Real = Annotated[float, NOT_A_BOOL, FINITE, Field(ge=-1e9, le=1e9)]
"""A measured number of any sign."""
Free = Annotated[dict[str, Any], AfterValidator(_finite)]
"""Values that something else checks; their numbers are finite."""
