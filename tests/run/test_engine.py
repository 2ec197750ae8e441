"""The engine on 2 processes (gloo) against a slow optimizer on 1, in float64: ZeRO stages, uneven ranks, clipping, checkpoints.

Everything that needs two processes is done by one launch (`runs`); the tests look at what it found.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launch import launch
from torch import Tensor, nn

from radio_distill.config.recipe import Recipe
from radio_distill.errors import CheckpointError
from radio_distill.train.distributed import init, shutdown
from radio_distill.train.engine import Engine, to_universal
from radio_distill.train.optim import schedule
from radio_distill.train.writing import Files

STEPS, MICRO_STEPS, SAVED_AT, IMAGES = 6, 2, 4, 3
CASES = [("lamb", 0), ("lamb", 1), ("lamb", 2), ("adamw", 0), ("adamw", 1), ("adamw", 2)]


class Toy(nn.Module):
    """A trunk and three heads; sizes are odd, so that shards cut through parameters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(7, 13), nn.LayerNorm(13), nn.GELU(), nn.Linear(13, 11))
        self.adaptors = nn.ModuleDict({name: nn.Linear(11, 5) for name in "abc"})
        self.register_buffer("calls", torch.zeros(()))
        self.trunk_frozen = False

    def forward(self, x: Tensor, heads: str) -> Tensor:
        self.calls += 1
        with torch.set_grad_enabled(not self.trunk_frozen):
            y = self.trunk(x)
        return sum(((i + 1) * self.adaptors[name](y).square()).sum() for i, name in enumerate(heads)) / IMAGES


def recipe(kind: str, zero: int, **changes: Any) -> Recipe:
    optim = {"kind": kind, "steps": STEPS, "lr": 0.02, "warmup": 2, "weight_decay": 0.02, "freeze_trunk": 2, **changes}
    shard_all = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if zero == 3 else {}
    engine = {"zero": zero, "precision": "fp32", "deepspeed": shard_all}
    parts: dict[str, Any] = {"optim": optim, "engine": engine, "ema": {"decay": 0.0}}
    return Recipe.model_validate({"name": "t", "teachers": {}, "partitions": {}, **parts})


def micro_batch(step: int, micro: int, rank: int) -> tuple[Tensor, str]:
    """Ranks use different heads in different orders, as when they run different partitions."""
    generator = torch.Generator().manual_seed(100 * step + 10 * micro + rank)
    return torch.randn(IMAGES, 7, generator=generator), ("ab", "ca")[rank]


def train(engine: Engine, ranks: list[int], *, until: int = STEPS, same_heads: bool = False) -> list[float]:
    """Train to step `until` on the data of `ranks`; the gradient norms."""
    norms = []
    while engine.step_index < until:
        step = engine.step_index
        engine.module.trunk_frozen = step < 2
        for micro in range(engine.micro_steps):
            x, heads = micro_batch(step, micro // len(ranks), ranks[micro % len(ranks)])
            engine.backward(engine(x, "ba" if same_heads else heads))
        assert engine.grads_finite()
        norms.append(engine.grad_norm().item())
        engine.step()
    return norms


def weights(engine: Engine) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in engine.module.state_dict().items()}


def reference(kind: str, *, clip: float | None = None) -> tuple[dict[str, Tensor], list[float]]:
    """LAMB and AdamW as one would write them down, one parameter at a time, on the data of both ranks."""
    toy = Toy().double()
    m = {n: torch.zeros_like(p) for n, p in toy.named_parameters()}
    v = {n: torch.zeros_like(p) for n, p in toy.named_parameters()}
    factor, norms = schedule(recipe(kind, 0).optim), []
    for step in range(STEPS):
        toy.zero_grad()
        toy.trunk_frozen = step < 2
        for micro in range(MICRO_STEPS):
            for rank in range(2):
                x, heads = micro_batch(step, micro, rank)
                toy(x.double(), heads).backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in toy.parameters() if p.grad is not None))
        norms.append(norm)
        for name, p in toy.named_parameters():
            frozen = 2 if name.startswith("trunk") else 0
            t = step + 1 - frozen
            if t < 1:
                continue
            g = p.grad if clip is None else p.grad * min(1.0, clip / (norm + 1e-6))
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g**2
            update = m[name] / (1 - 0.9**t) / ((v[name] / (1 - 0.999**t)).sqrt() + 1e-6)
            ratio = 1.0
            if p.ndim > 1:
                update = update + 0.02 * p.data
                ratio = float(p.data.norm() / update.norm()) if kind == "lamb" else 1.0
            p.data -= 0.02 * factor(step) * ratio * update
    return {n: x.detach() for n, x in toy.state_dict().items()}, norms


