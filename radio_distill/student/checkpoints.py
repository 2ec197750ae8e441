"""Students on disk: our own folder (`student.safetensors` + `student.json`), and the RADIO layouts. `load.py` tells them apart.

Nothing here unpickles arbitrary objects.
"""

from __future__ import annotations

import argparse
import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import CheckpointError
from ..files import DAMAGE, appearing, changed, check_written, check_zip, json_file, replace_text, written_as
from ..network.arch import StudentArch
from ..network.student import Student
from ..tensors import save_tensors
from .reference import student_from_arch, student_from_hf_state, student_from_reference
from .spectral import fold_state, spectral_eps

__all__ = [
    "TOWER",
    "is_vlm",
    "save_student",
    "load_saved",
    "load_reference",
    "student_from_hf",
    "student_from_vlm",
    "read_tensors",
]

TOWER, IN_VLM = "radio_distill_tower", "vision_tower.student."
"""What a VLM's config calls a student, and where its tensors are."""
WEIGHTS = "student.safetensors"
ARCHITECTURE = "student.json"


def save_student(student: Student, folder: Path, *, state: Mapping[str, Tensor] | None = None) -> None:
    """Write plain fp32 weights and the architecture into `folder`; each file appears complete or not at all.

    Spectral reparametrisation and DAMP are folded, so that the result loads without them. `state`: other tensors under
    the student's own names (an EMA, or weights gathered from shards) in place of its current ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plain = fold_state(student.state_dict() if state is None else state, eps=spectral_eps(student))
    tensors = {key: _plain(value) for key, value in plain.items()}
    with appearing(folder / WEIGHTS) as path:
        save_tensors(path, tensors)
    replace_text(folder / ARCHITECTURE, json.dumps(student.arch.to_dict(), indent=1) + "\n")


def load_saved(folder: Path) -> Student:
    """Load what `save_student` wrote, on the CPU in fp32; raises CheckpointError."""
    for name in (ARCHITECTURE, WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder / name} does not exist; expected a folder written by a run ({ARCHITECTURE}, {WEIGHTS})"
            )
    check_written(folder / ARCHITECTURE)
    check_written(folder / WEIGHTS)
    state = _load_file(folder / WEIGHTS)
    with json_file(folder / ARCHITECTURE, "a student's architecture", advice="write the run's student again") as values:
        return student_from_arch(StudentArch.from_dict(values), state)


def load_reference(path: Path, *, ema: bool = True) -> Student:
    """Load the reference's training checkpoint (`.pth.tar`): weights and an argparse.Namespace, no other objects.

    `ema`: prefer the EMA weights where there are any. Raises CheckpointError.
    """
    check_written(path)
    checkpoint = _unpickle(path)
    states = [checkpoint.get(key) for key in ("state_dict_ema", "state_dict")]
    state = next((s for s in (states if ema else states[::-1]) if s), None)
    if state is None or "args" not in checkpoint:
        first = ", ".join(list(checkpoint)[:3]) + (", ..." if len(checkpoint) > 3 else "")
        raise CheckpointError(
            f"{path} holds {first}; expected 'args' and 'state_dict' or 'state_dict_ema'. Weights alone do not tell the "
            "architecture: put them as model.safetensors (or pytorch_model.bin) beside the config.json of their export"
        )
    with written_as(path, "a training checkpoint of the reference", advice="get it again"):
        args = checkpoint["args"]
        return student_from_reference(args if isinstance(args, Mapping) else vars(args), state)


def student_from_hf(folder: Path) -> Student:
    """Load a Hugging Face folder (config.json, model*.safetensors): an export, the reference's class or transformers' `radio`."""
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    there = {"config.json": (folder / "config.json").is_file(), "model.safetensors": bool(files)}
    if not all(there.values()):
        missing = " and ".join(name for name, found in there.items() if not found)
        raise CheckpointError(
            f"{folder} has no {missing}; expected a Hugging Face folder of a RADIO model, with {' and '.join(there)}"
        )
    if (
        changed(folder / "config.json") is None
    ):  # else a program saved the model again into the same folder, configuration and weights
        for file in files:
            check_written(file)
    state = {key: value for file in files for key, value in read_tensors(file).items()}
    with json_file(folder / "config.json", "the config of a RADIO model", advice="copy the whole folder again") as config:
        return student_from_hf_state(config, state)


def is_vlm(folder: Path) -> bool:
    """Whether it is the folder of a VLM that `radio-distill vlm train` saved."""
    if not (folder / "config.json").is_file():
        return False
    with json_file(folder / "config.json", "a model's config", advice="copy the whole folder again") as config:
        tower = config.get("vision_config")
        return isinstance(tower, dict) and tower.get("model_type") == TOWER


def student_from_vlm(folder: Path) -> Student:
    """The student in such a folder, without adaptors. Raises CheckpointError when its weights are damaged or incomplete."""
    files = sorted(folder.glob("model*.safetensors"))
    for file in files:
        check_written(file)
    state = {key: x for file in files for key, x in _load_file(file).items()}
    mine = {key.partition(IN_VLM)[2]: x for key, x in state.items() if IN_VLM in key}
    with json_file(
        folder / "config.json", "the config of a VLM with a student", advice="copy the whole folder again"
    ) as config:
        return student_from_arch(StudentArch.from_dict(config["vision_config"]["student"]), mine)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of a torch file that holds nothing else but plain values."""
    if path.suffix == ".safetensors":
        return _load_file(path)
    content = _unpickle(path)
    return {key: value for key, value in content.get("state_dict", content).items() if isinstance(value, Tensor)}


def _load_file(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); it is incomplete or damaged: get it again") from error


def _unpickle(path: Path) -> dict[str, Any]:
    try:
        check_zip(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; expected a checkpoint file") from error
    except (pickle.UnpicklingError, zipfile.BadZipFile, *DAMAGE) as error:
        reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} cannot be read as plain weights and an argparse.Namespace ({reason}); other objects are refused because "
            f"they could run code: convert the file with the program that wrote it"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a dict of tensors or a training checkpoint")
    return content


def _plain(value: Tensor) -> Tensor:
    value = value.detach().to("cpu")
    return (value.float() if value.is_floating_point() else value).contiguous()
