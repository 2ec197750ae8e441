"""A recipe: one stage of training, as one YAML file, one run folder, one job.

*What is learned* (student, teachers, partitions, balance, loss, optim, ema, data) stands apart from *how it runs*
(engine, log, checkpoint): a resumed run may change only the second group. Numbers carry their source:
PHI = PHI-S paper, FS = FeatSharp paper, V4 = C-RADIOv4 report, OURS = not published, our choice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from ..types import CLIP_MEAN, CLIP_STD
from .cards import Fields, FolderName, Loader
from .numbers import Count, Decay, Factor, Free, Mean, Positive, Rate, Scale, Seed, Share, Side, Std, Weight

__all__ = ["Job", "Recipe"]


class Heads(Fields):
    kind: Literal["mlp", "attention"] = "mlp"
    """`mlp`: Linear, `inner` residual blocks, LayerNorm-GELU-Linear; `attention`: two ViT blocks before it (features only)."""
    hidden: Positive = 1520
    """Hidden width (C-RADIO-H)."""
    inner: Count = 0
    """Residual blocks between the two Linears (RADIOv2.5: none)."""


class ViTDet(Fields):
    windows: tuple[Side, ...] = ()
    """Window sides in tokens; every partition draws one of those that divide its grid. Empty: never windowed."""
    probability: Share = 0.1
    """How often a training batch runs windowed (OURS)."""
    num_global: Positive = 4
    """Number of evenly spaced blocks that see the whole image."""


class Overrides(Fields):
    """Sizes of a trunk that differ from those its name stands for; null: the name's."""

    embed_dim: Positive | None = None
    """Width of a token."""
    depth: Positive | None = None
    """Blocks."""
    num_heads: Positive | None = None
    """Attention heads; they divide the width."""
    mlp_ratio: Scale | None = None
    """Hidden width of the MLP over the width."""
    patch_size: Side | None = None
    """Side of a patch in pixels."""
    img_size: Side | None = None
    """Side in pixels of the images that positions are made for."""
    init_values: Scale | None = None
    """Initial LayerScale."""
    swiglu: bool | None = None
    """A gated MLP."""
    mlp_norm: bool | None = None
    """LayerNorm inside the MLP."""


class Student(Fields):
    model: str = "vit_large_patch16_224"
    """Name of the trunk; `radio-distill list students` shows all (S, B, L, H, g, SO400M, ...)."""
    overrides: Overrides = Overrides()
    """Sizes that differ from the name's."""
    max_size: Side = 2048
    """Side in pixels of the largest image the position table is made for (CPE)."""
    pos_dropout: Share = 0.1
    """Probability that a training sample gets no position embedding at all."""
    cls_token_per_teacher: bool = True
    """One class token per teacher; false: one for all."""
    register_multiple: Count = 8
    """Registers are added until class tokens + registers are a multiple of this; 0: none unless `num_registers`."""
    num_registers: Count | None = None
    """Number of registers, when given; replaces `register_multiple`."""
    mean: tuple[Mean, Mean, Mean] = CLIP_MEAN
    """Pixel mean of the input conditioner inside the model."""
    std: tuple[Std, Std, Std] = CLIP_STD
    """Pixel standard deviation of the input conditioner."""
    layer_scale: Scale | None = None
    """Initial LayerScale value; null: none (what every consumer of the export can read)."""
    final_norm: bool = False
    """LayerNorm after the last block (RADIO: no)."""
    spectral: bool = True
    """Spectral reparametrisation of every Linear of trunk and heads (PHI A.7); folded away at export."""
    damp: Weight = 0.0
    """Standard deviation of multiplicative Gaussian noise on Linear weights in training (V4: DAMP); 0: off."""
    vitdet: ViTDet = ViTDet()
    """Windowed attention in training."""
    heads: Heads = Heads()
    """The adaptors' MLPs."""
    attention: Literal["sdpa", "flash"] = "sdpa"
    """`flash` uses the flash_attn package, which must be installed."""
    grad_checkpointing: bool = False
    """Recompute blocks in the backward pass: less memory, a third more work."""


