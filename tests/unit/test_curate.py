"""Curation: k-means against a slow one, sampling against its definition, duplicates, keep-lists, and the whole command resumed."""

import importlib.util
import logging
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_curation import blobs, embedded, kept_of, recipe_of

from radio_distill.cli import main
from radio_distill.config.curate_recipe import CurateRecipe, Retrieve
from radio_distill.curate import blocks
from radio_distill.curate import kmeans as kmeans_module
from radio_distill.curate.duplicates import duplicates
from radio_distill.curate.embeddings import EmbeddingFolder
from radio_distill.curate.kmeans import kmeans, resampled_kmeans
from radio_distill.curate.points import Held
from radio_distill.curate.run import curate, memory_bytes
from radio_distill.curate.sampling import share_out, take_balanced
from radio_distill.errors import DataError, RecipeError
from radio_distill.plan.budget import GPUS
from radio_distill.plan.cost import vit_flops
from radio_distill.toyworld import write_toyworld


def slow_lloyd(x, centroids, iterations):
    x, centroids = x.astype(np.float64), centroids.astype(np.float64)
    for step in range(iterations + 1):
        distance = ((x[:, None] - centroids) ** 2).sum(2)
        label = distance.argmin(1)
        if step < iterations:
            centroids = np.stack([x[label == k].mean(0) for k in range(len(centroids))])
    return centroids, label, distance.min(1)


def test_kmeans_is_lloyds_algorithm_on_2000_points():
    x, _ = blobs([400] * 5, spread=0.3)
    first = x[:12].astype(np.float32)
    with mock.patch.object(kmeans_module, "_first", return_value=first), mock.patch.object(blocks, "BLOCK", 300):
        found = kmeans(Held(x), 12, iterations=6, rng=np.random.default_rng(0))
    centroids, label, distance = slow_lloyd(x, first, 6)
    assert np.allclose(found.centroids_KD, centroids, atol=1e-5)
    assert (found.assigned.label_N == label).all()
    assert np.allclose(found.assigned.distance_N, distance, atol=1e-5)
    assert found.sizes_K.sum() == 2000


def test_plus_plus_finds_separate_clusters_and_copies_are_no_trouble():
    x, _ = blobs([300, 100, 20, 5])
    found = kmeans(Held(x), 4, iterations=20, rng=np.random.default_rng(0))
    assert sorted(found.sizes_K) == [5, 20, 100, 300]
    same = kmeans(Held(np.repeat(x[:3], 10, 0)), 8, iterations=3, rng=np.random.default_rng(0))
    assert same.assigned.distance_N.max() < 1e-5


def test_a_centroid_without_points_moves_to_the_farthest_point():
    x, _ = blobs([50, 50])
    first = np.stack([x[0], x[0] * -3]).astype(np.float32)  # nothing is near the second
    with mock.patch.object(kmeans_module, "_first", return_value=first):
        assert (kmeans(Held(x), 2, iterations=10, rng=np.random.default_rng(0)).sizes_K == [50, 50]).all()


def test_resampling_gives_rare_regions_more_centroids():
    dense, rare = blobs([1], spread=0.0, seed=1)[0][0], blobs([1], spread=0.0, seed=2)[0][0]
    rng = np.random.default_rng(0)
    x = np.concatenate([dense + 0.1 * rng.normal(size=(3000, 8)), rare + 0.1 * rng.normal(size=(100, 8))]).astype(np.float16)
    counts = []
    for rounds in (0, 5):
        found = resampled_kmeans(Held(x), 40, iterations=10, rounds=rounds, nearest=2, seed=(0,))
        counts.append(len(np.unique(found.assigned.label_N[3000:])))
    assert counts[1] > counts[0]


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(0, 300), st.integers(0, 3))
def test_shares_sum_to_the_target_none_is_overdrawn_and_all_are_as_equal_as_can_be(sizes, total, seed):
    sizes = np.array(sizes)
    given_ = share_out(sizes, total, np.random.default_rng(seed))
    assert given_.sum() == min(total, sizes.sum())
    assert ((given_ >= 0) & (given_ <= sizes)).all()
    open_ = given_[given_ < sizes]  # who could have given more gives as much as anybody, but for one
    assert len(open_) == 0 or given_.max() - open_.min() <= 1


def test_a_balanced_sample_takes_no_image_twice_and_no_cluster_is_overdrawn():
    rng = np.random.default_rng(0)
    fine, coarse = rng.integers(0, 50, 2000).astype(np.int32), rng.integers(0, 6, 50).astype(np.int32)
    available = (rng.random(2000) < 0.8).astype(np.int64)
    taken = take_balanced([fine, coarse], available, 300, rng)
    assert taken.sum() == 300
    assert (taken <= available).all()
    by_coarse = np.bincount(coarse[fine], weights=taken, minlength=6)
    assert by_coarse.max() - by_coarse.min() <= 1  # all have enough
    assert take_balanced([fine, coarse], available, 9999, rng).sum() == available.sum()


