"""Every card in a tiny version: the contract of a teacher, weights from local files, and the libraries' own outputs."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention import SDPBackend

from radio_distill.config.cards import Pool, TeacherCard
from radio_distill.config.load import load_card
from radio_distill.errors import TeacherError
from radio_distill.teachers.base import Teacher, load_teacher
from radio_distill.teachers.open_clip import PackedAttention
from radio_distill.teachers.sam import RelPosAttention
from radio_distill.teachers.timm import build_trunk

CARDS = [p.stem for p in sorted((Path(__file__).parents[2] / "teachers").glob("*.yaml")) if not p.stem.startswith("toy_")]
WIDTH = 48
SIZES = {"embed_dim": WIDTH, "depth": 2, "num_heads": 4}
CLIP = {"image_size": 56, "patch_size": 14, "width": WIDTH, "layers": 2, "head_width": 12}
CONFIG = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
SAM3 = {"intermediate_size": 96, "image_size": 56, "pretrain_image_size": 28, "window_size": 2, "global_attn_indexes": [1]}


def tiny(name: str, **values) -> TeacherCard:
    """The card with a grid of 4 x 4 patches (8 x 8 in RADIO's table), 48 channels and two blocks."""
    card = load_card(name)
    size, params = 4 * card.input.patch, dict(card.params)
    summary = None if card.output.summary is None else WIDTH
    if name == "dfn_clip":
        params |= {"overrides": CLIP, "embed_dim": 32}
        summary = 32
    elif name == "sam_h":  # windows of 3 on a grid of 4: padded, as 14 on 64
        params["overrides"] = SIZES | {"img_size": size, "window_size": 3, "global_attn_indexes": [1], "neck_chans": 16}
    elif card.family in ("timm", "open_clip"):
        params["overrides"] = SIZES | ({} if name.startswith("dinov3") else {"img_size": size})
    elif name == "sam3":
        params["config"] = CONFIG | SAM3
    elif name.startswith("dinov3") or name == "siglip2_naflex":
        params["config"] = (
            params["config"] | CONFIG | {"intermediate_size": 96} | ({"num_patches": 16} if summary_pools(card) else {})
        )
    elif name == "paligemma":
        params["config"] = params["config"] | CONFIG | {"intermediate_size": 96, "image_size": size}
    else:
        params["config"] = params["config"] | CONFIG | {"max_img_size": 128}
        summary = WIDTH * len(params["config"]["summary_idxs"])
    changed = {
        "input": card.input.model_copy(update={"size": size}),
        "output": card.output.model_copy(update={"summary": summary, "features": WIDTH, "pool": tiny_pool(card)}),
        "params": params,
    }
    return card.model_copy(update=changed | values)


def summary_pools(card: TeacherCard) -> bool:
    return card.output.pool is not None


def tiny_pool(card: TeacherCard) -> Pool | None:
    """Of a network with `CONFIG` or `SIZES`; timm's MLP keeps its ratio to the width."""
    if card.output.pool is None:
        return None
    mlp = 96 if card.family == "transformers" else int(WIDTH * card.output.pool.mlp / card.output.features)
    return card.output.pool.model_copy(update={"heads": 4, "mlp": mlp})


def shake(net: torch.nn.Module, seed: int = 0) -> None:
    """Away from the initial zeros and ones, so that every weight matters."""
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data.add_(torch.randn(p.shape, generator=generator) * 0.1)


def random_teacher(card: TeacherCard) -> Teacher:
    teacher = load_teacher(card, weights="random")
    shake(teacher.net)
    return teacher


def images(teacher: Teacher, *, count: int = 2) -> Tensor:
    size = teacher.card.input.size
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def library_state(teacher: Teacher) -> dict[str, Tensor]:
    """The weights under the names of the file that the card's source holds."""
    net, card = teacher.net, teacher.card
    if card.family == "open_clip":
        part, prefix = (net.visual, "visual.") if hasattr(net, "visual") else (net.trunk, "visual.trunk.")
    elif card.family == "timm":
        part, prefix = net.trunk, ""
    else:
        part, prefix = net.model, card.params.get("weight_prefix", "")
    # DFN CLIP's projection is a Linear of its own here
    return {prefix + n.replace(".attn.in_proj.", ".attn.in_proj_"): x.contiguous() for n, x in part.state_dict().items()}


@pytest.mark.parametrize("name", CARDS)
def test_every_card_keeps_the_contract_of_a_teacher(name: str) -> None:
    card = tiny(name)
    teacher = random_teacher(card)
    x = images(teacher)
    out = teacher.encode(x)
    assert out.features_BCHW.shape == (2, WIDTH, 4, 4)
    assert (None if out.summary_BC is None else out.summary_BC.shape[1]) == card.output.summary
    assert out.features_BCHW.dtype == torch.float32
    assert not any(p.requires_grad for p in teacher.net.parameters())
    assert not teacher.net.training
    torch.testing.assert_close(teacher.encode(x[1:]).features_BCHW, out.features_BCHW[1:], rtol=1e-4, atol=1e-5)
    turned = teacher.encode(x.flip(-1)).features_BCHW
    assert not torch.allclose(turned, out.features_BCHW, atol=1e-3), "features depend on the pixels"


@pytest.mark.parametrize("name", CARDS)
def test_every_card_runs_in_bfloat16(name: str) -> None:
    teacher = random_teacher(tiny(name))
    exact = teacher.encode(images(teacher)).features_BCHW
    rounded = teacher.to("cpu", torch.bfloat16).encode(images(teacher)).features_BCHW
    assert rounded.dtype == torch.float32
    assert F.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("name", [n for n in CARDS if n != "sam_h"])
def test_local_weights_give_identical_outputs(name: str, tmp_path: Path) -> None:
    teacher = random_teacher(tiny(name))
    if teacher.card.family == "radio":
        teacher.net.model.save_pretrained(tmp_path / "whole")  # writes the reference's names
        state = load_file(tmp_path / "whole" / "model.safetensors") | conditioner(teacher.card)
    else:
        state = library_state(teacher)
    save_file(state, tmp_path / "weights.safetensors")
    again = load_teacher(tiny(name, source=str(tmp_path / "weights.safetensors")))
    expected, out = teacher.encode(images(teacher)), again.encode(images(teacher))
    assert torch.equal(out.features_BCHW, expected.features_BCHW)
    if expected.summary_BC is not None:
        assert torch.equal(out.summary_BC, expected.summary_BC)


def conditioner(card: TeacherCard) -> dict[str, Tensor]:
    values = {"norm_mean": card.input.mean, "norm_std": card.input.std}
    return {f"radio_model.input_conditioner.{k}": torch.tensor(v).view(3, 1, 1) for k, v in values.items()}


@pytest.mark.parametrize("name", ["dfn_clip", "siglip", "sam_h", "sam3"])
def test_a_teacher_of_one_size_refuses_others(name: str) -> None:
    teacher = random_teacher(tiny(name))
    size, patch = teacher.card.input.size, teacher.patch_size
    with pytest.raises(
        TeacherError, match=rf"{name!r} was given {size}x{size + patch} pixels, expected {size}x{size} only; resize"
    ):
        teacher.forward(torch.zeros(1, 3, size, size + patch))


def test_a_resizable_teacher_refuses_what_its_patch_does_not_divide() -> None:
    teacher = random_teacher(tiny("dinov2_l_reg"))
    with pytest.raises(TeacherError, match="was given 56x60 pixels, expected multiples of its patch, 14; resize"):
        teacher.forward(torch.zeros(1, 3, 56, 60))
    assert teacher.encode(torch.rand(1, 3, 56, 60)).features_BCHW.shape == (1, WIDTH, 4, 4)


@pytest.mark.parametrize("name", [n for n in CARDS if load_card(n).input.resizable])
def test_a_resizable_teacher_takes_any_grid(name: str) -> None:
    teacher = random_teacher(tiny(name))
    patch = teacher.patch_size
    assert teacher.forward(torch.rand(1, 3, 3 * patch, 6 * patch)).features_BCHW.shape == (1, WIDTH, 3, 6)


# --- the libraries' own outputs ---


def test_clip_tokens_and_summary_are_open_clips() -> None:
    teacher = random_teacher(tiny("dfn_clip"))
    visual, pixels = teacher.net.visual, torch.randn(2, 3, 56, 56)
    theirs = visual.forward_intermediates(pixels, indices=1, normalize_intermediates=True)  # normalised: ln_post
    out = teacher.forward(pixels)
    torch.testing.assert_close(out.features_BCHW, theirs["image_intermediates"][-1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.summary_BC, theirs["image_features"], rtol=1e-5, atol=1e-5)


def test_clip_summary_is_what_encode_image_gives(tmp_path: Path) -> None:
    import open_clip

    text = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
    clip = open_clip.CLIP(embed_dim=32, vision_cfg=CLIP, text_cfg=text, quick_gelu=True).eval()
    torch.save(clip.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    teacher = load_teacher(tiny("dfn_clip", source=str(tmp_path)))
    pixels = torch.randn(2, 3, 56, 56)
    torch.testing.assert_close(teacher.forward(pixels).summary_BC, clip.encode_image(pixels).detach(), rtol=1e-5, atol=1e-5)


def test_clip_positions_of_another_size_are_bilinear() -> None:
    card = tiny("dfn_clip")
    card = card.model_copy(update={"input": card.input.model_copy(update={"resizable": True})})
    teacher = random_teacher(card)
    table = teacher.net.visual.positional_embedding.data
    resized = teacher.net._positions((8, 8))
    assert torch.equal(resized[0], table[0]), "the class token's position is not resized"
    grid, fine = table[1:].view(4, 4, WIDTH), resized[1:].view(8, 8, WIDTH)
    # Half-pixel convention, factor 2: cell 3 of 8 lies at 1.25 of 4.
    row = 0.75 * grid[1] + 0.25 * grid[2]
    torch.testing.assert_close(fine[3, 3], 0.75 * row[1] + 0.25 * row[2])
    assert torch.equal(teacher.net._positions((4, 4)), table)
    assert teacher.forward(torch.rand(1, 3, 112, 84)).features_BCHW.shape == (1, WIDTH, 8, 6)


def test_siglip_tokens_and_summary_are_timms() -> None:
    teacher = random_teacher(tiny("siglip"))
    trunk, pixels = teacher.net.trunk, torch.randn(2, 3, 56, 56)
    out = teacher.forward(pixels)
    torch.testing.assert_close(out.features_BCHW.flatten(2).transpose(1, 2), trunk.forward_features(pixels))
    torch.testing.assert_close(out.summary_BC, trunk(pixels))
    torch.testing.assert_close(out.summary_BC, trunk.attn_pool(trunk.forward_features(pixels)))


def cubic(t: Tensor) -> Tensor:
    """Keys' cubic convolution kernel with a = -0.5, the one of antialiased resizing."""
    a, t = -0.5, t.abs()
    near, far = (a + 2) * t**3 - (a + 3) * t**2 + 1, a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
    return torch.where(t <= 1, near, torch.where(t < 2, far, torch.zeros_like(t)))


def antialiased_bicubic(map_HWC: Tensor, size: tuple[int, int]) -> Tensor:
    """The slow, obvious version: one weight per pair of input and output cell, the kernel widened when shrinking."""
    for axis in (0, 1):
        old, new = map_HWC.shape[axis], size[axis]
        scale = old / new
        centre, cell = (torch.arange(new) + 0.5) * scale, torch.arange(old) + 0.5
        weights = cubic((cell[None] - centre[:, None]) / max(scale, 1))
        map_HWC = torch.tensordot(weights / weights.sum(1, keepdim=True), map_HWC, dims=([1], [axis])).movedim(0, axis)
    return map_HWC


@pytest.mark.parametrize("grid", [(4, 4), (3, 3), (6, 5), (2, 7)])
def test_dinov2_resizes_positions_as_its_authors_register_models_do(grid: tuple[int, int]) -> None:
    teacher = random_teacher(tiny("dinov2_g_reg"))
    trunk, pixels = teacher.net.trunk, torch.randn(1, 3, grid[0] * 14, grid[1] * 14)
    positions = antialiased_bicubic(trunk.pos_embed.data.view(4, 4, WIDTH), grid)
    patches = F.conv2d(pixels, trunk.patch_embed.proj.weight, trunk.patch_embed.proj.bias, stride=14)
    patches = patches[0].flatten(1).T + positions.reshape(-1, WIDTH)
    tokens = torch.cat([trunk.cls_token[0], trunk.reg_token[0], patches])[None]
    tokens = trunk.norm(trunk.blocks(tokens)).detach()
    out = teacher.forward(pixels)
    torch.testing.assert_close(out.summary_BC, tokens[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.features_BCHW[0].flatten(1).T, tokens[0, 5:], rtol=1e-4, atol=1e-4)


def test_dinov2_takes_the_authors_own_file(tmp_path: Path) -> None:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56, "patch_size": 14}
    theirs = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes)).eval()
    shake(theirs)
    torch.save(authors_names(theirs.state_dict()), tmp_path / "dinov2_vitl14_reg4_pretrain.pth")
    teacher = load_teacher(tiny("dinov2_l_reg", source=str(tmp_path / "dinov2_vitl14_reg4_pretrain.pth")))
    for size in ((56, 56), (42, 70)):
        pixels = torch.randn(1, 3, *size)
        out, expected = teacher.forward(pixels), theirs(pixels)
        torch.testing.assert_close(out.summary_BC, expected.pooler_output.detach(), rtol=1e-4, atol=1e-4)
        tokens = expected.last_hidden_state[:, 5:].detach()
        torch.testing.assert_close(out.features_BCHW.flatten(2).transpose(1, 2), tokens, rtol=1e-4, atol=1e-4)


def authors_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names of a DINOv2 with registers -> those of the authors' files."""
    pairs = [
        ("embeddings.cls_token", "cls_token"), ("embeddings.mask_token", "mask_token"),
        ("embeddings.register_tokens", "register_tokens"), ("embeddings.position_embeddings", "pos_embed"),
        ("embeddings.patch_embeddings.projection", "patch_embed.proj"), ("encoder.layer.", "blocks."),
        ("attention.o_proj", "attn.proj"), ("layer_scale1.lambda1", "ls1.gamma"), ("layer_scale2.lambda1", "ls2.gamma"),
        ("layernorm", "norm"),
    ]  # fmt: skip
    renamed: dict[str, Tensor] = {}
    for name, x in state.items():
        for theirs, ours in pairs:
            name = name.replace(theirs, ours)
        renamed[name] = x
    for block in range(2):
        for kind in ("weight", "bias"):
            qkv = [renamed.pop(f"blocks.{block}.attention.{part}_proj.{kind}") for part in "qkv"]
            renamed[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(qkv)
    return renamed


def test_sam_features_are_timms_before_the_neck() -> None:
    card = tiny("sam_h")
    trunk = build_trunk(card, card.params["model"], "random", card.params["overrides"])
    shake(trunk)
    pixels = torch.randn(2, 3, 64, 64)
    expected = trunk.eval().forward_intermediates(pixels, indices=1, intermediates_only=True)[-1].detach()
    assert expected.shape == (2, WIDTH, 4, 4)
    from radio_distill.teachers.sam import SamNet

    out = Teacher(card, SamNet(card, trunk)).forward(pixels)
    assert out.summary_BC is None
    torch.testing.assert_close(out.features_BCHW, expected, rtol=1e-4, atol=1e-5)


def test_sam_weights_are_read_in_timms_and_in_the_authors_names(tmp_path: Path) -> None:
    card = tiny("sam_h")
    trunk = build_trunk(card, card.params["model"], "random", card.params["overrides"] | {"num_classes": 0})
    shake(trunk)
    state = trunk.state_dict()
    save_file(state, tmp_path / "model.safetensors")
    torch.save({f"image_encoder.{k.replace('mlp.fc', 'mlp.lin')}": v for k, v in state.items()}, tmp_path / "sam.pth")
    folder, file = (load_teacher(tiny("sam_h", source=str(tmp_path / name))) for name in (".", "sam.pth"))
    pixels = torch.randn(1, 3, 64, 64)
    expected = trunk.eval().forward_intermediates(pixels, indices=1, intermediates_only=True)[-1].detach()
    for teacher in (folder, file):
        torch.testing.assert_close(teacher.forward(pixels).features_BCHW, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grid", [(4, 4), (5, 5)])
def test_attention_with_relative_positions_equals_a_dense_bias(grid: tuple[int, int]) -> None:
    from timm.models.vision_transformer_sam import Attention

    theirs = Attention(24, num_heads=2, use_rel_pos=True, input_size=grid)
    shake(theirs)
    x = torch.randn(3, *grid, 24)
    torch.testing.assert_close(RelPosAttention(theirs)(x), theirs(x), rtol=1e-5, atol=1e-6)


def test_open_clips_towers_attend_by_the_fused_kernel_with_the_same_result() -> None:
    theirs = torch.nn.MultiheadAttention(32, 4, batch_first=True).eval()
    shake(theirs)
    x = torch.randn(2, 9, 32)
    torch.testing.assert_close(
        PackedAttention(theirs)(x, x, x, need_weights=False)[0], theirs(x, x, x)[0], rtol=1e-5, atol=1e-6
    )
    blocks = random_teacher(tiny("dfn_clip")).net.visual.transformer.resblocks
    assert all(isinstance(block.attn, PackedAttention) for block in blocks)


def test_attention_with_relative_positions_takes_the_fused_kernel_without_a_mask() -> None:
    from timm.models.vision_transformer_sam import Attention

    attention = RelPosAttention(Attention(32, num_heads=2, use_rel_pos=True, input_size=(8, 8)))
    seen = []
    original = F.scaled_dot_product_attention

    def spy(*args: Tensor, **kwargs: object) -> Tensor:
        seen.append((args, kwargs))
        return original(*args, **kwargs)

    F.scaled_dot_product_attention = spy
    try:
        attention(torch.randn(1, 8, 8, 32))
    finally:
        F.scaled_dot_product_attention = original
    (q, k, v), kwargs = seen[0]
    assert "attn_mask" not in kwargs
    assert q.shape == k.shape == (1, 2, 64, 32)  # 16 + 8 + 8
    assert q.ndim == 4
    assert q.shape[-1] % 8 == 0
    assert v.shape == q.shape, "flash attention wants values as wide as keys"
    assert torch._fused_sdp_choice(q, k, v) == SDPBackend.FLASH_ATTENTION.value


def test_sam3_features_are_those_before_its_neck() -> None:
    from transformers import Sam3VisionConfig, Sam3VisionModel

    teacher = random_teacher(tiny("sam3"))
    config = Sam3VisionConfig(backbone_config={"model_type": "sam3_vit_model", **CONFIG, **SAM3, "patch_size": 14})
    theirs = Sam3VisionModel(config).eval()
    theirs.backbone.load_state_dict(teacher.net.model.state_dict())
    seen = []
    theirs.neck.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    pixels = torch.randn(1, 3, 56, 56)
    theirs(pixels)
    torch.testing.assert_close(teacher.forward(pixels).features_BCHW, seen[0].detach())


def test_paligemma_summary_is_the_mean_of_the_normalised_tokens() -> None:
    teacher = random_teacher(tiny("paligemma"))
    pixels = torch.randn(2, 3, 56, 56)
    tokens = teacher.net.model(pixels).last_hidden_state.detach()
    out = teacher.forward(pixels)
    torch.testing.assert_close(out.summary_BC, tokens.mean(1))
    torch.testing.assert_close(out.features_BCHW, tokens.transpose(1, 2).unflatten(2, (4, 4)))