class Start(Fields):
    kind: Literal["scratch", "timm", "radio", "run"] = "scratch"
    """Where the weights come from: nowhere, a timm checkpoint, a RADIO checkpoint (reference or transformers layout), a run."""
    source: str = ""
    """timm name or file (local, or beside the shipped recipes); RADIO file, folder or hub id; run folder."""
    ema: bool = True
    """Start from the EMA weights where the source has them."""


class FurtherStudent(Student):
    start: Start = Start()
    """Where its weights come from."""


class Bilinear(Fields):
    kind: Literal["bilinear"] = "bilinear"

    @property
    def factor(self) -> int:
        """The teacher's own grid."""
        return 1


class Tile(Fields):
    kind: Literal["tile"]
    factor: Positive
    """The image is cut in factor x factor tiles, each encoded at the teacher's own size, and stitched."""


class S2(Fields):
    kind: Literal["s2"]
    factor: Positive
    beta: Share = 0.5
    """Share of the bilinear map; the rest is the stitched tiles (FS section 4)."""


class Trained(Fields):
    kind: Literal["featsharp", "featup", "jafar", "sapa", "resfu", "naf", "any"]
    """What `radio-distill upsampler` has trained for this teacher; `any`: for every teacher."""
    factor: Factor
    """How much finer the map becomes."""
    weights: str
    """Run folder of the upsampler, one of its checkpoints, or a folder with upsampler.safetensors."""
    debias: bool | None = None
    """Whether its weights hold a de-bias map; null: as upsamplers of its kind do by default (featsharp: yes, others: no)."""

    @property
    def debiases(self) -> bool:
        """Whether its targets hold the de-bias map of its weights."""
        return self.kind == "featsharp" if self.debias is None else self.debias


class Debias(Fields):
    kind: Literal["debias"]
    """The teacher's own map plus the de-bias map of a trained upsampler: what FeatSharp's low-resolution targets are."""
    weights: str
    """As for a trained upsampler."""

    @property
    def factor(self) -> int:
        """The teacher's own grid."""
        return 1


Upsampler = Annotated[Bilinear | Tile | S2 | Trained | Debias, Field(discriminator="kind")]


class Sized(Fields):
    """What has a side in pixels, or several, of which each step draws one."""

    size: Side | None = None
    sizes: dict[Side, Scale] = {}
    """Of `size: {128: 1, 256: 2}`: the sides, each with its weight; `size` is then the largest. Empty: there is only one."""

    @model_validator(mode="before")
    @classmethod
    def _of_several(cls, values: Any) -> Any:
        """Take `size: {SIDE: WEIGHT}` apart."""
        several = values.get("size") if isinstance(values, Mapping) else None
        if isinstance(several, Mapping) and several and all(str(side).isdecimal() for side in several):  # text: keys of a file
            return {**values, "size": max(map(int, several)), "sizes": several}
        return values

    @model_validator(mode="after")
    def _is_the_largest(self) -> Self:
        if self.sizes and self.size != max(self.sizes):
            raise PydanticCustomError(
                "sizes", "`sizes` whose largest is `size`; write the map of sides as `size`, and no `sizes`"
            )
        return self


class TeacherView(Sized):
    size: Side | None = None
    """Side in pixels the teacher runs at in this partition; null: the card's. `{224: 1, 448: 1}`: drawn for each step. `student`: the one
    that gives it the student's grid, also where each step draws that; then no target is resized."""
    as_student: bool = False
    """What `size: student` means."""
    mosaic: bool = False
    """Place k x k images of the batch in one teacher image (teachers that only take one large size: SAM)."""
    grid: Literal["student", "teacher", "larger"] = "student"
    """On which grid the loss is taken. `student`: the target is resized to the student's grid (FS). `teacher`: the student's
    map is resized to the teacher's grid before the head (RADIOv2.5, AM-RADIO). `larger`: the coarser of target and prediction is
    enlarged, bicubic, after the head (EUPE, arXiv:2603.22387)."""
    upsampler: Upsampler = Bilinear()
    """How a target is made finer than the teacher's own map."""

    @model_validator(mode="before")
    @classmethod
    def _size_of_the_student(cls, values: Any) -> Any:
        """Take `size: student` apart."""
        named = isinstance(values, Mapping) and values.get("size") == "student"
        return {**values, "size": None, "as_student": True} if named else values

    @model_validator(mode="after")
    def _has_one_size(self) -> Self:
        if self.as_student and self.size is not None:
            raise PydanticCustomError("sizes", "`size: student`, or a size and as_student: false")
        return self


