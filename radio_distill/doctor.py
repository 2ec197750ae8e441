"""`radio-distill doctor [RECIPE]`: check that everything a training needs is on this machine, by looking at files and opening some.

Commands (`pipe:`) and URLs of the recipe are listed; they are run or opened only with `--open`."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from .config.cards import TeacherCard
from .config.checks import NO_IMAGES, patch_size
from .config.load import list_recipes, load_upsampler_recipe
from .config.recipe import Debias, ImageJob, Job, Recipe, Trained
from .config.secrets import without_secrets
from .config.sizes import side_of
from .config.upsampler_recipe import AnyRecipe, UpsamplerRecipe
from .errors import CheckpointError, DataError, RadioDistillError
from .listing import how_to_get, make_table, wide_console
from .paths import cache_dir, data_path, expand
from .runs import run_path
from .types import Finding
from .weight_files import cached_weights, hub_id, local_weights, needs_weights

if TYPE_CHECKING:
    from .data.reading import Raw
    from .data.sources import Listing, Shard

__all__ = ["examine_code", "examine_machine", "examine_packages", "examine_recipe", "examine_resume", "show"]

PACKAGES = ("torch", "torchvision", "deepspeed", "timm", "open_clip_torch", "transformers", "webdataset", "pydantic")
VARIABLES = ("HF_HOME", "HF_HUB_OFFLINE", "WANDB_MODE", "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "OMP_NUM_THREADS")


def show(findings: Sequence[Finding]) -> int:
    """Print a table; 1 when something is missing."""
    table = make_table("", "what state", "detail")
    for finding in findings:
        table.add_row(finding.what, "MISSING" if finding.missing else "not opened" if finding.unopened else "ok", finding.text)
    wide_console().print(table)
    return int(any(finding.missing for finding in findings))


def examine_machine() -> Iterator[Finding]:
    """Versions, processors, compiler, disk, environment. Nothing here is missing: a CPU and Python are enough to start."""
    import torch
    import torch.distributed as dist

    yield Finding("python", platform.python_version())
    yield Finding("packages", ", ".join(f"{name} {_version(name)}" for name in PACKAGES))
    yield Finding("cpu", f"{os.cpu_count()} cores, bf16: {_cpu_bf16()}")
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    for i, gpu in enumerate(gpus):
        bf16 = "bf16" if gpu.major >= 8 else "no bf16: set engine.precision=fp32"
        yield Finding(f"gpu {i}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, {bf16}")
    if not gpus:
        yield Finding("gpu", f"none (torch was built for CUDA {torch.version.cuda}); toy recipes run on the CPU")
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if gpus and dist.is_nccl_available() else "not in use"
    yield Finding("collectives", f"NCCL {nccl}, gloo {'yes' if dist.is_gloo_available() else 'no'}")
    compiler = shutil.which(os.environ.get("CXX", "c++")) or "none; not needed"
    yield Finding("c++ compiler", compiler)
    yield Finding("cache", f"{cache_dir()}, {_free_gib(cache_dir()):.0f} GiB free")
    yield Finding("environment", ", ".join(f"{name}={os.environ.get(name, '(not set)')}" for name in VARIABLES))


def examine_recipe(recipe: AnyRecipe, *, open_sources: bool = False) -> Iterator[Finding]:
    """What the recipe asks for: teachers, upsamplers, start, balancers, images, packages, disk.

    open_sources: run its commands and open its URLs, too.
    """
    from .plan.code import named_cards
    from .runs import latest

    resumed = latest(run_path(recipe))
    cards = named_cards(recipe)
    teachers_run = not isinstance(recipe, Recipe) or recipe.cache.read is None or recipe.cache.miss == "online"
    if isinstance(recipe, Recipe) and recipe.cache.read is not None:
        yield _cache(recipe.cache.read)
    for name, card in cards.items():
        path = local_weights(card)
        missing = path is None and needs_weights(card) and teachers_run
        otherwise = how_to_get(card) if missing else card.loader or "not here, and not needed: its targets are in the cache"
        yield Finding(f"teacher {name}", str(path or otherwise), missing=missing)
    if isinstance(recipe, Recipe):
        yield from _upsamplers(recipe, cards)
        yield from _start(recipe) if resumed is None else ()
    yield from examine_resume(recipe)
    if recipe.balance.path:
        yield _balancers(Path(expand(recipe.balance.path)), cards, by_card=not isinstance(recipe, Recipe))
    yield from _images(recipe, open_sources)
    yield from examine_packages(recipe)
    yield from examine_code(recipe)
    yield _disk(recipe)


def _cache(where: str) -> Finding:
    from .data.sources import is_url

    if is_url(where):
        return Finding("cache", f"{without_secrets(where)}; not opened", unopened=True)
    here = (Path(expand(where)) / "cache.json").is_file()
    return Finding("cache", where if here else f"no cache in {where}; write it: radio-distill cache RECIPE", missing=not here)


def examine_resume(recipe: Job) -> Iterator[Finding]:
    """Of every run that the recipe would resume, the checkpoint, or why it would be refused; nothing where it starts."""
    from .runs import latest
    from .train.run import check_resume

    for each in recipe.each() if isinstance(recipe, Recipe) else [recipe]:
        path = run_path(each)
        if not path.is_dir():
            continue
        try:
            check_resume(path, each)
        except RadioDistillError as error:
            yield Finding("resume", str(error), missing=True)
            continue
        if found := latest(path):
            yield Finding("resume", str(found))


def _balancers(path: Path, cards: dict[str, TeacherCard], *, by_card: bool) -> Finding:
    """by_card: they are looked up by the teacher that they are of, not by its name in the recipe."""
    from .balance import check_balancers, name_of

    if not path.is_dir():
        return Finding("balancers", f"no folder {path}; make it with `radio-distill stats`", missing=True)
    try:
        check_balancers(path, {name_of(path, card): card for card in cards.values()} if by_card else cards)
    except CheckpointError as error:
        return Finding("balancers", str(error), missing=True)
    return Finding("balancers", str(path))


def _upsamplers(recipe: Recipe, cards: dict[str, TeacherCard]) -> Iterator[Finding]:
    """Of every trained upsampler whether it is here and made for its teacher; each place of weights once."""
    from .upsamplers.base import trained_upsampler

    views = [(name, view, part) for part in recipe.partitions.values() for name, view in part.teachers.items()]
    found: dict[tuple[str, str], Finding] = {}
    for name, view, part in views:
        spec, card = view.upsampler, cards[name]
        if not isinstance(spec, Trained | Debias):
            continue
        what = f"upsampler {name}"
        try:
            made = trained_upsampler(spec, card, side_of(part, view, card.input.shape, patch_size(recipe)))
            text = f"{spec.weights}: {made.factor}x {made.saved.network.kind}, step {made.saved.provenance.get('step', '?')}"
            finding = Finding(what, text)
        except CheckpointError as error:
            finding = Finding(what, f"{error}; {_how_to_train(spec, card)}", missing=True)
        except RadioDistillError as error:
            finding = Finding(what, str(error), missing=True)
        if finding.missing or (name, spec.weights) not in found:
            found[name, spec.weights] = finding
    yield from found.values()


def _how_to_train(spec: Trained | Debias, card: TeacherCard) -> str:
    """The command that makes the weights: by the shipped recipe whose run they are, else by one to be written."""
    for name in list_recipes(UpsamplerRecipe):
        if run_path(load_upsampler_recipe(name)) == Path(spec.weights):
            return f"train it: radio-distill upsampler {name} data.sources.NAME.path=..."
    return f"train one for it: radio-distill upsampler RECIPE teacher={card.name} run={spec.weights}"


def _start(recipe: Recipe) -> Iterator[Finding]:
    start = recipe.start
    if start.kind == "scratch":
        return
    source = Path(expand(start.source))
    if start.kind == "run":
        from .runs import latest

        found, advice = latest(source), f"no checkpoint in {source}; train that stage first"
    elif found := next((path for path in (source, data_path("recipes") / source) if path.exists()), None):
        advice = ""
    else:
        hub = hub_id(start.source) if start.kind == "radio" else _timm_hub_id(start.source)
        found = cached_weights(hub) if hub else None
        advice = f"on a machine with a network: hf download {hub}" if hub else f"no file or hub id {start.source!r}"
    yield Finding(f"start from {start.kind}", str(found) if found else advice, missing=found is None)


def _first(shard: Shard) -> list[Raw]:
    """The first sample of a shard, if it has one. Raises DataError naming the shard."""
    from .data.reading import ShardError, read_shard

    try:
        return list(islice(read_shard(shard), 1))
    except ShardError as error:
        raise DataError(f"{shard.name}: {error}") from error


def _images(recipe: ImageJob, open_sources: bool) -> Iterator[Finding]:
    from .data.keep import Keep
    from .data.sources import is_url, list_source

    if not recipe.data.sources:
        yield Finding("images", NO_IMAGES, missing=True)
    for name, source in recipe.data.sources.items():
        try:
            listing = list_source(name, source)
            unopened = "" if open_sources else _remote(listing)
            shards = [shard for shard in listing.shards(1) if open_sources or not is_url(shard.url)]
            samples = [sample for shard in (*shards[:1], *shards[-1:]) for sample in _first(shard)]
            cut = _cut(listing)
            kept = f"; {Keep(Path(expand(source.keep)), listing.fingerprint(1)).total:,} samples kept" if source.keep else ""
        except (RadioDistillError, OSError) as error:
            yield Finding(f"images {name}", without_secrets(str(error)), missing=True)
            continue
        empty = bool(shards) and (not samples or any(sample.image is None for sample in samples))
        looks = ", but no image at the start of the first or last one" if empty else "; first and last can be read"
        looks = f"{looks if shards else ''}{unopened}"
        left_out = f"; left out: {listing.left_out}" if listing.left_out else ""
        yield Finding(f"images {name}", f"{listing.summary}{kept}{looks}{cut}{left_out}", empty, unopened=bool(unopened))


def _remote(listing: Listing) -> str:
    """What of a source would have to be run or fetched; empty where all of it are files."""
    from .data.sources import is_url

    remote = [shard.url for shard in listing.tars if is_url(shard.url)]
    if not remote:
        return ""
    commands = sum(url.startswith("pipe:") for url in remote)
    does = " and ".join(
        f"{verb} {count:,} {what}{'s' * (count > 1)}"
        for verb, count, what in (("runs", commands, "command"), ("opens", len(remote) - commands, "URL"))
        if count
    )
    return f"; training {does}, first {without_secrets(remote[0])!r}; not opened, --open does it"


def _cut(listing: Listing) -> str:
    from .data.shards import cut_tars

    looked, cut = cut_tars(listing)
    return f"; {len(cut)} of {looked} shards looked at stop without an end: they are cut ({cut[0]})" if cut else ""


def examine_packages(recipe: Job) -> Iterator[Finding]:
    wanted = {
        "flash_attn": (
            "flash",
            isinstance(recipe, Recipe) and recipe.student.attention == "flash",
            "or set student.attention=sdpa",
        ),
        "wandb": ("wandb", recipe.log.wandb is not None, "or set log.wandb=null"),
        "tensorboard": ("tensorboard", recipe.log.tensorboard, "or set log.tensorboard=false"),
    }
    for module, (extra, needed, otherwise) in wanted.items():
        if needed:
            here = find_spec(module) is not None
            text = "installed" if here else f'pip install "radio-distill[{extra}]", {otherwise}'
            yield Finding(f"package {module}", text, missing=not here)


def examine_code(recipe: Job) -> Iterator[Finding]:
    """Of every function of the user's that the recipe names, whether it can be imported; imports it."""
    from .plan.code import user_code

    for code in user_code(recipe):
        try:
            code.load()
            yield Finding(f"code of {code.key}", code.target)
        except RadioDistillError as error:
            yield Finding(f"code of {code.key}", str(error), missing=True)


