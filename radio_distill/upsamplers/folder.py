"""An upsampler on disk: `upsampler.safetensors` + `upsampler.json`, everything needed to use it except the teacher itself.

network.*             the network (none for bilinear, tile, s2)
bias_buffer.buffer    the de-bias map (1, C, h, w)
balancer.*            PHI-S of the teacher's features: the space the network works in
downsampler.*         what it was trained against, for the fidelity suite

Of kind `any` there are the network and the downsampler alone, and a list of the teachers that it was trained with: it serves every
teacher, and its maps are the same in any balanced space (`naf.py`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..balance import Balancer, identity
from ..config.cards import CUSTOM, TeacherCard
from ..config.load import list_cards, load_card
from ..config.upsampler import ANY, Network
from ..config.upsampler_recipe import Downsampler
from ..errors import CheckpointError, TeacherError
from ..files import appearing, check_written, json_file, written_as
from ..fingerprint import Difference, Fingerprint, fingerprint, known_fingerprint
from ..paths import expand
from ..student.spectral import fold_state
from ..teachers.base import teacher_builder
from ..tensors import save_tensors
from .form import form_of
from .sharpener import Sharpener

log = logging.getLogger(__name__)

__all__ = [
    "SavedUpsampler",
    "Seen",
    "check_teacher",
    "load_upsampler",
    "named_upsampler",
    "read_network",
    "save_upsampler",
    "untrained",
]

TEACHER, FEATSHARP = "teacher:", "+featsharp:"
"""Of the names that commands take."""
WEIGHTS = "upsampler.safetensors"
FACTS = "upsampler.json"


class Seen(NamedTuple):
    """A teacher that an upsampler was trained with."""

    card: TeacherCard
    size: int
    """Side in pixels of its input."""
    fingerprint: Fingerprint


@dataclass(frozen=True)
class SavedUpsampler:
    """A trained upsampler and what it was trained for; one of kind `any`, and the teacher that it serves."""

    sharpener: Sharpener
    downsampler: nn.Module
    network: Network
    card: TeacherCard
    """The teacher's card at training time."""
    size: int
    """Side in pixels of the teacher's input."""
    reduction: Downsampler
    provenance: dict[str, Any]
    """Recipe, step, number of images, versions."""
    fingerprint: Fingerprint | None = None
    """Of the teacher that it was trained for; None: of the card's teacher as it is here and now."""
    seen: tuple[Seen, ...] = ()
    """Of kind `any`: the teachers that it was trained with."""

    @property
    def unseen(self) -> bool:
        """Whether it serves a teacher that it was not trained with."""
        own = _trained_for(self)
        return bool(self.seen) and all(seen.fingerprint.differences(own) for seen in self.seen)

    @property
    def factor(self) -> int:
        return self.network.factor

    @property
    def grid(self) -> int:
        """Side of the teacher's own map."""
        return self.size // self.card.input.patch


