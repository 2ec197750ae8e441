"""JAFAR, SAPA, ReSFU and NAF: convex, rectangular, differentiable, and equal to slow obvious versions of their kernels."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from radio_distill.upsamplers import cell_attention, jafar
from radio_distill.upsamplers.cell_attention import attend_cells, filter_cells
from radio_distill.upsamplers.jafar import Jafar
from radio_distill.upsamplers.jbu import Levels
from radio_distill.upsamplers.naf import Naf
from radio_distill.upsamplers.resfu import Resfu, _guided_filter
from radio_distill.upsamplers.sapa import SapaLevel

KINDS = {
    "jafar": lambda channels, factor: Jafar(channels),
    "sapa": lambda channels, factor: Levels(factor, lambda: SapaLevel(channels)),
    "resfu": lambda channels, factor: Resfu(channels),
    "naf": lambda channels, factor: Naf.of(channels),
    "any": lambda channels, factor: Naf.for_any(32),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def attend_slowly(queries: Tensor, keys: Tensor, values: Tensor, window: int, heads: int) -> Tensor:
    """One output position and head at a time."""
    batch, (height, width), (h, w) = len(queries), queries.shape[2:], keys.shape[2:]
    out = torch.zeros(batch, values.shape[1], height, width)
    for b, y, x in torch.cartesian_prod(*map(torch.arange, (batch, height, width))).tolist():
        cy, cx = y * h // height, x * w // width
        rows = slice(max(0, cy - window // 2), cy + window // 2 + 1)
        columns = slice(max(0, cx - window // 2), cx + window // 2 + 1)
        parts = []
        for q, k, v in zip(queries[b].chunk(heads), keys[b].chunk(heads), values[b].chunk(heads)):
            scores = q[:, y, x] @ k[:, rows, columns].flatten(1)
            parts.append(v[:, rows, columns].flatten(1) @ scores.softmax(0))
        out[b, :, y, x] = torch.cat(parts)
    return out


@pytest.mark.parametrize("window", [3, 5, 9])
@pytest.mark.parametrize("rows_at_a_time", ["all", "one"])
def test_cell_attention_is_the_slow_version(window: int, rows_at_a_time: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if rows_at_a_time == "one":
        monkeypatch.setattr(cell_attention, "CHUNK", 1)
    queries, keys, values = (torch.randn(2, c, *s).requires_grad_() for c, s in ((8, (8, 15)), (8, (4, 5)), (6, (4, 5))))
    got = attend_cells(queries, keys, values, window=window, heads=2)
    want = attend_slowly(queries, keys, values, window, heads=2)
    torch.testing.assert_close(got, want)
    cotangent = torch.randn_like(want)
    inputs = (queries, keys, values)
    torch.testing.assert_close(torch.autograd.grad(got, inputs, cotangent), torch.autograd.grad(want, inputs, cotangent))


def test_given_weights_filter_the_cells_around(monkeypatch: pytest.MonkeyPatch) -> None:
    values, (h, w), factors, window = torch.randn(2, 6, 4, 5), (4, 5), (2, 3), 3
    weights = torch.randn(2, h, w, 6, window**2)
    padded = F.pad(values, (1, 1, 1, 1), mode="replicate")
    want = torch.zeros(2, 6, 8, 15)
    for y, x in torch.cartesian_prod(torch.arange(8), torch.arange(15)).tolist():
        cy, cx, phase = y // 2, x // 3, (y % 2) * 3 + x % 3
        around = padded[:, :, cy : cy + window, cx : cx + window].flatten(2)
        want[:, :, y, x] = (around @ weights[:, cy, cx, phase, :, None])[..., 0]
    torch.testing.assert_close(filter_cells(weights, values, window=window, factors=factors), want)
    monkeypatch.setattr(cell_attention, "CHUNK", 1)
    torch.testing.assert_close(filter_cells(weights, values, window=window, factors=factors), want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [1, 2, 3, 6])
def test_outputs_stay_within_the_source_and_constants_are_kept(kind: str, factor: int) -> None:
    model = KINDS[kind](8, factor)
    size, image = (3 * factor, 5 * factor), torch.randn(2, 3, 29, 40)
    source = torch.randn(2, 8, 3, 5)
    out = model(source, image, size)
    assert out.shape == (2, 8, *size)
    assert (out <= source.amax((2, 3), keepdim=True) + 1e-5).all()
    assert (out >= source.amin((2, 3), keepdim=True) - 1e-5).all()
    constant = torch.randn(2, 8, 1, 1).expand(2, 8, 3, 5)
    torch.testing.assert_close(model(constant, image, size), constant[:, :, :1, :1].expand(2, 8, *size))


@pytest.mark.parametrize("kind", KINDS)
def test_source_image_and_every_parameter_get_the_gradient_that_differences_show(kind: str) -> None:
    model = KINDS[kind](8, 2)
    source, image = torch.randn(1, 8, 3, 4, requires_grad=True), torch.randn(1, 3, 20, 30, requires_grad=True)
    weigh = torch.randn(1, 8, 6, 8)
    inputs = {"source": source, "image": image, **dict(model.named_parameters())}

    def loss() -> Tensor:
        return (model(source, image, (6, 8)) * weigh).sum()

    loss().backward()
    for name, x in inputs.items():
        assert x.grad is not None, name
        assert x.grad.abs().max() > 0, name
    direction, step = torch.randn_like(source), 1e-2
    with torch.no_grad():
        source += step * direction
        above = loss()
        source -= 2 * step * direction
        below = loss()
    torch.testing.assert_close((above - below) / (2 * step), (source.grad * direction).sum(), rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_stays_near_float32(kind: str) -> None:
    model = KINDS[kind](16, 2)
    source, image = torch.randn(1, 16, 4, 6), torch.randn(1, 3, 24, 36)
    want = model(source, image, (8, 12))
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(source.bfloat16(), image.bfloat16(), (8, 12))
    pure = model.bfloat16()(source.bfloat16(), image.bfloat16(), (8, 12))
    for got in (autocast, pure):
        assert got.dtype == torch.bfloat16
        assert (got - want).abs().mean() < 0.05 * want.abs().mean()  # bfloat16 keys under a softmax


def test_jafar_is_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, source, image = Jafar(8), torch.randn(2, 8, 3, 4, requires_grad=True), torch.randn(2, 3, 20, 20)
    want = model(source, image, (6, 7))
    want_grad = torch.autograd.grad(want.square().sum(), (source, *model.parameters()))
    monkeypatch.setattr(jafar, "SCORES_PER_CHUNK", 1000)
    got = model(source, image, (6, 7))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got.square().sum(), (source, *model.parameters())), want_grad)
    with torch.no_grad():
        torch.testing.assert_close(model(source, image, (6, 7)), want)


def test_naf_sees_nine_by_nine_cells_and_no_more() -> None:
    model, image = Naf.of(4), torch.randn(1, 3, 40, 48)
    source = torch.zeros(1, 4, 11, 13)
    source[:, :, 5, 6] = 1
    touched = model(source, image, (22, 39)) > 0
    cells = touched[0, 0].unflatten(0, (11, 2)).unflatten(2, (13, 3)).any(3).any(1)
    want = torch.zeros(11, 13, dtype=torch.bool)
    want[1:10, 2:11] = True
    assert torch.equal(cells, want)


def test_naf_on_a_plain_image_is_one_filter_at_every_place() -> None:
    model, image = Naf.of(4), torch.full((1, 3, 30, 30), 0.7)
    source = torch.randn(1, 4, 15, 15)
    out = model(source, image, (30, 45))
    moved = model(source.roll((1, 2), (2, 3)), image, (30, 45))
    rows, columns = slice(8, 20), slice(12, 27)  # windows that reach neither a border nor the rolled edge
    torch.testing.assert_close(moved.roll((-2, -6), (2, 3))[..., rows, columns], out[..., rows, columns], rtol=1e-4, atol=1e-4)


def test_naf_weights_depend_on_the_image_alone() -> None:
    model, image = Naf.of(4), torch.randn(1, 3, 20, 20)
    first, second = torch.randn(2, 1, 4, 5, 5)
    mixed = model(2 * first - 3 * second, image, (10, 10))
    torch.testing.assert_close(mixed, 2 * model(first, image, (10, 10)) - 3 * model(second, image, (10, 10)))


def test_resfu_weighs_the_bilinear_map_at_nine_places_one_cell_apart() -> None:
    model, source, image = Resfu(6), torch.randn(1, 6, 3, 4), torch.randn(1, 3, 18, 16)
    parts: list[Tensor] = []
    for block in (model.semantic, model.detail):
        block.register_forward_hook(lambda _module, _inputs, out: parts.append(out))
    got = model(source, image, (9, 8))
    scores = parts[0] + parts[1]
    bilinear = F.interpolate(source, (9, 8), mode="bilinear")
    up, weights = F.pad(bilinear, (2, 2, 3, 3), mode="replicate"), torch.full((9, 9, 8), -torch.inf)
    values = torch.zeros(9, 6, 9, 8)
    for n, (dy, dx) in enumerate((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)):
        values[n] = up[0, :, 3 + 3 * dy : 12 + 3 * dy, 2 + 2 * dx : 10 + 2 * dx]
        ys, xs = torch.arange(9)[:, None] + 3 * dy, torch.arange(8) + 2 * dx
        on_map = (ys >= 0) & (ys < 9) & (xs >= 0) & (xs < 8)
        weights[n] = scores[0, n].masked_fill(~on_map, -torch.inf)
    torch.testing.assert_close(got[0], (weights.softmax(0)[:, None] * values).sum(0))


def test_resfu_compares_each_neighbour_with_the_query() -> None:
    block = Resfu(6).semantic
    query, key = torch.randn(2, 1, 32, 6, 9)
    hidden: list[Tensor] = []
    block.score.register_forward_pre_hook(lambda _module, inputs: hidden.append(inputs[0]))
    block(query, key, (2, 3))
    padded = F.pad(block.norm(key), (3, 3, 2, 2), mode="replicate")
    around = F.unfold(padded, 3, dilation=(2, 3)).view(1, 32, 9, 6, 9) - block.norm(query)[:, :, None]
    grouped = around.view(1, 4, 8, 9, 6, 9)
    weight = block.weight.view(4, 32, 8, 9)
    want = torch.einsum("bgcnyx,gocn->bgoyx", grouped, weight).flatten(1, 2)
    torch.testing.assert_close(hidden[0], want, rtol=1e-4, atol=1e-4)


def test_a_guided_filter_keeps_what_is_linear_in_the_guide() -> None:
    guide = F.interpolate(torch.randn(1, 2, 6, 8), (24, 32), mode="bicubic")
    target = 3 * guide - 1
    assert (_guided_filter(guide, target) - target).abs().mean() < 0.02 * target.std()  # EPSILON against the variance


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("sapa", "factor 2 makes 8x8 out of 4x4, not 9x8; ask for that size, and resize the result"),
        ("resfu", "9x8 is not a whole multiple of 4x4 cells; nearest is 8x8: use that, and resize the result"),
        ("naf", "9x8 is not a whole multiple of 4x4 cells; nearest is 8x8: use that, and resize the result"),
    ],
)
def test_a_size_that_does_not_fit_is_told(kind: str, message: str) -> None:
    model: nn.Module = KINDS[kind](8, 2)
    with pytest.raises(ValueError, match=message):
        model(torch.randn(1, 8, 4, 4), torch.randn(1, 3, 32, 32), (9, 8))


def test_naf_tells_which_channels_it_takes() -> None:
    with pytest.raises(ValueError, match="NAF with 6 channels: expected a multiple of 4; pad the features"):
        Naf.of(6)


def test_published_weights_of_jafar_load_without_those_that_are_never_used() -> None:
    model, attention = Jafar(8), "upsampler.cross_decode.cross_attn."
    own = {name: torch.randn_like(x) for name, x in model.state_dict().items()}
    inert = {"norm_v.weight": (8,), "attention.v_proj_weight": (128, 8), "attention.out_proj.weight": (128, 128)}
    published = own | {
        attention + name: torch.randn(shape) for name, shape in {**inert, "attention.out_proj.bias": (128,)}.items()
    }
    bias = f"{attention}attention.in_proj_bias"
    published[bias] = torch.cat([own[bias], torch.randn(128)])
    nn.ModuleDict({"jafar": model}).load_state_dict({f"jafar.{name}": x for name, x in published.items()})
    torch.testing.assert_close(dict(model.state_dict()), own, rtol=0, atol=0)
