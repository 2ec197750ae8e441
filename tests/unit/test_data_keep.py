"""Keep-lists and single-source batches: neither the order of images nor an exact resume changes."""

import json
from functools import partial
from itertools import islice

import pytest
from PIL import Image

from radio_distill.config.load import load_recipe
from radio_distill.config.recipe import Data, Source
from radio_distill.data.keep import Keep, keep_lists, write_keep_list
from radio_distill.data.loader import build_loader
from radio_distill.data.once import Once, ShardView
from radio_distill.data.reading import read_shard
from radio_distill.data.shards import make_shards
from radio_distill.data.sources import list_source
from radio_distill.data.stream import Feed, Stream
from radio_distill.data.views import ViewSpec, always
from radio_distill.doctor import examine_recipe
from radio_distill.errors import DataError, RecipeError


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(40):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="module", params=["tars", "folder"])
def listing(request, photos, tmp_path_factory):
    """The same images as shards of ten, and as a folder."""
    path = photos
    if request.param == "tars":
        path = tmp_path_factory.mktemp("tars") / "in"
        make_shards(photos, path, count=10)
    return list_source("src", Source(path=str(path))), str(path)


def keep_of(listing, folder, weight):
    """A list that gives every sample `weight(number in the source)`."""
    shards, numbers, weights = listing.shards(1), iter(range(1000)), []
    for shard in shards:
        found = {raw.key: weight(next(numbers)) for raw in read_shard(shard)}
        weights.append({key: w for key, w in found.items() if w})
    write_keep_list(folder, listing.fingerprint(1), [shard.name for shard in shards], weights)
    return Keep(folder, listing.fingerprint(1))


def stream_of(listing, keep=None, **data):
    return Stream((Feed("src", 1.0, listing.shards(2), keep),), 0, 2, seed=3, order="low", data=Data(shuffle=4, **data))


def test_those_kept_come_in_the_order_they_had(listing, tmp_path):
    listing, _ = listing
    keep = keep_of(listing, tmp_path / "keep", lambda n: float(n % 3 == 0))
    everything = [(s.key, s.seed) for s in islice(stream_of(listing), 80)]  # four epochs of this stream
    kept = [pair for pair in everything if keep.weight(pair[0].removeprefix("src/"))]
    assert 20 < len(kept) < 35
    assert [(s.key, s.seed) for s in islice(stream_of(listing, keep), len(kept))] == kept


def test_a_resume_is_exact_at_every_place(listing, tmp_path):
    listing, _ = listing
    keep = keep_of(listing, tmp_path / "keep", lambda n: (0.0, 1.0, 0.4)[n % 3])
    whole, keys, states = stream_of(listing, keep), [], []
    for _ in range(30):
        states.append(json.loads(json.dumps(whole.state())))
        keys.append(next(whole).key)
    for i in (1, 7, 13, 22):
        resumed = stream_of(listing, keep)
        resumed.load(states[i])
        assert [next(resumed).key for _ in range(30 - i)] == keys[i:]


def test_a_weight_is_the_share_of_epochs_and_no_image_comes_twice_in_one(listing, tmp_path):
    listing, _ = listing
    keep = keep_of(listing, tmp_path / "keep", lambda n: 0.5)
    keys = [raw.key for shard in listing.shards(1) for raw in read_shard(shard)]
    seen = [sum(keep.is_seen(key, epoch) for epoch in range(400)) for key in keys]
    assert all(150 < count < 250 for count in seen)
    stream, by_epoch = stream_of(listing, keep), {}
    for _ in range(60):
        sample = next(stream)
        by_epoch.setdefault(stream.state()["sources"]["src"][0], []).append(sample.key)
    assert all(len(keys) == len(set(keys)) for keys in by_epoch.values())


def test_images_that_are_not_kept_are_passed_over_when_a_source_is_read_once(listing, tmp_path):
    listing, _ = listing
    keep = keep_of(listing, tmp_path / "keep", lambda n: float(n < 7))
    items = [ShardView("src", shard, 0) for shard in listing.shards(1)]
    once = Once(items, [ViewSpec("student", 16, 1)], Data(), partition_size=16, seed=0, size=4, keep={"src": keep})
    assert sum(len(piece.rows) for piece in once) == 7


