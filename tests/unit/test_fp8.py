"""8-bit products of teachers: the rounding, what is changed and what is not, and the gate."""

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from radio_distill.config.load import load_card, load_recipe, load_upsampler_recipe
from radio_distill.distill.bank import TeacherBank
from radio_distill.distill.fp8 import Difference, check_fp8
from radio_distill.errors import RecipeError, TeacherError
from radio_distill.teachers.base import Teacher, load_teacher
from radio_distill.teachers.fp8 import Fp8Linear, in_fp8, to_fp8, use_fp8
from radio_distill.toyworld import render_images
from radio_distill.train.distributed import World
from radio_distill.types import Batch, View

WORLD = World(0, 1, 0, torch.device("cpu"))
IMAGES = 4
RECIPE = ["partitions.low.images=256"]


def test_every_row_is_rounded_to_three_bits_by_its_own_scale() -> None:
    x = torch.randn(6, 32) * torch.logspace(-20, 20, 6)[:, None]
    x[3] = 0
    values, scales = to_fp8(x)
    error = (values.float() * scales - x).abs()
    assert (error <= x.abs() / 16 + x.abs().amax(1, keepdim=True) * 2**-18).all()  # half a step; the least steps of E4M3
    assert values.float().abs().amax(1).tolist() == [448, 448, 448, 0, 448, 448]
    assert torch.isfinite(scales).all()


def test_a_linear_multiplies_what_was_rounded() -> None:
    linear, x = nn.Linear(32, 48).bfloat16(), torch.randn(2, 5, 32).bfloat16()
    (a, s), (w, t) = to_fp8(x.view(-1, 32)), to_fp8(linear.weight)
    wanted = (a.double() * s) @ (w.double() * t).T + linear.bias.double()
    found = Fp8Linear(linear)(x)
    assert (found.shape, found.dtype) == ((2, 5, 48), torch.bfloat16)
    assert (found.view(-1, 48).double() - wanted).norm() / wanted.norm() < 5e-3  # of bf16
    assert (found - linear(x)).norm() / linear(x).norm() > 1e-2


def test_a_gpu_would_take_the_product() -> None:
    with FakeTensorMode():  # shapes, orders in memory and scales are checked by torch's own kernel, which has no values here
        linear = Fp8Linear(nn.Linear(64, 48, device="cuda", dtype=torch.bfloat16))
        out = linear(torch.empty(2, 5, 64, device="cuda", dtype=torch.bfloat16))
    assert (out.shape, out.dtype, out.device.type) == ((2, 5, 48), torch.bfloat16, "cuda")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(16, 32)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 20), nn.Linear(20, 32), nn.LayerNorm(32)) for _ in range(2))
        self.more = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32)) for _ in range(3))


def test_only_linears_of_blocks_are_changed_and_what_is_left_is_told() -> None:
    net = Net()
    done, left = use_fp8(net)
    assert done == ["more.0.0", "more.1.0", "more.2.0"]
    assert not left
    del net.more
    assert use_fp8(net) == (
        [],
        {
            f"blocks.{i}.{j}": f"{shape} is no multiple of 16"
            for i in range(2)
            for j, shape in enumerate(("32 x 20", "20 x 32"))
        },
    )


def test_a_change_of_dtype_or_a_copy_leaves_the_rounded_weights() -> None:
    linear = Fp8Linear(nn.Linear(16, 16).bfloat16())
    before = linear.weight.clone()
    linear.to(torch.bfloat16).float()
    assert linear.weight.dtype == torch.float8_e4m3fn
    assert linear.scale_R1.dtype == torch.float32
    assert torch.equal(linear.weight.float(), before.float())


class Images:
    """Stands for the streams: one batch of rendered images, whatever the recipe says."""

    def open(self, positions: dict[str, object]) -> None:
        assert not positions

    def next(self, device: torch.device) -> list[Batch]:
        pixels = torch.stack([torch.from_numpy(x).permute(2, 0, 1) for x in render_images(5, range(IMAGES), size=84)])
        boxes = torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(IMAGES, 1)
        return [Batch("low", tuple("abcd"), torch.arange(IMAGES), {"toy_dino": View(pixels, boxes)})]

    def close(self) -> None: ...


def bank_of(teacher: Teacher) -> TeacherBank:
    bank = TeacherBank(load_recipe("toy/stage1", RECIPE), {"toy_dino": teacher})
    use_fp8(teacher.net)
    return bank


@pytest.fixture
def teacher() -> Teacher:
    return load_teacher(load_card("toy_dino")).to("cpu", torch.bfloat16)


def test_a_teacher_with_small_errors_passes_and_forgets_its_exact_weights(teacher: Teacher) -> None:
    bank, batch = bank_of(teacher), Images().next(WORLD.device)[0]
    with in_fp8(teacher.net, False):
        exact = bank.encode(batch)["toy_dino"].features_BCHW
    rounded = bank.encode(batch)["toy_dino"].features_BCHW
    error = (exact - rounded).square().sum() / (exact - exact.mean((0, 2, 3), keepdim=True)).square().sum()
    difference = Difference(exact.shape[1], WORLD.device)
    difference.add(exact, rounded)
    assert difference.error == pytest.approx(error.item(), rel=1e-4)
    check_fp8(bank, Images(), 256, WORLD)  # type: ignore[arg-type]
    assert all(m.exact is None for m in teacher.net.modules() if isinstance(m, Fp8Linear))
    torch.testing.assert_close(bank.encode(batch)["toy_dino"].features_BCHW, rounded)


@torch.no_grad()
def plant(net: nn.Module) -> None:
    """An outlier channel: a norm makes one channel a million times as large, and the weight behind it takes that back."""
    for block in net.blocks:  # type: ignore[union-attr]
        block.norm2.weight[3] *= 2**20
        block.mlp[0].weight[:, 3] /= 2**20


def test_an_outlier_channel_is_refused_by_name_with_its_figure(teacher: Teacher) -> None:
    batch, plain = Images().next(WORLD.device)[0], load_teacher(load_card("toy_dino"))
    plant(teacher.net)
    bank = bank_of(teacher)
    with in_fp8(teacher.net, False):
        exact = bank.encode(batch)["toy_dino"].features_BCHW
    wanted = bank_like(plain, batch)
    assert (exact - wanted).square().mean() / wanted.var() < 0.01, "exact products bear it"
    with pytest.raises(
        TeacherError, match=r"on 256 images .* outputs of toy_dino \(features \d+\.\d\d %, .*teacher_precision=bf16"
    ):
        check_fp8(bank, Images(), 256, WORLD)  # type: ignore[arg-type]


def bank_like(teacher: Teacher, batch: Batch) -> Tensor:
    return TeacherBank(load_recipe("toy/stage1", RECIPE), {"toy_dino": teacher}).encode(batch)["toy_dino"].features_BCHW


def test_where_it_cannot_be_measured_it_is_refused() -> None:
    assert load_recipe("stage1", ["engine.teacher_precision=fp8"]).engine.teacher_bytes == 2
    with pytest.raises(RecipeError, match="ranks with teachers alone have no images"):
        load_recipe("stage1", ["engine.teacher_precision=fp8", "engine.placement={kind: dedicated}"])
    with pytest.raises(RecipeError, match="only the teachers of a stage can be measured"):
        load_upsampler_recipe("upsampler/dfn_clip_2x", ["engine.teacher_precision=fp8"])
