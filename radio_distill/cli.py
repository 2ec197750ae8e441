"""The command line: `radio-distill COMMAND`. Every command imports what it needs when it runs, so that `--help` is instant.

Settings are `key=value` (fields of a recipe, or of the command), flags are few and stay few.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from .errors import RecipeError, run_and_report

__all__ = ["main"]

TABLES = ("teachers", "recipes", "upsamplers", "vlms", "students")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 (the answer is no), 2 (wrong input), 75 (a training was asked to stop and has
    saved), 130 (interrupted)."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command != "eval":  # eval has a command line of its own
        takes_settings = hasattr(arguments, "overrides") or hasattr(arguments, "recipes")
        if rest and not (takes_settings and all("=" in item and item[0] != "-" for item in rest)):
            parser.error(f"unknown option {rest[0]!r}; settings are given as key=value")
        rest = [*getattr(arguments, "overrides", []), *rest]  # argparse misses a key=value that follows a flag
    arguments.overrides = rest
    logging.basicConfig(level=logging.DEBUG if arguments.verbose else logging.INFO, format="%(message)s", stream=sys.stderr)
    return run_and_report(lambda: HANDLERS[arguments.command](arguments), verbose=arguments.verbose)


def _parser() -> argparse.ArgumentParser:
    from .version import __version__

    parser = argparse.ArgumentParser(
        prog="radio-distill",
        description="Distil several frozen vision teachers into one ViT student.",
        epilog="Start with `radio-distill demo`: no data, no download, no GPU.",
    )
    parser.add_argument("--version", action="version", version=f"radio-distill {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="debug messages, and tracebacks of errors")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    _add_commands_that_look(commands)
    _add_commands_for_data(commands)
    _add_commands_that_train(commands)
    return parser


def _add(commands: Any, name: str, about: str, **options: Any) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".", **options)


def _add_commands_that_look(commands: Any) -> None:
    listing = _add(commands, "list", "teachers, recipes, upsamplers, VLMs and students that can be used")
    listing.add_argument("what", nargs="?", choices=TABLES, help="one table; default: all")
    plan = _add(commands, "plan", "what a recipe, or several that follow each other, will cost: FLOPs, memory, hours, disk")
    about = "recipe files, or names of shipped ones (radio-distill list recipes), and fields of all of them: optim.lr=1e-3"
    plan.add_argument("recipes", nargs="+", metavar="recipe|key=value", help=about)
    plan.add_argument("--against", metavar="A,B,...", help="recipes to compare their costs with, as they are shipped")
    plan.add_argument("--budget", type=float, metavar="HOURS", help="how many steps so many GPU-hours pay for")
    plan.add_argument("--gpus", type=_positive, help="number of GPUs, one rank each (1); with --nodes: of each node (8)")
    plan.add_argument("--nodes", type=_positive, help="also plan network, data and checkpoints of so many nodes")
    plan.add_argument("--network", type=float, default=50, metavar="GB/S", help="between nodes, of one GPU, each way (50)")
    plan.add_argument("--disk", type=float, default=5, metavar="GB/S", help="writing of a checkpoint (5)")
    plan.add_argument("--gpu", default="h200", help="a100, h100, h200, b200, ... (h200)")
    plan.add_argument("--utilisation", type=float, default=0.45, help="share of the reachable bf16 rate that is used (0.45)")
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.add_argument("--check", action="store_true", help="then look for all that it needs (doctor); exit code 1 if not here")
    opening = "with --check: also run the commands and open the URLs of data.sources"
    plan.add_argument("--open", action="store_true", help=opening)
    status = _add(commands, "status", "what a run is doing, from its folder alone; exit code 1 when it stopped before its end")
    status.add_argument("run", help="run folder")
    status.add_argument("--json", action="store_true", help="print JSON")
    doctor = _add(commands, "doctor", "is everything here that a recipe needs? no network; exit code 1 if not")
    _add_recipe(doctor, optional=True)
    doctor.add_argument("--open", action="store_true", help="also run the commands and open the URLs of data.sources")


def _add_commands_for_data(commands: Any) -> None:
    shards = _add(commands, "shards", "pack a folder of images (or shards) into WebDataset shards of equal size")
    shards.add_argument("source", help="folder of images, or local shards")
    shards.add_argument("out", help="folder to write shards to")
    shards.add_argument("--count", type=_positive, default=1000, help="images in a shard (1000)")
    shards.add_argument("--seed", type=int, default=0, help="seed of the order of the images (0)")
    embed = _add(commands, "embed", "a vector for every image of a source, by any model: what curate needs")
    embed.add_argument("source", help="folder of images, or shards, as data.sources.NAME.path")
    embed.add_argument("out", help="folder to write to, or to go on in")
    embed.add_argument("--model", required=True, help="teacher:NAME, a run, timm:NAME, hf:FOLDER: as eval takes them")
    embed.add_argument("--size", type=_positive, default=224, help="side in pixels (224), rounded to what the model takes")
    embed.add_argument("--batch", type=_positive, default=64, help="images in a forward pass (64)")
    embed.add_argument("--workers", type=int, default=4, help="loader processes (4); 0: none")
    embed.add_argument("--ray", metavar="ADDRESS", help="run on a Ray cluster: HOST:PORT, or auto (docs/scale.md)")
    curate = _add(commands, "curate", "which images are worth seeing: no near-duplicates, a balanced sample, a keep-list")
    curate.add_argument("recipe", help="recipe of a curation, a YAML file (docs/data.md)")
    curate.add_argument("overrides", nargs="*", metavar="key=value", help="fields of the recipe: count=1000000")
    toyworld = _add(commands, "toyworld", "render scenes with full ground truth into WebDataset shards")
    toyworld.add_argument("out", help="folder to write shards to")
    toyworld.add_argument("--count", type=_positive, default=1024, help="number of scenes (1024)")
    toyworld.add_argument("--size", type=_positive, default=128, help="side of an image in pixels (128)")
    toyworld.add_argument("--shards", type=_positive, default=8, help="number of shards (8)")
    toyworld.add_argument("--seed", type=int, default=0, help="seed of the scenes (0)")
    toyworld.add_argument("--dense", action="store_true", help="also write depth, normals, segments and keypoints")
    _add_recipe(_add(commands, "stats", "statistics of the teachers' features, for balance.path"))
    cache = _add(commands, "cache", "the teachers' targets of some views of every image, computed once, for cache.read")
    _add_recipe(cache)
    cache.add_argument("--views", type=_positive, help="views (crop and flip) of every image; the same as data.views=N")


def _add_commands_that_train(commands: Any) -> None:
    demo = _add(commands, "demo", "the whole pipeline on generated images and toy teachers, on a CPU")
    demo.add_argument(
        "overrides", nargs="*", metavar="key=value", help="images=FOLDER (yours instead of generated), run=FOLDER"
    )
    train = _add(commands, "train", "train or resume a recipe of any kind: a stage, an upsampler, a stage of a VLM")
    _add_recipe(train)
    train.add_argument("--ranks", type=_positive, default=1, help="processes to start on this machine (1)")
    chain = _add(
        commands,
        "chain",
        "train recipes one after the other, each from or with what those before it left (proxy, then students)",
    )
    about = (
        "recipes in their order (a path, or the name of a shipped one), and fields of all of them: data.sources.train.path=..."
    )
    chain.add_argument("recipes", nargs="+", metavar="recipe|key=value", help=about)
    chain.add_argument("--ranks", type=_positive, default=1, help="processes to start on this machine for each (1)")
    upsampler = _add(commands, "upsampler", "the same of an upsampler alone (FeatSharp and others)")
    _add_recipe(upsampler)
    upsampler.add_argument("--ranks", type=_positive, default=1, help="processes to start on this machine (1)")
    vlm = _add(commands, "vlm", "vision-language models with a student as tower: train one, or make a toy one's parts")
    about_vlm = vlm.add_subparsers(title="commands", metavar="COMMAND", dest="vlm_command", required=True)
    vlm_train = _add(about_vlm, "train", "train or resume one stage of a VLM")
    _add_recipe(vlm_train)
    vlm_train.add_argument("--ranks", type=_positive, default=1, help="processes to start on this machine (1)")
    vlm_toy = _add(about_vlm, "toy", "make what toy/vlm_* need: a tiny language model, images, questions")
    vlm_toy.add_argument("out", help="folder to make; it must not exist")
    vlm_toy.add_argument("--count", type=_positive, default=3000, help="number of scenes to ask about (3000)")
    vlm_toy.add_argument("--size", type=_positive, default=96, help="side of an image in pixels (96)")
    vlm_toy.add_argument(
        "--steps", type=_positive, help="steps in which the language model learns to read (1600, some minutes)"
    )
    _add_submit(commands)
    _add(commands, "eval", "score checkpoints, exports and teachers on a suite (eval --help tells more)", add_help=False)
    viz = _add(commands, "viz", "draw what upsamplers make of some images: principal components as colours")
    viz.add_argument("upsamplers", nargs="+", metavar="upsampler", help="run folder, checkpoint or folder of an upsampler")
    viz.add_argument("--images", required=True, help="folder of images, shards, one image, or toy (generated scenes)")
    viz.add_argument("--out", required=True, help="picture to write, FILE.png")
    paper = _add(
        commands, "paper", "make tables and figures of the FeatSharp paper, on toy data or yours; without a name: list them"
    )
    paper.add_argument("overrides", nargs="*", metavar="NAME or key=value", help="table1, figure6, ..., all; run=FOLDER, ...")
    report = _add(commands, "report", "write a run's report: curves, results, pictures")
    report.add_argument("run", help="run folder")
    export = _add(commands, "export", "write a student for others: one folder with weights, model card and checksums")
    export.add_argument("run", help="run folder, checkpoint, export, or a RADIO checkpoint (.pth.tar, Hugging Face folder)")
    export.add_argument("--format", default="hf", help="hf, radio, timm, onnx or torch (hf)")
    export.add_argument("--out", help="folder to make; it must not exist (may be left out to --push an export that is there)")
    export.add_argument("--text-towers", action="store_true", help="copy the text encoders of adaptors that have one (hf)")
    export.add_argument(
        "--push", metavar="OWNER/NAME", help="then upload it to this hub repository (made private if not there)"
    )
    export.add_argument("--dry-run", action="store_true", help="say what --push would upload, and upload nothing")
    settings = "adaptors=all|none|A,B, dtype=float32|bfloat16|float16, rms_images=FOLDER (measure the features' scale), video=2 (frames that share a patch)"
    export.add_argument("overrides", nargs="*", metavar="key=value", help=settings)
    report.add_argument("--baseline", help="draw gains over it: paper:baseline, a run or a file of results (FILE::MODEL)")
    gain = _add(commands, "gain", "by how many percent models are better than a baseline, by task, group and overall")
    forms = "paper:NAME (baseline, featsharp, ...), a folder with results.jsonl, or a file of results; ::MODEL names one in it"
    gain.add_argument("models", nargs="+", metavar="model", help=forms)
    gain.add_argument("--baseline", required=True, help="the same; one model")
    gain.add_argument("--suite", action="append", default=[], help="only results of this suite; may be repeated")
    gain.add_argument("--json", action="store_true", help="print JSON")


def _add_submit(commands: Any) -> None:
    submit = _add(commands, "submit", "put trainings into Slurm's queue, each after the one before, and suites after them")
    about = "recipes (a path, or the name of a shipped one), and fields of all of them: optim.lr=1e-3"
    submit.add_argument("recipes", nargs="*", metavar="recipe|key=value", help=about)
    what = "score at the end: 'SUITE=MODEL,... [OPTIONS of eval]'; may be repeated"
    submit.add_argument("--eval", action="append", default=[], metavar="SUITE=MODEL", help=what)
    submit.add_argument("--nodes", type=_positive, default=1, help="machines (1)")
    submit.add_argument("--gpus", type=int, default=8, help="GPUs on each, one rank a GPU (8); 0: ranks on the CPU")
    submit.add_argument("--tasks", type=_positive, default=1, help="ranks on each machine when --gpus=0 (1)")
    submit.add_argument("--cpus", type=_positive, default=12, help="CPUs of each rank (12)")
    submit.add_argument(
        "--hours", type=float, default=48.0, help="time limit; a job that reaches it saves and resumes later (48)"
    )
    submit.add_argument("--partition", help="Slurm's partition")
    submit.add_argument("--account", help="Slurm's account")
    submit.add_argument("--logs", default="logs", help="folder for the jobs' output (logs)")
    submit.add_argument("--dry-run", action="store_true", help="print what would be submitted")


def _add_recipe(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    about = "recipe file, or the name of a shipped one (radio-distill list recipes)"
    parser.add_argument("recipe", nargs="?" if optional else None, help=about)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields of the recipe: optim.lr=1e-3")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number of at least 1")
    return int(text)


def _demo(arguments: argparse.Namespace) -> int:
    from .demo import main as demo

    settings = dict(item.partition("=")[::2] for item in arguments.overrides)
    unknown = settings.keys() - {"images", "run"}
    if unknown:
        raise RecipeError(f"demo has no setting {sorted(unknown)[0]!r}; expected images=FOLDER or run=FOLDER")
    return demo(images=settings.get("images"), run=settings.get("run", "runs/demo"))


def _list(arguments: argparse.Namespace) -> int:
    from .listing import print_tables

    print_tables([arguments.what] if arguments.what else TABLES)
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from .config.load import load
    from .jobs import plan as plan_of
    from .jobs import refuse_if_missing
    from .plan.budget import to_json
    from .plan.scale import Cluster
    from .plan.side_by_side import at_budget, render_side_by_side

    names, overrides = _recipes_and_fields(arguments)
    nodes, gpus = arguments.nodes, arguments.gpus or (8 if arguments.nodes else 1)
    plan_on = partial(
        plan_of,
        world_size=gpus * (nodes or 1),
        gpu=arguments.gpu,
        utilisation=arguments.utilisation,
        cluster=Cluster(nodes, gpus, arguments.network, arguments.disk) if nodes else None,
    )
    recipes = [load(name, overrides) for name in names]
    others = [load(name) for name in (arguments.against or "").split(",") if name]
    if arguments.budget is not None:
        recipes = at_budget(recipes, lambda recipe: plan_on(recipe)[0], arguments.budget)
    planned = [plan_on(recipe) for recipe in recipes]
    if arguments.json:
        print(to_json(*(plan for plan, _ in planned)))
    elif len(planned) == 1 and not others:
        print(planned[0][1])
    else:
        print(render_side_by_side([plan for plan, _ in planned], [plan_on(recipe)[0] for recipe in others]))
    if arguments.budget is not None and not arguments.json:
        print(
            "\n".join(
                f"for {arguments.budget:g} GPU-hours: {name} optim.steps={r.optim.steps}" for name, r in zip(names, recipes)
            )
        )
    return max([refuse_if_missing(recipe, open_sources=arguments.open) for recipe in recipes] if arguments.check else [0])


def _recipes_and_fields(arguments: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Names of recipes, and key=value for all of them. Raises RecipeError without a recipe."""
    names = [item for item in arguments.recipes if "=" not in item]
    if not names:
        raise RecipeError(f"{arguments.command} needs a recipe: a file, or a name that `radio-distill list recipes` shows")
    return names, [item for item in arguments.recipes if "=" in item] + arguments.overrides


