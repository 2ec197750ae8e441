"""Checks across the fields of a recipe and its cards: values that are fine alone and do not fit each other. Pure arithmetic."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from ..errors import CardError
from .cards import TeacherCard, name_problems
from .document import KeyPath, Problem
from .engine_checks import engine_problems
from .messages import did_you_mean
from .native import native_problems, native_view_problems
from .recipe import (
    S2,
    Bilinear,
    Data,
    Debias,
    ImageJob,
    Job,
    Partition,
    Recipe,
    Start,
    Student,
    TeacherView,
    Tile,
    Trained,
    Upsampler,
)
from .sizes import draws_sizes
from .terms import TERMS, weights_of
from .upsampler import ANY, ENLARGING

__all__ = ["NO_IMAGES", "check_recipe", "data_problems", "patch_size", "ranges"]

NO_IMAGES = "'data.sources' is empty; say where the images are: data.sources.train.path=FOLDER"

Found = Iterator[Problem]


def check_recipe(recipe: Recipe, load_card: Callable[[str], TeacherCard], *, training: bool) -> list[Problem]:
    """Everything in the recipe that does not fit together; empty when it can be run."""
    cards: dict[str, TeacherCard] = {}
    problems = list(_cards(recipe, load_card, cards))
    for what, named in (("student", recipe.students), ("teacher", recipe.teachers), ("partition", recipe.partitions)):
        problems += name_problems(what, named, (f"{what}s",))
    problems += _students(recipe)
    problems += _teachers(recipe, cards)
    for name, partition in recipe.partitions.items():
        problems += _partition(recipe, name, partition, cards)
    problems += _bias_maps(recipe)
    problems += _loss(recipe)
    problems += _terms(recipe)
    problems += engine_problems(recipe)
    problems += _cache(recipe)
    problems += ranges(recipe)
    problems += data_problems(recipe.data, recipe.partitions, training=training)
    return problems


def patch_size(recipe: Recipe) -> int:
    """Side in pixels of the student's patch: from its overrides, else from its name (`..._patch16_...`; DINOv2's: 14)."""
    return _patch(recipe.student)


def _patch(student: Student) -> int:
    override = student.overrides.patch_size
    in_name = re.search(r"patch(\d+)", student.model)
    return int(override or (in_name.group(1) if in_name else 14))


def _cards(recipe: Recipe, load_card: Callable[[str], TeacherCard], cards: dict[str, TeacherCard]) -> Found:
    """Loads the cards into `cards`, as far as they can be."""
    for name, teacher in recipe.teachers.items():
        try:
            cards[name] = load_card(teacher.card or name)
        except CardError as error:
            path: KeyPath = ("teachers", name, "card") if teacher.card else ("teachers", name)
            yield Problem(f"teacher {name!r}: {error}".replace("\n", "\n    "), path)


def _students(recipe: Recipe) -> Found:
    yield from _student(recipe, recipe.student, ("student",))
    yield from _start(recipe.start, ("start",))
    for name, further in recipe.students.items():
        path = ("students", name)
        if _patch(further) != patch_size(recipe):
            text = f"student {name!r} has patches of {_patch(further)} px and the recipe's student of {patch_size(recipe)}"
            yield Problem(
                f"{text}; targets are shared, so all need the same: set overrides.patch_size, or train it alone", path
            )
        yield from _student(recipe, further, path)
        yield from _start(further.start, (*path, "start"))


def _student(recipe: Recipe, student: Student, path: KeyPath) -> Found:
    patch, where = _patch(student), ".".join(map(str, path))
    grids = [
        (name, size // patch)
        for name, partition in recipe.partitions.items()
        if not partition.is_native
        for size in partition.sizes or [partition.size]
    ]
    for window in student.vitdet.windows:  # every partition draws among those that divide its grid
        if not grids:
            yield Problem(
                f"a window of {window} tokens: images of native partitions are never windowed; remove it",
                (*path, "vitdet", "windows"),
            )
        elif all(grid % window for _, grid in grids):
            sides = ", ".join(f"{grid} of partition {name!r}" for name, grid in grids)
            yield Problem(f"a window of {window} tokens divides no grid: sides are {sides}", (*path, "vitdet", "windows"))
    for name, partition in recipe.partitions.items():
        if not partition.is_native and partition.size > student.max_size:
            text = f"'partitions.{name}.size' is {partition.size}, more than {where}.max_size {student.max_size}; raise that"
            yield Problem(text, ("partitions", name, "size"))


def _start(start: Start, path: KeyPath) -> Found:
    if start.kind != "scratch" and not start.source:
        where = ".".join(map(str, path))
        yield Problem(f"'{where}.source' is missing: a start of kind {start.kind!r} needs it", (*path, "kind"))


def _teachers(recipe: Recipe, cards: dict[str, TeacherCard]) -> Found:
    if not recipe.teachers:
        yield Problem("'teachers' is empty; name at least one", ("teachers",))
    if not recipe.partitions:
        yield Problem("'partitions' is empty; give at least one", ("partitions",))
    used = {teacher for partition in recipe.partitions.values() for teacher in partition.teachers}
    for name in recipe.teachers:
        path = ("teachers", name)
        if name not in used:
            yield Problem(f"teacher {name!r} is in no partition; add it to one, or remove it with teachers.{name}=null", path)
        if name in cards and not any(weights_of(recipe, name, cards[name]).values()):
            yield Problem(f"teacher {name!r} has no loss: its weights are 0 or it has no summary; raise one or remove it", path)
        if name in cards and recipe.teachers[name].summary == "through_head":
            yield from _through_head(name, cards[name], path)


def _through_head(name: str, card: TeacherCard, path: KeyPath) -> Found:
    """A summary through the teacher's own head needs one whose sizes the card states."""
    out, here = card.output, (*path, "summary")
    if out.pool is None:
        text = f"teacher {name!r}: its card names no pooling head, which 'summary: through_head' needs"
        yield Problem(f"{text}; state `output.pool` in the card (docs/teachers.md), or use summary: adaptor", here)
    elif out.summary != out.features or out.features % out.pool.heads:
        text = f"teacher {name!r}: a pooling head keeps the width of the tokens, a multiple of its {out.pool.heads} heads"
        yield Problem(f"{text}; the card has features {out.features} and summary {out.summary}: use summary: adaptor", here)


