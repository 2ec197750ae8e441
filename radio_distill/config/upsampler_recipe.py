"""The recipe of an upsampler: one teacher or several, one network, one run folder (`radio-distill upsampler RECIPE`).

Sources of numbers: FS = FeatSharp paper, CODE = its public configuration, OURS = our choice (docs/upsamplers.md has the
measurements it rests on).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from pydantic import model_validator

from ..errors import CardError
from .cards import Fields, TeacherCard, name_problems
from .checks import data_problems, ranges
from .document import KeyPath, Problem
from .engine_checks import engine_problems
from .jitter import Jitter
from .numbers import Count, Decay, Positive, Rate, Scale, Side, Weight
from .recipe import Balance, Ema, ImageJob, Optim, Partition, Recipe
from .upsampler import ANY, FUSION_ONLY, Network, check_network, sees_tiles

__all__ = ["AnyRecipe", "Downsampler", "ONE", "Preset", "UpsamplerRecipe", "VIEWS", "check_upsampler"]

VIEWS = "views"
"""Name of the one partition of an upsampler's training."""

ONE = "teacher"
"""What the teacher of an upsampler for one teacher is called: of its statistics, its fingerprint, its view."""

Preset = Literal["ours", "paper", "code"]


class Downsampler(Fields):
    kind: Literal["attention", "simple"] = "attention"
    """`attention`: FS eq. 2, weights that depend on the content. `simple`: one learned kernel."""
    kernel: Positive = 7
    """Side of its window in fine cells, odd (FS: 7, CODE: 9)."""


class Objective(Fields):
    """What an upsampler is trained for: agreement of views, and the terms beside it."""

    uncertainty: bool = True
    """Learn a log-variance per output position: places whose features cannot be foretold count less (FS configuration: on)."""
    seam: Scale = 2.0
    """Weight of the output rows and columns on both sides of a tile border against all others (FS configuration: 2); 1 where
    there are no tiles."""
    distance: Literal["mse", "smooth_l1"] = "mse"
    """How the features of a view are compared, also by CRF. `mse`: squared error. `smooth_l1` (beta 1): what is off by more
    than 1, one standard deviation of a channel, counts linearly (an option of the FS code)."""
    true_map: Weight = 0.0
    """Weight of the distance between the fine map and the teacher's own map of the whole image at `factor` times its size (OURS).
    Only for teachers that take such images (`input.resizable`), which need no upsampler but cost more with every token. 0.15, with
    the input `detail`, costs nothing of what views say (docs/upsamplers.md)."""
    tv: Weight = 0.0
    """Weight of the total variation."""
    crf: Weight = 0.0
    """Weight of the conditional-random-field term (FeatUp: 0.001)."""
    mmd: Weight = 0.0
    """Weight of the maximum mean discrepancy between low- and high-resolution features."""
    mmd_pick: Literal["all", "nearest"] = "all"
    """Which high-resolution vectors take part: all, or of every low-resolution cell the nearest one."""
    reference: bool = False
    """Take the published step number for number: its grid convention, its masks and denominators, CRF in a view's frame, and
    of every cell the farthest vector for MMD."""


class Rates(Fields):
    jbu: Weight = 1.0
    """Learning rate of joint bilateral parameters over `optim.lr` (CODE: 0.2)."""
    uncertainty: Weight = 0.02
    """Learning rate of the uncertainty network over `optim.lr` (CODE)."""


class UpsamplerBalance(Balance):
    window: Count = 100
    """Steps whose images the statistics are made of (FS: 96,000 images); 0: they are loaded."""
    ahead: bool = True
    """They are gathered before the first step: the network works in one space from its beginning to its end."""


class UpsamplerOptim(Optim):
    kind: Literal["lamb", "adamw", "nadam", "custom"] = "nadam"
    """NAdam (FS)."""
    steps: Positive = 3000
    """3,000, or 9,000 in the long schedule (FS)."""
    lr: Rate = 1e-4
    """Peak learning rate (FS; CODE: 5e-4)."""
    warmup: Count = 100
    """Steps of linear warm-up (CODE)."""
    weight_decay: Weight = 0.0
    """None (FS)."""
    eps: Scale = 1e-8
    """Added to the root of the second moment (NAdam's own default)."""
    freeze_trunk: Literal[0] = 0
    """There is no trunk."""
    clip: Scale | None = 5.0
    """Largest global gradient norm (CODE)."""


class UpsamplerEma(Ema):
    decay: Decay = 0.0
    """Decay per step of the fp32 average of the weights; 0: no EMA (FS)."""


class UpsampledTeacher(Fields):
    """One of several teachers that a network is trained with."""

    card: str | None = None
    """Name or path of its card; null: its name here."""
    size: Side
    """Side in pixels of its input; its images are `network.factor` times as large."""


