"""Held-out toy questions in the form of the eleven benchmarks, as local copies that lmms-eval reads (`vlm toy` writes them)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..toyworld import render
from ..toyworld.scene import TIMES
from .toy_questions import HELD_OUT_SEED, KINDS, SHORT, ToyQuestion, ask

__all__ = ["write_copies"]

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