def _partition(recipe: Recipe, name: str, partition: Partition, cards: dict[str, TeacherCard]) -> Found:
    path, patch = ("partitions", name), patch_size(recipe)
    if partition.is_native:
        yield from native_problems(recipe, name, patch)
    for size in [] if partition.is_native else partition.sizes or [partition.size]:
        if size % patch:
            fitting = max(patch, round(size / patch) * patch)
            yield Problem(
                f"'partitions.{name}.size' is {size}, no multiple of the student's patch {patch}; nearest is {fitting}",
                (*path, "size"),
            )
    if partition.micro_batch is not None and partition.micro_batch > partition.units:
        expected = f"1 to {partition.units} (its {partition.unit}), or null"
        text = f"'partitions.{name}.micro_batch' is {partition.micro_batch}, expected {expected}"
        yield Problem(text, (*path, "micro_batch"))
    if not partition.teachers:
        yield Problem(f"'partitions.{name}.teachers' is empty; name at least one", (*path, "teachers"))
    for teacher, view in partition.teachers.items():
        here = (*path, "teachers", teacher)
        if teacher not in recipe.teachers:
            yield Problem(f"partition {name!r} names teacher {teacher!r}" + did_you_mean(teacher, recipe.teachers), here)
        elif teacher in cards and partition.is_native:
            yield from native_view_problems(recipe, teacher, view, cards[teacher], here)
        elif teacher in cards:
            yield from _view(recipe, partition, teacher, view, cards[teacher], here)


