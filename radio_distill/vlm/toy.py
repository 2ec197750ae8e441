"""Make the parts of a toy VLM (`radio-distill vlm toy OUT`): a tiny language model, and conversations about generated scenes.

Scenes are those of the toy world; images that questions are scored on are drawn from another seed (`HELD_OUT_SEED`).
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from ..files import appearing
from ..toyworld import render, sample_scene
from .prompt import VICUNA
from .toy_questions import LARGEST, SHORT, TRAIN_SEED, ask, converse

__all__ = ["write_toy", "write_toy_lm"]

log = logging.getLogger(__name__)


SPECIAL = ("<unk>", "<pad>", "<s>", "</s>")
INSTRUCTION = "describe the image."
CONVERSATIONS = 3
"""About each image, with its questions in another order each: every one is the first at times, as it is when it is asked alone."""


def write_toy(out: str | Path, *, count: int = 3000, size: int = 96, seed: int = TRAIN_SEED) -> None:
    """Write `out`/lm (`write_toy_lm`), images of `count` scenes of `size` pixels, captions.json and questions.json about them,
    and `out`/benchmarks (`write_copies`) about others.

    Both are in LLaVA's format: one caption, and CONVERSATIONS conversations of several questions, for each image. `out` appears when it is complete.
    Raises DataError when it exists.
    """
    from .toy_benchmarks import write_copies

    out = Path(out)
    if out.exists():
        raise DataError(f"{out} exists and is not overwritten; choose another folder or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    with appearing(out) as partial:
        (partial / "images").mkdir(parents=True)
        write_toy_lm(partial / "lm")
        _write_conversations(partial, count, size, seed)
        write_copies(partial / "benchmarks", count=min(60, count), size=size)
    log.info("wrote %s: lm, captions.json and questions.json about %d images", out, count)


def write_toy_lm(folder: Path, *, width: int = 128, depth: int = 3, seed: int = 0) -> None:
    """Save a Llama of random weights and a tokenizer that knows the words of the toy world.

    Weights keep the scale of what they map, and words have unit variance: from Llama's own start (std 0.02, made for thousands
    of channels) attention stays flat so long that a toy learns what is in a whole image, but not where its objects are.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=depth,
        num_attention_heads=width // 32, max_position_embeddings=1024, tie_word_embeddings=False, initializer_range=width**-0.5,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        torch.nn.init.normal_(model.model.embed_tokens.weight)
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer() -> Any:
    """One token per word; made from the words of 500 scenes, which have all of them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    scenes = [sample_scene(TRAIN_SEED, i) for i in range(500)]
    texts = [INSTRUCTION, "USER: ASSISTANT:", LARGEST, SHORT, *(s.caption for s in scenes)]
    texts += [f"{question} {answer}" for s in scenes for question, answer in s.questions()]
    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]", text)})
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(zip(("unk_token", "pad_token", "bos_token", "eos_token"), SPECIAL))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=VICUNA, **names)


def _write_conversations(folder: Path, count: int, size: int, seed: int) -> None:
    from PIL import Image

    captions: list[dict[str, Any]] = []
    questions: list[dict[str, Any]] = []
    for index in range(count):
        name = f"{index:06d}.png"
        sample = render(seed, index, size=size)
        Image.fromarray(sample.image_HW3).save(folder / "images" / name)
        captions.append(_record(name, str(index), [(INSTRUCTION, sample.caption)]))
        pairs, rng = ask(sample), np.random.default_rng([seed, index])
        questions += [_record(name, f"{index}-{i}", [q[1:] for q in converse(pairs, rng)]) for i in range(CONVERSATIONS)]
    for file, records in (("captions.json", captions), ("questions.json", questions)):
        (folder / file).write_text(json.dumps(records))


def _record(image: str, key: str, pairs: Sequence[tuple[str, ...]]) -> dict[str, Any]:
    turns = [{"from": who, "value": text} for pair in pairs for who, text in zip(("human", "gpt"), pair)]
    turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    return {"id": key, "image": image, "conversations": turns}
