"""SigLIP 2 NaFlex and DINOv3 at any grid, as transformers gives them; summaries through a teacher's own pooling head."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from radio_distill.config.cards import Pool
from radio_distill.config.load import cards_of, load_card, load_recipe
from radio_distill.errors import CardError, CheckpointError, RecipeError
from radio_distill.export.checks import check
from radio_distill.network.arch import PoolArch
from radio_distill.network.pool import MapPool
from radio_distill.plan.cost import count_flops, pool_flops
from radio_distill.student.names import student_of
from radio_distill.teachers.base import load_teacher
from radio_distill.teachers.pooling import pooling_head
from tests.unit.test_teachers_families import CONFIG, WIDTH, random_teacher, shake, tiny

GRIDS = [(4, 4), (2, 7), (6, 3), (1, 1)]


def tokens_of(features_BCHW: Tensor) -> Tensor:
    return features_BCHW.flatten(2).mT


def test_naflex_gives_what_transformers_gives_of_padded_batches_of_many_grids() -> None:
    from transformers import Siglip2ImageProcessor

    teacher = random_teacher(tiny("siglip2_naflex"))
    images = [torch.randint(0, 256, (3, 16 * rows, 16 * columns), dtype=torch.uint8) for rows, columns in GRIDS]
    inputs = Siglip2ImageProcessor(patch_size=16, max_num_patches=32, do_resize=False)(images, return_tensors="pt")
    model = teacher.net.model
    with torch.no_grad():  # as transformers resizes positions: one image of the batch after the other
        ours, model.embeddings.resize_positional_embeddings = (
            model.embeddings.resize_positional_embeddings,
            type(model.embeddings).resize_positional_embeddings,
        )
        theirs = model(**inputs)
    model.embeddings.resize_positional_embeddings = ours
    for i, (image, (rows, columns)) in enumerate(zip(images, GRIDS)):
        out = teacher.encode(image[None])
        torch.testing.assert_close(
            tokens_of(out.features_BCHW)[0], theirs.last_hidden_state[i, : rows * columns], rtol=1e-4, atol=2e-5
        )
        torch.testing.assert_close(out.summary_BC[0], theirs.pooler_output[i], rtol=1e-4, atol=2e-5)


def test_naflex_takes_the_weights_of_the_whole_model(tmp_path: Path) -> None:
    from transformers import Siglip2Config, Siglip2Model

    text = CONFIG | {"intermediate_size": 64, "vocab_size": 16, "max_position_embeddings": 8}
    vision = CONFIG | {"intermediate_size": 96, "num_patches": 16}
    whole = Siglip2Model(Siglip2Config(text_config=text, vision_config=vision)).eval()
    shake(whole)
    whole.save_pretrained(tmp_path)
    teacher = load_teacher(tiny("siglip2_naflex", source=str(tmp_path)))
    own, theirs = teacher.net.model.state_dict(), whole.vision_model.state_dict()
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[name], theirs[name]) for name in own)


@pytest.mark.parametrize(("ours", "theirs"), [("dinov3_l", "dinov3_l_hf"), ("dinov3_hplus", "dinov3_hplus_hf")])
def test_dinov3_is_one_teacher_in_timms_and_in_transformers_layout(ours: str, theirs: str, tmp_path: Path) -> None:
    hf = random_teacher(tiny(theirs))
    for name, p in hf.net.model.named_parameters():
        if name.endswith(("q_proj.bias", "v_proj.bias")):  # zero in the released weights, so timm has none
            p.data.zero_()
    save_file(authors_names(hf.net.model.state_dict()), tmp_path / "dinov3.safetensors")
    card = tiny(ours, source=str(tmp_path / "dinov3.safetensors"))
    card.params["overrides"] = card.params["overrides"] | {"mlp_ratio": 2.0}
    timm = load_teacher(card)
    for rows, columns in GRIDS:
        pixels = torch.randn(2, 3, 16 * rows, 16 * columns)
        out, expected = timm.forward(pixels), hf.forward(pixels)
        torch.testing.assert_close(out.features_BCHW, expected.features_BCHW, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out.summary_BC, expected.summary_BC, rtol=1e-4, atol=1e-4)


def authors_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names of a DINOv3 -> those of the authors' files, whose projections lie in one matrix."""
    pairs = [
        ("embeddings.patch_embeddings.", "patch_embed.proj."), ("embeddings.register_tokens", "storage_tokens"), ("embeddings.", ""),
        ("model.layer.", "blocks."), ("layer.", "blocks."), ("attention.o_proj", "attn.proj"), ("layer_scale1.lambda1", "ls1.gamma"),
        ("layer_scale2.lambda1", "ls2.gamma"), ("mlp.gate_proj", "mlp.w1"), ("mlp.up_proj", "mlp.w2"), ("mlp.down_proj", "mlp.w3"),
    ]  # fmt: skip
    if not any("gate_proj" in name for name in state):
        pairs[-2:] = [("mlp.up_proj", "mlp.fc1"), ("mlp.down_proj", "mlp.fc2")]
    renamed: dict[str, Tensor] = {}
    for name, x in state.items():
        for theirs, ours in pairs:
            name = name.replace(theirs, ours)
        renamed[name] = x.contiguous()
    for block in range(2):
        qkv = [renamed.pop(f"blocks.{block}.attention.{part}_proj.weight") for part in "qkv"]
        renamed[f"blocks.{block}.attn.qkv.weight"] = torch.cat(qkv)
        for part in "qv":
            assert not renamed.pop(f"blocks.{block}.attention.{part}_proj.bias").any()
    return renamed


