"""Curation over a cluster: what the parts give put together is what one machine finds, bit for bit. The cluster is this process here;
tests/run/test_ray.py takes a real one."""

from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
from made_curation import blobs, embedded, recipe_of

from radio_distill.config.curate_recipe import Retrieve
from radio_distill.curate import blocks, spread
from radio_distill.curate.embeddings import EmbeddingFolder
from radio_distill.curate.points import Held
from radio_distill.curate.run import curate, memory_bytes
from radio_distill.curate.spread import Spread
from radio_distill.errors import DataError


class Here:
    """A cluster of one process."""

    def __init__(self, tasks=3):
        self.tasks = tasks

    def put(self, value):
        return value

    def run(self, function, *arguments):
        return function(*arguments)

    def run_for_each(self, count, function, *arguments):
        items = function(*arguments)
        assert len(items) == count
        return items

    def get(self, handle):
        return handle


@contextmanager
def here(_):
    yield Here()


@pytest.fixture
def points(tmp_path):
    """500 points in one array, and in parts of 64 in shards of 125."""
    x, _ = blobs([300, 100, 60, 40], spread=0.2)
    folder = EmbeddingFolder(embedded(tmp_path / "embedded", x))
    return Held(x), Spread.read(Here(), folder, folder.counts(folder.header()), width=8, size=64)


def test_every_pass_over_parts_equals_that_over_one_array(points):
    held, parts = points
    index = np.sort(np.random.default_rng(0).choice(500, 200, replace=False))
    assert len(parts) == 500
    assert np.array_equal(parts.rows(index), held.rows(index))
    assert parts.rows(index[:0]).shape == (0, 8)
    assert np.array_equal(parts.subset(index).rows(np.arange(200)), held.rows(index))
    centroids = held.rows(np.arange(0, 500, 50))
    with mock.patch.object(blocks, "BLOCK", 64):
        here, there = held.assign(centroids), parts.assign(centroids)
    assert np.array_equal(here.label_N, there.label_N)
    assert np.array_equal(here.distance_N, there.distance_N)
    assert np.array_equal(held.sums(here.label_N, 12), parts.sums(here.label_N, 12))
    for label_N in (here.label_N, np.zeros(500, np.int32)):  # a cluster larger than a part
        assert np.array_equal(held.duplicates(label_N, 0.98), parts.duplicates(label_N, 0.98))
    seeds, free = held.x_ND[:7], index[index > 70]
    assert np.array_equal(held.nearest(seeds, free, 9).index_SR, parts.nearest(seeds, free, 9).index_SR)


def test_sums_of_fp16_numbers_are_exact_in_any_order(points):
    held, _ = points
    order, label_N = np.random.default_rng(0).permutation(500), np.arange(500, dtype=np.int32) % 3
    shuffled = Held(held.x_ND[order]).sums(label_N[order], 3)
    assert np.array_equal(shuffled, held.sums(label_N, 3))
    whole = (held.x_ND.astype(np.float64) * 2**24).astype(np.int64)  # integers have no order either
    assert np.array_equal(shuffled * 2**24, np.stack([whole[label_N == k].sum(0) for k in range(3)]))


def test_a_curation_in_parts_is_that_of_one_machine(tmp_path, caplog):
    caplog.set_level("INFO")
    x, labels = blobs([600 // rank for rank in range(1, 13)], width=16, spread=0.15)
    folder = embedded(tmp_path / "embedded", x)
    seeds = embedded(tmp_path / "seeds", x[labels == 11][:5], shards=1)
    wishes = {"retrieve": Retrieve(seeds=str(seeds), share=0.1), "duplicates": 0.98, "repeats": 2}
    with (
        mock.patch.object(blocks, "BLOCK", 64),
        mock.patch.object(spread, "PART", 4096),
        mock.patch("radio_distill.curate.run.on_ray", here),
    ):
        alone = curate(recipe_of(folder, tmp_path / "alone", **wishes))
        apart = curate(recipe_of(folder, tmp_path / "apart", **wishes, ray="auto"))
    files = sorted(path.relative_to(alone) for path in alone.rglob("*") if path.suffix in (".json", ".html", ".npz"))
    assert len(files) > 8
    for name in files:
        if name.suffix == ".npz":
            ours, theirs = (np.load(out / name) for out in (apart, alone))
            assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)
        else:
            assert (apart / name).read_bytes() == (alone / name).read_bytes()
    assert "3 tasks at a time hold 0.00 GB of vectors" in caplog.text


def test_a_machine_without_the_folder_says_so(points, tmp_path):
    with pytest.raises(DataError, match="all machines of the cluster must have the folder under the same name"):
        EmbeddingFolder(tmp_path / "nowhere").slices([(0, 0, 5)])


def test_on_a_cluster_the_vectors_need_no_memory_here(repo):
    recipe = recipe_of("x", "y", levels=(200_000, 20_000, 5_000))
    apart = memory_bytes(20_000_000, 384, recipe.model_copy(update={"ray": "auto"}))
    assert memory_bytes(20_000_000, 384, recipe) - apart > 0.9 * 20_000_000 * 2 * 384
    assert f"{apart / 1e9:.0f} GB where the command is given" in (repo / "docs/scale.md").read_text()
    large = recipe.model_copy(update={"ray": "auto", "levels": (20_000_000, 500_000, 50_000)})
    needed = memory_bytes(1_000_000_000, 384, large)
    assert f"{needed / 1e9:.0f} GB there" in (repo / "docs/scale.md").read_text()
