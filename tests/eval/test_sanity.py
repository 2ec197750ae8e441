"""Every suite on the toy world: an untrained model scores below the best toy teacher, and below the student that was taught by all.

    RADIO_DISTILL_SANITY=1 pytest -s tests/eval

takes a quarter of an hour on two cores (`-n 2`), hence only when asked for. Where `runs/demo` holds the demo's student, untrained is the same network with other
weights, and the student has a row of its own; else it is a plain ViT.

The best teacher and not all of them: each knows something else. The image-text teachers' maps are worse than untrained ones where
places have to be told apart, the segmenter's where classes are (docs/eval.md has the numbers).
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import REPO

from radio_distill.eval.features import FeatureCache
from radio_distill.eval.runner import run_suite
from radio_distill.eval.suite_names import suite_names
from radio_distill.eval.suites import load_suite
from radio_distill.eval.task import Context
from radio_distill.results import table
from radio_distill.types import Result

pytestmark = pytest.mark.skipif(
    "RADIO_DISTILL_SANITY" not in os.environ, reason="a quarter of an hour; set RADIO_DISTILL_SANITY=1"
)

STUDENT = REPO / "runs" / "demo" / "stage3"
UNTRAINED = f"random:{STUDENT}" if STUDENT.is_dir() else "timm:vit_small_patch8_224?weights=random"
TEACHERS = ("teacher:toy_dino", "teacher:toy_clip", "teacher:toy_sam")

ENOUGH = {
    "probe3d": [
        "probe3d_depth.train_images=160", "probe3d_depth.test_images=100", "probe3d_depth.epochs=6",
        "probe3d_surface_normals.train_images=160", "probe3d_surface_normals.test_images=100", "probe3d_surface_normals.epochs=6",
        "probe3d_correspondence.pairs=100",
    ],
    "pascal_context": ["pascal.steps=150"],
    "nyudv2": ["nyud.steps=150"],
}  # fmt: skip
"""What makes the smoke presets long enough to tell models apart."""

SUITES = [name for name in suite_names() if name not in ("throughput", "detection")]
"""A detector learns nothing within a smoke preset (AP below 1 for all)."""


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("suite", SUITES)
def test_an_untrained_model_scores_below_what_was_taught(suite: str, tmp_path: Path) -> None:
    students = [str(STUDENT)] if STUDENT.is_dir() else []
    context = Context(root="toy", device=torch.device("cpu"), cache=FeatureCache(tmp_path / "cache"))
    asked = load_suite(suite, "smoke", ENOUGH.get(suite, []))
    outcome = run_suite(asked, [UNTRAINED, *TEACHERS, *students], context, tmp_path / "results.jsonl")
    print(f"\n{table(outcome.results)}", *outcome.failures, sep="\n")
    assert outcome.results
    assert not _beaten(outcome.results)


def _beaten(results: list[Result]) -> list[str]:
    """Headlines on which the untrained model is as good as the best teacher, or as the student."""
    scores: dict[tuple[str, str], dict[str, Result]] = {}
    for r in results:
        if r.headline:
            scores.setdefault((r.task, r.metric), {})[r.model] = r
    found = []
    for (task, metric), rows in scores.items():
        best: Callable[[list[float]], float] = max if next(iter(rows.values())).higher_is_better else min
        untrained = [rows.pop(name).value for name in list(rows) if name.startswith((UNTRAINED, "random:", "timm:"))]
        teachers = [rows[name].value for name in TEACHERS if name in rows]
        students = [row.value for name, row in rows.items() if name not in TEACHERS]
        for taught in (teachers, students):
            if untrained and taught and best([best(taught), *untrained]) in untrained:
                found.append(f"{task} {metric}: untrained {untrained}, taught {taught}")
    return found
