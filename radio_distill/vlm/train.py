"""Train one stage of a VLM: `radio-distill vlm train RECIPE`. The loop, engine, run folder and resume are those of every training.

    conversations -> tokens, pixels -> student -> projector -> language model -> loss on the answers

Shapes: B conversations, N tokens, K words of the vocabulary; V pictures, C channels, h w the student's grid, P = h * w positions.
"""

from __future__ import annotations

import logging
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..config.vlm_recipe import FromParts, VlmRecipe
from ..log.sinks import hours_left
from ..network.student import Student
from ..runs import latest
from ..train import distributed
from ..train.loop import mean_step, train_one
from ..train.optim import parameter_groups
from ..train.run import RunFolder
from ..train.snapshot import resume
from ..train.training import Training
from ..train.writing import Files
from ..types import Batch, Losses
from .batches import TextBatch, TextStreams
from .conversations import read_conversations
from .lora import add_lora, merge_lora
from .model import Vlm, build_vlm, load_vlm, save_vlm
from .prompt import IGNORE
from .tower import StudentTower, maps_of

__all__ = ["VlmTask", "train_vlm"]

log = logging.getLogger(__name__)


class VlmTask(nn.Module):
    """The model and its loss; what is not learned has no gradient."""

    def __init__(self, recipe: VlmRecipe, vlm: Vlm) -> None:
        super().__init__()
        self.recipe, self.model = recipe, vlm.model
        self.model.requires_grad_(False)
        self.model.model.multi_modal_projector.requires_grad_(True)
        if recipe.lora is not None:
            add_lora(self.model.model.language_model, recipe.lora)
        elif recipe.trains == "all":
            self.model.model.language_model.requires_grad_(True)
            self.model.lm_head.requires_grad_(True)
        if recipe.grad_checkpointing:
            self.model.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.config.use_cache = False
        self._anchor: list[Student] = []
        """The student as it came, which is neither trained nor saved."""
        if recipe.tower is not None:
            self._anchor = [deepcopy(self.tower.student)]
            self.tower.config.student_dtype = "float32"  # steps are lost in less
            self.tower.float().learn(recipe.grad_checkpointing)

    @property
    def tower(self) -> StudentTower:
        found = self.model.model.vision_tower
        assert isinstance(found, StudentTower)
        return found

    def train(self, mode: bool = True) -> VlmTask:
        """A language model that is frozen stays in evaluation mode, as the student does."""
        super().train(mode)
        if self.recipe.trains == "projector":
            for module in self.model.model.language_model.modules():
                # a layer computes its activations again only in training mode; what is in it stays in evaluation mode
                module.training = mode and self.recipe.grad_checkpointing and isinstance(module, GradientCheckpointingLayer)
        return self

    def forward(self, batch: TextBatch, counts: Tensor) -> Losses:
        """This rank's share of the mean cross-entropy of the answers, and of the mean distance to the anchor.

        counts: predicted tokens and pictures of the whole step, (2,).
        """
        targets, pictures = counts
        bf16 = self.recipe.engine.precision == "bf16"
        with torch.autocast(batch.tokens_BN.device.type, torch.bfloat16, enabled=bf16):
            out = self.model(
                input_ids=batch.tokens_BN, attention_mask=batch.mask_BN, use_cache=False, **batch.pictures.inputs()
            )
        logits, labels = out.logits[:, :-1].flatten(0, 1).float(), batch.labels_BN[:, 1:].flatten()
        total = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum") / targets
        if not total.requires_grad:  # conversations without images, and the projector alone learns
            total = total + 0 * sum(p.sum() for p in self.model.model.multi_modal_projector.parameters())
        with torch.no_grad():
            right = (logits.argmax(1) == labels).sum() / targets  # a label that is ignored is no word
        parts = {"loss": total.detach(), "accuracy/tokens": right}
        if self.recipe.tower is not None:
            distance = self._distance(batch) / pictures.clamp_min(1)
            total = total + self.recipe.tower.gram * distance
            parts |= {"loss/gram": distance.detach()}
        return Losses(total, parts)

    def _distance(self, batch: TextBatch) -> Tensor:
        """`gram_distances` of the batch's pictures from what the student made of them at first, summed."""
        seen, (anchor,), device = self.tower.seen, self._anchor, batch.tokens_BN.device
        if not len(batch.pictures):
            return 0 * sum((p.sum() for p in self.tower.parameters()), torch.zeros((), device=device))
        with torch.no_grad():
            first = maps_of(anchor.to(device), batch.pictures, self.tower.config.patch_size)
        return torch.cat([gram_distances(ours, theirs) for ours, theirs in zip(seen, first, strict=True)]).sum()


