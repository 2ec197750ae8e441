"""The types that modules pass to each other: batches, targets, outputs, results.

Shapes: B batch, C channels, H W rows and columns (pixels of an image, cells of a feature map).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from .network.arch import CLIP_MEAN, CLIP_STD
from .network.output import VisionOutput

if TYPE_CHECKING:
    from torch import Tensor, device

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "VisionOutput",
    "VisionModel",
    "View",
    "Batch",
    "Target",
    "Targets",
    "Losses",
    "Result",
    "Finding",
]


@runtime_checkable
class VisionModel(Protocol):
    """Anything that encodes RGB images given in [0, 1]; a row of every table."""

    patch_size: int

    def encode(self, images_B3HW: Tensor) -> VisionOutput:
        """Encode float images in [0, 1]; resizes and normalises the pixels itself."""
        ...

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        """The nearest (height, width) in pixels that the model takes."""
        ...


class View(NamedTuple):
    """The pixels that one consumer (the student or one teacher) sees, and where they lie in the sample's crop."""

    images_B3HW: Tensor
    """uint8, already resized to the consumer's size; all images of a view have one size. Of a native partition: see `Batch.grids`."""
    boxes_B4: Tensor
    """float32 x0, y0, x1, y1 in units of the sample's crop: (0, 0, 1, 1) is the crop itself.

    Two maps of any grids can be laid onto each other through their boxes. They differ only when
    `data.shift_std` asks for independent whole-patch shifts.
    """


@dataclass(frozen=True)
class Batch:
    """One rank's images of one partition in one (micro-)step."""

    partition: str
    keys: tuple[str, ...]
    """`source/shard/sample` of every image, for error messages."""
    seeds_B: Tensor
    """int64, one per image, a function of (recipe seed, source, epoch, sample) alone: whatever is drawn at
    random for an image (crop, mosaic offset) comes from it, so that the rank that sees it does not matter."""
    views: dict[str, View]
    """'student' and every teacher of the partition, by name. Consumers of the same pixels share one tensor."""
    position: Any = field(default=None, repr=False)
    """The loader's state after this batch; plain values, saved per rank and given back on resume."""
    grids: tuple[tuple[int, int], ...] | None = None
    """Of a native partition: rows and columns of every image's patches, for all consumers alike. The pixels of a view are then
    (patches of all images, 3*P*P): image after image, each H x W x 3 in one piece (`images`). None: images have one size."""

    def to(self, device: device | str) -> Batch:
        """The same batch with its tensors on `device` (pixels stay uint8); shared tensors are moved once."""
        moved: dict[int, Tensor] = {}

        def move(x: Tensor) -> Tensor:
            return moved.setdefault(id(x), x.to(device, non_blocking=True))

        views = {name: View(move(v.images_B3HW), move(v.boxes_B4)) for name, v in self.views.items()}
        return replace(self, seeds_B=move(self.seeds_B), views=views)

    def __len__(self) -> int:
        return len(self.keys)

    def images(self, view: str) -> list[Tensor]:
        """The images (3, H, W) of a native partition, uint8, as one consumer sees them."""
        assert self.grids is not None
        pixels_NP = self.views[view].images_B3HW
        patch = math.isqrt(pixels_NP.shape[1] // 3)
        parts = pixels_NP.split([rows * columns for rows, columns in self.grids])
        sizes = [(rows * patch, columns * patch, 3) for rows, columns in self.grids]
        return [part.view(size).permute(2, 0, 1) for part, size in zip(parts, sizes)]

    def side(self, view: str) -> int:
        """Of the view's images, in pixels."""
        return self.views[view].images_B3HW.shape[-1]


class Target(NamedTuple):
    """What one adaptor has to predict for one batch; no gradient flows into it."""

    summary_BC: Tensor | None
    """The teacher's raw summary (the losses on summaries do not see its scale)."""
    features_BCHW: Tensor
    """Balanced features, on the grid the upsampler left them on."""
    boxes_B4: Tensor
    """Where that map lies in the sample's crop (see `View`)."""
    mask_B1HW: Tensor | None = None
    """bool; False where a position must count neither in the loss nor in the statistics. None: all count."""


Targets = dict[str, Target]


class Losses(NamedTuple):
    """The result of one forward of the task."""

    total: Tensor
    """The scalar to differentiate: this rank's share, so that the sum over ranks is the loss of the step."""
    parts: dict[str, Tensor]
    """Detached scalars to log, named `group/teacher/kind`; sums with their counts, reduced at the log interval."""


@dataclass(frozen=True)
class Result:
    """One number with its provenance; one line of `results.jsonl`."""

    suite: str
    task: str
    metric: str
    value: float
    unit: str
    higher_is_better: bool
    model: str
    """Id of the model: run folder and step, or `teacher:NAME`."""
    dataset: str
    """Name, split and a digest of the content, the same for all copies."""
    count: int
    """Number of items scored."""
    resolution: int
    """Side in pixels of what the network saw of a square image; 0 where a task has no size."""
    version: str = "1"
    """Version of the protocol; numbers of different versions are not comparable."""
    config_hash: str = ""
    seed: int = 0
    preset: str = ""
    """Preset of the suite's card; only numbers of `paper` may be compared with published ones."""
    headline: bool = True
    """A number of the paper's tables; only they count in the MTL gain."""
    model_id: str = ""
    """The model with a digest of its weights."""
    precision: str = ""
    """What forward passes computed in: fp32 or bf16."""
    data_digest: str = ""
    """Of all data sets of the task (also those trained on), the times of their files included, and of the text tower, where there is one:
    others are measured again."""
    left_out: int = 0
    """Images of the task's data sets that could not be read; the number is one without them."""
    grid: int = 0
    """Side in cells of the map of such an image: finer than the network's own where there is an upsampler. 0: not known."""
    details: dict[str, Any] = field(default_factory=dict)
    """What tables need to know of the model: `teacher` (name of the card), `network` (of an upsampler), `steps` (of its training)."""


class Finding(NamedTuple):
    """One line of what `radio-distill doctor` reports."""

    what: str
    text: str
    missing: bool = False
    """True when the recipe cannot run without it; `text` then says what to do."""
    unopened: bool = False
    """True when nobody knows whether it is there: a command that was not run, a URL that was not opened."""
