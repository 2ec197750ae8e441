"""`python -m radio_distill.eval --suite SUITE --model RUN [--model ...]`: tables, and one line per result in a file.

Suites are cards (eval/SUITE.yaml) that the runner carries out; a few are programs of their own:

toy       students and teachers on generated scenes
fidelity  trained upsamplers on held-out images, and students beside the teachers that their heads predict
vlm       vision-language models with a student as tower, through lmms-eval
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ..config.messages import did_you_mean
from ..errors import RadioDistillError
from ..results import append, read, table
from ..types import Result
from .suite_names import CUSTOM, PAPER, suite_names

if TYPE_CHECKING:
    from .suites import Suite
    from .task import Context

__all__ = ["main", "append", "read"]

log = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    """Evaluate every model on one suite; prints a table and appends its results to a file. Exit code 1: some tasks failed."""
    parser = _parser()
    # argparse takes a key=value that follows a flag for nothing
    arguments, rest = parser.parse_known_intermixed_args(argv)
    arguments.overrides = [*arguments.overrides, *rest]
    for item in arguments.overrides:
        if item.startswith("-"):
            parser.error(f"unknown option {item!r}; settings are given as TASK.FIELD=value")
        if not re.match(r"[\w.-]+=", item):
            named = " ".join(f"--model {name}" for name in [*arguments.model, item])
            parser.error(f"{item!r} is no setting TASK.FIELD=value; if it is another model, write {named}")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if arguments.suite in FUNCTIONS:
        return _run_function(arguments, parser)
    if arguments.ranks > 1:
        from ..train.launch import launch
        from .runner import check

        if "RANK" in os.environ:
            parser.error(f"--ranks {arguments.ranks} within torchrun, which has started the ranks already; leave --ranks out")
        check(_asked(arguments), _context(arguments, several=False))  # what is missing is told once
        first, *others = _without_ranks(sys.argv[1:] if argv is None else argv)
        return launch(first, others, arguments.ranks, module="radio_distill.eval")
    return _run_card(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m radio_distill.eval", description=main.__doc__, allow_abbrev=False)
    suites = f"{', '.join([*suite_names(), *FUNCTIONS])}; or a card of yours, FILE.yaml (docs/eval.md)"
    parser.add_argument("--suite", type=_suite, required=True, help=suites)
    forms = "run folder, checkpoint, export, teacher:NAME, timm:NAME, hf:FOLDER, random:FOLDER, package.module:function"
    parser.add_argument("--model", action="append", required=True, help=f"{forms}; may be repeated")
    parser.add_argument("--data", help="folder that holds the data sets (docs/eval.md tells the layouts), or toy; "
                        "fidelity: folder of images, or shards (default: toy scenes)")  # fmt: skip
    parser.add_argument("--preset", help="paper, fast or smoke (default: paper; for toy data smoke)")
    parser.add_argument("--task", action="append", help="only this task of the suite; may be repeated")
    parser.add_argument("--limit", type=_positive, help="at most this many items of every data set, for a quick look")
    parser.add_argument("--resolution", type=_positive, help="side in pixels at which models run (default: each task's own)")
    parser.add_argument("--seed", type=int, help="seed of whatever is drawn at random (0)")
    parser.add_argument("--batch", type=_positive, help="images of one forward pass (32)")
    parser.add_argument("--workers", type=int, help="processes that read images (default: by the machine)")
    parser.add_argument(
        "--save-minutes", type=_minutes, help="how often a probe in training is saved, so that a killed command can resume (5)"
    )
    parser.add_argument(
        "--ranks", type=_positive, default=1, help="processes to start on this machine (1); or use torchrun, srun"
    )
    parser.add_argument("--dry-run", action="store_true", help="tell what was found and how long it would take, and stop")
    parser.add_argument(
        "--out", type=Path, default=Path("results.jsonl"), help="file that results are appended to (default: %(default)s)"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="TASK.FIELD=value", help="fields of the suite's card, as numbered there"
    )
    return parser


def _suite(text: str) -> str:
    names = [*suite_names(), *FUNCTIONS]
    if text not in names and not text.endswith((".yaml", ".yml")):
        raise argparse.ArgumentTypeError(f"no suite {text!r}{did_you_mean(text, names)}; or the path of a card, FILE.yaml")
    if Path(text).stem in FUNCTIONS and text not in names:
        raise argparse.ArgumentTypeError(f"{text!r} has the name of the suite {Path(text).stem}; rename the file")
    return text


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number of at least 1")
    return int(text)


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1e6:
        raise argparse.ArgumentTypeError(f"{text!r}, expected minutes; 0: after every step")
    return value


def _run_card(arguments: argparse.Namespace) -> int:
    """A suite of tasks, in this process or as one of several ranks."""
    from .runner import check, describe, run_suite

    suite = _asked(arguments)
    several = _of_several(os.environ)
    context = _context(arguments, several)
    try:
        if arguments.dry_run:
            check(suite, context)
            for line in describe(suite, arguments.model, context):
                _say(line, context)
            return 0
        outcome = run_suite(suite, arguments.model, context, arguments.out)
        if suite.preset == CUSTOM:
            _say("preset custom: these numbers cannot be compared with published ones", context)
        _say(table(outcome.results), context)
        for failure in outcome.failures if context.ranks.rank == 0 else ():
            print(f"error: {failure}", file=sys.stderr)
        context.ranks.barrier()  # a rank that ends with a failure ends the others
        return 1 if outcome.failures else 0
    finally:
        if several:
            from ..train.distributed import shutdown

            shutdown()


def _asked(arguments: argparse.Namespace) -> Suite:
    """The suite with its preset and tasks. Raises RadioDistillError when `--data` is no folder."""
    from .suites import load_suite, presets_of

    quick = arguments.data == "toy" and "smoke" in presets_of(arguments.suite)
    preset = arguments.preset or ("smoke" if quick else PAPER)
    suite = load_suite(arguments.suite, preset, arguments.overrides).only(arguments.task or [])
    if arguments.data is None and any(task.reads_data for task in suite.tasks.values()):
        raise RadioDistillError("--data is missing; expected the folder that holds the data sets, or toy for generated scenes")
    if arguments.data not in (None, "toy") and not Path(arguments.data).is_dir():
        raise RadioDistillError(f"--data {arguments.data} is no folder; expected the one that holds the data sets, or toy")
    return suite


def _context(arguments: argparse.Namespace, several: bool) -> Context:
    import torch
    import torch.distributed as dist

    from ..paths import cache_dir
    from ..train.distributed import exact_float32
    from .features import ALONE, FeatureCache, Ranks
    from .task import Context

    exact_float32()
    device, ranks = torch.device("cuda" if torch.cuda.is_available() else "cpu"), ALONE
    if several:
        from ..train.distributed import init

        world = init()
        device, ranks = world.device, Ranks(world.rank, world.size, cast(Callable[[], None], dist.barrier))
        if world.rank:
            logging.getLogger().setLevel(logging.WARNING)  # the first rank says what is done
    workers = arguments.workers
    if workers is None:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world))  # ranks of this machine
        workers = 0 if arguments.data == "toy" else min(8, (os.cpu_count() or 1) // here)
    return Context(
        root=arguments.data or "none", device=device, cache=FeatureCache(cache_dir() / "features"), limit=arguments.limit,
        resolution=arguments.resolution, batch=arguments.batch or 32, workers=workers, seed=arguments.seed or 0, ranks=ranks,
        pictures=arguments.out.parent / "eval_pictures" / Path(arguments.suite).stem,
        probes=cache_dir() / "probes", save_s=60 * (5 if arguments.save_minutes is None else arguments.save_minutes),
    )  # fmt: skip


def _of_several(environment: os._Environ[str]) -> bool:
    """This process is one of several: torchrun, srun or `--ranks` has started it."""
    return any(
        name in environment and int(environment.get(size, 1)) > 1
        for name, size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))
    )


def _say(text: str, context: Context) -> None:
    if context.ranks.rank == 0:
        print(text, flush=True)


def _without_ranks(argv: Sequence[str]) -> list[str]:
    kept = list(argv)
    while "--ranks" in kept:
        at = kept.index("--ranks")
        del kept[at : at + 2]
    return [item for item in kept if not item.startswith("--ranks=")]


def _run_function(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    run, options = FUNCTIONS[arguments.suite]
    for option in ("data", "preset", "task", "limit", "resolution", "seed", "batch", "workers", "save_minutes", "dry_run"):
        if getattr(arguments, option) and option not in options:
            parser.error(f"--{option.replace('_', '-')} has no effect in suite {arguments.suite}; leave it out")
    if arguments.overrides:
        parser.error(
            f"{arguments.overrides[0]!r} has no effect: suite {arguments.suite} has no card whose fields could be set; leave it out"
        )
    if arguments.ranks > 1 or _of_several(os.environ):
        parser.error(f"suite {arguments.suite} runs in one process; leave out --ranks, torchrun or srun")
    print(run(arguments))
    return 0


def _toy(arguments: argparse.Namespace) -> str:
    from .models import load_model
    from .toy import ToyProtocol, evaluate

    protocol = ToyProtocol() if arguments.limit is None else ToyProtocol(train=arguments.limit, test=arguments.limit)
    return _each(arguments, lambda name: evaluate(load_model(name), name, protocol, resolution=arguments.resolution))


def _fidelity(arguments: argparse.Namespace) -> str:
    """Upsamplers, and students beside the teachers that their heads predict."""
    from ..runs import artifact_of

    names = list(dict.fromkeys(arguments.model))
    teachers = [name.removeprefix("teacher:") for name in names if name.startswith("teacher:") and "+featsharp:" not in name]
    left = [name for name in names if name.removeprefix("teacher:") not in teachers]
    students = [name for name in left if name.startswith("random:") or artifact_of(Path(name)) == "student"]
    upsamplers = [name for name in left if name not in students]
    for name in upsamplers:
        if "+featsharp:" not in name and not Path(name).exists():
            raise RadioDistillError(
                f"model {name!r}: fidelity is measured of upsamplers and students; expected the folder of a run or an export, "
                "random:RUN, or teacher:CARD+featsharp:FOLDER"
            )
    if not left:
        raise RadioDistillError(
            "fidelity of a teacher alone: it is what others are compared with; name a student or an upsampler"
        )
    if arguments.resolution and upsamplers:
        raise RadioDistillError(
            f"--resolution has no effect on the upsampler {upsamplers[0]}, which has its teacher's size; leave it out"
        )
    tables = [_upsamplers(arguments, upsamplers)] if upsamplers else []
    return "\n\n".join([*tables, _heads(arguments, students, teachers)] if students else tables)


def _heads(arguments: argparse.Namespace, students: Sequence[str], teachers: Sequence[str]) -> str:
    import torch

    from ..data.held_out import TOY, HeldOut
    from ..network.student import Student
    from .heads import SUITE, HeadsProtocol, cards_for, left_to_measure, measure_heads, sizes_of
    from .models import open_model

    protocol = HeadsProtocol() if arguments.limit is None else HeadsProtocol(images=arguments.limit)
    data, labels = HeldOut(arguments.data or TOY, protocol.images), []
    for name in students:
        opened = open_model(name, device="cuda" if torch.cuda.is_available() else "cpu")
        assert isinstance(opened.model, Student)
        cards, sizes = cards_for(opened.model, opened.label, teachers), sizes_of(name, arguments.resolution)
        labels.append(opened.label)
        for one in left_to_measure(opened, cards, sizes, read(arguments.out), data, protocol):
            _kept(arguments, list(measure_heads(opened, cards, one, data, protocol)))
    return table([r for r in read(arguments.out) if r.suite == SUITE and r.model in labels])


def _upsamplers(arguments: argparse.Namespace, names: Sequence[str]) -> str:
    import torch

    from ..data.held_out import TOY, HeldOut
    from ..upsamplers.folder import named_upsampler
    from .fidelity import FidelityProtocol, left_to_measure, measure, measured_of, to_results
    from .fidelity_tables import render

    protocol = FidelityProtocol() if arguments.limit is None else FidelityProtocol(images=arguments.limit)
    data = HeldOut(arguments.data or TOY, protocol.images)
    models = {name: named_upsampler(name) for name in names}
    left = left_to_measure(models, read(arguments.out), data, protocol)
    for row in measure(left, data, protocol, device="cuda" if torch.cuda.is_available() else "cpu"):
        log.info("fidelity of %s: %.3f", row.model, row.values["fidelity"])
        _kept(arguments, to_results([row], data, protocol))
    rows = {row.model: row for row in measured_of(read(arguments.out))}
    return render([rows[name] for name in models])


def _vlm(arguments: argparse.Namespace) -> str:
    from .vlm import evaluate

    options = {"data": arguments.data, "limit": arguments.limit, "tasks": arguments.task or (), "batch": arguments.batch or 8}
    return _each(arguments, lambda name: evaluate(name, **options))


def _each(arguments: argparse.Namespace, measure: Callable[[str], Sequence[Result]]) -> str:
    """The table of what `measure` gives for every model."""
    return table([r for name in arguments.model for r in _kept(arguments, measure(name))])


def _kept(arguments: argparse.Namespace, results: Sequence[Result]) -> Sequence[Result]:
    """The results, when they have been written: what has been measured stays, whatever happens to the next model."""
    append(arguments.out, results)
    return results


Function = Callable[[argparse.Namespace], str]
"""Measures, writes results as they come, and returns the tables that are printed."""

FUNCTIONS: dict[str, tuple[Function, tuple[str, ...]]] = {
    "toy": (_toy, ("limit", "resolution")),
    "fidelity": (_fidelity, ("limit", "data", "resolution")),
    "vlm": (_vlm, ("limit", "data", "task", "batch")),
}
"""Suites that are no cards, with the options that they have."""


if __name__ == "__main__":
    from ..errors import run_and_report

    sys.exit(run_and_report(main))