def two_processes(rank: int, folder: Path) -> None:
    world = init("gloo")
    found: dict[str, Any] = {}

    def create(kind: str, zero: int, micro_steps: int = MICRO_STEPS, **changes: Any) -> Engine:
        return Engine.create(recipe(kind, zero, **changes), Toy(), world, micro_steps=micro_steps)

    for kind, zero in CASES:
        engine = create(kind, zero)
        norms = train(engine, [rank], until=SAVED_AT)
        files = begin_save(engine, folder, f"{kind}{zero}")
        norms += train(engine, [rank])
        write(files)  # while training went on
        found[f"{kind}{zero}"] = weights(engine), norms
        resumed = create(kind, zero)
        resumed.load(folder, f"{kind}{zero}")
        train(resumed, [rank])
        found[f"{kind}{zero} resumed"] = weights(resumed)
        if kind == "lamb":
            clipped = create(kind, zero, clip=0.05)
            train(clipped, [rank])
            found[f"clipped{zero}"] = weights(clipped)

    for zero in (0, 3):
        engine = create("adamw", zero)
        found[f"same heads {zero}"] = train(engine, [rank], same_heads=True)
        clipped = create("adamw", zero, clip=0.05)
        found[f"same heads clipped {zero}"] = train(clipped, [rank], same_heads=True)
    write(begin_save(engine, folder, "adamw3"))

    for zero in (0, 1, 2):
        one = create("lamb", zero)
        one.load(folder, f"one{zero}_universal" if zero else "one0", universal=zero > 0)
        train(one, [rank])
        found[f"1 to 2, {zero}"] = weights(one)

    for zero in (0, 1, 2):
        engine = create("adamw", zero, micro_steps=1)
        loss = engine(*micro_batch(0, 0, rank))
        engine.backward(loss * (float("nan") if rank == 1 else 1.0))
        found[f"finite{zero}"] = bool(engine.grads_finite())
    found["wrong world"] = message(lambda: create("lamb", 1).load(folder, "one1"))
    if rank == 0:
        for kind, zero in CASES:
            if zero:
                to_universal(folder, f"{kind}{zero}")
    torch.save(found, folder / f"rank{rank}.pt")
    shutdown()


def begin_save(engine: Engine, folder: Path, tag: str) -> Files:
    files = Files(copies=True)
    engine.save(folder, tag, files)
    files.arrive()
    return files


def write(files: Files) -> None:
    files.write()
    dist.barrier()


def message(call: Any) -> str:
    with pytest.raises(CheckpointError) as error:
        call()
    return str(error.value)


def one_process_before(rank: int, folder: Path) -> None:
    world = init("gloo")
    for zero in (0, 1, 2):
        engine = Engine.create(recipe("lamb", zero), Toy(), world, micro_steps=2 * MICRO_STEPS)
        updated = {p.data_ptr() for group in engine._optimizer.param_groups for p in group["params"]}
        held = {p.untyped_storage().data_ptr() for p in engine.module.parameters()}
        assert zero == 0 or updated == held, "no second copy of the weights"
        train(engine, [0, 1], until=SAVED_AT)
        write(begin_save(engine, folder, f"one{zero}"))
        if zero:
            assert to_universal(folder, f"one{zero}") == f"one{zero}_universal"
    shutdown()


