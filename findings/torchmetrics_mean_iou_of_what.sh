#!/usr/bin/env bash
# torchmetrics 1.9.0, torch 2.15.0: torchmetrics.segmentation.MeanIoU over two images.
#
# Guess:     the number is the mIoU of semantic segmentation (intersections and unions summed over the images, then the mean over classes), or
#            at least the mean of what `per_class=True` gives.
# Behaviour: neither. It is the mean over all pairs of an image and a class that is in it, so an image of many classes counts more often;
#            `per_class=True` gives means over images for each class, whose mean is another number. The mIoU of segmentation papers is
#            MulticlassJaccardIndex.
# Seen:      prints "MeanIoU 0.7222, mean of its per_class 0.6667, MulticlassJaccardIndex 0.6786"
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.15.0 torchmetrics==1.9.0
"$work/venv/bin/python" -W ignore - <<'P'
import torch
from torchmetrics.classification import MulticlassJaccardIndex
from torchmetrics.segmentation import MeanIoU

target = torch.tensor([[[0, 0, 1, 1]], [[0, 0, 0, 0]]])
guess = torch.tensor([[[0, 0, 1, 0]], [[0, 0, 0, 0]]])
mean = MeanIoU(2, input_format="index")(guess, target).item()
per_class = MeanIoU(2, input_format="index", per_class=True)(guess, target).mean().item()
jaccard = MulticlassJaccardIndex(2)(guess, target).item()
assert abs(jaccard - (6 / 7 + 1 / 2) / 2) < 1e-6
print(f"MeanIoU {mean:.4f}, mean of its per_class {per_class:.4f}, MulticlassJaccardIndex {jaccard:.4f}")
assert [round(x, 4) for x in (mean, per_class, jaccard)] == [0.7222, 0.6667, 0.6786], "this has changed"
P