def _chain(arguments: argparse.Namespace) -> int:
    from .chain import chain

    names, overrides = _recipes_and_fields(arguments)
    return chain(names, overrides, ranks=arguments.ranks)


def _status(arguments: argparse.Namespace) -> int:
    from .train.status import main as status

    return status(arguments.run, as_json=arguments.json)


def _doctor(arguments: argparse.Namespace) -> int:
    from .config.load import load
    from .jobs import examine

    recipe = load(arguments.recipe, arguments.overrides) if arguments.recipe else None
    return examine(recipe, open_sources=arguments.open)


def _shards(arguments: argparse.Namespace) -> int:
    from .data.shards import make_shards

    make_shards(arguments.source, arguments.out, count=arguments.count, seed=arguments.seed)
    return 0


def _toyworld(arguments: argparse.Namespace) -> int:
    from .toyworld import write_toyworld

    write_toyworld(
        arguments.out,
        count=arguments.count,
        size=arguments.size,
        seed=arguments.seed,
        shards=arguments.shards,
        dense=arguments.dense,
    )
    print(f"wrote {arguments.shards} shards to {arguments.out}")
    return 0


def _stats(arguments: argparse.Namespace) -> int:
    from .distill.gather import main as stats

    return stats([arguments.recipe, *arguments.overrides])


