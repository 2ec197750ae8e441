"""A RADIO-style vision student with its adaptors; travels with its weights, and with the three small files it imports.

    model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True).eval()
    summary, features = model(images)                       # float images in [0, 1]: (B, k*D), (B, L, D)

    model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True, adaptor_names=["clip"]).eval()
    model(images)["clip"].features                          # what the student predicts of that teacher
    texts = model.adaptors["clip"].load_text_tower()        # where the export has it: texts.encode(["a fox"]), (1, C)

Needs torch, timm and transformers. Licence of this file: Apache-2.0.

Shapes: B batch, L = r*c patches, r c rows and columns of the patch grid, S class tokens + registers, D width, u upsample factor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

# These files lie beside this one in an export.
from .packing import run_packed  # type: ignore[import-not-found]
from .text_tower import TextTower, open_text_tower  # type: ignore[import-not-found]
from .token_merging import Merged, merge_tokens  # type: ignore[import-not-found]

__all__ = ["RadioDistillConfig", "RadioDistillModel", "RadioOutput", "RadioIntermediates"]

Format = Literal["NLC", "NCHW"]
norm_layer: Any = partial(nn.LayerNorm, eps=1e-6)


class RadioOutput(NamedTuple):
    summary: Tensor | None
    """One vector per image; None for a teacher without one."""
    features: Tensor
    """One vector per patch: (B, L, D), or (B, D, r, c) with `feature_fmt="NCHW"`."""


class RadioIntermediates(NamedTuple):
    final: RadioOutput
    layers: list[RadioOutput]
    """One per block asked for, in ascending order."""


class RadioDistillConfig(PretrainedConfig):
    """`student`: the architecture; the other fields of config.json are for other readers of the same folder."""

    model_type = "radio"

    def __init__(
        self,
        student: dict[str, Any] | None = None,
        adaptor_names: str | list[str] | None = None,
        vitdet_window_size: int | None = None,
        unit_scale: bool = False,
        **kwargs: Any,
    ) -> None:
        self.student = student
        self.adaptor_names = adaptor_names
        self.vitdet_window_size = vitdet_window_size
        self.unit_scale = unit_scale
        super().__init__(**kwargs)


class RadioDistillModel(PreTrainedModel):
    """The student: backbone, and the adaptors that `adaptor_names` asks for."""

    config_class = RadioDistillConfig
    main_input_name = "x"
    _no_split_modules = ["Block"]
    _keep_in_fp32_modules_strict = ["input_conditioner", "adaptors"]
    _keys_to_ignore_on_load_unexpected = [r"radio_model\.adaptors\."]

    def __init__(self, config: RadioDistillConfig) -> None:
        super().__init__(config)
        names = config.adaptor_names or []
        self.radio_model = Radio(config.student or {}, [names] if isinstance(names, str) else names)
        self.radio_model.window_size = config.vitdet_window_size
        if config.unit_scale:
            self.radio_model.unit_scale = _feature_rms(config)
        towers = getattr(config, "text_towers", None) or {}
        for name, module in self.radio_model.adaptors.items():
            adaptor: Any = module
            adaptor.export, adaptor.text_tower = config._name_or_path, towers.get(name)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Weights always come from the folder."""

    def forward(self, x: Tensor, feature_fmt: Format = "NLC", window: int | None = None) -> Any:
        """Encode float images in [0, 1]; sides must be multiples of the patch, see `get_nearest_supported_resolution`.

        window: side in tokens of the windows of windowed attention (ViTDet); None: `vitdet_window_size`, else whole images.
        Returns summary and features; with adaptors a dict of such pairs, under 'backbone' and each adaptor's name.
        """
        return self.radio_model(x, feature_fmt=feature_fmt, window=window)

    def forward_intermediates(self, x: Tensor, indices: int | Sequence[int], **options: Any) -> RadioIntermediates:
        """Outputs of inner blocks; see `Radio.forward_intermediates`."""
        return self.radio_model.forward_intermediates(x, indices, **options)

    def forward_packed(self, images: Sequence[Tensor], feature_fmt: Format = "NLC") -> list[Any]:
        """As `forward` on one image (3, H, W) after the other, in one pass over images of any sizes; each result has B = 1."""
        return self.radio_model.forward_packed(images, feature_fmt=feature_fmt)

    def forward_features(self, x: Tensor) -> Tensor:
        """All tokens (B, S + L, D): class tokens, registers, patches row by row."""
        return self.model.forward_features(self.radio_model.condition(x))

    @staticmethod
    def merge_tokens(features: Tensor, count: int) -> Merged:
        """Merge similar patches (B, L, D) into `count` tokens: their means, their sizes (B, count), and who went where."""
        return merge_tokens(features, count)

    def make_preprocessor_external(self) -> nn.Module:
        """Take the pixel normalisation out of the model and return it: the caller then normalises."""
        return self.radio_model.make_preprocessor_external()

    def get_nearest_supported_resolution(self, height: int, width: int) -> tuple[int, int]:
        """The nearest (height, width) in pixels that the model takes."""
        step = self.min_resolution_step
        return max(step, round(height / step) * step), max(step, round(width / step) * step)

    @property
    def model(self) -> Trunk:
        return self.radio_model.model

    @property
    def input_conditioner(self) -> nn.Module:
        return self.radio_model.input_conditioner

    @property
    def adaptors(self) -> nn.ModuleDict:
        return self.radio_model.adaptors

    @property
    def summary_idxs(self) -> Tensor:
        return self.radio_model.summary_idxs

    @property
    def blocks(self) -> nn.Module:
        return self.model.blocks

    @property
    def embed_dim(self) -> int:
        return self.model.embed_dim

    @property
    def summary_dim(self) -> int:
        return self.model.embed_dim * len(self.summary_idxs)

    @property
    def patch_size(self) -> int:
        return self.model.patch_generator.patch_size

    @property
    def num_cls_tokens(self) -> int:
        return self.model.patch_generator.num_cls_tokens

    @property
    def num_summary_tokens(self) -> int:
        return self.model.patch_generator.num_skip

    @property
    def window_size(self) -> int | None:
        return self.radio_model.window_size

    @property
    def min_resolution_step(self) -> int:
        return self.patch_size * (self.window_size or 1)


