"""The loss of an upsampler: its map of the base image, warped into other views, must equal the teacher's maps of these views.

FeatSharp, section 3.2: warp the high-resolution map of the base into each view, reduce it with a learned downsampler, compare
with the teacher's (balanced, de-biased) features of that view. Beside it: total variation, CRF and MMD of the map itself.

Shapes: B samples, J views, C channels, h w the teacher's grid, H W the upsampled grid.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..align import resize_map
from ..balance import Balancer
from ..config.upsampler_recipe import Objective
from ..homography import warp
from ..losses import fidelity_sums
from .crf import crf
from .map_weights import MapWeights, Masks, UncertaintyNet, seam_weights
from .metrics import total_variation
from .mmd import map_mmd

__all__ = ["Base", "StepLoss", "Views", "ViewLoss", "size_of"]

Sums = tuple[Tensor, Tensor, Tensor]
Terms = dict[str, tuple[float, Tensor]]


class Base(NamedTuple):
    """The upsampler's answer for the base images."""

    low_BChw: Tensor
    """The teacher's own map, balanced and de-biased."""
    high_BCHW: Tensor
    """The upsampled one."""
    image_B3HW: Tensor
    """The whitened images at any size: CRF looks at their colours."""
    seeds_B: Tensor
    """int64, one per image: draw the positions of CRF and MMD."""
    true_BCHW: Tensor | None = None
    """The teacher's own map of the whole image at the fine grid, balanced and de-biased, where `loss.true_map` has a weight."""


class Views(NamedTuple):
    """What the teacher says of the J views of every base image, and where they lie."""

    features_JBChw: Tensor
    """Balanced and de-biased features of the views; gradients reach the bias map that they hold."""
    matrices_JB33: Tensor
    """View to base, in [-1, 1] edge coordinates (`homography.py`)."""
    masks: Masks
    """Which cells count (`covered_masks`)."""
    keep_JBKhw: Tensor | None = None
    """1 where the downsampler keeps a logit, 0 where it drops it. None: its own affair."""


class StepLoss(NamedTuple):
    """The result of one step."""

    total: Tensor
    """The scalar to differentiate."""
    parts: dict[str, Tensor]
    """Detached scalars: `views`, the weighted disagreement; `error` and `raw_error`, the mean squared one in balanced and in
    raw units; `uncertainty`, `true_map`, `tv`, `crf`, `mmd` before their weights, where these are not 0."""
    fidelity: Sums
    """(error, variance, count), to be summed over steps and ranks; fidelity = variance / error (`losses.fidelity_sums`)."""


