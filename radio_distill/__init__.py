"""radio_distill: distil several frozen vision teachers into one ViT student (agglomerative models, RADIO style)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .config.load import load_card
    from .student.load import load_student
    from .teachers.base import load_teacher
    from .upsamplers.folder import load_upsampler
    from .upsamplers.upsampled import Upsampled

__all__ = ["Upsampled", "__version__", "load_card", "load_student", "load_teacher", "load_upsampler"]

LIBRARY = {
    "Upsampled": "upsamplers.upsampled",
    "load_card": "config.load",
    "load_student": "student.load",
    "load_teacher": "teachers.base",
    "load_upsampler": "upsamplers.folder",
}


def __getattr__(name: str) -> Any:
    """Import a name of the library when it is used, so that `import radio_distill` and `radio-distill --help` are instant."""
    if name not in LIBRARY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{LIBRARY[name]}", __name__), name)
