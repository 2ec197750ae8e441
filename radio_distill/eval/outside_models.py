"""Evaluate models of timm and transformers without a card: sizes and normalisation come from the libraries' own files.

Shapes: B batch, C channels, H W pixels, N tokens, p side of a patch.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config.cards import TeacherCard, TeacherInput
from ..config.messages import nearest
from ..errors import CheckpointError, RadioDistillError
from ..files import json_file
from ..teachers.base import Teacher, load_teacher
from ..teachers.tokens import check_size, check_tokens, encode_tokens, patch_map, summarize
from ..types import VisionOutput

__all__ = ["hf_teacher", "is_radio", "timm_card", "timm_teacher"]


def timm_teacher(name: str, weights: str | None = None) -> Teacher:
    """The teacher of `timm_card`. Raises TeacherError for weights that are not there."""
    card = timm_card(name, weights)
    if weights != "random":
        return load_teacher(card)
    with torch.random.fork_rng(devices=[]):  # always the same ones: results of an untrained model are kept by its weights, too
        torch.manual_seed(0)
        return load_teacher(card, weights="random")


def timm_card(name: str, weights: str | None = None) -> TeacherCard:
    """A card of timm's network `name` (with or without a pretrained tag); its summary is what its own head would read.

    weights: None, the pretrained ones from the hub or its local cache; `random`; or a file. Raises RadioDistillError for a
    name timm does not know and for networks without a token sequence.
    """
    import timm

    if not timm.is_model(name):
        near = nearest(name, timm.list_models())
        advice = f"did you mean {near!r}?" if near else "expected a name of timm.list_models()"
        raise RadioDistillError(f"timm {timm.__version__} has no model {name!r}; {advice}")
    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None
    trunk, resizable = _on_meta(name)
    patch = check_tokens(f"timm:{name}", trunk)
    height, width = (side // patch * patch for side in cfg.input_size[1:])  # SigLIP's 384 px have 27 whole patches of 14
    if resizable:  # Sapiens 2 is listed with 1024x768
        height = width = min(height, width)
    features, summary = _measure(name, trunk, patch, (height, width))
    if weights is None and not cfg.has_weights:
        raise RadioDistillError(f"timm has no pretrained weights of {name}; give them with ?weights=FILE, or ?weights=random")
    full = name if "." in name or not cfg.tag else f"{name}.{cfg.tag}"
    return TeacherCard.model_validate(
        {
            "name": name,
            "family": "timm",
            "source": f"timm:{full}" if weights in (None, "random") else weights,
            "licence": str(cfg.license or "not stated"),
            "input": {"size": width, "patch": patch, "mean": cfg.mean, "std": cfg.std, "resizable": resizable},
            "output": {"summary": summary, "features": features},
            "params": {"model": name, "summary": "pool" if trunk.global_pool else "cls"},
        }
    )


def _on_meta(name: str) -> tuple[Any, bool]:
    """The network without memory, and whether it takes other sizes than its own."""
    import timm

    with torch.device("meta"):
        try:
            return timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True), True
        except TypeError:
            return timm.create_model(name, pretrained=False, num_classes=0), False


def _measure(name: str, trunk: Any, patch: int, size: tuple[int, int]) -> tuple[int, int]:
    """Channels of a token, channels of the summary. patch: its side in pixels; size: height and width of the network's images.

    Raises RadioDistillError where there is not one token for every patch of a square image, or no summary.
    """
    height, width = size
    what = f"timm:{name} is a {type(trunk).__name__}"
    tokens, patches = encode_tokens(trunk, torch.zeros(1, 3, *size, device="meta"))
    if height != width or patches.shape[:-1] != (1, (height // patch) ** 2):
        raise RadioDistillError(
            f"{what} that gives {tuple(patches.shape)} for {height}x{width} pixels in patches of {patch}; "
            "expected a vision transformer with a token for every patch of a square image"
        )
    if not trunk.global_pool:
        return patches.shape[2], tokens.shape[2]
    try:
        return patches.shape[2], trunk.forward_head(tokens, pre_logits=True).shape[1]
    except NotImplementedError as error:
        raise RadioDistillError(
            f"{what} without a summary ({error}); expected a network with a pooling or a class token"
        ) from error


def is_radio(folder: Path) -> bool:
    """A RADIO model, of the reference's own class or of transformers'."""
    with json_file(folder / "config.json", "the config of a model", advice=AGAIN) as config:
        return config.get("model_type") == "radio" or ("args" in config and "adaptor_configs" in config)


def hf_teacher(folder: Path, *, trust_remote_code: bool = False) -> Teacher:
    """A vision transformer in a local folder of transformers; of a model with two towers the vision tower.

    Which tokens are the patches is found out by changing one patch after the other. The summary is its pooled output where
    the folder has weights of the pooling, else the token before the patches, else their mean. No network is used. Raises
    CheckpointError for folders that are incomplete, and for models that do not give the same token for every patch each time.
    """
    tower, has_pooling = _load(folder, trust_remote_code)
    needed = [
        name
        for name, x in inspect.signature(tower.forward).parameters.items()
        if x.default is x.empty and x.kind < x.VAR_POSITIONAL
    ]
    if set(needed) - {"pixel_values"}:
        raise CheckpointError(
            f"{folder}: {type(tower).__name__} needs {', '.join(needed)}; expected a model that needs pixel_values alone"
        )
    patch, size = _sides(folder, tower.config)
    mean, std = _normalisation(folder)
    probe = _probe(folder, tower, patch, size)
    summary = "pool" if probe.pooled and has_pooling else "cls" if probe.prefix else "mean"
    card = TeacherCard.model_validate(
        {
            "name": folder.name,
            "family": "custom",
            "source": str(folder),
            "licence": "not stated",
            "input": {"size": size, "patch": patch, "mean": mean, "std": std, "resizable": probe.resizable},
            "output": {"summary": probe.pooled if summary == "pool" else probe.width, "features": probe.width},
            "params": {"class": type(tower).__name__, "prefix_tokens": probe.prefix, "summary": summary},
        }
    )
    return Teacher(card, _Tokens(card, tower))


class _Tokens(nn.Module):
    """A tower of transformers that takes `pixel_values` and gives `last_hidden_state`."""

    def __init__(self, card: TeacherCard, tower: Any) -> None:
        super().__init__()
        self.card, self.tower = card, tower
        self.num_prefix: int = card.params["prefix_tokens"]

    def forward(self, pixels_B3HW: Tensor) -> VisionOutput:
        grid = check_size(self.card, pixels_B3HW)
        out = _run(self.tower, pixels_B3HW)
        tokens = out.last_hidden_state
        patches = tokens[:, self.num_prefix : self.num_prefix + grid[0] * grid[1]]
        summary = summarize(self.card.params["summary"], tokens, patches, getattr(out, "pooler_output", None))
        return VisionOutput(summary, patch_map(self.card, patches, grid))


def _load(folder: Path, trust_remote_code: bool) -> tuple[Any, bool]:
    """The vision tower, and whether no weights of its pooling are missing."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        model, report = transformers.AutoModel.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except Exception as error:  # whatever a library says about a file that it cannot read
        advice = "" if trust_remote_code else "; if it needs code of its own that you trust: ?trust_remote_code=true"
        raise CheckpointError(
            f"{folder} cannot be loaded by transformers ({type(error).__name__}: {str(error).strip().partition(LINE)[0]}){advice}"
        ) from error
    tower = getattr(model, "vision_model", model)
    within = "" if tower is model else "vision_model."
    missing = sorted(key for key in report["missing_keys"] if key.startswith(within))
    pooling = [key for key in missing if {"pooler", "head"} & set(key.split("."))]
    if missing != pooling:
        raise CheckpointError(f"{folder} lacks {len(missing)} weights, first {missing[0]}; copy the whole folder again")
    return tower.eval(), not pooling


