"""Upsamplers of toy teachers that were not trained: real statistics, random network and bias map, saved as a training saves them."""

from functools import cache
from pathlib import Path

import torch

from radio_distill.balance import Balancer, Moments, fit
from radio_distill.config.load import load_card
from radio_distill.config.recipe import BuiltInBalance
from radio_distill.config.upsampler import Network
from radio_distill.config.upsampler_recipe import Downsampler
from radio_distill.teachers.base import load_teacher
from radio_distill.toyworld import render_images
from radio_distill.upsamplers.folder import SavedUpsampler, provenance, save_upsampler
from radio_distill.upsamplers.form import form_of
from radio_distill.upsamplers.sharpener import Sharpener


@cache
def statistics(teacher: str) -> Balancer:
    card = load_card(teacher)
    images = torch.from_numpy(render_images(0, range(4), size=card.input.size)).permute(0, 3, 1, 2)
    moments = Moments(card.output.features)
    moments.update(load_teacher(card).encode(images).features_BCHW)
    return fit(BuiltInBalance(), moments, teacher)


def made(teacher: str = "toy_clip", *, steps: int = 100, seed: int = 0, **network: object) -> SavedUpsampler:
    has_map = network.get("kind", "featsharp") in ("featsharp", "bilinear", "tile", "s2")  # as recipes of these kinds have it
    card, spec = load_card(teacher), Network(**{"debias": has_map, **network})
    torch.manual_seed(seed)
    side = card.input.size // card.input.patch
    sharpener = Sharpener(spec, card.output.features, (side, side), statistics(teacher))
    for name, parameter in sharpener.named_parameters():
        if "bias_buffer" in name or "gamma" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    reduction = Downsampler(kernel=3, kind="simple" if spec.kind == "any" else "attention")
    downsampler = form_of(spec.reference).downsampler(reduction, card.output.features)
    facts = provenance(recipe="made", step=steps, images=steps)
    for module in (sharpener, downsampler):
        module.eval().requires_grad_(False)
    return SavedUpsampler(sharpener, downsampler, spec, card, card.input.size, reduction, facts)


def make(folder: Path, teacher: str = "toy_clip", **options: object) -> str:
    save_upsampler(made(teacher, **options), folder)
    return str(folder)
