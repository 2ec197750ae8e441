"""Anything that encodes images, by one string: students, teachers, upsampled teachers and baselines are rows of the same tables.

runs/stage3                              a run (its newest checkpoint), one of its checkpoints, or an exported folder
checkpoint.pth.tar                       a training checkpoint of the reference
teacher:dfn_clip                         a card
teacher:dfn_clip+featsharp:runs/up_3x    with a trained upsampler
teacher:dfn_clip+random:runs/up_3x       with that upsampler, its network untrained
teacher:dfn_clip+bilinear:2              its map enlarged, or (tile) stitched of 2 x 2 tiles, or (s2) both: nothing is trained
timm:vit_small_patch14_dinov2            a vision transformer of timm; ?weights=FILE or ?weights=random
hf:/models/siglip                        a folder of transformers, or a RADIO model; ?trust_remote_code=true runs its own code
random:runs/stage3                       that architecture, untrained: the floor of every table
my_package.models:baseline               a function that returns a VisionModel
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RadioDistillError
from ..fingerprint import code_digest, known_fingerprint
from ..loaders import check_call, import_named
from ..paths import shipped
from ..types import VisionModel

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..teachers.base import Teacher
    from ..upsamplers.folder import SavedUpsampler

__all__ = ["NamedModel", "load_model", "open_model", "openers"]

FORMS = (
    "the folder of a run, a checkpoint or an export; teacher:NAME; teacher:NAME+featsharp:FOLDER (or +random:FOLDER, +bilinear:2, "
    "+tile:2, +s2:2); timm:NAME; hf:FOLDER; "
    "random:FOLDER; package.module:function"
)
OPTIONS = {"timm": ("weights",), "hf": ("trust_remote_code",), "": ("window",), "random": ("window",)}
"""What may follow `?` in each form; window: side in tokens of a student's attention windows."""