class BuiltInBalance(Fields):
    kind: Literal["phi_s", "global_standardize", "standardize", "pca", "zca", "hca", "none"] = "phi_s"


class CustomBalance(Fields):
    kind: Literal["custom"]
    loader: Loader
    """`package.module:function` of yours, called as function(mean_C, covariance_CC, **options) (docs/training.md)."""
    options: Free = {}
    """What the function gets besides."""


BalanceKind = Annotated[BuiltInBalance | CustomBalance, Field(discriminator="kind")]


class Teacher(Fields):
    card: str | None = None
    """Name of the card or path of a YAML file; null: the key of this entry."""
    summary_weight: Weight = 1.0
    """Weight of the summary loss; 0 for a teacher without a summary."""
    feature_weight: Weight = 1.0
    """Weight of the feature loss."""
    summary: Literal["adaptor", "through_head"] = "adaptor"
    """How the student predicts its summary. `adaptor`: by a head on a class token. `through_head`: the map that it predicts goes through the
    teacher's own frozen pooling head (SigLino), which the card's `output.pool` states."""
    compile: bool = False
    """Compile the teacher's blocks (torch.compile, fixed shapes: one graph for each size of its images)."""
    chunk: Positive | None = None
    """At most this many teacher images in one forward; null: all."""
    balance: BalanceKind | None = None
    """How this one is equalised; null: by `balance.method`, as all others."""


class Partition(Sized):
    size: Side
    """Side in pixels of the student's image. `{128: 1, 256: 2}`: drawn for each step, with these weights (docs/training.md)."""
    images: Positive | None
    """Images of this partition in one optimizer step, over all ranks."""
    aspect: Literal["square", "native"] = "square"
    """`square`: images of `size` x `size` pixels, `images` of them in a step. `native`: each image keeps its aspect ratio and has
    a size of its own; `area`, `tokens` and `packs` take the place of `size` and `images` (docs/training.md)."""
    area: tuple[Positive, Positive] | None = None
    """Of a native partition: the least and the largest area of the student's image in pixels (`[16384, 65536]`: 128 x 128 to
    256 x 256); each image draws its own in between."""
    tokens: Positive | None = None
    """Of a native partition: how many of the student's patches a pack holds at most. Packs are filled with one image after the other."""
    packs: Positive | None = None
    """Of a native partition: its packs in one optimizer step, over all ranks."""
    max_aspect: Annotated[Scale, Field(ge=1)] = 4.0
    """Of a native partition: longer images are cut to this ratio of the long side to the short one (OURS)."""
    weight: Weight = 1.0
    """Weight of this partition's mean loss in the total. 1 for all: equal partitions (OURS)."""
    micro_batch: Positive | None = None
    """Images (packs of a native partition) per rank and forward; null: all at once. Smaller values accumulate gradients."""
    teachers: dict[str, TeacherView]
    """The teachers that this partition matches, by their name in `teachers`."""

    @model_validator(mode="before")
    @classmethod
    def _fill_native(cls, values: Any) -> Any:
        """Of a native partition `size` is the side of the square of its largest area."""
        if not isinstance(values, Mapping) or values.get("aspect") != "native":
            return values
        try:
            side = math.isqrt(int(values["area"][1]))
        except (KeyError, IndexError, TypeError, ValueError, OverflowError):
            side = 1  # what is wrong with `area` is told below, or by its type
        return {**values, "size": side if values.get("size") is None else values["size"], "images": values.get("images")}

    @model_validator(mode="after")
    def _is_square_or_native(self) -> Self:
        own = {"area": self.area, "tokens": self.tokens, "packs": self.packs}
        missing = [name for name, value in own.items() if value is None]
        if self.aspect == "square":
            if self.images is None:
                raise PydanticCustomError("images", "`images`, a whole number")
            if len(missing) < len(own) or self.max_aspect != 4:
                raise PydanticCustomError("native", "`aspect: native` beside area, tokens, packs and max_aspect")
        elif missing:
            raise PydanticCustomError("native", "`{missing}`, as `aspect` is native", {"missing": "`, `".join(missing)})
        elif self.area is not None and (self.images is not None or self.sizes or self.size != math.isqrt(self.area[1])):
            raise PydanticCustomError("native", "no `size` and no `images`, as `aspect` is native: set both to null")
        return self

    @property
    def is_native(self) -> bool:
        """Whether images keep their aspect ratio and come in packs."""
        return self.aspect == "native"

    @property
    def units(self) -> int:
        """What a step has of it, over all ranks, and what ranks, streams and forwards share: images, or packs of a native one."""
        count = self.packs if self.is_native else self.images
        assert count is not None  # as _is_square_or_native says
        return count

    @property
    def unit(self) -> str:
        """The field that `units` come from."""
        return "packs" if self.is_native else "images"


