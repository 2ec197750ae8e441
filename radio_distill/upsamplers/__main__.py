"""One rank of an upsampler's training: `python -m radio_distill.upsamplers RECIPE [key=value ...]`, started by Slurm, torchrun or the CLI."""

import sys

from ..train import preempt

preempt.listen()  # before torch is imported: a signal during the imports would kill the job


def main(argv: list[str]) -> int:
    """Train; returns 0 when the run is finished, 75 when it was asked to stop and has saved."""
    from ..train.__main__ import run_rank

    def train() -> int:
        from ..config.load import load_upsampler_recipe
        from .train import train_upsampler

        return train_upsampler(load_upsampler_recipe(argv[0], argv[1:]))

    return run_rank(train)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
