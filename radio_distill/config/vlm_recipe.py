"""The recipe of one stage of a vision-language model with a student as its tower (`radio-distill vlm train RECIPE`).

Sources of numbers: LLAVA = LLaVA-1.5 (arXiv:2310.03744) and its published scripts, OURS = our choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from .cards import Fields
from .checks import optim_ranges
from .document import Problem
from .engine_checks import engine_problems
from .numbers import Count, Positive, Rate, Scale, Share, Side, Weight
from .recipe import Job, Log, Optim

__all__ = ["FromParts", "Patches", "VlmRecipe", "VlmSource", "check_vlm"]


class Patches(Fields):
    """Images keep their aspect ratio, and their size as far as this many patches of the student allow: as they are served by what
    `radio-distill export` writes, whose config.json has both numbers under the same names."""

    min_num_patches: Positive
    """Smaller images are enlarged to it."""
    max_num_patches: Positive
    """Larger images are reduced to it."""


class FromParts(Fields):
    """A student and a language model, with a projector of random weights between them."""

    kind: Literal["parts"]
    student: str = ""
    """The vision tower: an export, a run, whatever `load_student` reads. Must be given (`start.student=...`)."""
    lm: str = ""
    """Folder of a causal language model with its tokenizer, as transformers saves them. Must be given (`start.lm=...`)."""
    size: Side | Patches = 512
    """Side in pixels of the square that the student sees; images are padded to a square first (LLAVA: 336). Or, for images that keep
    their aspect ratio, `{min_num_patches: 256, max_num_patches: 2304}`."""
    tiles: Count = 1
    """n > 1: the image and its n x n tiles, each at `size`, one after the other. 1: the image alone. 0: no image at all, the
    blind baseline that shows what the questions give away."""
    unshuffle: Positive = 1
    """n: every n x n patches become one token of n*n times the width (VILA: 2)."""
    merge: Positive | None = None
    """Tokens that are left of each picture when similar ones are averaged (token merging); null: all."""
    positions: bool = False
    """Whether a token also tells its row and column, in 16 more channels (vlm/tower.py, `with_places`). Without them a language model has
    to find out from the features and the tokens' order (LLAVA)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the student's weights and activations, whatever the rest computes in."""


class FromVlm(Fields):
    """The stage before."""

    kind: Literal["vlm"]
    source: str = ""
    """Its run folder, one of its checkpoints, or the folder of a VLM. Must be given (`start.source=...`)."""


class Lora(Fields):
    rank: Positive = 128
    """Rank of the update of every Linear of the language model (LLAVA)."""
    alpha: Scale = 256
    """The update is scaled by alpha / rank (LLAVA)."""


class Tower(Fields):
    lr: Rate = 2e-6
    """Its own peak learning rate; the schedule is that of `optim` (OURS: a tenth of the language model's)."""
    gram: Weight = 1.0
    """Weight of Gram anchoring, which holds the map's spatial structure: the squared distance, a position, of the cosines between all
    patches of a picture from those of the student as it came (DINOv3, arXiv:2508.10104; SigLino, arXiv:2512.20157). 0: off."""


class VlmSource(Fields):
    path: str
    """LLaVA's JSON (a list of records with `image` and `conversations`), or WebDataset shards with `.jpg` and `.json`."""
    images: str = ""
    """Folder that the `image` of a JSON's records is relative to."""


class VlmData(Fields):
    sources: dict[str, VlmSource] = {}
    """Conversations, by name; an epoch sees each once. Must be given (`data.sources.mix.path=...`)."""
    max_length: Positive = 2048
    """Longer conversations are cut after this many tokens, those of the image included (LLAVA)."""
    max_bad: Share = 0.05
    """The run stops when more than this share of the records of a source, or of the conversations read so far, cannot be used."""


class VlmOptim(Optim):
    kind: Literal["adamw"] = "adamw"
    """AdamW (LLAVA)."""
    steps: Positive = 2181
    """Optimizer steps of this stage: records over `samples` are one epoch."""
    lr: Rate = 1e-3
    """Peak learning rate (LLAVA: 1e-3 for the projector alone, 2e-5 with the language model)."""
    warmup: Count = 66
    """Steps of linear warm-up (LLAVA: 3 %)."""
    weight_decay: Weight = 0.0
    """None (LLAVA)."""
    eps: Scale = 1e-8
    """Added to the root of the second moment (AdamW's own default)."""
    freeze_trunk: Literal[0] = 0
    """Nothing is held back: what does not learn is frozen from the first step to the last."""
    clip: Scale | None = 1.0
    """Largest global gradient norm (LLAVA)."""


class VlmLog(Log):
    pictures: Literal[0] = 0
    """Conversations have none."""


class VlmRecipe(Job):
    """One of three stages: the projector alone, then the projector and the language model (LLaVA-1.5), then the student as well."""

    start: Annotated[FromParts | FromVlm, Field(discriminator="kind")]
    """What is put together, or continued."""
    trains: Literal["projector", "all"]
    """`projector`: the language model is frozen. `all`: both learn."""
    tower: Tower | None = None
    """The student learns, too; null: it is frozen."""
    lora: Lora | None = None
    """Low-rank updates of the language model instead of all its weights; merged into it in what is saved."""
    template: Literal["chat", "plain"] = "chat"
    """`chat`: the tokenizer's chat template (Vicuna's where it has none). `plain`: image and answer alone (LLAVA stage 1)."""
    samples: Positive = 128
    """Conversations in one optimizer step, over all ranks."""
    micro_batch: Positive | None = None
    """Conversations per rank and forward; null: all at once."""
    grad_checkpointing: bool = False
    """Compute the language model's activations again in the backward pass, to save memory."""
    data: VlmData = VlmData()
    """Conversations about images."""
    optim: VlmOptim = VlmOptim()
    """Optimizer and schedule."""
    log: VlmLog = VlmLog()
    """What is written down; may change on resume."""


NO_CONVERSATIONS = "'data.sources' is empty; say where the conversations are: data.sources.mix.path=FILE.json"


def check_vlm(recipe: VlmRecipe, *, training: bool) -> list[Problem]:
    """Everything in the recipe that does not fit together; empty when it can be run."""
    problems = [*optim_ranges(recipe), *engine_problems(recipe), *_fitting(recipe)]
    return [*problems, *_missing(recipe)] if training else problems


def _fitting(recipe: VlmRecipe) -> Iterator[Problem]:
    if recipe.lora is not None and recipe.trains == "projector":
        yield Problem("'lora' has no effect with 'trains' projector; leave it out, or set trains=all", ("lora",))
    if isinstance(recipe.start, FromParts) and recipe.start.tiles == 0 and recipe.trains == "projector":
        text = (
            "'start.tiles' is 0: without images nothing reaches the projector, which alone learns; set trains=all, or tiles=1"
        )
        yield Problem(text, ("start", "tiles"))
    if isinstance(recipe.start, FromParts) and isinstance(recipe.start.size, Patches):
        yield from _native(recipe.start, recipe.start.size)
    if isinstance(recipe.start, FromParts) and recipe.start.positions and recipe.start.merge is not None:
        text = f"'start.merge' is {recipe.start.merge}: a token of several places has no row and column; remove it, or start.positions"
        yield Problem(text, ("start", "merge"))
    if recipe.tower is not None and isinstance(recipe.start, FromParts):
        if recipe.start.dtype != "float32":
            text = f"'start.dtype' is {recipe.start.dtype!r}, in which the steps of a student that learns would be lost; set float32"
            yield Problem(text, ("start", "dtype"))
        if recipe.start.tiles == 0:
            yield Problem("'start.tiles' is 0: without images the student has nothing to learn from; remove tower", ("tower",))
    if recipe.micro_batch is not None and recipe.micro_batch > recipe.samples:
        text = f"'micro_batch' is {recipe.micro_batch}, expected 1 to {recipe.samples} (samples), or null"
        yield Problem(text, ("micro_batch",))
    if recipe.engine.placement.kind == "dedicated":
        text = "'engine.placement.kind' is 'dedicated', which only stages have: a VLM has no teachers; remove it"
        yield Problem(text, ("engine", "placement", "kind"))
    if recipe.engine.zero == 3:
        yield Problem("'engine.zero' is 3: what is saved would be empty; use 2", ("engine", "zero"))


def _native(start: FromParts, patches: Patches) -> Iterator[Problem]:
    """What does not go with images that keep their aspect ratio."""
    least, most, place = patches.min_num_patches, patches.max_num_patches, ("start", "size")
    if least > most:
        yield Problem(f"'start.size.min_num_patches' is {least}, more than 'start.size.max_num_patches', {most}", place)
    if most < start.unshuffle**2:
        text = f"'start.size.max_num_patches' is {most}, but a token is {start.unshuffle} x {start.unshuffle} patches"
        yield Problem(f"{text}; expected at least {start.unshuffle**2}", place)
    for key, value, plain in (("tiles", start.tiles, 1), ("merge", start.merge, None)):
        if value != plain and not (key == "tiles" and value == 0):
            text = f"'start.{key}' is {value}: that is for squares; remove it, or give the side of a square as start.size"
            yield Problem(text, ("start", key))


def _missing(recipe: VlmRecipe) -> Iterator[Problem]:
    """What only a training needs."""
    for key in ("student", "lm") if isinstance(recipe.start, FromParts) else ("source",):
        if not getattr(recipe.start, key):
            yield Problem(f"'start.{key}' is empty; name a folder: start.{key}=FOLDER", ("start", key))
    if not recipe.data.sources:
        yield Problem(NO_CONVERSATIONS, ("data", "sources"))