@dataclass(frozen=True)
class NamedModel:
    """A model, the name that tables give it, and its identity."""

    label: str
    """As tables name it: `runs/stage3@5000` (run and step), `teacher:dfn_clip`, `timm:NAME`."""
    model: VisionModel
    facts: Mapping[str, Any]
    """What it does with an image besides its weights: sizes, normalisation, network, windows."""
    tensors: Callable[[], Mapping[str, Tensor]]
    """All its weights."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What results say of it (`Result.details`)."""

    @cached_property
    def id(self) -> str:
        """`LABEL#DIGEST`: the same for the same weights, facts and label, on any machine; reads all weights once."""
        return f"{self.label}#{self._digest()}"

    def _digest(self) -> str:
        import torch

        digest = hashlib.sha256(json.dumps(self.facts, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.tensors().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:12]


def load_model(name: str) -> VisionModel:
    """The model that a string means (see above), on the CPU. Raises RadioDistillError naming the forms when none fits."""
    return open_model(name).model


def openers(names: Sequence[str], *, device: str = "cpu") -> dict[str, Callable[[], NamedModel]]:
    """How to open several models, each when the one before is no longer needed. All strings are checked here."""
    return {name: partial(_open, name, *_parse(name), device) for name in names}


def open_model(name: str, *, device: str = "cpu") -> NamedModel:
    """The model that a string means, with its identity, on `device`. Raises RadioDistillError."""
    return _open(name, *_parse(name), device)


def _parse(name: str) -> tuple[str, str, dict[str, str]]:
    """Form, what it names, options. The form of a path is empty, that of a function is `function`."""
    body, _, query = name.partition("?")
    form, _, rest = body.partition(":")
    if form not in BUILDERS or not rest:
        is_function = re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", body) and form not in BUILDERS
        form, rest = ("function" if is_function and not Path(body).exists() else ""), body
    if form == "" and not Path(rest).expanduser().exists():
        is_card = rest.partition("+")[0] in shipped("teachers")
        hint = f", did you mean 'teacher:{rest}'?" if is_card else ""
        raise RadioDistillError(f"model {name!r} is not known{hint}; expected {FORMS}")
    options = dict(item.partition("=")[::2] for item in query.split("&")) if query else {}
    known = OPTIONS.get(form, ())
    for key in options:
        if key not in known:
            expected = f"expected {', '.join(known)}" if known else "this form has none"
            raise RadioDistillError(f"model {name!r}: unknown option {key!r}; {expected}")
    return form, rest, options


def _open(name: str, form: str, rest: str, options: dict[str, str], device: str) -> NamedModel:
    return BUILDERS[form](name, rest, options, device)


def _from_path(name: str, rest: str, options: dict[str, str], device: str) -> NamedModel:
    from ..student.checkpoints import is_vlm
    from ..student.load import load_student
    from .outside_models import is_radio

    path = Path(rest).expanduser()
    if (path / "config.json").is_file() and not is_vlm(path) and not is_radio(path) and not options:
        return _from_hf(name, rest, {}, device)
    if path.is_file() or (path / "config.json").is_file() or any(path.glob("*.pth.tar")):
        return _student(rest, load_student(path), options, device)
    folder, label = _artifact(path, rest)
    return _student(label, load_student(folder), options, device)


def _from_random(name: str, rest: str, options: dict[str, str], device: str) -> NamedModel:
    import torch

    from ..network.student import Student
    from ..student.load import load_student

    arch = load_student(rest).arch
    torch.manual_seed(0)
    return _student(f"random:{rest}", Student(arch), options, device)


def _from_card(name: str, rest: str, options: dict[str, str], device: str) -> NamedModel:
    from ..config.load import load_card
    from ..teachers.base import load_teacher

    card, plus, upsampler = rest.partition("+")
    how, _, which = upsampler.partition(":")
    if plus and (how not in UPSAMPLING or not which):
        raise RadioDistillError(f"model {name!r}: unknown upsampler {upsampler!r}; expected {FORMS}")
    teacher = load_teacher(load_card(card)).to(device)
    if not plus:
        return _teacher(name, teacher, {"teacher": card})
    from ..upsamplers.upsampled import Upsampled

    saved = _upsampler(name, how, which, teacher)
    network = saved.network.model_dump(mode="json")
    facts = {
        "teacher": _card_facts(teacher),
        "network": network,
        "size": saved.size,
        "image": "factor times the network's input",
    }

    def tensors() -> dict[str, Tensor]:
        parts = {"teacher": teacher.net.state_dict(), "sharpener": saved.sharpener.state_dict()}
        return _joined({**parts, "balancer": saved.sharpener.balancer.tensors()})

    details = {"teacher": card, "network": network, "steps": saved.provenance.get("step", 0)}
    details |= {"random": True} if how == "random" else {}
    return NamedModel(name, Upsampled(teacher, saved), facts, tensors, details)


UPSAMPLING = ("featsharp", "random", "bilinear", "tile", "s2")
"""What may follow `+`: a trained upsampler of any kind, the same untrained, what needs no training."""


def _upsampler(name: str, how: str, which: str, teacher: Teacher) -> SavedUpsampler:
    from ..config.numbers import HIGHEST_FACTOR
    from ..config.upsampler import Network
    from ..upsamplers.folder import load_upsampler, untrained

    if how == "featsharp":
        return load_upsampler(which, teacher.card)
    if how == "random":
        saved = load_upsampler(which, teacher.card)
        return untrained(saved.network, saved.card, saved.size, saved.sharpener.balancer)
    if not which.isdecimal() or not 1 < int(which) <= HIGHEST_FACTOR:
        raise RadioDistillError(f"model {name!r}: {how}:{which}, expected a factor of 2 to {HIGHEST_FACTOR}")
    network = Network.model_validate({"kind": how, "factor": int(which), "debias": False})
    return untrained(network, teacher.card, teacher.card.input.size)


def _from_timm(name: str, rest: str, options: dict[str, str], device: str) -> NamedModel:
    from .outside_models import timm_teacher

    return _teacher(name, timm_teacher(rest, options.get("weights")).to(device))


def _from_hf(name: str, rest: str, options: dict[str, str], device: str) -> NamedModel:
    from .outside_models import hf_teacher, is_radio

    folder = Path(rest).expanduser()
    if not (folder / "config.json").is_file():
        raise RadioDistillError(f"model {name!r}: {folder / 'config.json'} does not exist; expected a folder of transformers")
    if is_radio(folder):
        from ..student.load import load_student

        return _student(name, load_student(folder), {}, device)
    trusted = options.get("trust_remote_code", "false").lower() in ("true", "1", "yes")
    return _teacher(name, hf_teacher(folder, trust_remote_code=trusted).to(device))


def _from_function(name: str, rest: str, options: dict[str, str], device: str) -> NamedModel:
    from torch import nn

    make = import_named(rest, by=f"model {name!r}", expected="a function that returns a VisionModel")
    check_call(make, by=f"model {name!r}", options={}, error=RadioDistillError)
    model, module = make(), rest.partition(":")[0]
    if not isinstance(model, VisionModel):
        raise RadioDistillError(
            f"model {name!r} returned a {type(model).__name__}, expected a VisionModel: "
            "encode(images), nearest_size(height, width), patch_size"
        )
    parts: dict[str, nn.Module] = {"": model} if isinstance(model, nn.Module) else {
        key: value for key, value in vars(model).items() if isinstance(value, nn.Module)
    }  # fmt: skip
    for part in parts.values():
        part.to(device).eval()
    code = code_digest(rest) or inspect.getsource(import_module(module))  # a change of the code is another model
    return NamedModel(name, model, {"code": code}, lambda: _joined({key: part.state_dict() for key, part in parts.items()}))


Builder = Callable[[str, str, "dict[str, str]", str], NamedModel]

BUILDERS: dict[str, Builder] = {
    "": _from_path,
    "random": _from_random,
    "teacher": _from_card,
    "timm": _from_timm,
    "hf": _from_hf,
    "function": _from_function,
}
"""Called with the whole string, what follows the form, options, device."""


def _artifact(path: Path, name: str) -> tuple[Path, str]:
    """Where a run's student lies, and its label with the step."""
    from ..runs import artifact_folder, artifact_of, read_meta

    folder = artifact_folder(path, "vlm" if artifact_of(path) == "vlm" else "student")
    if folder == path:
        return folder, name
    checkpoint = folder.parent
    run = name if checkpoint != path else str(Path(name).parent.parent)
    return folder, f"{run}@{read_meta(checkpoint).step}"


def _student(label: str, student: nn.Module, options: dict[str, str], device: str) -> NamedModel:
    from ..network.student import Student

    assert isinstance(student, Student)
    if "window" in options:
        window = options["window"]
        if not window.isdecimal() or window == "0":
            raise RadioDistillError(f"model {label}: window={window!r}, expected the side of an attention window in tokens")
        student.window_size, label = int(window), f"{label}?window={window}"
    facts = {"arch": student.arch.to_dict(), "window": student.window_size}
    return NamedModel(label, student.eval().requires_grad_(False).to(device), facts, student.state_dict)


def _teacher(label: str, teacher: Teacher, details: Mapping[str, Any] | None = None) -> NamedModel:
    return NamedModel(label, teacher, _card_facts(teacher), teacher.net.state_dict, details or {})


def _card_facts(teacher: Teacher) -> dict[str, Any]:
    """What a card says; the weights are looked at as tensors. A change of a loader's code is another model."""
    card, code = teacher.card, code_digest(teacher.card.loader) if teacher.card.loader else None
    text = card.text.model_dump(mode="json") if card.text else None  # zero-shot results depend on it
    return {"card": dict(known_fingerprint(card).facts), "code": code, "text": text}


def _joined(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{part}.{key}": value for part, state in parts.items() for key, value in state.items()}
