"""The `toy` suite: kNN and linear segmentation on generated scenes, where the ground truth is exact.

    python -m radio_distill.eval --suite toy --model runs/demo/stage3 --model teacher:toy_dino

Shapes: N scenes, C channels, H W feature grid, S pixels of a side.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..align import resize_map
from ..config.load import list_cards
from ..files import digest_of
from ..network.student import Student
from ..teachers.base import load_teacher
from ..types import Result, VisionModel, VisionOutput
from .heads import HeadFidelity
from .metrics.knn import knn_top1
from .metrics.segmentation import Confusion
from .probes.linear_segmentation import fit_cached, predict_cached
from .sizes import seen

__all__ = ["ToyProtocol", "evaluate"]

TRAIN_SEED, TEST_SEED = 71_000, 72_000
"""Far from the seeds that training data and toy teachers are made with."""
BATCH = 32
"""Images of a forward pass."""


@dataclass(frozen=True)
class ToyProtocol:
    """What is measured; its hash travels with every result."""

    train: int = 320
    """Scenes that the kNN database and the linear head are made from."""
    test: int = 200
    """Held-out scenes."""
    size: int = 192
    """Side in pixels of the rendered scenes; every model resizes them to what it takes."""
    steps: int = 120
    """Steps of the linear head."""
    k: int = 20
    """Neighbours."""


@dataclass(frozen=True)
class Scenes:
    images_N3SS: Tensor
    """uint8"""
    labels_N: Tensor
    segmentation_NSS: Tensor
    """uint8, an index into SEGMENT_NAMES."""


def evaluate(model: VisionModel, name: str, protocol: ToyProtocol, *, resolution: int | None = None) -> list[Result]:
    """kNN top-1 (skipped for models without a summary) and linear mIoU of one model; of a student also the kNN of every head's
    summary, and the fidelity of every adaptor that predicts a toy teacher.

    resolution: side in pixels at which a student is run; a teacher of a fixed size takes its own.
    """
    from ..toyworld import CLASSES, SEGMENT_NAMES

    train, test = scenes(TRAIN_SEED, protocol.train, protocol.size), scenes(TEST_SEED, protocol.test, protocol.size)
    at = seen(model, *(2 * (resolution or protocol.size,)))
    size, side = at.image, at.network[0]
    known, asked = encode(model, train.images_N3SS, size), encode(model, test.images_N3SS, size)
    results = []
    if known.summary_BC is not None and asked.summary_BC is not None:
        accuracy = knn_top1(
            known.summary_BC, train.labels_N, asked.summary_BC, test.labels_N, classes=len(CLASSES), k=protocol.k
        )
        results.append(_result("knn", "top1", accuracy, name, protocol, side))
    classes = len(SEGMENT_NAMES)
    labels = train.segmentation_NSS[:, ::2, ::2]  # a quarter of the pixels: the resize to full size is most of the probe's work
    head = fit_cached(known.features_BCHW, labels, classes=classes, steps=protocol.steps)
    guess = predict_cached(head, asked.features_BCHW, (protocol.size, protocol.size))
    counts = Confusion(classes)
    counts.update(guess, test.segmentation_NSS)
    miou = counts.compute()["mIoU"]
    results.append(_result("segmentation", "mIoU", miou, name, protocol, side))
    if isinstance(model, Student):
        for teacher, accuracy in heads_knn(model, train, test, size, classes=len(CLASSES), k=protocol.k).items():
            results.append(_result(f"knn {teacher}", "top1", accuracy, name, protocol, side))
        for teacher, value in fidelity(model, test.images_N3SS, size).items():
            results.append(_result(teacher, "fidelity", value, name, protocol, side, unit="ratio"))
    return results


@torch.no_grad()
def heads_knn(
    student: Student, train: Scenes, test: Scenes, size: tuple[int, int], *, classes: int, k: int
) -> dict[str, float]:
    """kNN top-1 on the summaries that the heads predict, by teacher: to be compared with the teacher's own."""

    def summaries(images_N3SS: Tensor) -> dict[str, Tensor]:
        parts = [student.encode_adaptors(_resized(part, size)) for part in images_N3SS.split(BATCH)]
        heads = [a.name for a in student.arch.adaptors if a.summary_dim]
        return {h: torch.cat([s for p in parts if (s := p[h].summary_BC) is not None]).float() for h in heads}

    known, asked = summaries(train.images_N3SS), summaries(test.images_N3SS)
    return {h: knn_top1(known[h], train.labels_N, asked[h], test.labels_N, classes=classes, k=k) for h in known}


@torch.no_grad()
def fidelity(student: Student, images_N3SS: Tensor, size: tuple[int, int]) -> dict[str, float]:
    """Target variance over error (FeatSharp, eq. 7) of every adaptor named like a toy teacher, in raw units, on held-out scenes.

    Targets are the teacher's map resized to the student's grid; the variance is taken around their mean over all images.
    """
    cards = list_cards()
    teachers = {
        a.name: load_teacher(cards[a.name]) for a in student.arch.adaptors if a.name in cards and cards[a.name].family == "toy"
    }
    if not teachers:
        return {}
    sums = {name: HeadFidelity(teacher.card.output.features) for name, teacher in teachers.items()}
    for part in images_N3SS.split(BATCH):
        pixels = _resized(part, size)
        predictions = student.encode_adaptors(pixels)
        for name, teacher in teachers.items():
            predicted = predictions[name].features_BCHW
            target = resize_map(teacher.encode(pixels).features_BCHW, (predicted.shape[-2], predicted.shape[-1]))
            sums[name].update(predicted, target)
    return {name: of_head.value for name, of_head in sums.items()}


@cache
def scenes(seed: int, count: int, size: int) -> Scenes:
    """Render scenes; the same for every model of a process."""
    from ..toyworld import render

    samples = [render(seed, index, size=size) for index in range(count)]
    images = torch.stack([torch.from_numpy(s.image_HW3) for s in samples]).permute(0, 3, 1, 2).contiguous()
    labels = torch.tensor([s.label for s in samples])
    return Scenes(images, labels, torch.stack([torch.from_numpy(s.segmentation_HW) for s in samples]))


@torch.no_grad()
def encode(model: VisionModel, images_N3SS: Tensor, size: tuple[int, int]) -> VisionOutput:
    """Outputs of all images, fp32."""
    outputs = [model.encode(_resized(part, size)) for part in images_N3SS.split(BATCH)]
    summaries = [o.summary_BC for o in outputs if o.summary_BC is not None]
    return VisionOutput(
        torch.cat(summaries).float() if summaries else None, torch.cat([o.features_BCHW for o in outputs]).float()
    )


def _resized(images_N3SS: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 images as floats in [0, 1], resized (antialiased) to `size`."""
    pixels = images_N3SS.float() / 255
    if tuple(pixels.shape[-2:]) == size:
        return pixels
    return F.interpolate(pixels, size=size, mode="bilinear", antialias=True, align_corners=False)


def _result(
    task: str, metric: str, value: float, model: str, protocol: ToyProtocol, resolution: int, *, unit: str = "percent"
) -> Result:
    return Result(
        suite="toy", task=task, metric=metric, value=value, unit=unit, higher_is_better=True, model=model,
        dataset="toyworld", count=protocol.test, resolution=resolution, config_hash=digest_of(protocol.__dict__)[:12],
    )  # fmt: skip