def one_process_after(rank: int, folder: Path) -> None:
    world, found = init("gloo"), {}
    for kind, zero in CASES:
        engine = Engine.create(recipe(kind, zero), Toy(), world, micro_steps=2 * MICRO_STEPS)
        engine.load(folder, f"{kind}{zero}_universal" if zero else f"{kind}{zero}", universal=zero > 0)
        assert engine.step_index == SAVED_AT
        train(engine, [0, 1])
        found[f"2 to 1, {kind}{zero}"] = weights(engine)

    def load(kind: str, zero: int, tag: str) -> str:
        return message(lambda: Engine.create(recipe(kind, zero), Toy(), world).load(folder, tag))

    found["messages"] = {
        "kind": load("lamb", 1, "adamw1"),
        "zero": load("lamb", 1, "lamb0"),
        "zero 3": load("adamw", 3, "adamw3"),
        "missing": load("lamb", 1, "nothing"),
        "convert 3": message(lambda: to_universal(folder, "adamw3")),
        "convert 0": message(lambda: to_universal(folder, "lamb0")),
    }
    torch.save(found, folder / "after.pt")
    shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints and findings of one process, of two that go on from it, and of one that goes on from those."""
    folder = tmp_path_factory.mktemp("checkpoints")
    launch(one_process_before, 1, folder)
    launch(two_processes, 2, folder)
    launch(one_process_after, 1, folder)
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path) -> list[dict[str, Any]]:
    """What each of the two ranks found."""
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def after(folder: Path) -> dict[str, Any]:
    """What the one process found that went on from the checkpoints of two."""
    found: dict[str, Any] = torch.load(folder / "after.pt", weights_only=True)
    return found


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, x in wanted.items():
        if name != "calls":
            # fp32 against float64: weights are O(1) and take 6 updates of about 0.02.
            torch.testing.assert_close(found[name].double(), x.double(), rtol=0, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("kind", "zero"), CASES)
def test_two_ranks_with_different_heads_train_like_a_slow_optimizer_on_all_the_data(runs: Any, kind: str, zero: int) -> None:
    wanted, wanted_norms = reference(kind)
    for found in runs:
        state, norms = found[f"{kind}{zero}"]
        assert_close(state, wanted)
        torch.testing.assert_close(norms, wanted_norms, rtol=1e-5, atol=0)
    assert all(torch.equal(runs[0][f"{kind}{zero}"][0][n], runs[1][f"{kind}{zero}"][0][n]) for n in wanted)


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_clipping_scales_the_whole_gradient(runs: Any, zero: int) -> None:
    assert_close(runs[0][f"clipped{zero}"], reference("lamb", clip=0.05)[0])


@pytest.mark.parametrize(("kind", "zero"), CASES)
def test_resuming_equals_an_uninterrupted_run_bit_for_bit(runs: Any, kind: str, zero: int) -> None:
    straight, resumed = runs[0][f"{kind}{zero}"][0], runs[0][f"{kind}{zero} resumed"]
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_a_run_resumes_on_more_ranks(runs: Any, zero: int) -> None:
    assert_close(runs[0][f"1 to 2, {zero}"], reference("lamb")[0])
    calls = 2 * MICRO_STEPS * SAVED_AT + MICRO_STEPS * (STEPS - SAVED_AT)
    assert runs[0][f"1 to 2, {zero}"]["calls"] == calls, "buffers must come back too"


@pytest.mark.parametrize(("kind", "zero"), CASES)
def test_a_run_resumes_on_fewer_ranks(after: Any, kind: str, zero: int) -> None:
    assert_close(after[f"2 to 1, {kind}{zero}"], reference(kind)[0])


def test_zero3_trains_like_zero0(runs: Any) -> None:
    for case in ("same heads", "same heads clipped"):
        torch.testing.assert_close(runs[0][f"{case} 3"], runs[0][f"{case} 0"], rtol=1e-5, atol=0)


def test_a_value_that_is_not_finite_on_one_rank_is_seen_by_all(runs: Any) -> None:
    for found in runs:
        assert [found[f"finite{zero}"] for zero in (0, 1, 2)] == [False] * 3


def test_loading_what_does_not_fit_says_what_to_do(runs: Any, after: Any) -> None:
    assert "was saved on 1 ranks (ZeRO-1) and this job has 2; use 1 ranks, or convert it" in runs[0]["wrong world"]
    said = after["messages"]
    assert "optim.kind=adamw and this job has lamb; start weights-only with start.kind=run" in said["kind"]
    assert "engine.zero=0 and this job has 1; set engine.zero=0" in said["zero"]
    assert "use 2 ranks, or start weights-only" in said["zero 3"]
    assert "has no engine.json" in said["missing"]
    assert "ZeRO-3 checkpoint and cannot be converted" in said["convert 3"]
    assert "loads at any world size as it is" in said["convert 0"]
