"""The `fidelity` suite of students: what their heads say of held-out images, beside what the teachers say of these.

    python -m radio_distill.eval --suite fidelity --model runs/stage1 --model random:runs/stage1 --data PHOTOS

A head is compared with the teacher of the same name: with one named in the same command (`--model teacher:CARD.yaml`), else with
the shipped card. Student and teachers see the sizes of the run's recipe, each partition for itself.

Shapes: B batch, N images, C channels, H W the student's grid.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..align import resize_map
from ..balance import Moments
from ..config.cards import TeacherCard
from ..config.checks import patch_size
from ..config.load import list_cards, load_card, load_job
from ..config.recipe import Recipe
from ..config.sizes import side_of
from ..data.held_out import HeldOut
from ..errors import RadioDistillError
from ..files import digest_of
from ..fingerprint import fingerprint
from ..network.student import Student
from ..teachers.base import Teacher, load_teacher
from ..types import Result
from .models import NamedModel

__all__ = ["HeadFidelity", "HeadsProtocol", "Sizes", "cards_for", "found_own", "measure_heads", "sizes_of"]

log = logging.getLogger(__name__)

SUITE = "heads"
"""Under which results are filed."""


@dataclass(frozen=True)
class HeadsProtocol:
    """What is measured; its hash travels with every result."""

    images: int = 64
    """Held-out images, among which a summary has to find its own."""
    batch: int = 8
    """Images of one forward."""


class Sizes(NamedTuple):
    """One resolution at which a student is measured."""

    student: int
    """Side in pixels of its image."""
    teachers: Mapping[str, int]
    """Of those teachers that do not see their card's size, by name."""


def sizes_of(name: str, resolution: int | None) -> list[Sizes]:
    """At which resolutions the student that `name` means is measured: those of its run's recipe, or the one that is asked for.

    Raises RadioDistillError for a student without its run when none is asked for.
    """
    folder = Path(name.removeprefix("random:").partition("?")[0]).expanduser()
    found = next((place / "recipe.yaml" for place in (folder, folder.parent.parent) if (place / "recipe.yaml").is_file()), None)
    if found is None and resolution is None:
        raise RadioDistillError(
            f"model {name!r}: no recipe.yaml tells at which size it was trained; name the side in pixels, --resolution"
        )
    sizes = _sizes_of(load_job(Recipe, found)) if found is not None else []
    if resolution is None:
        return sizes
    return [next((s for s in sizes if s.student == resolution), Sizes(resolution, {}))]


def _sizes_of(recipe: Recipe) -> list[Sizes]:
    """Of every partition; a teacher that follows the student's grid by a card that is not shipped is seen at its card's size."""
    cards, patch, found = list_cards(), patch_size(recipe), []
    for cell in recipe.partitions.values():
        own = {name: view.size for name, view in cell.teachers.items() if view.size and not view.mosaic}
        for name, view in cell.teachers.items():
            card = cards.get(recipe.teachers[name].card or name)
            if view.as_student and card is not None:
                own[name] = side_of(cell, view, card.input.shape, patch)
        found.append(Sizes(cell.size, own))
    return found


def cards_for(student: Student, label: str, given: Sequence[str]) -> dict[str, TeacherCard]:
    """Head -> card of its teacher. given: cards named in the command, by name or path. Raises RadioDistillError when no head has one.

    A card that a run folder names is not opened: it may name code.
    """
    shipped, named = list_cards(), {card.name: card for card in map(load_card, given)}
    widths = {a.name: (a.summary_dim, a.features.out_dim) for a in student.arch.adaptors}
    for head, one in named.items():
        if head in widths and not _fits(widths[head], one):
            raise RadioDistillError(
                f"{label}: its head {head!r} predicts a map of {widths[head][1]} channels and a summary of {widths[head][0]}, and the "
                f"card of that name says {one.output.features} and {one.output.summary}; name the card that it was trained with"
            )
    cards = {head: card for head in widths if (card := named.get(head) or shipped.get(head)) and _fits(widths[head], card)}
    left = [head for head in widths if head not in cards]
    advice = f"no card of its head {' or '.join(left)}: name the teacher beside it, --model teacher:CARD.yaml, whose `name` is the head's"
    if not cards:
        raise RadioDistillError(f"{label}: {advice if left else 'it has no heads that predict a teacher'}")
    if left:
        log.warning("%s: %s", label, advice)
    return cards