class ViewLoss(nn.Module):
    """What is trained beside the upsampler (downsampler and uncertainty), and the loss of a step."""

    least = 0.0
    """Means over the map are over at least this share of all positions."""

    def __init__(self, channels: int, downsampler: nn.Module, options: Objective) -> None:
        """`downsampler(high_BCHW, size, keep_mask)` reduces maps of `channels` channels."""
        super().__init__()
        self.options = options
        self.downsampler = downsampler
        self.uncertainty = UncertaintyNet(channels) if options.uncertainty else None

    def forward(
        self, base: Base, views: Views, balancer: Balancer, *, cells: Tensor | None = None, share: float = 1.0
    ) -> StepLoss:
        """Compare the upsampled map of the base images with the teacher's features of their views.

        For a part of a step: `cells`, the valid cells of all views of the whole step, and `share`, the part's share of its
        images, make the sum over parts the loss of the step.
        """
        base = base._replace(low_BChw=base.low_BChw.float(), high_BCHW=base.high_BCHW.float())
        high = base.high_BCHW
        size = size_of(high)
        log_variance = high.new_zeros(len(high), 1, *size) if self.uncertainty is None else self.uncertainty(high)
        seam = seam_weights(size, size_of(base.low_BChw), self.options.seam, high.device)
        weights = MapWeights(seam.expand_as(log_variance), torch.exp(-log_variance))

        loss, parts, sums = self._disagreement(high, views, weights, balancer, cells)
        if cells is None:
            loss, parts = loss * share, {name: value * share for name, value in parts.items()}
        terms = self._terms_of_the_map(base, views, weights)
        if self.uncertainty is not None:
            terms["uncertainty"] = 1.0, _masked(log_variance / 2, views.masks.base_B1HW).mean()
        for name, (weight, value) in terms.items():
            loss, parts[name] = loss + share * weight * value, share * value.detach()
        return StepLoss(loss, parts, sums)

    def _disagreement(
        self, high_BCHW: Tensor, views: Views, weights: MapWeights, balancer: Balancer, cells: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor], Sums]:
        """The weighted distance of all views, the squared error without weights, and the sums of fidelity."""
        size = size_of(views.features_JBChw[0])
        loss = error = raw = high_BCHW.new_zeros(())
        sums = high_BCHW.new_zeros(3)
        for j, over in enumerate(self.counted(views.masks.views_JB1hw, cells)):
            matrix, target, mask = views.matrices_JB33[j], views.features_JBChw[j].float(), views.masks.views_JB1hw[j]
            pred = self.downsampler(
                self.seen(high_BCHW, matrix), size, None if views.keep_JBKhw is None else views.keep_JBKhw[j]
            ).float()
            square_B1hw = _masked((pred - target).square().mean(1, keepdim=True), mask)
            apart_B1hw = _masked(self._apart(pred, target), mask)
            loss = loss + (apart_B1hw * self.in_view(weights, matrix, size)).sum() / over
            error = error + square_B1hw.detach().sum() / over
            of_view = torch.stack(fidelity_sums(pred, target, balancer, mask))
            raw = raw + of_view[0] / balancer.channels / over
            sums = sums + of_view
        return loss, {"views": loss.detach(), "error": error, "raw_error": raw}, (sums[0], sums[1], sums[2])

    def _apart(self, pred_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
        """The distance of every position, a mean over channels: (B, 1, H, W)."""
        if self.options.distance == "smooth_l1":
            return F.smooth_l1_loss(pred_BCHW, target_BCHW, reduction="none").mean(1, keepdim=True)
        return (pred_BCHW - target_BCHW).square().mean(1, keepdim=True)

    def _terms_of_the_map(self, base: Base, views: Views, weights: MapWeights) -> Terms:
        """The terms that look at the map of the base alone, as far as they have a weight: name -> (weight, value)."""
        options, high = self.options, base.high_BCHW
        terms: Terms = {}
        if options.true_map and base.true_BCHW is not None:
            apart_B1HW = self._apart(high, base.true_BCHW.float())
            terms["true_map"] = options.true_map, _masked(apart_B1HW, views.masks.base_B1HW).mean()
        if options.tv:
            value = total_variation(high, views.masks.base_B1HW, weights.on_map_B1HW, least=self.least)
            terms["tv"] = options.tv, value
        if options.crf:
            terms["crf"] = options.crf, self.crf_term(base, views, weights)
        if options.mmd:
            terms["mmd"] = options.mmd, self.mmd_term(base)
        return terms

    def counted(self, masks_JB1hw: Tensor, cells: Tensor | None) -> Tensor:
        """What the sum of each view is divided by, (J,): the valid cells of all of them (or of the whole step, `cells`), so that
        every cell counts the same."""
        counts_J = masks_JB1hw.flatten(1).sum(1).float()
        total = counts_J.sum() if cells is None else cells
        return total.clamp(min=1).expand(len(counts_J))

    def seen(self, high_BCHW: Tensor, matrix_B33: Tensor) -> Tensor:
        """The fine map of the base as a view shows it, as fine."""
        return warp(high_BCHW, matrix_B33, size_of(high_BCHW))

    def in_view(self, weights: MapWeights, matrix_B33: Tensor, size: tuple[int, int]) -> Tensor:
        """The weight of every cell of a view: (B, 1, h, w)."""
        return weights.in_view(matrix_B33, size)

    def guide(self, base: Base) -> Tensor:
        """The images at the size of the fine map, whose colours CRF looks at."""
        return resize_map(base.image_B3HW, size_of(base.high_BCHW))

    def crf_term(self, base: Base, views: Views, weights: MapWeights) -> Tensor:
        """The CRF of the fine map, a scalar."""
        high = base.high_BCHW
        mask, scale = views.masks.crf_B1HW, weights.on_map_B1HW
        return crf(
            high,
            self.guide(base),
            base.seeds_B,
            valid_B1HW=mask,
            scale_B1HW=scale,
            distance=self.options.distance,
            least=self.least,
        )

    def mmd_term(self, base: Base) -> Tensor:
        """The MMD between the coarse map and the fine one, a scalar."""
        return map_mmd(base.low_BChw, base.high_BCHW, pick=self.options.mmd_pick, seeds_B=base.seeds_B)


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else torch.where(mask, x, 0)


def size_of(map_BCHW: Tensor) -> tuple[int, int]:
    """(height, width)."""
    return map_BCHW.shape[-2], map_BCHW.shape[-1]