def gram_distances(seen_VChw: Tensor, first_VChw: Tensor) -> Tensor:
    """Squared distance of the cosines between all P positions of a picture, over P * P, (V,), in fp32 (SigLino, arXiv:2512.20157)."""
    with torch.autocast(seen_VChw.device.type, enabled=False):
        ours_VPC, theirs_VPC = (F.normalize(x.float().flatten(2).mT, dim=2) for x in (seen_VChw, first_VChw))
        return (ours_VPC @ ours_VPC.mT - theirs_VPC @ theirs_VPC.mT).square().mean((1, 2))


def _groups(task: VlmTask, recipe: VlmRecipe) -> list[dict[str, Any]]:
    """The student's weights, which are the trunk here, with their own learning rate."""
    groups = parameter_groups(task, recipe.optim.weight_decay, is_head=lambda name: "vision_tower" not in name.split("."))
    rate = recipe.tower.lr / recipe.optim.lr if recipe.tower is not None else 1.0
    return [{**group, "rate": rate if group["name"].startswith("trunk") else 1.0} for group in groups]


class VlmTraining(Training):
    """The state of one stage."""

    artifact = "vlm"

    def __init__(self, recipe: VlmRecipe, world: distributed.World, run: RunFolder, streams: TextStreams, vlm: Vlm) -> None:
        self.recipe, self.vlm = recipe, vlm
        task = VlmTask(recipe, vlm).to(world.device)
        groups = _groups(task, recipe)
        super().__init__(recipe, world, run, streams, task, task, micro_steps=streams.micro_steps, ema_decay=0.0, groups=groups)

    @property
    def images_per_step(self) -> int:
        return self.recipe.samples

    def console_line(self, metrics: dict[str, float]) -> str:
        return (
            f"step {self.step:>6}/{self.recipe.optim.steps}  loss {metrics['loss']:.4f}  "
            f"tokens right {100 * metrics['accuracy/tokens']:.1f}%  grad {metrics['grad_norm']:.2f}  lr {metrics['lr']:.1e}  "
            f"{metrics['images_per_s']:.1f} conversations/s  data {100 * metrics['time/data']:.0f}%  "
            f"eta {hours_left(metrics)}"
        )

    def save_shared(self, folder: Path, files: Files) -> None:
        state = files.hold(merge_lora(self.vlm.model))
        files.later(lambda: save_vlm(self.vlm, folder / self.artifact, state=state))

    def load_shared(self, folder: Path) -> None:
        pass  # the engine's state is all there is

    def draw(self, batch: Batch) -> None:
        pass  # log.pictures is 0


def train_vlm(recipe: VlmRecipe) -> int:
    """Train or resume the stage a recipe describes; returns 0 when it is finished, 75 when it was asked to stop and has saved."""
    return train_one(recipe, build, one_step)


def build(recipe: VlmRecipe, world: distributed.World, run: RunFolder) -> VlmTraining:
    """Everything the loop needs, resumed where the run folder says so."""
    conversations = read_conversations(recipe.data.sources, max_bad=recipe.data.max_bad, told=world.is_main)
    torch.manual_seed(recipe.seed)
    start = recipe.start
    vlm = build_vlm(start) if isinstance(start, FromParts) else load_vlm(start.source)
    training = VlmTraining(recipe, world, run, TextStreams(recipe, vlm, conversations, world), vlm)
    if world.is_main:
        log.info("%s", describe(training, len(conversations)))
    found = latest(run.path)
    if found is not None:
        resume(training, found)
    training.streams.open({}, step=training.step)
    return training


def describe(t: VlmTraining, conversations: int) -> str:
    """One line on what is trained on what."""
    count = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in _parts(t.vlm.model).items()}
    learned = sum(p.numel() for p in t.engine.module.parameters() if p.requires_grad) / 1e6
    epochs = t.recipe.optim.steps * t.recipe.samples / max(1, conversations)
    sizes = ", ".join(f"{name} {millions:.2f} M" for name, millions in count.items())
    return (
        f"{sizes}; {learned:.2f} M learn; an image is {t.vlm.tower.tokens_text}; "
        f"{conversations} conversations, {epochs:.1f} epochs"
    )


def _parts(model: Any) -> dict[str, nn.Module]:
    inner = model.model
    return {"student": inner.vision_tower, "projector": inner.multi_modal_projector, "language model": inner.language_model}


def one_step(t: VlmTraining, step: int, batches: list[Any]) -> None:
    """One optimizer step over all micro-batches (`TextBatch`)."""
    mean_step(t, step, batches, torch.stack([batch.counts for batch in batches]).sum(0))
