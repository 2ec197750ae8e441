"""The trunk: a timm VisionTransformer behind a patch generator, whole or windowed.

Parameter names are those of the reference checkpoints (`blocks.{i}.attn.qkv.weight`, ...).

Shapes: B batch, N tokens, L patches, S class tokens + registers, D width, h heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import Attention as TimmAttention
from timm.layers import Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from .arch import TrunkArch
from .draws import Draws
from .patch_generator import PatchGenerator
from .vitdet import Windows, global_period, is_global

__all__ = ["ATTENTION", "AttentionKind", "Trunk"]

AttentionKind = Literal["sdpa", "flash"]

PLAIN_TOKENS = 1024
"""On a CPU the fused kernel's backward is slower than plain products; up to this many tokens their memory is no matter."""


class Attention(TimmAttention):
    """Self-attention over torch's fused kernels.

    q, k and v are 4-D views of one projection with unit stride in d: every fused kernel takes them without a copy
    (a 5-D tensor would silently fall back to the slow kernel).
    """

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        assert attn_mask is None
        assert not is_causal
        qkv_BN3hd = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        return self.proj(self.attend(qkv_BN3hd).flatten(2))

    def attend(self, qkv_BN3hd: Tensor) -> Tensor:
        """Attention of every head: (B, N, h, d)."""
        q, k, v = (t.transpose(1, 2) for t in qkv_BN3hd.unbind(2))
        plain = q.device.type == "cpu" and torch.is_grad_enabled() and q.shape[2] <= PLAIN_TOKENS
        with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def attend_each(self, qkv_N3hd: Tensor, lengths: Sequence[int], bounds: Tensor) -> Tensor:
        """Attention inside each of several images whose tokens lie one after the other: (N, h, d).

        lengths: tokens of each image; bounds: int32, where they begin and end, on the device. Half precision on a GPU takes
        one kernel for all (torch's `varlen_attn`), anything else one image after the other.
        """
        if _takes_varlen(qkv_N3hd):
            q, k, v = qkv_N3hd.unbind(1)
            return import_module(VARLEN).varlen_attn(q, k, v, bounds, bounds, max(lengths), max(lengths))
        return torch.cat([self.attend(part[None])[0] for part in qkv_N3hd.split(list(lengths))])


VARLEN = "torch.nn.attention.varlen"


def _takes_varlen(qkv_N3hd: Tensor) -> bool:
    """Whether torch's kernel for sequences of several lengths is there (PyTorch 2.10) and takes these numbers."""
    half, width = qkv_N3hd.dtype in (torch.bfloat16, torch.float16), qkv_N3hd.shape[-1]
    if qkv_N3hd.device.type != "cuda" or not half or width % 8 or width > 256:
        return False
    return torch.cuda.get_device_capability(qkv_N3hd.device) >= (8, 0) and find_spec(VARLEN) is not None


class FlashAttention(Attention):
    """The same through the flash_attn package, which has kernels for bf16 and fp16 alone: fp32 takes torch's."""

    def attend(self, qkv_BN3hd: Tensor) -> Tensor:
        if qkv_BN3hd.dtype == torch.float32:
            return super().attend(qkv_BN3hd)
        return import_module("flash_attn").flash_attn_qkvpacked_func(qkv_BN3hd)

    def attend_each(self, qkv_N3hd: Tensor, lengths: Sequence[int], bounds: Tensor) -> Tensor:
        if qkv_N3hd.dtype == torch.float32:
            return super().attend_each(qkv_N3hd, lengths, bounds)
        return import_module("flash_attn").flash_attn_varlen_qkvpacked_func(qkv_N3hd, bounds, max(lengths))


ATTENTION: dict[AttentionKind, type[Attention]] = {"sdpa": Attention, "flash": FlashAttention}


