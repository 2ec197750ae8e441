"""The feature cache: every image is encoded once, whatever interrupts; nothing half-written or foreign is ever read."""

import errno
import json
import os
import threading

import numpy as np
import pytest
import torch

from radio_distill.errors import DataError
from radio_distill.eval import feature_files
from radio_distill.eval.features import ROWS, FeatureCache, FeatureKey, Ranks
from radio_distill.types import VisionOutput

KEY = FeatureKey("model#1", "images#a", (32, 48))
COUNT = 2 * ROWS[True] + 10


def outputs(count=COUNT, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return VisionOutput(torch.randn(count, 5, generator=generator), torch.randn(count, 3, 2, 4, generator=generator))


class Model:
    """Gives known outputs, counts the images it has encoded, and may die at one of them."""

    def __init__(self, out, *, batch=7, dies_at=None):
        self.out, self.batch, self.dies_at, self.seen = out, batch, dies_at, []

    def __call__(self, images):
        for start in range(images.start, images.stop, self.batch):
            part = slice(start, min(start + self.batch, images.stop))
            if self.dies_at is not None and part.stop > self.dies_at:
                raise KeyboardInterrupt
            self.seen += range(part.start, part.stop)
            summary = None if self.out.summary_BC is None else self.out.summary_BC[part]
            yield VisionOutput(summary, self.out.features_BCHW[part])


@pytest.fixture
def cache(tmp_path):
    return FeatureCache(tmp_path)


def files(cache, pattern):
    return sorted(cache.root.glob(f"*/{pattern}"))


@pytest.mark.parametrize("batch", [1, 7, 64, 500])
def test_features_are_what_the_model_gave(cache, batch):
    out = outputs()
    with cache.features(KEY, COUNT, Model(out, batch=batch)) as got:
        assert len(got) == COUNT
        assert torch.equal(got.summaries(), out.summary_BC)
        assert torch.equal(got.maps([130, 0, 64, 63, 0]), out.features_BCHW[[130, 0, 64, 63, 0]])
        assert torch.equal(got.maps(torch.tensor([5])), out.features_BCHW[5:6])
        assert (got.summary_width, got.map_shape) == (5, (3, 2, 4))
        with pytest.raises(IndexError):
            got.maps([COUNT])


def test_nothing_is_encoded_twice(cache):
    cache.features(KEY, COUNT, Model(outputs())).close()
    again = Model(outputs())
    cache.features(KEY, COUNT, again).close()
    assert again.seen == []


@pytest.mark.parametrize(
    "other",
    [
        {"key": FeatureKey("model#2", KEY.dataset, KEY.size)},
        {"key": FeatureKey(KEY.model, "images#b", KEY.size)},
        {"key": FeatureKey(KEY.model, KEY.dataset, (48, 32))},
        {"count": COUNT - 1},
        {"half": True},
        {"maps": False},
    ],
)
def test_another_key_has_its_own_features(cache, other):
    cache.features(KEY, COUNT, Model(outputs())).close()
    model = Model(outputs(seed=1))
    asked = {"key": KEY, "count": COUNT} | other
    with cache.features(asked.pop("key"), asked.pop("count"), model, **asked) as got:
        torch.testing.assert_close(got.summaries(), model.out.summary_BC[: len(got)], atol=1e-2, rtol=1e-2)
    assert len(model.seen) == len(got)


def test_an_interrupted_extraction_goes_on_where_it_was(cache):
    out = outputs()
    with pytest.raises(KeyboardInterrupt):
        cache.features(KEY, COUNT, Model(out, dies_at=100))
    assert len(files(cache, "?????.json")) == 1
    model = Model(out)
    with cache.features(KEY, COUNT, model) as got:
        assert torch.equal(got.maps(), out.features_BCHW)
    assert model.seen == list(range(64, COUNT))


def test_half_written_files_are_not_read(cache, monkeypatch):
    """The process dies while it writes: between the parts of a shard, and in the middle of a file."""
    real = feature_files.np.save

    def dies(file, array):
        if array.ndim == 4:
            file.write(b"half of a map")
            raise KeyboardInterrupt
        real(file, array)

    monkeypatch.setattr(feature_files.np, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        cache.features(KEY, COUNT, Model(outputs()))
    monkeypatch.undo()
    (stale := files(cache, "lock")[0].parent / ".tmp-1-00001.map.npy").write_bytes(b"of a process that was killed")
    assert files(cache, "?????.json") == []
    out = outputs(seed=2)
    with cache.features(KEY, COUNT, Model(out)) as got:
        assert torch.equal(got.summaries(), out.summary_BC)
        assert torch.equal(got.maps(), out.features_BCHW)
    assert not stale.exists()


def spoil_bytes(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 255
    path.write_bytes(data)


@pytest.mark.parametrize(
    "spoil", [spoil_bytes, lambda p: p.write_bytes(p.read_bytes()[:-8]), lambda p: p.write_bytes(b""), lambda p: p.unlink()]
)
def test_a_damaged_shard_is_made_again(cache, spoil, caplog):
    out = outputs()
    cache.features(KEY, COUNT, Model(out)).close()
    spoil(files(cache, "00001.map.npy")[0])
    model = Model(out)
    with cache.features(KEY, COUNT, model) as got:
        assert torch.equal(got.maps(), out.features_BCHW)
    assert model.seen == list(range(64, 128))
    assert "1 of 3 shards" in caplog.text


def test_a_marker_that_cannot_be_read_is_a_damaged_shard(cache):
    cache.features(KEY, COUNT, Model(outputs())).close()
    files(cache, "00002.json")[0].write_text("{")
    model = Model(outputs())
    cache.features(KEY, COUNT, model).close()
    assert model.seen == list(range(128, COUNT))


@pytest.mark.parametrize("spoil", [lambda p: p.unlink(), lambda p: p.write_text("{")])
def test_without_its_facts_a_folder_is_empty(cache, spoil):
    cache.features(KEY, COUNT, Model(outputs())).close()
    spoil(files(cache, "features.json")[0])
    model = Model(outputs())
    cache.features(KEY, COUNT, model).close()
    assert len(model.seen) == COUNT


def test_fp16_takes_half_the_room(cache):
    out = outputs()
    with cache.features(KEY, COUNT, Model(out), half=True) as got:
        torch.testing.assert_close(got.maps(), out.features_BCHW, atol=1e-3, rtol=1e-3)
        assert got.maps([0]).dtype == torch.float32
    assert np.load(files(cache, "00000.map.npy")[0]).dtype == np.float16


@pytest.mark.parametrize("scale", [1e-30, 1e-7, 1.0, 7e4, 1e9, 1e30])
def test_fp16_keeps_features_of_any_size(cache, scale):
    """Eleven bits of the largest in an image, whatever its size; others may be smaller or larger, or nothing at all."""
    out = outputs()
    out.summary_BC[3:5] *= scale
    out.features_BCHW[70] *= scale
    out.summary_BC[9] = 0
    with cache.features(KEY, COUNT, Model(out), half=True) as got:
        for found, truth in ((got.summaries(), out.summary_BC), (got.maps(), out.features_BCHW)):
            largest = truth.flatten(1).abs().amax(1).view(-1, *[1] * (truth.ndim - 1))
            assert ((found - truth).abs() <= largest * 2**-11).all()
        assert torch.equal(got.summaries([9]), torch.zeros(1, 5))


def test_fp16_of_ordinary_features_is_what_fp16_is(cache):
    """A power of two changes no bits, so that numbers do not depend on how rows were scaled."""
    out = outputs()
    with cache.features(KEY, COUNT, Model(out), half=True) as got:
        plain = out.summary_BC.half().float()
        assert torch.equal(got.summaries()[plain.abs() > 1e-3], plain[plain.abs() > 1e-3])


def test_images_that_cannot_be_read_are_told_to_all_ranks_and_tried_again(cache):
    out, barrier, got = outputs(), threading.Barrier(2), [None, None]

    def work(rank, bad):
        unread = {}

        def produce(images):
            unread.update({i: f"{i}.jpg is damaged" for i in images if i in bad})
            yield from Model(out)(images)

        got[rank] = cache.features(KEY, COUNT, produce, ranks=Ranks(rank, 2, lambda: barrier.wait(20)), unread=unread)

    for bad in ({3, 130}, {130}, set()):
        threads = [threading.Thread(target=work, args=(rank, bad)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for features in got:
            assert features.unread == {i: f"{i}.jpg is damaged" for i in bad}
            assert features.readable == [i for i in range(COUNT) if i not in bad]
            assert torch.equal(features.summaries(features.readable), out.summary_BC[features.readable])
            features.close()


def test_a_model_that_gives_nan_is_told(cache):
    out = outputs()
    out.summary_BC[3, 0] = float("nan")
    with pytest.raises(DataError, match=r"the summary of image 3 by model#1 is not finite: the model is broken"):
        cache.features(KEY, COUNT, Model(out))


def test_summaries_alone_take_images_of_any_size(cache):
    def produce(images):
        for i in images:
            yield VisionOutput(torch.full((1, 5), float(i)), torch.zeros(1, 3, 2, 2 + i % 3))

    with cache.features(KEY, 10, produce, maps=False) as got:
        assert torch.equal(got.summaries()[:, 0], torch.arange(10.0))
        with pytest.raises(DataError, match="only summaries were kept of these images; extract them with maps=True"):
            got.maps([0])
    with pytest.raises(
        DataError, match=r"the map of image 1 has shape \[3, 2, 3\] and others \[3, 2, 2\]; give all images one size"
    ):
        cache.features(KEY, 10, produce)


def test_a_model_without_summary_has_maps_alone(cache):
    out = VisionOutput(None, outputs().features_BCHW)
    with cache.features(KEY, COUNT, Model(out)) as got:
        assert torch.equal(got.maps(), out.features_BCHW)
        with pytest.raises(DataError, match="this model has no summary; a suite that needs one cannot score it"):
            got.summaries()
    with pytest.raises(DataError, match="model#1 has no summary, and maps are not kept"):
        cache.features(KEY, COUNT, Model(out), maps=False)


def test_too_few_outputs_are_an_error(cache):
    with pytest.raises(ValueError, match="images 0 to 137 were asked for, and another number was given"):
        cache.features(KEY, COUNT, lambda images: [outputs(COUNT - 1)])
    with pytest.raises(ValueError, match="another number was given"):
        cache.features(KEY, COUNT, lambda images: [outputs(COUNT + 1)])


def test_no_images_are_an_error(cache):
    with pytest.raises(DataError, match="images#a has 0 images, expected at least one"):
        cache.features(KEY, 0, Model(outputs()))


def named(i):
    return FeatureKey(f"model#{i}", "d", (1, 1))


def test_the_cache_stays_below_its_bound_and_drops_what_was_not_used_longest(tmp_path):
    one = COUNT * (5 + 24) * 4
    cache = FeatureCache(tmp_path, max_bytes=int(3.5 * one))
    for i in range(3):
        cache.features(named(i), COUNT, Model(outputs())).close()
        for path in files(cache, "features.json"):
            os.utime(path, (path.stat().st_atime - 100, path.stat().st_mtime - 100))
    cache.features(named(0), COUNT, Model(outputs())).close()  # used again: 1 is the oldest now
    cache.features(named(3), COUNT, Model(outputs())).close()
    kept = {json.loads(p.read_text())["model"] for p in files(cache, "features.json")}
    assert kept == {"model#0", "model#2", "model#3"}


def test_features_in_use_are_not_dropped(tmp_path):
    one = COUNT * (5 + 24) * 4
    cache = FeatureCache(tmp_path, max_bytes=int(1.5 * one))
    out = outputs()
    with cache.features(KEY, COUNT, Model(out)) as used:
        with pytest.raises(DataError, match=r"features need .* GiB and the cache .* has .* GiB left; score fewer images"):
            cache.features(named(1), COUNT, Model(outputs()))
        assert torch.equal(used.maps(), out.features_BCHW)
    cache.features(named(1), COUNT, Model(outputs())).close()
    assert len(files(cache, "features.json")) == 1


def test_more_than_the_cache_may_hold_is_told_before_it_is_computed(tmp_path):
    model = Model(outputs())
    with pytest.raises(DataError, match=r"score fewer images .*, make room"):
        FeatureCache(tmp_path, max_bytes=1000).features(KEY, COUNT, model)
    assert len(model.seen) == 7


def test_a_disk_without_room_is_told_before_it_is_full(cache, monkeypatch):
    from radio_distill.eval import features

    monkeypatch.setattr(features.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(DataError, match=r"and the disk of .* has 0\.00 GiB left"):
        cache.features(KEY, COUNT, Model(outputs()))


def test_old_features_make_room_on_the_disk_too(cache, monkeypatch):
    from radio_distill.eval import features

    cache.features(named(1), COUNT, Model(outputs())).close()
    monkeypatch.setattr(features.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    cache.features(KEY, COUNT, Model(outputs())).close()
    assert [json.loads(p.read_text())["model"] for p in files(cache, "features.json")] == [KEY.model]


def test_a_full_disk_keeps_what_is_done(cache, monkeypatch):
    real, written = feature_files.np.save, []

    def full(file, array):
        if len(written) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(array)
        real(file, array)

    monkeypatch.setattr(feature_files.np, "save", full)
    with pytest.raises(DataError, match=r"is full after 64 of 138 images; free some space .* what is done is kept"):
        cache.features(KEY, COUNT, Model(outputs()))
    assert files(cache, ".tmp-*") == []
    monkeypatch.undo()
    model = Model(outputs())
    cache.features(KEY, COUNT, model).close()
    assert model.seen == list(range(64, COUNT))


def test_ranks_share_the_work(cache):
    out, barrier = outputs(), threading.Barrier(2)
    models, got = [Model(out), Model(out)], [None, None]

    def work(rank):
        got[rank] = cache.features(KEY, COUNT, models[rank], ranks=Ranks(rank, 2, lambda: barrier.wait(20)))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(models[0].seen + models[1].seen) == list(range(COUNT))
    assert models[1].seen == list(range(128, COUNT))
    for features in got:
        assert torch.equal(features.maps(), out.features_BCHW)
        features.close()
