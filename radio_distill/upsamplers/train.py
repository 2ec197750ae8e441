"""Train an upsampler: `radio-distill upsampler RECIPE`. The loop, engine, run folder and resume are those of every training.

    batch -> teacher (global view, tiles, J jittered views) -> network -> warp into the views -> downsampler -> loss

A network of kind `any` is trained with several teachers, one a step, in turn: the batch of a step holds images for that one, by its name.

Shapes: B batch, J views, C channels.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .. import viz
from ..align import resize_map
from ..balance import Balancer, check_balancers, load_balancers, name_of, save_balancers
from ..balance.window import StatisticsWindow
from ..config.cards import TeacherCard
from ..config.load import upsampler_cards
from ..config.upsampler import ANY
from ..config.upsampler_recipe import ONE, VIEWS, UpsamplerRecipe
from ..data.jitter import draw_matrices, warp_views
from ..data.views import ViewSpec
from ..log.meter import fidelities
from ..log.sinks import hours_left
from ..paths import expand
from ..runs import latest
from ..seeded import uniform
from ..student.spectral import apply_spectral, power_iterate
from ..teachers.base import Teacher, chunked, load_teacher
from ..tensors import save_tensors
from ..train import agree, distributed
from ..train.loop import mean_step, train_one
from ..train.partition import assign
from ..train.ranks import watch
from ..train.run import RunFolder
from ..train.snapshot import resume
from ..train.streams import Streams, forwards
from ..train.training import Training
from ..train.writing import Files
from ..types import Batch, Losses
from .downsample import KEEP
from .folder import SavedUpsampler, Seen, provenance, save_upsampler
from .form import form_of
from .map_weights import covered_masks
from .objective import Base, ViewLoss, Views
from .sharpener import Sharpener

__all__ = ["Inputs", "UpsamplerTask", "UpsamplerTraining", "statistics", "train_upsampler"]

log = logging.getLogger(__name__)


class Served(NamedTuple):
    """A teacher with the network around it."""

    teacher: Teacher
    sharpener: Sharpener
    size: tuple[int, int]
    """Of the teacher's input, in pixels."""

    @property
    def grid(self) -> tuple[int, int]:
        """Of the teacher's own map."""
        return self.size[0] // self.teacher.patch_size, self.size[1] // self.teacher.patch_size


