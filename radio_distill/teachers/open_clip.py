"""Teachers from open_clip: the image tower of a CLIP or SigLIP model; the text tower stays with the evaluation.

Features are the patch tokens after the final norm and before any projection (CoCa has no norm before its attention pool:
those that the pool reads); the summary is what `encode_image` gives and the text tower is compared with (CLIP: projected
class token, SigLIP: the attention pool's output).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from ..config.cards import TeacherCard
from ..config.numbers import Free, Positive
from ..errors import CardError
from ..network.pool import MapPool
from ..types import VisionOutput
from .base import Weights
from .pooling import timm_pool
from .timm import build_trunk
from .tokens import FamilyParams, check_size, check_tokens, construct, encode_tokens, patch_map, read_params, to_map
from .weights import load, read

__all__ = ["build"]

FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


class OpenClipParams(FamilyParams):
    model: str
    """open_clip's name of the model."""
    overrides: Free = Field(default={})
    """Values that differ from the name's: of `vision_cfg`, or of timm's network where the tower is one."""
    embed_dim: Positive | None = None
    """Width of the projection; null: the name's."""


def build(card: TeacherCard, weights: Weights) -> nn.Module:
    """Normalised pixels -> patch tokens and the summary of the image tower. Raises CardError for towers without tokens."""
    import open_clip

    params = read_params(card, OpenClipParams)
    config = open_clip.get_model_config(params.model)
    if config is None:
        raise CardError(f"card {card.name!r}: open_clip has no model {params.model!r}; see open_clip.list_models()")
    vision, width = config["vision_cfg"], params.embed_dim or config["embed_dim"]
    if "timm_model_name" in vision:
        return _build_timm(card, weights, vision, width, params.overrides)
    if isinstance(vision["layers"], list):
        raise CardError(
            f"card {card.name!r}: open_clip's {params.model} is a ResNet; expected a tower with a token for every patch"
        )
    config |= {"vision_cfg": vision | params.overrides, "embed_dim": width}
    visual = _build_tower(config, weights)
    net = _loaded(card, weights, ClipNet(card, visual), visual, "visual.")
    for block in visual.transformer.resblocks:
        if isinstance(block.attn, nn.MultiheadAttention):
            block.attn = PackedAttention(block.attn)
    return net


def _build_tower(config: dict[str, Any], weights: Weights) -> Any:
    from open_clip.model import _build_vision_tower  # the public constructors build the text tower too: 0.35 B parameters

    with construct(weights):
        return _build_vision_tower(config["embed_dim"], config["vision_cfg"], quick_gelu=config.get("quick_gelu", False))


def _build_timm(
    card: TeacherCard, weights: Weights, vision: dict[str, Any], width: int, overrides: dict[str, Any]
) -> nn.Module:
    """A tower of timm. Its way into the space of the text is `timm_proj`: a layer behind it (`linear`, `mlp`), timm's own
    classifier (null), or none (`none`: the pooled vector has the text's width)."""
    name, pool, proj = vision["timm_model_name"], vision["timm_pool"], vision["timm_proj"]
    if pool in ("abs_attn", "rot_attn"):
        raise CardError(f"card {card.name!r}: the tower pools with {pool!r}; expected one of timm's own poolings")
    values = {"num_classes": 0 if proj else width} | ({"global_pool": pool} if pool else {}) | overrides
    trunk = build_trunk(card, name, weights, values)
    check_tokens(f"card {card.name!r}: timm's {name}", trunk)
    with construct(weights):
        head = _projection(proj, trunk.num_features, width, bias=vision.get("timm_proj_bias", False))
    net = TimmClipNet(card, trunk, head)
    part, prefix = (net, "visual.") if len(head) else (trunk, "visual.trunk.")
    return _loaded(card, weights, net, part, prefix)


