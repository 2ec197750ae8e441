"""Fit a balancer to a teacher's statistics: which method gives which affine map.

Shapes: C channels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..config.recipe import BalanceKind, CustomBalance
from ..errors import RecipeError, TeacherError, TrainingError
from ..loaders import check_call, import_named
from .balancer import Balancer
from .hadamard import hadamard
from .moments import Moments
from .phi_s import axes_of, phi_s
from .whiten import FLOOR, floored_std, hca, pca, zca

__all__ = ["fit", "fit_on_first_rank", "import_method"]

log = logging.getLogger(__name__)

MATRICES: dict[str, Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]] = {
    "phi_s": phi_s,
    "pca": pca,
    "zca": zca,
    "hca": hca,
}
ROTATED = ("phi_s", "hca")
FLOORED = ("standardize", "pca", "zca", "hca")
CONSTANT = 1e-13  # variance over squared mean below which only float32 rounding varies


def fit(method: BalanceKind, moments: Moments, name: str, *, previous: Balancer | None = None) -> Balancer:
    """Fit `method` to the moments of the teacher called `name`, in float64 on the CPU; waits for the device.

    previous: an earlier fit of the same method; the order and signs of its principal axes are kept, so that heads which
    already learn its targets are not handed another basis.

    The balancer is float32 and lies on the moments' device. Raises TrainingError for fewer than two vectors, TeacherError for
    features that are not finite or do not vary, RecipeError for a width without a Hadamard matrix and for what is wrong with a
    function of the user's.
    """
    mean_C, covariance_CC, count = moments.mean_C.cpu(), moments.covariance_CC.cpu(), moments.count.cpu()
    _check(method, moments, name)
    if isinstance(method, CustomBalance):
        weight, inverse, offset_C = _solve_custom(method, mean_C, covariance_CC)
    else:
        weight, inverse, offset_C = _solve(method.kind, mean_C, covariance_CC, count, previous)
    if method.kind in FLOORED and _has_null_directions(method.kind, covariance_CC):
        _warn_of_null_directions(method.kind, name)
    balancer = Balancer(
        kind=method.kind,
        weight=weight.float(),
        inverse_weight=inverse.float(),
        offset_C=offset_C.float(),
        mean_C=mean_C.float(),
        facts={"teacher": name, "count": str(int(count)), **_spread(covariance_CC)},
    )
    return balancer.to(moments.device)


def _spread(covariance_CC: Tensor) -> dict[str, str]:
    """How the variance lies in its directions, as facts of a balancer.

    `first_share`: the share of the first principal axis. `effective_rank`: (sum of the eigenvalues)^2 over the sum of their
    squares; C where all are equal, 1 where there is but one.
    """
    eigenvalues = torch.linalg.eigvalsh(covariance_CC)
    total = eigenvalues.sum()
    rank = total.square() / eigenvalues.square().sum()
    return {"first_share": f"{float(eigenvalues[-1] / total):.4g}", "effective_rank": f"{float(rank):.4g}"}


def fit_on_first_rank(method: BalanceKind, moments: Moments, name: str, *, previous: Balancer | None = None) -> Balancer:
    """`fit` on the first rank, broadcast to the others; all ranks call it with the same all-reduced moments.

    Two machines may give eigenvectors that differ within repeated eigenvalues, so only one rank solves.
    """
    # what a function of the user's raises, every rank has to raise: all of them call it, and take the first one's answer
    if not dist.is_initialized() or dist.get_rank() == 0 or method.kind == "custom":
        balancer = fit(method, moments, name, previous=previous)
    else:
        _check(method, moments, name)  # whatever the first rank raises is raised everywhere: nobody waits for it
        balancer = _shapes(method, moments, name)
    return balancer.broadcast()


def _solve(
    kind: str, mean_C: Tensor, covariance_CC: Tensor, count: Tensor, previous: Balancer | None
) -> tuple[Tensor, Tensor, Tensor]:
    """W, its inverse and the offset of one method, float64; the standardisations are the PHI-S paper's eq. 5 and 6."""
    if kind in MATRICES:
        known = previous is not None and previous.kind == kind and kind != "zca"  # zca does not depend on order and signs
        like_CC = axes_of(previous.weight, rotated=kind in ROTATED) if previous is not None and known else None
        return *MATRICES[kind](covariance_CC, like_CC), mean_C
    if kind == "standardize":
        std_C = floored_std(covariance_CC.diagonal())
        return 1 / std_C, std_C, mean_C
    if kind == "global_standardize":
        # of all numbers of all channels around their common mean, unbiased
        squares = (count - 1) * covariance_CC.trace() + count * (mean_C - mean_C.mean()).square().sum()
        std_C = (squares / (count * len(mean_C) - 1)).sqrt().expand_as(mean_C)
        return 1 / std_C, std_C, mean_C.mean().expand_as(mean_C)
    return torch.ones_like(mean_C), torch.ones_like(mean_C), torch.zeros_like(mean_C)


