"""One rank of a training: `python -m radio_distill.train RECIPE [key=value ...]`, started by Slurm, torchrun or the CLI."""

import logging
import os
import sys
from collections.abc import Callable

from . import preempt

preempt.listen()  # before torch is imported: a signal during the imports would kill the job


def main(argv: list[str]) -> int:
    """Train; returns 0 when the run is finished, 75 when it was asked to stop and has saved."""

    def train() -> int:
        from ..config.load import load_recipe
        from ..distill.loop import train as fit

        return fit(load_recipe(argv[0], argv[1:]))

    return run_rank(train)


def run_rank(train: Callable[[], int]) -> int:
    """Run a training in this process; only rank 0 logs more than warnings."""
    from ..errors import run_and_report

    is_main = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
    logging.basicConfig(level=logging.INFO if is_main else logging.WARNING, format="%(message)s", stream=sys.stderr)
    code = run_and_report(train)
    preempt.ignore()
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