class SwiGLU(nn.Module):
    """w3(silu(a) * b) with (a, b) = w12(x): DINOv2's MLP under DINOv2's names."""

    def __init__(self, in_features: int, hidden_features: int, bias: bool = True, **options: object) -> None:
        """`options` are those of timm's MLPs (activation, dropout, ...) that this one does not have."""
        super().__init__()
        self.w12 = nn.Linear(in_features, 2 * hidden_features, bias=bias)
        self.w3 = nn.Linear(hidden_features, in_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class Trunk(VisionTransformer):
    """timm's VisionTransformer with its embedding replaced by `patch_generator`."""

    def __init__(self, arch: TrunkArch, *, attention: AttentionKind = "sdpa", num_global: int = 4) -> None:
        super().__init__(
            img_size=arch.patch_size,  # its own embedding is dropped below
            patch_size=arch.patch_size,
            num_classes=0,
            global_pool="",
            embed_dim=arch.embed_dim,
            depth=arch.depth,
            num_heads=arch.num_heads,
            mlp_ratio=(arch.mlp_hidden + 0.5) / arch.embed_dim,  # timm truncates; half a unit keeps the exact width
            init_values=arch.layer_scale,
            final_norm=arch.final_norm,
            scale_mlp_norm=arch.mlp_norm,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            mlp_layer=SwiGLU if arch.swiglu else Mlp,
            attn_layer=ATTENTION[attention],
        )
        for embedding in ("patch_embed", "cls_token", "pos_embed", "pos_drop"):
            setattr(self, embedding, None)
        self.patch_generator = PatchGenerator(arch)
        self.period = global_period(arch.depth, num_global=num_global)
        """Windowed mode: every how many blocks one is global."""
        self.run_block: Callable[[nn.Module, Tensor], Tensor] | None = None
        """What runs a block in train mode, compiled; None: the block itself."""

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Conditioned pixels (B, 3, H, W) to tokens (B, S + L, D)."""
        assert attn_mask is None
        assert not is_causal
        return self.norm(self.forward_blocks(self.patch_generator(x)))

    def forward_blocks(self, tokens_BND: Tensor) -> Tensor:
        """All blocks on the whole sequence."""
        for block in self.blocks:
            tokens_BND = self.run(block, tokens_BND)
        return tokens_BND

    def block_outputs(
        self, pixels_B3HW: Tensor, *, draws: Draws | None = None, window: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (prefix (B, S, D), patches) after every block, without the final norm.

        With `window` the patches are windows (B*n, w*w, D), as `Windows.cut` makes them, and class tokens and registers
        pass windowed blocks unchanged.
        """
        p = self.patch_generator.patch_size
        windows = None if window is None else Windows(pixels_B3HW.shape[-2] // p, pixels_B3HW.shape[-1] // p, window)
        yield from self.outputs_from(self.patch_generator(pixels_B3HW, draws), windows)

    def outputs_from(self, tokens_BND: Tensor, windows: Windows | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """As `block_outputs`, from what the patch generator gave."""
        yield from self._whole(tokens_BND) if windows is None else self._windowed(tokens_BND, windows)

    def _whole(self, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        skip = self.patch_generator.num_skip
        for block in self.blocks:
            tokens = self.run(block, tokens)
            yield tokens[:, :skip], tokens[:, skip:]

    def _windowed(self, tokens: Tensor, windows: Windows) -> Iterator[tuple[Tensor, Tensor]]:
        skip = self.patch_generator.num_skip
        prefix, patches = tokens[:, :skip], windows.cut(tokens[:, skip:])
        for index, block in enumerate(self.blocks):
            if is_global(index, len(self.blocks), self.period):
                tokens = self.run(block, torch.cat([prefix, windows.flat(patches)], dim=1))
                prefix, patches = tokens[:, :skip], windows.stack(tokens[:, skip:])
            else:
                patches = self.run(block, patches)
            yield prefix, patches

    def run(self, block: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
        """One block; with `set_grad_checkpointing` its insides are computed again in the backward pass."""
        if self.run_block is not None and self.training and isinstance(block, nn.Module):
            block = partial(self.run_block, block)
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, tokens, use_reentrant=False, preserve_rng_state=False)  # blocks draw nothing
        return block(tokens)
