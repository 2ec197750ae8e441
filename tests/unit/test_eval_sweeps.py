"""Suites over many resolutions: throughput and mode switching; resizing of images of any size for a model."""

from pathlib import Path

import pytest
import torch

from radio_distill.config.load import load_card
from radio_distill.eval.datasets import open_dataset
from radio_distill.eval.encode import Resize, encode_batches
from radio_distill.eval.features import FeatureCache
from radio_distill.eval.models import NamedModel
from radio_distill.eval.runner import run_suite
from radio_distill.eval.suites import load_suite
from radio_distill.eval.task import Context
from radio_distill.teachers.base import load_teacher
from radio_distill.types import VisionOutput


class Blocks:
    """Patches of 8 pixels, as they are: features do not depend on the resolution but by its blur."""

    patch_size = 8

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        return max(8, round(height / 8) * 8), max(8, round(width / 8) * 8)

    def encode(self, images_B3HW: torch.Tensor) -> VisionOutput:
        features = torch.nn.functional.avg_pool2d(images_B3HW, 8)
        return VisionOutput(features.flatten(2).mean(2), features)


def blocks() -> Blocks:
    return Blocks()


def noise() -> Blocks:
    """Features that have nothing to do with the image."""
    model = Blocks()
    generator = torch.Generator().manual_seed(0)

    def encode(images_B3HW: torch.Tensor) -> VisionOutput:
        b, _, h, w = images_B3HW.shape
        return VisionOutput(None, torch.randn(b, 3, h // 8, w // 8, generator=generator))

    model.encode = encode  # type: ignore[method-assign]
    return model


def context(tmp_path: Path, root: str = "toy", **settings: int) -> Context:
    return Context(root=root, device=torch.device("cpu"), cache=FeatureCache(tmp_path / "cache"), limit=6, **settings)


def test_features_drift_from_those_at_the_resolution_of_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    suite = load_suite("resolution", "smoke", ["features.sides=[32,64,128]", "features.reference=64"]).only(["features"])
    names = [f"{Path(__file__).stem}:{name}" for name in ("blocks", "noise")]
    outcome = run_suite(suite, names, context(tmp_path), tmp_path / "r.jsonl")
    assert outcome.failures == []
    drift = {(r.model.rpartition(":")[2], r.resolution): r.value for r in outcome.results}
    assert drift["blocks", 64] == drift["noise", 64] == 0  # the same features, from the cache
    assert max(drift["blocks", 32], drift["blocks", 128]) < 0.3
    assert drift["noise", 128] > 1


def test_a_curve_has_one_point_for_every_size_and_is_not_measured_twice(tmp_path: Path) -> None:
    suite = load_suite(
        "throughput", "smoke", ["forward.runs=1", "forward.warmup=0", "forward.side=16", "forward.factors=[1,2,4]"]
    )
    models = ["timm:vit_tiny_patch16_224?weights=random", "teacher:toy_sam"]
    results = run_suite(suite, models, context(tmp_path), tmp_path / "r.jsonl").results
    tokens = {r.resolution: r.value for r in results if r.metric == "tokens" and r.model.startswith("timm")}
    assert tokens == {16: 2, 32: 5, 64: 17}
    assert len({r.resolution for r in results if r.model == "teacher:toy_sam"}) == 1  # it has one size
    assert all(r.value > 0 and not r.headline for r in results)
    assert run_suite(suite, models, context(tmp_path), tmp_path / "r.jsonl").results == results


@pytest.mark.parametrize(("rule", "expected"), [("short_side", (64, 128)), ("centre_crop", (64, 64)), ("exact", (64, 64))])
def test_images_are_resized_by_a_named_rule(rule: str, expected: tuple[int, int]) -> None:
    image = torch.zeros(3, 100, 200, dtype=torch.uint8)
    image[:, :, 50:150] = 200  # the middle
    resized = Resize(rule, 62).fit(Blocks())(image)
    assert (tuple(resized.shape[1:]), resized.dtype) == (expected, torch.uint8)
    assert (resized[..., 0].float().mean() > 150) == (rule == "centre_crop")


def test_a_model_of_one_size_gets_it(tmp_path: Path) -> None:
    teacher = load_teacher(load_card("toy_clip"))
    assert Resize("short_side", 500).fit(teacher)(torch.zeros(3, 90, 40, dtype=torch.uint8)).shape == (3, 84, 84)


class Tall:
    """Images of alternating shapes."""

    def __init__(self) -> None:
        self.name, self.split, self.keys = "tall", "val", [str(i) for i in range(7)]

    def __getitem__(self, index: int):
        from radio_distill.eval.datasets.base import LabelledImage

        size = (16, 32) if index % 2 else (32, 16)
        return LabelledImage(torch.full((3, *size), 10 * index, dtype=torch.uint8), index)


@pytest.mark.parametrize("batch", [1, 2, 50])
def test_images_of_several_sizes_come_back_in_their_order(tmp_path: Path, batch: int) -> None:
    opened = NamedModel("blocks", Blocks(), {}, dict)
    settings = context(tmp_path, batch=batch)
    outputs = encode_batches(opened, Tall(), Resize("short_side", 16), range(7), settings, {}, maps=False)
    summaries = torch.cat([o.summary_BC for o in outputs])
    assert torch.allclose(summaries[:, 0] * 255, torch.arange(7) * 10.0)


def test_worker_processes_give_the_same_as_none(tmp_path: Path) -> None:
    opened = NamedModel("blocks", Blocks(), {}, dict)
    dataset = open_dataset("any", "val", "toy", kind="labelled").limited(5)

    def summaries(workers: int) -> torch.Tensor:
        settings = context(tmp_path, batch=2, workers=workers)
        return torch.cat([o.summary_BC for o in encode_batches(opened, dataset, Resize("exact", 32), range(5), settings, {})])

    assert torch.equal(summaries(2), summaries(0))
