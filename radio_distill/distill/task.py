"""The maths of one step: student -> adaptors -> losses. The only module the engine wraps.

Every loss is a sum over this rank's images divided by a *global* count, so the sum over ranks and micro-batches is the loss
of the step, whatever the number of ranks.

Shapes: B batch, T teachers, N class tokens, C channels, H W.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..align import enlarge_map, resample_to
from ..balance import Balancer
from ..config.recipe import Recipe
from ..config.sizes import at_step
from ..config.terms import Term
from ..errors import RecipeError
from ..losses import AdaLoss, Pair, drop_coefficients, evaluate, fidelity_sums, load_terms, mesa_terms
from ..network.student import Student, StudentTokens
from ..strips import Grids, join_maps, lengths_of, split_strip
from ..student.build import seeded_draws
from ..student.damp import set_damp_step
from ..tensors import Rows, all_reduce, own_rows
from ..train.ema import Ema
from ..types import Batch, Losses, Target, Targets

__all__ = ["DistillTask", "Counts", "predict_map", "student_tokens"]

Counts = dict[str, Tensor | float]
Terms = dict[Term, Tensor]
"""Per-image losses (B,) of one teacher, by the row of the table (config/terms.py)."""


class DistillTask(nn.Module):
    """Student, adaptors and losses."""

    def __init__(self, recipe: Recipe, student: Student) -> None:
        super().__init__()
        self.recipe = recipe
        self.student = student
        self.terms = load_terms(recipe)
        """Every loss term with its function."""
        self.trunk_frozen = False
        """While True only the heads get gradients (the first `optim.freeze_trunk` steps)."""
        self.windows: dict[str, int | None] = {}
        """Side in tokens of this step's attention windows, by partition; None: global attention."""
        self.balancers: dict[str, Balancer] = {}
        """Read for fidelity and dispersion; the service owns them."""
        self.gather: dict[str, Callable[[Tensor], Rows]] = {}
        """How a term gets the rows of the other ranks that run a partition, by its name; of one alone its own."""
        self.adaloss = AdaLoss(recipe.loss.adaloss) if recipe.loss.adaloss is not None else None
        self.step_terms: dict[str, Tensor] = {}
        self.mesa_on = False
        self._ema: list[Ema] = []

    def attach(self, balancers: dict[str, Balancer], ema: Ema | None) -> None:
        """Give the task what it reads but does not own: the balancers and the EMA student."""
        if self.recipe.loss.mesa.weight > 0 and ema is None:
            raise RecipeError("loss.mesa.weight needs the EMA student; set ema.decay above 0")
        self.balancers = balancers
        self._ema = [ema] if ema is not None else []

    def set_step(self, step: int) -> None:
        """What changes with the step: the frozen trunk, the attention window, MESA, weight noise."""
        recipe = self.recipe
        self.trunk_frozen = step < recipe.optim.freeze_trunk
        self.mesa_on = recipe.loss.mesa.weight > 0 and step >= recipe.loss.mesa.start
        self.windows = {name: self._draw_window(name, step) for name in recipe.partitions}
        if recipe.student.damp > 0:
            set_damp_step(self.student, recipe.seed, step)

    def _draw_window(self, partition: str, step: int) -> int | None:
        """One of the windows that divide the partition's grid, or None."""
        vitdet, side = self.recipe.student.vitdet, at_step(self.recipe, partition, step).size // self.student.patch_size
        if self.recipe.partitions[partition].is_native:
            return None
        fitting = [window for window in vitdet.windows if side % window == 0]
        draw = random.Random(f"{self.recipe.seed}/{step}/{partition}")
        return draw.choice(fitting) if fitting and draw.random() < vitdet.probability else None

    def idle_loss(self) -> Tensor:
        """Zero, for a rank with fewer micro-batches than others: it still takes part in the backward pass."""
        return next(self.student.adaptors.parameters()).sum() * 0

    def forward(self, batch: Batch, targets: Targets, counts: Counts) -> Losses:
        """Losses of one micro-batch. counts: per teacher, the global number of valid target positions of this partition; of a
        native one of its images."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.trunk_frozen), self._autocast(batch):
            tokens = student_tokens(self.student, batch, window=self.windows[batch.partition])
        reference = self._ema_tokens(batch) if self.mesa_on else None
        return self._losses(batch, targets, counts, tokens, reference)

    def _autocast(self, batch: Batch) -> torch.autocast:
        return torch.autocast(batch.seeds_B.device.type, torch.bfloat16, enabled=self.recipe.engine.precision == "bf16")

    @torch.no_grad()
    def _ema_tokens(self, batch: Batch) -> StudentTokens:
        """What the EMA student makes of its own crop."""
        average = {f"student.{name}": x for name, x in self._ema[0].state_dict().items()}
        with self._autocast(batch):
            return functional_call(_Tokens(self.student), average, (_pixels(batch, "ema_student"), batch.seeds_B))

    def _losses(
        self, batch: Batch, targets: Targets, counts: Counts, tokens: StudentTokens, reference: StudentTokens | None
    ) -> Losses:
        parts: dict[str, Tensor] = {}
        terms = {name: self._terms(batch, name, target, counts[name], tokens, parts) for name, target in targets.items()}
        self._drop_teachers(terms, batch.seeds_B)
        total = tokens.features_BCHW.new_zeros((), dtype=torch.float32)
        for name, losses_B in terms.items():
            for term, loss_B in losses_B.items():
                value = loss_B.sum()
                parts[f"loss/{batch.partition}/{name}/{term.name}"] = value.detach()
                total = total + term.weight(self.recipe, name) * self._balanced(f"{name}/{term.name}", value)
        if reference is not None:
            mesa = self._mesa(batch, tokens, reference)
            parts[f"loss/{batch.partition}/mesa"] = mesa.detach()
            total = total + self.recipe.loss.mesa.weight * mesa
        if batch.grids is not None:
            positions = tokens.features_BCHW.shape[-1]
            for what, number in (("images", len(batch)), ("tokens", positions)):  # of a step, which vary
                parts[f"{what}/{batch.partition}"] = batch.seeds_B.new_full((), number, dtype=torch.float64)
        total = total * self.recipe.partitions[batch.partition].weight
        return Losses(total, parts | {"loss": total.detach()})

    def _terms(
        self, batch: Batch, name: str, target: Target, count: Tensor | float, tokens: StudentTokens, parts: dict[str, Tensor]
    ) -> Terms:
        """Per-image losses of one adaptor; adds the sums that make its fidelity to `parts`."""
        balancer, cell = self.balancers[name], self.recipe.partitions[batch.partition]
        images = count if cell.is_native else cell.units
        features, mask = self._predict(batch, name, target, tokens)
        gather = self.gather.get(batch.partition, own_rows)
        pairs = {"features": Pair(features, target.features_BCHW, mask, balancer, gather, batch.grids)}
        terms: Terms = {}
        for term, function in self.terms.items():
            if not term.is_computed(self.recipe, name):
                continue
            if term.head == "summary" and target.summary_BC is not None and "summary" not in pairs:
                summary = self._predict_summary(batch, name, tokens, features)
                pairs["summary"] = Pair(summary, target.summary_BC, None, balancer, gather)
            if term.head in pairs:
                sums_B = evaluate(term, function, pairs[term.head], term.options(self.recipe))
                if batch.grids is not None and term.per == "position":  # one image, one vote, whatever its size
                    sums_B = sums_B / lengths_of(batch.grids, sums_B.device)
                terms[term] = sums_B / (count if term.per == "position" else images)
        with torch.no_grad():
            error, variance, _ = fidelity_sums(features, target.features_BCHW, balancer, mask)
        parts[f"error/{batch.partition}/{name}"], parts[f"variance/{batch.partition}/{name}"] = error, variance
        return terms

    def _predict_summary(self, batch: Batch, name: str, tokens: StudentTokens, features_BCHW: Tensor) -> Tensor:
        """The adaptor's summary, (B, C). features_BCHW: what it predicts of the balanced map."""
        adaptor = self.student.adaptor(name)
        with self._autocast(batch):
            if adaptor.pool is not None:
                raw = self.balancers[name].inverse(features_BCHW)
                maps = [raw] if batch.grids is None else split_strip(raw, batch.grids)
                return self.balancers[name].summary(torch.cat([adaptor.pooled(part) for part in maps]))
            return adaptor.summary(tokens.class_tokens_BNC[:, adaptor.token])

    def _predict(self, batch: Batch, name: str, target: Target, tokens: StudentTokens) -> tuple[Tensor, Tensor | None]:
        """The adaptor's map on the target's grid. The *backbone* map is resized, then the head runs (RADIO issue #122); with
        `grid: larger` what the head gives is enlarged (EUPE)."""
        features, mask = tokens.features_BCHW, target.mask_B1HW
        grid, (height, width) = self.recipe.partitions[batch.partition].teachers[name].grid, target.features_BCHW.shape[-2:]
        if grid == "teacher":
            own = batch.views["student"].boxes_B4
            features, mask = resample_to(features.float(), own, target.boxes_B4, (height, width), aligned=self._aligned)
        with self._autocast(batch):
            predicted = predict_map(self.student, name, features, batch.grids)
        return enlarge_map(predicted, (height, width)) if grid == "larger" else predicted, mask

    def _mesa(self, batch: Batch, tokens: StudentTokens, reference: StudentTokens) -> Tensor:
        """Shift-equivariant MESA (C-RADIOv4, eq. 2): agree with the EMA student, which saw another crop."""
        height, width = tokens.features_BCHW.shape[-2:]
        boxes = (batch.views["ema_student"].boxes_B4, batch.views["student"].boxes_B4)
        theirs, mask = resample_to(reference.features_BCHW.float(), *boxes, (height, width), aligned=self._aligned)
        sums_B, counts_B = mesa_terms(tokens.features_BCHW.float(), theirs, mask)
        return (sums_B / counts_B.clamp_min(1)).sum() / self.recipe.partitions[batch.partition].units

    def _balanced(self, name: str, term: Tensor) -> Tensor:
        """A term over its running mean where AdaLoss is on."""
        if self.adaloss is None:
            return term
        before = self.step_terms.get(name)
        self.step_terms[name] = term.detach() if before is None else before + term.detach()
        return self.adaloss.scale(name, term)

    def update_adaloss(self) -> None:
        """Move AdaLoss's means by this step's terms, summed over ranks. A collective, when AdaLoss is on."""
        if self.adaloss is None:
            return
        weights = {
            f"{adaptor.name}/{term.name}": term.weight(self.recipe, adaptor.name)
            for adaptor in self.student.arch.adaptors
            for term in self.terms
            if term.head == "features" or adaptor.summary_dim
        }
        zero = torch.zeros((), device=self._device)  # of a rank that did not compute the term
        summed = torch.stack([self.step_terms.get(name, zero).float() for name in weights])
        all_reduce(summed)
        self.adaloss.update({name: x for (name, weight), x in zip(weights.items(), summed) if weight > 0})
        self.step_terms = {}

    @property
    def _device(self) -> torch.device:
        return next(self.student.parameters()).device

    @property
    def _aligned(self) -> bool:
        return self.recipe.data.shift_std == 0

    def _drop_teachers(self, terms: dict[str, Terms], seeds_B: Tensor) -> None:
        """UNIC's teacher dropping: scale every teacher's terms by its coefficient, per image."""
        if self.recipe.loss.drop_teachers == 0:
            return
        losses_BT = torch.stack([torch.stack(list(of_one.values())).sum(0).detach() for of_one in terms.values()], dim=1)
        keep_BT = drop_coefficients(losses_BT, seeds_B, self.recipe.loss.drop_teachers)
        for keep_B, of_one in zip(keep_BT.unbind(1), terms.values()):
            for term in of_one:
                of_one[term] = of_one[term] * keep_B


