"""Targets computed once: training from a cache is training with the teachers, and another cache than the recipe's is refused."""

import json
import logging
import os
import re
import shutil
from unittest import mock

import pytest
import torch
from launch import launch
from PIL import Image

from radio_distill.balance import identity
from radio_distill.cli import main
from radio_distill.config.load import load_recipe
from radio_distill.data.shards import make_shards
from radio_distill.distill.bank import TeacherBank
from radio_distill.distill.build import view_specs_of
from radio_distill.distill.cache_files import CacheFolder, load_row, pack_row, stack_rows, tar_name, unpack
from radio_distill.distill.cached import open_cache
from radio_distill.distill.loop import train
from radio_distill.errors import DataError, RecipeError
from radio_distill.plan.stage import plan
from radio_distill.toyworld import render_images
from radio_distill.train import preempt
from radio_distill.types import VisionOutput

STEPS = 3
RECIPE = f"""
name: cached
student:
  model: vit_small_patch16_224
  overrides: {{patch_size: 8, embed_dim: 32, depth: 1, num_heads: 2}}
  heads: {{hidden: 16, inner: 0}}
start: {{kind: scratch}}
teachers: {{toy_clip: {{}}, toy_dino: {{}}}}
partitions:
  low:
    size: 48
    images: 8
    micro_batch: 4
    teachers: {{toy_clip: {{}}, toy_dino: {{size: 84}}}}
balance: {{ahead: false, window: 2, every: 1}}
optim: {{kind: adamw, steps: {STEPS}, freeze_trunk: 0, warmup: 1}}
data: {{streams: 2}}
engine: {{zero: 1, precision: fp32, teacher_precision: fp32, workers: 0}}
log: {{every: 1, pictures: 0}}
checkpoint: {{every: 1}}
"""


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """A training leaves variables behind that say what rank this process is."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i, pixels in enumerate(render_images(5, range(20), size=64)):
        Image.fromarray(pixels).save(folder / f"{i:03d}.jpg", quality=95)
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "cached.yaml"
    path.write_text(RECIPE)
    return str(path)


def losses(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


def trained(recipe, overrides, run):
    assert train(load_recipe(recipe, [*overrides, f"run={run}"], training=True)) == 0
    return losses(run)


def cache(recipe, overrides, folder, views=2):
    return main(["cache", recipe, *overrides, f"cache.write={folder}", "--views", str(views)])


@pytest.fixture(scope="module")
def source(photos, tmp_path_factory):
    """Four shards of five images."""
    folder = tmp_path_factory.mktemp("shards") / "toy"
    make_shards(photos, folder, count=5)
    return f"data.sources.toy.path={folder}"


@pytest.fixture(scope="module")
def exact(recipe, source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exact")
    assert cache(recipe, [source, "cache.store=exact"], folder) == 0
    return folder


@pytest.fixture(scope="module")
def small(recipe, source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8")
    assert cache(recipe, [source], folder) == 0
    return folder


@pytest.fixture(scope="module")
def online(recipe, source, tmp_path_factory):
    """A training whose teachers run, in the two views that the caches hold; the third step begins the second view."""
    return trained(recipe, [source, "data.views=2"], tmp_path_factory.mktemp("online") / "run")


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.tar")}


def open_it(recipe, *overrides):
    found = load_recipe(recipe, overrides, training=True)
    return open_cache(found, view_specs_of(found))


def test_an_exact_cache_is_online_training_bit_for_bit(recipe, source, exact, online, tmp_path):
    with mock.patch.object(TeacherBank, "encode", side_effect=AssertionError("a teacher ran")):
        assert trained(recipe, [source, f"cache.read={exact}"], tmp_path / "run") == online


def test_several_students_another_size_and_another_seed_read_the_same_cache(recipe, source, exact, tmp_path):
    overrides = [source, f"cache.read={exact}", "optim.steps=1", "seed=3", "partitions.low.size=64"]
    b = "students.b={model: vit_small_patch16_224, overrides: {patch_size: 8, embed_dim: 16, depth: 1, num_heads: 2}}"
    with mock.patch.object(TeacherBank, "encode", side_effect=AssertionError("a teacher ran")):
        trained(recipe, [*overrides, b], tmp_path / "run")
    assert losses(tmp_path / "run" / "students" / "b")


def test_int8_gives_the_losses_within_a_thousandth(recipe, source, small, tmp_path):
    balance = f"balance={{path: {small / 'balancers'}, window: 0}}"
    online = trained(recipe, [source, "data.views=2", balance], tmp_path / "online")
    cached = trained(recipe, [source, f"cache.read={small}", balance], tmp_path / "cached")
    assert [row[1] for row in cached] == pytest.approx([row[1] for row in online], rel=1e-3)


def test_int8_keeps_a_map_within_half_a_step_of_each_channels_largest_value():
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(3, 5, 4, 6, generator=generator) * torch.tensor([1e-3, 1, 50, 1, 0])[:, None, None] + 7
    one, summary = identity(5), torch.randn(3, 8, generator=generator)
    rows = [load_row(pack_row({"t": VisionOutput(summary, raw)}, i, {"t": one})) for i in range(3)]
    out = unpack(stack_rows(rows, "t"), one)
    assert torch.equal(out.summary_BC, summary)
    step = raw.abs().amax((2, 3), keepdim=True) / 127
    assert ((out.features_BCHW - raw).abs() <= step * 0.5001).all()


def test_a_killed_cache_goes_on_and_becomes_the_same(recipe, source, exact, tmp_path):
    encode, calls = TeacherBank.encode, []

    def dies(bank, batch):
        calls.append(batch)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return encode(bank, batch)

    with mock.patch.object(TeacherBank, "encode", dies):
        assert cache(recipe, [source, "cache.store=exact"], tmp_path) == 130
    begun = files(tmp_path)
    assert 0 < len(begun) < 8
    assert not list(tmp_path.rglob(".tmp*"))
    with pytest.raises(DataError, match="it is not finished"):
        open_it(recipe, source, f"cache.read={tmp_path}")
    next(tmp_path.rglob("*.tar")).with_name(".tmp-0-left.tar").touch()  # of a process that got no chance to tidy up
    assert cache(recipe, [source, "cache.store=exact"], tmp_path) == 0
    assert files(tmp_path) == files(exact)
    assert not list(tmp_path.rglob(".tmp*"))
    with mock.patch.object(TeacherBank, "encode", side_effect=AssertionError("a teacher ran")):
        assert cache(recipe, [source, "cache.store=exact"], tmp_path) == 0


def test_a_stopped_training_goes_on_from_the_cache_exactly(recipe, source, exact, online, tmp_path):
    overrides = [source, f"cache.read={exact}", f"run={tmp_path / 'run'}"]
    preempt.ask("SIGUSR1")
    assert train(load_recipe(recipe, overrides)) == preempt.STOPPED
    preempt._received.clear()
    assert trained(recipe, overrides, tmp_path / "run") == online


def test_what_the_cache_lacks_is_told_or_computed(recipe, source, exact, online, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(exact, copy)
    for path in (copy / "low").glob("*/toy/000002.tar"):
        path.unlink()
    with pytest.raises(DataError, match=r"does not hold toy/000002\.tar/.* of partition 'low'.*cache\.miss=online"):
        trained(recipe, [source, f"cache.read={copy}"], tmp_path / "error")
    run = trained(recipe, [source, f"cache.read={copy}", "cache.miss=online"], tmp_path / "online")
    assert [row[1] for row in run] == pytest.approx([row[1] for row in online], rel=1e-5)  # smaller batches of teachers
    (copy / "low/0/toy/000001.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(DataError, match=r"000001\.tar is damaged"):
        trained(recipe, [source, f"cache.read={copy}", "cache.miss=online"], tmp_path / "damaged")


def write_on_rank(rank, recipe, overrides, folder):
    assert cache(recipe, overrides, folder) == 0


def test_two_ranks_write_what_one_writes(recipe, source, exact, tmp_path):
    launch(write_on_rank, 2, recipe, [source, "cache.store=exact"], tmp_path)
    assert CacheFolder(str(tmp_path)).header() == CacheFolder(str(exact)).header()
    assert files(tmp_path).keys() == files(exact).keys()
    for name in files(exact):
        ours, theirs = (CacheFolder(str(folder)).open_tar(str(name)) for folder in (tmp_path, exact))
        assert ours.keys() == theirs.keys()
        for seed, read in ours.items():  # images meet others in a batch, which may change the last bits
            torch.testing.assert_close(load_row(read()), load_row(theirs[seed]()), atol=1e-5, rtol=1e-5)


def test_a_training_reads_its_cache_from_an_object_store(recipe, source, exact, small, online, tmp_path):
    """What `aws s3 cp` does, `cat` does as well."""
    assert trained(recipe, [source, f"cache.read=pipe:cat {exact}/{{}}"], tmp_path / "exact") == online
    stored, local = (
        trained(recipe, [source, f"cache.read={where}"], tmp_path / name)
        for name, where in (("stored", f"pipe:cat {small}/{{}}"), ("local", str(small)))
    )
    assert stored == local


def test_a_cache_is_read_through_a_command(recipe, source, exact):
    _, folder, header = open_it(recipe, source, f"cache.read=pipe:cat {exact}/{{}}")
    assert header == CacheFolder(str(exact)).header()
    tar = tar_name("low", 1, "toy", 2)
    theirs, ours = (place.open_tar(tar) for place in (folder, CacheFolder(str(exact))))
    assert {seed: read() for seed, read in theirs.items()} == {seed: read() for seed, read in ours.items()}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.crop.scale=[0.2, 1.0]", r"data.crop.scale: \[0.5, 1.0\] in the cache, \[0.2, 1.0\] in the recipe"),
        ("partitions.low.teachers.toy_dino.size=56", "partitions.low.toy_dino.size: 84 in the cache, 56 in the recipe"),
        (
            "partitions.low.teachers.toy_clip.upsampler={kind: tile, factor: 2}",
            "partitions.low.toy_clip.upsampler.kind: bilinear in the cache, tile in the recipe",
        ),
        ("engine.teacher_precision=bf16", "teacher_precision: fp32 in the cache, bf16 in the recipe"),
        ("teachers.toy_dino.card=toy_siglip", r"teachers.toy_dino.weights: \w+ in the cache, \w+ now"),
        ("data.view_seed=7", "data.view_seed: 0 in the cache, 7 in the recipe"),
        ("data.views=3", "it has 2 views and data.views is 3"),
    ],
)
def test_a_recipe_that_was_edited_after_caching_is_refused_by_name(recipe, source, exact, override, message):
    with pytest.raises(DataError, match=message):
        open_it(recipe, source, f"cache.read={exact}", override)


def test_what_does_not_change_targets_may_be_edited(recipe, source, exact):
    free = [
        "loss.features.cosine=1",
        "optim.lr=0.1",
        "seed=9",
        "partitions.low.images=4",
        "balance.method.kind=pca",
        "data.views=1",
    ]
    assert open_it(recipe, source, f"cache.read={exact}", *free)[0].data.view_seed == 0


def test_another_cache_is_not_written_over(recipe, source, exact, tmp_path, capfd):
    before = files(exact)
    assert cache(recipe, [source], exact) == 2
    assert "store: exact in the cache, int8 in the recipe\nset cache.write to another folder" in capfd.readouterr().err
    assert cache(recipe, [source, "cache.store=exact", "partitions.low.teachers.toy_dino.size=56"], exact) == 2
    assert "partitions.low.toy_dino.size" in capfd.readouterr().err
    fewer = tmp_path / "fewer.yaml"
    fewer.write_text(RECIPE.replace(", toy_dino: {}", "").replace(", toy_dino: {size: 84}", ""))
    assert cache(str(fewer), [source, "cache.store=exact"], exact) == 2
    assert "teachers.toy_dino: in the cache, not in the recipe" in capfd.readouterr().err
    assert files(exact) == before
    assert open_it(str(fewer), source, f"cache.read={exact}")  # to read less than it holds is no trouble
    (tmp_path / "low/0/toy").mkdir(parents=True)
    (tmp_path / "low/0/toy/000000.tar").touch()
    assert cache(recipe, [source], tmp_path) == 2
    assert "holds shards and no cache.json, so it is not known of what" in capfd.readouterr().err


def test_wishes_that_cannot_be_met_are_told(recipe, source, exact, photos, tmp_path, capfd):
    out = f"cache.write={tmp_path / 'cache'}"
    assert main(["cache", recipe, source, out]) == 2
    assert "how many views of every image? give --views N" in capfd.readouterr().err
    with mock.patch("shutil.disk_usage", return_value=mock.Mock(free=1000)):
        assert main(["cache", recipe, source, out, "--views", "1"]) == 2
    assert "the cache takes 0.6 MB more and 0.0 MB are free" in capfd.readouterr().err
    with pytest.raises(DataError, match=r"holds no cache\.json; expected what `radio-distill cache RECIPE` wrote"):
        open_it(recipe, source, f"cache.read={tmp_path}")
    with pytest.raises(DataError, match=r"1 of 1 shards of data\.sources\.other"):
        open_it(recipe, f"data.sources.other.path={photos}", f"cache.read={exact}")
    with pytest.raises(RecipeError, match="teacher ranks have no work"):
        load_recipe(recipe, [source, f"cache.read={exact}", "engine.placement={kind: dedicated}"])


def test_size_and_break_even_come_first_and_the_size_is_right(recipe, source, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert cache(recipe, [source], tmp_path, views=1) == 0
    told = next(r.getMessage() for r in caplog.records if "in all" in r.getMessage())
    size = sum(path.stat().st_size for path in tmp_path.rglob("*.tar")) / 1e6
    assert float(re.search(r"20 images: ([\d.]+) MB in all", told)[1]) == pytest.approx(size, rel=0.2)
    assert "pays from 1 training on" in caplog.text
    first = files(tmp_path)
    assert cache(recipe, [source], tmp_path, views=2) == 0
    assert cache(recipe, [source], tmp_path, views=1) == 0
    assert CacheFolder(str(tmp_path)).header().views == 2
    assert first.items() < files(tmp_path).items()
    assert len(files(tmp_path)) == 2 * len(first)


def test_a_plan_of_a_training_from_a_cache_pays_for_no_teacher(recipe, source, exact):
    plans = [plan(load_recipe(recipe, [source, f"cache.read={where}"]), world_size=1) for where in (exact, "null")]
    assert sum(plans[0].partitions[0].teacher_flop.values()) == 0 < sum(plans[1].partitions[0].teacher_flop.values())
    assert plans[0].partitions[0].student_flop == plans[1].partitions[0].student_flop
    assert "no teacher runs" in plans[0].notes[0]
