"""`load_student`: the one way to a student, wherever it lies. Needs torch, timm and safetensors."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError, RadioDistillError
from ..files import json_file
from ..hub import Repository
from ..network.student import Student
from ..runs import artifact_folder, artifact_of
from .checkpoints import is_vlm, load_reference, load_saved, student_from_hf, student_from_vlm

__all__ = ["load_student"]

OTHER_LOADERS = {
    "timm": 'timm.create_model("naflexvit_..."), see its README.md',
    "onnx": "onnxruntime.InferenceSession(FOLDER/model.onnx)",
    "web": "transformers.js, see its README.md",
    "torch": "torch.export.load(FOLDER/model.pt2)",
}


def load_student(path: str | Path, *, ema: bool = True) -> Student:
    """Load a student on the CPU in fp32, in evaluation mode, its adaptors included.

    path: a run folder, one of its checkpoints, an export (`hf` or `radio`), a Hugging Face folder or hub id of a RADIO
    model, or the reference's .pth.tar. Also an export that transformers saved again, with its own class or with ours:
    LayerScale is folded, and adaptors that were not saved are left out with a line in the log. Also a VLM that `vlm train` saved: its
    tower, without adaptors. A hub id is downloaded
    unless HF_HUB_OFFLINE is set. ema: of a .pth.tar, prefer the EMA weights where there are any.
    `student.encode(images)` gives summary and map, `student.encode_adaptors(images)` also what it predicts of every
    teacher. Raises CheckpointError.
    """
    place = Path(path).expanduser()
    if place.is_file():
        student = load_reference(place, ema=ema)
    else:
        student = _from_folder(place if place.is_dir() else _download(str(path)), ema=ema)
    return student.eval().requires_grad_(False)


def _from_folder(folder: Path, *, ema: bool) -> Student:
    _refuse_other_formats(folder)
    files = sorted(folder.glob("*.pth.tar"))
    if len(files) == 1:
        return load_reference(files[0], ema=ema)
    if is_vlm(folder):
        return student_from_vlm(folder)
    if (folder / "config.json").is_file() or any(folder.glob("model*.safetensors")):
        return student_from_hf(folder)
    if artifact_of(folder) == "vlm":
        return _from_folder(artifact_folder(folder, "vlm"), ema=ema)
    return load_saved(artifact_folder(folder))


def _refuse_other_formats(folder: Path) -> None:
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder} holds an adapter of PEFT and not the model that it changes; merge it (`model.merge_and_unload()`), "
            "save that, and name its folder"
        )
    if (folder / "config.json").is_file():
        with json_file(folder / "config.json", "the config of a model", advice="copy the whole folder again") as config:
            of_timm = "pretrained_cfg" in config
        if of_timm:
            raise CheckpointError(
                f"{folder} is a folder of timm; load it with {OTHER_LOADERS['timm']}, or name the run it comes from"
            )
    if (folder / "provenance.json").is_file():
        with json_file(folder / "provenance.json", "what an export writes", advice="export again from the run") as values:
            made = str(values["format"])
        if made in OTHER_LOADERS:
            raise CheckpointError(
                f"{folder} is an export for {made}; load it with {OTHER_LOADERS[made]}, or name the run it comes from"
            )


def _download(hub_id: str) -> Path:
    if hub_id.count("/") != 1:
        raise CheckpointError(f"{hub_id} does not exist; expected a file, a folder or a hub id OWNER/NAME")
    try:
        return Repository(hub_id).folder(["*.json", "*.safetensors"])
    except RadioDistillError as error:
        raise CheckpointError(f"{hub_id} is no path here, and as a hub id it gives nothing: {error}") from error