def test_duplicates_are_those_of_a_loop_over_all_pairs():
    x, labels = blobs([40, 30, 10], spread=0.08)
    with mock.patch("radio_distill.curate.duplicates.BLOCK", 7):
        found = duplicates(x, labels.astype(np.int32), 0.97)
    expected = np.full(len(x), -1)
    for i in range(len(x)):
        for j in range(i):
            if labels[i] == labels[j] and expected[j] < 0 and x[i].astype(np.float32) @ x[j].astype(np.float32) > 0.97:
                expected[i] = j
                break
    assert (found == expected).all()
    assert 0 < (found >= 0).sum() < len(x)


def entropy(labels):
    p = np.bincount(labels) / len(labels)
    return -(p[p > 0] * np.log2(p[p > 0])).sum()


@pytest.fixture
def zipf(tmp_path):
    """Twelve classes whose frequencies fall as Zipf's."""
    x, labels = blobs([600 // rank for rank in range(1, 13)], width=16, spread=0.15)
    return embedded(tmp_path / "embedded", x), labels


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_of_a_zipf_source_the_sample_is_more_even(zipf, tmp_path, seed):
    folder, labels = zipf
    kept = kept_of(curate(recipe_of(folder, tmp_path / "out", duplicates=None, seed=seed)))
    assert len(kept) == 300
    assert set(kept.values()) == {1.0}
    assert entropy(labels[list(kept)]) > entropy(labels) + 0.3
    rare = labels >= 6
    assert rare[list(kept)].mean() > 1.3 * rare.mean()


def test_a_killed_curation_goes_on_and_gives_the_same(zipf, tmp_path):
    folder, _ = zipf
    whole = kept_of(curate(recipe_of(folder, tmp_path / "whole")))
    real, calls = kmeans_module.kmeans, []

    def dies(*args, **options):
        calls.append(args)
        if len(calls) == 5:  # in the second level
            raise KeyboardInterrupt
        return real(*args, **options)

    with mock.patch.object(kmeans_module, "kmeans", dies):
        with pytest.raises(KeyboardInterrupt):
            curate(recipe_of(folder, tmp_path / "out"))
        assert sorted(p.name for p in (tmp_path / "out/clusters").iterdir()) == ["level 0, round 2.npz", "level 1, round 0.npz"]
        assert kept_of(curate(recipe_of(folder, tmp_path / "out"))) == whole
    assert len(calls) == 7  # two rounds of the second level were left


def test_images_near_the_seeds_come_first_and_duplicates_never(zipf, tmp_path):
    folder, labels = zipf
    x = EmbeddingFolder(folder).load()
    rare = np.flatnonzero(labels == 11)[:5]
    seeds = embedded(tmp_path / "seeds", x[rare], shards=1)
    wish = Retrieve(seeds=str(seeds), share=0.1)
    kept = kept_of(curate(recipe_of(folder, tmp_path / "out", retrieve=wish, count=100, duplicates=0.9999)))
    assert set(rare.tolist()) <= set(kept)
    assert len(kept) == 100
    other = embedded(tmp_path / "other", x[rare], shards=1, model="another")
    with pytest.raises(DataError, match="embed both with the same model"):
        curate(recipe_of(folder, tmp_path / "out2", retrieve=Retrieve(seeds=str(other))))


def test_repeats_become_weights(zipf, tmp_path):
    folder, _ = zipf
    kept = kept_of(curate(recipe_of(folder, tmp_path / "out", repeats=4, count=1200, duplicates=None)))
    assert set(kept.values()) <= {0.25, 0.5, 0.75, 1.0}
    assert sum(kept.values()) * 4 == 1200


def test_wishes_that_cannot_be_met_are_told(zipf, tmp_path, capsys):
    folder, labels = zipf
    with pytest.raises(RecipeError, match=rf"levels\[0\] is 5000 and there are {len(labels)} images"):
        curate(recipe_of(folder, tmp_path / "a", levels=(5000,)))
    curate(recipe_of(folder, tmp_path / "b"))
    with pytest.raises(DataError, match="holds a curation by another recipe"):
        curate(recipe_of(folder, tmp_path / "b", count=5))
    EmbeddingFolder(folder).file(2).unlink()
    with pytest.raises(DataError, match="lacks 1 of 4 shards; run the same `radio-distill embed` again"):
        curate(recipe_of(folder, tmp_path / "c"))
    path = tmp_path / "r.yaml"
    path.write_text("name: r\nembeddings: x\ncount: 5\nlevels: [5, 50]\nlevel: 3\n")
    assert main(["curate", str(path)]) == 2
    assert "unknown key 'level', did you mean 'levels'?" in capsys.readouterr().err
    path.write_text("name: r\nembeddings: x\ncount: 5\nlevels: [5, 50]\n")
    assert main(["curate", str(path)]) == 2
    assert "expected the finest level first" in capsys.readouterr().err


def test_embeddings_go_on_after_a_kill_and_refuse_another_model(tmp_path, capfd, caplog):
    caplog.set_level(logging.INFO)
    scenes, whole, out = tmp_path / "scenes", str(tmp_path / "whole"), str(tmp_path / "out")
    write_toyworld(scenes, count=24, size=48, seed=0, shards=3)
    arguments = ["--model", "teacher:toy_clip", "--size", "96", "--batch", "5", "--workers", "0"]
    assert main(["embed", str(scenes), whole, *arguments]) == 0
    assert "images/s without reading them" in caplog.text
    begin = EmbeddingFolder.write

    def dies(folder, shard, *rest):
        if shard == 1:
            raise KeyboardInterrupt
        begin(folder, shard, *rest)

    with mock.patch.object(EmbeddingFolder, "write", dies):
        assert main(["embed", str(scenes), out, *arguments]) == 130
    with pytest.raises(DataError, match="lacks 2 of 3 shards"):
        EmbeddingFolder(tmp_path / "out").load()
    assert main(["embed", str(scenes), out, *arguments]) == 0
    ours, theirs = (EmbeddingFolder(tmp_path / name) for name in ("out", "whole"))
    assert np.allclose(ours.load(), theirs.load(), atol=1e-3)  # of smaller batches
    assert [ours.keys(i) for i in range(3)] == [theirs.keys(i) for i in range(3)]
    assert np.allclose(np.linalg.norm(ours.load().astype(np.float32), axis=1), 1, atol=1e-3)
    assert main(["embed", str(scenes), out, *arguments[:-1], "0", "--model", "teacher:toy_dino"]) == 2
    assert "holds other embeddings (model: teacher:toy_clip" in capfd.readouterr().err


def test_20_million_images_fit_a_machine_of_24_gib(repo):
    recipe = CurateRecipe(name="web", embeddings="x", count=2_000_000, levels=(200_000, 20_000, 5_000))
    needed = memory_bytes(20_000_000, 384, recipe)
    assert needed < 24 * 2**30
    assert f"{needed / 1e9:.0f} GB: a machine of 24 GiB" in (repo / "docs/scale.md").read_text()


def test_a_curation_takes_the_memory_that_it_prints(repo, tmp_path):
    spec = importlib.util.spec_from_file_location("curate_memory", repo / "bench" / "curate_memory.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    found = bench.peak(tmp_path, 60_000, 384, (300, 30))
    assert found.measured_gb == pytest.approx(found.printed_gb, rel=0.1)


def test_the_arithmetic_of_curation_at_scale(repo):
    page, width = (repo / "docs/scale.md").read_text(), 384
    flop = vit_flops(257, width, 12, 4 * width, gated=False, patch=14, patches=256)
    assert f"a ViT-S of 14 px patches at 224 px, {flop / 1e9:.0f} GFLOP an image" in page

    def row(*cells):
        return "| " + " | ".join(cells) + " |"

    seconds, counts = [flop * images / (0.45 * GPUS["h200"][0]) for images in (20e6, 1e9)], ((20e6, 200e3), (1e9, 20e6))
    assert row(f"{seconds[0] / 60:.0f} minutes of one GPU", f"{seconds[1] / 3600:.0f} h") in page
    assert row(f"{20e6 / 1e5 / 60:.1f} h of 3 cores", f"{1e9 / 1e5 / 60 / 24:.0f} days") in page
    assert row(*(f"{2 * width * images / 1e9:.{digits}f} GB" for images, digits in ((20e6, 1), (1e9, 0)))) in page
    once = [2 * images * clusters * width for images, clusters in counts]
    hours = [each / 50e12 / 3600 for each in once]
    assert (
        row(
            f"{once[0]:.1e}".replace("+", "") + ": a minute at 50 TFLOP/s (fp32)",
            f"{once[1]:.1e}".replace("+", "") + f": {hours[1]:.0f} h",
        )
        in page
    )
    assert hours[0] * 60 == pytest.approx(1, abs=0.1)
    rounds = [2 * 10 * clusters**2 * width / 50e12 / 3600 for _, clusters in counts]
    whole = [50 * each + 10 * 50 * again + 10 * each for each, again in zip(hours, rounds)]
    assert whole[0] == pytest.approx(2, abs=0.2)
    assert whole[1] / 24 / 365 == pytest.approx(1.5, abs=0.1)
    view = 256 * (1152 + 1280)
    assert f"{view / 1e6:.2f} MB a view" in page
    assert (
        row(f"{20e6 * view / 1e12:.0f} TB a view, {5 * 20e6 * view / 1e12:.0f} TB of 5", f"{1e9 * view / 1e12:.0f} TB a view")
        in page
    )