# --- through the teacher's own head ---


@pytest.mark.parametrize("name", ["siglip2_naflex", "siglip", "siglip2_g", "toy_siglip"])
def test_a_pooling_head_gives_the_teachers_summary_of_its_own_tokens(name: str) -> None:
    card = load_card(name) if name.startswith("toy") else tiny(name)
    weights = "pretrained" if name.startswith("toy") else "random"
    torch.manual_seed(0)  # two networks with the same random weights
    teacher = load_teacher(card, weights=weights)
    torch.manual_seed(0)
    pool = pooling_head(card, weights)
    size = card.input.size
    out = teacher.encode(torch.rand(3, 3, size, size + (64 if card.input.resizable else 0)))
    assert out.summary_BC.std() > 1e-3
    assert (pool(tokens_of(out.features_BCHW)) - out.summary_BC).abs().max() < 1e-6 * out.summary_BC.abs().max().clamp(min=1)


def test_gradients_pass_through_a_pooling_head_and_never_reach_its_weights() -> None:
    pool = pooling_head(load_card("toy_siglip"))
    tokens = torch.randn(2, 5, 96, requires_grad=True)
    pool(tokens).square().sum().backward()
    assert tokens.grad.abs().sum() > 0
    assert not list(pool.parameters())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "toy_clip",
            {"pool": Pool(heads=4, mlp=192)},
            "'toy_clip' does not make its summary by an attention-pooling head alone",
        ),
        (
            "toy_siglip",
            {"pool": Pool(heads=8, mlp=192)},
            "'toy_siglip': its teacher has a pooling head .*'heads': 4, 'mlp': 192",
        ),
    ],
)
def test_a_card_that_says_otherwise_is_refused(name: str, change: dict[str, Pool], message: str) -> None:
    card = load_card(name)
    with pytest.raises(CardError, match=message):
        pooling_head(card.model_copy(update={"output": card.output.model_copy(update=change)}))


def test_a_teacher_whose_card_names_no_pooling_head_is_refused_with_what_to_do() -> None:
    with pytest.raises(RecipeError, match=r"'toy_dino': its card names no pooling head.*state `output.pool` in the card"):
        load_recipe("toy/stage1", ["teachers.toy_dino.summary=through_head"])


def test_the_student_of_a_recipe_holds_the_head_as_its_card_states_it() -> None:
    recipe = load_recipe("toy/stage1", ["teachers.toy_siglip.summary=through_head"])
    arch = student_of(recipe)
    adaptors = {a.name: a for a in arch.adaptors}
    assert adaptors["toy_siglip"].summary is None
    assert adaptors["toy_siglip"].summary_dim == 96
    assert [adaptors[name].token for name in ("toy_clip", "toy_dino")] == list(arch.summary_idxs), (
        "no loss reaches the other token"
    )
    assert type(arch).from_dict(arch.to_dict()) == arch
    assert "pool" not in str(student_of(load_recipe("toy/stage1")).to_dict()), "other students keep their identity"
    pool = pooling_head(cards_of(recipe)["toy_siglip"])
    assert pool.arch == adaptors["toy_siglip"].pool
    assert MapPool(pool.arch).state_dict().keys() == pool.state_dict().keys()
    assert pool.arch.dim > WIDTH


def test_the_format_of_the_reference_cannot_hold_a_pooling_head_and_hf_can() -> None:
    arch = student_of(load_recipe("toy/fast_stage1", ["teachers.toy_siglip.summary=through_head"]))
    check(arch, "hf")
    with pytest.raises(CheckpointError, match=r"own head \(toy_siglip; adaptors=NAMES keeps others alone\)"):
        check(arch, "radio")


def test_plan_counts_the_products_of_a_pooling_head() -> None:
    with torch.device("meta"):
        pool, tokens = MapPool(PoolArch(64, 4, 160)), torch.empty(1, 50, 64)
    assert pool_flops(pool.arch, 50) == pytest.approx(count_flops(lambda: pool(tokens)), rel=0.02)
