"""Every shipped recipe's step on pretended GPUs: nothing would be refused there, and the host never waits within a step."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from conftest import REPO
from fake_cuda import CUDA, Watch
from pretended_steps import pretended_gpu

from radio_distill.distill.loop import prepare, train_step
from radio_distill.errors import TrainingError
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