class Balance(Fields):
    method: BalanceKind = BuiltInBalance()
    """How teachers are equalised (PHI-S, section 3)."""
    window: Count = 3000
    """Steps at the start of the stage during which the statistics are gathered (PHI Table 10); 0: they are loaded."""
    every: Positive = 100
    """The balancers are recomputed from the sums every this many steps of the window."""
    per_image: Positive = 256
    """Of an image of a native partition at most this many positions are counted, so that large images do not dominate (OURS)."""
    ahead: bool = False
    """Gather the statistics of all `window` steps before the first step, with the teachers alone, instead of during them.
    Adaptors of an earlier stage then keep what they know: every refit hands them another basis (OURS)."""
    path: str | None = None
    """Folder written by `radio-distill stats` (or a run's `balancers/`); starts from it instead of from nothing."""


class StageBalance(Balance):
    summary: Literal["none", "standardize"] = "none"
    """What students learn of summaries. `none`: the teacher's own. `standardize`: every coordinate by its mean and deviation over images, from the
    same window as the map's statistics (EUPE, arXiv:2603.22387). Both end with the teacher's own in an export."""


class FeatureLoss(Fields):
    mse: Weight = 1.0
    """Weight of the mean squared error on balanced features (since PHI-S)."""
    cosine: Weight = 0.0
    """Weight of 1 - cosine, per token (AM-RADIO: 0.9)."""
    smooth_l1: Weight = 0.0
    """Weight of smooth-L1 (AM-RADIO: 0.1)."""
    beta: Scale = 1.0
    """Where smooth-L1 turns from quadratic to linear."""


class Mesa(Fields):
    weight: Weight = 0.0
    """Weight of the shift-equivariant MESA term against the EMA student (V4 eq. 2); 0: off."""
    start: Count = 5000
    """First step at which it counts (OURS: the end of the frozen-trunk phase)."""


class Relation(Fields):
    weight: Weight = 0.0
    """Weight of the relation term for every teacher with a summary; 0: off. It asks that images lie as far from each other as the
    teacher's summaries of them do (RKD, arXiv:1904.05068), not where. SigLino weighs it 1."""
    teachers: dict[str, Weight] = {}
    """Another weight for some teachers, by their name in `teachers`; 0: not for that one."""
    gate: Literal["near_far", "all"] = "near_far"
    """`near_far`: pairs nearer than the teacher's median are only pulled together, the others only pushed apart (SigLino's ARKD,
    arXiv:2512.20157). `all`: each pair both ways (RKD)."""
    beta: Scale = 1.0
    """Where smooth-L1 turns from quadratic to linear, in mean distances (RKD: 1)."""