def save_upsampler(saved: SavedUpsampler, folder: Path, *, state: Mapping[str, Tensor] | None = None) -> None:
    """Write plain fp32 weights and the facts into `folder`; each file appears complete or not at all.

    state: other weights (an EMA), named `sharpener.*` and `downsampler.*`, in place of the current ones.
    """
    if state is None:
        modules = {"sharpener": saved.sharpener, "downsampler": saved.downsampler}
        state = {f"{prefix}.{key}": x for prefix, module in modules.items() for key, x in module.state_dict().items()}
    tensors = {key.removeprefix("sharpener."): x for key, x in fold_state(state).items()}
    facts: dict[str, Any] = {
        "format": 1,
        "network": saved.network.model_dump(mode="json"),
        "downsampler": saved.reduction.model_dump(mode="json"),
        "provenance": saved.provenance,
    }
    own = Seen(saved.card, saved.size, _trained_for(saved))
    if saved.network.kind == ANY:
        facts["teachers"] = [_to_facts(seen) for seen in saved.seen or (own,)]
    else:
        tensors |= {f"balancer.{name}": x for name, x in saved.sharpener.balancer.tensors().items()}
        facts |= {
            **_to_facts(own),
            "balancer": {"kind": saved.sharpener.balancer.kind, "facts": saved.sharpener.balancer.facts},
        }
    plain = {name: x.float().cpu().clone() for name, x in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with appearing(folder / WEIGHTS) as weights, appearing(folder / FACTS) as words:
        save_tensors(weights, plain)
        words.write_text(json.dumps(facts, indent=1) + "\n")


def load_upsampler(path: str | Path, card: TeacherCard | None = None, size: int | None = None) -> SavedUpsampler:
    """Load an upsampler on the CPU in fp32, in evaluation mode: a run folder, one of its checkpoints, or an upsampler folder.

    card: of the teacher that it will serve, at `size` px; None: the one that it was trained with, at its size. One of kind `any` serves
    every teacher, at the size that it has seen it at, or the card's. Raises CheckpointError when there is none, or when tensors are missing (such as the
    buffers of PHI-S); TeacherError for another teacher or size than it was trained for, and for one of kind `any` without `card` that
    was trained with several.
    """
    from ..runs import artifact_folder

    folder = artifact_folder(Path(expand(str(path))), "upsampler")
    facts = _facts(folder)
    check_written(folder / FACTS)
    check_written(folder / WEIGHTS)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / WEIGHTS} cannot be read ({error}); write the upsampler again") from error
    with written_as(folder / FACTS, "the description of an upsampler", advice="write it again"):
        network, reduction = Network(**facts["network"]), Downsampler(**facts["downsampler"])
        seen = tuple(_from_facts(folder, one) for one in _seen_in(facts, network))
    serves_any = network.kind == ANY
    served, side = _served(folder, seen, card, size) if serves_any else seen[0][:2]
    with written_as(folder / FACTS, "the description of an upsampler", advice="write it again"):
        channels, grid = served.output.features, side // served.input.patch
        balancer = identity(channels) if serves_any else _balancer(folder, facts, tensors, channels)
        sharpener = Sharpener(network, channels, (grid, grid), balancer)
        downsampler = form_of(network.reference).downsampler(reduction, channels)
        _fill(sharpener, {k: x for k, x in tensors.items() if not k.startswith(("balancer.", "downsampler."))}, folder)
        _fill(
            downsampler, {k.removeprefix("downsampler."): x for k, x in tensors.items() if k.startswith("downsampler.")}, folder
        )
    for module in (sharpener, downsampler):
        module.eval().requires_grad_(False)
    saved = SavedUpsampler(sharpener, downsampler, network, served, side, reduction, facts["provenance"])
    if serves_any:
        return replace(saved, seen=seen)
    saved = replace(saved, fingerprint=seen[0].fingerprint)
    if card is not None:
        check_teacher(saved, card, size or side)
    return saved


def named_upsampler(name: str) -> SavedUpsampler:
    """The upsampler that a command names: FOLDER, or teacher:CARD+featsharp:FOLDER, whose card may name the code of its teacher.

    Raises CheckpointError as `load_upsampler` does, TeacherError when it was trained for another teacher than CARD.
    """
    card, plus, folder = name.removeprefix(TEACHER).partition(FEATSHARP)
    if not (plus and name.startswith(TEACHER)):
        return load_upsampler(name)
    lent = load_card(card)
    return replace(load_upsampler(folder, lent), card=lent)


def untrained(network: Network, card: TeacherCard, size: int, balancer: Balancer | None = None) -> SavedUpsampler:
    """An upsampler with the weights it would start from (of one generator, seed 0); its de-bias map is zero.

    size: of the teacher's input; balancer: None leaves the teacher's units as they are.
    """
    channels, grid = card.output.features, size // card.input.patch
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sharpener = Sharpener(network, channels, (grid, grid), balancer or identity(channels))
        downsampler = form_of(network.reference).downsampler(Downsampler(), channels)
    for module in (sharpener, downsampler):
        module.eval().requires_grad_(False)
    return SavedUpsampler(sharpener, downsampler, network, card, size, Downsampler(), {"step": 0})


def read_network(path: Path) -> Network:
    """The network of an upsampler, without its weights. Raises CheckpointError when there is none."""
    from ..runs import artifact_folder

    return Network(**_facts(artifact_folder(path, "upsampler"))["network"])


def check_teacher(saved: SavedUpsampler, card: TeacherCard, size: int | None = None) -> None:
    """Raise TeacherError when the upsampler was made for another teacher, or for another size of a teacher's input; CardError for a
    card that a folder has stripped of the code that builds its teacher."""
    if card.family == CUSTOM and card.loader is None:
        teacher_builder(card)  # it came from a folder, without its code: raises CardError with what to do
    differences = _trained_for(saved).differences(fingerprint(card))
    if differences and saved.network.kind == ANY:
        raise TeacherError(
            f"this upsampler was loaded for teacher {saved.card.name!r} and is asked to serve {card.name!r}, which differs "
            f"({', '.join(map(str, differences))}); it serves any teacher: load it with this one's card, load_upsampler(PATH, card)"
        )
    asked = size or card.input.size
    if saved.size != asked:
        differences.append(Difference("size", saved.size, asked))
    if differences:
        raise TeacherError(
            f"this upsampler was trained for teacher {saved.card.name!r} and is asked to serve {card.name!r}, which differs "
            f"({', '.join(map(str, differences))}); train one for it: radio-distill upsampler RECIPE teacher={card.name}"
        )


