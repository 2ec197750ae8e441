"""`load_student`: a student from wherever one can lie. Needs torch, timm and safetensors."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError
from ..files import json_file
from ..network.student import Student
from .checkpoints import load_reference, open_student

__all__ = ["load_student"]

OTHER_LOADERS = {
    "timm": 'timm.create_model("naflexvit_..."), see its README.md',
    "onnx": "onnxruntime.InferenceSession(FOLDER/model.onnx)",
    "torch": "torch.export.load(FOLDER/model.pt2)",
}


def load_student(path: str | Path) -> Student:
    """Load a student on the CPU in fp32, in evaluation mode, its adaptors included.

    path: a run folder, one of its checkpoints, an export (`hf` or `radio`), a Hugging Face folder or hub id of a RADIO
    model, or the reference's .pth.tar. `student.encode(images)` gives summary and map, `student.encode_adaptors(images)`
    also what it predicts of every teacher. Raises CheckpointError.
    """
    folder = Path(path).expanduser()
    student = _from_folder(folder) if folder.is_dir() else open_student(path)
    return student.eval().requires_grad_(False)


def _from_folder(folder: Path) -> Student:
    from ..runs import artifact_folder

    if (folder / "provenance.json").is_file():
        with json_file(folder / "provenance.json", "what an export writes", advice="export again from the run") as values:
            made = str(values["format"])
        if made in OTHER_LOADERS:
            raise CheckpointError(
                f"{folder} is an export for {made}; load it with {OTHER_LOADERS[made]}, or name the run it comes from"
            )
    files = sorted(folder.glob("*.pth.tar"))
    if len(files) == 1:
        return load_reference(files[0])
    if (folder / "config.json").is_file():
        return open_student(folder)
    return open_student(artifact_folder(folder))