class UpsamplerTask(nn.Module):
    """Sharpener, downsampler and loss: what is trained. Teachers are handed in, so that they are neither sharded nor saved."""

    def __init__(self, recipe: UpsamplerRecipe, served: dict[str, Served], loss: ViewLoss) -> None:
        """served: by the teacher's name; all share the network of the first."""
        super().__init__()
        self.recipe, self.loss = recipe, loss
        self.sharpener = next(iter(served.values())).sharpener
        self._served = [served]  # in a list: frozen networks, and the network again, must not become submodules

    @property
    def served(self) -> dict[str, Served]:
        """Every teacher and the sharpener around it, by name."""
        return self._served[0]

    def turn_of(self, batch: Batch) -> tuple[str, Served, Tensor]:
        """Whose turn a batch is, and its images (B, 3, H, W) in [0, 1] at factor times that teacher's size."""
        (name,) = batch.views
        return name, self.served[name], batch.views[name].images_B3HW.float() / 255

    def valid_cells(self, batch: Batch) -> Tensor:
        """How many cells of a batch's views count."""
        grid = self.turn_of(batch)[1].grid
        return covered_masks(draw_matrices(batch.seeds_B, self.recipe.jitter, grid), grid).views_JB1hw.float().sum()

    def forward(self, batch: Batch, cells: Tensor) -> Losses:
        """The share of one micro-batch in the step's loss. cells: how many count in the whole step, over all ranks."""
        recipe = self.recipe
        name, served, images = self.turn_of(batch)
        teacher, sharpener, size, grid = *served, served.grid
        encode = chunked(teacher, recipe.chunk)
        pixels = teacher.normalize(images)
        with self._autocast(pixels):
            sharp = sharpener(encode, pixels, size)
        matrices = draw_matrices(batch.seeds_B, recipe.jitter, grid)
        seen = warp_views(images, matrices, size, recipe.jitter.outside)
        targets = sharpener.generate(encode, teacher.normalize(seen.flatten(0, 1))).features_BCHW
        masks, keep = covered_masks(matrices, grid), self._keep(batch.seeds_B, grid)
        views = Views(targets.unflatten(0, seen.shape[:2]), matrices.float(), masks, keep)
        true = sharpener.generate(encode, pixels).features_BCHW if recipe.loss.true_map else None
        base = Base(sharp.low_BChw, sharp.high_BCHW, pixels, batch.seeds_B, true)
        step = self.loss(base, views, sharpener.balancer, cells=cells, share=len(batch) / recipe.images)
        error, variance, _ = step.fidelity
        parts = {f"loss/{name}": value for name, value in step.parts.items()}
        what = "views" if name == ONE else name
        parts |= {"loss": step.total.detach(), f"error/{what}": error, f"variance/{what}": variance}
        return Losses(step.total, parts)

    def _keep(self, seeds_B: Tensor, grid: tuple[int, int]) -> Tensor | None:
        """Which logits of the downsampler count in each view, drawn for the sample and not for the rank that sees it."""
        spec, views = self.recipe.downsampler, self.recipe.jitter.views
        if spec.kind != "attention":
            return None
        shape = (views, spec.kernel**2, *grid)
        return (uniform(seeds_B, "keep", n=math.prod(shape)).unflatten(1, shape).transpose(0, 1) < KEEP).float()

    def _autocast(self, x: Tensor) -> torch.autocast:
        return torch.autocast(x.device.type, torch.bfloat16, enabled=self.recipe.engine.precision == "bf16")

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Joint bilateral parameters and the uncertainty network learn at rates of their own; matrices may decay."""
        rates, decay = self.recipe.rates, self.recipe.optim.weight_decay
        groups: dict[tuple[str, bool], dict[str, Any]] = {}
        for name, parameter in self.named_parameters():
            kind = "uncertainty" if ".uncertainty." in name else "jbu" if ".jbu." in name else "rest"
            key = kind, parameter.ndim >= 2
            rate = {"uncertainty": rates.uncertainty, "jbu": rates.jbu, "rest": 1.0}[kind]
            label = kind if key[1] else f"{kind}/no_decay"
            group = {"name": label, "params": [], "weight_decay": decay if key[1] else 0.0, "freeze": 0, "rate": rate}
            groups.setdefault(key, group)["params"].append(parameter)
        return [groups[key] for key in sorted(groups)]


class UpsamplerTraining(Training):
    """The state of one upsampler's training."""

    artifact = "upsampler"

    def __init__(
        self, recipe: UpsamplerRecipe, world: distributed.World, run: RunFolder, inputs: Inputs, task: UpsamplerTask
    ) -> None:
        self.recipe, self.task = recipe, task
        super().__init__(
            recipe, world, run, inputs.streams, task, task,
            micro_steps=inputs.micro_steps, ema_decay=recipe.ema.decay, groups=task.parameter_groups(),
        )  # fmt: skip

    @property
    def images_per_step(self) -> int:
        return self.recipe.images

    def console_line(self, metrics: dict[str, float]) -> str:
        return (
            f"{self.recipe.teacher or 'any'}  step {self.step:>6}/{self.recipe.optim.steps}  loss {metrics['loss']:.4f}  "
            f"fidelity {fidelities(metrics, digits=3)}  grad {metrics['grad_norm']:.2f}  lr {metrics['lr']:.1e}  "
            f"{metrics['images_per_s']:.1f} img/s  data {100 * metrics['time/data']:.0f}%  eta {hours_left(metrics)}"
        )

    def saved(self) -> SavedUpsampler:
        """The upsampler as it stands."""
        recipe, task = self.recipe, self.task
        facts = provenance(recipe=recipe.name, step=self.step, images=self.step * recipe.images)
        seen = [Seen(one.teacher.card, one.size[0], self.run.teachers[name]) for name, one in task.served.items()]
        card, size, fingerprint = seen[0]
        return SavedUpsampler(
            task.sharpener, task.loss.downsampler, recipe.network, card, size, recipe.downsampler, facts, fingerprint,
            tuple(seen) if recipe.network.kind == ANY else (),
        )  # fmt: skip

    def save_shared(self, folder: Path, files: Files) -> None:
        average = files.hold(self.ema.state_dict() if self.ema is not None else {})
        state = average or files.hold(self.task.state_dict())
        names = {"sharpener.": "sharpener.", "loss.downsampler.": "downsampler."}
        plain = {
            new + key.removeprefix(old): x for old, new in names.items() for key, x in state.items() if key.startswith(old)
        }
        saved, balancers = self.saved(), {name: one.sharpener.balancer for name, one in self.task.served.items()}
        files.later(lambda: save_balancers(folder / "balancers", balancers, self.run.teachers))
        files.later(lambda: save_tensors(folder / "shared.safetensors", average))
        files.later(lambda: save_upsampler(saved, folder / self.artifact, state=plain))

    def load_shared(self, folder: Path) -> None:
        if self.ema is not None:
            self.ema.load_state_dict(load_file(folder / "shared.safetensors", device=str(self.world.device)))
        for name, balancer in load_balancers(folder / "balancers").items():
            self.task.served[name].sharpener.balancer = balancer.to(self.world.device)

    @torch.no_grad()
    def draw(self, batch: Batch) -> None:
        """PCA panel: image, the teacher's map, the upsampled map."""
        _, (teacher, sharpener, size), images = self.task.turn_of(batch)
        images = images[:6]
        self.task.eval()
        sharp = sharpener(teacher.forward, teacher.normalize(images), size)
        self.task.train()
        low = viz.resize(sharp.low_BChw, sharp.high_BCHW.shape[-2:])
        maps = viz.pca_rgb(torch.cat([low, sharp.high_BCHW.float()])).chunk(2)
        path = self.run.path / "pictures" / f"step-{self.step:08d}.png"
        viz.save_png(viz.panel({"image": images, "low": maps[0], "high": maps[1]}), path)


