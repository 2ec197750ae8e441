"""Linear segmentation: the protocol's augmentation, loss and test rule, by hand and against slow versions; an oracle scores 100."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from radio_distill.errors import DataError
from radio_distill.eval.datasets.base import Dataset
from radio_distill.eval.datasets.segmentation import SegmentationSample
from radio_distill.eval.features import FeatureCache, Ranks
from radio_distill.eval.models import NamedModel, open_model
from radio_distill.eval.probes.augment import SegmentationAugment, photometric, resize_rgb
from radio_distill.eval.probes.batches import each_item, training_batches
from radio_distill.eval.probes.frozen import pad_to_model, padded_size
from radio_distill.eval.probes.linear_segmentation import segmentation_head, segmentation_loss
from radio_distill.eval.task import Context
from radio_distill.eval.tasks.segmentation import Segmentation
from radio_distill.eval.tasks.sweeps import SegmentationSweep
from radio_distill.types import VisionOutput


class Pixels(nn.Module):
    """A model whose features are the colours of its patches."""

    patch_size = 8

    def encode(self, images_B3HW: Tensor) -> VisionOutput:
        assert images_B3HW.shape[-2] % 8 == images_B3HW.shape[-1] % 8 == 0
        return VisionOutput(None, F.avg_pool2d(images_B3HW, 8))

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        return max(8, round(height / 8) * 8), max(8, round(width / 8) * 8)


class Windowed(Pixels):
    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        return max(24, round(height / 24) * 24), max(24, round(width / 24) * 24)


class Fixed(Pixels):
    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        return 48, 48


class Made(Dataset[SegmentationSample]):
    """Images in two colours: the class is the colour, the last columns do not count."""

    name, split, classes = "made", "train", ("dark", "light", "none")

    def __init__(self, count: int = 6, size: tuple[int, int] = (40, 56)) -> None:
        self.count, self.size_ = count, size

    @property
    def keys(self) -> list[str]:
        return [str(i) for i in range(self.count)]

    def files(self, index: int) -> tuple[str, ...]:
        return ()

    def __getitem__(self, index: int) -> SegmentationSample:
        labels = torch.zeros(self.size_, dtype=torch.uint8)
        labels[:, : 16 + 8 * (index % 3)] = 1
        image = (labels * 200 + 20).expand(3, -1, -1).contiguous()
        labels[:, -3:] = 255
        return SegmentationSample(image, labels)


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(
        root="toy", device=torch.device("cpu"), cache=FeatureCache(tmp_path), limit=4, pictures=tmp_path / "pictures"
    )


def task(**values: Any) -> Segmentation:
    base = {"kind": "segmentation", "dataset": "ade20k", "train": "training", "test": "validation"}
    return Segmentation.model_validate({**base, "short_side": 40, "steps": 60, "batch": 4, "warmup": 5, "lr": 0.1, **values})


def opened(model: nn.Module) -> NamedModel:
    return NamedModel("made", model, {}, dict)  # type: ignore[arg-type]


def test_a_crop_moves_labels_with_the_image_and_fills_what_is_beyond() -> None:
    augment = SegmentationAugment(crop=48, short_side=40, scales=(0.5, 2.0), max_share=1.0)
    beyond = 0
    for seed in range(10):
        image, labels = augment(Made()[seed], np.random.default_rng(seed))
        assert image.shape == (3, 48, 48)
        assert image.dtype == labels.dtype == torch.uint8
        light, dark = image[:, labels == 1].float(), image[:, labels == 0].float()
        if light.numel() and dark.numel():
            assert light.mean() > dark.mean() + 40
        outside = (labels[-1] == 255).all()
        beyond += int(outside)
        if outside:
            assert image[:, -1].eq(0).all()
    assert beyond


def test_crops_with_one_class_are_drawn_again() -> None:
    labels = torch.zeros(60, 60, dtype=torch.uint8)
    labels[:, 50:] = 1
    sample = SegmentationSample(torch.zeros(3, 60, 60, dtype=torch.uint8), labels)
    augment = SegmentationAugment(crop=20, short_side=60, scales=(1.0, 1.0), max_share=0.75)
    shares = [(augment(sample, np.random.default_rng(s)).labels_HW == 0).float().mean() for s in range(60)]
    mixed = sum(bool(x < 0.75) for x in shares) / 60
    assert mixed == pytest.approx(1 - (1 - 5 / 41) ** 10, abs=0.15)  # 5 of 41 columns to begin at have it; ten tries


def test_photometric_distortion_keeps_gray_gray_and_changes_colours() -> None:
    gray = np.full((4, 4, 3), 120, np.uint8)
    colour = np.tile(np.array([200, 80, 40], np.uint8), (4, 4, 1))
    seen = set()
    for seed in range(30):
        rng = np.random.default_rng(seed)
        out = photometric(gray, rng)
        assert np.ptp(out.astype(int), axis=2).max() <= 2  # HSV of bytes
        assert 40 <= out.mean() <= 240  # (120 - 32) * 0.5 to (120 + 32) * 1.5
        seen.add(tuple(photometric(colour, rng)[0, 0]))
    assert len(seen) > 20


def test_pixels_that_do_not_count_add_nothing_but_are_divided_by() -> None:
    head = segmentation_head(3, 2)
    head[0].eval()  # type: ignore[index]
    features, labels = torch.randn(1, 3, 2, 2), torch.tensor([[[0, 1], [255, 255]]])
    logits = head(features)[0]
    slow = -sum(F.log_softmax(logits[:, 0, x], 0)[labels[0, 0, x]] for x in (0, 1)) / 4
    torch.testing.assert_close(segmentation_loss(head, (features, labels)), slow)


@pytest.mark.parametrize(
    ("model", "size", "want"),
    [
        (Pixels(), (33, 40), (40, 40)),
        (Windowed(), (33, 50), (48, 72)),
        (Fixed(), (33, 90), (48, 48)),
        (Pixels(), (3, 8), (8, 8)),
    ],
)
def test_images_are_padded_to_the_next_size_or_resized_to_the_only_one(model: Any, size: Any, want: Any) -> None:
    assert padded_size(model, *size) == want
    image = torch.full((3, *size), 90, dtype=torch.uint8)
    seen = pad_to_model(model, image)
    assert seen.shape[1:] == want
    if not isinstance(model, Fixed):
        assert seen[:, : size[0], : size[1]].eq(90).all()
        assert seen.sum() == image.sum()
    else:
        assert seen.eq(90).all()


def test_stretch_is_what_padding_that_stays_in_does(context: Context) -> None:
    head = nn.Conv2d(3, 2, 1)
    nn.init.zeros_(head.weight)
    with torch.no_grad():
        head.weight[1], head.bias[:] = 1.0, torch.tensor([1.41, 0.0])  # type: ignore[index]
    data = Made(1, size=(40, 41))  # padded to 48 columns
    edges = {}
    for stretch in (True, False):
        ((_, guess),) = task(stretch=stretch).predictions(head, opened(Pixels()), data, context)
        assert guess.shape == (40, 41)
        edges[stretch] = int(guess[20].sum())
    assert edges[False] == pytest.approx(16, abs=1)
    assert edges[True] == pytest.approx(16 * 41 / 48, abs=1.5)


def test_a_model_of_one_size_is_trained_on_images_that_fill_its_crops(context: Context) -> None:
    heads = [task(short_side=side, steps=2).fit_head(opened(Fixed()), Made(4), context) for side in (16, 48)]
    small, own = (torch.cat([p.flatten() for p in head.parameters()]) for head in heads)
    torch.testing.assert_close(small, own)


def test_colours_that_are_classes_are_learned_and_pictures_are_kept(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Segmentation, "datasets", lambda self, context: [Made(4), Made(6)])
    scores = {s.metric: s.value for s in task(steps=25).run(opened(Pixels()), context)}
    assert scores["miou"] > 90
    assert list(scores) == ["miou", "macc", "aacc"]
    assert context.pictures is not None
    assert (context.pictures / "ade20k_made.png").stat().st_size > 500


class Knows(Pixels):
    """Every pixel's class, as one of two channels."""

    patch_size = 1

    def encode(self, images_B3HW: Tensor) -> VisionOutput:
        light = (images_B3HW[:, :1] > 0.5).float()
        return VisionOutput(None, torch.cat([1 - light, light], dim=1))

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        return height, width


