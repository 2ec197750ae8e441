"""One whole training step of an upsampler against tensors of the reference implementation, found by globbing."""

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import golden_cases
from safetensors import safe_open
from safetensors.torch import load_file

from radio_distill.balance import Balancer
from radio_distill.balance.phi_s import from_parts
from radio_distill.config.upsampler import Network
from radio_distill.config.upsampler_recipe import Objective
from radio_distill.homography import warp
from radio_distill.types import VisionOutput
from radio_distill.upsamplers.crf import crf
from radio_distill.upsamplers.map_weights import Masks, seam_weights
from radio_distill.upsamplers.metrics import total_variation
from radio_distill.upsamplers.mmd import map_mmd
from radio_distill.upsamplers.objective import Base, Views
from radio_distill.upsamplers.published import PublishedAttention, PublishedLoss
from radio_distill.upsamplers.sharpener import Sharpener

CASES = pytest.mark.parametrize("path", golden_cases("featsharp/train_step_*.safetensors"), ids=lambda p: p.stem)
OURS = {"upsampler.": "network.", "downsampler.": "downsampler.", "scale_net.": "uncertainty.", "bias_buffer.": "bias_buffer."}


@CASES
def test_losses_of_a_step_are_the_published_ones(path):
    g, run = _run(path)
    parts = run.loss.parts
    logged = {key.removeprefix("out.loss/"): value for key, value in g.items() if key.startswith("out.loss/")}
    uncertainty = parts.get("uncertainty", torch.zeros(()))
    assert _close(parts["views"], logged["rec"])
    assert _close(uncertainty, logged.get("rec_unc_reg", torch.zeros(())))
    assert _close(parts["raw_error"], logged["rec_raw_denorm"])
    assert _close(run.loss.total - uncertainty, logged["total"])
    assert _close(run.loss.total, sum(value for key, value in g.items() if key.startswith("out.backward_loss_")))
    assert _close(g["out.dist_variance"] / parts["raw_error"], g["out.fidelity"])


@CASES
def test_terms_of_the_map_are_the_logged_ones(path):
    g, run = _run(path)
    high, masks = run.base.high_BCHW.detach(), run.views.masks
    guide = F.interpolate(run.base.image_B3HW, high.shape[2:], mode="bilinear")
    assert _close(total_variation(high, masks.base_B1HW, least=0.5), g["out.loss/tv"])
    assert _close(crf(high, guide, run.base.seeds_B, valid_B1HW=masks.crf_B1HW, least=0.5), g["out.loss/crf"])
    assert _close(map_mmd(run.base.low_BChw, high, pick="farthest", kind="median_with_zeros"), g["out.loss/mmd"])


@CASES
def test_gradients_of_a_step_are_the_published_ones(path):
    g, run = _run(path)
    found = dict(run.sharpener.named_parameters()) | dict(run.objective.named_parameters())
    for key, expected in g.items():
        if key.startswith("grad."):
            got = found[_our_name(key.removeprefix("grad."))].grad
            assert (got - expected).abs().max() < 1e-3 * expected.abs().max(), key


@CASES
def test_seam_weights_are_the_published_ones(path):
    g, _ = _run(path)
    config, size = _config(path), tuple(g["mid.loss_grid"].shape[2:])
    tile = config["model_resolution"] // config["patch_size"]
    assert (seam_weights(size, (tile, tile), config["grid_weight"], "cpu") - g["mid.loss_grid"]).abs().max() < 2e-5