class Inputs:
    """The teachers by name, this rank's images, and how a step is divided."""

    def __init__(self, recipe: UpsamplerRecipe, world: distributed.World) -> None:
        dtype = torch.float32 if recipe.engine.teacher_precision == "fp32" else torch.bfloat16
        self.teachers = {name: load_teacher(card).to(world.device, dtype) for name, card in upsampler_cards(recipe).items()}
        assignment = assign(images={VIEWS: recipe.images}, costs={VIEWS: 1.0}, world_size=world.size)
        factor = recipe.network.factor
        specs = [ViewSpec(name, factor * recipe.each[name].size, x.patch_size) for name, x in self.teachers.items()]
        self.streams = Streams(recipe, assignment, world.rank, {VIEWS: partial(in_turn, specs)})
        self.micro_steps = max(forwards(recipe, assignment, rank) for rank in range(world.size))


def in_turn(specs: Sequence[ViewSpec], step: int) -> list[ViewSpec]:
    """The view of the teacher whose turn a step is."""
    return [specs[step % len(specs)]]


def train_upsampler(recipe: UpsamplerRecipe) -> int:
    """Train or resume the upsampler a recipe describes; returns 0 when it is finished, 75 when it was asked to stop and has saved."""

    return train_one(recipe, build, one_step)


def build(recipe: UpsamplerRecipe, world: distributed.World, run: RunFolder) -> UpsamplerTraining:
    """Everything the loop needs, resumed where the run folder says so."""
    inputs = Inputs(recipe, world)
    found = latest(run.path)
    balancers = load_balancers(found / "balancers") if found else statistics(recipe, world, inputs)
    training = assemble(recipe, world, run, inputs, balancers)
    training.streams.open(resume(training, found) if found else {}, step=training.step)
    return training


def assemble(
    recipe: UpsamplerRecipe, world: distributed.World, run: RunFolder, inputs: Inputs, balancers: dict[str, Balancer]
) -> UpsamplerTraining:
    """The training with first weights and closed streams."""
    torch.manual_seed(recipe.seed)
    served: dict[str, Served] = {}
    network: nn.Module | None = None
    for name, teacher in inputs.teachers.items():
        channels, size = teacher.card.output.features, recipe.each[name].size
        grid = (size // teacher.patch_size,) * 2
        sharpener = Sharpener(recipe.network, channels, grid, balancers[name].to(world.device), network)
        network, served[name] = sharpener.network, Served(teacher, sharpener, (size, size))
    channels = next(iter(served.values())).sharpener.channels  # of one teacher; with several nothing below depends on them
    downsampler = form_of(recipe.network.reference).downsampler(recipe.downsampler, channels)
    loss = form_of(recipe.loss.reference).loss(channels, downsampler, recipe.loss)
    task = UpsamplerTask(recipe, served, loss).to(world.device)
    if recipe.spectral:
        apply_spectral(task, init="one")
    return UpsamplerTraining(recipe, world, run, inputs, task)


def statistics(recipe: UpsamplerRecipe, world: distributed.World, inputs: Inputs) -> dict[str, Balancer]:
    """PHI-S of every teacher's maps at its own size: loaded, or from the images of the first `balance.window` steps of its own."""
    cards = {name: teacher.card for name, teacher in inputs.teachers.items()}
    if recipe.balance.path:
        folder = Path(expand(recipe.balance.path))
        return {name: _loaded(folder, card) for name, card in cards.items()}
    window, steps = StatisticsWindow(recipe.balance, cards, world.device), recipe.balance.window * len(cards)
    inputs.streams.open({})
    for step in range(steps):
        watch(recipe.engine.watchdog_minutes)
        agree.stop_if_asked(world.device)
        for batch in inputs.streams.next(world.device):
            for name, view in batch.views.items():
                size, teacher = recipe.each[name].size, inputs.teachers[name]
                pixels = resize_map(view.images_B3HW.float() / 255, (size, size))
                out = chunked(teacher, recipe.chunk)(teacher.normalize(pixels))
                window.moments[name].update(out.features_BCHW)
        if world.is_main and (step + 1) % max(1, steps // 5) == 0:
            log.info("statistics: %d of %d steps", step + 1, steps)
    inputs.streams.close()
    return window.refit({})


def _loaded(folder: Path, card: TeacherCard) -> Balancer:
    """What a folder holds of a card's teacher."""
    called = name_of(folder, card)
    loaded = load_balancers(folder, {called: card.output.features})[called]
    agree.on_main(lambda: check_balancers(folder, {called: card}))
    return loaded


def one_step(t: UpsamplerTraining, step: int, batches: list[Batch]) -> None:
    """One optimizer step over all micro-batches."""
    if t.recipe.spectral:
        power_iterate(t.task)
    mean_step(t, step, batches, torch.stack([t.task.valid_cells(batch) for batch in batches]).sum())
