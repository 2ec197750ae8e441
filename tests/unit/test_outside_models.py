"""Models of timm, open_clip and transformers: the map and the summary are the library's own, or the model is refused with the reason."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers

from radio_distill.config.cards import TeacherCard
from radio_distill.errors import CardError, CheckpointError, TeacherError
from radio_distill.eval.blocks import with_blocks
from radio_distill.eval.models import open_model
from radio_distill.eval.outside_models import hf_teacher
from radio_distill.teachers.base import load_teacher

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 48,
    "patch_size": 16,
}
SWIN = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 32, "patch_size": 4}


def saved(folder, kind, **values):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**values)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
    return model


# What is known of each: how many tokens stand before the patches, and what its summary is.
SEQUENCES = {
    "ViT": (1, "pool", {}),
    "Dinov2": (1, "pool", {}),
    "Dinov2WithRegisters": (5, "pool", {"num_register_tokens": 4}),
    "DINOv3ViT": (5, "pool", {"num_register_tokens": 4}),
    "SiglipVision": (0, "pool", {}),
    "CLIPVision": (1, "pool", {}),
    "Yolos": (1, "pool", {"num_detection_tokens": 7, "image_size": [48, 80]}),
    "Beit": (1, "pool", {"use_relative_position_bias": True, "use_absolute_position_embeddings": False}),
    "DeiT": (2, "pool", {}),
    "ViTMSN": (1, "cls", {}),
    "IJepa": (0, "mean", {}),
    "DPT": (1, "pool", {"backbone_out_indices": [0, 1]}),
    "Data2VecVision": (1, "cls", {"use_mean_pooling": True}),
    "Aimv2Vision": (0, "pool", {}),
}


@pytest.mark.parametrize("kind", SEQUENCES)
def test_of_every_kind_of_transformers_the_map_is_that_of_the_patches(tmp_path, kind):
    prefix, summary, values = SEQUENCES[kind]
    model = saved(tmp_path, kind, **{**SMALL, **values})
    teacher = hf_teacher(tmp_path)
    size = teacher.nearest_size(48, 80)
    x = torch.rand(2, 3, *size)
    options = (
        {"interpolate_pos_encoding": True}
        if kind in ("ViT", "Dinov2", "SiglipVision", "CLIPVision", "Beit", "DeiT", "ViTMSN", "IJepa", "Data2VecVision")
        else {}
    )
    with torch.no_grad():
        theirs, ours = model(pixel_values=x, **options), teacher.encode(x)
    cells = size[0] * size[1] // 256
    patches = theirs.last_hidden_state[:, prefix : prefix + cells]
    torch.testing.assert_close(ours.features_BCHW.flatten(2).transpose(1, 2), patches, rtol=1e-4, atol=1e-5)
    pooled = {"pool": getattr(theirs, "pooler_output", None), "cls": theirs.last_hidden_state[:, 0], "mean": patches.mean(1)}[
        summary
    ]
    torch.testing.assert_close(ours.summary_BC, pooled, rtol=1e-4, atol=1e-5)
    assert teacher.card.params["prefix_tokens"] == prefix


@pytest.mark.parametrize("kind", ["Yolos", "Dinov2WithRegisters", "SiglipVision"])
def test_the_blocks_that_a_dpt_head_reads_are_those_of_the_patches(tmp_path, kind):
    saved(tmp_path, kind, **{**SMALL, "num_hidden_layers": 4, **SEQUENCES[kind][2]})
    opened = open_model(f"hf:{tmp_path}")
    x = torch.rand(2, 3, *opened.model.nearest_size(48, 80))
    own, maps = opened.model.encode(x).features_BCHW, with_blocks(opened).model.encode(x).features_BCHW
    torch.testing.assert_close(maps[:, -own.shape[1] :], own, rtol=1e-4, atol=1e-5)


MERGED = r"gives \d+ tokens for .* patches of \d pixels \(it merges them, as Swin does"
REFUSED = {
    "ViTMAE": (SMALL | {"mask_ratio": 0.0}, "other tokens when it sees the same image again.*as ViTMAE does even with mask_ratio=0"),
    "Swin": (SWIN, MERGED),
    "Hiera": ({"embed_dim": 16, "image_size": [64, 64], "depths": [1, 1], "num_heads": [1, 2], "num_query_pool": 1,
               "masked_unit_size": [4, 4]}, MERGED),
    "Pvt": ({"image_size": 64, "depths": [1, 1, 1, 1], "hidden_sizes": [8, 10, 15, 16], "num_attention_heads": [1, 2, 5, 8]},
            "PvtConfig has patch_size None and image_size 64; expected a vision transformer with square patches"),
    "ConvNext": ({"image_size": 32, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]},
                 r"gives last_hidden_state \(2, 8, 1, 1\) for 2 images; expected a sequence of tokens for each"),
    "MobileViT": ({"image_size": 64, "hidden_sizes": [16, 16, 16]}, r"gives last_hidden_state \(2, 640, 2, 2\) for 2 images"),
    "Siglip2Vision": ({key: SMALL[key] for key in SMALL if key != "image_size"},
                      "needs pixel_values, pixel_attention_mask, spatial_shapes; expected a model that needs pixel_values alone"),
    "PixtralVision": (SMALL, r"gives last_hidden_state \(1, 18, 32\) for 2 images; expected a sequence of tokens for each"),
    "SamVision": (SMALL | {"global_attn_indexes": [1], "output_channels": 16}, r"gives last_hidden_state \(2, 16, 3, 3\)"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_gives_no_token_for_every_patch_is_refused_with_the_reason(tmp_path, kind):
    values, reason = REFUSED[kind]
    saved(tmp_path, kind, **values)
    with pytest.raises(CheckpointError, match=reason):
        hf_teacher(tmp_path)


def test_vitmae_that_hides_patches_is_refused_as_one_that_answers_at_random(tmp_path):
    saved(tmp_path, "ViTMAE", **SMALL | {"mask_ratio": 0.75})
    with pytest.raises(CheckpointError, match="other tokens when it sees the same image again"):
        hf_teacher(tmp_path)


def tool():
    """`tools/check_outside_models.py`, which runs over all names; here over those that are cheap, and each odd in its way."""
    if "check_outside_models" not in sys.modules:
        path = Path(__file__).parents[2] / "tools" / "check_outside_models.py"
        spec = importlib.util.spec_from_file_location(path.stem, path)
        sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[path.stem])
    return sys.modules["check_outside_models"]


AGREE = [
    ("timm", "vit_tiny_r_s16_p8_224"),  # a hybrid: patches of 8 cells of a stem's map, 32 pixels
    ("timm", "vitamin_small_224"),
    ("timm", "xcit_nano_12_p8_224"),  # class attention behind the blocks changes the patches
    ("timm", "deit_tiny_distilled_patch16_224"),
    ("timm", "cait_xxs24_224"),
    ("timm", "eva02_tiny_patch14_224"),
    ("timm", "vit_relpos_small_patch16_224"),
    ("open_clip", "PE-Core-T-16-384"),  # timm's own head is the projection
    ("open_clip", "MobileCLIP-B"),
    ("open_clip", "ViTamin-S"),  # a projection behind timm's pooling
    ("open_clip", "coca_ViT-B-32"),  # its pooling answers with queries
    ("open_clip", "ViT-L-14-CLIPA"),  # the final norm behind the pooling
    ("open_clip", "ViT-S-32-alt"),
]
REASONS = [
    ("timm", "hiera_tiny_224", "is a Hiera, expected a vision transformer with a token for every patch"),
    ("timm", "qwen3_vit_88m_enc", "is a Qwen3VitEncoder without a summary"),
    ("open_clip", "RN50", "open_clip's RN50 is a ResNet; expected a tower with a token for every patch"),
    ("open_clip", "MobileCLIP2-S0", "timm's fastvit_mci0 is a FastVit, expected a vision transformer"),
]


@pytest.mark.parametrize(("library", "name"), AGREE)
def test_of_a_listed_name_map_and_summary_are_the_librarys_own(library, name):
    row = tool().check(library, name, 1e8)
    assert row.result == "agrees", row


@pytest.mark.parametrize(("name", "size"), [("vit_so400m_patch14_siglip_384", 27 * 14), ("vit_base_patch16_sapiens2", 768)])
def test_of_a_listed_size_the_largest_square_of_whole_patches_is_taken(name, size):
    from radio_distill.eval.outside_models import timm_card

    assert timm_card(name, "random").input.size == size


@pytest.mark.parametrize(("library", "name", "reason"), REASONS)
def test_a_listed_name_without_tokens_is_refused_with_the_reason(library, name, reason):
    row = tool().check(library, name, 1e8)
    assert row.result == "refused", row
    assert reason in row.note


def test_a_card_that_states_another_patch_than_the_network_has_is_refused():
    card = TeacherCard.model_validate(
        {
            "name": "vt", "family": "open_clip", "source": "x/y", "licence": "none",
            "input": {"size": 224, "patch": 32, "mean": [0.5] * 3, "std": [0.5] * 3}, "output": {"summary": 384, "features": 384},
            "params": {"model": "ViTamin-S", "overrides": {"depth": 1}},
        }
    )  # fmt: skip
    teacher = load_teacher(card, weights="random")
    with pytest.raises(
        TeacherError, match=r"gave 196 patch tokens for 7x7 patches of 32 pixels; correct `input.patch` of its card"
    ):
        teacher.encode(torch.rand(1, 3, 224, 224))


def test_a_pooling_of_open_clip_that_is_not_built_here_is_refused(monkeypatch):
    import open_clip

    config = {"embed_dim": 8, "vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "abs_attn", "timm_proj": ""}}
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: config)
    card = TeacherCard.model_validate(
        {
            "name": "p", "family": "open_clip", "source": "x/y", "licence": "none", "params": {"model": "any"},
            "input": {"size": 160, "patch": 16, "mean": [0.5] * 3, "std": [0.5] * 3}, "output": {"summary": 8, "features": 64},
        }
    )  # fmt: skip
    with pytest.raises(CardError, match="pools with 'abs_attn'"):
        load_teacher(card, weights="random")
