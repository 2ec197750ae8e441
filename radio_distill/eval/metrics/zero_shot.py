"""Zero-shot classification with a text tower: the classifier from prompts, and top-k accuracy.

The classifier is open_clip's (`build_zero_shot_classifier`), from embeddings that are already computed: every prompt is
normalised, then averaged over templates, then normalised again. torchmetrics' accuracy equals `topk_hits` for one k at a time.

Shapes: K classes, T templates, N images, C channels.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .checks import known_labels

__all__ = ["classifier", "scores", "topk_hits"]


def classifier(text_KTC: Tensor) -> Tensor:
    """Unit weight per class, (C, K), from raw text embeddings of every class in every template."""
    return F.normalize(F.normalize(text_KTC.float(), dim=-1).mean(1), dim=-1).T


def scores(images_NC: Tensor, classifier_CK: Tensor) -> Tensor:
    """Cosine of every image to every class, (N, K)."""
    return F.normalize(images_NC.float(), dim=-1) @ classifier_CK


def topk_hits(scores_NK: Tensor, labels_N: Tensor, *, ks: tuple[int, ...] = (1, 5)) -> dict[str, Tensor]:
    """`top{k}` per image: 100 where the label is among the k best classes, else 0. Average with `Means`.

    Raises DataError on a label outside 0..K-1.
    """
    known_labels(labels_N, scores_NK.shape[1], "labels of the images")
    best = scores_NK.topk(min(max(ks), scores_NK.shape[1]), dim=1).indices
    hits = 100 * (best == labels_N[:, None]).double()
    return {f"top{k}": hits[:, :k].amax(1) for k in ks}
