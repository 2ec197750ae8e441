"""A run folder as a training leaves it, without the training: a tiny student with everything that an export has to fold.

Spectral reparametrisation, weight noise, LayerScale and PHI-S balancers of the toy teachers' channels.
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from radio_distill.balance import Balancer, Moments, fit, save_balancers
from radio_distill.config.load import dump, load_card, load_recipe
from radio_distill.config.recipe import BuiltInBalance, Recipe
from radio_distill.distill.training import export_student
from radio_distill.network.arch import AdaptorSlot
from radio_distill.network.student import Student
from radio_distill.runs import Meta
from radio_distill.student.build import build_student
from radio_distill.student.start import parametrise

TINY = [
    "student.overrides={patch_size: 4, embed_dim: 32, depth: 4, num_heads: 2, init_values: 0.3}",
    "student.max_size=64",
    "student.heads={hidden: 16, inner: 1}",
    "student.damp=0.01",
    "student.vitdet={windows: [2, 4], num_global: 2}",
    "start={kind: scratch}",
]
STEP = 7
SIZES = [(32, 32), (16, 64), (72, 24)]
"""Square, wide, and tall beyond the position table."""


def tiny_recipe(*overrides: str) -> Recipe:
    return load_recipe("toy/stage1", [*TINY, *overrides])


def untrained(recipe: Recipe, seed: int = 0) -> tuple[Student, dict[str, Balancer]]:
    """The student as a training holds it (parametrised, train mode), and statistics of random features."""
    torch.manual_seed(seed)
    cards = {name: load_card(name) for name in recipe.teachers}
    slots = [
        AdaptorSlot(n, c.output.summary, c.output.features, use_summary=c.output.summary is not None) for n, c in cards.items()
    ]
    student = build_student(recipe.student, slots)
    for name, parameter in student.named_parameters():
        if name.endswith(("bias", "norm1.weight", "norm2.weight")):
            torch.nn.init.normal_(parameter, 0.5, 0.3)
    parametrise(student, recipe.student)
    balancers = {}
    for name, card in cards.items():
        moments = Moments(card.output.features)
        moments.update(torch.randn(2, card.output.features, 16, 16) * torch.rand(card.output.features, 1, 1) + 0.5)
        balancers[name] = fit(BuiltInBalance(), moments, name)
    return student.train(), balancers


def make_run(run: Path, *overrides: str, step: int = STEP) -> Path:
    """Write the folder of a run with one checkpoint; returns it."""
    recipe = tiny_recipe(*overrides)
    student, balancers = untrained(recipe)
    checkpoint = run / "checkpoints" / f"step-{step:08d}"
    export_student(student, student.state_dict(), balancers, checkpoint / "student")
    save_balancers(checkpoint / "balancers", balancers)
    (checkpoint / "meta.json").write_text(json.dumps(asdict(Meta(step, 1, 1, recipe.name, "student"))))
    (run / "checkpoints" / "latest").write_text(checkpoint.name + "\n")
    (run / "recipe.yaml").write_text(dump(recipe))
    return run


def pictures(size: tuple[int, int], count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(size[0]))


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert got.shape == want.shape
    torch.testing.assert_close(got.float(), want.float(), atol=tolerance, rtol=tolerance)


def flat(features_BCHW: torch.Tensor) -> torch.Tensor:
    """A map as other libraries give it: (B, H*W, C)."""
    return features_BCHW.flatten(2).transpose(1, 2)
