"""Teacher cards: the facts about one frozen model, as one YAML file under `teachers/`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from ..loaders import is_named
from .document import KeyPath, Problem
from .numbers import Free, Mean, Positive, Scale, Side, Std

__all__ = [
    "CUSTOM",
    "FolderName",
    "Loader",
    "Pool",
    "name_problems",
    "licence_note",
    "licence_notes",
    "TeacherCard",
    "TeacherInput",
    "TeacherOutput",
    "TextTower",
]


def _named(value: str) -> str:
    if not is_named(value):
        raise PydanticCustomError("loader", "package.module:name")
    return value


Loader = Annotated[str, AfterValidator(_named)]
"""`package.module:name` of a function of the user's (loaders.py)."""


FolderName = Annotated[str, Field(pattern=r"^\w[\w .+-]{0,99}$")]
"""Of a recipe or a card: may hold a dot or a space, but begins with neither and stays in its folder."""


class Fields(BaseModel):
    """Base of everything read from YAML: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True)


class TeacherInput(Fields):
    size: Side
    """Side in pixels the teacher was trained for and is run at by default."""
    patch: Side
    """Side of a patch in pixels."""
    mean: tuple[Mean, Mean, Mean]
    """Per-channel mean of RGB in [0, 1]."""
    std: tuple[Std, Std, Std]
    """Per-channel standard deviation of RGB in [0, 1]."""
    resizable: bool = False
    """True when any multiple of `patch` is a good input; False when only `size` is."""

    @property
    def shape(self) -> tuple[int, int]:
        """Size and patch."""
        return self.size, self.patch


class Pool(Fields):
    """An attention-pooling head as SigLIP's (MAP): a learned query attends to all tokens, then an MLP. It has the tokens' width."""

    heads: Positive
    """Attention heads; they divide the width."""
    mlp: Positive
    """Hidden width of its MLP."""
    gelu: Literal["tanh", "erf"] = "tanh"
    """How its GELU is computed (SigLIP: by tanh)."""
    eps: Scale = 1e-6
    """Of its LayerNorm."""


class TeacherOutput(Fields):
    summary: Positive | None
    """Width of the summary vector; null when the teacher has none."""
    features: Positive
    """Channels of the feature map."""
    pool: Pool | None = None
    """The head that makes the summary out of the map's tokens, where there is one (`summary: through_head` in a recipe)."""


class TextTower(Fields):
    kind: str
    """`open_clip`, `transformers` or `toy`: which library holds the text encoder that matches the summary. `classifier`: there is
    none, and a text stands for the class that it names."""
    model: str
    """The library's name of the model whose text encoder belongs to the summary. `classifier`: the name of the tensor in the card's
    source that turns a summary into classes, (classes, width of the summary)."""
    pretrained: str | None = None
    """open_clip's pretrained tag, where it has one."""
    classes: tuple[str, ...] = ()
    """`classifier`: what its rows mean, in their order; empty: the 1,000 classes of ImageNet."""


CUSTOM = "custom"
"""The family of teachers that a `loader` builds."""


class TeacherCard(Fields):
    name: FolderName
    """Short name; the file is `teachers/NAME.yaml`."""
    family: str = CUSTOM
    """`open_clip`, `timm`, `transformers`, `radio`, `run`, `toy`, or `custom` together with `loader`."""
    source: str = ""
    """Where the weights come from: a hub id, `timm:NAME`, or a local path (`${VAR}/...` is expanded). What a `loader` makes of it
    is its own affair; it may be left out there."""
    revision: str | None = None
    """Commit or tag of a hub repository."""
    licence: str
    """Licence of the weights, as its holder names it."""
    licence_url: str | None = None
    """Where the licence text stands."""
    input: TeacherInput
    output: TeacherOutput
    text: TextTower | None = None
    """The text tower that makes the teacher's adaptor usable for zero-shot; null when there is none."""
    params: Free = {}
    """Facts that only this family reads (constructor name, number of prefix tokens, ...)."""
    loader: Loader | None = None
    """`package.module:function` called as function(card, weights), for a family that is not built in (docs/teachers.md)."""
    note: str = ""
    """One line for `radio-distill list`."""


def licence_note(name: str, licence: str) -> str | None:
    """What has to be said of a licence that nobody has stated; None where one is named."""
    if licence.strip().lower() not in ("", "-", "?", "n/a", "none", "not known", "not stated", "unknown", "unlicensed"):
        return None
    return f"the licence of {name} is not known ({licence or 'empty'}): nothing is allowed until its makers say so; ask them before you use it"


def licence_notes(cards: Mapping[str, TeacherCard]) -> list[str]:
    """The notes that a recipe's teachers, by their names in it, call for."""
    return [note for name, card in cards.items() if (note := licence_note(name, card.licence))]


def name_problems(what: str, names: Iterable[str], path: KeyPath) -> Iterator[Problem]:
    """Keys of a recipe (of students, teachers, partitions) that are no file name everywhere, or cannot be reached by a dotted key."""
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", name):
            yield Problem(
                f"{what} {name[:100]!r}: its name is that of a folder; use letters, digits, - and _ (at most 100)",
                (*path, name),
            )
