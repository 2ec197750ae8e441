"""Micro-batches of conversations: which samples a step has is a function of (seed, step), whoever reads them.

Shapes: B conversations, N tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..config.vlm_recipe import VlmRecipe
from ..errors import DataError, RecipeError
from ..train.distributed import World
from .conversations import Conversation
from .model import Vlm
from .prompt import IGNORE, IMAGE, Encoded, encode, with_images
from .tiles import open_image
from .tower import Pictures, join

__all__ = ["TextBatch", "TextStreams"]


log = logging.getLogger(__name__)

AT_LEAST = 100
"""Conversations read before too many bad ones among them end the run."""
TRIES = 20
"""Conversations tried in the place of one that cannot be used."""


class Sample(NamedTuple):
    """A conversation as tokens and pixels."""

    key: str
    encoded: Encoded
    pictures: Pictures
    """Of its image; none without one."""
    left_out: tuple[str, ...] = ()
    """What was wrong with those that it takes the place of."""


@dataclass(frozen=True)
class TextBatch:
    """Some conversations of one step, padded to the longest."""

    keys: tuple[str, ...]
    tokens_BN: Tensor
    mask_BN: Tensor
    """int64, 0 where there is padding."""
    labels_BN: Tensor
    """The token at each place that is learned there, else IGNORE."""
    pictures: Pictures
    """Of all their images."""
    left_out: tuple[str, ...] = ()
    """What was wrong with conversations that could not be used."""

    def to(self, device: torch.device) -> TextBatch:
        """The same batch on `device`."""
        return self._with(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> TextBatch:
        """The same batch where a GPU copies it from while the host goes on; a DataLoader looks for this method."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> TextBatch:
        tokens, mask, labels = map(change, (self.tokens_BN, self.mask_BN, self.labels_BN))
        return TextBatch(self.keys, tokens, mask, labels, self.pictures.each(change), self.left_out)

    @property
    def counts(self) -> Tensor:
        """Tokens that are predicted, and pictures, (2,)."""
        predicted = (self.labels_BN[:, 1:] != IGNORE).sum()
        return torch.stack([predicted, torch.full_like(predicted, len(self.pictures))])


class TextStreams:
    """This rank's micro-batches of consecutive steps. Where they stand follows from the step, so nothing is saved."""

    def __init__(self, recipe: VlmRecipe, vlm: Vlm, conversations: Sequence[Conversation], world: World) -> None:
        self.names: tuple[str, ...] = ()
        self.positions: dict[str, Any] = {}
        self._recipe, self._world = recipe, world
        self._samples = Samples(recipe, vlm, conversations)
        self._batches: Iterator[TextBatch] = iter(())
        self._read = 0
        self._left_out: set[str] = set()
        per_rank, rest = divmod(recipe.samples, world.size)
        self._size = min(recipe.micro_batch or per_rank, per_rank)
        if rest or per_rank % self._size:
            raise RecipeError(
                f"samples={recipe.samples} are not divisible into {world.size} ranks of micro-batches of {self._size or 1}; "
                f"use samples={max(1, round(recipe.samples / world.size / max(1, self._size))) * world.size * max(1, self._size)}"
            )
        self.micro_steps = per_rank // self._size

    def open(self, positions: dict[str, Any], *, step: int = 0) -> None:
        """Start reading at a step, from which the place in the data follows."""
        workers = self._recipe.engine.workers
        loader = DataLoader(
            self._samples,
            batch_sampler=list_batches(self._recipe, len(self._samples), self._world, self._size, step),  # type: ignore[arg-type]
            num_workers=workers,
            collate_fn=partial(collate, pad=self._samples.pad),
            pin_memory=self._world.device.type == "cuda",
        )
        self._batches = iter(loader)

    def next(self, device: torch.device) -> list[TextBatch]:
        """The micro-batches of the next step, on the device."""
        return [self._watched(next(self._batches)).to(device) for _ in range(self.micro_steps)]

    def _watched(self, batch: TextBatch) -> TextBatch:
        """Name what was left out. Raises DataError when it was too much."""
        self._read += len(batch.keys)
        for text in batch.left_out:
            if text not in self._left_out:
                log.warning("left out: %s", text)
        self._left_out.update(batch.left_out)
        allowed = self._recipe.data.max_bad
        if batch.left_out and len(self._left_out) > allowed * max(AT_LEAST, self._read):
            raise DataError(
                f"{len(self._left_out)} of the {self._read} conversations read so far could not be used, more than data.max_bad="
                f"{allowed:g}; the last: {batch.left_out[-1]}"
            )
        return batch


