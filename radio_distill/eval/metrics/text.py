"""Images against texts: zero-shot classification and its top-k accuracy, and recall at k both ways (CLIP_benchmark's rule).

The zero-shot classifier is open_clip's (`build_zero_shot_classifier`), from embeddings that are already computed: every prompt is
normalised, then averaged over templates, then normalised again. torchmetrics' accuracy equals `topk_hits` for one k at a time.

In retrieval a query is a hit when at least one of its positives is among the k nearest. Text to image averages over captions, image
to text over images, whatever the number of captions of an image. CLIP_benchmark calls text to image "image_retrieval".

Shapes: K classes, T templates, N images, M captions, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import DataError
from .checks import known_labels, not_empty

__all__ = ["classifier", "recalls", "scores", "topk_hits"]


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


def recalls(
    images_NC: Tensor, texts_MC: Tensor, owner_M: Tensor, *, ks: tuple[int, ...] = (1, 5, 10), chunk: int = 4096
) -> dict[str, float]:
    """`text_to_image_R@k` and `image_to_text_R@k` in percent.

    owner_M: index of the image that a caption describes. chunk: queries compared at once. Raises DataError when there are no
    captions, a caption's image is unknown, or an image has no caption.
    """
    not_empty(len(texts_MC), "captions")
    known_labels(owner_M, len(images_NC), "owners of the captions")
    lonely = torch.bincount(owner_M, minlength=len(images_NC)).eq(0).nonzero().flatten()
    if len(lonely):
        raise DataError(
            f"{len(lonely)} of {len(images_NC)} images have no caption (first: image {int(lonely[0])}); leave them out"
        )
    images, texts = F.normalize(images_NC.float(), dim=-1), F.normalize(texts_MC.float(), dim=-1)
    own = torch.arange(len(images), device=owner_M.device)
    text_hits = _hits(texts, owner_M, images, own, ks, chunk)
    image_hits = _hits(images, own, texts, owner_M, ks, chunk)
    return {f"text_to_image_R@{k}": v for k, v in text_hits.items()} | {
        f"image_to_text_R@{k}": v for k, v in image_hits.items()
    }


def _hits(
    queries: Tensor, query_ids: Tensor, gallery: Tensor, gallery_ids: Tensor, ks: tuple[int, ...], chunk: int
) -> dict[int, float]:
    """Percent of queries with an item of their own id among the k nearest."""
    depth = min(max(ks), len(gallery))
    hits = []
    for part, ids in zip(queries.split(chunk), query_ids.split(chunk)):
        nearest = (part @ gallery.T).topk(depth, dim=1).indices
        hits.append(gallery_ids[nearest] == ids[:, None])
    found = torch.cat(hits)
    return {k: 100 * found[:, :k].any(1).double().mean().item() for k in ks}
