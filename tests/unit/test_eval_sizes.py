"""A teacher sees the same with and without its upsampler: sizes that tasks ask for are of the network's input."""

from pathlib import Path

import pytest
import torch
from made_upsampler import make

from radio_distill.align import resize_map
from radio_distill.errors import RadioDistillError
from radio_distill.eval import runner
from radio_distill.eval.features import FeatureCache
from radio_distill.eval.models import open_model
from radio_distill.eval.runner import run_suite
from radio_distill.eval.sizes import Seen, seen
from radio_distill.eval.suites import load_suite
from radio_distill.eval.task import Context
from radio_distill.teachers.base import Teacher

TABLES = {
    "1": ("detection", "coco", ["coco.steps=1", "coco.batch=2", "coco.side=56"]),
    "12": ("probe3d", "navi_depth_linear", ["navi_depth_linear.epochs=1", "navi_depth_linear.train_images=4", "navi_depth_linear.test_images=2"]),
    "13": ("probe3d", "probe3d_correspondence", ["probe3d_correspondence.pairs=1"]),
    "14": ("nyudv2", "nyud", ["nyud.steps=1", "nyud.batch=2", "nyud.canvas=[64,64]", "nyud.input=84"]),
    "figure 7": ("dense", "ade20k", ["ade20k.steps=2", "ade20k.batch=2", "ade20k.warmup=1"]),
}  # fmt: skip
"""Suite, task and settings that make it short."""


def context(folder: Path) -> Context:
    return Context(root="toy", device=torch.device("cpu"), cache=FeatureCache(folder / "cache"), limit=2, batch=2)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    trained = make(tmp_path_factory.mktemp("up"), "toy_dino", factor=2, mixer="linear")
    return ["teacher:toy_dino", f"teacher:toy_dino+featsharp:{trained}", "teacher:toy_dino+tile:3"]


@pytest.fixture(autouse=True)
def _without_costs(monkeypatch):
    monkeypatch.setattr(runner, "_measure_cost", lambda *_: None)  # its timing takes most of the time of such short tasks


@pytest.mark.parametrize("table", TABLES)
def test_every_row_of_a_table_has_the_same_teacher(table, models, tmp_path, monkeypatch):
    """A resizable teacher: its own input, not 1 / factor of it; the map is `factor` times as fine; px and map say so."""
    encoded, forward = [], Teacher.forward

    def spy(self, pixels):
        encoded.append(tuple(pixels.shape[-2:]))
        return forward(self, pixels)

    monkeypatch.setattr(Teacher, "forward", spy)
    suite, task, overrides = TABLES[table]
    sizes, rows = {}, {}
    for model in models:
        encoded.clear()
        asked = load_suite(suite, "smoke", overrides).only([task])
        outcome = run_suite(asked, [model], context(tmp_path), tmp_path / f"{len(rows)}.jsonl")
        assert outcome.failures == []
        sizes[model] = set(encoded)
        rows[model] = {(r.resolution, r.grid) for r in outcome.results}
    assert len(set(map(frozenset, sizes.values()))) == 1, sizes
    ((side, cells),) = rows[models[0]]
    assert rows == {model: {(side, factor * cells)} for model, factor in zip(models, (1, 2, 3))}


def test_a_teacher_of_one_size_has_its_own_whatever_is_asked():
    model = open_model("teacher:toy_clip+bilinear:4").model
    assert seen(model, 512, 512) == seen(model, 96, 40) == Seen((84, 84), (336, 336), (48, 48))


def test_a_model_without_upsampler_sees_what_it_is_given():
    assert seen(open_model("teacher:toy_dino").model, 100, 60) == Seen((98, 63), (98, 63), (14, 9))


def test_pixels_of_an_image_can_be_asked_for_apart(tmp_path, monkeypatch):
    """Figure 7: with a 1x input the image holds no detail beyond what the network sees; the map is as fine."""
    from radio_distill.eval.tasks import segmentation

    given = []
    monkeypatch.setattr(
        segmentation, "frozen_map", lambda m, images, c: given.append(images) or m.encode(images.float() / 255).features_BCHW
    )
    finest = {}
    for pixels in ("null", "1"):
        given.clear()
        suite = load_suite("dense", "smoke", [*TABLES["figure 7"][2], f"ade20k.pixels={pixels}"]).only(["ade20k"])
        outcome = run_suite(suite, ["teacher:toy_dino+bilinear:2"], context(tmp_path), tmp_path / f"{pixels}.jsonl")
        assert outcome.failures == []
        images = given[1].float()
        size = (images.shape[-2], images.shape[-1])
        without_detail = resize_map(resize_map(images, (size[0] // 2, size[1] // 2)), size)
        finest[pixels] = (size, float((images - without_detail).square().mean()))
    assert finest["1"][0] == finest["null"][0]
    assert finest["1"][1] < 0.3 * finest["null"][1]


def test_random_weights_are_another_model_with_the_same_statistics(tmp_path):
    folder = make(tmp_path / "up", factor=2, kind="featup", seed=1)
    trained, random = (open_model(f"teacher:toy_clip+{how}:{folder}") for how in ("featsharp", "random"))
    assert trained.id != random.id
    assert random.details["random"] is True
    assert {**random.details, "random": None, "steps": 0} == {**trained.details, "random": None, "steps": 0}
    images = torch.rand(1, 3, 168, 168)
    maps = [opened.model.encode(images).features_BCHW for opened in (trained, random, trained)]
    assert maps[0].shape == maps[1].shape
    assert not torch.equal(maps[0], maps[1])
    assert torch.equal(maps[0], maps[2])


@pytest.mark.parametrize(
    "name",
    ["teacher:toy_clip+bicubic:2", "teacher:toy_clip+tile", "teacher:toy_clip+bilinear:99", "teacher:toy_clip+s2:runs/x"],
)
def test_wrong_upsamplers_are_told(name):
    with pytest.raises(RadioDistillError, match="expected"):
        open_model(name)
