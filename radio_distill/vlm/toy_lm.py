"""The language model of a toy VLM: tiny, and taught to read before a student shows it anything.

A real VLM begins with a language model that knows words and answers questions. This one learns that from scenes in words:

    scene -> cells of a grid, each a bag of words (tree red row2 column3) -> their vectors -> the answers of a conversation

A cell stands where the token of an image will stand, so what is left for the projector is to say what the student sees in those words.
Shapes: B scenes, G cells, W words of a cell, N tokens, C channels.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..toyworld import CLASSES, ToySample, render, sample_scene
from .batches import Sample, collate
from .prompt import IGNORE, VICUNA, Encoded, Turn, encode
from .tower import Pictures
from .toy_questions import COLUMNS, LARGEST, SHORT, TRAIN_SEED, WHERE, ToyQuestion, converse

__all__ = ["INSTRUCTION", "STEPS", "write_toy_lm"]

log = logging.getLogger(__name__)

INSTRUCTION = "describe the image."
SPECIAL = ("<unk>", "<pad>", "<s>", "</s>")

SEED, SCENES, SIZE = 83_000, 3000, 48
"""Of what it reads about; no scene of a conversation or of a benchmark is among them."""
STEPS, BATCH, RATE, WARMUP = 1600, 24, 2e-3, 20
CLEAR = 3 / 4
"""Share of the steps in which no word is missing."""
MISSING, UNNAMED = 0.2, 0.5
"""Share of the words that are missing later, and of the classes that no cell of a picture says: a student sees small objects so."""
NOISE = 0.4
"""Standard deviation of what is added to a cell, whose channels have about 1."""

MOST_TOKENS = 1024
"""Of a conversation, with its image."""
GRID, WORDS = COLUMNS, 4
"""A student of patch 8 makes so many tokens a side of 96 px, with `unshuffle: 2`."""
COVERED = 0.16
"""Share of a cell from which on its object is named, and not the ground or the time of day."""
SKY = 2
"""Rows whose cells without an object say the time of day."""


def write_toy_lm(folder: Path, *, width: int = 128, depth: int = 3, seed: int = 0, steps: int = STEPS) -> None:
    """Save a Llama that has read for `steps` steps, and a tokenizer that knows the words of the toy world.

    steps: 0 leaves weights random; STEPS are needed until it finds a word of a question among the cells, which it does of a sudden.
    Weights begin at the scale of what they map, and words have unit variance: from Llama's own start (std 0.02, made for thousands
    of channels) attention stays flat so long that a toy learns what is in a whole image, but not where its objects are.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=depth,
        num_attention_heads=width // 32, max_position_embeddings=MOST_TOKENS, tie_word_embeddings=False, initializer_range=width**-0.5,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        torch.nn.init.normal_(model.model.embed_tokens.weight)
        _teach(model, tokenizer, steps, seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer() -> Any:
    """One token per word; made from the words of 500 scenes, which have all of them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    scenes = [sample_scene(TRAIN_SEED, i) for i in range(500)]
    texts = [INSTRUCTION, "USER: ASSISTANT:", LARGEST, SHORT, *(s.caption for s in scenes)]
    texts += [f"{question} {answer}" for s in scenes for question, answer in s.questions()]
    texts += [f"{WHERE} row{i} column{i}" for i in range(GRID)]
    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]", text)})
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(zip(("unk_token", "pad_token", "bos_token", "eos_token"), SPECIAL))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=VICUNA, **names)


def spell(sample: ToySample) -> list[tuple[str, ...]]:
    """The cells of a picture row by row, WORDS words each: class and colour, or twice the ground or the time of day; row and column."""
    objects, side = sample.scene.objects, len(sample.instances_HW) // GRID
    blocks = sample.instances_HW.reshape(GRID, side, GRID, side).transpose(0, 2, 1, 3).reshape(GRID, GRID, -1)
    cells: list[tuple[str, ...]] = []
    for row, column in np.ndindex(GRID, GRID):
        counts = np.bincount(blocks[row, column], minlength=1 + len(objects))[1:]
        found = objects[counts.argmax()]
        surroundings = sample.scene.time if row < SKY else sample.scene.ground
        what = (found.name, found.colour) if counts.max() >= COVERED * side**2 else (surroundings, surroundings)
        cells.append((*what, f"row{row}", f"column{column}"))
    return cells


def dialogue(questions: Sequence[ToyQuestion], tokenizer: Any) -> Encoded:
    """A conversation as tokens, with padding in the places of the cells, which stand where an image does."""
    turns = [turn for q in questions for turn in (Turn("user", q.question), Turn("assistant", q.answer))]
    turns[0] = Turn("user", f"{GRID**2 * tokenizer.pad_token} {turns[0].text}")
    return encode(tokenizer, turns, template="chat", max_length=MOST_TOKENS, key="toy")


def _teach(model: Any, tokenizer: Any, steps: int, seed: int) -> None:
    """All weights learn the answers, first from cells with all words, at RATE, then with some missing, at half of it; each down to 0 by a cosine."""
    if not steps:
        return
    samples = [render(SEED, i, size=SIZE) for i in range(min(SCENES, steps * BATCH))]
    cells_SGW = torch.tensor([[tokenizer.convert_tokens_to_ids(list(cell)) for cell in spell(s)] for s in samples])
    rng = np.random.default_rng(seed)
    clear = round(CLEAR * steps)
    for begin, end, rate in ((0, clear, RATE), (clear, steps, RATE / 2)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0, betas=(0.9, 0.99))
        order: list[int] = []
        for step in range(begin, end):
            if len(order) < BATCH:
                order = rng.permutation(len(samples)).tolist()
            drawn = [order.pop() for _ in range(BATCH)]
            vectors_BGC = _look(model, cells_SGW[drawn], tokenizer, missing=begin > 0)
            loss = _loss(model, vectors_BGC, [dialogue(converse(samples[i], rng), tokenizer) for i in drawn])
            share = (step - begin) / (end - begin)
            optimizer.param_groups[0]["lr"] = rate * min(1, (step - begin + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * share))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if (step + 1) % 100 == 0:
                log.info("the language model has read for %d of %d steps, loss %.3f", step + 1, steps, loss.item())


def _look(model: Any, cells_BGW: Tensor, tokenizer: Any, *, missing: bool) -> Tensor:
    """The cells as vectors (B, G, C): the sum of their words' over sqrt(WORDS), and noise."""
    kept_BGW = torch.ones(cells_BGW.shape)
    if missing:
        kept_BGW[..., :2] = (torch.rand(cells_BGW[..., :2].shape) >= MISSING).float()
        named = torch.zeros(len(tokenizer), dtype=torch.bool)
        named[tokenizer.convert_tokens_to_ids(list(CLASSES))] = True
        unnamed_BV = (torch.rand(len(cells_BGW), len(tokenizer)) < UNNAMED) & named
        kept_BGW *= ~unnamed_BV.gather(1, cells_BGW.flatten(1)).view_as(cells_BGW)
    words_BGWC = model.get_input_embeddings()(cells_BGW) * kept_BGW[..., None]
    vectors_BGC = words_BGWC.sum(2) / math.sqrt(WORDS)
    return vectors_BGC + NOISE * torch.randn_like(vectors_BGC)


def _loss(model: Any, vectors_BGC: Tensor, dialogues: Sequence[Encoded]) -> Tensor:
    """Mean cross-entropy of the tokens of all answers."""
    batch = collate([Sample("", d, Pictures(torch.empty(0))) for d in dialogues], pad=model.config.pad_token_id)
    first = dialogues[0].ids.index(model.config.pad_token_id)
    tokens_BNC = model.get_input_embeddings()(batch.tokens_BN)
    tokens_BNC = torch.cat([tokens_BNC[:, :first], vectors_BGC, tokens_BNC[:, first + GRID**2 :]], 1)
    out_BNC = model.model(inputs_embeds=tokens_BNC, attention_mask=batch.mask_BN, use_cache=False).last_hidden_state[:, :-1]
    targets_BN = batch.labels_BN[:, 1:]
    learned_BN = targets_BN != IGNORE
    return F.cross_entropy(model.lm_head(out_BNC[learned_BN]), targets_BN[learned_BN])