@cache
def _run(path):
    """The file's step, done by our modules with their gradients: (golden tensors, what came out)."""
    g, config = load_file(path), _config(path)
    side, patch, count = config["model_resolution"], config["patch_size"], range(1, config["n_jitters"] + 1)
    channels, grid = config["feat_dim"], (side // patch, side // patch)
    high_grid = (grid[0] * config["upsample_factor"],) * 2
    rotation, mean = g["sd.normalizer.rotation"], g["sd.normalizer.mean"]
    balancer = Balancer("phi_s", *from_parts(g["sd.normalizer.alpha"], rotation), offset_C=mean, mean_C=mean)
    sharpener = Sharpener(_network(config), channels, grid, balancer)
    options = Objective(
        uncertainty=config["predicted_uncertainty"], seam=config["grid_weight"],
        tv=config["tv_weight"], crf=config["crf_weight"], mmd=config["mmd_weight"], reference=True,
    )  # fmt: skip
    objective = PublishedLoss(channels, PublishedAttention(channels, _kernel(config)), options)
    state = {
        _our_name(k): v.float() for k, v in ((k.removeprefix("sd."), v) for k, v in g.items()) if k.startswith(tuple(OURS))
    }
    for module in (sharpener, objective):
        module.load_state_dict(
            {k: v for k, v in state.items() if k.split(".")[0] in dict(module.named_children())}, strict=True
        )

    def encode(pixels):
        return VisionOutput(None, torch.tanh(F.conv2d(pixels, g["toy.weight"], g["toy.bias"], stride=patch)))

    def small(image):
        return F.interpolate(image, (side, side), mode="bilinear")

    images = [_whiten(g[f"in.image_{i}"], config["conditioner"]) for i in (0, *count)]
    sharp = sharpener(encode, images[0], (side, side))
    targets = [sharpener.generate(encode, small(image)).features_BCHW for image in images[1:]]
    matrices = torch.stack([g[f"in.homography_{i}"] for i in count])
    valid_base, valid_views = g["in.valid_0"][:, None], [g[f"in.valid_{i}"][:, None] for i in count]
    masks = _masks(valid_base, valid_views, matrices, (side, side), grid, high_grid)
    keep = torch.stack([g[f"in.keep_mask_{i}"].float() for i in count])
    base = Base(sharp.low_BChw, sharp.high_BCHW, small(images[0]), torch.arange(len(images[0])))
    views = Views(torch.stack(targets), matrices, masks, keep)
    loss = objective(base, views, balancer)
    loss.total.backward()
    return g, SimpleNamespace(loss=loss, base=base, views=views, sharpener=sharpener, objective=objective)


def _masks(base, views, matrices, teacher_size, grid, high_grid):
    """The published masks from those of real pixels: the base's at the teacher's size is warped for the views, but not for CRF."""

    def nearest(mask, size):
        return F.interpolate(mask.float(), size, mode="nearest")

    def both(mask, matrix, view, size):
        seen = warp(mask.float(), matrix, size, mode="nearest", padding="zeros", align_corners=True)
        return (seen * nearest(view, size)).bool()

    cells = [both(nearest(base, teacher_size), matrix, view, grid) for matrix, view in zip(matrices, views, strict=True)]
    return Masks(torch.stack(cells), nearest(base, high_grid).bool(), both(base, matrices[0], views[0], high_grid))


def _network(config):
    kind, *flags = config["upsampler"].split(".")
    if kind != "featsharp":
        return Network(kind=kind, factor=config["upsample_factor"], reference=True)
    inputs = next((tuple(f.split("-")[1:]) for f in flags if f.startswith("inputs-")), ("jbu", "tiles"))
    window = next((int(f.removeprefix("wnd-")) for f in flags if f.startswith("wnd-")), 7)
    return Network(
        factor=config["upsample_factor"], inputs=inputs, window=window, norm="no-ln" not in flags,
        progressive="prog" in flags, reference=True,
    )  # fmt: skip


def _kernel(config):
    return next(int(word.removeprefix("k=")) for word in config["downsampler"].split() if word.startswith("k="))


def _our_name(name):
    prefix = next(p for p in OURS if name.startswith(p))
    return OURS[prefix] + name.removeprefix(prefix)


def _whiten(image, conditioner):
    mean, std = (torch.tensor(conditioner[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return (image - mean) / std


def _config(path: Path) -> dict:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["config"])


def _close(got, expected):
    got, expected = (float(torch.as_tensor(value).detach()) for value in (got, expected))
    return abs(got - expected) < 2e-5 * max(1, abs(expected))