class LossTerm(Fields):
    loader: Loader
    """`package.module:function` of yours, called as function(pair, **options) (docs/training.md)."""
    head: Literal["features", "summary"] = "features"
    """What is compared with the teacher: the map that the student predicts for it, or the summary."""
    per: Literal["image", "position"] = "image"
    """What the function gives for an image. `image`: its loss. `position`: the sum over the valid positions of its map."""
    weight: Weight = 1.0
    """Weight of the term, for every teacher."""
    teachers: dict[str, Weight] = {}
    """Another weight for some teachers, by their name in `teachers`; 0: not for that one."""
    options: Free = {}
    """What the function gets besides."""


class Loss(Fields):
    features: FeatureLoss = FeatureLoss()
    """The loss on feature maps."""
    summary: Literal["cosine", "angle"] = "cosine"
    """`cosine`: 1 - cosine. `angle`: squared angle over the teacher's angular dispersion (V4 eq. 3-7)."""
    adaloss: Annotated[Decay, Field(gt=0)] | None = None
    """Divide every term by its running mean with this decay (AM-RADIO's AdaLoss); null: off."""
    drop_teachers: Share = 0.0
    """Per image keep the teacher with the highest loss and drop each other one with this probability (UNIC)."""
    mesa: Mesa = Mesa()
    """Self-consistency with the EMA student."""
    relation: Relation = Relation()
    """Distances between the images' summaries."""
    terms: dict[str, LossTerm] = {}
    """Terms of your own, by the name that logs give them."""


class Optim(Fields):
    kind: Literal["lamb", "adamw", "nadam", "custom"] = "lamb"
    """LAMB (PHI Table 10), exact under ZeRO-1/2 sharding; AdamW as the option without surprises; NAdam for upsamplers (FS);
    `custom`: what `loader` makes."""
    loader: Loader | None = None
    """`package.module:function` of yours, called as function(groups, lr=..., **options) (docs/training.md). Needs `kind: custom`
    and `engine.zero: 0`."""
    options: Free = {}
    """What the function gets besides; `betas`, `eps` and the like are the other kinds'."""
    steps: Positive = 300_000
    """Optimizer steps of this stage."""
    lr: Rate = 1e-3
    """Peak learning rate."""
    min_lr: Weight = 0.0
    """Learning rate at the last step of the cosine (OURS)."""
    warmup: Count = 1000
    """Steps of linear warm-up (OURS)."""
    weight_decay: Weight = 0.02
    """Decoupled weight decay; not on biases, norms, position table and tokens."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay rates of the moments (OURS)."""
    eps: Scale = 1e-6
    """Added to the root of the second moment (OURS)."""
    freeze_trunk: Count = 5000
    """Steps at the start during which only the heads learn (PHI Table 10)."""
    clip: Scale | None = None
    """Largest global gradient norm; null: no clipping (RADIO's configs)."""


class Source(Fields):
    path: str | list[str]
    """A folder of images, a folder of shards, a shard, a brace pattern (`a-{000..099}.tar`), or any URL webdataset opens."""
    weight: Scale = 1.0
    """Share of the samples drawn from this source."""
    keep: str | None = None
    """Folder of keep-lists that `radio-distill curate` wrote: which images of it are seen, and in what share of the epochs.
    null: all, in every epoch."""


class Crop(Fields):
    scale: tuple[Share, Share] = (0.5, 1.0)
    """Range of the crop's share of the image's area (OURS)."""
    ratio: tuple[Scale, Scale] = (0.75, 1.3333)
    """Range of the crop's aspect ratio, drawn log-uniformly."""
    flip: Share = 0.5
    """Probability of a horizontal flip."""


