"""A RADIO-style vision student with its adaptors; travels with its weights, and with the files beside it that it imports.

    model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True).eval()
    summary, features = model(images)                       # float images in [0, 1]: (B, k*D), (B, L, D)

    model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True, adaptor_names=["clip"]).eval()
    model(images)["clip"].features                          # what the student predicts of that teacher
    texts = model.adaptors["clip"].load_text_tower()        # where the export has it: texts.encode(["a fox"]), (1, C)

    backbone = model.as_backbone(out_indices=[6, 12])       # for heads of detection and segmentation
    backbone(images).feature_maps                           # maps (B, D, r, c) after blocks 6 and 12

Needs torch, timm and transformers. Licence of this file and of those beside it: Apache-2.0.

Shapes: B batch, L = r*c patches, r c rows and columns of the patch grid, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.modeling_outputs import BackboneOutput

# In an export these files lie beside this one; in radio_distill they are in network/ and teachers/.
# mypy: disable-error-code="import-not-found, import-untyped"
from .arch import StudentArch
from .intermediates import forward_hidden_states, forward_intermediates, forward_packed_hidden_states
from .normalizers import InputConditioner
from .packing import unpack_images
from .scale import use_unit_scale
from .student import Student
from .text_tower import open_text_tower
from .token_merging import merge_tokens

__all__ = [
    "RadioDistillBackbone",
    "RadioDistillConfig",
    "RadioDistillModel",
    "RadioIntermediates",
    "RadioOutput",
    "RadioStates",
]

Format = Literal["NLC", "NCHW"]


class RadioOutput(NamedTuple):
    summary: Tensor | None
    """One vector per image; None for a teacher without one."""
    features: Tensor
    """One vector per patch: (B, L, D), or (B, D, r, c) with `feature_fmt="NCHW"`."""


class RadioStates(NamedTuple):
    """What the backbone gives with `output_hidden_states`; of a packed call all images are one sequence, B = 1."""

    summary: Tensor | None
    features: Tensor
    last_hidden_state: Tensor
    """All tokens (B, S + L, D) at the end: class tokens, registers, patches."""
    hidden_states: tuple[Tensor, ...]
    """All tokens before the first block and after every one."""


class RadioIntermediates(NamedTuple):
    final: RadioOutput
    layers: list[RadioOutput]
    """One per block asked for, in ascending order."""


class RadioDistillConfig(BackboneConfigMixin, PretrainedConfig):
    """`student`: the architecture; the other fields of config.json are for other readers of the same folder.

    out_features, out_indices: the maps of `RadioDistillBackbone`, by name or number: `stem`, 0, is before the first block, and
    `stageN`, N, after the Nth.
    """

    model_type = "radio"

    def __init__(
        self,
        student: dict[str, Any] | None = None,
        adaptor_names: str | list[str] | None = None,
        vitdet_window_size: int | None = None,
        unit_scale: bool = False,
        out_features: list[str] | None = None,
        out_indices: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        self.student = student
        self.adaptor_names = adaptor_names
        self.vitdet_window_size = vitdet_window_size
        self.unit_scale = unit_scale
        depth = student["trunk"]["depth"] if student else 0
        self.stage_names = ["stem", *(f"stage{n}" for n in range(1, depth + 1))]
        super().__init__(**kwargs)
        self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)


class RadioDistillModel(PreTrainedModel):
    """The student: backbone, and the adaptors that `adaptor_names` asks for."""

    config_class = RadioDistillConfig
    main_input_name = "x"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _keep_in_fp32_modules_strict = ["input_conditioner", "adaptors"]
    _keys_to_ignore_on_load_unexpected = [r"radio_model\.adaptors\."]
    _keys_to_ignore_on_load_missing = [  # the config has them, too
        r"radio_model\.input_conditioner\.",
        r"radio_model\.summary_idxs",
    ]

    def __init__(self, config: RadioDistillConfig) -> None:
        super().__init__(config)
        self.radio_model = Student(_with_adaptors(StudentArch.from_dict(config.student or {}), config.adaptor_names or []))
        self.radio_model.window_size = config.vitdet_window_size
        self.model.patch_generator.draws_viewports = False  # positions are those of whole images in training, too
        if config.unit_scale:
            use_unit_scale(self.radio_model)
        towers = getattr(config, "text_towers", None) or {}
        for name, module in self.adaptors.items():
            adaptor: Any = module
            adaptor.text_tower = towers.get(name)
            adaptor.load_text_tower = partial(_load_text_tower, config._name_or_path, name)
        self.post_init()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, place: Any, *args: Any, output_loading_info: bool = False, **options: Any
    ) -> Any:
        """As in transformers, but a model whose weights are not all there, or do not all find their place, is refused."""
        loaded: Any = super().from_pretrained(place, *args, output_loading_info=True, **options)
        model, told = loaded
        if missing := sorted(told["missing_keys"]):
            others = sorted(told["unexpected_keys"])
            raise ValueError(
                f"{place} lacks {len(missing)} weights of this model, first {missing[0]!r}"
                + (f", and has {len(others)} under other names, first {others[0]!r}" if others else "")
                + "; an adaptor that was not loaded when the model was saved is not there: take adaptor_names from the export "
                f"itself. Names with a prefix are mended by `radio-distill export {place} --out NEW`"
            )
        if left := sorted(told["unexpected_keys"]):
            raise ValueError(
                f"{place} has {len(left)} weights that this model has no place for, first {left[0]!r}; what transformers' own class "
                f"saved comes back with `radio-distill export {place} --out NEW`"
            )
        if bad := next((name for name, x in model.state_dict().items() if not _finite(x)), None):
            raise ValueError(f"{place}: {bad} holds numbers that are not finite; the weights were saved so, or are damaged")
        return (model, told) if output_loading_info else model

    def save_pretrained(self, *args: Any, **options: Any) -> Any:
        """As in transformers; adaptors that were not loaded leave the configuration, as their weights are not here to save."""
        config, built = self.config, set(self.adaptors)
        config.student = {**config.student, "adaptors": [a for a in config.student["adaptors"] if a["name"] in built]}
        for field in ("adaptor_configs", "text_towers"):
            kept = {name: value for name, value in (getattr(config, field, None) or {}).items() if name in built}
            setattr(config, field, kept)
        return super().save_pretrained(*args, **options)

    def _init_weights(self, module: nn.Module) -> None:
        """Weights come from the folder; constants, where they were taken out, from the configuration."""
        if isinstance(module, Student):
            module.summary_idxs.data = torch.tensor(module.arch.summary_idxs, device=module.summary_idxs.device)
        if isinstance(module, InputConditioner):
            for name in ("mean", "std"):
                values = getattr(self.radio_model.arch, name)
                buffer = getattr(module, f"norm_{name}")
                buffer.data = torch.tensor(values, dtype=torch.float32, device=buffer.device).view(3, 1, 1)

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **options: Any) -> None:
        """What transformers' switches call: every block of the trunk is computed again in the backward pass."""
        self.model.set_grad_checkpointing(enable)
        self.gradient_checkpointing = enable

    def get_input_embeddings(self) -> nn.Module:
        return self.model.patch_generator.embedder

    def forward(
        self,
        x: Tensor | None = None,
        feature_fmt: Format = "NLC",
        window: int | None = None,
        *,
        pixel_values: Tensor | None = None,
        image_grid_hw: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Encode float images in [0, 1]; sides must be multiples of the patch, see `get_nearest_supported_resolution`.

        pixel_values: `x` under the name that transformers' processors give it. window: side in tokens of the windows of
        windowed attention (ViTDet); None: `vitdet_window_size`, else whole images. image_grid_hw: rows and columns (n, 2) of
        images of any sizes whose patches (N, 3*P*P), each as channel, row, column, are the pixels: one pass over all, and
        features (N, D). Returns summary and features, with `output_hidden_states` a RadioStates; with adaptors a dict of
        such outputs, under 'backbone' and each adaptor's name. A named tuple is what `return_dict` may ask for either way.
        """
        if (x is None) == (pixel_values is None):
            raise ValueError("expected images (B, 3, H, W) as `x` or as `pixel_values`, one of them")
        pixels: Any = pixel_values if x is None else x
        with_states = bool(self.config.output_hidden_states if output_hidden_states is None else output_hidden_states)
        if image_grid_hw is not None:
            return self._forward_grids(pixels, image_grid_hw, feature_fmt, with_states)
        if not with_states:
            return self._outputs(self.radio_model.encode_adaptors(pixels, window=window), feature_fmt)
        tokens, states = forward_hidden_states(self.radio_model, pixels, window=window)
        return self._outputs(self.radio_model.predict(tokens), feature_fmt, states)

    def forward_packed(self, images: Sequence[Tensor], feature_fmt: Format = "NLC") -> list[Any]:
        """As `forward` on one image (3, H, W) after the other, in one pass over images of any sizes; each result has B = 1."""
        packed = self.radio_model.forward_packed(images)
        return [self._outputs(self.radio_model.predict(tokens), feature_fmt) for tokens in packed]

    def _forward_grids(self, patches: Tensor, grids: Tensor, feature_fmt: Format, with_states: bool) -> Any:
        """A packed call as transformers' own class takes it: summaries (n, k*D), features of all images (N, D)."""
        if feature_fmt != "NLC":
            raise ValueError(f"feature_fmt is {feature_fmt!r}, but images of several sizes make no map; leave it out")
        images, states = unpack_images(patches, grids.tolist(), self.patch_size), None
        if with_states:
            packed, sequences = forward_packed_hidden_states(self.radio_model, images)
            states = [tokens[None] for tokens in sequences]
        else:
            packed = self.radio_model.forward_packed(images)
        each = [self.radio_model.predict(tokens) for tokens in packed]
        joined = {}
        for name in each[0]:
            parts = [_formatted(outputs[name], feature_fmt) for outputs in each]
            summaries = [part.summary for part in parts if part.summary is not None]
            features = torch.cat([part.features[0] for part in parts])
            joined[name] = RadioOutput(torch.cat(summaries) if summaries else None, features)
        return self._chosen(joined, states)

    def _outputs(self, outputs: Mapping[str, Any], feature_fmt: Format, states: Sequence[Tensor] | None = None) -> Any:
        return self._chosen({name: _formatted(output, feature_fmt) for name, output in outputs.items()}, states)

    def _chosen(self, outputs: dict[str, Any], states: Sequence[Tensor] | None) -> Any:
        """The backbone's output, where there are hidden states with them; with adaptors all outputs by name."""
        if states is not None:
            summary, features = outputs["backbone"]
            outputs["backbone"] = RadioStates(summary, features, self.model.norm(states[-1]), tuple(states))
        return outputs if self.adaptors else outputs["backbone"]

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
        final, layers = forward_intermediates(
            self.radio_model,
            x,
            indices,
            aggregation=aggregation,
            alpha=norm_alpha_scheme,
            norm=norm,
            stop_early=stop_early,
            window=window,
        )
        return RadioIntermediates(_formatted(final, feature_fmt), [_formatted(layer, feature_fmt) for layer in layers])

    def as_backbone(
        self, *, out_features: list[str] | None = None, out_indices: list[int] | None = None
    ) -> RadioDistillBackbone:
        """The same weights with transformers' calling form of backbones: the maps of `out_features` or `out_indices`."""
        config: Any = deepcopy(self.config)
        config.set_output_features_output_indices(out_features, out_indices)
        with torch.device("meta"):  # no memory: its network is this one's
            backbone = RadioDistillBackbone(config)
        backbone.radio_model = self.radio_model
        return backbone.train(self.training)

    def forward_features(self, x: Tensor) -> Tensor:
        """All tokens (B, S + L, D): class tokens, registers, patches row by row."""
        return self.model.forward_features(self.radio_model.condition(x))

    @staticmethod
    def merge_tokens(features: Tensor, count: int) -> Any:
        """Merge similar patches (B, L, D) into `count` tokens: their means, their sizes (B, count), and who went where."""
        return merge_tokens(features, count)

    def make_preprocessor_external(self) -> nn.Module:
        """Take the pixel normalisation out of the model and return it: the caller then normalises."""
        return self.radio_model.make_preprocessor_external()

    def get_nearest_supported_resolution(self, height: int, width: int) -> tuple[int, int]:
        """The nearest (height, width) in pixels that the model takes."""
        return self.radio_model.nearest_size(height, width)

    model: Any = property(attrgetter("radio_model.model"))
    input_conditioner: Any = property(attrgetter("radio_model.input_conditioner"))
    adaptors: Any = property(attrgetter("radio_model.adaptors"))
    summary_idxs: Any = property(attrgetter("radio_model.summary_idxs"))
    embed_dim: Any = property(attrgetter("radio_model.embed_dim"))
    patch_size: Any = property(attrgetter("radio_model.patch_size"))
    num_cls_tokens: Any = property(attrgetter("radio_model.num_cls_tokens"))
    window_size: Any = property(attrgetter("radio_model.window_size"))
    blocks: Any = property(attrgetter("model.blocks"))
    num_summary_tokens: Any = property(attrgetter("model.patch_generator.num_skip"))

    @property
    def summary_dim(self) -> int:
        return self.embed_dim * len(self.summary_idxs)

    @property
    def min_resolution_step(self) -> int:
        return self.patch_size * (self.window_size or 1)


class RadioDistillBackbone(BackboneMixin, RadioDistillModel):
    """Maps of inner blocks for heads of detection and segmentation, as transformers' backbones give them."""

    def __init__(self, config: RadioDistillConfig) -> None:
        super().__init__(config)
        self.num_features = [self.embed_dim] * len(self.stage_names)

    def forward(  # type: ignore[override]
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> BackboneOutput:
        """Encode float images in [0, 1]; `feature_maps`: (B, D, r, c) of every stage of `out_features`, without final norm.

        With `unit_scale` each is divided by its root mean square, which the export measured for `config.levels`.
        """
        if output_attentions:
            raise ValueError("output_attentions: the fused attention gives no weights; leave it out")
        _, states = forward_hidden_states(self.radio_model, pixel_values)
        grid = tuple(side // self.patch_size for side in pixel_values.shape[-2:])
        patches = [states[self.stage_names.index(name)][:, self.num_summary_tokens :] for name in self.out_features]
        maps = tuple(x.transpose(1, 2).unflatten(2, grid) / self._rms(name) for name, x in zip(self.out_features, patches))
        return BackboneOutput(feature_maps=maps, hidden_states=tuple(states) if output_hidden_states else None)

    def _rms(self, stage: str) -> float:
        if not self.config.unit_scale:
            return 1.0
        known = {name: rms for name, rms in (getattr(self.config, "levels", None) or {}).items() if rms}
        if stage not in known:
            raise ValueError(
                f"unit_scale: the scale of {stage!r} was not measured, expected one of {', '.join(known) or 'none'}; "
                "export with rms_images=FOLDER, and choose out_features of config.levels"
            )
        return known[stage]


def _finite(x: Tensor) -> bool:
    return x.is_meta or not x.is_floating_point() or bool(x.isfinite().all())


def _with_adaptors(arch: Any, names: str | list[str]) -> Any:
    """The architecture with the adaptors that are asked for, in the order of `names`."""
    stored = {a.name: a for a in arch.adaptors}
    names = [names] if isinstance(names, str) else names
    for name in names:
        if name not in stored:
            raise ValueError(f"no adaptor {name!r} in this model; adaptor_names takes {', '.join(stored) or 'none'}")
    return replace(arch, adaptors=tuple(stored[name] for name in names))


def _formatted(output: Any, feature_fmt: Format) -> RadioOutput:
    if feature_fmt not in ("NLC", "NCHW"):
        raise ValueError(f"feature_fmt is {feature_fmt!r}, expected 'NLC' or 'NCHW'")
    features = output.features_BCHW
    return RadioOutput(output.summary_BC, features if feature_fmt == "NCHW" else features.flatten(2).transpose(1, 2))


def _load_text_tower(export: str, name: str) -> Any:
    """The text encoder that an adaptor's summary is compared with, from the export; nothing is downloaded for a folder."""
    place, inside = Path(export), f"text_towers/{name}"
    if not place.is_dir():
        from huggingface_hub import snapshot_download

        place = Path(snapshot_download(export, allow_patterns=f"{inside}/*"))
    if not (place / inside).is_dir():
        raise ValueError(
            f"{export} holds no {inside}; expected an export made with --text-towers, of a teacher that has a text tower"
        )
    return open_text_tower(place / inside)
