"""Spectral reparametrisation of Linears (PHI-S paper, A.7): W_eff = W * g / sigma(W), with a learned gain g.

sigma is u^T W v with u, v from power iteration. The forward pass never changes u and v: the trainer calls
`power_iterate` once per optimizer step, so that recomputed activations see the same weights and ranks stay equal.
Names in a state dict are the reference's: `X.parametrizations.weight.{original,0.scale,0._u,0._v,0._sn_version}`, or
`...0.parts.{i}.*` where rows are independent chunks (q, k, v; the halves of SwiGLU).

Shapes: R rows, C columns of a weight.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .reparametrised import Steps, make_plain, reparametrise

__all__ = ["SpectralNorm", "apply_spectral", "power_iterate", "fold", "fold_state", "spectral_eps"]

ALPHA = 0.05  # the least gain
INIT_ITERATIONS = 20
VERSION = 2  # g = softplus(scale) + ALPHA; version 1: g = scale

Init = Literal["current", "one"]


class SpectralNorm(nn.Module):
    """Parametrisation of one (R, C) weight, or of one chunk of rows."""

    _u: Tensor
    _v: Tensor

    def __init__(self, weight_RC: Tensor, *, eps: float = 1e-6, init: Init = "current") -> None:
        super().__init__()
        self.eps = eps
        rows, cols = weight_RC.shape
        # Not from the global generator: ranks must start equal.
        start = torch.randn(rows, generator=torch.Generator("cpu").manual_seed(rows), device="cpu")
        self.register_buffer("_u", F.normalize(start, dim=0).to(weight_RC.device))
        self.register_buffer("_v", torch.zeros(cols, device=weight_RC.device))
        self.register_buffer("_sn_version", torch.tensor(VERSION))
        for _ in range(INIT_ITERATIONS):
            _iterate([(self, weight_RC)])
        gain = torch.ones((), device=weight_RC.device) if init == "one" else self.sigma(weight_RC)
        scale = torch.log(torch.expm1((gain - ALPHA).clamp(min=1e-5)))
        self.scale = nn.Parameter(scale.detach().float().reshape(1, 1))  # 2-D, so that weight decay applies

    def forward(self, weight_RC: Tensor) -> Tensor:
        return _normalised(weight_RC, [self])

    def sigma(self, weight_RC: Tensor) -> Tensor:
        """The estimate of the largest singular value."""
        return _sigma(weight_RC, self._u, self._v, self.eps)


class SpectralParts(nn.Module):
    """Independent parametrisations of equal chunks of rows."""

    def __init__(self, weight_RC: Tensor, num_parts: int, *, eps: float = 1e-6, init: Init = "current") -> None:
        super().__init__()
        self.parts = nn.ModuleList([SpectralNorm(part, eps=eps, init=init) for part in weight_RC.chunk(num_parts)])

    def forward(self, weight_RC: Tensor) -> Tensor:
        norms = [cast(SpectralNorm, norm) for norm in self.parts]
        if norms[0].scale.numel() == 0:  # under ZeRO-3: its hooks gather the scale of a module that is called
            return torch.cat([norm(part) for norm, part in zip(norms, weight_RC.chunk(len(norms)))])
        return _normalised(weight_RC, norms)


def _normalised(weight_RC: Tensor, norms: Sequence[SpectralNorm]) -> Tensor:
    """W * g / sigma(W) of equal chunks of rows, each with its own norm."""
    vectors = [norm._u for norm in norms] + [norm._v for norm in norms]
    with torch.autocast(weight_RC.device.type, enabled=False):
        return _Normalise.apply(norms[0].eps, weight_RC, *[norm.scale for norm in norms], *vectors)


def _sigma(weight_RC: Tensor, u_R: Tensor, v_C: Tensor, eps: float) -> Tensor:
    return (u_R * torch.mv(weight_RC.float(), v_C)).sum() + eps


class _Normalise(torch.autograd.Function):
    """W_i * g_i / s_i for chunks i of rows, with g = softplus(scale) + ALPHA and s = u^T W v + eps, in one node of the graph.

    With G the gradient of the result and c = <G, W> / s: that of W is (g / s) (G - c u v^T), that of the scale c sigmoid(scale).
    Plain autograd makes these numbers with several more passes over the weights.
    """

    @staticmethod
    def forward(ctx: Any, eps: float, weight_RC: Tensor, *tensors: Tensor) -> Tensor:
        parts = len(tensors) // 3
        scales, us, vs = tensors[:parts], tensors[parts : 2 * parts], tensors[2 * parts :]
        sigma_P11 = torch.stack([_sigma(part, u, v, eps) for part, u, v in zip(weight_RC.chunk(parts), us, vs)]).view(-1, 1, 1)
        scale_P11 = torch.stack(scales)
        factor_P11 = (F.softplus(scale_P11) + ALPHA) / sigma_P11
        # stacking copies u and v: the next power iteration may come before the backward pass
        saved = (
            weight_RC,
            factor_P11,
            sigma_P11,
            torch.sigmoid(scale_P11),
            torch.stack(us)[:, :, None],
            torch.stack(vs)[:, None],
        )
        ctx.save_for_backward(*saved)
        return (weight_RC.unflatten(0, (parts, -1)) * factor_P11).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight_RC, factor_P11, sigma_P11, slope_P11, u_PR1, v_P1C = ctx.saved_tensors
        parts = len(u_PR1)
        (gradient_RC,) = gradients
        dots = [
            torch.dot(g.flatten(), w.flatten().to(g.dtype)) for g, w in zip(gradient_RC.chunk(parts), weight_RC.chunk(parts))
        ]
        inner_P11 = torch.stack(dots).view(-1, 1, 1) / sigma_P11
        outer = gradient_RC.unflatten(0, (parts, -1)).addcmul(u_PR1 * inner_P11, v_P1C, value=-1)
        of_weight = outer.mul_(factor_P11).flatten(0, 1)
        return None, of_weight, *(inner_P11 * slope_P11).unbind(), *[None] * (2 * parts)


def apply_spectral(module: nn.Module, *, eps: float = 1e-6, init: Init = "current") -> None:
    """Reparametrise every Linear outside `patch_generator`, in place. `init`: keep the weights as they are, or norm 1."""
    for name, linear in _linears(module):
        if "patch_generator" in name:
            continue
        weight = linear.weight.detach()
        num_parts = {"qkv": 3, "w12": 2}.get(name.rpartition(".")[2], 1)
        if num_parts == 1:
            norm: nn.Module = SpectralNorm(weight, eps=eps, init=init)
        else:
            norm = SpectralParts(weight, num_parts, eps=eps, init=init)
        reparametrise(linear, norm)


@torch.no_grad()
def power_iterate(module: nn.Module) -> None:
    """Update u and v of every reparametrised weight by one power iteration; call it once per optimizer step.

    A function of the weights alone, so ranks with equal weights stay equal. Under ZeRO-3 call it with parameters gathered.
    """
    by_shape: dict[torch.Size, list[tuple[SpectralNorm, Tensor]]] = {}
    for norm, weight_RC in _chunks(module):
        by_shape.setdefault(weight_RC.shape, []).append((norm, weight_RC))
    for pairs in by_shape.values():
        _iterate(pairs)


def _chunks(module: nn.Module) -> Iterator[tuple[SpectralNorm, Tensor]]:
    """Every norm of a module with the (chunk of a) weight that it is of."""
    for steps in module.modules():
        if isinstance(steps, Steps):
            original = steps.original.detach()
            for part in steps:
                if isinstance(part, SpectralNorm):
                    yield part, original
                elif isinstance(part, SpectralParts):
                    yield from zip(cast(Iterable[SpectralNorm], part.parts), original.chunk(len(part.parts)))


@torch.no_grad()
def _iterate(pairs: Sequence[tuple[SpectralNorm, Tensor]]) -> None:
    """One power iteration, in place, of norms of weights of one shape: all but the products in a few operations for all of them."""
    weights = [weight_RC.float() for _, weight_RC in pairs]
    us, vs = [norm._u for norm, _ in pairs], [norm._v for norm, _ in pairs]
    torch._foreach_copy_(vs, _normalized([torch.mv(weight.T, u) for weight, u in zip(weights, us)]))
    torch._foreach_copy_(us, _normalized([torch.mv(weight, v) for weight, v in zip(weights, vs)]))


def _normalized(vectors: list[Tensor]) -> list[Tensor]:
    return list(F.normalize(torch.stack(vectors), dim=1).unbind())


def fold(module: nn.Module) -> None:
    """Replace every parametrised weight of the Linears by its effective value in eval mode, in place."""
    training = module.training
    module.eval()
    make_plain(module)
    module.train(training)


def spectral_eps(module: nn.Module) -> float:
    """The eps of the module's reparametrised weights (1e-6 if it has none)."""
    return next((m.eps for m in module.modules() if isinstance(m, SpectralNorm)), 1e-6)


