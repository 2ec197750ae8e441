"""The losses: pure functions of predictions and targets, in float32 whatever the autocast around them.

All return sums and counts per image, never a mean: the caller divides by the count over all ranks, so that masks, uneven
batches and the number of ranks do not change the gradient. `feature_loss`, `summary_loss` and `relation_loss` are what the rows of
config/terms.py name; a further term is a function beside them and a row there.

Shapes: B batch, N batches of all ranks, C channels, H W grid, T teachers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .balance.balancer import Balancer
from .balance.dispersion import angle
from .config.recipe import FeatureLoss, Recipe, Relation
from .config.terms import Term, terms_of
from .errors import RecipeError
from .loaders import check_call, import_named
from .seeded import uniform
from .strips import Grids, split_strip, sum_each
from .tensors import Rows, own_rows

__all__ = [
    "AdaLoss",
    "LossFunction",
    "Pair",
    "drop_coefficients",
    "evaluate",
    "feature_loss",
    "feature_terms",
    "fidelity_sums",
    "load_terms",
    "mesa_terms",
    "relation_loss",
    "summary_loss",
    "summary_terms",
]

EPS = 1e-6  # shortest vector that has a direction


class Pair(NamedTuple):
    """What a loss term compares: one head's prediction and what the teacher says, balanced, float32, on one grid."""

    pred: Tensor
    """(B, C, H, W) of a term on features, (B, C) of one on summaries; gradients pass."""
    target: Tensor
    """Of the same shape; no gradient. Where the mask is false it means nothing and may be anything."""
    mask_B1HW: Tensor | None
    """bool: which positions the teacher saw (`data.shift_std`); None: all, and for summaries."""
    balancer: Balancer
    """Of the teacher: `inverse` gives its own units."""
    gather: Callable[[Tensor], Rows] = own_rows
    """Gives the rows (B, ...) of all ranks that run this forward, without gradients. A collective: every rank calls it alike."""
    grids: Grids | None = None
    """Of a native partition: rows and columns of the B images' maps, which `pred` and `target` hold as strips (1, C, 1, N). A
    function of the user's gets the images one by one, (1, C, H, W), and without this."""

    @property
    def images(self) -> int:
        """B."""
        return len(self.pred) if self.grids is None else len(self.grids)

    def each(self) -> list[Pair]:
        """The pairs of a strip's images."""
        if self.grids is None:
            return [self]
        maps = zip(split_strip(self.pred, self.grids), split_strip(self.target, self.grids))
        return [self._replace(pred=pred, target=target, grids=None) for pred, target in maps]


LossFunction = Callable[..., Tensor]
"""function(pair, **options) -> (B,): of every image its loss, or its sum over valid positions, as `Term.per` says."""


def load_terms(recipe: Recipe) -> dict[Term, LossFunction]:
    """The terms of a recipe with their functions, imported.

    Raises RecipeError when one of the user's is not there or does not take the pair and its options.
    """
    return {term: _load(term, term.options(recipe)) for term in terms_of(recipe)}


def _load(term: Term, options: Mapping[str, Any]) -> LossFunction:
    by, expected = f"loss.terms.{term.name}.loader", "a function (pair, **options) that returns the loss of every image, (B,)"
    function = import_named(term.loader, by=by, expected=expected, error=RecipeError)
    check_call(function, None, by=by, options=options, error=RecipeError)
    return function


def evaluate(term: Term, function: LossFunction, pair: Pair, options: Mapping[str, Any]) -> Tensor:
    """What a term's function says of every image, (B,). Raises RecipeError when it gives anything else."""
    pair = pair._replace(pred=pair.pred.float(), target=pair.target.float())
    values = [_value(term, function, part, options) for part in ([pair] if term.takes_strips else pair.each())]
    return values[0] if len(values) == 1 else torch.cat(values)


def _value(term: Term, function: LossFunction, pair: Pair, options: Mapping[str, Any]) -> Tensor:
    with _float32(pair.pred):
        value = function(pair, **options)
    if not isinstance(value, Tensor) or value.shape != (pair.images,) or not value.is_floating_point():
        found = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise RecipeError(
            f"loss.terms.{term.name}: {term.loader} returned {found}, expected the loss of each of {pair.images} images: "
            f"floating-point numbers of shape ({pair.images},)"
        )
    return value


def feature_loss(pair: Pair, spec: FeatureLoss) -> Tensor:
    """`feature_terms` of a pair: sums over valid positions, (B,)."""
    return feature_terms(pair.pred, pair.target, pair.mask_B1HW, spec, pair.grids)[0]