class Data(Fields):
    sources: dict[str, Source] = {}
    """Where images come from, by name. Must be given (`data.sources.train.path=...`)."""
    homogeneous: dict[str, Share] = {}
    """Share of the batches of each partition that consist of one source alone, by source (DINOv3: 0.1 ImageNet-1k). The other
    batches mix all sources by their weights."""
    streams: Positive | None = None
    """Independent readers over all ranks; divides every partition's `images`, and ranks x workers divide it. The order of
    samples depends on it and not on the number of ranks or workers. null: chosen from batch and shards, and recorded."""
    shuffle: Positive = 512
    """Samples of a shard that are permuted together."""
    crop: Crop = Crop()
    """Random-resized crop, shared by the student and all teachers."""
    views: Positive | None = None
    """Different views (crop and flip) of an image: epoch e shows view e modulo this number. null: as many as epochs, or as many
    as the cache that is read holds."""
    view_seed: Seed | None = None
    """Seed of the views alone; null: the recipe's `seed`, or that of the cache that is read."""
    shift_std: Weight = 0.0
    """Standard deviation, in patches, of independent whole-patch shifts of the student's and each teacher's crop (V4: 0.5)."""
    min_side: Side = 8
    """Images with a shorter side than this many pixels are skipped."""
    max_pixels: Positive = 100_000_000
    """Larger images are skipped (decompression bombs)."""
    max_bad: Share = 0.05
    """The run stops when more than this share of the recent samples could not be used."""


class Cache(Fields):
    read: str | None = None
    """Folder (or URL, or `pipe:` command with {} for the file) of a cache that `radio-distill cache` wrote: the teachers'
    targets come from it, and the images are seen in its views. null: the teachers run."""
    miss: Literal["error", "online"] = "error"
    """What happens to an image that the cache does not hold. `error`: the run stops, at its start where that is known.
    `online`: the teachers run on it."""
    write: str = ""
    """Folder that `radio-distill cache` writes; empty: `cache` in the run folder."""
    store: Literal["int8", "exact"] = "int8"
    """How `radio-distill cache` keeps feature maps. `int8`: balanced, one byte a value and one scale for each channel of a view.
    `exact`: as the teachers give them, 2 bytes a value in bf16 and 4 in fp32."""


class Ema(Fields):
    decay: Decay = 0.9996
    """Decay per step of the fp32 average of the weights (V4, issue #181); 0: no EMA."""

    def note(self, steps: int) -> str | None:
        """What has to be said of a stage of so few steps that its average is mostly what it began with; None where it is not."""
        kept = self.decay**steps
        if kept <= 0.5:
            return None
        return (
            f"the average that is evaluated and exported keeps {kept:.0%} of the weights it begins with: ema.decay {self.decay} "
            f"over {steps} steps; set ema.decay=0, or a smaller one"
        )


class Colocated(Fields):
    kind: Literal["colocated"] = "colocated"


class Dedicated(Fields):
    kind: Literal["dedicated"]
    student_ranks: Positive = 1
    """Ranks of a block that train students. The job consists of equal blocks of consecutive ranks, students first."""
    teacher_ranks: Positive = 1
    """Ranks of a block that run the teachers for its students; several of them share the teachers by cost."""


Placement = Annotated[Colocated | Dedicated, Field(discriminator="kind")]


class Engine(Fields):
    zero: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage (OURS: 1; a ViT-L needs no more)."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """`bf16`: autocast with fp32 parameters, gradients reduced in fp32. `fp32`: exact, for the CPU and for tests."""
    teacher_precision: Literal["fp32", "bf16", "fp8"] = "bf16"
    """Weights and activations of the teachers. `fp8`: bf16, with 8-bit products in their blocks, once it has been measured on the
    images of the stage that no teacher's outputs change by more than 1 % of their variance (docs/training.md)."""
    compile: bool = False
    """Compile the student's blocks (torch.compile): one graph for each size of its images and each attention window."""
    placement: Placement = Colocated()
    """Where teachers run. `colocated`: on every rank. `dedicated`: on ranks of their own, for teachers that do not fit beside
    the student (docs/scale.md); the numbers are the same."""
    workers: Count = 4
    """Loader processes per rank and partition; 0: load in the training process."""
    deepspeed: Free = {}
    """Known DeepSpeed keys, merged into the generated config after checking."""
    watchdog_minutes: Scale = 30.0
    """A rank that is at one step, or at the start before the first, for this long dumps its stacks and stops the job."""

    @property
    def teacher_bytes(self) -> int:
        """Of a value of a teacher; in fp8 the activations are those of bf16, and weights are counted as such."""
        return 4 if self.teacher_precision == "fp32" else 2


