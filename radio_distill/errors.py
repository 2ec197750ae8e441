"""Errors whose message is meant for the user: what is wrong, what was expected, what to do."""

__all__ = ["RadioDistillError", "RecipeError", "CardError", "DataError", "TeacherError", "CheckpointError", "TrainingError"]


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
