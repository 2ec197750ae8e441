"""The attention-pooling head of a teacher as a `MapPool`: for summaries that go through it (`summary: through_head`).

Shapes: C width of the tokens, n any number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.cards import TeacherCard
from ..errors import CardError
from ..network.arch import PoolArch
from ..network.pool import MapPool
from .base import Weights, load_teacher

__all__ = ["map_pool", "pooling_head", "timm_pool"]


def pooling_head(card: TeacherCard, weights: Weights = "pretrained") -> MapPool:
    """The head that a card's teacher makes its summary with, fp32 on the CPU. weights: as for `load_teacher`, not `meta`.

    Raises CardError where the teacher has none, or another than `output.pool` says; TeacherError without its weights.
    """
    net: Any = load_teacher(card, weights=weights).net
    pool = net.pool_head() if hasattr(net, "pool_head") else None
    if not isinstance(pool, MapPool):
        raise CardError(
            f"teacher {card.name!r} does not make its summary by an attention-pooling head alone, which 'summary: through_head' needs; "
            "use summary: adaptor"
        )
    stated = card.output.pool
    facts = {
        "heads": pool.arch.heads,
        "mlp": pool.arch.mlp_hidden,
        "gelu": "tanh" if pool.arch.tanh else "erf",
        "eps": pool.arch.eps,
    }
    if stated is None or stated.model_dump() != facts or pool.arch.dim != card.output.features:
        raise CardError(
            f"card {card.name!r}: its teacher has a pooling head {facts} over {pool.arch.dim} channels; state that as output.pool"
        )
    return pool


def map_pool(
    *,
    heads: int,
    activation: Callable[[Tensor], Tensor],
    probe: Tensor,
    qkv: tuple[Tensor, Tensor],
    out: nn.Linear,
    norm: nn.LayerNorm,
    mlp: tuple[nn.Linear, nn.Linear],
) -> MapPool | None:
    """A `MapPool` of a library's parts; None where the activation is no GELU. qkv: weight (3C, C) and bias (3C,) of the projections.

    probe: C values in any shape.
    """
    tanh = _is_tanh(activation)
    if tanh is None:
        return None
    weights = {"probe": probe.flatten(), "norm_weight": norm.weight, "norm_bias": norm.bias}
    projections = zip(("query", "key", "value"), qkv[0].chunk(3), qkv[1].chunk(3))
    layers = [("out", out.weight, out.bias), *((name, x.weight, x.bias) for name, x in zip(("fc1", "fc2"), mlp)), *projections]
    for name, weight, bias in layers:
        weights |= {f"{name}.weight": weight, f"{name}.bias": bias}
    return MapPool(PoolArch(probe.numel(), heads, len(mlp[0].weight), tanh, norm.eps)).fill(weights)


def timm_pool(trunk: Any) -> MapPool | None:
    """The head of a network of timm; None where it has no `AttentionPoolLatent` with one query, or one that does more than SigLIP's."""
    pool = getattr(trunk, "attn_pool", None)
    if pool is None or pool.latent_len != 1 or pool.pos_embed is not None or pool.mlp is None:
        return None
    plain = all(isinstance(x, nn.Identity) for x in (pool.q_norm, pool.k_norm, trunk.fc_norm))
    if not plain or not isinstance(pool.q, nn.Linear) or not isinstance(pool.norm, nn.LayerNorm):
        return None
    qkv = (torch.cat([pool.q.weight, pool.kv.weight]), torch.cat([pool.q.bias, pool.kv.bias]))
    mlp = (pool.mlp.fc1, pool.mlp.fc2)
    return map_pool(
        heads=pool.num_heads, activation=pool.mlp.act, probe=pool.latent, qkv=qkv, out=pool.proj, norm=pool.norm, mlp=mlp
    )


def _is_tanh(activation: Callable[[Tensor], Tensor]) -> bool | None:
    """Whether an activation is GELU by its tanh approximation, or GELU itself (False); None: it is neither."""
    x = torch.linspace(-4, 4, 33)
    y = activation(x)
    kinds = {True: F.gelu(x, approximate="tanh"), False: F.gelu(x)}
    return next((tanh for tanh, expected in kinds.items() if torch.allclose(y, expected, atol=1e-6, rtol=0)), None)