class _Tokens(nn.Module):
    """`student.forward_tokens` as a module's forward, which is what functional_call can run with other weights."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, images_B3HW: Tensor, seeds_B: Tensor) -> StudentTokens:
        return self.student.forward_tokens(images_B3HW, draws=seeded_draws(self.student, seeds_B))


def student_tokens(student: Student, batch: Batch, *, window: int | None = None) -> StudentTokens:
    """What a student makes of its images; in train mode with their own viewports. Of a native partition the map is a strip."""
    draws = seeded_draws(student, batch.seeds_B)
    if batch.grids is None:
        return student.forward_tokens(_pixels(batch, "student"), draws=draws, window=window)
    each = student.forward_packed([image.float() / 255 for image in batch.images("student")], draws=draws)
    return StudentTokens(torch.cat([t.class_tokens_BNC for t in each]), join_maps([t.features_BCHW for t in each]))


def predict_map(student: Student, name: str, features: Tensor, grids: Grids | None) -> Tensor:
    """What an adaptor says of a map; of a strip a strip."""
    adaptor = student.adaptor(name)
    if grids is None or adaptor.is_pointwise:
        return adaptor.features(features)
    return join_maps([adaptor.features(part) for part in split_strip(features, grids)])


def _pixels(batch: Batch, consumer: str) -> Tensor:
    return batch.views[consumer].images_B3HW.float() / 255
