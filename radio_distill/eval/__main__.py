"""`python -m radio_distill.eval --suite toy --model RUN [--model teacher:NAME ...]`: one table, one line per result in a file."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from ..types import Result

__all__ = ["main", "table", "append", "read"]

SUITES = ("toy",)


def main(argv: list[str] | None = None) -> int:
    """Evaluate every model on one suite; prints a table and appends `results.jsonl`."""
    parser = argparse.ArgumentParser(prog="python -m radio_distill.eval", description=main.__doc__)
    parser.add_argument("--suite", choices=SUITES, required=True)
    parser.add_argument(
        "--model", action="append", required=True, help="run folder, checkpoint, export, or teacher:NAME; may be repeated"
    )
    parser.add_argument("--resolution", type=int, help="side in pixels at which students run (default: the scenes' own)")
    parser.add_argument("--limit", type=int, help="at most this many scenes, for a quick look")
    parser.add_argument(
        "--out", type=Path, default=Path("results.jsonl"), help="file that results are appended to (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    from .models import load_model
    from .toy import ToyProtocol, evaluate

    protocol = ToyProtocol() if arguments.limit is None else ToyProtocol(train=arguments.limit, test=arguments.limit)
    results = [
        r for name in arguments.model for r in evaluate(load_model(name), name, protocol, resolution=arguments.resolution)
    ]
    append(arguments.out, results)
    print(table(results))
    return 0


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
