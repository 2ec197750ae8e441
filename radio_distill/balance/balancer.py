"""A balancer: the fixed affine map that puts one teacher's features on the scale on which the student learns them.

    y = W (x - o),   x = W^-1 y + o

W is a matrix, or one number per channel. Every method of `fit` gives one; adaptors learn y, and the inverse is folded into
their last Linear at export, so that it costs nothing there.

Shapes: B batch, C channels, H W grid.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config.cards import TeacherCard
from ..errors import CheckpointError
from ..files import appearing, parse_json
from ..fingerprint import Fingerprint, fingerprint
from ..tensors import broadcast, row_major, save_tensors

log = logging.getLogger(__name__)

__all__ = ["Balancer", "check_balancers", "identity", "load_balancers", "name_of", "save_balancers"]

# Methods whose inverse has orthogonal columns, so that raw squared distances need one weight per channel and no matrix.
ORTHOGONAL = ("phi_s", "pca")


@dataclass(frozen=True)
class Balancer:
    """A constant affine map on channels; float32 tensors, no gradient. Not an nn.Module: it never enters an engine."""

    kind: str
    """`phi_s`, `global_standardize`, `standardize`, `pca`, `zca`, `hca` or `none`; one within another names both."""
    weight: Tensor
    """W: (C, C), or (C,) where it is diagonal."""
    inverse_weight: Tensor
    """W^-1, of the same shape."""
    offset_C: Tensor
    """o: what is subtracted before W."""
    mean_C: Tensor
    """The teacher's mean, raw; differs from `offset_C` where the method does not remove it per channel."""
    dispersion: Tensor = field(default_factory=lambda: torch.ones(()))
    """Angular dispersion of the teacher's summaries in rad^2 (C-RADIOv4); 1 when it was not measured."""
    summary_mean_C: Tensor | None = None
    """Of the teacher's summaries, by coordinate; None: students learn them as they are (`balance.summary`)."""
    summary_std_C: Tensor | None = None
    """Their standard deviations."""
    facts: dict[str, str] = field(default_factory=dict)
    """Where it comes from (teacher, count of vectors, ...): written beside the tensors."""

    def __post_init__(self) -> None:
        # row-major: products with a transposed matrix differ in their last bits, and a reload or another rank has none
        for name, x in self.tensors().items():
            object.__setattr__(self, name, row_major(x))

    @property
    def channels(self) -> int:
        return len(self.offset_C)

    @torch.no_grad()
    def forward(self, features_BCHW: Tensor) -> Tensor:
        """Balance raw features (B, C, H, W): one float32 product with the offset folded into its bias."""
        return _affine(features_BCHW, self.weight, self.bias_C)

    def inverse(self, balanced_BCHW: Tensor) -> Tensor:
        """Raw features from balanced ones (B, C, H, W); gradients pass."""
        return _affine(balanced_BCHW, self.inverse_weight, self.offset_C)

    def within(self, other: Balancer) -> Balancer:
        """The same balancer for features that `other` has balanced already: W W_o^-1 in place of a product with W_o^-1 and one with W.

        Composed in float64. Its `inverse` gives features that are balanced by `other`, for which lengths are not those of raw features:
        it is of a kind of its own.
        """
        kind = f"{self.kind} within {other.kind}"
        weight = _product(self.weight, other.inverse_weight)
        inverse_weight = _product(other.weight, self.inverse_weight)
        offset_C, mean_C = (_apply(other.weight, x.double() - other.offset_C.double()) for x in (self.offset_C, self.mean_C))
        return replace(self, kind=kind, weight=weight, inverse_weight=inverse_weight, offset_C=offset_C, mean_C=mean_C)

    def summary(self, summary_BC: Tensor) -> Tensor:
        """What students learn of a teacher's summaries (B, C): of mean 0 and deviation 1 by coordinate (EUPE, arXiv:2603.22387), or as they
        are; gradients pass."""
        if self.summary_mean_C is None or self.summary_std_C is None:
            return summary_BC
        return (summary_BC.float() - self.summary_mean_C) / self.summary_std_C

    def summary_affine(self, *, inverse: bool = False) -> tuple[Tensor, Tensor] | None:
        """(scale_C, offset_C) with balanced = scale * summary + offset, or with `inverse` the other way round; None where summaries are
        learned as they are. C: width of the teacher's summary."""
        if self.summary_mean_C is None or self.summary_std_C is None:
            return None
        if inverse:
            return self.summary_std_C, self.summary_mean_C
        return 1 / self.summary_std_C, -self.summary_mean_C / self.summary_std_C

    def inverse_affine(self) -> tuple[Tensor, Tensor]:
        """(A_CC, b_C) with raw = A balanced + b, to be folded: Linear(V, c) becomes Linear(A V, A c + b) (PHI-S, eq. 39-44)."""
        matrix = self.inverse_weight
        return (matrix if matrix.ndim == 2 else matrix.diag()), self.offset_C

    def raw_square_C(self, difference_BCHW: Tensor) -> Tensor:
        """Terms whose sum over channels is the squared length, in raw units, of a difference of balanced features (B, C, H, W).

        PHI-S and the diagonal methods only weigh the channels. ZCA and HCA pay one product with W^-1.
        """
        if self.inverse_weight.ndim == 1:
            return (difference_BCHW * self.inverse_weight[:, None, None]).square()
        if self.kind in ORTHOGONAL:
            return difference_BCHW.square() * self._column_squares_C[:, None, None]
        return _affine(difference_BCHW, self.inverse_weight, torch.zeros_like(self.offset_C)).square()

    @cached_property
    def bias_C(self) -> Tensor:
        """-W o: y = W x + bias."""
        return -_apply(self.weight, self.offset_C)

    @cached_property
    def centre_C(self) -> Tensor:
        """Where the teacher's mean lies in balanced units: zero unless the method keeps a mean."""
        return _apply(self.weight, self.mean_C.double() - self.offset_C.double())

    @cached_property
    def _column_squares_C(self) -> Tensor:
        return self.inverse_weight.square().sum(0)

    def to(self, device: torch.device | str) -> Balancer:
        """The same balancer on `device`."""
        return self._map(lambda x: x.to(device))

    def broadcast(self) -> Balancer:
        """The balancer of the first rank; all ranks must call it, with tensors of equal shapes."""
        received = self._map(Tensor.clone)
        for x in received.tensors().values():
            broadcast(x)
        return received

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        return {f.name: x for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor)}

    def _map(self, change: Callable[[Tensor], Tensor]) -> Balancer:
        changed: dict[str, Any] = {name: change(x) for name, x in self.tensors().items()}
        return replace(self, **changed)


