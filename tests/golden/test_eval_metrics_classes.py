"""Zero-shot, kNN, retrieval and mIoU against the reference implementations' values."""

import math

import torch
from metric_goldens import each

from radio_distill.eval.metrics import knn, text
from radio_distill.eval.metrics.means import Means
from radio_distill.eval.metrics.segmentation import Confusion, labels_from_raw


@each("zeroshot")
def test_zero_shot_equals_open_clip(golden):
    t = golden.tensors
    classifier = text.classifier(t["in.text_emb"])
    assert (classifier - t["out.classifier"]).abs().max() < golden.facts["tolerance"]["classifier"]
    means = Means()
    for images, labels in zip(t["in.img_emb"].split(13), t["in.labels"].split(13)):
        means.update(text.topk_hits(text.scores(images, classifier), labels))
    golden.agrees(means.compute())


@each("knn")
def test_knn_equals_dinov2(golden):
    facts, t = golden
    produced = {}
    for name in facts["expected"]:
        k = int(name.removeprefix("top1_k"))
        similarity, index = knn.nearest([t["in.train_features"]], t["in.test_features"], k=k)
        labels, classes, temperature = t["in.train_labels"][index], facts["num_classes"], facts["temperature"]
        scores = knn.votes(similarity, labels, classes=classes, temperature=temperature)
        produced[name] = 100 * (scores.argmax(1) == t["in.test_labels"]).double().mean().item()
        reference = t[f"out.class_scores_k{k}"]  # one softmax over the largest k: not a distribution for the smaller ones
        assert (scores - reference / reference.sum(1, keepdim=True)).abs().max() < facts["tolerance"]["proba"]
        if f"out.pred_k{k}" in t:
            assert torch.equal(scores.argmax(1), t[f"out.pred_k{k}"])
    golden.agrees(produced)


@each("retrieval")
def test_retrieval_equals_clip_benchmark(golden):
    t = golden.tensors
    golden.agrees(text.recalls(t["in.image_emb"], t["in.text_emb"], t["in.text_owner"], chunk=7))


@each("semseg_mmseg")
def test_segmentation_equals_mmseg(golden):
    facts, t = golden
    plain, raw = Confusion(facts["num_classes"]), Confusion(facts["num_classes"])
    for prediction, label, file_label in zip(t["in.pred"], t["in.gt"], t["in.raw_label"]):
        plain.update(prediction, label)
        raw.update(prediction, labels_from_raw(file_label))
    golden.agrees(plain.compute() | {"mIoU_from_raw_label_reduce_zero": raw.compute()["mIoU"]})
    for iou, wanted in zip(plain.iou_K.tolist(), facts["expected"]["IoU_per_class"], strict=True):
        assert math.isnan(iou) if wanted is None else abs(iou - wanted) < facts["tolerance"]["scalar"]
