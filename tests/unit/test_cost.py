"""The cost model against the published arithmetic and against the networks themselves (see also test_teachers_cards.py)."""

import pytest
import torch

from radio_distill.config.load import cards_of, load_card, load_recipe
from radio_distill.config.recipe import Recipe
from radio_distill.config.upsampler import Network
from radio_distill.config.upsampler_recipe import Downsampler
from radio_distill.errors import RecipeError
from radio_distill.network.arch import HeadArch
from radio_distill.network.student import Student
from radio_distill.plan.cost import count_flops, head_flops, partition_cost, teacher_flops, trunk_flops, vit_flops
from radio_distill.plan.memory import head_parameters, state_bytes, trunk_parameters
from radio_distill.student.names import student_of
from radio_distill.upsamplers.cost import downsampler_flops, network_flops, network_parameters, uncertainty_flops
from radio_distill.upsamplers.featsharp import FeatSharp
from radio_distill.upsamplers.form import PUBLISHED
from radio_distill.upsamplers.map_weights import UncertaintyNet

GFLOP = 1e9
TEACHERS = {"dfn_clip": {}, "siglip": {}, "dinov2": {"card": "dinov2_g_reg"}, "sam": {"card": "sam_h"}}
LOW = {"dfn_clip": {}, "siglip": {}, "dinov2": {"size": 378}, "sam": {"mosaic": True}}


def recipe(student: dict | None = None, partitions: dict | None = None, **values) -> Recipe:
    cells = partitions or {"low": {"size": 432, "images": 8, "teachers": LOW}}
    # 4 class tokens + 6 registers: the 10 tokens before the patches that the published table assumes.
    return Recipe(name="t", teachers=TEACHERS, partitions=cells, student={"num_registers": 6, **(student or {})}, **values)


def low(size: int) -> dict:
    return {"low": {"size": size, "images": 8, "teachers": LOW}}