def fold_state(state: Mapping[str, Tensor], *, eps: float = 1e-6) -> dict[str, Tensor]:
    """The plain state dict of a parametrised one: effective weights under their usual names.

    Reads both versions and both names of the gain (`scale`, `sn_scale`), and weights with an identity parametrisation
    (DAMP). Weight noise is not applied. `eps`: the reference's 1e-6, or 1e-12 for settings given as a dict.
    """
    plain = {key: value for key, value in state.items() if ".parametrizations." not in key}
    for key, weight in state.items():
        base, found, _ = key.partition(".parametrizations.weight.original")
        if found:
            plain[f"{base}.weight"] = _effective(weight, _members(state, base), eps)
    return plain


def _members(state: Mapping[str, Tensor], base: str) -> list[dict[str, Tensor]]:
    """The spectral tensors of one weight, per chunk of rows."""
    pattern = re.compile(
        re.escape(base) + r"\.parametrizations\.weight\.\d+\.(?:parts\.(\d+)\.)?(?:sn_)?(scale|_u|_v|_sn_version)$"
    )
    parts: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        if match := pattern.match(key):
            parts.setdefault(int(match[1] or 0), {})[match[2]] = value
    return [parts[i] for i in sorted(parts)]


def _effective(weight_RC: Tensor, parts: list[dict[str, Tensor]], eps: float) -> Tensor:
    if not parts:
        return weight_RC
    chunks = []
    for chunk, part in zip(weight_RC.chunk(len(parts)), parts, strict=True):
        scale = part["scale"].float()
        gain = F.softplus(scale) + ALPHA if int(part.get("_sn_version", torch.tensor(1))) >= VERSION else scale
        sigma = part["_u"].float() @ chunk.float() @ part["_v"].float() + eps
        chunks.append(chunk * (gain / sigma))
    return torch.cat(chunks).to(weight_RC.dtype)


def _linears(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    yield from [(name, m) for name, m in module.named_modules() if isinstance(m, nn.Linear)]
