"""What a fusion by one matrix (`mixer: linear`) can reach, for every weight of `loss.true_map`, without training.

    python bench/true_map.py --teacher toy_dino --images photos-00.tar --held-out photos-01.tar

With the downsampler as it starts and without a de-bias map, the loss of the views, and the distance to the teacher's own map of the
whole image, are quadratic in the matrix: the best one for each weight is solved. docs/upsamplers.md shows what came out. Run it
in examples/real_teachers for the teachers there.

Shapes: B images, G channels of all inputs and a constant, C of the teacher, h w its grid, H W twice that, N cells that count.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from radio_distill.align import detail, resize_map
from radio_distill.balance import Balancer, Moments, fit
from radio_distill.config.jitter import Jitter
from radio_distill.config.load import load_card
from radio_distill.config.recipe import BuiltInBalance
from radio_distill.data.held_out import HeldOut
from radio_distill.data.jitter import draw_matrices, warp_views
from radio_distill.homography import warp
from radio_distill.teachers.base import Teacher, load_teacher
from radio_distill.upsamplers.downsample import AttentionDownsampler
from radio_distill.upsamplers.map_weights import covered_masks
from radio_distill.upsamplers.tiling import cut, stitch

FACTOR, BATCH, CROPS_FROM = 2, 6, 1.25
WEIGHTS = [(0, 0), (0, 0.3), (0, 1), (0, 3), (0.05, 0), (0.1, 0), (0.15, 0), (0.2, 0), (0.3, 0), (1, 0), (0.1, 0.3)]
"""Of the true map, and of its detail alone."""
RIDGE = 1e-3
SEED = 73_000
"""Views of held-out images are drawn from here on, those of the others from 0."""


class Pairs(NamedTuple):
    """What the matrix is applied to, and what should come out, (N, G) and (N, C) each: views, the true map, its detail."""

    views: tuple[Tensor, Tensor]
    true: tuple[Tensor, Tensor]
    detail: tuple[Tensor, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="toy_dino")
    parser.add_argument("--size", type=int, help="pixels; default: the card's")
    parser.add_argument("--images", required=True)
    parser.add_argument("--held-out", required=True)
    parser.add_argument("--crops", type=int, default=96)
    parser.add_argument("--scored", type=int, default=24)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    teacher = load_teacher(load_card(options.teacher))
    size = options.size or teacher.card.input.size
    fitted, scored = HeldOut(options.images, options.crops), HeldOut(options.held_out, options.scored)
    moments = Moments(teacher.card.output.features)
    for images in batches(fitted, size):
        moments.update(teacher.forward(teacher.normalize(images)).features_BCHW.float())
    balancer = fit(BuiltInBalance(), moments, options.teacher)
    sums: dict[str, list[Tensor]] = {}
    for i, images in enumerate(crops(fitted, size)):
        for name, (x, y) in pairs(teacher, balancer, images, size, Jitter(views=2), seed=i * BATCH)._asdict().items():
            new = [x.T @ x, x.T @ y, torch.tensor(float(len(x)))]
            sums[name] = [a + b for a, b in zip(sums.get(name, [torch.zeros(()).double()] * 3), new)]
    held = [
        pairs(teacher, balancer, images, size, Jitter(), seed=SEED + i * BATCH)
        for i, images in enumerate(batches(scored, FACTOR * size))
    ]
    channels = moments.channels
    two = [*range(2 * channels), 3 * channels]
    for label, chosen in (("bilinear, tiles", two), ("bilinear, tiles, detail", [*range(3 * channels + 1)])):
        for weights in WEIGHTS:
            plain, true = scores(held, solve(sums, chosen, *weights))
            print(
                f"[{label}] true map {weights[0]}, detail {weights[1]}: fidelity_plain {plain:.3f}, fidelity_true {true:.3f}",
                flush=True,
            )


def batches(data: HeldOut, side: int) -> Iterator[Tensor]:
    """The images as squares of a side."""
    for start in range(0, data.count, BATCH):
        yield data.images(start, start + BATCH, side)


def crops(data: HeldOut, size: int) -> Iterator[Tensor]:
    """A random crop of each batch, the same for its images."""
    side = FACTOR * size
    draw = torch.Generator().manual_seed(0)
    for images in batches(data, round(CROPS_FROM * side)):
        y, x = torch.randint(0, images.shape[-1] - side + 1, (2,), generator=draw).tolist()
        yield images[:, :, y : y + side, x : x + side]


def pairs(teacher: Teacher, balancer: Balancer, images_B3HW: Tensor, size: int, jitter: Jitter, *, seed: int) -> Pairs:
    """Everything that two quadratic forms are made of, in double precision."""

    def encode(pixels: Tensor) -> Tensor:
        return balancer.forward(teacher.forward(pixels).features_BCHW.float())

    pixels = teacher.normalize(images_B3HW)
    low, tiles, true = encode(resize_map(pixels, (size, size))), stitch(encode(cut(pixels, FACTOR)), FACTOR), encode(pixels)
    grid, fine = (low.shape[2], low.shape[3]), (true.shape[2], true.shape[3])
    x_BGHW = torch.cat([resize_map(low, fine), tiles, detail(tiles, grid), torch.ones(len(low), 1, *fine)], 1)
    reduce = AttentionDownsampler(x_BGHW.shape[1]).eval()
    matrices = draw_matrices(torch.arange(len(low)) + seed, jitter, grid)
    seen, masks = warp_views(images_B3HW, matrices, (size, size), jitter.outside), covered_masks(matrices, grid).views_JB1hw
    views = [
        (
            vectors(reduce(warp(x_BGHW, matrix, fine), grid))[mask.flatten()],
            vectors(encode(teacher.normalize(view)))[mask.flatten()],
        )
        for matrix, mask, view in zip(matrices.float(), masks, seen)
    ]
    return Pairs(
        (torch.cat([x for x, _ in views]), torch.cat([y for _, y in views])),
        (vectors(x_BGHW), vectors(true)),
        (vectors(detail(x_BGHW, grid)), vectors(detail(true, grid))),
    )


def vectors(map_BCHW: Tensor) -> Tensor:
    return map_BCHW.permute(0, 2, 3, 1).flatten(0, 2).double()


def solve(sums: dict[str, list[Tensor]], chosen: list[int], true: float, of_detail: float) -> Tensor:
    """The matrix (G, C) of least error in the views + `true` times that of the map + `of_detail` times that of its detail."""
    weights = {"views": 1.0, "true": true, "detail": of_detail}
    square, mixed = (sum(weights[name] * parts[i] / parts[2] for name, parts in sums.items()) for i in (0, 1))
    assert isinstance(square, Tensor)
    assert isinstance(mixed, Tensor)
    matrix = torch.zeros_like(mixed)
    matrix[chosen] = torch.linalg.solve(square[chosen][:, chosen] + RIDGE * torch.eye(len(chosen)), mixed[chosen])
    return matrix


def scores(held: list[Pairs], matrix: Tensor) -> tuple[float, float]:
    """fidelity_plain and fidelity_true: variance over squared error."""
    return fidelity([p.views for p in held], matrix), fidelity([p.true for p in held], matrix)


def fidelity(of: list[tuple[Tensor, Tensor]], matrix: Tensor) -> float:
    x, y = torch.cat([x for x, _ in of]), torch.cat([y for _, y in of])
    return float((y - y.mean(0)).square().sum() / (x @ matrix - y).square().sum())


if __name__ == "__main__":
    main()