@pytest.mark.parametrize(("size", "gflop"), [(256, 168), (432, 501), (512, 731), (768, 1928), (1024, 4144), (1152, 5797)])
def test_vit_large_costs_what_the_table_says(size: int, gflop: int) -> None:
    trunk = student_of(recipe()).trunk
    assert trunk_flops(trunk, size // 16) / GFLOP == pytest.approx(gflop, abs=0.6)


@pytest.mark.parametrize(
    ("card", "size", "gflop"),
    [
        ("dfn_clip", 378, 1007),
        ("siglip", 378, 670),
        ("dinov2_g_reg", 224, 608),
        ("dinov2_g_reg", 378, 1796),
        ("dinov2_g_reg", 518, 3578),
        ("dinov2_g_reg", 896, 13429),
        ("sam_h", 1024, 5954),
    ],
)
def test_teachers_cost_what_the_table_says(card: str, size: int, gflop: int) -> None:
    assert teacher_flops(load_card(card), size) / GFLOP == pytest.approx(gflop, abs=0.6)


@pytest.mark.parametrize(("size", "per_mosaic"), [(432, 4), (256, 16)])
def test_sam_is_shared_by_the_images_of_a_mosaic(size: int, per_mosaic: int) -> None:
    cost = partition_cost(recipe(partitions=low(size)), "low")
    assert cost.teachers["sam"] / GFLOP == pytest.approx(5954 / per_mosaic, abs=0.6)


# The table balances 256 tokens of every teacher in stage 1; the service balances each teacher's own 729 (0.1 %).
@pytest.mark.parametrize(("size", "total", "teacher_share"), [(256, 4375, 0.88), (432, 6538, 0.76)])
def test_stages_cost_what_the_table_says(size: int, total: int, teacher_share: float) -> None:
    cost = partition_cost(recipe(partitions=low(size)), "low")
    assert cost.total / GFLOP == pytest.approx(total, rel=0.0015)
    assert cost.teacher_share == pytest.approx(teacher_share, abs=0.005)


@pytest.mark.parametrize(("size", "gflop"), [(256, 7), (432, 21), (1024, 116)])
def test_heads_cost_what_the_table_says(size: int, gflop: int) -> None:
    views = {name: {} for name in TEACHERS}
    cells = {"all": {"size": size, "images": 8, "teachers": views}}
    assert partition_cost(recipe(partitions=cells), "all").heads_forward / GFLOP == pytest.approx(gflop, abs=0.5)


def test_the_blocks_of_attention_heads_cost_what_the_table_says() -> None:
    def heads(kind: str, inner: int) -> float:
        return sum(head_flops(HeadArch(kind, 1024, 1520, out, inner=inner), 4096) for out in (1280, 1152, 1536, 1280))

    # The table counts the 10 prefix tokens too (0.3 %); the head reads patches only.
    assert (heads("attention", 2) - heads("v2", 0)) / GFLOP == pytest.approx(1379, rel=0.004)


def test_tiles_cost_the_global_view_and_factor_squared_views() -> None:
    view = {"dfn_clip": {"upsampler": {"kind": "tile", "factor": 3}}}
    cost = partition_cost(recipe(partitions={"high": {"size": 1024, "images": 2, "teachers": view}}), "high")
    assert cost.teachers["dfn_clip"] / GFLOP == pytest.approx(10 * 1007, rel=1e-3)
    assert cost.balance == 2 * (3 * 27) ** 2 * 1280**2


def test_on_the_teachers_grid_heads_run_on_the_teachers_tokens() -> None:
    def heads(grid: str) -> float:
        view = {"dfn_clip": {"grid": grid}}
        return partition_cost(recipe(partitions={"high": {"size": 1024, "images": 2, "teachers": view}}), "high").heads_forward

    assert heads("student") / heads("teacher") == pytest.approx(4096 / 729, rel=0.01)


def test_recomputed_blocks_cost_one_more_forward_and_mesa_one_of_the_ema_student() -> None:
    plain = partition_cost(recipe(), "low")
    recomputed = partition_cost(recipe({"grad_checkpointing": True}), "low")
    mesa = partition_cost(recipe(loss={"mesa": {"weight": 1.0}}), "low")
    assert recomputed.total - plain.total == pytest.approx(plain.student_forward)
    assert mesa.total - plain.total == pytest.approx(plain.student_forward)


def test_a_mosaic_that_does_not_fit_is_refused() -> None:
    with pytest.raises(
        RecipeError, match=r"images of 1536 px do not fit a mosaic of 1024 px \(teacher 'sam_h'\); use a smaller"
    ):
        partition_cost(recipe(partitions=low(1536)), "low")


def test_count_flops_counts_a_matrix_product_twice_per_multiply_add() -> None:
    a, b = torch.empty(3, 5, device="meta"), torch.empty(5, 7, device="meta")
    assert count_flops(lambda: a @ b) == 2 * 3 * 5 * 7


@pytest.mark.parametrize("heads", [{}, {"kind": "attention"}, {"inner": 1}])
def test_student_formulas_agree_with_the_student(heads: dict) -> None:
    small = recipe(
        {"overrides": {"embed_dim": 256, "depth": 2, "num_heads": 4}, "spectral": False, "heads": {"hidden": 96, **heads}}
    )
    arch = student_of(small)
    with torch.device("meta"):
        student = Student(arch).eval()
        images = torch.empty(1, 3, 256, 256)
    parameters = sum(p.numel() for p in student.parameters())
    assert trunk_parameters(arch) + head_parameters(arch) == pytest.approx(parameters, rel=0.01)
    heads_flops = sum(head_flops(h, n) for a in arch.adaptors for h, n in ((a.features, 256), (a.summary, 1)) if h)
    assert count_flops(lambda: student.encode_adaptors(images)) == pytest.approx(
        trunk_flops(arch.trunk, 16) + heads_flops, rel=0.02
    )


def test_vit_flops_of_a_gated_mlp_counts_three_matrices() -> None:
    plain, gated = (vit_flops(10, 8, 1, 16, gated=g, patch=4, patches=9) for g in (False, True))
    assert gated - plain == 2 * 10 * 8 * 16


def test_the_four_teachers_take_5_7_gigabytes_in_bf16() -> None:
    four = recipe()
    assert state_bytes(four, cards_of(four), student_of(four), 8).teachers / 1e9 == pytest.approx(5.7, abs=0.05)


def test_upsamplers_lie_beside_their_teachers() -> None:
    plain, sharp = (load_recipe(name) for name in ("stage3", "stage3_featsharp"))
    before, after = (state_bytes(r, cards_of(r), student_of(r), 8).teachers for r in (plain, sharp))
    clip, siglip = (network_parameters(Network(kind="featsharp", factor=3), width) for width in (1280, 1152))
    assert after - before == 2 * (clip + siglip)
    linear = network_parameters(Network(kind="featsharp", factor=3, mixer="linear"), 1280)
    assert linear == pytest.approx(2 * 1280 * 1280, rel=5e-3)  # [bilinear, tiles] -> one map; norms are the rest


def test_zero_shards_gradients_moments_and_weights_in_this_order() -> None:
    states = [state_bytes(r, cards_of(r), student_of(r), 8) for r in (recipe(engine={"zero": z}) for z in range(4))]
    weights = states[0].weights
    assert [s.optimizer for s in states] == [2 * weights, weights // 4, weights // 4, weights // 4]
    assert [s.gradients for s in states] == [weights, weights, weights // 8, weights // 8]
    assert [s.weights for s in states] == [weights, weights, weights, weights // 8]


# The cost model of the FeatSharp block per output token, in MFLOP; by default plus the skip's matrix, 2 * 2C * C. The published
# block pads q, k and v to a power of two, where ours drops v's unused columns.
@pytest.mark.parametrize(
    ("options", "mflop"),
    [
        ({}, {1280: 96.7 + 6.55, 1152: 78.3 + 5.31, 1536: 139.0 + 9.44}),
        ({"hidden": 8.0}, {1280: 140.4 + 6.55, 1152: 113.7 + 5.31, 1536: 201.9 + 9.44}),
        ({"reference": True}, {1280: 164.3, 1152: 138.8, 1536: 221.0}),
        ({"mixer": "linear"}, {1280: 6.6, 1152: 5.3, 1536: 9.4}),
    ],
)
def test_fusion_costs_what_the_table_says(options: dict, mflop: dict) -> None:
    for width, expected in mflop.items():
        cell = network_flops(Network(factor=3, **options), width, 27, 14) / 81**2 / 1e6
        assert cell == pytest.approx(expected, rel=0.002, abs=0.06)


@pytest.mark.parametrize(
    "options", [{}, {"hidden": 8.0}, {"mixer": "mlp"}, {"mixer": "linear"}, {"inputs": ("bilinear", "tiles", "rgb")}]
)
def test_fusion_formulas_agree_with_the_network(options: dict) -> None:
    """A window over the whole map, so that tiles of the attention compute nothing that the formula leaves out."""
    spec, width, grid = Network(factor=2, window=31, **options), 32, 6
    level = FeatSharp(spec, width)
    maps = [torch.zeros(1, width, grid, grid), torch.zeros(1, width, 2 * grid, 2 * grid)]
    counted = count_flops(lambda: level(maps, torch.zeros(1, 3, 24, 24)))
    assert network_flops(spec, width, grid, 2) == pytest.approx(counted, rel=0.01)


def test_a_progressive_network_costs_its_levels_at_their_own_sizes() -> None:
    direct, stepwise = (network_flops(Network(factor=4, progressive=p), 1280, 27, 14) for p in (False, True))
    assert stepwise / direct == pytest.approx(1 + 1 / 4)


@pytest.mark.parametrize("kind", ["jbu", "sapa", "resfu"])
def test_light_upsamplers_cost_next_to_nothing_beside_a_block(kind: str) -> None:
    """5.4 kFLOP of kernels and 128 C of products a pixel for jbu."""
    cell = network_flops(Network(kind="featup" if kind == "jbu" else kind, factor=2), 1280, 27, 14) / 54**2
    assert cell < 0.002 * 96.7e6
    if kind == "jbu":
        assert cell == pytest.approx(5400 + 128 * 1280, rel=0.01)


@pytest.mark.parametrize("kind", ["attention", "simple"])
def test_downsampler_formulas_agree_with_the_modules(kind: str) -> None:
    spec = Downsampler(kind=kind, kernel=7)
    module = PUBLISHED.downsampler(spec, 32)
    counted = count_flops(lambda: module(torch.zeros(1, 32, 36, 36), (12, 12)))
    assert downsampler_flops(spec, 32, 36, 12) == pytest.approx(counted, rel=0.03)


def test_the_uncertainty_formula_agrees_with_the_module() -> None:
    counted = count_flops(lambda: UncertaintyNet(32)(torch.zeros(1, 32, 12, 12)))
    assert uncertainty_flops(32, 12) == counted


def test_a_sharpened_teacher_costs_its_views_with_a_rotation_each_and_its_network() -> None:
    def cost(upsampler: dict) -> float:
        view = {"dfn_clip": {"upsampler": upsampler}}
        return partition_cost(recipe(partitions={"high": {"size": 1024, "images": 2, "teachers": view}}), "high").teachers[
            "dfn_clip"
        ]

    rotation = 2 * 27**2 * 1280**2
    sharp = cost({"kind": "featsharp", "factor": 3, "weights": "not/there"})
    assert sharp == pytest.approx(10 * 1007e9 + 81**2 * 103.25e6 + 10 * rotation, rel=1e-3)
    assert cost({"kind": "debias", "weights": "not/there"}) == pytest.approx(1007e9 + rotation, rel=1e-3)
    assert cost({"kind": "featup", "factor": 3, "weights": "not/there"}) == pytest.approx(1007e9 + rotation, rel=2e-3)
