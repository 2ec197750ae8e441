"""Models of timm and transformers as rows of a table, without a card: sizes and normalisation come from the libraries' own files.

Shapes: B batch, C channels, H W pixels, N tokens, p side of a patch.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config.cards import TeacherCard
from ..config.messages import nearest
from ..errors import CheckpointError, RadioDistillError
from ..teachers.base import Teacher, load_teacher
from ..teachers.tokens import check_size, summarize, to_map
from ..types import VisionOutput

__all__ = ["hf_teacher", "is_radio", "timm_teacher"]


def timm_teacher(name: str, weights: str | None = None) -> Teacher:
    """timm's network `name` (with or without a pretrained tag); its summary is what its own head would read.

    weights: None, the pretrained ones from the hub or its local cache; `random`; or a file. Raises RadioDistillError for a
    name timm does not know and for networks without a token sequence, TeacherError for weights that are not there.
    """
    import timm

    if not timm.is_model(name):
        near = nearest(name, timm.list_models())
        advice = f"did you mean {near!r}?" if near else "expected a name of timm.list_models()"
        raise RadioDistillError(f"timm {timm.__version__} has no model {name!r}; {advice}")
    trunk, resizable = _on_meta(name)
    patch = getattr(getattr(trunk, "patch_embed", None), "patch_size", None)
    if patch is None or not hasattr(trunk, "num_prefix_tokens"):
        raise RadioDistillError(f"timm:{name} is a {type(trunk).__name__}, expected a vision transformer with a token sequence")
    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None
    if weights is None and not cfg.has_weights:
        raise RadioDistillError(f"timm has no pretrained weights of {name}; give them with ?weights=FILE, or ?weights=random")
    full = name if "." in name or not cfg.tag else f"{name}.{cfg.tag}"
    card = TeacherCard.model_validate(
        {
            "name": name,
            "family": "timm",
            "source": f"timm:{full}" if weights in (None, "random") else weights,
            "licence": str(cfg.license or "not stated"),
            "input": {"size": cfg.input_size[-1], "patch": patch[0], "mean": cfg.mean, "std": cfg.std, "resizable": resizable},
            "output": {"summary": trunk.num_features, "features": trunk.num_features},
            "params": {"model": name, "summary": "pool" if trunk.global_pool else "cls"},
        }
    )
    if weights != "random":
        return load_teacher(card)
    with torch.random.fork_rng(devices=[]):  # always the same ones: results of an untrained model are kept by its weights, too
        torch.manual_seed(0)
        return load_teacher(card, weights="random")


def _on_meta(name: str) -> tuple[Any, bool]:
    """The network without memory, and whether it takes other sizes than its own."""
    import timm

    with torch.device("meta"):
        try:
            return timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True), True
        except TypeError:
            return timm.create_model(name, pretrained=False, num_classes=0), False


def is_radio(folder: Path) -> bool:
    """A RADIO model, of the reference's own class or of transformers'."""
    config = json.loads((folder / "config.json").read_text())
    return config.get("model_type") == "radio" or ("args" in config and "adaptor_configs" in config)


def hf_teacher(folder: Path, *, trust_remote_code: bool = False) -> Teacher:
    """A vision transformer in a local folder of transformers; of a model with two towers the vision tower.

    The summary is its pooled output where the folder has weights of the pooling, else the first token, else the mean of the
    patches. No network is used. Raises CheckpointError for folders that are incomplete or hold something else.
    """
    tower, has_pooling = _load(folder, trust_remote_code)
    config = tower.config
    patch, size = (_first(getattr(config, key, None)) for key in ("patch_size", "image_size"))
    if patch is None or size is None:
        kind = type(config).__name__
        raise CheckpointError(f"{folder}: {kind} has no patch_size and image_size; expected a vision transformer")
    mean, std = _normalisation(folder)
    probe = _probe(folder, tower, patch, size)
    summary = "pool" if probe.pools and has_pooling else "cls" if probe.prefix else "mean"
    card = TeacherCard.model_validate(
        {
            "name": folder.name,
            "family": "custom",
            "source": str(folder),
            "licence": "not stated",
            "input": {"size": size, "patch": patch, "mean": mean, "std": std, "resizable": probe.resizable},
            "output": {"summary": config.hidden_size, "features": config.hidden_size},
            "params": {"class": type(tower).__name__, "prefix_tokens": probe.prefix, "summary": summary},
        }
    )
    return Teacher(card, _Tokens(card, tower))


class _Tokens(nn.Module):
    """A tower of transformers that takes `pixel_values` and gives `last_hidden_state`."""

    def __init__(self, card: TeacherCard, tower: Any) -> None:
        super().__init__()
        self.card, self.tower = card, tower

    def forward(self, pixels_B3HW: Tensor) -> VisionOutput:
        grid = check_size(self.card, pixels_B3HW)
        out = _run(self.tower, pixels_B3HW)
        prefix = self.card.params["prefix_tokens"]
        tokens = out.last_hidden_state
        pooled = getattr(out, "pooler_output", None)
        summary = summarize(self.card.params["summary"], tokens[:, :prefix], tokens[:, prefix:], pooled)
        return VisionOutput(summary, to_map(tokens[:, prefix:], grid))


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
    except (OSError, ValueError, KeyError, ImportError) as error:
        advice = "" if trust_remote_code else "; if it needs code of its own that you trust: ?trust_remote_code=true"
        raise CheckpointError(f"{folder} cannot be loaded by transformers ({str(error).splitlines()[0]}){advice}") from error
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


class _Probe(NamedTuple):
    """What a tower does with an image."""

    prefix: int
    """Tokens before the patches."""
    pools: bool
    resizable: bool
    """It takes images of any multiple of its patch."""


@torch.no_grad()
def _probe(folder: Path, tower: Any, patch: int, size: int) -> _Probe:
    height, width, resizable = 2 * patch, 3 * patch, True
    try:
        out = _run(tower, torch.zeros(1, 3, height, width))
    except (ValueError, RuntimeError):  # one size only
        height, width, resizable = size, size, False
        out = _run(tower, torch.zeros(1, 3, height, width))
    tokens = getattr(out, "last_hidden_state", None)
    prefix = tokens.shape[1] - (height // patch) * (width // patch) if isinstance(tokens, Tensor) and tokens.ndim == 3 else -1
    if prefix < 0:
        raise CheckpointError(f"{folder}: {type(tower).__name__} gives no token for every patch; expected a vision transformer")
    return _Probe(prefix, getattr(out, "pooler_output", None) is not None, resizable)


def _normalisation(folder: Path) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation of pixels in [0, 1], from the folder's image processor."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            content = json.loads((folder / name).read_text())
            content = content.get("image_processor", content)
            if content.get("do_normalize") is False:
                return (0, 0, 0), (1, 1, 1)
            if "image_mean" in content and "image_std" in content:
                return content["image_mean"], content["image_std"]
    raise CheckpointError(
        f"{folder}/preprocessor_config.json with image_mean and image_std does not exist; save the processor too"
    )


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, (list, tuple)) else value
