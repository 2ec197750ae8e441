"""A teacher's attention-pooling head, frozen: tokens that a student predicts become the summary that the teacher would give of them.

SigLIP calls it the MAP head: one learned query attends to all tokens, then x + MLP(LayerNorm(x)). Its weights are buffers, so no
optimizer, weight noise or reparametrisation ever touches them; they are saved and exported with the adaptor that they belong to.

Shapes: B batch, N tokens, C channels, h heads, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arch import PoolArch

__all__ = ["MapPool"]


class FrozenLinear(nn.Module):
    """A Linear whose weights are buffers."""

    weight: Tensor
    bias: Tensor

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(out_dim, in_dim))
        self.register_buffer("bias", torch.zeros(out_dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class MapPool(nn.Module):
    """(B, N, C) tokens in the teacher's own units to its summary (B, C), fp32; gradients pass to the tokens."""

    probe: Tensor
    norm_weight: Tensor
    norm_bias: Tensor

    def __init__(self, arch: PoolArch) -> None:
        super().__init__()
        self.arch, dim = arch, arch.dim
        self.register_buffer("probe", torch.zeros(dim))
        self.query, self.key, self.value, self.out = (FrozenLinear(dim, dim) for _ in range(4))
        self.register_buffer("norm_weight", torch.ones(dim))
        self.register_buffer("norm_bias", torch.zeros(dim))
        self.fc1, self.fc2 = FrozenLinear(dim, arch.mlp_hidden), FrozenLinear(arch.mlp_hidden, dim)

    def forward(self, tokens_BNC: Tensor) -> Tensor:
        x = tokens_BNC.to(self.probe.dtype)
        query = self.query(self.probe).unflatten(0, (1, self.arch.heads, -1)).transpose(0, 1)
        key, value = (part(x).unflatten(2, (self.arch.heads, -1)).transpose(1, 2) for part in (self.key, self.value))  # B h N d
        pooled = F.scaled_dot_product_attention(query.expand(len(x), -1, -1, -1), key, value)
        y = self.out(pooled.flatten(1))
        normed = F.layer_norm(y, (self.arch.dim,), self.norm_weight, self.norm_bias, self.arch.eps)
        hidden = F.gelu(self.fc1(normed), approximate="tanh" if self.arch.tanh else "none")
        return (y + self.fc2(hidden)).float()

    @torch.no_grad()
    def fill(self, weights: Mapping[str, Tensor]) -> MapPool:
        """Take the weights of a teacher's head, one of another dtype or device too; returns self.

        weights: by the names of `state_dict`, all of them. Raises RuntimeError where names or shapes differ.
        """
        self.load_state_dict({name: x.detach() for name, x in weights.items()})
        return self
