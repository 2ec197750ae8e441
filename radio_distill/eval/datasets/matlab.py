"""MATLAB files: what scipy reads of them, and errors that name the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import DataError

__all__ = ["read_mat"]


def read_mat(path: Path) -> dict[str, Any]:
    """The variables of a MATLAB file before version 7.3. Raises DataError without scipy, and for a damaged file."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise DataError(f'{path} is a MATLAB file and scipy is not installed; pip install "radio-distill[mat]"') from error
    try:
        return loadmat(path)  # type: ignore[no-any-return]
    except Exception as error:  # scipy raises whatever it stumbles on: ValueError, KeyError, zlib.error, ...
        raise DataError(f"{path} cannot be read as a MATLAB file ({error}); copy it again") from error
