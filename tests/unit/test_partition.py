"""Which rank runs which partition."""

import pytest

from radio_distill.errors import RecipeError
from radio_distill.train.partition import Share, assign

COSTS = {"low": 6.5e12, "high": 50.7e12}
STAGE3 = {"low": 1024, "high": 128}


def test_every_rank_runs_all_partitions_when_all_images_divide():
    a = assign(images=STAGE3, costs=COSTS, world_size=64, multiple={"low": 4})
    assert a.share("low", 63) == Share(index=63, ranks=64, images=16)
    assert a.share("high", 63) == Share(index=63, ranks=64, images=2)


def test_ranks_split_in_proportion_to_cost_when_one_partition_has_too_few_images():
    a = assign(images=STAGE3, costs=COSTS, world_size=256, multiple={"low": 4})
    assert len(a.ranks["low"]) == len(a.ranks["high"]) == 128
    assert a.share("low", 5) == Share(index=5, ranks=128, images=8)
    assert a.share("high", 5) is None
    assert a.share("high", 130) == Share(index=2, ranks=128, images=1)


def test_shares_of_all_ranks_add_up_to_the_images_of_the_step():
    for world_size in (1, 2, 8, 32, 256):
        a = assign(images=STAGE3, costs=COSTS, world_size=world_size)
        for name, images in STAGE3.items():
            shares = [s for rank in range(world_size) if (s := a.share(name, rank))]
            assert sum(s.images for s in shares) == images
            assert [s.index for s in shares] == list(range(len(shares)))


def test_mosaics_are_never_cut_between_ranks():
    with pytest.raises(
        RecipeError, match=r"images=8 \(in groups of 4 for mosaics\) cannot be divided among 4 ranks; use 2 ranks"
    ):
        assign(images={"low": 8}, costs={"low": 1.0}, world_size=4, multiple={"low": 4})


def test_an_indivisible_batch_names_numbers_that_work():
    with pytest.raises(
        RecipeError, match=r"partitions.low.images=10 .*among 3 ranks; use 2 ranks, or set partitions.low.images=9"
    ):
        assign(images={"low": 10}, costs={"low": 1.0}, world_size=3)
