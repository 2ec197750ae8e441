"""`radio-distill doctor` of a VLM's recipe: are its student, its language model and its conversations here? Asks no network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .config.vlm_recipe import NO_CONVERSATIONS, FromParts, VlmRecipe
from .errors import RadioDistillError
from .paths import expand
from .student.load import load_student
from .types import Finding
from .vlm.conversations import examine, summary
from .vlm.model import vlm_folder
from .vlm.tiles import open_image

__all__ = ["examine_vlm"]


def examine_vlm(recipe: VlmRecipe) -> Iterator[Finding]:
    """What it starts from, and its conversations with the first and the last image."""
    start = recipe.start
    if isinstance(start, FromParts):
        yield _student(start.student)
        lm = Path(expand(start.lm)) / "config.json"
        here = bool(start.lm) and lm.is_file()
        advice = f"no {lm}; name the folder of a causal language model as transformers saves it: start.lm=FOLDER"
        yield Finding("language model", str(lm.parent) if here else advice, missing=not here)
    else:
        yield _stage_before(start.source)
    if not recipe.data.sources:
        yield Finding("conversations", NO_CONVERSATIONS, missing=True)
    for name, source in recipe.data.sources.items():
        try:
            found, bad = examine(name, source)
            seen = [c for c in found if c.image is not None]
            for c in (*seen[:1], *seen[-1:]):
                assert c.image is not None
                open_image(c.image(), c.key)
            text = f"{len(found)}, {len(seen)} with an image; its first and last can be read"
            text += f"; {summary(bad, len(found) + len(bad))}" if bad else ""
            too_many = len(bad) > recipe.data.max_bad * (len(found) + len(bad)) or not found
            yield Finding(f"conversations {name}", text, missing=too_many)
        except (RadioDistillError, OSError) as error:
            yield Finding(f"conversations {name}", str(error), missing=True)


def _student(path: str) -> Finding:
    if not path or not Path(expand(path)).exists():
        return Finding("student", f"no file or folder {path!r}; name a run or an export: start.student=FOLDER", missing=True)
    try:
        student = load_student(expand(path))
    except RadioDistillError as error:
        return Finding("student", str(error), missing=True)
    return Finding("student", f"{path}: patch {student.patch_size}, width {student.arch.trunk.embed_dim}")


def _stage_before(path: str) -> Finding:
    try:
        return Finding("stage before", str(vlm_folder(path)))
    except RadioDistillError as error:
        return Finding("stage before", f"{error}; train it first, and name its run: start.source=FOLDER", missing=True)
