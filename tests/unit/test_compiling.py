"""Compiled blocks: the numbers and names of plain ones, and as many graphs as there are shapes."""

import logging

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call

from radio_distill import compiling
from radio_distill.config.load import load_card, load_recipe, load_upsampler_recipe
from radio_distill.config.recipe import Student as Spec
from radio_distill.errors import RadioDistillError, RecipeError
from radio_distill.network.arch import AdaptorSlot
from radio_distill.network.student import Student
from radio_distill.student.build import build_student
from radio_distill.student.damp import set_damp_step
from radio_distill.student.spectral import power_iterate
from radio_distill.student.start import parametrise
from radio_distill.teachers.base import load_teacher
from radio_distill.train.ema import Ema
from radio_distill.train.optim import AdamW, parameter_groups, set_step

STEPS = 20
SPEC = Spec(
    model="vit_tiny_patch16_224",
    overrides={"embed_dim": 32, "depth": 4, "num_heads": 2, "patch_size": 4},
    vitdet={"num_global": 2},
    max_size=32,
    spectral=True,
    damp=0.01,
)


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    torch._dynamo.reset()
    found = CompileCounterWithBackend("eager")  # the compiler's graphs, without code to be built
    monkeypatch.setattr(compiling, "BACKEND", found)
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)  # pytest would keep every line of it
    return found


def make(compiled: bool) -> Student:
    torch.manual_seed(0)
    student = build_student(SPEC, [AdaptorSlot("clip", 10, 12, True)])
    parametrise(student, SPEC)
    if compiled:
        student.model.run_block = compiling.block_runner(by="engine.compile")
    return student.train()


def train(student: Student) -> tuple[list[float], Ema]:
    """Losses of steps with a small partition, and a larger one with and without windows, as a stage makes them."""
    optimizer, ema = AdamW(parameter_groups(student, 0.02), lr=1e-3), Ema(student, 0.9)
    generator, losses = torch.Generator().manual_seed(1), []
    for step in range(STEPS):
        set_damp_step(student, 0, step)
        power_iterate(student)
        for side, window in ((16, None), (32, 2 if step % 2 else None)):
            torch.manual_seed(step)  # of the random viewports
            tokens = student.forward_tokens(torch.rand(2, 3, side, side, generator=generator), window=window)
            out = student.adaptor("clip").features(tokens.features_BCHW)
            loss = (out - torch.rand(out.shape, generator=generator)).square().mean()
            loss.backward()
            losses.append(loss.item())
        set_step(optimizer, step, 1e-3)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
    return losses, ema


def test_compiled_blocks_train_as_plain_ones_do(counter: CompileCounterWithBackend) -> None:
    plain, compiled = make(False), make(True)
    (wanted, average), (found, other) = train(plain), train(compiled)
    assert max(abs(a - b) for a, b in zip(wanted, found)) < 1e-5
    assert wanted[0] - wanted[-1] > 1e-3, "it learns"
    assert list(compiled.state_dict()) == list(plain.state_dict())
    assert list(other.state_dict()) == list(average.state_dict())
    torch.testing.assert_close(other.state_dict(), average.state_dict(), rtol=1e-4, atol=1e-5)
    # small, large (and the global blocks of a step with windows), and windows: for all blocks, and in all steps
    assert counter.frame_count == 3

    before = counter.frame_count
    with torch.no_grad():
        compiled.eval().forward_tokens(torch.rand(3, 3, 16, 16))
    assert counter.frame_count == before, "pictures and scores, of whatever shapes, compile nothing"


def test_the_average_runs_through_the_same_blocks(counter: CompileCounterWithBackend) -> None:
    student = make(True)
    average = {name: x * 0.9 if x.is_floating_point() else x for name, x in Ema(student, 0.9).state_dict().items()}
    plain, images = make(False), torch.rand(2, 3, 16, 16)

    def encode(module: nn.Module) -> Tensor:
        torch.manual_seed(0)
        with torch.no_grad():
            return functional_call(module, average, (images,)).features_BCHW  # type: ignore[no-any-return]

    torch.testing.assert_close(encode(student), encode(plain))
    assert not torch.equal(encode(student), student.encode(images).features_BCHW)


def test_checkpointed_blocks_give_the_same_gradients(counter: CompileCounterWithBackend) -> None:
    gradients = []
    for compiled in (False, True):
        student = make(compiled)
        student.model.set_grad_checkpointing()
        torch.manual_seed(0)
        student.encode(torch.rand(2, 3, 16, 16)).features_BCHW.square().mean().backward()
        gradients.append({name: p.grad for name, p in student.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[1], gradients[0])


def test_teachers_are_compiled_block_by_block_with_a_graph_for_each_size(counter: CompileCounterWithBackend) -> None:
    sizes = (84, 98)
    images = [torch.rand(1, 3, size, size) for size in sizes]
    teacher = load_teacher(load_card("toy_dino"))
    wanted = [teacher.encode(x).features_BCHW for x in images]
    compiling.compile_net(teacher.net, by="teachers.toy_dino.compile")
    for x, features in zip(images, wanted):
        torch.testing.assert_close(teacher.encode(x).features_BCHW, features)
    assert counter.frame_count == len(sizes)


def test_more_sizes_than_torchs_limit_stay_compiled(counter: CompileCounterWithBackend) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    compiling.compile_net(net, by="teachers.x.compile")
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=1):
        for count in range(1, 4):
            net(torch.rand(count, 4))
    assert counter.frame_count == 3


def test_a_network_without_blocks_is_compiled_as_one(counter: CompileCounterWithBackend) -> None:
    net, x = nn.Sequential(nn.Linear(4, 4), nn.GELU()), torch.rand(2, 4)
    assert not compiling.blocks_of(net)
    wanted = net(x)
    compiling.compile_net(net, by="teachers.x.compile")
    torch.testing.assert_close(net(x), wanted)
    assert counter.frame_count == 1


def test_without_a_compiler_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RadioDistillError, match=r"engine\.compile needs a C\+\+ compiler and 'no-such-compiler' is not there"):
        compiling.block_runner(by="engine.compile")


def test_packs_of_images_of_any_shape_refuse_it() -> None:
    with pytest.raises(RecipeError, match="packs of the native partition 'high' have another shape in every step"):
        load_recipe("fast/stage2_native", ["engine.compile=true"])


def test_trainings_without_a_student_refuse_it() -> None:
    assert load_recipe("stage1", ["engine.compile=true"]).engine.compile
    with pytest.raises(RecipeError, match=r"'engine\.compile' is true, and it compiles the blocks of a stage's student"):
        load_upsampler_recipe("upsampler/dfn_clip_2x", ["engine.compile=true"])
