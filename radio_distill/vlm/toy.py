"""Make the parts of a toy VLM (`radio-distill vlm toy OUT`): a tiny language model, and conversations about generated scenes.

Scenes are those of the toy world; images that questions are scored on are drawn from another seed (`HELD_OUT_SEED`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import DataError
from ..files import appearing
from ..toyworld import render
from ..toyworld.scene import TIMES
from .toy_questions import HELD_OUT_SEED, KINDS, SHORT, TRAIN_SEED, ToyQuestion, ask, converse

__all__ = ["write_toy"]

log = logging.getLogger(__name__)

CONVERSATIONS = 3
"""About each image, each with its own choice and order of questions: every one is the first at times, as it is when it is asked alone."""


def write_toy(out: str | Path, *, count: int = 3000, size: int = 96, seed: int = TRAIN_SEED, steps: int | None = None) -> None:
    """Write `out`/lm (`write_toy_lm`), images of `count` scenes of `size` pixels, captions.json and questions.json about them,
    and `out`/benchmarks (`write_copies`) about others.

    Both are in LLaVA's format: one caption, and CONVERSATIONS conversations of several questions, for each image. steps: for which the
    language model reads; None: as many as it needs. `out` appears when it is complete. Raises DataError when it exists.
    """
    from .toy_lm import STEPS, write_toy_lm

    out = Path(out)
    if out.exists():
        raise DataError(f"{out} exists and is not overwritten; choose another folder or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    with appearing(out) as partial:
        (partial / "images").mkdir(parents=True)
        write_toy_lm(partial / "lm", steps=STEPS if steps is None else steps)
        _write_conversations(partial, count, size, seed)
        write_copies(partial / "benchmarks", count=min(60, count), size=size)
    log.info("wrote %s: lm, captions.json and questions.json about %d images", out, count)


def _write_conversations(folder: Path, count: int, size: int, seed: int) -> None:
    from PIL import Image

    from .toy_lm import INSTRUCTION

    captions: list[dict[str, Any]] = []
    questions: list[dict[str, Any]] = []
    for index in range(count):
        name = f"{index:06d}.png"
        sample = render(seed, index, size=size)
        Image.fromarray(sample.image_HW3).save(folder / "images" / name)
        captions.append(_record(name, str(index), [(INSTRUCTION, sample.caption)]))
        rng = np.random.default_rng([seed, index])
        questions += [_record(name, f"{index}-{i}", [q[1:] for q in converse(sample, rng)]) for i in range(CONVERSATIONS)]
    for file, records in (("captions.json", captions), ("questions.json", questions)):
        (folder / file).write_text(json.dumps(records))


def _record(image: str, key: str, pairs: Sequence[tuple[str, ...]]) -> dict[str, Any]:
    turns = [{"from": who, "value": text} for pair in pairs for who, text in zip(("human", "gpt"), pair)]
    turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    return {"id": key, "image": image, "conversations": turns}


Row = dict[str, Any]


class Copy(NamedTuple):
    split: str
    kinds: tuple[str, ...]
    """Of the questions that it asks."""
    row: Callable[[str, ToyQuestion], Row]
    """What the benchmark reads beside question and picture; the first argument is `scene-question`."""
    picture: str = "file_name"
    """Column of metadata.jsonl that names the picture; its first part is the benchmark's own column."""


def _answer(key: str, q: ToyQuestion) -> Row:
    return {"question_id": key, "answer": q.answer, "type": "human_test"}


def _answers(key: str, q: ToyQuestion) -> Row:
    return {"questionId": key, "answers": [q.answer]}


def _mmmu(key: str, q: ToyQuestion) -> Row:
    text = f"<image 1> {q.question.removesuffix(SHORT)}"
    fixed = {"id": f"validation_Art_{key.replace('-', '')}", "question": text, "question_type": "multiple-choice"}
    return {**fixed, "options": str(list(TIMES)), "answer": "ABCD"[TIMES.index(q.answer)]}


def _seed(key: str, q: ToyQuestion) -> Row:
    choices = {f"choice_{letter}": time for letter, time in zip("abcd", TIMES)}
    return {"question_id": key, "data_type": "image", "answer": "ABCD"[TIMES.index(q.answer)], **choices}


COPIES = {
    "ai2d_no_mask": Copy("test", ("time",), lambda _, q: {"options": list(TIMES), "answer": str(TIMES.index(q.answer))}),
    "chartqa": Copy("test", ("count",), _answer),
    "docvqa_val": Copy("validation", tuple(kind for kind in KINDS if kind != "yes_no"), _answers),
    "gqa": Copy("testdev", ("side",), _answer),
    "infovqa_val": Copy("validation", ("colour",), _answers),
    "mme": Copy(  # scored by pairs of one id
        "test", ("yes_no",), lambda key, q: {"question_id": key.split("-")[0], "answer": q.answer, "category": "existence"}
    ),
    "mmmu_val": Copy("validation", ("time",), _mmmu, "image_1_file_name"),
    "ocrbench": Copy(
        "test", ("class",), lambda _, q: {"answer": [q.answer], "dataset": "toy", "question_type": "Scene Text-centric VQA"}
    ),
    "pope": Copy("test", ("yes_no",), lambda key, q: {"question_id": key, "answer": q.answer, "category": "adversarial"}),
    "seedbench": Copy("test", ("time",), _seed, "image_file_names"),
    "textvqa_val": Copy("validation", ("ground",), lambda key, q: {"question_id": key, "answers": 10 * [q.answer]}),
}
"""By task of lmms-eval. A task that wants an option's letter asks for the time of day, of which there are four."""


# `datasets` finds train, validation and test by themselves, but not GQA's testdev.
README = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: {split}\n    path: {split}/*\n---\n"


def write_copies(out: Path, *, count: int = 60, size: int = 96) -> None:
    """Write `out`/TASK/SPLIT for every task of COPIES about `count` scenes: pictures and metadata.jsonl, and the split in README.md."""
    from PIL import Image

    rows: dict[str, list[Row]] = {task: [] for task in COPIES}
    for task, copy in COPIES.items():
        (out / task / copy.split).mkdir(parents=True)
    for index in range(count):
        sample = render(HELD_OUT_SEED, index, size=size)
        image = Image.fromarray(sample.image_HW3)
        for i, question in enumerate(ask(sample)):
            name, text = f"{index:04d}-{i}.png", question.question.removesuffix(SHORT)  # most tasks add SHORT themselves
            for task, copy in COPIES.items():
                if question.kind in copy.kinds:
                    image.save(out / task / copy.split / name)
                    picture = [name] if copy.picture.endswith("s") else name
                    rows[task].append({copy.picture: picture, "question": text, **copy.row(f"{index}-{i}", question)})
    for task, copy in COPIES.items():
        (out / task / "README.md").write_text(README.format(split=copy.split))
        (out / task / copy.split / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[task]))
