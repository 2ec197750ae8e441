"""Errors whose message is meant for the user (what is wrong, what was expected, what to do), and how a command reports them."""

import logging
import os
import sys
from collections.abc import Callable

__all__ = [
    "RadioDistillError",
    "RecipeError",
    "CardError",
    "DataError",
    "TeacherError",
    "CheckpointError",
    "TrainingError",
    "run_and_report",
]


class RadioDistillError(Exception):
    """Base of every error that the user can mend; the command line prints it without a traceback."""


class RecipeError(RadioDistillError):
    """A recipe, an override or the batch arithmetic that follows from them does not hold."""


class CardError(RadioDistillError):
    """A teacher card or an eval card is wrong or unknown."""


class DataError(RadioDistillError):
    """Shards or folders are missing, unreadable, too few, or too many samples are bad."""


class TeacherError(RadioDistillError):
    """A teacher's weights are missing or do not fit, or it was given an image it cannot take."""


class CheckpointError(RadioDistillError):
    """A run folder or checkpoint is missing, incomplete, or does not fit this job."""


class TrainingError(RadioDistillError):
    """The training itself failed: a non-finite value, a lost rank, a full disk."""


def run_and_report(command: Callable[[], int], *, verbose: bool = False) -> int:
    """Call `command`; an error that the user can mend is printed without a traceback (`verbose`: with) and gives 2."""
    try:
        return command()
    except RadioDistillError as error:
        if verbose:
            logging.getLogger(__name__).exception("traceback of the error below")
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130
    except BrokenPipeError:  # the reader of our output (`| head`) went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