def recipe_of(path, *overrides):
    images = ["partitions.low.images=16", "engine.workers=0", "data.streams=2"]
    return load_recipe("toy/stage1", [f"data.sources.src.path={path}", *images, *overrides])


def test_a_recipe_reads_its_keep_list_and_refuses_another_on_resume(listing, tmp_path):
    listing, path = listing
    for name, modulus in (("a", 2), ("b", 4)):
        keep_of(listing, tmp_path / name, lambda n, modulus=modulus: float(n % modulus == 0))
    specs = partial(always, [ViewSpec("student", 48, 8)])
    batch = next(iter(build_loader(recipe_of(path, f"data.sources.src.keep={tmp_path / 'a'}"), "low", specs)))[0]
    kept = Keep(tmp_path / "a", listing.fingerprint(1))
    assert len(batch.keys) == 16
    assert all(kept.weight(key.removeprefix("src/")) for key in batch.keys)
    with pytest.raises(DataError, match=r"data\.sources\.src is not what the run was started with"):
        build_loader(recipe_of(path, f"data.sources.src.keep={tmp_path / 'b'}"), "low", specs, position=batch.position)


def test_doctor_says_how_many_are_kept_and_what_is_wrong_with_a_list(listing, tmp_path):
    listing, path = listing
    keep_of(listing, tmp_path / "keep", lambda n: float(n < 7))
    keep = f"data.sources.src.keep={tmp_path / 'keep'}"
    found = {one.what: one for one in examine_recipe(recipe_of(path, keep))}["images src"]
    assert "7 samples kept" in found.text
    found = {one.what: one for one in examine_recipe(recipe_of(path, f"{keep}/none"))}["images src"]
    assert found.missing


def test_lists_that_do_not_fit_are_refused(listing, photos, tmp_path):
    listing, path = listing
    keep_of(listing, tmp_path / "keep", lambda n: 1.0)
    few = tmp_path / "few"
    few.mkdir()
    for i in range(4):
        Image.new("RGB", (16, 16)).save(few / f"{i}.png")
    with pytest.raises(DataError, match=r"was made for .* and the source has"):
        keep_lists(Data(sources={"src": Source(path=str(few), keep=str(tmp_path / "keep"))}))
    with pytest.raises(DataError, match=r"holds no keep\.json; expected the folder `keep`"):
        keep_lists(Data(sources={"src": Source(path=path, keep=str(tmp_path))}))
    empty = keep_of(listing, tmp_path / "empty", lambda n: 0.0)
    with pytest.raises(DataError, match=r"no image is left in the .* shards of stream 0 of 2"):
        next(stream_of(listing, empty))


def mixed(listing, index, **data):
    feeds = tuple(Feed(name, 1.0, listing.shards(2)) for name in ("a", "b"))
    return Stream(feeds, index, 2, seed=3, order="low", data=Data(shuffle=4, **data))


def steps_of(stream, count, first=0):
    found = []
    for step in range(first, first + count):
        stream.begin(step)
        found.append([next(stream).key[0] for _ in range(4)])
    return found


def test_some_batches_are_of_one_source_in_all_streams(listing):
    listing, _ = listing
    first, second = (steps_of(mixed(listing, i, homogeneous={"b": 0.3}), 300) for i in (0, 1))
    single = [set(a + b) == {"b"} for a, b in zip(first, second)]
    assert 0.2 < sum(single) / 300 < 0.4
    others = [key for a, b, one in zip(first, second, single) if not one for key in a + b]
    assert 0.4 < others.count("a") / len(others) < 0.6
    stream = mixed(listing, 0, homogeneous={"b": 0.3})
    steps_of(stream, 17)
    resumed = mixed(listing, 0, homogeneous={"b": 0.3})
    resumed.load(json.loads(json.dumps(stream.state())))
    assert steps_of(resumed, 60, 17) == first[17:77]


def test_shares_of_single_source_batches_are_checked(photos):
    with pytest.raises(RecipeError, match=r"'data\.homogeneous' names source 'scr', did you mean 'src'"):
        recipe_of(photos, "data.homogeneous={scr: 0.1}")
    with pytest.raises(RecipeError, match=r"add up to 1\.2, expected at most 1"):
        recipe_of(photos, "data.sources.b.path=x", "data.homogeneous={src: 0.6, b: 0.6}")
