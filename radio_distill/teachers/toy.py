"""The toy teachers: tiny ViTs trained on the toy world, so that everything runs without a download.

They differ where the real teachers do: patch size, width, scale of the features, fixed or free input size, a class
token, attention pooling or no summary at all, a text tower or none. `tools/train_toy_teachers.py` makes their weights.

Shapes: B batch, C channels, H W patch grid, N tokens, n texts, D width of the text-image embedding.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..config.cards import TeacherCard
from ..errors import TeacherError
from ..network.pool import MapPool
from ..paths import data_path
from ..types import VisionOutput
from . import text_tower
from .base import Weights
from .pooling import map_pool

__all__ = ["TextTower", "ToyViT", "build", "text_tower_of"]

MAX_WORDS = 40
STEM = 16
"""Channels of the convolution before the patches."""
PAD, UNKNOWN = 0, 1


class Attention(nn.Module):
    """Multi-head self-attention over (B, N, C)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BNC: Tensor, mask_BN: Tensor | None = None) -> Tensor:
        q, k, v = rearrange(self.qkv(x_BNC), "b n (k h d) -> k b h n d", k=3, h=self.heads)
        mask = None if mask_BN is None else mask_BN[:, None, None, :]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(rearrange(mixed, "b h n d -> b n (h d)"))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_BNC: Tensor, mask_BN: Tensor | None = None) -> Tensor:
        x_BNC = x_BNC + self.attention(self.norm1(x_BNC), mask_BN)
        return x_BNC + self.mlp(self.norm2(x_BNC))


