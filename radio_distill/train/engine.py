"""DeepSpeed behind seven calls: forward, backward, grad_norm, step, save, load and the learning rate.

The task returns this rank's share of the loss; the gradient of a step is the *sum* over ranks and micro-batches. All
ranks make the same number of micro-batches per step but need not run the same modules: gradients are kept where autograd
puts them and reduced once, in the order of the parameters, with zeros for those that a rank did not use. (DeepSpeed's own
hooks reduce in the order of the backward pass, which would mix up parameters between ranks whose partitions differ.)
Only ZeRO-3 asks more: it gathers weights module by module, so all ranks must run the same modules.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..config.recipe import Job, Optim
from ..errors import CheckpointError
from ..tensors import all_reduce
from .distributed import World
from .engine_config import deepspeed_config
from .optim import Lamb, make_optimizer, schedule, set_step
from .writing import Files

__all__ = ["Engine", "to_universal"]

SUMMARY = "engine.json"


class Engine:
    """One task, its optimizer and its schedule on all ranks."""

    @classmethod
    def create(
        cls,
        recipe: Job,
        task: nn.Module,
        world: World,
        *,
        micro_steps: int = 1,
        groups: list[dict[str, Any]] | None = None,
    ) -> Engine:
        """Wrap `task` (moved to the rank's device). micro_steps: calls of `backward` per call of `step`, on every rank.
        groups: as `optim.parameter_groups` gives them; None: those of a distillation.
        """
        import deepspeed

        config = deepspeed_config(recipe)
        optimizer = make_optimizer(task, recipe.optim, groups=groups)
        wrapped, *_ = deepspeed.initialize(model=task, optimizer=optimizer, config=config, dist_init_required=False)
        if recipe.engine.zero in (1, 2):
            _share_weights(wrapped.optimizer)
            if isinstance(optimizer, Lamb):
                optimizer.attach_zero(wrapped.optimizer)
        return cls(wrapped, optimizer, recipe.optim, world, zero=recipe.engine.zero, micro_steps=micro_steps)

    def __init__(
        self, wrapped: Any, optimizer: torch.optim.Optimizer, spec: Optim, world: World, *, zero: int, micro_steps: int
    ) -> None:
        self.world = world
        self.zero = zero
        self.micro_steps = micro_steps
        self.module: nn.Module = wrapped.module
        """The task itself."""
        self.step_index = 0
        """Number of the next optimizer step, from 0."""
        self._wrapped, self._optimizer, self._spec = wrapped, optimizer, spec
        self._factor = schedule(spec)
        self._parameters = [p for p in self.module.parameters() if p.requires_grad]
        self._micro_step = 0
        self._unreduced = contextlib.ExitStack()
        self._norm: Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The task's forward."""
        return self._wrapped(*args, **kwargs)

    @property
    def lr(self) -> float:
        """Learning rate of the next step (of its thawed groups)."""
        return self._spec.lr * self._factor(self.step_index)

    def set_step(self, step: int) -> None:
        """Continue as if `step` optimizer steps had been made: schedule and bias correction follow from it."""
        self.step_index = step

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this rank's share of the loss; the last micro-batch of a step also sums over ranks."""
        if self._micro_step == 0:
            self._norm = None
            keep = self._wrapped.no_sync if self.zero == 0 else self._wrapped.coalesce_grad_reduction
            self._unreduced.enter_context(keep())
        # DeepSpeed takes the mean over ranks.
        self._wrapped.backward(loss * self.world.size, scale_wrt_gas=False)
        self._micro_step += 1
        if self._micro_step == self.micro_steps:
            self._reduce()

    def _reduce(self) -> None:
        for p in self._parameters if self.zero < 3 else []:  # under ZeRO-3 a parameter is empty between its uses
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        self._unreduced.close()
        if self.zero == 0:
            self._wrapped.allreduce_gradients()

    def grad_norm(self) -> Tensor:
        """Norm of the step's whole gradient before clipping, the same on all ranks; not finite when any element is not.

        Valid from the last `backward` of a step to the first of the next. No host synchronisation.
        """
        if self._norm is None:
            assert self._micro_step == self.micro_steps, "the gradient is complete after the last micro-batch only"
            square = torch.stack(torch._foreach_norm(self._gradients())).square().sum()
            if self.zero > 0:
                all_reduce(square)
            self._norm = square.sqrt()
        return self._norm

    def grads_finite(self) -> Tensor:
        """A bool scalar, the same on all ranks. Ask before `step`: what it writes cannot be taken back."""
        return torch.isfinite(self.grad_norm())

    def _gradients(self) -> list[Tensor]:
        """The reduced gradient, as far as this rank holds it (ZeRO-0: all of it)."""
        if self.zero == 0:
            return [p.grad for p in self._parameters if p.grad is not None]
        return [grad for group in self._wrapped.optimizer.averaged_gradients.values() for grad in group]

    def step(self) -> None:
        """Clip, update the weights, forget the gradients, move the schedule on."""
        assert self._micro_step == self.micro_steps, f"{self._micro_step} of {self.micro_steps} micro-batches before step()"
        if self._spec.clip is not None:
            scale = (self._spec.clip / (self.grad_norm() + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(self._gradients(), scale)
        set_step(self._optimizer, self.step_index, self.lr)
        self._wrapped.step()
        self._micro_step = 0
        self.step_index += 1

    def save(self, folder: Path, tag: str, files: Files) -> None:
        """Let `files` hold weights, moments and the step, to be written to `folder/tag`; called by all ranks."""
        disk = self._wrapped.checkpoint_engine
        self._wrapped.checkpoint_engine = _Later(disk, files)
        try:
            with _silence():
                self._wrapped.save_checkpoint(str(folder), tag=tag, save_latest=False)
        finally:
            self._wrapped.checkpoint_engine = disk
        if self.world.is_main:
            summary = json.dumps(_Summary(self.step_index, self.world.size, self.zero, self._spec.kind)._asdict())
            files.later(lambda: (folder / tag / SUMMARY).write_text(summary))

    def load(self, folder: Path, tag: str, *, universal: bool = False) -> None:
        """Continue from `folder/tag`; called by all ranks.

        Moments are sharded by rank, so ZeRO-1/2 checkpoints fit the world size they were written at; at another one they
        are loaded with universal=True from the tag that `to_universal` wrote. ZeRO-0 loads at any world size. Raises
        CheckpointError when the checkpoint is missing or does not fit this job, with what to do.
        """
        summary = _read_summary(folder / tag)
        self._check_fit(summary, folder / tag, universal)
        with _silence(), no_code():
            if universal:
                self._load_universal(folder, tag)
            else:
                self._wrapped.load_checkpoint(str(folder), tag=tag)
        self.step_index = summary.step

    def _check_fit(self, saved: _Summary, path: Path, universal: bool) -> None:
        weights_only = f"start weights-only with start.kind=run start.source={path.parent.parent}"
        if saved.kind != self._spec.kind:
            raise CheckpointError(
                f"{path} was saved with optim.kind={saved.kind} and this job has {self._spec.kind}; {weights_only}"
            )
        if _family(saved.zero) != _family(self.zero):
            raise CheckpointError(
                f"{path} was saved with engine.zero={saved.zero} and this job has {self.zero}; "
                f"set engine.zero={saved.zero}, or {weights_only}"
            )
        if saved.world_size == self.world.size or self.zero == 0 or universal:
            return
        remedy = "convert it (to_universal)" if self.zero < 3 else weights_only
        raise CheckpointError(
            f"{path} was saved on {saved.world_size} ranks (ZeRO-{saved.zero}) and this job has {self.world.size}; "
            f"use {saved.world_size} ranks, or {remedy}"
        )

    def _load_universal(self, folder: Path, tag: str) -> None:
        # The universal format has parameters and moments but no buffers, and DeepSpeed reads no module state beside it.
        saved = torch.load(folder / tag / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=True)
        self.module.load_state_dict(saved["module"])
        settings = self._wrapped._config
        settings.load_universal_checkpoint = True
        try:
            self._wrapped.load_checkpoint(str(folder), tag=tag)
        finally:
            settings.load_universal_checkpoint = False


class _Later:
    """DeepSpeed's way to the disk, for which `files` holds what it would write at once."""

    def __init__(self, disk: Any, files: Files) -> None:
        self._disk, self._files = disk, files

    def __getattr__(self, name: str) -> Any:
        return getattr(self._disk, name)

    def save(self, state_dict: Any, path: str) -> None:
        held = self._files.hold(state_dict)
        self._files.later(lambda: self._disk.save(held, path))


def _share_weights(zero: Any) -> None:
    """Let ZeRO-1/2 update a rank's part of the weights itself, and not an fp32 copy of it: they are fp32, and so is the copy."""
    for parts, copy, ranks in zip(
        zero.parallel_partitioned_bit16_groups, zero.single_partition_of_fp32_groups, zero.real_dp_process_group
    ):
        mine = parts[dist.get_rank(ranks)]
        assert mine.dtype == copy.dtype, "parameters are fp32"
        copy.data = mine.detach()
    zero._link_all_hp_params()  # what universal checkpoints are read into are views of the copy


def to_universal(folder: Path, tag: str) -> str:
    """Convert a ZeRO-1/2 checkpoint to one that loads at any world size; returns its tag. Called by one process.

    Takes as much disk again as the checkpoint. Raises CheckpointError for ZeRO-0 (needs no conversion) and ZeRO-3
    (DeepSpeed would mix up the settings of the parameter groups).
    """
    from deepspeed.checkpoint import ds_to_universal

    summary = _read_summary(folder / tag)
    if summary.zero not in (1, 2):
        remedy = (
            "it loads at any world size as it is" if summary.zero == 0 else "resume on as many ranks, or start weights-only"
        )
        raise CheckpointError(f"{folder / tag} is a ZeRO-{summary.zero} checkpoint and cannot be converted: {remedy}")
    universal = f"{tag}_universal"
    args = argparse.Namespace(
        input_folder=str(folder / tag),
        output_folder=str(folder / universal),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # or it refuses every checkpoint without tensor parallelism
    )
    with _silence(), no_code():
        ds_to_universal.main(args)
    (folder / "latest_universal").unlink()  # the caller decides what is the latest
    (folder / universal / SUMMARY).write_text(json.dumps(summary._asdict()))
    return universal


class _Summary(NamedTuple):
    """What must be known of a checkpoint before its gigabytes are read."""

    step: int
    world_size: int
    zero: int
    kind: str


def _read_summary(path: Path) -> _Summary:
    try:
        return _Summary(**json.loads((path / SUMMARY).read_text()))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} has no {SUMMARY}: it is no checkpoint, or its writing was interrupted; resume from another one"
        ) from error


def _family(zero: int) -> str:
    """ZeRO-1 and 2 shard the same things and read each other's checkpoints."""
    return "unsharded" if zero == 0 else "weights" if zero == 3 else "optimizer"


@contextlib.contextmanager
def no_code() -> Any:
    """DeepSpeed unpickles whatever a checkpoint holds; in here torch lets it have tensors, plain values and its own three records."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


@contextlib.contextmanager
def _silence() -> Any:
    """DeepSpeed's converters print and draw progress bars."""
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink), contextlib.redirect_stderr(io.StringIO()):
        yield
