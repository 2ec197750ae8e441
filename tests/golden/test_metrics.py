"""kNN and mIoU against the values of the reference implementations, found by globbing."""

import json

import pytest
import torch
from conftest import golden_cases
from safetensors.torch import load_file

from radio_distill.eval.knn import knn_scores
from radio_distill.eval.segmentation import confusion, mean_iou


def _pair(path):
    return json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))


@pytest.mark.parametrize("path", golden_cases("metrics/knn*.json"), ids=lambda p: p.stem)
def test_knn_equals_the_reference(path):
    facts, t = _pair(path)
    for name, expected in facts["expected"].items():
        k = int(name.removeprefix("top1_k"))
        scores = knn_scores(
            t["in.train_features"], t["in.train_labels"], t["in.test_features"],
            classes=facts["num_classes"], k=k, temperature=facts["temperature"],
        )  # fmt: skip
        top1 = 100 * (scores.argmax(1) == t["in.test_labels"]).double().mean().item()
        assert top1 == pytest.approx(expected, abs=facts["tolerance"]["scalar"])
        assert all(abs(top1 - decoy) > 1e-3 for d, decoy in facts["decoys"].items() if f"_k{k}" in d)


@pytest.mark.parametrize("path", golden_cases("metrics/semseg*.json"), ids=lambda p: p.stem)
def test_mean_iou_equals_the_reference(path):
    facts, t = _pair(path)
    counts = confusion(t["in.pred"], t["in.gt"], facts["num_classes"])
    assert mean_iou(counts) == pytest.approx(facts["expected"]["mIoU"], abs=facts["tolerance"]["scalar"])


def test_absent_classes_do_not_count_as_zero():
    counts = torch.tensor([[3, 0, 0], [0, 3, 0], [0, 0, 0]])
    assert mean_iou(counts) == 100.0
