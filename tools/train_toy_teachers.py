"""Train the toy teachers on the toy world and write their weights; an hour or so on one CPU core.

    python tools/train_toy_teachers.py --out teachers/toy

Each objective is the plain form of its namesake: softmax (CLIP) and sigmoid (SigLIP) image-text contrast,
self-distillation with masked patches and a coding-rate term against collapse (DINO, as in SimDINO), boundaries and
centre offsets of instances (SAM). Only SAM sees dense ground truth and only CLIP and SigLIP see captions.

Shapes: B batch, C channels, H W patch grid, N patches.
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from toy_probes import measure
from toy_scenes import ToyScenes

from radio_distill.config.cards import TeacherCard
from radio_distill.config.load import load_card
from radio_distill.teachers import text_tower
from radio_distill.teachers.base import Teacher
from radio_distill.teachers.toy import TextTower, ToyViT, build, split_words
from radio_distill.tensors import save_tensors
from radio_distill.toyworld import render, render_images, sample_scene

__all__ = ["train"]

log = logging.getLogger(__name__)

TRAIN_SEED, TEST_SEED = 1, 2
FEATURE_STD = {"toy_clip": 0.25, "toy_siglip": 2.5, "toy_dino": 1.0, "toy_sam": 0.05}
"""Standard deviation the features are scaled to before saving: real teachers differ as widely, and balancers exist for it."""


class TrainingSet(NamedTuple):
    images_B3HW: Tensor
    """uint8"""
    captions: list[str]
    instances_BHW: Tensor | None

    @classmethod
    def render(cls, count: int, *, size: int, instances: bool) -> TrainingSet:
        captions = [sample_scene(TRAIN_SEED, i).caption for i in range(count)]
        if not instances:
            images = render_images(TRAIN_SEED, range(count), size=size)
            return cls(torch.from_numpy(images).permute(0, 3, 1, 2), captions, None)
        images = np.empty((count, size, size, 3), np.uint8)
        owners = np.empty((count, size, size), np.uint8)
        for i in range(count):
            sample = render(TRAIN_SEED, i, size=size)
            images[i], owners[i] = sample.image_HW3, sample.instances_HW
        return cls(torch.from_numpy(images).permute(0, 3, 1, 2), captions, torch.from_numpy(owners).long())


class Crops:
    """Random crops of a fixed set of images, normalised for one teacher."""

    def __init__(self, images_B3HW: Tensor, teacher: Teacher, *, batch: int, seed: int) -> None:
        self.images, self.teacher, self.batch = images_B3HW, teacher, batch
        self.rng = torch.Generator().manual_seed(seed)

    def __call__(self, smallest: float, size: int, chosen: Tensor) -> Tensor:
        """Square crops of the chosen images, at least `smallest` of the side, mirrored half of the time, as `size` pixels.

        One batch shares the size of the crop, not its place.
        """
        side = self.images.shape[-1]
        crop = int(side * (smallest + (1 - smallest) * torch.rand((), generator=self.rng)))
        corners = torch.randint(side - crop + 1, (len(chosen), 2), generator=self.rng)
        mirrored = torch.rand(len(chosen), generator=self.rng) < 0.5
        x = torch.stack([self.images[i, :, y : y + crop, x : x + crop] for i, (y, x) in zip(chosen, corners.tolist())])
        x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
        return F.interpolate(self.teacher.normalize(x), (size, size), mode="bilinear", antialias=True)

    def batches(self, steps: int) -> Iterator[tuple[int, Tensor]]:
        """Step and chosen images, epoch after epoch without replacement."""
        order = torch.empty(0, dtype=torch.long)
        for step in range(steps):
            if len(order) < self.batch:
                order = torch.randperm(len(self.images), generator=self.rng)
            chosen, order = order[: self.batch], order[self.batch :]
            yield step, chosen


def train_contrastive(net: ToyViT, text: TextTower, data: TrainingSet, crops: Crops, *, steps: int, sigmoid: bool) -> None:
    """Image-text contrast over the batch: softmax both ways (CLIP, figure 3) or one sigmoid per pair (SigLIP, eq. 1).

    Four fifths of the steps see a random half of the patches (FLIP), which doubles the number of images.
    """
    log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
    bias = nn.Parameter(torch.tensor(-5.0))  # about -log(B): most pairs are negatives at the start
    words = text.tokenize(data.captions)
    optimiser, schedule = _optimiser([net, text], [log_scale, bias], steps, rate=2e-3)

    def loss(step: int, chosen: Tensor) -> Tensor:
        x = net.tokens(net.embed(crops(0.75, net.size, chosen)))
        if step < 0.8 * steps:
            x = x[:, torch.randperm(x.shape[1], generator=crops.rng)[: x.shape[1] // 2]]
        images = net.summarise(net.mix(x))
        assert images is not None
        logits = log_scale.clamp(max=4.6).exp() * F.normalize(images, dim=1) @ F.normalize(text(words[chosen]), dim=1).T
        if sigmoid:
            return -F.logsigmoid((2 * torch.eye(len(chosen)) - 1) * (logits + bias)).sum(1).mean()
        target = torch.arange(len(chosen))
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    _minimise(loss, crops.batches(steps), optimiser, schedule)


def train_dino(net: ToyViT, crops: Crops, *, steps: int) -> ToyViT:
    """Self-distillation: from a masked crop and two small ones, predict what an EMA of the network sees in the whole crop.

    Every patch, masked or not, also has to say which pixels it stands for (SimMIM, https://arxiv.org/abs/2111.09886):
    in minutes of training that is what gives the map its detail. Collapse is prevented by maximising the coding rate of
    class and patch tokens (SimDINO, https://arxiv.org/abs/2502.10385), so there are no prototypes, centring or
    temperatures. Returns the EMA network.
    """
    ema = copy.deepcopy(net).requires_grad_(False)
    mask_token = nn.Parameter(torch.zeros(1, net.position.shape[1], 1, 1))
    pixels = nn.Linear(net.features, 3 * net.patch**2)
    optimiser, schedule = _optimiser([net, pixels], [mask_token], steps, rate=1.5e-3)

    def loss(step: int, chosen: Tensor) -> Tensor:
        view = crops(0.5, net.size, chosen)
        goal = ema(view)
        mask = _block_mask(len(chosen), net.size // net.patch, crops.rng)
        masked = net.encode_patches(torch.where(mask[:, None], mask_token, net.embed(view)))
        small = [net(crops(0.35, net.size // 2, chosen)).summary_BC for _ in range(2)]
        across = sum((1 - F.cosine_similarity(s, goal.summary_BC)).mean() for s in (masked.summary_BC, *small)) / 3
        inside = (1 - F.cosine_similarity(masked.features_BCHW, goal.features_BCHW))[mask].mean()
        drawn = pixels(masked.features_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        detail = F.mse_loss(drawn, F.pixel_unshuffle(view, net.patch))
        rate = _coding_rate(small[0]) + _coding_rate(_sample_patches(masked.features_BCHW, crops.rng))
        _update_ema(ema, net, momentum=0.996 - 0.016 * (1 + math.cos(math.pi * step / steps)) / 2)
        return across + 0.5 * inside + detail - 0.02 * rate

    _minimise(loss, crops.batches(steps), optimiser, schedule)
    return ema


def train_sam(net: ToyViT, data: TrainingSet, teacher: Teacher, *, batch: int, steps: int) -> None:
    """Predict, from every patch, a fine map of instance boundaries and where the centre of its instance lies."""
    assert data.instances_BHW is not None
    rng = torch.Generator().manual_seed(0)
    edges_BNK, offsets_BN3 = _instance_targets(data.instances_BHW, net.patch)
    head = nn.Linear(net.features, edges_BNK.shape[-1] + 3)
    optimiser, schedule = _optimiser([net, head], [], steps, rate=1.5e-3)

    def loss(step: int, chosen: Tensor) -> Tensor:
        x = teacher.normalize(data.images_B3HW[chosen])
        if step % 2:  # most images it will meet are smaller than its input
            x = F.interpolate(F.interpolate(x, scale_factor=2 / 3, mode="area"), x.shape[-2:], mode="bilinear")
        out = head(net(x).features_BCHW.flatten(2).transpose(1, 2))
        edges, inside, offsets = out.split([edges_BNK.shape[-1], 1, 2], 2)
        covered, towards = offsets_BN3[chosen].split([1, 2], 2)
        boundary = F.binary_cross_entropy_with_logits(edges, edges_BNK[chosen], weight=1 + 4 * edges_BNK[chosen])
        mask = F.binary_cross_entropy_with_logits(inside, covered)
        centre = ((offsets - towards).abs() * covered).sum() / covered.sum().clamp(min=1)
        return boundary + mask + centre

    batches = ((step, torch.randint(len(data.images_B3HW), (batch,), generator=rng)) for step in range(steps))
    _minimise(loss, batches, optimiser, schedule)


def _instance_targets(instances_BHW: Tensor, patch: int, fine: int = 4) -> tuple[Tensor, Tensor]:
    """Boundary cells (B, N, fine^2) in {0, 1}, and per patch: covered by an object, offset to its centre in image sides."""
    B, side, _ = instances_BHW.shape
    step = patch // fine
    edge = F.pad((instances_BHW[:, :, 1:] != instances_BHW[:, :, :-1]).float(), (0, 1))
    edge = torch.maximum(edge, F.pad((instances_BHW[:, 1:] != instances_BHW[:, :-1]).float(), (0, 0, 0, 1)))
    cells = F.max_pool2d(edge[:, None], step)
    edges = F.pixel_unshuffle(cells, fine).flatten(2).transpose(1, 2)
    middle = instances_BHW[:, patch // 2 :: patch, patch // 2 :: patch]
    grid = side // patch
    at = torch.stack(torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")).float() / grid
    offsets = torch.zeros(B, 2, grid, grid)
    for number in range(1, int(instances_BHW.max()) + 1):
        mine = (middle == number)[:, None].float()
        centre = (mine * at).sum((2, 3), keepdim=True) / mine.sum((2, 3), keepdim=True).clamp(min=1)
        offsets += mine * (centre - at)
    covered = (middle > 0)[:, None].float()
    return edges, torch.cat([covered, offsets * 4], 1).flatten(2).transpose(1, 2)


def _block_mask(count: int, grid: int, rng: torch.Generator) -> Tensor:
    """bool (B, grid, grid): one random rectangle per image, a tenth to a half of the patches."""
    sides = torch.randint(grid // 3, int(grid * 0.75) + 1, (count, 2), generator=rng)
    start = (torch.rand(count, 2, generator=rng) * (grid - sides + 1)).long()
    at = torch.arange(grid)
    rows = (at >= start[:, :1]) & (at < (start + sides)[:, :1])
    columns = (at >= start[:, 1:]) & (at < (start + sides)[:, 1:])
    return rows[:, :, None] & columns[:, None, :]


def _sample_patches(features_BCHW: Tensor, rng: torch.Generator, count: int = 512) -> Tensor:
    tokens = features_BCHW.permute(0, 2, 3, 1).flatten(0, 2)
    return tokens[torch.randint(len(tokens), (count,), generator=rng)]


def _coding_rate(z_BC: Tensor, epsilon: float = 0.5) -> Tensor:
    """log det(I + C / (B eps^2) Z^T Z) / 2 of the normalised rows Z: large when they span the space evenly."""
    B, C = z_BC.shape
    z = F.normalize(z_BC, dim=1)
    return torch.logdet(torch.eye(C) + C / (B * epsilon**2) * z.T @ z) / 2


@torch.no_grad()
def _update_ema(ema: nn.Module, net: nn.Module, *, momentum: float) -> None:
    for slow, fast in zip(ema.parameters(), net.parameters()):
        slow.lerp_(fast, 1 - momentum)


def _optimiser(
    modules: list[nn.Module], extra: list[nn.Parameter], steps: int, *, rate: float
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW with decay on matrices only; linear warm-up over a twentieth of the steps, then half a cosine."""
    parameters = [p for m in modules for p in m.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim == 2], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim != 2] + extra, "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))
    warmup = max(1, steps // 20)

    def factor(step: int) -> float:
        return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / steps)))

    return optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, factor)


