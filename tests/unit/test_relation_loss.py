"""The relation term: RKD and the form whose gates let near pairs be pulled only."""

import pytest
import torch
from torch import Tensor

from radio_distill.balance import identity
from radio_distill.config.load import load_recipe
from radio_distill.config.recipe import Relation
from radio_distill.config.terms import TERMS
from radio_distill.errors import RecipeError
from radio_distill.losses import Pair, relation_loss
from radio_distill.tensors import Rows

BOTH, GATED = Relation(gate="all"), Relation(gate="near_far")


def points(seed: int, count: int = 6, channels: int = 5) -> Tensor:
    return torch.randn(count, channels, generator=torch.Generator().manual_seed(seed))


def loss(pred: Tensor, target: Tensor, spec: Relation) -> Tensor:
    return relation_loss(Pair(pred, target, None, identity(pred.shape[1])), spec)


def loop(pred: Tensor, target: Tensor, spec: Relation) -> Tensor:
    """All pairs, one after the other; the means are constants."""
    n = len(pred)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    ours, theirs = ({(i, j): (x[i] - x[j]).norm() for i, j in pairs} for x in (pred, target))
    mean_s = sum(d.detach() for d in ours.values()) / len(pairs)
    mean_t = sum(theirs.values()) / len(pairs)
    median = sorted(float(d) for d in theirs.values())[(len(pairs) - 1) // 2]
    value = [pred.new_zeros(()) for _ in range(n)]
    for i, j in pairs:
        difference = ours[i, j] / mean_s - theirs[i, j] / mean_t
        near = float(theirs[i, j]) < median
        if spec.gate == "all" or (difference > 0) == near:
            size = difference.abs()
            value[i] = value[i] + (size**2 / (2 * spec.beta) if size < spec.beta else size - spec.beta / 2) / (n - 1)
    return torch.stack(value)


@pytest.mark.parametrize("spec", [BOTH, GATED, Relation(gate="all", beta=0.1)])
def test_it_is_the_loop_over_pairs_with_its_gradient(spec: Relation) -> None:
    pred, slow, target = points(0).requires_grad_(), points(0).requires_grad_(), points(1)
    fast, expected = loss(pred, target, spec), loop(slow, target, spec)
    torch.testing.assert_close(fast, expected)
    fast.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(pred.grad, slow.grad)


@pytest.mark.parametrize("spec", [BOTH, GATED])
def test_the_same_geometry_costs_nothing_however_large_or_turned(spec: Relation) -> None:
    turn = torch.linalg.qr(points(2, 5, 5))[0]
    moved = 3 * points(1) @ turn + 7
    torch.testing.assert_close(loss(moved, points(1), spec), torch.zeros(6), atol=1e-10, rtol=0)
    torch.testing.assert_close(loss(5 * points(0) @ turn - 2, points(1), spec), loss(points(0), points(1), spec))
    wider = torch.cat([points(0), torch.zeros(6, 3)], 1)  # the spaces need not have one width
    torch.testing.assert_close(relation_loss(Pair(wider, points(1), None, identity(5)), spec), loss(points(0), points(1), spec))


def test_near_pairs_are_pulled_only_and_far_ones_pushed_only() -> None:
    target = torch.tensor([[0.0], [0.1], [10.0], [10.1]])  # two near pairs, four far ones: the median is far
    collapsed = torch.tensor([[0.0], [0.0], [9.0], [9.0]], requires_grad=True)  # near ones nearer still: nothing to pull
    torch.testing.assert_close(loss(collapsed, target, GATED).sum() < loss(collapsed, target, BOTH).sum(), torch.tensor(True))
    apart = torch.tensor([[0.0, 0.0], [0.0, 1.0], [10.0, 0.0], [10.0, 1.0]], requires_grad=True)
    loss(apart, target, GATED).sum().backward()
    assert apart.grad is not None
    assert apart.grad[1, 1] > 0 > apart.grad[0, 1]  # descent brings both of a near pair together


@pytest.mark.parametrize("spec", [BOTH, GATED])
@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_gives_the_same_losses_and_gradients(spec: Relation, ranks: int) -> None:
    whole, target = points(0).requires_grad_(), points(1)
    values = loss(whole, target, spec)
    values.sum().backward()
    share, found, grads = 6 // ranks, [], []
    for rank in range(ranks):
        start = rank * share
        own = points(0)[start : start + share].requires_grad_()

        def gather(x: Tensor, start: int = start) -> Rows:
            return Rows(target if torch.equal(x, target[start : start + share]) else points(0), start)

        value = relation_loss(Pair(own, target[start : start + share], None, identity(5), gather), spec)
        value.sum().backward()
        found.append(value.detach())
        grads.append(own.grad)
    torch.testing.assert_close(torch.cat(found), values.detach())
    torch.testing.assert_close(torch.cat(grads), whole.grad)


def test_one_image_and_equal_images_have_no_relation_and_a_finite_gradient() -> None:
    alone = points(0, 1).requires_grad_()
    loss(alone, points(1, 1), GATED).sum().backward()
    assert alone.grad is not None
    assert not alone.grad.any()
    same = torch.ones(4, 5, requires_grad=True)
    loss(same, torch.ones(4, 5), BOTH).sum().backward()
    assert same.grad is not None
    assert same.grad.isfinite().all()


def test_the_recipe_weighs_it_by_teacher_and_refuses_a_name_that_it_has_not() -> None:
    (term,) = [term for term in TERMS if term.name == "relation"]
    assert not term.is_computed(load_recipe("toy/stage1"), "toy_clip")
    recipe = load_recipe("toy/stage1", ["loss.relation={weight: 1, teachers: {toy_dino: 0}}"])
    assert term.is_computed(recipe, "toy_clip")
    assert not term.is_computed(recipe, "toy_dino")
    with pytest.raises(RecipeError, match=r"loss term 'relation' names teacher 'toy_dine', did you mean 'toy_dino'"):
        load_recipe("toy/stage1", ["loss.relation.teachers={toy_dine: 1}"])
