"""The mixers of the fusion network: what they compute untrained, how wide they are, positions."""

import pytest
import torch
import torch.nn.functional as F

from radio_distill.config.upsampler import Network
from radio_distill.upsamplers.fusion import Rotary, build_mixer, head_width, slopes
from radio_distill.upsamplers.published import published_mixer

C, G = 16, 48


def mixer(build=build_mixer, **keys):
    torch.manual_seed(0)
    return build(Network(**keys), C, G)


@pytest.mark.parametrize("kind", ["block", "mlp", "attention", "linear"])
def test_untrained_a_mixer_gives_its_first_input(kind):
    x = torch.randn(2, 6, 9, G)
    tolerance = 0 if kind == "linear" else 1e-5  # a layer scale of 1e-6
    assert (mixer(mixer=kind)(x) - x[..., :C]).abs().max() <= tolerance


def test_the_block_is_the_written_formula():
    block = mixer(window=3, norm=True).requires_grad_(False)
    for scale in (block.ls1, block.ls2):
        scale.gamma.uniform_(0.5, 1)
    x = torch.randn(1, 4, 5, G)
    mixed = x + block.ls1.gamma * block.attn(F.layer_norm(x, (G,), block.norm1.weight, block.norm1.bias))
    gate, value = block.mlp.w12(block.norm2(mixed)).chunk(2, -1)
    expected = mixed[..., :C] + block.ls2.gamma * block.mlp.w3(gate * gate.sigmoid() * value)
    assert torch.allclose(block(x), expected, atol=1e-6)


def test_attention_over_one_position_is_the_value():
    attention = mixer(window=1).attn
    x = torch.randn(1, 3, 4, G)
    value = attention.qkv(x).chunk(3, -1)[2]
    assert torch.allclose(attention(x), attention.proj(value), atol=1e-6)


@pytest.mark.parametrize(
    ("width", "head"),
    [(2560, 128), (2304, 128), (3072, 128), (256, 128), (768, 128), (32, 16), (16, 8), (272, 136), (2576, 112)],
)
def test_heads_are_near_128_wide_and_at_least_two(width, head):
    assert head_width(width) == head
    assert width % head == 0
    assert width // head >= 2


def test_sixteen_heads_have_the_published_slopes():
    assert slopes(16) == tuple(2.0 ** -((head + 2) // 2) for head in range(16))
    assert slopes(2) == (0.5, 0.5)
    assert slopes(20)[:2] == (0.5, 0.5)
    assert slopes(20)[-2:] == (1 / 256, 1 / 256)


@pytest.mark.parametrize(("channels", "default", "reference"), [(1280, 3416, 6832), (1024, 2736, 5464)])
def test_the_mlp_is_as_wide_as_intended_and_as_published(channels, default, reference):
    with torch.device("meta"):
        ours, theirs = (build(Network(), channels, 2 * channels) for build in (build_mixer, published_mixer))
    assert ours.mlp.w12.out_features == 2 * default
    assert theirs.mlp.w12.out_features == 2 * reference


def test_the_published_block_has_the_published_number_of_parameters():
    with torch.device("meta"):
        block = published_mixer(Network(), 1280, 2560)
    assert sum(p.numel() for p in block.parameters()) == pytest.approx(81.8e6, rel=1e-3)


@pytest.mark.parametrize("decay", [False, True])
def test_rotary_scores_depend_on_distances_alone(decay):
    rotary = Rotary(16, decay=decay)
    q, k = (torch.randn(16).expand(1, 8, 9, 16) for _ in range(2))
    q, k = rotary(q, k)

    def score(query, key):
        return float((q[0, query[0], query[1]] * k[0, key[0], key[1]]).sum())

    assert score((2, 3), (1, 5)) == pytest.approx(score((6, 5), (5, 7)), abs=1e-4)
    assert score((2, 3), (1, 5)) != pytest.approx(score((2, 3), (5, 1)), abs=1e-2)


@pytest.mark.parametrize("position", ["alibi", "rope", "xpos", "none"])
@pytest.mark.parametrize("build", [build_mixer, published_mixer])
def test_bfloat16_autocast_stays_near_float32(position, build):
    block = mixer(build, position=position).requires_grad_(False)
    for scale in (block.ls1, block.ls2):
        scale.gamma.fill_(0.7)
    x = torch.randn(1, 9, 7, G)
    with torch.autocast("cpu", torch.bfloat16):
        rough = block(x)
    assert (rough - block(x)).abs().max() < 0.03  # values up to 4


def test_every_parameter_gets_a_gradient():
    for kind in ("block", "mlp", "attention", "linear"):
        for build in (build_mixer,) if kind == "linear" else (build_mixer, published_mixer):
            module = mixer(build, mixer=kind)
            module(torch.randn(1, 5, 5, G)).square().sum().backward()
            assert all(p.grad is not None for p in module.parameters()), kind


def test_a_width_that_heads_cannot_share_is_told():
    with pytest.raises(ValueError, match=r"have 36 channels together, expected a multiple of 16.*use mixer 'mlp' or 'linear'"):
        build_mixer(Network(), 18, 36)
    with pytest.raises(ValueError, match="have 36 channels together"):
        published_mixer(Network(), 18, 36)
    build_mixer(Network(mixer="mlp"), 18, 36)
