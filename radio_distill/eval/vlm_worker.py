"""The process that lmms-eval runs in: `python -m radio_distill.eval.vlm_worker JOB.json`; writes scores.json beside it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from ..data.decode import as_rgb
from ..vlm.model import Vlm, load_vlm
from ..vlm.prompt import IMAGE

__all__ = ["main"]


def main(path: str) -> int:
    """Score one VLM on the tasks of a job."""
    import torch
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    job = json.loads(Path(path).read_text())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vlm = load_vlm(job["model"], dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    vlm.model.to(device)
    results = simple_evaluate(
        model=_adapter(vlm, job["batch"], device),
        tasks=job["tasks"],
        task_manager=TaskManager(include_path=job["cards"], include_defaults=False),
        limit=job["limit"],
        log_samples=False,
        bootstrap_iters=0,
    )
    counts = results["n-samples"]
    scores: dict[str, dict[str, float]] = {}
    for task in job["tasks"]:
        scores[task] = {key: x for key, x in results["results"][task].items() if isinstance(x, int | float)}
        scores[task]["count"] = counts[task]["effective"]
    Path(path).with_name("scores.json").write_text(json.dumps(scores))
    return 0


def _adapter(vlm: Vlm, batch: int, device: str) -> Any:
    """The model as lmms-eval wants it: chat messages in, texts out."""
    from lmms_eval.api.model import lmms

    class Answering(lmms):  # type: ignore[misc]
        is_simple = False

        def __init__(self) -> None:
            super().__init__()
            self.device = device

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            answers: list[str] = []
            # neighbours that may answer at the same length are answered together
            for settings, group in groupby(requests, key=lambda r: json.dumps(r.args[-4], sort_keys=True, default=str)):
                several = list(group)
                for start in range(0, len(several), batch):
                    answers += _answer(vlm, self.task_dict, several[start : start + batch], json.loads(settings))
            return answers

        def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
            raise NotImplementedError("no task of the suite has rounds")

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            raise NotImplementedError("no task of the suite asks for likelihoods")

    return Answering()


def _answer(vlm: Vlm, task_dict: Any, requests: Sequence[Any], settings: dict[str, Any]) -> list[str]:
    questions, images = [], []
    for request in requests:
        *_, doc_to_messages, _, doc_id, task, split = request.args
        texts, pictures = zip(*_parts(doc_to_messages(task_dict[task][split][doc_id])))
        questions.append("".join(texts))
        images.append([picture for picture in pictures if picture is not None])
    answers = vlm.answer(questions, images, max_new_tokens=settings.get("max_new_tokens", 128))
    stops = settings.get("until") or []
    return [_until(answer, [stops] if isinstance(stops, str) else stops) for answer in answers]


def _parts(messages: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """(text, image or None) in the order of the user's message; the mark of an image is its text."""
    for message in messages:
        for part in message["content"]:
            if part["type"] == "image":
                yield f"{IMAGE}\n", as_rgb(part["url"])
            elif part["type"] == "text":
                yield part["text"].replace(IMAGE, ""), None


def _until(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0] if stop else text
    return text.strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
