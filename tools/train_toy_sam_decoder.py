"""Train the toy world's SAM decoder on features of `toy_sam`, and write it; some minutes on one CPU core.

    python tools/train_toy_sam_decoder.py --out teachers/toy/sam_decoder

It is transformers' `SamModel` at a small size without image encoder: what SAM-H's decoder is to SAM-H's features. The suite only
reads it, so that a student's adaptor is scored by how well it stands in for `toy_sam`.

Shapes: S scenes, N boxes of a scene, M masks of a box, g side of the decoder's masks.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from radio_distill.config.load import load_card
from radio_distill.eval.datasets.instances import ToyInstances
from radio_distill.teachers.base import load_teacher
from radio_distill.toyworld import render

__all__ = ["build", "train"]

log = logging.getLogger(__name__)

TRAIN_SEED = 1
"""That of the toy teachers' own training scenes."""
BOXES = 3
"""Objects of a scene at most; scenes with fewer repeat their first."""


def build() -> Any:
    """The network with random weights."""
    from transformers import SamConfig, SamModel

    card = load_card("toy_sam")
    channels, size = card.output.features, {"image_size": card.input.size, "patch_size": card.input.patch}
    # Hidden width 2: the scale of the random Fourier positions is half of it, and SAM's own is 1.
    vision = {"hidden_size": 2, "num_attention_heads": 1, "num_hidden_layers": 0, "output_channels": channels, **size}
    return SamModel(
        SamConfig(
            vision_config={**vision, "num_pos_feats": channels // 2, "global_attn_indexes": []},
            prompt_encoder_config={"hidden_size": channels, **size},
            mask_decoder_config={"hidden_size": channels, "mlp_dim": 128, "num_attention_heads": 4, "iou_head_hidden_dim": 64},
        )
    )


def train(scenes: int, steps: int, batch: int = 4) -> Any:
    """Train on scenes: cross-entropy and Dice of the best of three masks, squared error of the predicted IoUs (SAM)."""
    torch.manual_seed(0)
    sam = build()
    features, boxes, masks = _data(scenes)
    optimizer = torch.optim.AdamW(sam.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        chosen = torch.randint(len(features), (batch,))
        noise = 2 * torch.randn(batch, BOXES, 4)  # pixels: prompts are not always exact
        out = sam(image_embeddings=features[chosen], input_boxes=boxes[chosen] + noise, multimask_output=True)
        value = _loss(out.pred_masks, out.iou_scores, masks[chosen])
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(sam.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            log.info("step %d  loss %.4f", step, value.item())
    return sam.eval()


def _loss(logits_SNMgg: Tensor, ious_SNM: Tensor, masks_SNgg: Tensor) -> Tensor:
    truth = masks_SNgg[:, :, None].expand_as(logits_SNMgg)
    guess = logits_SNMgg.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits_SNMgg, truth, reduction="none").mean((-1, -2))
    dice = 1 - (2 * (guess * truth).sum((-1, -2)) + 1) / ((guess + truth).sum((-1, -2)) + 1)
    hard = logits_SNMgg.detach() > 0
    overlap = (hard & (truth > 0)).sum((-1, -2)) / (hard | (truth > 0)).sum((-1, -2)).clamp(min=1)
    return (5 * entropy + dice).amin(-1).mean() + F.mse_loss(ious_SNM, overlap)


def _data(scenes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features of toy_sam, boxes (S, N, 4) in its pixels, masks (S, N, g, g)."""
    teacher = load_teacher(load_card("toy_sam"))
    side, reader = teacher.card.input.size, ToyInstances("train")
    images, boxes, masks = [], [], []
    for i in range(scenes):
        sample = reader.sample(render(TRAIN_SEED, i, size=side))
        order = (list(range(len(sample.masks))) + [0] * BOXES)[:BOXES]
        images.append(sample.image_3HW)
        boxes.append(sample.boxes_N4[order])
        masks.append(torch.stack([torch.from_numpy(sample.masks[j]) for j in order]).float())
    features = torch.cat([teacher.encode(torch.stack(images[i : i + 32])).features_BCHW for i in range(0, scenes, 32)])
    fine = features.shape[-1] * 4  # the decoder enlarges four times
    return features, torch.stack(boxes), torch.stack([F.adaptive_avg_pool2d(m, (fine, fine)).round() for m in masks])


def main() -> None:
    """Train, and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for config.json and model.safetensors")
    parser.add_argument("--scenes", type=int, default=600)
    parser.add_argument("--steps", type=int, default=700)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    train(options.scenes, options.steps).half().save_pretrained(options.out)


if __name__ == "__main__":
    main()