def test_an_oracle_scores_100_at_every_side(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Segmentation, "datasets", lambda self, context: [Made(4), Made(6)])
    asked = {**task(steps=15).model_dump(), "kind": "segmentation_sweep", "sides": (20, 40)}
    found = [(s.metric, s.side, s.value) for s in SegmentationSweep.model_validate(asked).run(opened(Knows()), context)]
    assert found == [("miou", 20, 100.0), ("miou", 40, 100.0)]


def test_the_task_runs_on_the_toy_world(context: Context) -> None:
    scores = {s.metric: s for s in task(steps=3).run(open_model("teacher:toy_clip"), context)}
    assert 0 < scores["aacc"].value <= 100
    assert [s.metric for s in scores.values() if s.headline] == ["miou"]


def test_batches_do_not_depend_on_ranks_and_workers(context: Context) -> None:
    def draw(sample: SegmentationSample, rng: np.random.Generator) -> tuple[int, float]:
        return int((sample.labels_HW == 1).sum()), float(rng.random())

    def first(rank: int, world: int) -> list[list[tuple[int, float]]]:
        own = Context(root="toy", device=context.device, cache=context.cache, ranks=Ranks(rank, world))
        batches = training_batches(Made(), draw, batch=4, context=own)
        return [next(batches) for _ in range(4)]

    whole, halves = first(0, 1), [first(0, 2), first(1, 2)]
    assert whole == [a + b for a, b in zip(*halves)]
    assert len({x for batch in whole[:1] for x in batch}) == 4
    with pytest.raises(DataError, match="a batch of 4 cannot be shared evenly by 3 ranks"):
        first(0, 3)


def test_ranks_share_what_is_scored(context: Context) -> None:
    shares = [
        [
            number
            for number, _ in each_item(
                Made(), Context(root="toy", device=context.device, cache=context.cache, ranks=Ranks(r, 2))
            )
        ]
        for r in (0, 1)
    ]
    assert shares == [[0, 2, 4], [1, 3, 5]]


def test_resizing_is_not_antialiased() -> None:
    image = torch.zeros(3, 4, 8, dtype=torch.uint8)
    image[:, :, ::4] = 200
    half = resize_rgb(image, (2, 2))  # samples at columns 1.5 and 5.5
    assert half.eq(0).all()