def _view(recipe: Recipe, partition: Partition, name: str, view: TeacherView, card: TeacherCard, path: KeyPath) -> Found:
    patch = card.input.patch
    own = view.sizes or [view.size or card.input.size]
    if view.as_student:
        own = [size // patch_size(recipe) * patch for size in partition.sizes or [partition.size]]
    for size in own:
        if size != card.input.size and not card.input.resizable:
            yield Problem(f"teacher {name!r} at {size} px: its card allows {card.input.size} px only", (*path, "size"))
        elif size < patch or size % patch:
            fitting = max(1, round(size / patch)) * patch
            yield Problem(
                f"teacher {name!r} at {size} px: no multiple of its patch {patch}; nearest is {fitting}", (*path, "size")
            )
    if len(own) > 1 and isinstance(view.upsampler, Trained | Debias) and view.upsampler.kind != ANY:
        text = f"teacher {name!r}: {view.upsampler.kind!r} is trained for one size, and `size` names {len(own)}; name one"
        yield Problem(text, (*path, "size"))
    if view.grid == "larger" and recipe.data.shift_std:
        text = f"teacher {name!r}: 'grid: larger' needs the same crop for all; set data.shift_std=0, or grid: student"
        yield Problem(text, (*path, "grid"))
    if (view.size or view.as_student) and view.mosaic:
        yield Problem(f"teacher {name!r}: a mosaic has the card's {card.input.size} px; remove size", (*path, "size"))
    yield from _upsampler(name, view, path)
    if view.mosaic:
        yield from _mosaic(recipe, partition, name, card, path)


def _upsampler(name: str, view: TeacherView, path: KeyPath) -> Found:
    spec, here = view.upsampler, (*path, "upsampler")
    if isinstance(spec, Trained | Debias) and not spec.weights:
        text = f"teacher {name!r}: its upsampler's weights are '', expected the run folder of an upsampler"
        yield Problem(text, (*here, "weights"))
    if isinstance(spec, Tile | S2) and spec.factor == 1:
        text = f"teacher {name!r}: {spec.kind!r} of factor 1 encodes the same view twice; use bilinear, or factor 2 or more"
        yield Problem(text, (*here, "factor"))
    if isinstance(spec, Trained) and spec.factor == 1 and spec.kind in ENLARGING:
        text = f"teacher {name!r}: kind {spec.kind!r} only enlarges; use factor 2 or more, or kind 'featsharp'"
        yield Problem(text, (*here, "factor"))


def _bias_maps(recipe: Recipe) -> Found:
    """The targets of a teacher hold one de-bias map in all partitions (FS section 3.4), or the student is asked for two answers."""
    for teacher in recipe.teachers:
        cells = [(name, part.teachers[teacher]) for name, part in recipe.partitions.items() if teacher in part.teachers]
        cells.sort(key=lambda cell: not isinstance(cell[1].upsampler, Trained))  # whose upsampler the others have to follow
        maps = {name: _bias_map(view.upsampler) for name, view in cells if not view.mosaic}
        weights = next(filter(None, maps.values()), None)
        for name, found in maps.items():
            if weights is not None and found != weights:
                holds = f"the de-bias map of {found}" if found else "no de-bias map"
                other = next(other for other, value in maps.items() if value == weights)
                text = (
                    f"teacher {teacher!r}: its targets in partition {name!r} hold {holds} and in {other!r} that of {weights}, "
                    "so the student would be asked for two different answers; set "
                    f"partitions.{name}.teachers.{teacher}.upsampler={{kind: debias, weights: {weights}}}"
                )
                yield Problem(text, ("partitions", name, "teachers", teacher, "upsampler"))


def _bias_map(spec: Upsampler) -> str | None:
    """The weights whose de-bias map a target holds; None: it holds none."""
    if isinstance(spec, Debias) or (isinstance(spec, Trained) and spec.debiases):
        return spec.weights.rstrip("/") or None
    return None


def _mosaic(recipe: Recipe, partition: Partition, name: str, card: TeacherCard, path: KeyPath) -> Found:
    view, size, patch, here = partition.teachers[name], card.input.size, card.input.patch, (*path, "mosaic")
    odd = next((side for side in partition.sizes or [partition.size] if side % patch), None)
    if view.size not in (None, size):
        yield Problem(
            f"teacher {name!r} at {view.size} px: a mosaic is shown at the card's {size} px; remove size", (*path, "size")
        )
    elif 2 * partition.size > size:
        text = f"teacher {name!r}: a mosaic needs 2 x 2 images of {partition.size} px in its {size} px; set mosaic: false"
        yield Problem(text, here)
    elif odd:
        yield Problem(f"teacher {name!r}: mosaic images of {odd} px are no multiple of its patch {patch}", here)
    if not isinstance(view.upsampler, Bilinear):
        yield Problem(f"teacher {name!r}: a mosaic cannot be upsampled by {view.upsampler.kind!r}; use bilinear", here)
    for term, weight in weights_of(recipe, name, card).items():
        if term.head == "summary" and weight > 0:
            keys = {"summary": f"teachers.{name}.summary_weight", "relation": f"loss.relation.teachers.{name}"}
            key = keys.get(term.name, f"loss.terms.{term.name}.teachers.{name}")
            yield Problem(f"teacher {name!r}: a mosaic has one summary for many images; set {key}=0", here)


def _cache(recipe: Recipe) -> Found:
    if recipe.cache.read is not None and (drawn := draws_sizes(recipe)):
        yield Problem(
            f"a cache holds views of one size, and 'partitions.{drawn}' draws sizes; use squares of one", ("cache", "read")
        )
    if recipe.cache.read is not None and recipe.engine.placement.kind == "dedicated":
        text = "'engine.placement.kind' is 'dedicated' and the targets come from cache.read, so teacher ranks have no work; remove it"
        yield Problem(text, ("engine", "placement", "kind"))


def _loss(recipe: Recipe) -> Found:
    features = recipe.loss.features
    if features.mse == features.cosine == features.smooth_l1 == 0 and any(t.feature_weight for t in recipe.teachers.values()):
        yield Problem("'loss.features': mse, cosine and smooth_l1 are all 0; raise one", ("loss", "features"))
    if recipe.partitions and all(partition.weight == 0 for partition in recipe.partitions.values()):
        yield Problem("every partition has weight 0; raise one", ("partitions",))
    if recipe.loss.mesa.weight and not recipe.ema.decay:
        yield Problem("'loss.mesa.weight' needs the EMA student; set ema.decay (0.9996)", ("loss", "mesa", "weight"))
    balance = recipe.balance
    if recipe.loss.summary == "angle" and balance.summary == "standardize":
        text = "'loss.summary: angle' divides by the dispersion of the teachers' own summaries, which balance.summary=standardize changes"
        yield Problem(f"{text}; set one of the two back", ("balance", "summary"))
    if balance.window == 0 and balance.path is None and any(recipe.method_of(n).kind != "none" for n in recipe.teachers):
        text = "'balance.window' is 0 and there is no 'balance.path': no statistics; give one, or balance.method.kind=none"
        yield Problem(text, ("balance", "window"))


def _terms(recipe: Recipe) -> Found:
    taken = [*(term.name for term in TERMS), "mesa"]
    for name, term in recipe.loss.terms.items():
        path = ("loss", "terms", name)
        if name in taken or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            text = f"loss term {name!r}: expected a name of letters, digits, - and _, and none of {', '.join(taken)}"
            yield Problem(f"{text}; rename it", path)
        yield from _named_teachers(recipe, name, term.teachers, path)
    yield from _named_teachers(recipe, "relation", recipe.loss.relation.teachers, ("loss", "relation"))


def _named_teachers(recipe: Recipe, term: str, teachers: Iterable[str], path: KeyPath) -> Found:
    for teacher in teachers:
        if teacher not in recipe.teachers:
            text = f"loss term {term!r} names teacher {teacher!r}{did_you_mean(teacher, recipe.teachers)}"
            yield Problem(text, (*path, "teachers", teacher))


def ranges(recipe: ImageJob) -> Found:
    """Numbers of any training on images that are out of range."""
    yield from optim_ranges(recipe)
    crop = recipe.data.crop
    if not 0 < crop.scale[0] <= crop.scale[1] <= 1:
        text = f"'data.crop.scale' is {list(crop.scale)}, expected [low, high] with 0 < low <= high <= 1"
        yield Problem(text, ("data", "crop", "scale"))
    if crop.ratio[0] > crop.ratio[1]:
        yield Problem(
            f"'data.crop.ratio' is {list(crop.ratio)}, expected [low, high] with low <= high", ("data", "crop", "ratio")
        )


def optim_ranges(recipe: Job) -> Found:
    """Numbers of any optimizer that are out of range."""
    optim = recipe.optim
    if optim.kind == "custom" and optim.loader is None:
        yield Problem("'optim.loader' is missing: optim.kind=custom needs package.module:function", ("optim", "kind"))
    if optim.kind != "custom" and (optim.loader is not None or optim.options):
        what = "loader" if optim.loader is not None else "options"
        yield Problem(f"'optim.{what}' has no effect on optim.kind={optim.kind}; set optim.kind=custom", ("optim", what))
    if optim.min_lr > optim.lr:
        yield Problem(f"'optim.min_lr' is {optim.min_lr}, more than 'optim.lr' {optim.lr}", ("optim", "min_lr"))


def data_problems(data: Data, partitions: dict[str, Partition], *, training: bool) -> Found:
    """What is wrong with the images of any training."""
    if training and not data.sources:
        yield Problem(NO_IMAGES, ("data", "sources"))
    for name in data.homogeneous:
        if data.sources and name not in data.sources:
            text = f"'data.homogeneous' names source {name!r}{did_you_mean(name, list(data.sources))}"
            yield Problem(f"{text}; expected one of {', '.join(data.sources)}", ("data", "homogeneous", name))
    if sum(data.homogeneous.values()) > 1:
        yield Problem(
            f"shares in 'data.homogeneous' add up to {sum(data.homogeneous.values()):g}, expected at most 1",
            ("data", "homogeneous"),
        )
    streams = data.streams
    for name, partition in partitions.items():
        if streams is not None and partition.units % streams:
            text = f"'data.streams' is {streams}, expected a divisor of partitions.{name}.{partition.unit} {partition.units}"
            yield Problem(text, ("data", "streams"))