class Log(Fields):
    every: Positive = 20
    """Steps between two log lines."""
    pictures: Count = 5000
    """Steps between PCA pictures of teacher and student maps; 0: none."""
    tensorboard: bool = False
    """Write TensorBoard events into the run folder."""
    wandb: str | None = None
    """Weights & Biases project; offline unless WANDB_MODE says otherwise. null: off."""


class Checkpoint(Fields):
    every: Positive = 5000
    """Steps between two checkpoints."""
    minutes: Scale = 60.0
    """Minutes after which one is written anyway."""
    keep_last: Positive = 2
    """Older ones are deleted."""
    background: bool = True
    """Write them while training goes on, from copies in the host's memory (docs/training.md). false: training waits for the disk."""


class Job(Fields):
    """What every training has: a name, a run folder, an optimizer, and how it runs."""

    name: FolderName
    """Name of the recipe; the run folder is `runs/NAME` unless `run` says otherwise."""
    title: str = ""
    """One line: what it reproduces."""
    run: str = ""
    """Run folder; empty: `runs/NAME`."""
    seed: Seed = 0
    """Seed of everything that is drawn at random."""
    optim: Optim = Optim()
    """Optimizer and schedule."""
    engine: Engine = Engine()
    """How it runs; may change on resume."""
    log: Log = Log()
    """What is written down; may change on resume."""
    checkpoint: Checkpoint = Checkpoint()
    """When it is saved; may change on resume."""


class ImageJob(Job):
    """What trainings on images alone have as well, of a student or of an upsampler: statistics, an average, images."""

    balance: Balance = Balance()
    """How teachers are equalised."""
    ema: Ema = Ema()
    """Running average of the weights."""
    data: Data = Data()
    """Images."""


class Recipe(ImageJob):
    """One stage."""

    student: Student = Student()
    """The model that is trained."""
    start: Start = Start()
    """Where its weights come from."""
    students: dict[str, FurtherStudent] = {}
    """Further students, by name, that learn from the same teacher pass; each has a run folder of its own, RUN/students/NAME."""
    teachers: dict[str, Teacher]
    """The frozen teachers, by a name of your choice."""
    partitions: dict[str, Partition]
    """Resolution groups; every optimizer step contains all of them."""
    balance: StageBalance = StageBalance()
    """How teachers are equalised."""
    loss: Loss = Loss()
    """What is minimised."""

    def method_of(self, teacher: str) -> BalanceKind:
        """How a teacher is equalised, by its name in the recipe."""
        return self.teachers[teacher].balance or self.balance.method

    cache: Cache = Cache()
    """Targets that were computed before (docs/data.md)."""

    def each(self) -> list[Recipe]:
        """This recipe, and for each of `students` the one that would train it alone."""
        return [self, *(self._alone(name) for name in self.students)]

    def _alone(self, name: str) -> Recipe:
        further = self.students[name]
        return self.model_copy(
            update={
                "name": f"{self.name}_{name}",
                "run": f"{self.run or f'runs/{self.name}'}/students/{name}",
                "student": Student(**{key: getattr(further, key) for key in Student.model_fields}),
                "start": further.start,
                "students": {},
                # further students are saved first: one more must be kept for when a job dies before the recipe's own student is saved
                "checkpoint": self.checkpoint.model_copy(update={"keep_last": self.checkpoint.keep_last + 1}),
            }
        )