def identity(channels: int) -> Balancer:
    """The balancer that changes nothing: what training starts with before there are statistics."""
    ones, zeros = torch.ones(channels), torch.zeros(channels)
    return Balancer(kind="none", weight=ones, inverse_weight=ones.clone(), offset_C=zeros, mean_C=zeros.clone())


def save_balancers(folder: Path, balancers: dict[str, Balancer], teachers: Mapping[str, Fingerprint] | None = None) -> None:
    """Write one `NAME.safetensors` per teacher into `folder`, each complete before it gets its name.

    teachers: the fingerprints of those that the statistics are of, for `check_balancers`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, balancer in balancers.items():
        metadata = {"kind": balancer.kind, "facts": json.dumps(balancer.facts)}
        if teachers and name in teachers:
            metadata["fingerprint"] = json.dumps(teachers[name].to_dict())
        with appearing(folder / f"{name}.safetensors") as path:
            save_tensors(path, balancer.tensors(), metadata)


def check_balancers(folder: Path, cards: Mapping[str, TeacherCard]) -> None:
    """Raise CheckpointError when the balancer of a teacher in `cards` was made for another one: other facts, weights or code."""
    for name, card in cards.items():
        path = folder / f"{name}.safetensors"
        was = _recorded(path)
        if was is None:
            log.warning("%s has no fingerprint of its teacher (it is of an older version): taken to be that of %s", path, name)
        elif differences := was.differences(fingerprint(card)):
            raise CheckpointError(
                f"{path} was made for another teacher than {name!r} is now ({', '.join(map(str, differences))}); make it again with "
                "`radio-distill stats`, or correct the card or balance.path"
            )


def name_of(folder: Path, card: TeacherCard) -> str:
    """Under which name a folder holds the balancer of a card's teacher: the card's own, or what a recipe called the same teacher."""
    if (folder / f"{card.name}.safetensors").is_file():
        return card.name
    same = [
        path.stem
        for path in sorted(folder.glob("*.safetensors"))
        if (was := _recorded(path)) and not was.differences(fingerprint(card))
    ]
    return same[0] if same else card.name


def load_balancers(folder: Path, channels: dict[str, int] | None = None) -> dict[str, Balancer]:
    """Read the balancers of the teachers in `channels` (name -> number of channels), or all of a folder, on the CPU.

    Raises CheckpointError when a teacher has none, its file cannot be read, or its channels differ.
    """
    if channels is None:
        return {path.stem: _load(folder, path.stem, None) for path in sorted(folder.glob("*.safetensors"))}
    return {name: _load(folder, name, expected) for name, expected in channels.items()}


def _recorded(path: Path) -> Fingerprint | None:
    """The fingerprint of the teacher that a balancer was made for, where the file has one."""
    try:
        with safe_open(path, "pt") as file:
            recorded = (file.metadata() or {}).get("fingerprint")
        return Fingerprint.from_dict(json.loads(recorded)) if recorded else None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a balancer ({error}); make it again with `radio-distill stats`") from error


def _load(folder: Path, name: str, expected: int | None) -> Balancer:
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        found = ", ".join(sorted(p.stem for p in folder.glob("*.safetensors"))) or "nothing"
        raise CheckpointError(
            f"{folder} has no balancer for teacher {name!r}, only {found}; make it with `radio-distill stats`, "
            "or set balance.path to a folder that has it"
        )
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        balancer = Balancer(kind=metadata["kind"], facts=parse_json(metadata["facts"]), **tensors)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a balancer ({error}); make it again with `radio-distill stats`") from error
    if expected is not None and balancer.channels != expected:
        raise CheckpointError(
            f"{path} is for {balancer.channels} channels but teacher {name!r} gives {expected}; "
            "it was made for another model: make it again with `radio-distill stats`, or correct balance.path"
        )
    return balancer


def _apply(weight: Tensor, vector_C: Tensor) -> Tensor:
    """W v in float64: an offset much larger than the spread (SAM: -62 and 5) must not cost digits."""
    w, v = weight.double(), vector_C.double()
    return (w @ v if w.ndim == 2 else w * v).float()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """A B in float64, each a matrix or the diagonal of one."""
    if a.ndim == b.ndim == 1:
        return (a.double() * b.double()).float()
    if a.ndim == 1:
        return (a.double()[:, None] * b.double()).float()
    return (a.double() @ b.double() if b.ndim == 2 else a.double() * b.double()).float()


def _affine(x_BCHW: Tensor, weight: Tensor, bias_C: Tensor) -> Tensor:
    with torch.autocast(x_BCHW.device.type, enabled=False):
        x = x_BCHW.float()
        if weight.ndim == 1:
            return torch.addcmul(bias_C[:, None, None], x, weight[:, None, None])
        y_BCN = torch.baddbmm(bias_C[:, None], weight.expand(len(x), -1, -1), x.flatten(2))
        return y_BCN.unflatten(2, x.shape[2:])
