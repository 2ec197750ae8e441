"""`python -m radio_distill.eval --suite SUITE --model RUN [--model ...]`: tables, and one line per result in a file.

toy       students and teachers on generated scenes
fidelity  trained upsamplers on held-out images
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from ..types import Result

__all__ = ["main", "table", "append", "read"]


def main(argv: list[str] | None = None) -> int:
    """Evaluate every model on one suite; prints a table and appends `results.jsonl`."""
    parser = argparse.ArgumentParser(prog="python -m radio_distill.eval", description=main.__doc__)
    parser.add_argument("--suite", choices=SUITES, required=True)
    parser.add_argument(
        "--model",
        action="append",
        required=True,
        help="run folder, checkpoint or export; toy: also teacher:NAME, random:FOLDER; may be repeated",
    )
    parser.add_argument("--resolution", type=int, help="toy: side in pixels at which students run (default: the scenes' own)")
    parser.add_argument("--data", help="fidelity: folder of images, or shards; the first in sorted order (default: toy scenes)")
    parser.add_argument("--limit", type=int, help="at most this many images, for a quick look")
    parser.add_argument(
        "--out", type=Path, default=Path("results.jsonl"), help="file that results are appended to (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    for option, suite in (("resolution", "toy"), ("data", "fidelity")):
        if getattr(arguments, option) is not None and arguments.suite != suite:
            parser.error(f"--{option} has no effect in suite {arguments.suite}, only in {suite}; leave it out")
    results, text = SUITES[arguments.suite](arguments)
    append(arguments.out, results)
    print(text)
    return 0


def _toy(arguments: argparse.Namespace) -> tuple[list[Result], str]:
    from .models import load_model
    from .toy import ToyProtocol, evaluate

    protocol = ToyProtocol() if arguments.limit is None else ToyProtocol(train=arguments.limit, test=arguments.limit)
    results = [
        r for name in arguments.model for r in evaluate(load_model(name), name, protocol, resolution=arguments.resolution)
    ]
    return results, table(results)


def _fidelity(arguments: argparse.Namespace) -> tuple[list[Result], str]:
    import torch

    from ..upsamplers.folder import load_upsampler
    from .fidelity import FidelityProtocol, measure, to_results
    from .fidelity_tables import render
    from .held_out import TOY, HeldOut

    protocol = FidelityProtocol() if arguments.limit is None else FidelityProtocol(images=arguments.limit)
    data = HeldOut(arguments.data or TOY, protocol.images)
    models = {name: load_upsampler(name) for name in dict.fromkeys(arguments.model)}
    measured = measure(models, data, protocol, device="cuda" if torch.cuda.is_available() else "cpu")
    return to_results(measured, data, protocol), render(measured)


SUITES: dict[str, Callable[[argparse.Namespace], tuple[list[Result], str]]] = {"toy": _toy, "fidelity": _fidelity}


def append(path: Path, results: list[Result]) -> None:
    """Add results to a file, one JSON object per line, in one write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as f:
        f.write("".join(json.dumps(asdict(r)) + "\n" for r in results))
        f.flush()
        os.fsync(f.fileno())


def read(path: Path) -> list[Result]:
    """The results of a file."""
    return [Result(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def table(results: list[Result]) -> str:
    """Models as rows, tasks as columns, in the order they came; '-' where a model has no such result."""
    columns = list(dict.fromkeys(f"{r.task} {r.metric}" for r in results))
    rows: dict[str, dict[str, str]] = {}
    for r in results:
        rows.setdefault(f"{r.model} @{r.resolution}", {})[f"{r.task} {r.metric}"] = f"{r.value:.2f}"
    width = max(map(len, rows), default=5)
    lines = ["model".ljust(width) + "".join(f"  {c:>18}" for c in columns)]
    lines += [name.ljust(width) + "".join(f"  {values.get(c, '-'):>18}" for c in columns) for name, values in rows.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    from ..cli import run_and_report

    sys.exit(run_and_report(main))