@torch.no_grad()
def measure_heads(
    opened: NamedModel, cards: Mapping[str, TeacherCard], sizes: Sizes, data: HeldOut, protocol: HeadsProtocol
) -> Iterator[Result]:
    """Fidelity and retrieval of every head that has a card, at one size of the student's image."""
    student = opened.model
    assert isinstance(student, Student)
    side, device = student.nearest_size(sizes.student, sizes.student)[0], next(student.parameters()).device
    teachers = {head: load_teacher(card).to(device) for head, card in cards.items()}
    fidelities = {head: HeadFidelity(card.output.features) for head, card in cards.items()}
    summaries: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for start in range(0, data.count, protocol.batch):
        said = student.encode_adaptors(data.images(start, start + protocol.batch, side).to(device))
        for head, teacher in teachers.items():
            target = teacher.encode(data.images(start, start + protocol.batch, _side(teacher, sizes.teachers.get(head))))
            pred = said[head].features_BCHW.float()
            fidelities[head].update(pred, resize_map(target.features_BCHW, (pred.shape[2], pred.shape[3])))
            if target.summary_BC is not None and (summary := said[head].summary_BC) is not None:
                summaries.setdefault(head, []).append((summary.float(), target.summary_BC))
    digest = _digest(protocol, sizes, cards)
    for head in teachers:
        values = {"fidelity": ("ratio", fidelities[head].value)}
        if head in summaries:
            pred, target_NC = (torch.cat(parts) for parts in zip(*summaries[head]))
            values["retrieval_r1"] = ("percent", found_own(pred, target_NC))
        for metric, (unit, value) in values.items():
            yield Result(
                SUITE, head, metric, value, unit, True, opened.label,
                dataset=data.id, count=data.count, resolution=side, config_hash=digest, model_id=opened.id,
            )  # fmt: skip


def left_to_measure(
    opened: NamedModel, cards: Mapping[str, TeacherCard], sizes: Sequence[Sizes], results: Sequence[Result], data: HeldOut,
    protocol: HeadsProtocol,
) -> list[Sizes]:  # fmt: skip
    """The sizes at which `results` has no numbers of the student on these images."""
    done = {(r.model_id, r.dataset, r.config_hash) for r in results if r.suite == SUITE}
    return [s for s in sizes if (opened.id, data.id, _digest(protocol, s, cards)) not in done]


def _digest(protocol: HeadsProtocol, sizes: Sizes, cards: Mapping[str, TeacherCard]) -> str:
    teachers = {head: fingerprint(card).digest for head, card in cards.items()}
    return digest_of({**asdict(protocol), "student": sizes.student, "sizes": dict(sizes.teachers), "teachers": teachers})[:12]


def _fits(widths: tuple[int | None, int], card: TeacherCard) -> bool:
    """Whether a head gives what a card says; it may leave out the summary."""
    return widths[1] == card.output.features and widths[0] in (None, card.output.summary)


def _side(teacher: Teacher, asked: int | None) -> int:
    side = asked or teacher.card.input.size
    return teacher.nearest_size(side, side)[0]


class HeadFidelity:
    """Variance of the targets around their own mean over the error of the predictions, both summed (FeatSharp, eq. 7), in the
    units of what is given; 1 is as good as predicting the mean."""

    def __init__(self, channels: int) -> None:
        self._error, self._targets = 0.0, Moments(channels)

    def update(self, pred_BCHW: Tensor, target_BCHW: Tensor) -> None:
        """Count a batch; both are float32 and of one shape."""
        self._error += (pred_BCHW - target_BCHW).square().sum().item()
        self._targets.update(target_BCHW.cpu())

    @property
    def value(self) -> float:
        """The fidelity; infinite for predictions without error."""
        variance = float(self._targets.covariance_CC.trace() * (self._targets.count - 1))
        return variance / self._error if self._error else float("inf")


def found_own(pred_NC: Tensor, target_NC: Tensor) -> float:
    """Percent of images whose predicted summary is nearer, by cosine, to the teacher's summary of the same image than to that of
    any other; an equal one counts as not found. Chance is 100 / N."""
    cosine_NN = F.normalize(pred_NC.double(), dim=1) @ F.normalize(target_NC.double(), dim=1).T
    own_N = cosine_NN.diagonal().clone()
    others_N = cosine_NN.fill_diagonal_(-torch.inf).amax(1)
    return 100 * float((own_N > others_N).double().mean())