def _disk(recipe: AnyRecipe) -> Finding:
    from .plan.memory import checkpoint_bytes
    from .plan.upsampler import plan_upsampler
    from .student.names import student_of

    folder = run_path(recipe)
    free = _free_gib(folder)
    if isinstance(recipe, Recipe):
        needed = checkpoint_bytes(recipe, student_of(recipe)) * (recipe.checkpoint.keep_last + 1) / 2**30
    else:
        needed = plan_upsampler(recipe, world_size=1).disk_gib
    text = f"{folder}: {free:.0f} GiB free, {needed:.1f} GiB needed for checkpoints"
    return Finding("disk", text if free > needed else f"{text}; free some, or set run=", missing=free <= needed)


def _free_gib(path: Path) -> float:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free / 2**30


def _cpu_bf16() -> str:
    """How well the CPU multiplies bf16 matrices, by its flags."""
    info = Path("/proc/cpuinfo")
    flags = set(re.findall(r"\w+", info.read_text())) if info.exists() else set()
    return next((name for flag, name in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX-512")) if flag in flags), "emulated")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


def _timm_hub_id(name: str) -> str | None:
    import timm

    config = timm.get_pretrained_cfg(name.removeprefix("timm:").removeprefix("timm/"))
    return config.hf_hub_id if config else None