def summary_loss(pair: Pair, kind: Literal["cosine", "angle"]) -> Tensor:
    """`summary_terms` of a pair, (B,)."""
    return summary_terms(pair.pred, pair.target, kind, pair.balancer.dispersion)


def relation_loss(pair: Pair, spec: Relation) -> Tensor:
    """How far the distances of each image to all others are from the teacher's, (B,): smooth-L1, the mean over the others.

    Others are the N - 1 images of the same forward on all ranks. Distances are Euclidean, divided by their mean over all pairs, so
    that scale and rotation of either space do not matter; both means, and the median that divides near from far, are constants to
    the gradient. Of the sum over all images the gradient is exact on any number of ranks. Zero for a single image.
    Source: RKD (arXiv:1904.05068, eq. 5); with `gate: near_far` ARKD (SigLino, arXiv:2512.20157).
    """
    (preds_NC, start), (targets_NC, _) = pair.gather(pair.pred), pair.gather(pair.target)
    count, own = len(preds_NC), slice(start, start + len(pair.pred))
    if count < 2:
        return pair.pred.sum(1) * 0
    pred_BN = _distances(pair.pred, preds_NC) / _mean_distance(_distances(preds_NC, preds_NC))
    target_NN = _distances(targets_NC, targets_NC)
    target_NN = target_NN / _mean_distance(target_NN)
    difference_BN = pred_BN - target_NN[own]
    if spec.gate == "near_far":
        pairs = ~torch.eye(count, dtype=torch.bool, device=target_NN.device)
        near_BN = target_NN[own] < _median_of(target_NN, pairs)
        difference_BN = torch.where(near_BN, difference_BN.clamp(min=0), difference_BN.clamp(max=0))
    value_B = F.smooth_l1_loss(difference_BN, torch.zeros_like(difference_BN), reduction="none", beta=spec.beta).sum(1) / (
        count - 1
    )
    return value_B + (
        value_B - value_B.detach()
    )  # a pair stands in the rows of both its images, of which this one has a gradient


def feature_terms(
    pred_BCHW: Tensor, target_BCHW: Tensor, mask_B1HW: Tensor | None, spec: FeatureLoss, grids: Grids | None = None
) -> tuple[Tensor, Tensor]:
    """Sum the feature loss of `spec` over the positions of each image: (sums, counts), both (B,). grids: of strips (`Pair`).

    Per position: mse and smooth-L1 are means over channels, the cosine is taken per token. Masked positions give no loss
    and no count.
    """
    with _float32(pred_BCHW):
        pred, target = pred_BCHW.float(), target_BCHW.float()
        loss_BHW = pred.new_zeros(len(pred), *pred.shape[2:])
        if spec.mse:
            loss_BHW = loss_BHW + spec.mse * (pred - target).square().mean(1)
        if spec.cosine:
            loss_BHW = loss_BHW + spec.cosine * (1 - _cosine(pred, target))
        if spec.smooth_l1:
            loss_BHW = loss_BHW + spec.smooth_l1 * F.smooth_l1_loss(pred, target, reduction="none", beta=spec.beta).mean(1)
        return _sum_positions(loss_BHW, mask_B1HW) if grids is None else sum_each(loss_BHW.flatten(), grids)


def summary_terms(
    pred_BC: Tensor, target_BC: Tensor, kind: Literal["cosine", "angle"], dispersion: Tensor | float = 1.0
) -> Tensor:
    """Loss on each summary, (B,). `cosine`: 1 - cosine. `angle`: squared angle over the teacher's dispersion (V4 eq. 3-7)."""
    with _float32(pred_BC):
        pred, target = pred_BC.float(), target_BC.float()
        if kind == "cosine":
            return 1 - _cosine(pred, target)
        return angle(_unit(pred), _unit(target)).square() / dispersion


def mesa_terms(student_BCHW: Tensor, ema_BCHW: Tensor, mask_B1HW: Tensor | None) -> tuple[Tensor, Tensor]:
    """Squared distance of student and EMA-student features after a LayerNorm without affine (V4 eq. 2): (sums, counts), (B,).

    Both maps lie on the same grid (`align.resample_to`); the mask says where they overlap. No gradient reaches the EMA.
    """
    with _float32(student_BCHW):
        difference = _layer_norm(student_BCHW.float()) - _layer_norm(ema_BCHW.detach().float())
        return _sum_positions(difference.square().mean(1), mask_B1HW)


