"""The `vlm` suite: the eleven benchmarks of the paper's Table 6 through lmms-eval, or questions about generated scenes.

python -m radio_distill.eval --suite vlm --model runs/llava15_sft                  # data sets from the hub
python -m radio_distill.eval --suite vlm --model runs/llava15_sft --data COPIES    # COPIES/pope, COPIES/gqa, ...; no network
python -m radio_distill.eval --suite vlm --model runs/toy_vlm_sft --data toy       # our own scorer, nothing to install
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import CardError
from ..files import digest_of, json_file
from ..types import Result
from ..vlm.model import vlm_folder
from .published import load_tables
from .vlm_lmms import VERSION, Benchmark, run_lmms
from .vlm_toy import QUESTIONS, score_toy

__all__ = ["BENCHMARKS", "evaluate", "measured_before"]

TOY = "toy"

BENCHMARKS = {
    "ai2d_no_mask": Benchmark("ai2d_no_mask", "ai2d/ai2d_no_mask.yaml", "exact_match,flexible-extract"),
    "chartqa_overall": Benchmark("chartqa", "chartqa/chartqa.yaml", "relaxed_overall,none"),
    "docvqa_val": Benchmark("docvqa_val", "docvqa/docvqa_val.yaml", "anls,none"),
    "gqa": Benchmark("gqa", "gqa/gqa.yaml", "exact_match,none", image_in_rows=True),
    "infovqa_val": Benchmark("infovqa_val", "infovqa/infovqa_val.yaml", "anls,none"),
    "mme_perception": Benchmark("mme", "mme/mme.yaml", "mme_perception_score,none"),
    "mmmu_val": Benchmark("mmmu_val", "mmmu/mmmu_val.yaml", "mmmu_acc,none"),
    "ocrbench": Benchmark("ocrbench", "ocrbench/ocrbench.yaml", "ocrbench_accuracy,none"),
    "pope_f1": Benchmark("pope", "pope/pope.yaml", "pope_f1_score,none"),
    "seed_all": Benchmark("seedbench", "seedbench/seedbench.yaml", "seed_all,none"),
    "textvqa_val": Benchmark("textvqa_val", "textvqa/textvqa_val.yaml", "exact_match,none"),
}
"""Columns of Table 6, and the task and metric of lmms-eval that they are."""


@dataclass(frozen=True)
class Protocol:
    """What is measured; its hash travels with every result."""

    harness: str
    limit: int | None


def evaluate(
    model: str, *, data: str | None = None, limit: int | None = None, tasks: Sequence[str] = (), batch: int = 8
) -> list[Result]:
    """Score a VLM. model: run folder, checkpoint, or a folder that `vlm train` saved.

    data: `toy`, a folder of local copies (one folder per lmms-eval task), or None for the hub. limit: questions of every
    task. tasks: names of Table 6 (with toy data: kinds of questions); none: all. batch: questions answered at once. Raises
    CardError for an unknown task, CheckpointError, DataError, and RadioDistillError when lmms-eval is not installed.
    """
    known = QUESTIONS if data == TOY else tuple(BENCHMARKS)
    for task in tasks:
        if task not in known:
            raise CardError(
                f"suite vlm has no task {task!r}{' on toy data' if data == TOY else ''}; expected {', '.join(known)}"
            )
    folder, chosen = vlm_folder(model), list(tasks or known)
    with json_file(
        folder / "config.json", "the config of a VLM", advice="name the folder that the VLM's training wrote"
    ) as config:
        facts = dict(config["vision_config"])
    label, protocol = _label(model, folder), _protocol(data, limit)
    if data == TOY:
        scores = score_toy(folder, kinds=chosen, limit=limit, batch=batch)
        size = facts["image_size"]
        return [
            _result(f"toy_{kind}", "accuracy", 100 * s.value, s.questions, label, "toyworld", size, protocol, "percent")
            for kind, s in scores.items()
        ]
    columns = load_tables()["6"].columns
    found = run_lmms(folder, {name: BENCHMARKS[name] for name in chosen}, copies=data, limit=limit, batch=batch)
    return [
        _result(
            name, "score", to_table_units(BENCHMARKS[name].task, s.value), s.questions, label, BENCHMARKS[name].task,
            facts["image_size"], protocol, columns[name].unit,
        )
        for name, s in found.items()
    ]  # fmt: skip


def to_table_units(task: str, score: float) -> float:
    """A harness score in the unit of the paper's Table 6: percent, but MME as it is and OCRBench out of 1000."""
    return score * {"mme": 1, "ocrbench": 1000}.get(task, 100)


def measured_before(results: Sequence[Result], model: str, *, data: str | None, limit: int | None) -> list[Result]:
    """What results say of these very weights on the same data, asked as often."""
    label, digest = _label(model, vlm_folder(model)), digest_of(_protocol(data, limit).__dict__)[:12]
    return [r for r in results if (r.suite, r.model, r.config_hash) == ("vlm", label, digest)]


def _protocol(data: str | None, limit: int | None) -> Protocol:
    return Protocol(TOY if data == TOY else f"lmms-eval {VERSION}", limit)


def _label(model: str, folder: Path) -> str:
    return f"{model}#{_digest(folder)}"


def _result(
    task: str, metric: str, value: float, count: int, model: str, dataset: str, resolution: int, protocol: Protocol, unit: str
) -> Result:
    digest = digest_of(protocol.__dict__)[:12]
    return Result(
        suite="vlm", task=task, metric=metric, value=value, unit=unit, higher_is_better=True, model=model, dataset=dataset,
        count=count, resolution=resolution, version=protocol.harness, config_hash=digest,
    )  # fmt: skip


def _digest(folder: Path) -> str:
    """Of the weights."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]