class Radio(nn.Module):
    """Pixels to tokens to outputs. `arch`: the architecture as plain values; `adaptor_names`: which adaptors to build."""

    summary_idxs: Tensor

    def __init__(self, arch: Mapping[str, Any], adaptor_names: Sequence[str]) -> None:
        super().__init__()
        dim, depth = arch["trunk"]["embed_dim"], arch["trunk"]["depth"]
        self.input_conditioner: nn.Module = InputConditioner(arch["mean"], arch["std"])
        self.model = Trunk(arch["trunk"], arch["num_global"])
        self.register_buffer("summary_idxs", torch.tensor(arch["summary_idxs"], dtype=torch.int64))
        stored = {a["name"]: a for a in arch["adaptors"]}
        for name in adaptor_names:
            if name not in stored:
                raise ValueError(f"no adaptor {name!r} in this model; adaptor_names takes {', '.join(stored) or 'none'}")
        self.adaptors = nn.ModuleDict({name: Adaptor(stored[name]) for name in adaptor_names})
        self.feature_normalizer = FeatureNormalizer(dim) if arch["feature_normalizer"] else None
        kind = arch["intermediate_normalizer"]
        self.inter_feature_normalizer = None if kind == "none" else IntermediateNormalizer(depth, dim, kind)
        self.window_size: int | None = None
        self.unit_scale: float | None = None

    def make_preprocessor_external(self) -> nn.Module:
        conditioner, self.input_conditioner = self.input_conditioner, nn.Identity()
        return conditioner

    def forward(self, x: Tensor, feature_fmt: Format = "NLC", window: int | None = None) -> Any:
        window = window or self.window_size
        for prefix, patches in self._blocks(x, window):
            last = prefix, patches
        return self._outputs(*last, self._grid(x), feature_fmt)

    def forward_packed(self, images: Sequence[Tensor], feature_fmt: Format = "NLC") -> list[Any]:
        if self.window_size is not None:
            raise ValueError(f"packed batches attend to whole images; vitdet_window_size is {self.window_size}, expected None")
        if not images:
            raise ValueError("forward_packed was given no images, expected at least one of shape (3, H, W)")
        generator = self.model.patch_generator
        sequences = run_packed(self.model.blocks, [generator(self.condition(image[None]))[0] for image in images])
        skip, grids = generator.num_skip, [self._grid(image) for image in images]
        return [self._outputs(y[None, :skip], y[None, skip:], g, feature_fmt) for y, g in zip(sequences, grids)]

    def _outputs(self, prefix: Tensor, patches: Tensor, grid: tuple[int, int], feature_fmt: Format) -> Any:
        """A pair, or with adaptors a dict of pairs, from what the last block gives."""
        backbone = self._final(prefix, patches, norm=True)
        scaled = backbone if self.unit_scale is None else RadioOutput(backbone.summary, backbone.features / self.unit_scale)
        if not self.adaptors:
            return _formatted(scaled, grid, feature_fmt)
        class_tokens = self.model.norm(prefix)
        outputs = {"backbone": _formatted(scaled, grid, feature_fmt)}
        for name, adaptor in self.adaptors.items():
            pair = adaptor(class_tokens, backbone.features, grid)
            u: Any = adaptor.upsample
            outputs[name] = _formatted(pair, (grid[0] * u, grid[1] * u), feature_fmt)
        return outputs

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int],
        *,
        norm: bool = False,
        stop_early: bool = False,
        feature_fmt: Format = "NCHW",
        aggregation: Literal["sparse", "dense"] = "sparse",
        norm_alpha_scheme: Literal["post-alpha", "pre-alpha", "none"] = "post-alpha",
        window: int | None = None,
    ) -> RadioIntermediates:
        """Outputs of blocks `indices` (negative ones count from the end; an int: the last n), whole or windowed.

        sparse: each block as it is; dense: the mean over the blocks since the index before. Where the model has an
        intermediate normalizer, `norm_alpha_scheme` says how it is applied. norm: run the final norm on everything.
        """
        depth = len(self.model.blocks)
        wanted = sorted({i + depth if i < 0 else i for i in (range(-indices, 0) if isinstance(indices, int) else indices)})
        if not wanted or wanted[0] < 0 or wanted[-1] >= depth:
            raise ValueError(f"block indices {indices!r} do not exist; the model has {depth} blocks")
        grid = self._grid(x)
        layers: list[RadioOutput] = []
        group: list[tuple[int, Tensor, Tensor]] = []
        for index, (prefix, patches) in enumerate(self._blocks(x, window or self.window_size)):
            last = prefix, patches
            if aggregation == "sparse":
                group.clear()
            group.append((index, prefix, patches))
            if index in wanted:
                mean_prefix, mean_patches = self._mean(group, norm_alpha_scheme)
                layers.append(_formatted(self._pair(mean_prefix, mean_patches, norm), grid, feature_fmt))
                group.clear()
            if stop_early and index == wanted[-1]:
                break
        return RadioIntermediates(_formatted(self._final(*last, norm=norm), grid, feature_fmt), layers)

    def _blocks(self, x: Tensor, window: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """(prefix (B, S, D), row-major patches (B, L, D)) after every block."""
        tokens = self.model.patch_generator(self.condition(x, window))
        return self.model.whole(tokens) if window is None else self.model.windowed(tokens, self._grid(x), window)

    def condition(self, x: Tensor, window: int | None = None) -> Tensor:
        """Check the size, normalise the pixels in fp32, cast to the trunk's dtype."""
        generator = self.model.patch_generator
        step = generator.patch_size * (window or 1)
        if x.shape[-2] % step or x.shape[-1] % step:
            near = [max(step, round(side / step) * step) for side in x.shape[-2:]]
            raise ValueError(
                f"image size {x.shape[-2]}x{x.shape[-1]} is not a multiple of {step}; nearest is {near[0]}x{near[1]} "
                "(see get_nearest_supported_resolution)"
            )
        return self.input_conditioner(x).to(generator.pos_embed.dtype)

    def _grid(self, x: Tensor) -> tuple[int, int]:
        patch = self.model.patch_generator.patch_size
        return x.shape[-2] // patch, x.shape[-1] // patch

    def _pair(self, prefix: Tensor, patches: Tensor, norm: bool) -> RadioOutput:
        if norm:
            prefix, patches = self.model.norm(prefix), self.model.norm(patches)
        return RadioOutput(prefix[:, self.summary_idxs].flatten(1), patches)

    def _final(self, prefix: Tensor, patches: Tensor, *, norm: bool) -> RadioOutput:
        summary, features = self._pair(prefix, patches, norm)
        return RadioOutput(summary, features if self.feature_normalizer is None else self.feature_normalizer(features))

    def _mean(self, group: Sequence[tuple[int, Tensor, Tensor]], scheme: str) -> tuple[Tensor, Tensor]:
        normalizer = self.inter_feature_normalizer
        prefix = torch.stack([p for _, p, _ in group]).mean(0)
        if normalizer is None or scheme == "none":
            return prefix, torch.stack([x for _, _, x in group]).mean(0)
        alphas = normalizer.alphas[[i for i, _, _ in group]]
        centred = torch.stack([x - normalizer.means[i] for i, _, x in group])
        if scheme == "pre-alpha":
            patches = (alphas[:, None, None, None] * centred).mean(0)
        else:
            patches = alphas.mean() * centred.mean(0)
        return prefix, patches @ normalizer.rotation_of(group[-1][0]).T


def _feature_rms(config: RadioDistillConfig) -> float:
    rms = (config.student or {}).get("feature_rms")
    if rms is None:
        raise ValueError("unit_scale=True, and this export holds no feature_rms; expected one made with `rms_images=FOLDER`")
    return float(rms)


def _formatted(pair: RadioOutput, grid: tuple[int, int], feature_fmt: Format) -> RadioOutput:
    if feature_fmt not in ("NLC", "NCHW"):
        raise ValueError(f"feature_fmt is {feature_fmt!r}, expected 'NLC' or 'NCHW'")
    if feature_fmt == "NLC":
        return pair
    return RadioOutput(pair.summary, pair.features.transpose(1, 2).unflatten(2, grid))


# --- trunk ---------------------------------------------------------------------------------------------------------------


class Trunk(VisionTransformer):
    """timm's VisionTransformer with its embedding replaced by `patch_generator`."""

    def __init__(self, arch: Mapping[str, Any], num_global: int) -> None:
        super().__init__(
            img_size=arch["patch_size"],  # its own embedding is dropped below
            patch_size=arch["patch_size"],
            num_classes=0,
            global_pool="",
            embed_dim=arch["embed_dim"],
            depth=arch["depth"],
            num_heads=arch["num_heads"],
            mlp_ratio=(arch["mlp_hidden"] + 0.5) / arch["embed_dim"],  # timm truncates
            init_values=arch["layer_scale"],
            final_norm=arch["final_norm"],
            scale_mlp_norm=arch["mlp_norm"],
            norm_layer=norm_layer,
            mlp_layer=SwiGLU if arch["swiglu"] else Mlp,
        )
        for embedding in ("patch_embed", "cls_token", "pos_embed", "pos_drop"):
            setattr(self, embedding, None)
        self.patch_generator = PatchGenerator(arch)
        self.period = max(arch["depth"] // num_global, 1)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Conditioned pixels (B, 3, H, W) to all tokens (B, S + L, D)."""
        return self.norm(self.blocks(self.patch_generator(x)))

    def whole(self, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        skip = self.patch_generator.num_skip
        for block in self.blocks:
            tokens = block(tokens)
            yield tokens[:, :skip], tokens[:, skip:]

    def windowed(self, tokens: Tensor, grid: tuple[int, int], side: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Most blocks see side x side windows of patches, and pass class tokens and registers by; evenly spaced ones see all."""
        skip, depth = self.patch_generator.num_skip, len(self.blocks)
        for index, block in enumerate(self.blocks):
            if index % self.period == self.period - 1 or index == depth - 1:
                tokens = block(tokens)
            else:
                windows = _cut(tokens[:, skip:], grid, side)
                tokens = torch.cat([tokens[:, :skip], _join(block(windows), grid, side)], dim=1)
            yield tokens[:, :skip], tokens[:, skip:]


def _cut(patches_BLD: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    x = patches_BLD.unflatten(1, (grid[0] // side, side, grid[1] // side, side))
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def _join(windows: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    x = windows.reshape(-1, grid[0] // side, grid[1] // side, side, side, windows.shape[-1])
    return x.transpose(2, 3).flatten(1, 4)


class PatchGenerator(nn.Module):
    """Patches, cropped position embeddings, class tokens, registers."""

    def __init__(self, arch: Mapping[str, Any]) -> None:
        super().__init__()
        dim, self.patch_size = arch["embed_dim"], arch["patch_size"]
        self.num_cls_tokens, self.num_registers = arch["num_cls_tokens"], arch["num_registers"]
        self.num_skip = self.num_cls_tokens + self.num_registers
        self.grid_size = arch["max_size"] // self.patch_size
        self.crops = arch["max_size"] != arch["nominal_size"]
        self.embedder = nn.Linear(3 * self.patch_size**2, dim, bias=arch["patch_bias"])
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid_size**2, dim))
        self.cls_token = ClassTokens(self.num_skip, dim)

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        p = self.patch_size
        b, _, h, w = pixels_B3HW.shape
        cells = pixels_B3HW.reshape(b, 3, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)
        patches = self.embedder(cells.reshape(b, (h // p) * (w // p), 3 * p * p))
        return self.cls_token(patches + self.positions((h // p, w // p)))

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """(1, L, D): the table resized to the long side, its top left corner kept. No branch on sizes: it can be traced."""
        table = self.pos_embed.float().transpose(1, 2).unflatten(2, (self.grid_size, self.grid_size))
        long_side: Any = torch.sym_max(*grid)
        if self.crops:
            table = _top_left(_resize(table, (long_side, long_side)), grid)
        else:
            table = _resize(_top_left(table, grid), grid)
        return table.to(self.pos_embed.dtype).flatten(2).transpose(1, 2)


def _resize(table: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(table, size=size, mode="bilinear", align_corners=False)


def _top_left(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """The first rows and columns, or all where there are fewer. Gathered: a trace would remember whether a slice took all."""
    for dim, side in zip((2, 3), grid):
        kept: Any = torch.sym_min(side, table.shape[dim])
        table = table.index_select(dim, torch.arange(kept, device=table.device))
    return table


class ClassTokens(nn.Module):
    """Class tokens, then registers, in one parameter."""

    def __init__(self, num: int, dim: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(num, dim))

    def forward(self, patches_BLD: Tensor) -> Tensor:
        return torch.cat([self.token.expand(patches_BLD.shape[0], -1, -1), patches_BLD], dim=1)


class SwiGLU(nn.Module):
    """w3(silu(a) * b) with (a, b) = w12(x)."""

    def __init__(self, in_features: int, hidden_features: int, bias: bool = True, **options: object) -> None:
        super().__init__()
        self.w12 = nn.Linear(in_features, 2 * hidden_features, bias=bias)
        self.w3 = nn.Linear(hidden_features, in_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


# --- constant affine maps ------------------------------------------------------------------------------------------------


class InputConditioner(nn.Module):
    """(x - mean) / std of RGB in [0, 1], always in fp32."""

    norm_mean: Tensor
    norm_std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("norm_mean", torch.tensor(mean, dtype=torch.float32).view(3, 1, 1))
        self.register_buffer("norm_std", torch.tensor(std, dtype=torch.float32).view(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() - self.norm_mean) / self.norm_std

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> InputConditioner:
        """Follow the model to another device, never to another dtype: rounded constants would shift every pixel."""
        exact = self.norm_mean, self.norm_std
        super()._apply(fn, recurse)
        if self.norm_mean.dtype != torch.float32:
            self.norm_mean, self.norm_std = (x.to(self.norm_mean.device) for x in exact)
        return self


class FeatureNormalizer(nn.Module):
    """y = (x - mean) @ tx^T on patches."""

    mean: Tensor
    tx: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("tx", torch.eye(dim))

    def forward(self, patches_BLD: Tensor) -> Tensor:
        return (patches_BLD - self.mean) @ self.tx.T


class IntermediateNormalizer(nn.Module):
    """Mean, rotation and scale per block, for the patches that `forward_intermediates` returns."""

    alphas: Tensor
    means: Tensor
    rotation: Tensor

    def __init__(self, depth: int, dim: int, kind: str) -> None:
        super().__init__()
        self.register_buffer("alphas", torch.ones(depth))
        self.register_buffer("means", torch.zeros(depth, dim))
        self.register_buffer("rotation", torch.eye(dim) if kind == "shared" else torch.eye(dim).repeat(depth, 1, 1))

    def rotation_of(self, block: int) -> Tensor:
        return self.rotation if self.rotation.ndim == 2 else self.rotation[block]


# --- adaptors ------------------------------------------------------------------------------------------------------------


class Adaptor(nn.Module):
    """Predicts one teacher from a class token and the patches; returns fp32."""

    def __init__(self, arch: Mapping[str, Any]) -> None:
        super().__init__()
        self.name, self.token = arch["name"], arch["token"]
        self.export = ""
        """Folder or hub id that the model was loaded from."""
        self.text_tower: dict[str, Any] | None = None
        """Which text encoder its summary is compared with, where the teacher has one."""
        self.upsample = arch["features"]["upsample"]
        self.head_mlp = None if arch["summary"] is None else _head(arch["summary"])
        self.feat_mlp = _head(arch["features"])

    def forward(self, class_tokens_BSD: Tensor, patches_BLD: Tensor, grid: tuple[int, int]) -> RadioOutput:
        """Summary (None where the teacher has none) and features (B, L*u*u, C)."""
        dtype = next(self.parameters()).dtype
        summary = None if self.head_mlp is None else self.head_mlp(class_tokens_BSD[:, self.token].to(dtype)).float()
        y = self.feat_mlp(patches_BLD.to(dtype)).float()
        cells = y.unflatten(2, (self.upsample, self.upsample, -1)).unflatten(1, grid)  # B r c u_row u_col C
        return RadioOutput(summary, cells.transpose(2, 3).flatten(1, 4))

    def load_text_tower(self) -> TextTower:
        """The text encoder that this adaptor's summary is compared with, from the export; nothing is downloaded for a folder."""
        place, inside = Path(self.export), f"text_towers/{self.name}"
        if not place.is_dir():
            from huggingface_hub import snapshot_download

            place = Path(snapshot_download(self.export, allow_patterns=f"{inside}/*"))
        if not (place / inside).is_dir():
            raise ValueError(
                f"{self.export} holds no {inside}; expected an export made with --text-towers, of a teacher that has a text tower"
            )
        return open_text_tower(place / inside)


def _head(arch: Mapping[str, Any]) -> nn.Module:
    return {"v1": MLPv1, "v2": MLPv2, "attention": AttentionHead}[arch["kind"]](arch)


class MLPv1(nn.Module):
    """Linear, LayerNorm, ReLU, Linear."""

    def __init__(self, arch: Mapping[str, Any]) -> None:
        super().__init__()
        self.fc1 = nn.Linear(arch["in_dim"], arch["hidden"])
        self.norm = nn.LayerNorm(arch["hidden"])
        self.fc2 = nn.Linear(arch["hidden"], arch["upsample"] ** 2 * arch["out_dim"])

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.norm(self.fc1(x))))


class MLPv2(nn.Module):
    """Linear, residual LayerNorm-GELU-Linear blocks, LayerNorm-GELU-Linear."""

    def __init__(self, arch: Mapping[str, Any], inner: int | None = None) -> None:
        super().__init__()
        hidden = arch["hidden"]
        self.fc1 = nn.Linear(arch["in_dim"], hidden)
        self.blocks = nn.ModuleList(_stage(hidden, hidden) for _ in range(arch["inner"] if inner is None else inner))
        self.final = _stage(hidden, arch["upsample"] ** 2 * arch["out_dim"])

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        for block in self.blocks:
            x = x + block(x)
        return self.final(x)


def _stage(in_dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(in_dim), nn.GELU(), nn.Linear(in_dim, out_dim))


class AttentionHead(nn.Module):
    """ViT blocks over all patches, then a v2 MLP."""

    def __init__(self, arch: Mapping[str, Any]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(Block(arch["in_dim"], 16, init_values=1e-5, norm_layer=norm_layer) for _ in range(arch["inner"]))
        )
        self.mlp = MLPv2(arch, inner=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.blocks(x))