class AttentionPool(nn.Module):
    """One learned query looks at all tokens (the MAP head of SigLIP)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x_BNC: Tensor) -> Tensor:
        k, v = rearrange(self.kv(x_BNC), "b n (k h d) -> k b h n d", k=2, h=self.heads)
        q = rearrange(self.query, "b n (h d) -> b h n d", h=self.heads).expand(len(x_BNC), -1, -1, -1)
        pooled = self.out(rearrange(F.scaled_dot_product_attention(q, k, v), "b h 1 d -> b (h d)"))
        return pooled + self.mlp(self.norm(pooled))


class ToyViT(nn.Module):
    """A small ViT; normalised pixels in, `VisionOutput` out.

    `pooling`: `class_token`, `attention` or None (no summary, and a convolutional neck like SAM's). `window`: side in
    patches of the attention windows of every other block, beginning with the first; None attends globally everywhere.
    """

    def __init__(
        self,
        *,
        size: int,
        patch: int,
        width: int,
        depth: int,
        heads: int = 4,
        pooling: str | None,
        summary: int | None,
        features: int,
        window: int | None = None,
        resizable: bool = False,
    ) -> None:
        super().__init__()
        self.size, self.patch, self.window, self.resizable, self.features = size, patch, window, resizable, features
        grid = size // patch
        # A small convolution before the patches: with minutes of training a ViT learns shapes much sooner with one
        # (Early Convolutions Help Transformers See Better, https://arxiv.org/abs/2106.14881).
        self.embed = nn.Sequential(nn.Conv2d(3, STEM, 3, padding=1), nn.GELU(), nn.Conv2d(STEM, width, patch, stride=patch))
        self.position = nn.Parameter(torch.randn(1, width, grid, grid) * 0.02)
        self.class_token = nn.Parameter(torch.randn(1, 1, width) * 0.02) if pooling == "class_token" else None
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.pool = AttentionPool(width, heads) if pooling == "attention" else None
        self.project = nn.Identity() if summary in (None, width) else nn.Linear(width, summary, bias=False)
        self.neck = nn.Identity() if features == width else Neck(width, features)
        self.feature_scale: Tensor
        self.register_buffer("feature_scale", torch.ones(()))

    def forward(self, pixels_B3HW: Tensor) -> VisionOutput:
        """Raises TeacherError for a size the network does not take."""
        self._check(*pixels_B3HW.shape[-2:])
        return self.encode_patches(self.embed(pixels_B3HW))

    def encode_patches(self, patches_BCHW: Tensor) -> VisionOutput:
        """Everything behind the patch embedding."""
        H, W = patches_BCHW.shape[2:]
        x = self.mix(self.tokens(patches_BCHW), (H, W))
        features = self.neck(rearrange(x[:, -H * W :], "b (h w) c -> b c h w", h=H))
        return VisionOutput(self.summarise(x), features * self.feature_scale)

    def tokens(self, patches_BCHW: Tensor) -> Tensor:
        """Patches with their positions added: (B, H * W, C)."""
        return rearrange(patches_BCHW + self._position(*patches_BCHW.shape[-2:]), "b c h w -> b (h w) c")

    def mix(self, tokens_BNC: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """The transformer; puts the class token in front. Without a `grid`, N may be any subset of the patches."""
        for last in self.block_outputs(tokens_BNC, grid):
            x = last
        return self.norm(x)

    def block_outputs(self, tokens_BNC: Tensor, grid: tuple[int, int] | None = None) -> Iterator[Tensor]:
        """The sequence behind every block of `mix`, not normalised."""
        x = tokens_BNC
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(len(x), 1, -1), x], 1)
        for i, block in enumerate(self.blocks):
            x = self._windowed(block, x, *grid) if grid and self.window and i % 2 == 0 else block(x)
            yield x

    def summarise(self, x_BNC: Tensor) -> Tensor | None:
        """The summary (B, D) of what `mix` returned; None without pooling."""
        if self.class_token is not None:
            return self.project(x_BNC[:, 0])
        return None if self.pool is None else self.project(self.pool(x_BNC))

    def pool_head(self) -> MapPool | None:
        """Its attention pooling, for tokens in the scale of its map; None where the summary is made otherwise.

        The query is learned as it is, so that the identity projects it.
        """
        pool, width = self.pool, self.position.shape[1]
        if pool is None or not all(isinstance(part, nn.Identity) for part in (self.project, self.neck)):
            return None
        weight = torch.cat([torch.eye(width), pool.kv.weight / self.feature_scale])
        first, activation, last = pool.mlp
        assert isinstance(first, nn.Linear)
        assert isinstance(last, nn.Linear)
        return map_pool(
            heads=pool.heads,
            activation=activation,
            probe=pool.query,
            qkv=(weight, F.pad(pool.kv.bias, (width, 0))),
            out=pool.out,
            norm=pool.norm,
            mlp=(first, last),
        )

    def _position(self, height: int, width: int) -> Tensor:
        if self.position.shape[-2:] == (height, width):
            return self.position
        table = F.interpolate(self.position.float(), (height, width), mode="bicubic", align_corners=False)
        return table.to(self.position.dtype)

    def _windowed(self, block: nn.Module, x_BNC: Tensor, height: int, width: int) -> Tensor:
        k = self.window or height
        rows, columns = height // k, width // k
        tiles = rearrange(x_BNC, "b (y h x w) c -> (b y x) (h w) c", y=rows, h=k, x=columns, w=k)
        return rearrange(block(tiles), "(b y x) (h w) c -> b (y h x w) c", y=rows, h=k, x=columns, w=k)

    def _check(self, height: int, width: int) -> None:
        if not self.resizable and (height, width) != (self.size, self.size):
            raise TeacherError(f"image size {height}x{width}: this toy teacher only takes {self.size}x{self.size}")
        if height % self.patch or width % self.patch:
            raise TeacherError(f"image size {height}x{width} is not a multiple of patch size {self.patch} (see nearest_size)")


class Neck(nn.Module):
    """Two convolutions that turn tokens into a map of `features` channels, normalised over channels (as in SAM)."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(width, features, 1, bias=False)
        self.norm1 = nn.LayerNorm(features)
        self.mix = nn.Conv2d(features, features, 3, padding=1, bias=False)
        self.norm2 = nn.LayerNorm(features)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x = self.norm1(self.reduce(x_BCHW).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.norm2(self.mix(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class TextTower(nn.Module):
    """A two-layer transformer over words; its vectors are compared with a teacher's summary by cosine."""

    def __init__(self, vocabulary: tuple[str, ...], *, width: int, out: int, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self._index = {word: i for i, word in enumerate(vocabulary, UNKNOWN + 1)}
        self.embed = nn.Embedding(len(vocabulary) + 2, width)
        self.position = nn.Parameter(torch.randn(1, MAX_WORDS, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, out, bias=False)

    def tokenize(self, texts: list[str]) -> Tensor:
        """Word indices (n, MAX_WORDS), padded with PAD; words outside the vocabulary become UNKNOWN."""
        tokens = torch.full((len(texts), MAX_WORDS), PAD)
        for row, text in enumerate(texts):
            words = split_words(text)[:MAX_WORDS]
            tokens[row, : len(words)] = torch.tensor([self._index.get(w, UNKNOWN) for w in words], dtype=tokens.dtype)
        return tokens

    def forward(self, tokens_nL: Tensor) -> Tensor:
        """Embeddings (n, D), not normalised."""
        length = max(1, int((tokens_nL != PAD).sum(1).max()))
        tokens = tokens_nL[:, :length]
        known = tokens != PAD
        known[:, 0] = True  # an empty text still attends to something
        x = self.embed(tokens) + self.position[:, :length]
        for block in self.blocks:
            x = block(x, known)
        weight = known.unsqueeze(-1).to(x.dtype)
        return self.project((self.norm(x) * weight).sum(1) / weight.sum(1))


def split_words(text: str) -> list[str]:
    """The lower-case words of a text, without punctuation."""
    return re.findall(r"[a-z]+", text.lower())


def build(card: TeacherCard, weights: Weights) -> nn.Module:
    """The network of a card of family `toy`, fp32, frozen, in eval mode.

    Raises TeacherError when `weights` is `pretrained` and the card's file is missing or does not fit.
    """
    if weights == "meta":
        with torch.device("meta"):
            return _network(card)
    net = _network(card)
    if weights == "pretrained":
        _load(net, card, "vision.")
    return net.eval().requires_grad_(False)


def text_tower_of(card: TeacherCard) -> text_tower.TextTower:
    """The text tower beside a toy teacher, frozen. Raises TeacherError when the file is missing."""
    with safe_open(_weights_path(card), "pt") as file:
        vocabulary = tuple(file.metadata()["vocabulary"].split())
        width = file.get_slice("text.embed.weight").get_shape()[1]
        out = file.get_slice("text.project.weight").get_shape()[0]
    net = TextTower(vocabulary, width=width, out=out)
    _load(net, card, "text.")
    config = {"vocabulary": list(vocabulary), "width": width, "out": out}
    return text_tower.TextTower("toy", config, net, net.tokenize)


def _network(card: TeacherCard) -> ToyViT:
    facts: dict[str, Any] = dict(card.params)
    return ToyViT(
        size=card.input.size,
        patch=card.input.patch,
        summary=card.output.summary,
        features=card.output.features,
        resizable=card.input.resizable,
        **facts,
    )


def _weights_path(card: TeacherCard) -> Path:
    """The card's source, taken from the folder of the cards unless it is absolute."""
    path = data_path("teachers") / card.source
    if not path.is_file():
        command = "python tools/train_toy_teachers.py --out teachers/toy"
        raise TeacherError(f"{card.name}: no weights at {path}; expected the file that `{command}` writes")
    return path


def _load(module: nn.Module, card: TeacherCard, prefix: str) -> None:
    path = _weights_path(card)
    try:
        with safe_open(path, "pt") as file:
            state = {k.removeprefix(prefix): file.get_tensor(k).float() for k in file.keys() if k.startswith(prefix)}  # noqa: SIM118
        module.load_state_dict(state)
    except (SafetensorError, RuntimeError) as error:
        raise TeacherError(
            f"{card.name}: {path} does not fit the card ({error}); train it again or correct the card"
        ) from error