class UpsamplerRecipe(ImageJob):
    """Multi-view training of one upsampler (FS section 3)."""

    teacher: str | None = None
    """Name or path of the teacher's card."""
    size: Side | None = None
    """Side in pixels of the teacher's input; images are `network.factor` times as large."""
    teachers: dict[str, UpsampledTeacher] = {}
    """In place of `teacher` and `size`, for a network of kind `any`: the teachers that it is trained with, one a step, in turn."""
    preset: Preset = "ours"
    """Values that stand in where the recipe says nothing (config/presets.py, docs/upsamplers.md). `paper`: FeatSharp as its
    paper describes it. `code`: its public configuration and code, number for number. `ours`: the defaults."""
    network: Network = Network()
    """What is trained."""
    images: Positive = 32
    """Images in one optimizer step, over all ranks (FS: 8 GPUs x 4)."""
    micro_batch: Positive | None = None
    """Images per rank and forward; null: all at once."""
    chunk: Positive | None = None
    """At most this many teacher images in one forward; null: all."""
    jitter: Jitter = Jitter()
    """How many views an image has, and how they differ."""
    downsampler: Downsampler = Downsampler()
    """How the fine map is reduced to a view's grid."""
    loss: Objective = Objective()
    """What is minimised."""
    rates: Rates = Rates()
    """Learning rates that differ."""
    spectral: bool = False
    """Spectral reparametrisation of every Linear (CODE: yes); folded away in what is saved."""
    balance: UpsamplerBalance = UpsamplerBalance()
    """PHI-S of the teacher's features: the space the network works in."""
    optim: UpsamplerOptim = UpsamplerOptim()
    """Optimizer and schedule."""
    ema: UpsamplerEma = UpsamplerEma()
    """Running average of the weights."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        return filled(values) if isinstance(values, dict) else values

    @property
    def each(self) -> dict[str, UpsampledTeacher]:
        """Card and size of every teacher by its name here; one that `teacher` names is called so."""
        if self.teachers:
            return {name: one.model_copy(update={"card": one.card or name}) for name, one in self.teachers.items()}
        return {ONE: UpsampledTeacher.model_construct(card=self.teacher, size=self.size)}

    @property
    def image_size(self) -> int:
        """Side in pixels of the images, of the largest teacher: what the network makes of one teacher image is `factor` times as fine."""
        return max(one.size for one in self.each.values()) * self.network.factor

    @property
    def partitions(self) -> dict[str, Partition]:
        """What the loader has to deliver: square images of factor * size pixels."""
        return {VIEWS: Partition(size=self.image_size, images=self.images, micro_batch=self.micro_batch, teachers={})}


AnyRecipe = Recipe | UpsamplerRecipe
"""What the loader reads images for."""


def check_upsampler(recipe: UpsamplerRecipe, load_card: Callable[[str], TeacherCard], *, training: bool) -> list[Problem]:
    """Everything in the recipe that does not fit together; empty when it can be run."""
    if missing := list(_which_teachers(recipe)):
        return missing  # nothing else can be said before
    problems = [*check_network(recipe.network, ("network",)), *engine_problems(recipe), *_fitting(recipe, load_card)]
    return [*problems, *ranges(recipe), *data_problems(recipe.data, recipe.partitions, training=training)]


def _fitting(recipe: UpsamplerRecipe, load_card: Callable[[str], TeacherCard]) -> Iterator[Problem]:
    yield from _for_any(recipe)
    yield from name_problems("teacher", recipe.teachers, ("teachers",))
    for name, one in recipe.each.items():
        yield from _teacher(recipe, name, one, load_card)
    if recipe.loss.seam != 1 and not sees_tiles(recipe.network.kind, recipe.network.inputs):
        text = f"'loss.seam' is {recipe.loss.seam}, but without tiles there are no seams; remove 'loss.seam'"
        yield Problem(text, ("loss", "seam"))
    if (kernel := recipe.downsampler.kernel) % 2 == 0:
        text = f"'downsampler.kernel' is {kernel}, expected an odd number; use {kernel - 1} or {kernel + 1}"
        yield Problem(text, ("downsampler", "kernel"))
    if recipe.engine.placement.kind == "dedicated":
        text = "'engine.placement.kind' is 'dedicated', which only stages have: an upsampler's teacher runs on every rank; remove it"
        yield Problem(text, ("engine", "placement", "kind"))
    if recipe.micro_batch is not None and recipe.micro_batch > recipe.images:
        text = f"'micro_batch' is {recipe.micro_batch}, expected 1 to {recipe.images} (images), or null"
        yield Problem(text, ("micro_batch",))
    if not recipe.balance.ahead:
        text = "'balance.ahead' is false: the network needs its statistics before the first step"
        yield Problem(text, ("balance", "ahead"))
    if recipe.balance.window == 0 and recipe.balance.path is None:
        text = "'balance.window' is 0 and there is no 'balance.path': no statistics; give one"
        yield Problem(text, ("balance", "window"))


def _which_teachers(recipe: UpsamplerRecipe) -> Iterator[Problem]:
    """One teacher with its size, or several."""
    for key in ("teacher", "size"):
        given = getattr(recipe, key) is not None
        if given and recipe.teachers:
            text = f"'{key}' and 'teachers' are both given; remove '{key}', or set teachers=null for a network of one teacher"
            yield Problem(text, (key,))
        elif not given and not recipe.teachers:
            yield Problem(f"'{key}' is missing; give teacher and size, or teachers.NAME.size of several", (key,))


def _for_any(recipe: UpsamplerRecipe) -> Iterator[Problem]:
    """Only a network that depends on no teacher serves several; what is trained beside it must not depend on one either."""
    kind = recipe.network.kind
    if kind != ANY:
        if recipe.teachers:
            text = f"'teachers' are {len(recipe.teachers)}, but the weights of kind {kind!r} are for one; set network.kind={ANY}, or teacher"
            yield Problem(text, ("teachers",))
        return
    if recipe.downsampler.kind != "simple":
        text = f"'downsampler.kind' is {recipe.downsampler.kind!r}, whose weights depend on the teacher; with network.kind {ANY!r}: simple"
        yield Problem(text, ("downsampler", "kind"))
    if recipe.loss.uncertainty:
        text = f"'loss.uncertainty' trains weights that depend on the teacher; with network.kind {ANY!r} remove it"
        yield Problem(text, ("loss", "uncertainty"))


def _teacher(
    recipe: UpsamplerRecipe, name: str, one: UpsampledTeacher, load_card: Callable[[str], TeacherCard]
) -> Iterator[Problem]:
    at: KeyPath = ("teachers", name) if recipe.teachers else ()
    try:
        card = load_card(str(one.card))
    except CardError as error:
        yield Problem(f"teacher {one.card!r}: {error}".replace("\n", "\n    "), at or ("teacher",))
        return
    size, patch, key = one.size, card.input.patch, f"teachers.{name}.size" if recipe.teachers else "size"
    if size != card.input.size and not card.input.resizable:
        yield Problem(f"'{key}' is {size}: the card of {card.name!r} allows {card.input.size} px only", (*at, "size"))
    elif size < patch or size % patch:
        fitting = max(1, round(size / patch)) * patch
        yield Problem(
            f"'{key}' is {size}, no multiple of the patch {patch} of {card.name!r}; nearest is {fitting}", (*at, "size")
        )
    if recipe.loss.true_map and not card.input.resizable:
        text = f"'loss.true_map' is {recipe.loss.true_map}, but {card.name!r} takes {card.input.size} px only; remove it"
        yield Problem(text, ("loss", "true_map"))


PRESETS: dict[str, dict[str, Any]] = {
    "ours": {},  # the defaults of the fields
    "paper": {
        "network": {"inputs": ["jbu", "tiles"], "window": 5},  # FS section 3; Figure 13: the window hardly matters
        "loss": {"uncertainty": False, "seam": 1.0},  # plain squared error: CODE's two weights are not in the text
        "optim": {"steps": 9000},  # the long schedule, that of the figures at 4x
    },
    "code": {
        "network": {"inputs": ["jafar", "tiles"], "window": 7, "norm": False, "reference": True},
        "loss": {"uncertainty": True, "seam": 2.0, "reference": True},
        "downsampler": {"kernel": 9},
        "jitter": {"flip": 0.0, "outside": "black"},
        "spectral": True,
        "rates": {"jbu": 0.2, "uncertainty": 0.02},  # of 5e-4: 1e-4 and 1e-5
        "optim": {"lr": 5.0e-4},
        "data": {"crop": {"flip": 0.0}},
        "engine": {"precision": "fp32"},
    },
}

NO_CHANNELS: dict[str, Any] = {"downsampler": {"kind": "simple"}, "loss": {"uncertainty": False}}
"""What kind `any` implies: nothing that is trained depends on how many channels a teacher has."""


def filled(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a recipe with those of its preset (three named forms of FeatSharp) and its kind where they say nothing.

    Order of precedence: the file or command line, what the kind implies, the preset, the defaults of the fields.
    """
    preset = values.get("preset", "ours")
    below = PRESETS.get(preset, {}) if isinstance(preset, str) else {}
    asked = values.get("network", {})
    if isinstance(asked, Mapping):
        network = {**below.get("network", {}), **asked}
        kind = network.get("kind", "featsharp")
        if kind != "featsharp":
            kept = {key: x for key, x in below.get("network", {}).items() if key not in FUSION_ONLY}
            below = {**below, "network": kept}
        if kind == ANY:
            below = _over(below, NO_CHANNELS)
        if not sees_tiles(kind, network.get("inputs")):
            below = _over(below, {"loss": {"seam": 1.0}})
            if kind not in ("featsharp", "bilinear"):  # CODE: FeatUp's configurations have no de-bias map
                below = _over(below, {"network": {"debias": False}})
    return _over(below, values)


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    both = {key for key in below.keys() & above.keys() if isinstance(below[key], Mapping) and isinstance(above[key], Mapping)}
    return {**below, **above, **{key: _over(below[key], above[key]) for key in both}}
