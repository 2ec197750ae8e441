"""Format radio: the reference's training checkpoint (`.pth.tar`), which its torch.hub entry loads."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..errors import CheckpointError
from ..network.student import Student
from ..student.checkpoints import load_reference
from ..student.keys import to_reference
from ..tensors import refuse_non_finite, row_major
from .layout import reference_args

__all__ = ["write_radio"]


def write_radio(student: Student, folder: Path, name: str, *, dtype: torch.dtype) -> None:
    """Write NAME.pth.tar: weights under the reference's names and the `args` of its training script; it is read back.

    The reference computes in fp32 whatever the file holds. Raises CheckpointError when the way back does not end here.
    """
    state = {}
    for key, x in student.state_dict().items():
        theirs = to_reference(key, is_dino=student.arch.trunk.is_dino)
        if theirs is not None:
            keep = key.startswith("input_conditioner.")
            state[theirs] = row_major(x if keep else x.to(dtype)).clone()
    args, path = argparse.Namespace(**reference_args(student.arch)), folder / f"{name}.pth.tar"
    refuse_non_finite(state, path)
    torch.save({"arch": args.model, "epoch": 0, "args": args, "state_dict": state}, path)
    _read_back(path, student, dtype)


def _read_back(path: Path, student: Student, dtype: torch.dtype) -> None:
    ours, theirs = student.state_dict(), load_reference(path).state_dict()
    for key, x in ours.items():
        exact = key.startswith("input_conditioner.") or not x.is_floating_point()
        if key not in theirs or not torch.equal(theirs[key], x if exact else x.to(dtype).float()):
            raise CheckpointError(
                f"{path} does not give back {key}; this student has something that the reference has no word for"
            )