@torch.no_grad()
def fidelity_sums(
    pred_BCHW: Tensor, target_BCHW: Tensor, balancer: Balancer, mask_B1HW: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(error, variance, count): squared error and squared distance to the teacher's mean, summed, in raw teacher units.

    fidelity = variance / error (FeatSharp eq. 7), with both summed over ranks and steps first: 1 is as good as predicting
    the mean, higher is better. error / count is the teacher's raw squared error per position, summed over channels.
    """
    with _float32(pred_BCHW):
        pred, target = pred_BCHW.float(), target_BCHW.float()
        error_BHW = balancer.raw_square_C(pred - target).sum(1)
        variance_BHW = balancer.raw_square_C(target - balancer.centre_C[:, None, None]).sum(1)
        errors_B, counts_B = _sum_positions(error_BHW, mask_B1HW)
        variances_B, _ = _sum_positions(variance_BHW, mask_B1HW)
        return errors_B.sum(), variances_B.sum(), counts_B.sum()


@torch.no_grad()
def drop_coefficients(losses_BT: Tensor, seeds_B: Tensor, probability: float) -> Tensor:
    """Coefficient of every teacher's loss in every image, (B, T): UNIC's teacher dropping.

    Each image keeps the teacher with its highest loss and drops each other one with `probability`; what is left is scaled so
    that an image's coefficients add up to T. The draws belong to the image (`Batch.seeds_B`), not to the rank.
    """
    num_teachers = losses_BT.shape[1]
    keep_BT = uniform(seeds_B, "drop_teachers", n=num_teachers) >= probability
    keep_BT = keep_BT.scatter(1, losses_BT.argmax(1, keepdim=True), True)
    return keep_BT * (num_teachers / keep_BT.sum(1, keepdim=True))


class AdaLoss:
    """Divide every loss term by its running mean, so that all of them count as one (AM-RADIO's AdaLoss)."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.means: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, values: dict[str, Tensor]) -> None:
        """Move the means towards these scalars, which must be means over all ranks; the first value is taken as it is."""
        for name, value in values.items():
            previous = self.means.get(name, value)
            self.means[name] = previous + (1 - self.decay) * (value.detach().float() - previous)

    def scale(self, name: str, value: Tensor) -> Tensor:
        """`value` over the running mean of the term `name`; unchanged before the first update."""
        mean = self.means.get(name)
        return value if mean is None else value / mean.clamp(min=EPS)

    def state_dict(self) -> dict[str, Tensor]:
        """The running means by term."""
        return dict(self.means)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from `state_dict`."""
        self.means = dict(state)


def _float32(x: Tensor) -> AbstractContextManager[object]:
    """No autocast on the device of `x`; `meta` tensors, which `plan` counts on, have none."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _sum_positions(loss_BHW: Tensor, mask_B1HW: Tensor | None) -> tuple[Tensor, Tensor]:
    if mask_B1HW is None:
        positions = loss_BHW.shape[1] * loss_BHW.shape[2]
        return loss_BHW.sum((1, 2)), loss_BHW.new_full((len(loss_BHW),), positions)
    mask_BHW = mask_B1HW[:, 0]
    return torch.where(mask_BHW, loss_BHW, 0).sum((1, 2)), mask_BHW.sum((1, 2)).float()


def _distances(a_BC: Tensor, b_NC: Tensor) -> Tensor:
    """(B, N), by differences: the squares of near vectors' norms would cancel."""
    return torch.cdist(a_BC, b_NC, compute_mode="donot_use_mm_for_euclid_dist")


def _mean_distance(distances_NN: Tensor) -> Tensor:
    """Over all pairs of two images, ()."""
    count = len(distances_NN)
    return (distances_NN.sum() / (count * (count - 1))).clamp(min=EPS)


def _median_of(distances_NN: Tensor, pairs_NN: Tensor) -> Tensor:
    """Over all pairs, (): the lower of the two in the middle. The diagonal is sorted behind everything."""
    values = torch.where(pairs_NN, distances_NN, torch.inf).flatten().sort().values
    count = len(distances_NN)
    return values[(count * (count - 1) - 1) // 2]


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=1, eps=EPS)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine along dimension 1."""
    return (_unit(a) * _unit(b)).sum(1)


def _layer_norm(x_BCHW: Tensor) -> Tensor:
    x_BHWC = x_BCHW.permute(0, 2, 3, 1)
    return F.layer_norm(x_BHWC, x_BHWC.shape[-1:]).permute(0, 3, 1, 2)