def _minimise(
    loss: Callable[[int, Tensor], Tensor],
    batches: Iterable[tuple[int, Tensor]],
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    start = time.monotonic()
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    for step, chosen in batches:
        # bf16, and attention as plain products: on a CPU the fused kernel's backward is most of a step
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            value = loss(step, chosen)
        optimiser.zero_grad()
        with sdpa_kernel(SDPBackend.MATH):
            value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        if step % 50 == 0:
            log.info("  step %d  loss %.4f  %.0f s", step, value.item(), time.monotonic() - start)


STEPS = {"toy_clip": 1000, "toy_siglip": 2200, "toy_dino": 300, "toy_sam": 500}
BATCH = {"toy_clip": 96, "toy_siglip": 96, "toy_dino": 64, "toy_sam": 12}


def train(card: TeacherCard, data: TrainingSet, *, steps: int) -> tuple[ToyViT, TextTower | None]:
    """Train the network of a toy card, and its text tower where it has one, from random weights."""
    torch.manual_seed(0)
    net = build(card, "random").requires_grad_(True).train()
    assert isinstance(net, ToyViT)
    teacher = Teacher(card, nn.Identity())
    crops = Crops(data.images_B3HW, teacher, batch=BATCH[card.name], seed=0)
    text = None
    if card.text is not None:
        vocabulary = sorted({word for caption in data.captions for word in split_words(caption)})
        text = TextTower(tuple(vocabulary), width=64, out=card.output.summary or 0)
        train_contrastive(net, text, data, crops, steps=steps, sigmoid=card.name == "toy_siglip")
    elif data.instances_BHW is None:
        net = train_dino(net, crops, steps=steps)
    else:
        train_sam(net, data, teacher, batch=BATCH[card.name], steps=steps)
    net = net.eval().requires_grad_(False)
    sample = Teacher(card, net).encode(data.images_B3HW[:64])
    net.feature_scale.fill_(FEATURE_STD[card.name] / sample.features_BCHW.std())
    return net, text


def save(path: Path, net: ToyViT, text: TextTower | None, numbers: dict[str, float]) -> None:
    """Write fp16 weights, the vocabulary and what was measured into one safetensors file."""
    state = {f"vision.{k}": v for k, v in net.state_dict().items()}
    metadata = {k: f"{v:.4f}" for k, v in numbers.items()} | {"licence": "Apache-2.0"}
    if text is not None:
        state |= {f"text.{k}": v for k, v in text.state_dict().items()}
        metadata["vocabulary"] = " ".join(text.vocabulary)
    save_tensors(path, {k: v.half() for k, v in state.items()}, metadata)


def main() -> None:
    """Render, train, measure and write the teachers asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for NAME.safetensors")
    parser.add_argument("--teachers", nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--scenes", type=int, default=6000, help="training scenes (a third of it for toy_sam)")
    parser.add_argument("--effort", type=float, default=1.0, help="factor on the number of steps")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    test = ToyScenes.render(TEST_SEED, range(600), size=128)
    images = cache(lambda: TrainingSet.render(options.scenes, size=128, instances=False))
    masks = cache(lambda: TrainingSet.render(options.scenes // 3, size=192, instances=True))
    for name in options.teachers:
        card = load_card(name)
        data = masks() if card.output.summary is None else images()
        log.info("%s: %d scenes", name, len(data.images_B3HW))
        net, text = train(card, data, steps=int(STEPS[name] * options.effort))
        speaks = None if text is None else text_tower.TextTower("toy", {}, text, text.tokenize)
        numbers = measure(Teacher(card, net), speaks, test)
        torch.manual_seed(1)
        untrained = measure(Teacher(card, build(card, "random")), None, test)
        numbers |= {f"random_weights_{k}": v for k, v in untrained.items()}
        for key, value in numbers.items():
            log.info("  %-34s %.4f", key, value)
        save(options.out / f"{name}.safetensors", net, text, numbers)


if __name__ == "__main__":
    main()
