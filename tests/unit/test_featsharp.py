"""The fusion network and the sharpener around a teacher: default preset, every kind, wrong use."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from radio_distill.balance import Balancer, identity
from radio_distill.config.upsampler import Network, check_network
from radio_distill.errors import RecipeError, TeacherError
from radio_distill.types import VisionOutput
from radio_distill.upsamplers.featsharp import FeatSharp
from radio_distill.upsamplers.sharpener import Sharpener
from radio_distill.upsamplers.tiling import cut

C, PATCH = 16, 2
KINDS = ["featsharp", "featup", "bilinear", "tile", "s2", "jafar", "sapa", "resfu", "naf"]
INPUTS = ["jbu", "bilinear", "tiles", "rgb", "jafar", "resfu", "naf"]


class PatchMeans:
    """A local teacher: every cell is a fixed function of the mean of its patch. Counts its calls."""

    def __init__(self, channels=C, summary=True):
        self.weight = torch.linspace(-1, 1, 3 * channels).reshape(channels, 3, 1, 1)
        self.summary, self.calls = summary, []

    def __call__(self, pixels):
        self.calls.append(tuple(pixels.shape))
        features = F.conv2d(F.avg_pool2d(pixels, PATCH), self.weight)
        return VisionOutput(features.mean((2, 3)) if self.summary else None, features)


def sharpener(size=(12, 16), balancer=None, **keys):
    torch.manual_seed(0)
    grid = size[0] // PATCH, size[1] // PATCH
    return Sharpener(Network(**keys), C, grid, balancer or identity(C))


def image(size=(12, 16), factor=2, batch=2):
    torch.manual_seed(1)
    return torch.randn(batch, 3, factor * size[0], factor * size[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [2, 3, 5, 14])
def test_every_kind_gives_a_finer_map_of_rectangular_images(kind, factor):
    teacher = PatchMeans()
    out = sharpener(kind=kind, factor=factor)(teacher, image(factor=factor), (12, 16))
    assert out.low_BChw.shape == (2, C, 6, 8)
    assert out.high_BCHW.shape == (2, C, 6 * factor, 8 * factor)
    tiles = factor**2 if kind in ("featsharp", "tile", "s2") else 0
    assert teacher.calls == [(2 * (1 + tiles), 3, 12, 16)]  # one call, and no tiles that nobody looks at


@pytest.mark.parametrize("first", [name for name in INPUTS if name != "rgb"])
def test_untrained_featsharp_gives_its_first_input(first):
    inputs = (first, "rgb", "tiles") if first != "tiles" else ("tiles", "bilinear")
    model, x = sharpener(inputs=inputs), image()
    out = model(PatchMeans(), x, (12, 16))
    if first == "bilinear":
        expected = F.interpolate(out.low_BChw, scale_factor=2, mode="bilinear")
    elif first == "tiles":
        expected = F.conv2d(F.avg_pool2d(x, PATCH), PatchMeans().weight)  # a local teacher: tiles are the fine map
    else:
        guidance = F.interpolate(x, (12, 16), mode="bilinear", antialias=True) if first == "jbu" else x
        expected = model.network.ups[0].get_submodule(first)(out.low_BChw, guidance, (12, 16))
    assert (out.high_BCHW - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("factor", "levels"), [(7, [1, 7]), (9, [1, 3, 9]), (10, [1, 2, 10]), (12, [1, 2, 4, 12]), (14, [1, 2, 14])]
)
def test_progressive_levels_are_the_prime_factors(factor, levels):
    one = sharpener(factor=factor, progressive=True, size=(8, 4))
    assert one.view_factors == levels
    assert one(PatchMeans(), image((8, 4), factor), (8, 4)).high_BCHW.shape == (2, C, 4 * factor, 2 * factor)


def test_progressive_levels_see_tiles_of_their_own_size():
    model, teacher, x = sharpener(factor=4, progressive=True, inputs=("tiles",), mixer="linear"), PatchMeans(), image(factor=4)
    out = model(teacher, x, (12, 16))
    assert model.view_factors == [1, 2, 4]
    assert teacher.calls == [(2 * (1 + 4 + 16), 3, 12, 16)]
    assert [tuple(level.tile_pos.shape) for level in model.network.ups] == [(1, C, 2, 2)] * 2
    assert torch.allclose(out.high_BCHW, F.conv2d(F.avg_pool2d(x, PATCH), teacher.weight), atol=1e-5)


def test_factor_one_uses_the_global_view_twice_and_encodes_it_once():
    teacher = PatchMeans()
    out = sharpener(factor=1)(teacher, image(factor=1), (12, 16))
    assert teacher.calls == [(2, 3, 12, 16)]
    assert out.high_BCHW.shape == out.low_BChw.shape


def test_tile_positions_are_repeated_over_their_tiles():
    net = FeatSharp(Network(inputs=("tiles",), mixer="linear"), C)
    with torch.no_grad():
        net.ups[0].tile_pos.copy_(torch.arange(4.0).reshape(1, 1, 2, 2).expand(1, C, 2, 2))
    out = net([torch.zeros(1, C, 3, 5), torch.zeros(1, C, 6, 10)], torch.zeros(1, 3, 12, 20))
    assert torch.equal(cut(out, 2).amax((1, 2, 3)), torch.arange(4.0))
    assert torch.equal(cut(out, 2).amin((1, 2, 3)), torch.arange(4.0))


def test_detail_is_what_tiles_have_beyond_the_teachers_grid():
    """Its mean over every cell of that grid is 0, whatever is constant in a cell does not count, and with the means it is the tiles."""
    net = FeatSharp(Network(inputs=("bilinear", "detail"), mixer="linear"), C)
    with torch.no_grad():
        net.ups[0].block.weight.copy_(torch.eye(2 * C)[C:])  # the second input alone
    fine, steps = torch.randn(1, C, 6, 10), torch.randn(1, C, 3, 5).repeat_interleave(2, 2).repeat_interleave(2, 3)
    found = net([torch.zeros(1, C, 3, 5), fine + steps], torch.zeros(1, 3, 12, 20))
    assert F.avg_pool2d(found, 2).abs().max() < 1e-6
    assert torch.allclose(found + F.avg_pool2d(fine, 2).repeat_interleave(2, 2).repeat_interleave(2, 3), fine, atol=1e-5)
    assert sharpener(inputs=("bilinear", "detail")).view_factors == [1, 2]


def test_the_bias_map_is_added_to_global_view_and_tiles_alike():
    model, plain = sharpener(kind="tile"), sharpener(kind="tile", debias=False)
    with torch.no_grad():
        model.bias_buffer.buffer.normal_()
    with_bias, without = (m(PatchMeans(), image(), (12, 16)) for m in (model, plain))
    bias = model.bias_buffer.buffer
    assert torch.allclose(with_bias.low_BChw - without.low_BChw, bias.expand(2, -1, -1, -1), atol=1e-5)
    assert torch.allclose(with_bias.high_BCHW - without.high_BCHW, bias.repeat(2, 1, 2, 2), atol=1e-5)


def test_the_bias_map_fits_other_grids():
    model = sharpener()
    model.bias_buffer.buffer.data.fill_(0.5)
    generated = model.generate(PatchMeans(), image(size=(8, 8), factor=1)).features_BCHW
    plain = PatchMeans()(image(size=(8, 8), factor=1)).features_BCHW
    assert torch.allclose(generated, plain + 0.5, atol=1e-6)


def test_gradients_reach_network_and_bias_map_and_not_the_teacher():
    teacher = PatchMeans()
    teacher.weight.requires_grad_()
    model = sharpener(inputs=("jbu", "tiles", "rgb"))
    model(teacher, image(), (12, 16)).high_BCHW.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert teacher.weight.grad is None


def test_maps_are_balanced_and_denormalize_undoes_it():
    matrix = torch.linalg.qr(torch.randn(C, C))[0] * 3
    balancer = Balancer("phi_s", matrix, matrix.inverse(), offset_C=torch.randn(C), mean_C=torch.zeros(C))
    model, x = sharpener(kind="bilinear", balancer=balancer), image()
    low = model(PatchMeans(), x, (12, 16)).low_BChw
    raw = PatchMeans()(F.interpolate(x, (12, 16), mode="bilinear", antialias=True)).features_BCHW
    assert torch.allclose(low, balancer.forward(raw), atol=1e-4)
    assert torch.allclose(model.denormalize(low), raw, atol=1e-4)


@pytest.mark.parametrize("summary", [True, False])
def test_the_summary_is_that_of_the_global_view(summary):
    x = image()
    out = sharpener()(PatchMeans(summary=summary), x, (12, 16))
    if summary:
        low = F.interpolate(x, (12, 16), mode="bilinear", antialias=True)
        assert torch.allclose(out.summary_BC, PatchMeans()(low).summary_BC, atol=1e-6)
    else:
        assert out.summary_BC is None


def test_the_balancer_moves_with_the_module_and_keeps_its_precision():
    model = sharpener().to("meta")
    assert model.balancer.weight.device.type == "meta"
    assert sharpener().bfloat16().balancer.weight.dtype == torch.float32


@pytest.mark.parametrize("inputs", [("jbu", "tiles", "rgb"), ("bilinear", "tiles"), ("naf", "tiles")])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_results_stay_near_float32_under_bfloat16_autocast(inputs, weights):
    model = sharpener(inputs=inputs)
    exact = model(PatchMeans(), image(), (12, 16)).high_BCHW
    model.network.to(weights)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(PatchMeans(), image(), (12, 16)).high_BCHW
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (
            (10, 16),
            r"image of 10x16 px, smaller than a tile, given to a 2x upsampler of a teacher that sees 12x16 px; expected 24x32",
        ),
        ((24, 30), r"image of 24x30 px given to a 2x upsampler.*resize the image"),
        ((12, 16), r"image of 12x16 px given"),
    ],
)
def test_an_image_of_the_wrong_size_is_told(size, message):
    with pytest.raises(TeacherError, match=message):
        sharpener()(PatchMeans(), torch.zeros(1, 3, *size), (12, 16))


def test_networks_without_tiles_also_take_the_teachers_size():
    for kind in ("bilinear", "featup", "jafar"):
        out = sharpener(kind=kind)(PatchMeans(), image(factor=1), (12, 16))
        assert out.high_BCHW.shape == (2, C, 12, 16)


def test_the_reference_squashes_any_image():
    out = sharpener(size=(12, 12), reference=True)(PatchMeans(), torch.randn(1, 3, 31, 50), (12, 12))
    assert out.high_BCHW.shape == (1, C, 12, 12)


def test_another_teacher_is_told():
    with pytest.raises(TeacherError, match=r"gives 32 channels, but this upsampler is for 16; use the teacher"):
        sharpener()(PatchMeans(channels=32), image(), (12, 16))
    with pytest.raises(TeacherError, match=r"balancer is for 32 channels, but the upsampler for 16; use statistics"):
        sharpener(balancer=identity(32))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"window": 4}, r"'window' is 4, expected an odd number of cells; use 3 or 5"),
        ({"inputs": ("rgb", "tiles")}, r"\['rgb', 'tiles'\], expected a feature map first"),
        ({"inputs": ()}, r"'inputs' is \[\], expected a feature map first"),
        ({"inputs": ("tiles", "tiles")}, r"expected each at most once"),
        ({"kind": "tile", "inputs": ("tiles",)}, r"'inputs' has no effect with kind 'tile'.*remove 'inputs'"),
        ({"kind": "tile", "beta": 0.3}, r"'beta' has no effect with kind 'tile', expected kind 's2'"),
        ({"kind": "featup", "factor": 1}, r"'factor' is 1, but kind 'featup' only enlarges; use 2 or more"),
        ({"reference": True, "mixer": "linear"}, r"mixer 'linear' has no published counterpart"),
        ({"reference": True, "inputs": ("naf", "tiles")}, r"input 'naf' has no published counterpart"),
        ({"reference": True, "kind": "naf"}, r"kind 'naf' has no published counterpart"),
    ],
)
def test_networks_that_do_not_fit_together_are_told(keys, message):
    with pytest.raises(RecipeError, match=message):
        sharpener(**keys)


def test_what_fits_together_is_accepted():
    for kind, factor in itertools.product(KINDS, [2, 3, 4, 6, 8]):
        assert check_network(Network(kind=kind, factor=factor)) == []


def test_a_problem_carries_the_place_of_its_key():
    [problem] = check_network(Network(window=2), ("upsampler", "network"))
    assert problem.path == ("upsampler", "network", "window")
