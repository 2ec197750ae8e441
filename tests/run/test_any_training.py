"""One upsampler trained with several teachers in turn, in this process: turns, statistics, exact resume, ranks, what is left behind."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from radio_distill.align import resize_map
from radio_distill.balance import Moments, fit, load_balancers
from radio_distill.config.load import load_card, load_upsampler_recipe
from radio_distill.config.recipe import BuiltInBalance
from radio_distill.distill import gather
from radio_distill.doctor import examine_recipe
from radio_distill.errors import CheckpointError
from radio_distill.eval.report import write_report
from radio_distill.toyworld import write_toyworld
from radio_distill.train.distributed import World
from radio_distill.upsamplers.downsample import SimpleDownsampler
from radio_distill.upsamplers.folder import load_upsampler
from radio_distill.upsamplers.objective import ViewLoss
from radio_distill.upsamplers.sharpener import Sharpener
from radio_distill.upsamplers.train import Inputs, Served, UpsamplerTask, statistics, train_upsampler

CPU = torch.device("cpu")
NAMES = ["toy_clip", "toy_dino", "toy_sam"]
SHORT = [
    "teachers.toy_siglip=null",
    "teachers.toy_dino.size=56",
    "network.width=32",
    "images=4",
    "jitter.views=1",
    "balance.window=2",
    "optim.steps=6",
    "optim.warmup=1",
    "data.streams=2",
    "log.every=1",
    "log.pictures=5",
    "checkpoint.every=4",
]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos") / "scenes"
    write_toyworld(folder, count=24, size=96, seed=7, shards=2)
    return folder


def recipe_of(scenes: Path, run: Path, *overrides: str):
    settings = [*SHORT, f"data.sources.toy.path={scenes}", f"run={run}", *overrides]
    return load_upsampler_recipe("toy/upsampler/any", settings, training=True)


@pytest.fixture(scope="module")
def whole(scenes, tmp_path_factory):
    """One uninterrupted run."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert train_upsampler(recipe_of(scenes, run)) == 0
    return run


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def task_of(recipe, balancers, network=None) -> UpsamplerTask:
    """What a training trains, without an engine."""
    served = {}
    torch.manual_seed(0)
    for name, teacher in Inputs(recipe, World(0, 1, 0, CPU)).teachers.items():
        channels, side = teacher.card.output.features, recipe.each[name].size
        sharpener = Sharpener(recipe.network, channels, (side // teacher.patch_size,) * 2, balancers[name], network)
        network, served[name] = sharpener.network, Served(teacher, sharpener, (side, side))
    return UpsamplerTask(recipe, served, ViewLoss(1, SimpleDownsampler(7), recipe.loss))


def test_a_run_measures_every_teacher_in_its_turn_and_its_folder_serves_any(whole):
    told = [[key.removeprefix("fidelity/") for key in row if key.startswith("fidelity/")] for row in rows(whole)]
    assert told == [[name] for name in NAMES * 2]
    assert all(row["grad_norm"] > 0 for row in rows(whole))
    assert (whole / "pictures" / "step-00000005.png").is_file()
    assert set(json.loads((whole / "teachers.json").read_text())) == set(NAMES)
    saved = load_upsampler(whole, load_card("toy_siglip"))
    assert (saved.unseen, [(one.card.name, one.size) for one in saved.seen]) == (
        True,
        [("toy_clip", 84), ("toy_dino", 56), ("toy_sam", 192)],
    )
    assert (saved.provenance["step"], saved.provenance["images"]) == (6, 24)
    assert re.search(r"<td>2x any</td>.*toy_sam \d+\.\d\d", write_report(whole).read_text(), re.DOTALL)


def test_a_run_that_was_killed_goes_on_bit_for_bit(scenes, whole, tmp_path):
    """At the checkpoint of step 4 it is the second teacher's turn."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    assert train_upsampler(recipe_of(scenes, run)) == 0
    same = ("step", "loss", "grad_norm")
    assert [[row[key] for key in same] for row in rows(run)] == [[row[key] for key in same] for row in rows(whole)]
    files = [path / "checkpoints" / "step-00000006" / "upsampler" / "upsampler.safetensors" for path in (run, whole)]
    one, other = map(load_file, files)
    assert all(torch.equal(x, other[key]) for key, x in one.items())
    with pytest.raises(CheckpointError, match=r"teachers\.toy_dino\.size: 56 -> 84"):
        train_upsampler(recipe_of(scenes, run, "teachers.toy_dino.size=84"))


def test_the_statistics_of_a_teacher_are_those_of_the_images_of_its_steps(scenes, whole, tmp_path):
    recipe = recipe_of(scenes, tmp_path / "run")
    inputs, moments = Inputs(recipe, World(0, 1, 0, CPU)), {name: Moments(load_card(name).output.features) for name in NAMES}
    inputs.streams.open({})
    for step in range(6):
        name, size = NAMES[step % 3], recipe.each[NAMES[step % 3]].size
        for batch in inputs.streams.next(CPU):
            images = resize_map(batch.views[name].images_B3HW.float() / 255, (size, size))
            moments[name].update(inputs.teachers[name].encode(images).features_BCHW)
    found = load_balancers(whole / "checkpoints" / "step-00000006" / "balancers")
    assert found.keys() == moments.keys()
    for name in NAMES:
        torch.testing.assert_close(found[name].inverse_weight, fit(BuiltInBalance(), moments[name], name).inverse_weight)


def test_statistics_gathered_alone_are_found_by_the_teachers_cards(scenes, whole, tmp_path):
    settings = [*SHORT, f"data.sources.toy.path={scenes}", f"run={tmp_path / 'run'}"]
    assert gather.main(["toy/upsampler/any", *settings]) == 0
    folder, world = tmp_path / "run" / "balancers", World(0, 1, 0, CPU)
    recipe = recipe_of(scenes, tmp_path / "other", f"balance.path={folder}", "balance.window=0")
    loaded, own = (
        statistics(recipe, world, Inputs(recipe, world)),
        load_balancers(whole / "checkpoints/step-00000006/balancers"),
    )
    for name in NAMES:
        assert torch.equal(loaded[name].weight, own[name].weight)


def test_a_step_is_that_of_a_training_with_its_teacher_alone_and_ranks_share_it(scenes, whole, tmp_path):
    recipe = recipe_of(scenes, tmp_path / "run")
    balancers = load_balancers(whole / "checkpoints" / "step-00000006" / "balancers")
    together = task_of(recipe, balancers)
    streams, ranks = Inputs(recipe, World(0, 1, 0, CPU)).streams, [Inputs(recipe, World(i, 2, i, CPU)).streams for i in (0, 1)]
    for each in (streams, *ranks):
        each.open({})
    for name in NAMES:
        (batch,), parts = streams.next(CPU), [each.next(CPU)[0] for each in ranks]
        cells = together.valid_cells(batch)
        alone = recipe_of(scenes, tmp_path / name, "teachers=null", f"teacher={name}", f"size={recipe.each[name].size}")
        own = task_of(alone, {"teacher": balancers[name]}, together.sharpener.network)
        batch_of_own = replace(batch, views={"teacher": batch.views[name]})
        expected = own(batch_of_own, cells).total
        assert torch.equal(together(batch, cells).total, expected)
        assert [list(part.views) for part in parts] == [[name], [name]]
        assert sorted(key for part in parts for key in part.keys) == sorted(batch.keys)
        torch.testing.assert_close(sum(together(part, cells).total for part in parts), expected)


def test_its_doctor_looks_at_every_teacher(scenes, tmp_path):
    found = {finding.what: finding for finding in examine_recipe(recipe_of(scenes, tmp_path / "run"))}
    assert {f"teacher {name}" for name in NAMES} <= found.keys()
    assert not any(finding.missing for finding in found.values())
