"""What a toy teacher's frozen features can do: zero-shot, kNN, and linear probes in closed form.

Small on purpose: ridge regression instead of a trained head gives the same number every time within seconds. The suites
of `radio_distill.eval` are the real protocols. Shapes: B batch, C channels, H W, P all patches of a set.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from toy_scenes import ToyScenes

from radio_distill.teachers.base import Teacher
from radio_distill.teachers.text_tower import TextTower
from radio_distill.toyworld import CLASSES, SEGMENT_NAMES
from radio_distill.types import VisionOutput

__all__ = ["PROMPTS", "classify_zero_shot", "encode_all", "measure"]

PROMPTS = ("a photo of a {}", "a picture of a {}", "a {}", "a {} on grass", "a {} on sand", "a {} on stone")


def measure(teacher: Teacher, text: TextTower | None, scenes: ToyScenes) -> dict[str, float]:
    """All numbers that apply to the teacher; the first two thirds of the scenes fit the probes, the rest is scored."""
    images = torch.from_numpy(scenes.images_BHW3).permute(0, 3, 1, 2)
    labels = torch.from_numpy(scenes.labels_B)
    cut = len(images) * 2 // 3
    out = encode_all(teacher, images)
    numbers: dict[str, float] = {}
    if out.summary_BC is not None:
        neighbours = _knn(out.summary_BC[:cut], labels[:cut], out.summary_BC[cut:])
        numbers["knn_top1"] = _accuracy(neighbours, labels[cut:])
        if text is not None:
            numbers["zero_shot_top1"] = _accuracy(classify_zero_shot(out.summary_BC, text), labels)
    features = F.interpolate(out.features_BCHW, (32, 32), mode="bilinear")
    segmentation = torch.from_numpy(scenes.segmentation_BHW).long()[:, 2::4, 2::4]
    numbers["segmentation_miou"] = _segment(features, segmentation, cut)
    numbers["depth_r2"] = _depth(features, torch.from_numpy(scenes.depth_BHW).float()[:, 2::4, 2::4], cut)
    numbers["boundary_ap"] = _boundaries(features, _edges(torch.from_numpy(scenes.instances_BHW)), cut)
    return numbers


def encode_all(teacher: Teacher, images_B3HW: Tensor, *, batch: int = 50) -> VisionOutput:
    """Encode a whole set of images in batches."""
    outputs = [teacher.encode(chunk) for chunk in images_B3HW.split(batch)]
    summaries = [o.summary_BC for o in outputs if o.summary_BC is not None]
    return VisionOutput(torch.cat(summaries) if summaries else None, torch.cat([o.features_BCHW for o in outputs]))


def classify_zero_shot(summary_BC: Tensor, text: TextTower) -> Tensor:
    """The class (B) whose prompts lie nearest to each summary by cosine; the prompts of a class are averaged."""
    prompts = [p.format(c) for c in CLASSES for p in PROMPTS]
    each = F.normalize(text.encode(prompts), dim=1).view(len(CLASSES), len(PROMPTS), -1)
    return (F.normalize(summary_BC, dim=1) @ F.normalize(each.mean(1), dim=1).T).argmax(1)


def _knn(bank_PC: Tensor, labels_P: Tensor, queries_BC: Tensor, k: int = 10) -> Tensor:
    """Vote of the k nearest by cosine, weighted by exp(similarity / 0.07) as in DINO."""
    similarity, nearest = (F.normalize(queries_BC, dim=1) @ F.normalize(bank_PC, dim=1).T).topk(k, dim=1)
    votes = torch.zeros(len(queries_BC), len(CLASSES))
    return votes.scatter_add_(1, labels_P[nearest], (similarity / 0.07).exp()).argmax(1)


def _accuracy(predicted_B: Tensor, labels_B: Tensor) -> float:
    return (predicted_B == labels_B).float().mean().item()


def _ridge(features_PC: Tensor, targets_PK: Tensor, strength: float = 1e-3) -> Tensor:
    """Weights (C + 1, K) of a linear probe with bias on standardised features, in float64."""
    x = features_PC.double()
    x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    gram = x.T @ x / len(x)
    penalty = strength * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram + penalty, x.T @ targets_PK.double() / len(x)).float()


def _probe(features_BCHW: Tensor, targets_BHWK: Tensor, cut: int) -> Tensor:
    """Fit a linear probe on the first `cut` images; its predictions (b, H, W, K) on the others."""
    x = features_BCHW.permute(0, 2, 3, 1)
    x = (x - x[:cut].mean((0, 1, 2))) / x[:cut].std((0, 1, 2)).clamp(min=1e-6)
    weights = _ridge(x[:cut].flatten(0, 2), targets_BHWK[:cut].flatten(0, 2))
    return x[cut:] @ weights[:-1] + weights[-1]


def _segment(features_BCHW: Tensor, labels_BHW: Tensor, cut: int) -> float:
    """Mean IoU over the segment classes present."""
    predicted = _probe(features_BCHW, F.one_hot(labels_BHW, len(SEGMENT_NAMES)).float(), cut).argmax(-1)
    n = len(SEGMENT_NAMES)
    confusion = torch.bincount((labels_BHW[cut:] * n + predicted).flatten(), minlength=n * n).view(n, n).float()
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    return (confusion.diagonal() / union)[union > 0].mean().item()


def _depth(features_BCHW: Tensor, depth_BHW: Tensor, cut: int) -> float:
    """Explained variance of inverse depth (0 on the background)."""
    target = torch.where(depth_BHW > 0, 1 / depth_BHW.clamp(min=1e-3), 0)[..., None]
    error = _probe(features_BCHW, target, cut) - target[cut:]
    return (1 - error.square().mean() / target[cut:].var()).item()


def _boundaries(features_BCHW: Tensor, edges_BHW: Tensor, cut: int) -> float:
    """Average precision of instance boundaries; chance is the share of boundary cells."""
    score = _probe(features_BCHW, edges_BHW[..., None].float(), cut)[..., 0].flatten()
    hits = edges_BHW[cut:].flatten()[score.argsort(descending=True)].double()
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    return (precision * hits).sum().item() / hits.sum().item()


def _edges(instances_BHW: Tensor) -> Tensor:
    """Whether a 4 x 4 cell holds pixels of more than one instance: bool (B, H/4, W/4)."""
    x = instances_BHW[:, None].float()
    return (F.max_pool2d(x, 4) != -F.max_pool2d(-x, 4))[:, 0]