def _projection(kind: str | None, channels: int, width: int, *, bias: bool) -> nn.Sequential:
    """What open_clip puts behind timm's pooling, under its names."""
    from timm.layers import Mlp

    layers: dict[str, nn.Module] = {}
    if kind == "linear":
        layers["proj"] = nn.Linear(channels, width, bias=bias)
    elif kind == "mlp":
        layers["mlp"] = Mlp(channels, 2 * width, width, bias=(True, bias))
    return nn.Sequential(OrderedDict(layers))


def _loaded(card: TeacherCard, weights: Weights, net: nn.Module, part: nn.Module, prefix: str) -> nn.Module:
    if weights == "pretrained":
        load(card, part, read(card, FILES, prefix=prefix))
    return net


class TimmClipNet(nn.Module):
    """A trunk of timm with open_clip's projection."""

    def __init__(self, card: TeacherCard, trunk: Any, head: nn.Sequential) -> None:
        super().__init__()
        self.card, self.trunk, self.head = card, trunk, head

    def forward(self, pixels_B3HW: Tensor) -> VisionOutput:
        grid = check_size(self.card, pixels_B3HW)
        tokens, patches = encode_tokens(self.trunk, pixels_B3HW)
        return VisionOutput(self.head(self.trunk.forward_head(tokens)), patch_map(self.card, patches, grid))

    def pool_head(self) -> MapPool | None:
        """timm's attention-pooling head; None where there is none, or a projection behind it."""
        return None if len(self.head) else timm_pool(self.trunk)


class ClipNet(nn.Module):
    """open_clip's own vision transformer. Where the card says `resizable`, its position table is resized bilinearly."""

    def __init__(self, card: TeacherCard, visual: Any) -> None:
        super().__init__()
        self.card = card
        self.visual = visual
        visual.output_tokens = True

    def forward(self, pixels_B3HW: Tensor) -> VisionOutput:
        grid = check_size(self.card, pixels_B3HW)
        table = {} if grid == self.visual.grid_size else {"visual.positional_embedding": self._positions(grid)}
        summary, tokens = functional_call(_Encoder(self.visual), table, (pixels_B3HW,))
        return VisionOutput(summary, patch_map(self.card, tokens, grid))

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """The table (1 + rows * columns, C) for another grid: the class token's row, then the resized map."""
        table = self.visual.positional_embedding
        patches = to_map(table[None, 1:].float(), self.visual.grid_size)
        patches = F.interpolate(patches, size=grid, mode="bilinear", align_corners=False)
        return torch.cat([table[:1], patches[0].flatten(1).T.to(table.dtype)])


class PackedAttention(nn.Module):
    """nn.MultiheadAttention of a sequence with itself, by one projection and torch's fused kernel.

    Out of training that module takes a path of its own, which writes all scores to memory.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads = attention.num_heads
        rows, columns = attention.in_proj_weight.shape
        self.in_proj = nn.Linear(columns, rows, device="meta")
        self.in_proj.weight, self.in_proj.bias = attention.in_proj_weight, attention.in_proj_bias
        self.out_proj = attention.out_proj

    def forward(self, x_BNC: Tensor, *_: Tensor, **options: Any) -> tuple[Tensor, None]:
        """The output (B, N, C), and no weights; keys and values, which follow x, are x itself."""
        assert options.get("attn_mask") is None
        qkv = self.in_proj(x_BNC)
        q, k, v = rearrange(qkv, "b n (t h d) -> t b h n d", t=3, h=self.num_heads)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(rearrange(out, "b h n d -> b n (h d)")), None


class _Encoder(nn.Module):
    """Pixels -> summary (B, C) and patch tokens (B, N, C) of open_clip's vision transformer."""

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, pixels_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        visual = self.visual
        if visual.attn_pool is None:
            summary, tokens = visual(pixels_B3HW)
            return summary, visual.ln_post(tokens) if visual.final_ln_after_pool else tokens  # CLIPA norms the pooled one only
        tokens = visual.transformer(visual._embeds(pixels_B3HW))  # CoCa: its `tokens` are queries of the pooling, not patches
        pooled, _ = visual._pool(tokens)
        return pooled @ visual.proj, tokens[:, 1:]