def import_method(method: CustomBalance) -> Callable[..., Any]:
    """The function that `balance.method.loader` names. Raises RecipeError when it is not there or does not take the options."""
    by = "balance.method.loader"
    expected = "a function (mean_C, covariance_CC, **options) that returns W, (C, C) or (C,), and the offset, (C,)"
    function = import_named(method.loader, by=by, expected=expected, error=RecipeError)
    check_call(function, None, None, by=by, options=method.options, error=RecipeError)
    return function


def _solve_custom(method: CustomBalance, mean_C: Tensor, covariance_CC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same of the user's function, which gives (W, offset): W as a matrix, so that all ranks know its shape, and its inverse.

    Raises RecipeError when the function is not there, or W and offset are not finite, of other shapes, or W has no inverse.
    """
    by, channels = "balance.method.loader", len(mean_C)
    answer = import_method(method)(mean_C.clone(), covariance_CC.clone(), **method.options)
    if not (isinstance(answer, tuple) and len(answer) == 2 and all(isinstance(x, Tensor) for x in answer)):
        raise RecipeError(f"{by}: {method.loader} returned a {type(answer).__name__}, expected two tensors: W and the offset")
    weight, offset_C = (x.double() for x in answer)
    weight = weight.diag() if weight.shape == (channels,) else weight
    if weight.shape != (channels, channels) or offset_C.shape != (channels,):
        shapes = f"{tuple(answer[0].shape)} and {tuple(answer[1].shape)}"
        raise RecipeError(
            f"{by}: {method.loader} returned shapes {shapes}, expected ({channels}, {channels}) or ({channels},), and ({channels},)"
        )
    inverse, failed = torch.linalg.inv_ex(weight)
    if failed or not all(x.isfinite().all() for x in (weight, inverse, offset_C)):
        raise RecipeError(f"{by}: W of {method.loader} has no inverse, or holds values that are not finite")
    return weight, inverse, offset_C


def _has_null_directions(kind: str, covariance_CC: Tensor) -> bool:
    variances = covariance_CC.diagonal() if kind == "standardize" else torch.linalg.eigvalsh(covariance_CC)
    return bool((variances < FLOOR * variances.mean()).any())


def _check(method: BalanceKind, moments: Moments, name: str) -> None:
    count = int(moments.count)
    if count < 2:
        raise TrainingError(
            f"statistics of teacher {name!r} hold {count} feature vectors, expected at least 2; "
            "raise the images per step, or look for a mask that hides everything"
        )
    if not moments.is_finite:
        raise TeacherError(f"features of teacher {name!r} are not finite; run it with engine.teacher_precision=fp32 to see why")
    if moments.covariance_CC.trace() <= CONSTANT * moments.mean_C.square().sum():
        raise TeacherError(
            f"features of teacher {name!r} are the same in all {count} vectors; check that its weights were loaded "
            "and that its images differ"
        )
    if method.kind in ("phi_s", "hca"):
        hadamard(moments.channels)


@cache
def _warn_of_null_directions(kind: str, name: str) -> None:
    """Once per run: the statistics are refitted many times."""
    log.warning(
        "balance.method.kind=%s: teacher %r has directions with less than %g of its mean variance; they are scaled as if they "
        "had it. balance.method.kind=phi_s does not depend on them",
        *(kind, name, FLOOR),
    )


def _shapes(method: BalanceKind, moments: Moments, name: str) -> Balancer:
    """A balancer of the shapes that `fit` gives, to receive the first rank's values."""
    channels, device = moments.channels, moments.device
    shape = (channels, channels) if method.kind in MATRICES else (channels,)
    return Balancer(
        kind=method.kind,
        weight=torch.empty(shape, device=device),
        inverse_weight=torch.empty(shape, device=device),
        offset_C=torch.empty(channels, device=device),
        mean_C=torch.empty(channels, device=device),
        dispersion=torch.ones((), device=device),
        facts={"teacher": name, "count": str(int(moments.count))},
    )
