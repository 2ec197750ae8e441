"""The architecture of a student, as plain values: what `Student` is built from and what `student.json` holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeVar

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "AdaptorArch",
    "AdaptorSlot",
    "HeadArch",
    "PoolArch",
    "StudentArch",
    "TrunkArch",
    "num_registers",
]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Per-channel mean and standard deviation of RGB in [0, 1] that CLIP normalises with, and RADIO after it."""

HeadKind = Literal["v1", "v2", "attention"]


@dataclass(frozen=True)
class PoolArch:
    """A teacher's attention-pooling head (`pool.py`)."""

    dim: int
    """Width of its tokens and of its summary."""
    heads: int
    mlp_hidden: int
    tanh: bool = True
    """GELU by its tanh approximation (SigLIP); False: by the error function."""
    eps: float = 1e-6
    """Of its LayerNorm."""


@dataclass(frozen=True)
class AdaptorSlot:
    """What one teacher asks of the student; the order of slots is the order of class tokens."""

    name: str
    summary_dim: int | None
    """Width of the teacher's summary; None: it has none, and the adaptor gets no summary head."""
    feature_dim: int
    """Channels of the teacher's feature map."""
    use_summary: bool
    """Whether its class token is part of the backbone summary."""
    upsample: int = 1
    """The adaptor's map is this many times finer than the student's grid."""
    pool: PoolArch | None = None
    """The teacher's pooling head, through which the adaptor's map becomes the summary; None: a head of its own predicts that."""


@dataclass(frozen=True)
class HeadArch:
    """One head: tokens of width `in_dim` to `upsample`^2 x `out_dim` values each."""

    kind: HeadKind
    in_dim: int
    hidden: int
    out_dim: int
    inner: int = 0
    """Residual blocks between the two Linears of a v2 head; ViT blocks before the MLP of an attention head."""
    upsample: int = 1


@dataclass(frozen=True)
class AdaptorArch:
    """One teacher's adaptor."""

    name: str
    token: int
    """Index of the class token it reads."""
    features: HeadArch
    summary: HeadArch | None = None
    """The head that predicts the teacher's summary from the class token."""
    pool: PoolArch | None = None
    """The teacher's own head, which makes the summary of the predicted map instead."""

    @property
    def summary_dim(self) -> int | None:
        """Width of the summary; None: it gives none."""
        return self.pool.dim if self.pool else self.summary.out_dim if self.summary else None


@dataclass(frozen=True)
class TrunkArch:
    """The ViT with its patch generator."""

    model: str
    """Name in the reference's table or in timm."""
    embed_dim: int
    depth: int
    num_heads: int
    mlp_hidden: int
    """Width inside the MLP; of each of the two halves for SwiGLU."""
    patch_size: int = 16
    nominal_size: int = 224
    """Side in pixels the name was made for. Position embeddings are cropped (CPE) only when `max_size` differs from it."""
    max_size: int = 2048
    """Side in pixels that the position table covers; a multiple of `patch_size`."""
    num_cls_tokens: int = 1
    num_registers: int = 0
    pos_dropout: float = 0.1
    layer_scale: float | None = None
    final_norm: bool = False
    swiglu: bool = False
    mlp_norm: bool = False
    """LayerNorm between the MLP's activation and its second Linear."""
    patch_bias: bool = False
    """The patch projection has a bias (DINOv2-style trunks)."""
    video_frames: int = 1
    """Consecutive frames of a video that one token shows, through a patch projection of their own; 1: there is none."""

    @property
    def grid_size(self) -> int:
        """Rows (and columns) of the position table."""
        return self.max_size // self.patch_size

    @property
    def num_prefix(self) -> int:
        """Tokens before the first patch."""
        return self.num_cls_tokens + self.num_registers

    @property
    def is_dino(self) -> bool:
        """DINOv2-style trunk: the reference wraps it (`inner.`) and always reads class token 0 and 4 registers."""
        return self.model.startswith("dino_v2")


@dataclass(frozen=True)
class StudentArch:
    """Everything that `Student` needs to be built."""

    trunk: TrunkArch
    adaptors: tuple[AdaptorArch, ...]
    summary_idxs: tuple[int, ...]
    """Class tokens that make up the backbone summary."""
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    num_global: int = 4
    """Global blocks in windowed mode."""
    feature_normalizer: bool = False
    intermediate_normalizer: Literal["none", "shared", "per_layer"] = "none"
    """Whether there is one, and whether its rotation is shared by all layers."""
    feature_rms: float | None = None
    """Root mean square of the backbone's features on the images that an export measured it on; None: not measured."""
    level_rms: tuple[float, ...] | None = None
    """The same of the patches after each block of `level_blocks`; None: not measured."""

    @property
    def level_blocks(self) -> tuple[int, ...]:
        """How many blocks are before each of four levels of the trunk, as equally far apart as they go; the last is the end."""
        return tuple(sorted({math.ceil(self.trunk.depth * n / 4) for n in (1, 2, 3, 4)}))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = asdict(self)
        if self.level_rms is None:  # so that students without keep the identity that results are stored by
            del values["level_rms"]
        if self.trunk.video_frames == 1:
            del values["trunk"]["video_frames"]
        for adaptor in values["adaptors"]:
            if adaptor["pool"] is None:
                del adaptor["pool"]
        return values

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> StudentArch:
        """The inverse of `to_dict`, also after a trip through JSON. Raises TypeError or LookupError for values that are none."""
        adaptors = tuple(
            AdaptorArch(
                name=a["name"],
                token=a["token"],
                features=_checked(HeadArch(**a["features"])),
                summary=_checked(HeadArch(**a["summary"])) if a["summary"] else None,
                pool=_checked(PoolArch(**a["pool"])) if a.get("pool") else None,
            )
            for a in values["adaptors"]
        )
        changed = {
            "trunk": _checked(TrunkArch(**values["trunk"])),
            "adaptors": tuple(map(_checked, adaptors)),
            "summary_idxs": tuple(values["summary_idxs"]),
            "mean": tuple(values["mean"]),
            "std": tuple(values["std"]),
            "level_rms": tuple(values["level_rms"]) if values.get("level_rms") else None,
        }
        return _checked(StudentArch(**{**values, **changed}))


def _is_number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


CHECKS: dict[str, Callable[[Any], bool]] = {
    "int": lambda x: isinstance(x, int) and not isinstance(x, bool),
    "bool": lambda x: isinstance(x, bool),
    "str": lambda x: isinstance(x, str),
    "float": _is_number,
    "float | None": lambda x: x is None or _is_number(x),
    "tuple[int, ...]": lambda x: all(map(CHECKS["int"], x)),
    "tuple[float, ...]": lambda x: all(map(_is_number, x)),
    "tuple[float, ...] | None": lambda x: x is None or all(map(_is_number, x)),
}
"""By the annotation of a field, what its value must be."""

A = TypeVar("A")


def _checked(arch: A) -> A:
    """The same. Raises TypeError for a value of another type than its field's."""
    for field in fields(arch):  # type: ignore[arg-type]
        value = getattr(arch, field.name)
        if not CHECKS.get(str(field.type), lambda _: True)(value):
            raise TypeError(f"{field.name} is {value!r}, expected {field.type}")
    return arch


def num_registers(num_cls: int, multiple: int, explicit: int | None = None) -> int:
    """Number of registers: the explicit number when given, else enough that class tokens + registers are a multiple.

    As in the reference an explicit 0 counts as not given, and a full `multiple` is added when `num_cls` already is one.
    """
    if explicit:
        return explicit
    return multiple - num_cls % multiple if multiple else 0
