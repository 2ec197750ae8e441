"""A billion images on paper: the order of samples, simulated with the true streams over shards that are never read."""

import json
from collections import Counter
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest

from radio_distill.config.recipe import Data, Source
from radio_distill.data.reading import Raw
from radio_distill.data.seeding import shard_order
from radio_distill.data.sources import list_source
from radio_distill.data.stream import Feed, Stream

SAMPLES = 20
"""In a shard."""


@pytest.fixture
def opened():
    """Shards that were opened, in order; each holds SAMPLES names instead of images."""
    names: list[str] = []

    def read(shard):
        names.append(shard.name)
        return (Raw(f"{shard.name}/{i}", {}) for i in range(SAMPLES))

    with mock.patch("radio_distill.data.stream.read_shard", read):
        yield names


def feed_of(shards: int, streams: int) -> Feed:
    listing = list_source("web", Source(path=f"s3://bucket/{{000000..{shards - 1:06d}}}.tar"))
    return Feed("web", 1.0, listing.shards(streams))


def stream_of(feed: Feed, index: int, streams: int) -> Stream:
    return Stream((feed,), index, streams, seed=0, order="low", data=Data(shuffle=10))


def test_an_epoch_of_all_streams_has_every_shard_once():
    order, streams = shard_order(1, 0, 100_000), 256
    slices = [order[index::streams] for index in range(streams)]
    assert sorted(shard for mine in slices for shard in mine) == list(range(100_000))
    assert max(map(len, slices)) - min(map(len, slices)) == 1


def test_a_batch_draws_from_as_many_shards_as_there_are_streams(opened):
    """Images that look alike within a shard make a batch as noisy as images / streams times fewer independent ones would be.

    With values that are one number per shard, the variance of a batch's mean is var * (1 + (m - 1) rho) / images, where rho = 1
    is the correlation within a shard and m = images / streams: m times that of a perfect shuffle.
    """
    shards, streams, images, steps = 1600, 64, 256, 100
    feed, share = feed_of(shards, streams), images // streams
    values = dict(zip((shard.name for shard in feed.shards), np.random.default_rng(0).standard_normal(shards)))
    readers, means = [stream_of(feed, index, streams) for index in range(streams)], []
    for _ in range(steps):
        names = [next(reader).key.split("/")[1] for reader in readers for _ in range(share)]
        assert streams <= len(set(names)) <= 2 * streams  # a stream is within one shard, or passes to the next
        means.append(np.mean([values[name] for name in names]))
    # steps that follow each other share their shards: take one in SAMPLES / share
    apart = np.array(means[:: SAMPLES // share])
    assert np.mean(apart**2) * images == pytest.approx(share, rel=0.6)  # of 20 batches: a standard error of 0.32
    assert Counter(opened).most_common(1)[0][1] == 1


def test_a_resume_opens_one_shard_and_its_state_does_not_grow(opened):
    feed, sizes = feed_of(20_000, 256), []
    for epoch, shard in ((0, 0), (3, 70)):
        stream = stream_of(feed, 7, 256)
        stream.load({"stream": 7, "drawn": 5000, "sources": {"web": [epoch, shard, 13]}, "bad": {}})
        opened.clear()
        next(stream)
        assert len(opened) == 1
        sizes.append(len(json.dumps(stream.state())))
    assert max(sizes) < 120


def test_a_resumed_stream_goes_on_with_the_next_sample(opened):
    feed = feed_of(1000, 4)
    whole = stream_of(feed, 1, 4)
    for _ in range(233):
        next(whole)
    resumed = stream_of(feed, 1, 4)
    resumed.load(json.loads(json.dumps(whole.state())))
    assert [next(resumed).key for _ in range(150)] == [next(whole).key for _ in range(150)]


def test_two_epochs_put_other_shards_side_by_side():
    first, second = shard_order(1, 0, 10_000), shard_order(1, 1, 10_000)
    pairs = set(pairwise(first))
    assert len(pairs & set(pairwise(second))) < 10  # one is expected
