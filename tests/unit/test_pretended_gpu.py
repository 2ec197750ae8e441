"""Every shipped recipe's step on pretended GPUs: nothing would be refused there, and the host never waits within a step."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from conftest import REPO
from fake_cuda import CUDA, Watch, _backward
from pretended_steps import pretended_gpu
from torch import nn
from traced import Memory, Trace, fused_attention

from radio_distill.compiling import blocks_of
from radio_distill.config.load import load_card, load_recipe
from radio_distill.distill.loop import prepare, train_step
from radio_distill.errors import TrainingError
from radio_distill.network.vit import Trunk
from radio_distill.plan.kernels import SPECTRAL_BYTES, WEIGHT_BYTES, student_blocks, teacher_blocks
from radio_distill.plan.memory import partition_bytes, work_bytes
from radio_distill.student.names import student_of
from radio_distill.student.spectral import apply_spectral
from radio_distill.teachers.base import Arch
from radio_distill.teachers.fp8 import use_fp8
from radio_distill.train import agree
from radio_distill.upsamplers.train import one_step

STAGES = [*sorted(path.stem for path in (REPO / "recipes").glob("stage*.yaml")), "fast/sam"]
UPSAMPLERS = sorted(path.stem for path in (REPO / "recipes" / "upsampler").glob("radio_2x*.yaml"))
"""One of every kind."""


@pytest.fixture(scope="module")
def gpu(tmp_path_factory):
    with pretended_gpu(tmp_path_factory.mktemp("gpu")) as found:
        yield found


def clean(watch: Watch) -> None:
    assert not watch.mixed, Counter(watch.mixed)
    assert not watch.waits, Counter(watch.waits)


def twice(watch: Watch, step: Callable[[], None]) -> None:
    """Constants (tables of an upsampler) may be brought to the GPU in the first step."""
    watch.forget()
    step()
    if watch.waits:
        assert not watch.mixed, Counter(watch.mixed)
        watch.forget()
        step()
    clean(watch)


@pytest.mark.parametrize("name", STAGES)
def test_no_step_of_a_stage_mixes_devices_or_waits_for_the_gpu(gpu, name):
    training, batches = gpu.stage(name)
    gpu.watch.forget()
    prepare(training, 0, batches)  # with a refit, which may wait
    assert not gpu.watch.mixed, Counter(gpu.watch.mixed)
    gpu.shapes.clear()
    twice(gpu.watch, lambda: train_step(training, 0, batches))
    assert sum(gpu.watch.kernels.values()) > 500
    assert all(len(shapes) <= len(batches) for shapes in gpu.shapes.values()), "one shape for each partition: one compilation"
    assert training.timers.collect()["teachers"] in (1e-3 * len(batches), 2e-3 * len(batches)), "of the device, by its events"


def test_no_step_of_packs_mixes_devices_or_waits_and_attention_is_one_kernel(gpu):
    only = "{dfn_clip: null, siglip: null, sam: null"
    native = "aspect: native, area: [65536, 262144], tokens: 4096, packs: 32, size: null, images: null"
    cell = f"partitions.low={{{native}, teachers: {only}, dinov2: {{size: null}}}}}}"
    training, batches = gpu.stage("stage1", cell, f"teachers={only}}}")
    prepare(training, 0, batches)
    gpu.shapes.clear()
    twice(gpu.watch, lambda: train_step(training, 0, batches))
    assert gpu.watch.kernels["torch_attn::_varlen_attn"] == 2  # one for each block
    assert gpu.shapes["dinov2_g_reg"] == {(4, 3, 16 * 14, 24 * 14), (4, 3, 30 * 14, 10 * 14)}  # images of one shape in one pass


@pytest.mark.parametrize("name", UPSAMPLERS)
def test_no_step_of_an_upsampler_mixes_devices_or_waits_for_the_gpu(gpu, name):
    training, batches = gpu.upsampler_training(f"upsampler/{name}")
    twice(gpu.watch, lambda: one_step(training, 0, batches))


@pytest.fixture(scope="module")
def small(gpu):
    """A stage with AdaLoss, before its second step."""
    training, batches = gpu.stage("stage1", "loss.adaloss=0.9", "partitions.low.images=128")
    prepare(training, 0, batches)
    train_step(training, 0, batches)
    return training, batches


def test_a_rank_without_a_loss_term_adds_zero_on_the_gpu(gpu, small):
    gpu.watch.forget()
    training, _ = small
    training.task.step_terms = {"dfn_clip/features": torch.zeros((), device=CUDA)}
    training.task.update_adaloss()
    clean(gpu.watch)


def test_what_is_not_finite_on_a_gpu_is_told_one_step_later_and_before_anything_is_logged(small, monkeypatch):
    (training, batches), read = small, []
    training.settle()
    monkeypatch.setattr(agree.Vote, "read", lambda vote: read.append(vote) or [True])
    monkeypatch.setattr(agree, "gather", lambda value: [value])  # sends bytes, which nobody answers
    train_step(training, 1, batches)
    assert not read
    with pytest.raises(TrainingError, match="non-finite value at step 1"):
        train_step(training, 2, batches)
    with pytest.raises(TrainingError, match="non-finite value at step 2"):
        training.settle()


@contextmanager
def eight_bits(blocks: nn.Module) -> Iterator[None]:
    """Linears by 8-bit products; others use these blocks, too."""
    done, _ = use_fp8(blocks)
    yield
    for name in done:
        parent, _, own = name.rpartition(".")
        setattr(blocks.get_submodule(parent), own, blocks.get_submodule(name).exact)


@pytest.mark.parametrize("name", ["dfn_clip", "siglip", "dinov2_g_reg", "sam_h"])
def test_plan_counts_kernels_and_bytes_of_teachers_as_their_traces_do(gpu, name):
    card = load_card(name)
    arch, model = Arch(**card.params["arch"]), card.params["model"]
    grid, images = 64 if arch.windows else 27, 8
    shape = (images, grid, grid, arch.width) if arch.windows else (images, grid**2, arch.width)
    facts = {"quick_gelu": "quickgelu" in model, "scaled": "dinov2" in model}
    blocks = nn.ModuleList(blocks_of(gpu.load_teacher(card).net.to(torch.bfloat16)))
    for fp8 in (False, True):
        for index, num_global in enumerate((0, 1) if arch.windows else (0,)):
            one = arch.model_copy(
                update={"depth": 1, "windows": arch.windows and arch.windows.model_copy(update={"num_global": num_global})}
            )
            x = torch.zeros(shape, device=CUDA, dtype=torch.bfloat16)
            with torch.no_grad(), eight_bits(blocks) if fp8 else nullcontext(), fused_attention(), Trace() as trace:
                out = blocks[index](x)
            for compiled, found in ((False, trace.as_written()), (True, trace.joined(out))):
                planned = teacher_blocks(one, grid, compiled=compiled, fp8=fp8, **facts)
                rough = arch.windows is not None
                assert planned.kernels == pytest.approx(found.kernels, rel=0.2 if rough else 0.01), (index, compiled, fp8)
                assert planned.rows * x.nbytes == pytest.approx(found.bytes, rel=0.12 if rough else 0.01), (
                    index,
                    compiled,
                    fp8,
                )


@pytest.mark.parametrize("spectral", [False, True])
def test_plan_counts_kernels_and_bytes_of_the_student_as_a_trace_does(gpu, spectral):
    with torch.device(CUDA):
        trunk = Trunk(replace(student_of(load_recipe("stage1")).trunk, depth=1))
    if spectral:
        apply_spectral(trunk)
    block = trunk.blocks[0]
    block.drop_path1 = block.drop_path2 = nn.Identity()
    x = torch.zeros(8, 737, 1024, device=CUDA, requires_grad=True)
    with fused_attention(), Trace() as trace:
        with torch.autocast("cuda", torch.bfloat16):
            y = block(x)
        _backward(y, torch.ones_like(y))  # which is made of y, so that nothing backward lies before it
    grads = [p.grad for p in (x, *block.parameters()) if p.grad is not None]
    weights = sum(p.numel() for p in block.parameters() if p.ndim > 1)
    for compiled, found in ((False, trace.as_written()), (True, trace.joined(y, *grads))):
        planned = student_blocks(4, 1, gated=False, compiled=compiled, spectral=spectral, half=True)
        moved = planned.rows * 2 * x.numel() + weights * (WEIGHT_BYTES + (SPECTRAL_BYTES[compiled] if spectral else 0))
        # to join them says nothing of a norm of a whole weight, for which it must be read before it is scaled
        assert planned.kernels == pytest.approx(found.kernels, rel=0.03, abs=12 if spectral else 0), compiled
        assert moved == pytest.approx(found.bytes, rel=0.2 if spectral else 0.05), compiled


def test_plan_knows_the_memory_that_a_forward_pass_takes(gpu):
    training, batches = gpu.stage("stage3_featsharp")
    recipe, service = training.recipe, training.service
    prepare(training, 0, batches)
    for batch in batches:
        cell = recipe.partitions[batch.partition]
        with fused_attention(), Memory() as memory:
            targets = service.targets(batch, service.encode(batch))
            losses = training.task(batch, targets, training.counts([batch])[batch.partition])
        planned = partition_bytes(recipe, cell, service.cards, student_of(recipe), len(batch))
        work = work_bytes(recipe, cell, service.cards, len(batch))
        assert planned == pytest.approx(memory.live, rel=0.12), batch.partition
        assert 0.7 * (planned + work) < memory.peak < planned + work, batch.partition
        del losses, targets