def list_batches(recipe: VlmRecipe, total: int, world: World, size: int, start: int) -> list[list[int]]:
    """The samples of every micro-batch of this rank from step `start` on; every epoch is a permutation of its own."""
    per_rank = recipe.samples // world.size
    first, last = start * recipe.samples, recipe.optim.steps * recipe.samples
    epochs = range(first // total, -(-last // total))
    order = np.concatenate([np.random.default_rng([recipe.seed, e]).permutation(total) for e in epochs] or [np.empty(0, int)])
    order = order[first - (first // total) * total :][: last - first].reshape(-1, world.size, per_rank)
    mine = order[:, world.rank].reshape(-1, size)
    return [[int(i) for i in row] for row in mine]


class Samples(Dataset[Sample]):
    """Conversations as tokens and pixels."""

    def __init__(self, recipe: VlmRecipe, vlm: Vlm, conversations: Sequence[Conversation]) -> None:
        self._recipe, self._vlm, self._conversations = recipe, vlm, conversations
        self.pad: int = vlm.processor.tokenizer.pad_token_id
        if vlm.tower.num_tokens >= recipe.data.max_length:
            raise RecipeError(
                f"an image is {vlm.tower.tokens_text} and data.max_length is {recipe.data.max_length}: no place for an answer; "
                "use a smaller start.size, more start.unshuffle, or a larger data.max_length"
            )

    def __len__(self) -> int:
        return len(self._conversations)

    def __getitem__(self, index: int) -> Sample:
        """A conversation; where it cannot be used, the next one that can takes its place. Raises DataError when many cannot."""
        left_out: list[str] = []
        for number in range(index, index + min(TRIES, len(self))):
            conversation = self._conversations[number % len(self)]
            try:
                return self._sample(conversation)._replace(left_out=tuple(left_out))
            except DataError as error:
                left_out.append(str(error))
            except OSError as error:
                left_out.append(f"the image of conversation {conversation.key} cannot be read ({error})")
        raise DataError(left_out[-1])

    def _sample(self, c: Conversation) -> Sample:
        tower = self._vlm.tower
        pictures = self._vlm.no_pictures if c.image is None else self._vlm.pictures(open_image(c.image(), c.key), key=c.key)
        expected = 0 if c.image is None else tower.tokens_of(pictures)
        turns = with_images(c.turns, [] if c.image is None else [expected], key=c.key)
        encoded = encode(
            self._vlm.processor.tokenizer,
            turns,
            template=self._recipe.template,
            max_length=self._recipe.data.max_length,
            key=c.key,
        )
        if (found := encoded.ids.count(self._vlm.model.config.image_token_id)) != expected:
            raise DataError(
                f"conversation {c.key} has {found} tokens of its image, expected {expected}: it is cut after "
                f"{self._recipe.data.max_length}; put {IMAGE} at its beginning, or set a larger data.max_length"
            )
        return Sample(c.key, encoded, pictures)


def collate(samples: Sequence[Sample], *, pad: int) -> TextBatch:
    """Pad on the right."""
    length = max(len(s.encoded.ids) for s in samples)
    rows = [(s.encoded.ids, s.encoded.labels, length - len(s.encoded.ids)) for s in samples]
    return TextBatch(
        keys=tuple(s.key for s in samples),
        tokens_BN=torch.tensor([ids + [pad] * rest for ids, _, rest in rows]),
        mask_BN=torch.tensor([[1] * len(ids) + [0] * rest for ids, _, rest in rows]),
        labels_BN=torch.tensor([labels + [IGNORE] * rest for _, labels, rest in rows]),
        pictures=join([s.pictures for s in samples]),
        left_out=tuple(text for s in samples for text in s.left_out),
    )