def _cache(arguments: argparse.Namespace) -> int:
    from .distill.cache import main as cache

    views = [f"data.views={arguments.views}"] if arguments.views else []
    return cache([arguments.recipe, *arguments.overrides, *views])


def _embed(arguments: argparse.Namespace) -> int:
    from .curate.embed import embed

    a = arguments
    return embed(a.source, a.out, model=a.model, size=a.size, batch=a.batch, workers=max(0, a.workers), ray=a.ray)


def _curate(arguments: argparse.Namespace) -> int:
    from .curate.run import main as curate

    return curate([arguments.recipe, *arguments.overrides])


def _train(arguments: argparse.Namespace) -> int:
    from .config.load import load, load_upsampler_recipe, load_vlm_recipe

    check = {"upsampler": load_upsampler_recipe, "vlm": load_vlm_recipe}.get(arguments.command, load)
    check(arguments.recipe, arguments.overrides, training=True)  # its errors once, before any process starts
    if arguments.ranks > 1:
        from .train.launch import launch

        return launch(arguments.recipe, arguments.overrides, arguments.ranks)
    from .jobs import main as train

    return train([arguments.recipe, *arguments.overrides])


def _vlm(arguments: argparse.Namespace) -> int:
    if arguments.vlm_command == "train":
        return _train(arguments)
    from .vlm.toy import write_toy

    write_toy(arguments.out, count=arguments.count, size=arguments.size, steps=arguments.steps)
    return 0


