"""`radio-distill stats` of a stage and of an upsampler, in this process: what they say, and that either reads what both wrote."""

import logging
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from PIL import Image

from radio_distill.balance import Balancer, load_balancers, name_of
from radio_distill.config.load import load_card, load_upsampler_recipe
from radio_distill.distill.gather import main
from radio_distill.doctor import examine_recipe
from radio_distill.errors import RecipeError
from radio_distill.toyworld import render_images
from radio_distill.train.distributed import World
from radio_distill.upsamplers.train import statistics


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i, pixels in enumerate(render_images(5, range(8), size=96)):
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


class NoTeacher:
    """Inputs of an upsampler whose statistics are loaded: nothing but the card is asked for."""

    class teacher:
        card = load_card("toy_clip")

    teachers: ClassVar = {"toy_clip": teacher}


def read(folder: Path) -> Balancer:
    return statistics(
        load_upsampler_recipe("toy/upsampler/toy_clip", [f"balance.path={folder}"]),
        World(0, 1, 0, torch.device("cpu")),
        NoTeacher,  # type: ignore[arg-type]
    )["toy_clip"]


def test_both_kinds_of_recipes_write_what_an_upsampler_reads(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    data, few = f"data.sources.toy.path={photos}", ["balance.window=1"]
    one_teacher = ["teachers={toy_clip: null, toy_siglip: null, toy_dino: null, toy_sam: null, mine: {card: toy_clip, balance: {kind: zca}}}",
                   "partitions.low.teachers={toy_clip: null, toy_siglip: null, toy_dino: null, toy_sam: null, mine: {}}",
                   "partitions.low.images=4"]  # fmt: skip
    assert main(["toy/stage1", data, f"run={tmp_path / 'stage'}", *few, *one_teacher]) == 0
    assert main(["toy/upsampler/toy_clip", data, f"run={tmp_path / 'up'}", "images=4", *few]) == 0
    stage, up = (tmp_path / name / "balancers" for name in ("stage", "up"))
    assert (name_of(stage, load_card("toy_clip")), name_of(up, load_card("toy_clip"))) == ("mine", "toy_clip")
    assert load_balancers(stage)["mine"].kind == "zca"  # its own method, where the recipe says phi_s
    assert torch.equal(read(stage).weight, load_balancers(stage)["mine"].weight)
    assert read(up).kind == "phi_s"
    for folder in (stage, up):
        found = {f.what: f for f in examine_recipe(load_upsampler_recipe("toy/upsampler/toy_clip", [f"balance.path={folder}"]))}
        assert not found["balancers"].missing, found
    said = next(text for text in caplog.messages if text.startswith("mine"))
    facts = load_balancers(stage)["mine"].facts
    assert f"{100 * float(facts['first_share']):.0f} % of the variance in the first direction, effective rank" in said
    assert said.endswith("of 96")


def test_a_recipe_without_statistics_is_told() -> None:
    with pytest.raises(RecipeError, match="no recipe of a stage or of an upsampler"):
        main(["vlm/llava15_projector", "start.student=a", "start.lm=b", "data.sources.x={path: a.json, images: b}"])