def _run(tower: Any, pixels_B3HW: Tensor) -> Any:
    takes = inspect.signature(tower.forward).parameters
    options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in takes else {}
    return tower(pixel_values=pixels_B3HW, **options)


AGAIN = "copy the whole folder again"

LINE = "\n"

PROBE = 6, 5
"""Rows and columns of patches that a tower is tried with: not square, and large enough that no stride fits by chance."""


class _Probe(NamedTuple):
    """What a tower does with an image."""

    prefix: int
    """Tokens before the patches; there may be others behind them."""
    width: int
    """Channels of a token."""
    pooled: int | None
    """Channels of its pooled output."""
    resizable: bool
    """It takes images of any multiple of its patch."""


@torch.no_grad()
def _probe(folder: Path, tower: Any, patch: int, size: int) -> _Probe:
    """Run a tower on images of its size, then on an image and copies of it with one changed patch each.

    Raises CheckpointError saying what is amiss.
    """
    what = f"{folder}: {type(tower).__name__}"
    grid = (size // patch, size // patch)
    tokens, pooled = _run_on_two(what, tower, size)
    if tokens.shape[1] < grid[0] * grid[1]:
        raise CheckpointError(
            f"{what} gives {tokens.shape[1]} tokens for {grid[0]}x{grid[1]} patches of {patch} pixels (it merges them, as Swin "
            "does?); expected a vision transformer with a token for every patch"
        )
    try:
        images, cells = _changed_images(PROBE, patch, PROBE[0] * patch, PROBE[1] * patch)
        tokens, resizable = _run(tower, images).last_hidden_state, True
        grid = PROBE
    except (ValueError, RuntimeError):  # one size only
        images, cells = _changed_images(grid, patch, size, size)
        tokens, resizable = _run(tower, images).last_hidden_state, False
    prefix = _first_patch(tokens, cells, grid)
    if prefix is None:
        raise CheckpointError(
            f"{what} gives {tokens.shape[1]} tokens for {grid[0]}x{grid[1]} patches of {patch} pixels, and a change of one patch is "
            "not seen most in one of them, row by row; expected a vision transformer with a token for every patch"
        )
    pools = isinstance(pooled, Tensor) and pooled.ndim == 2
    return _Probe(prefix, tokens.shape[2], pooled.shape[1] if pools else None, resizable)


def _run_on_two(what: str, tower: Any, size: int) -> tuple[Tensor, Any]:
    """Tokens (2, N, C) of two images, the same as when the first is seen alone, and the pooled output."""
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    try:
        out, alone = _run(tower, images), _run(tower, images[:1])
    except Exception as error:  # whatever a library says about an input that it cannot take
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{what} cannot encode a {size}x{size} image ({type(error).__name__}: {reason})") from error
    tokens = getattr(out, "last_hidden_state", None)
    if not isinstance(tokens, Tensor) or tokens.ndim != 3 or len(tokens) != 2:
        found = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise CheckpointError(f"{what} gives last_hidden_state {found} for 2 images; expected a sequence of tokens for each")
    first: Tensor = alone.last_hidden_state
    if first.shape != tokens[:1].shape or (first - tokens[:1]).norm() > 1e-2 * first.norm():  # by more than rounding
        raise CheckpointError(
            f"{what} gives other tokens when it sees the same image again; expected always the same ones (does it hide or "
            "shuffle patches at random, as ViTMAE does even with mask_ratio=0?)"
        )
    return tokens, getattr(out, "pooler_output", None)


def _changed_images(grid: tuple[int, int], patch: int, height: int, width: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """Noise (1 + K, 3, H, W), all but the first with one patch of other noise; the K cells (row, column) where that is."""
    rows, columns = grid
    cells = [(0, 0), (0, columns - 1), (rows - 1, 0), (rows // 2, columns // 3), (rows - 1, columns - 1)]
    noise = torch.Generator().manual_seed(0)
    images = torch.randn(1, 3, height, width, generator=noise).repeat(1 + len(cells), 1, 1, 1)
    for image, (row, column) in zip(images[1:], cells, strict=True):
        area = image[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
        area.copy_(torch.randn(area.shape, generator=noise))
    return images, cells


def _first_patch(tokens_BNC: Tensor, cells: list[tuple[int, int]], grid: tuple[int, int]) -> int | None:
    """Which token is the first patch, if with it every change of a patch is seen most in that patch's token, of those probed."""
    change_KN = (tokens_BNC[1:] - tokens_BNC[:1]).norm(dim=2)
    share_KN = change_KN / change_KN.sum(0).clamp_min(1e-12)  # tokens that see everything, such as registers, have no favourite
    places = torch.tensor([row * grid[1] + column for row, column in cells])
    fits: dict[int, float] = {}
    for first in range(tokens_BNC.shape[1] - grid[0] * grid[1] + 1):
        share_KK = share_KN[:, places + first]
        if torch.equal(share_KK.argmax(0), torch.arange(len(cells))):
            fits[first] = float(share_KK.diagonal().sum())
    return max(fits, key=fits.__getitem__, default=None)


def _normalisation(folder: Path) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation of pixels in [0, 1], from the folder's image processor."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            with json_file(folder / name, "the settings of an image processor", advice=AGAIN) as content:
                content = content.get("image_processor", content)
                if content.get("do_normalize") is False:
                    return (0, 0, 0), (1, 1, 1)
                if "image_mean" in content and "image_std" in content:
                    known = TeacherInput(size=1, patch=1, mean=content["image_mean"], std=content["image_std"])
                    return known.mean, known.std
    raise CheckpointError(
        f"{folder}/preprocessor_config.json with image_mean and image_std does not exist; save the processor too"
    )


def _sides(folder: Path, config: Any) -> tuple[int, int]:
    """Of a patch, and of the image that it was trained for; each may be a number or a pair (of which the image's height counts)."""
    found = {key: getattr(config, key, None) for key in ("patch_size", "image_size")}
    patches, sizes = (list[Any](x) if isinstance(x, (list, tuple)) else [x] for x in found.values())
    if sizes and len(set(patches)) == 1:
        patch, size = patches[0], sizes[0]
        if isinstance(patch, int) and isinstance(size, int) and min(patch, size) > 0:
            return patch, size
    stated = " and ".join(f"{key} {value}" for key, value in found.items())
    raise CheckpointError(f"{folder}: {type(config).__name__} has {stated}; expected a vision transformer with square patches")