def _submit(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from .submit import Resources, submit

    a = arguments
    settings = [item for item in a.recipes if "=" in item] + a.overrides
    recipes = [item for item in a.recipes if "=" not in item]
    resources = Resources(a.nodes, a.gpus, a.tasks, a.cpus, a.hours, a.partition, a.account)
    return submit(recipes, settings, resources, evals=a.eval, logs=Path(a.logs), dry_run=a.dry_run)


def _eval(arguments: argparse.Namespace) -> int:
    from .eval.__main__ import main as evaluate

    return evaluate(arguments.overrides)


def _viz(arguments: argparse.Namespace) -> int:
    from .viz_command import main as viz

    return viz(arguments.upsamplers, arguments.images, arguments.out)


def _paper(arguments: argparse.Namespace) -> int:
    from .paper.command import main as paper

    return paper(arguments.overrides)


def _report(arguments: argparse.Namespace) -> int:
    from .eval.report import main as report

    return report(arguments.run, arguments.baseline)


def _gain(arguments: argparse.Namespace) -> int:
    from .eval.gain_text import main as gain

    return gain(arguments.models, arguments.baseline, suites=arguments.suite, as_json=arguments.json)


def _export(arguments: argparse.Namespace) -> int:
    from .export.command import main as export

    settings = dict(item.partition("=")[::2] for item in arguments.overrides)
    options = {"text_towers": arguments.text_towers, "repository": arguments.push, "dry_run": arguments.dry_run}
    return export(arguments.run, arguments.format, arguments.out, settings, **options)


HANDLERS: dict[str, Callable[[argparse.Namespace], int]] = {
    "demo": _demo,
    "list": _list,
    "plan": _plan,
    "status": _status,
    "doctor": _doctor,
    "shards": _shards,
    "toyworld": _toyworld,
    "embed": _embed,
    "curate": _curate,
    "stats": _stats,
    "cache": _cache,
    "train": _train,
    "chain": _chain,
    "upsampler": _train,
    "vlm": _vlm,
    "submit": _submit,
    "eval": _eval,
    "viz": _viz,
    "paper": _paper,
    "report": _report,
    "export": _export,
    "gain": _gain,
}
