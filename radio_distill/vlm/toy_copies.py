"""Held-out toy questions in the form of two benchmarks, as local copies that lmms-eval reads (`vlm toy` writes them)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..data.toyworld import render, sample_scene
from .toy import HELD_OUT_SEED, SHORT, ToyQuestion, ask

__all__ = ["write_copies"]

# task of lmms-eval -> its split. Both add SHORT to the question themselves, as the toy conversations have it.
SPLITS = {"pope": "test", "docvqa_val": "validation"}


def write_copies(out: Path, *, count: int = 60, size: int = 96) -> None:
    """Write `out`/pope (yes or no) and `out`/docvqa_val (everything else) about `count` scenes: pictures and metadata.jsonl."""
    from PIL import Image

    rows: dict[str, list[dict[str, Any]]] = {task: [] for task in SPLITS}
    for task, split in SPLITS.items():
        (out / task / split).mkdir(parents=True)
    for index in range(count):
        image = Image.fromarray(render(HELD_OUT_SEED, index, size=size).image_HW3)
        for i, question in enumerate(ask(sample_scene(HELD_OUT_SEED, index))):
            task = "pope" if question.kind == "yes_no" else "docvqa_val"
            name = f"{index:04d}-{i}.png"
            image.save(out / task / SPLITS[task] / name)
            rows[task].append({"file_name": name, **_row(task, f"{index}-{i}", question)})
    for task, split in SPLITS.items():
        (out / task / split / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[task]))


def _row(task: str, key: str, question: ToyQuestion) -> dict[str, Any]:
    text = question.question.removesuffix(SHORT)
    if task == "pope":
        return {"question_id": key, "question": text, "answer": question.answer, "category": "adversarial"}
    return {"questionId": key, "question": text, "answers": [question.answer]}