def _served(folder: Path, seen: tuple[Seen, ...], card: TeacherCard | None, size: int | None) -> tuple[TeacherCard, int]:
    """The teacher that an upsampler of kind `any` will serve, and its size."""
    if card is None:
        if len(seen) > 1:
            raise TeacherError(
                f"{folder} serves any teacher (it was trained with {', '.join(one.card.name for one in seen)}); say which: "
                "load_upsampler(PATH, card), or teacher:CARD+featsharp:PATH where a command names an upsampler"
            )
        return seen[0][:2]
    if card.family == CUSTOM and card.loader is None:
        teacher_builder(card)  # it came from a folder, without its code: raises CardError with what to do
    known = (one.size for one in seen if not one.fingerprint.differences(fingerprint(card)))
    side, patch = size or next(known, card.input.size), card.input.patch
    if side % patch or (side != card.input.size and not card.input.resizable):
        takes = f"multiples of {patch} px" if card.input.resizable else f"{card.input.size} px only"
        raise TeacherError(f"{folder} is asked to serve {card.name!r} at {side} px, which takes {takes}; correct the size")
    return card, side


def _seen_in(facts: dict[str, Any], network: Network) -> list[dict[str, Any]]:
    """What the description says of every teacher; raises ValueError where it names none."""
    seen: list[dict[str, Any]] = facts["teachers"] if network.kind == ANY else [facts]
    if not seen:
        raise ValueError("'teachers' is empty")
    return seen


def _to_facts(seen: Seen) -> dict[str, Any]:
    return {"size": seen.size, "teacher": seen.card.model_dump(mode="json"), "fingerprint": seen.fingerprint.to_dict()}


def _from_facts(folder: Path, facts: dict[str, Any]) -> Seen:
    return Seen(_without_code(TeacherCard(**facts["teacher"])), facts["size"], _recorded(folder, facts))


def _trained_for(saved: SavedUpsampler) -> Fingerprint:
    return saved.fingerprint or fingerprint(saved.card)


def _recorded(folder: Path, facts: dict[str, Any]) -> Fingerprint:
    if "fingerprint" in facts:
        return Fingerprint.from_dict(facts["fingerprint"])
    log.warning(
        "%s has no fingerprint of its teacher (it is of an older version): the card's facts, source and revision are compared, "
        "its weights and the code of a loader are not",
        *(folder / FACTS,),
    )
    return known_fingerprint(TeacherCard(**facts["teacher"]))


def _without_code(card: TeacherCard) -> TeacherCard:
    """The card as facts: a folder, which may be a stranger's, does not get to name code that is imported, but what shipped cards name."""
    if card.loader is None or card.loader in {shipped.loader for shipped in list_cards().values()}:
        return card
    return card.model_copy(update={"loader": None, "family": CUSTOM})


def _facts(folder: Path) -> dict[str, Any]:
    if not (folder / FACTS).is_file():
        raise CheckpointError(f"{folder / FACTS} does not exist; expected a folder with {FACTS} and {WEIGHTS}")
    with json_file(folder / FACTS, "the description of an upsampler", advice="write it again") as facts:
        network = Network(**facts["network"])
        Downsampler(**facts["downsampler"]), dict(facts["provenance"])
        _ = None if network.kind == ANY else facts["balancer"]["kind"]
        for one in _seen_in(facts, network):
            TeacherCard(**one["teacher"])
            _ = int(one["size"]) // 1
            Fingerprint.from_dict(one["fingerprint"]) if "fingerprint" in one else None
        return facts


def _balancer(folder: Path, facts: dict[str, Any], tensors: dict[str, Tensor], channels: int) -> Balancer:
    names = {name: f"balancer.{name}" for name in identity(channels).tensors()}
    missing = [key for key in names.values() if key not in tensors]
    if missing:
        raise CheckpointError(
            f"{folder / WEIGHTS} lacks the statistics of its teacher ({', '.join(missing)}); an upsampler cannot be used "
            "without those it was trained with: copy the whole folder from its run again"
        )
    return Balancer(
        kind=facts["balancer"]["kind"], facts=facts["balancer"]["facts"], **{n: tensors[k] for n, k in names.items()}
    )


def _fill(module: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{folder / WEIGHTS} does not fit {FACTS} beside it: {error}") from error


def provenance(*, recipe: str, step: int, images: int) -> dict[str, Any]:
    """Where weights come from."""
    from ..version import __version__

    return {"recipe": recipe, "step": step, "images": images, "radio_distill": __version__, "torch": torch.__version__}
