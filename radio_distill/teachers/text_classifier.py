"""A classifier in place of a text tower: a text stands for the class that it names, as the row of the classifier's matrix.

Classes that share a name (`missile` and `sunglasses` twice among ImageNet's) are one vector, the mean of their rows.
Zero-shot tasks then compare summaries with these rows by cosine, without the classifier's bias.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..config.cards import TeacherCard
from ..errors import CardError
from .text import fill
from .text_tower import TextTower, build, canonicalize, make_tokenizer
from .weights import read

__all__ = ["from_card"]


def from_card(card: TeacherCard) -> TextTower:
    """The rows of the tensor `text.model` in the card's source. Raises CardError when it is not there or its rows are not the classes."""
    from open_clip import IMAGENET_CLASSNAMES

    assert card.text is not None
    state, name, classes = read(card), card.text.model, card.text.classes or tuple(IMAGENET_CLASSNAMES)
    if name not in state or state[name].ndim != 2:
        matrices = [key for key, x in state.items() if x.ndim == 2]
        raise CardError(
            f"card {card.name!r}: text.model is {name!r}, expected the classifier's matrix in {card.source}: {', '.join(matrices) or 'it has none'}"
        )
    matrix = state[name]
    if len(matrix) != len(classes):
        named = "text.classes names" if card.text.classes else "without text.classes they are ImageNet's"
        raise CardError(
            f"card {card.name!r}: {name} has {len(matrix)} rows, and {named} {len(classes)}; name every row in text.classes"
        )
    config = {"classes": list(classes), "width": matrix.shape[1]}
    net = build("classifier", config)
    fill(f"classifier of {card.name!r} ({card.source})", net, {"weight": _of_one_name_together(matrix.float(), classes)})
    try:
        return TextTower("classifier", config, net, make_tokenizer("classifier", config, "", net))
    except ValueError as error:
        raise CardError(f"card {card.name!r}: text.classes: {error}") from error


def _of_one_name_together(matrix_NC: Tensor, classes: Sequence[str]) -> Tensor:
    names = [canonicalize(name) for name in classes]
    rows = {name: [i for i, other in enumerate(names) if other == name] for name in dict.fromkeys(names)}
    return torch.stack([matrix_NC[rows[name]].mean(0) for name in names])
