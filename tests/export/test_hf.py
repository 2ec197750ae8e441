"""Format hf in its real readers: transformers' native class, AutoModel with our modelling file, our loader."""

import json
import logging
from pathlib import Path

import pytest
import torch
from made_run import SIZES, close, flat, make_run, pictures
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, CLIPImageProcessor

import radio_distill
from radio_distill.export.command import export
from radio_distill.network.intermediates import forward_intermediates
from radio_distill.network.student import Student

ADAPTORS = ["toy_clip", "toy_siglip", "toy_dino", "toy_sam"]


@pytest.fixture(scope="module")
def folder(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(run, tmp_path_factory.mktemp("exports") / "hf")


@pytest.fixture(scope="module")
def remote(folder: Path) -> AutoModel:
    return AutoModel.from_pretrained(folder, trust_remote_code=True, adaptor_names=ADAPTORS).eval()


@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.no_grad()
def test_the_native_class_gives_the_backbone(folder: Path, student: Student, size: tuple[int, int]) -> None:
    model, images = AutoModel.from_pretrained(folder).eval(), pictures(size)
    assert type(model).__module__ == "transformers.models.radio.modeling_radio"
    got, want = model(images), student.encode(images)
    close(got.summary, want.summary_BC)
    close(got.features, flat(want.features_BCHW))


def test_the_native_class_reads_all_but_the_adaptors(folder: Path) -> None:
    _, told = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not [key for key in told["missing_keys"] if "layer_scale" not in key]
    assert all(".adaptors." in key for key in told["unexpected_keys"])


@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.no_grad()
def test_the_modelling_file_gives_backbone_and_adaptors(remote: AutoModel, student: Student, size: tuple[int, int]) -> None:
    images = pictures(size)
    got, again, want = remote(images), remote(images, feature_fmt="NCHW"), student.encode_adaptors(images)
    assert got.keys() == want.keys()
    for name, output in want.items():
        close(got[name].features, flat(output.features_BCHW))
        close(again[name].features, output.features_BCHW)
        if output.summary_BC is None:
            assert got[name].summary is None
        else:
            close(got[name].summary, output.summary_BC)


@pytest.mark.parametrize("window", [2, 4])
@torch.no_grad()
def test_windowed_attention(remote: AutoModel, student: Student, window: int) -> None:
    images = pictures((32, 48))
    got, want = remote(images, feature_fmt="NCHW", window=window), student.encode_adaptors(images, window=window)
    for name, output in want.items():
        close(got[name].features, output.features_BCHW)
    assert not torch.allclose(remote(images)["backbone"].features, got["backbone"].features.flatten(2).transpose(1, 2))


@pytest.mark.parametrize(
    "options",
    [{}, {"aggregation": "dense"}, {"stop_early": True}, {"norm": True}, {"window": 2}, {"window": 4, "aggregation": "dense"}],
    ids=str,
)
@torch.no_grad()
def test_outputs_of_inner_blocks(remote: AutoModel, student: Student, options: dict) -> None:
    images = pictures((32, 48))
    got = remote.forward_intermediates(images, [0, -2], **options)
    want = forward_intermediates(student, images, [0, -2], **options)
    for mine, theirs in zip([got.final, *got.layers], [want.final, *want.layers], strict=True):
        close(mine.summary, theirs.summary_BC)
        close(mine.features, theirs.features_BCHW)


@torch.no_grad()
def test_without_adaptors_the_modelling_file_gives_a_pair(folder: Path, student: Student) -> None:
    """What LLaVA-style towers, VILA and Nemotron code unpack, and the attributes that they ask for."""
    from timm.models.vision_transformer import VisionTransformer

    tower, images = AutoModel.from_pretrained(folder, trust_remote_code=True).eval(), pictures((32, 32))
    summary, features = tower(images)
    want = student.encode(images)
    close(summary, want.summary_BC)
    close(tower(x=images).features, features)
    close(tower(pixel_values=images).features, features, 0)
    with pytest.raises(ValueError, match="as `x` or as `pixel_values`, one of them"):
        tower()
    assert isinstance(tower.model, VisionTransformer)
    assert (tower.model.patch_generator.patch_size, tower.model.patch_generator.num_cls_tokens) == (4, 4)
    assert tower.model.patch_generator.num_skip == student.num_cls_tokens + student.num_registers
    assert len(list(tower.model.blocks)) == 4
    assert tower.model.embed_dim == 32
    assert tower.radio_model.summary_idxs.tolist() == student.summary_idxs.tolist()
    tower.config.image_size = 64
    conditioner = tower.radio_model.make_preprocessor_external()
    close(tower(conditioner(images)).summary, summary, 0)


@torch.no_grad()
def test_bfloat16(folder: Path, student: Student) -> None:
    images = pictures((32, 32))
    want = student.encode_adaptors(images)
    native = AutoModel.from_pretrained(folder, dtype=torch.bfloat16).eval()
    remote = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16, adaptor_names=ADAPTORS).eval()
    assert remote.input_conditioner.norm_mean.dtype == torch.float32
    assert remote.adaptors["toy_clip"].feat_mlp.fc1.weight.dtype == torch.float32
    for got in (native(images.bfloat16()), remote(images)["backbone"]):
        assert got.features.dtype == torch.bfloat16
        assert relative(got.features, flat(want["backbone"].features_BCHW)) < 2e-2
        assert relative(got.summary, want["backbone"].summary_BC) < 2e-2


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want).norm() / want.norm())


def test_weights_in_half_precision_are_half_as_large(run: Path, folder: Path, student: Student, tmp_path: Path) -> None:
    half = export(run, tmp_path / "half", dtype="bfloat16")
    assert (half / "model.safetensors").stat().st_size < 0.6 * (folder / "model.safetensors").stat().st_size
    assert AutoModel.from_pretrained(half).dtype == torch.bfloat16
    loaded = radio_distill.load_student(half)
    close(loaded.input_conditioner.norm_mean, student.input_conditioner.norm_mean, 0)


@torch.no_grad()
def test_our_loader_gives_the_student_back(folder: Path, student: Student) -> None:
    loaded, images = radio_distill.load_student(folder), pictures((16, 32))
    assert loaded.arch.num_global == student.arch.num_global
    for name, output in student.encode_adaptors(images).items():
        close(loaded.encode_adaptors(images)[name].features_BCHW, output.features_BCHW)


@torch.no_grad()
def test_the_reference_class_config_reads_as_the_same_student(folder: Path, student: Student, tmp_path: Path) -> None:
    """`args` and the fields beside it alone, as the reference's class and servers of VLMs read them."""
    from radio_distill.student.reference import student_from_hf_state

    config = json.loads((folder / "config.json").read_text())
    del config["student"]
    loaded, images = student_from_hf_state(config, load_file(folder / "model.safetensors")).eval(), pictures((16, 32))
    for name, output in student.encode_adaptors(images).items():
        close(loaded.encode_adaptors(images)[name].features_BCHW, output.features_BCHW)
    args = config["args"]
    assert args["register_multiple"] == 8
    assert args["cpe_num_registers"] == 4
    assert [t["token_slot"] for t in args["teachers"]] == [0, 1, 2, 3]
    assert [t["use_summary"] for t in args["teachers"]] == [True, True, True, False]


def test_pixels_are_normalised_once(folder: Path) -> None:
    from PIL import Image

    processor = CLIPImageProcessor.from_pretrained(folder)
    picture = Image.new("RGB", (200, 100), (255, 128, 0))
    pixels = processor(picture, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 48, 48)
    torch.testing.assert_close(pixels[0, :, 0, 0], torch.tensor([1, 128 / 255, 0]))


def test_saved_again_by_transformers_it_is_the_same(remote: AutoModel, student: Student, tmp_path: Path) -> None:
    remote.save_pretrained(tmp_path / "again")
    again, images = AutoModel.from_pretrained(tmp_path / "again", trust_remote_code=True).eval(), pictures((16, 16))
    with torch.no_grad():
        close(again(images)["toy_dino"].features, flat(student.encode_adaptors(images)["toy_dino"].features_BCHW))


@pytest.mark.parametrize(
    "option",
    ["student.final_norm=true", "student.overrides={patch_size: 4, embed_dim: 32, depth: 4, num_heads: 2, swiglu: true}"],
)
def test_what_the_native_class_would_ignore_is_not_offered_to_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, option: str
) -> None:
    run = make_run(tmp_path / "run", option)
    with caplog.at_level(logging.WARNING):
        folder = export(run, tmp_path / "hf")
    assert "transformers' native radio class would ignore it" in caplog.text
    with pytest.raises((ValueError, KeyError)):
        AutoModel.from_pretrained(folder)
    model, images = AutoModel.from_pretrained(folder, trust_remote_code=True).eval(), pictures((16, 32))
    with torch.no_grad():
        want = radio_distill.load_student(run).encode(images)
        close(model(images).features, flat(want.features_BCHW))
        close(model(images).summary, want.summary_BC)


def test_attention_heads(tmp_path: Path) -> None:
    size = "student.overrides={patch_size: 4, embed_dim: 32, depth: 4, num_heads: 2}"
    run = make_run(tmp_path / "run", size, "student.heads={kind: attention, hidden: 16}")
    folder = export(run, tmp_path / "hf")
    model, images = (
        AutoModel.from_pretrained(folder, trust_remote_code=True, adaptor_names="toy_dino").eval(),
        pictures((16, 32)),
    )
    with torch.no_grad():
        want = radio_distill.load_student(run).encode_adaptors(images)["toy_dino"]
        close(model(images)["toy_dino"].features, flat(want.features_BCHW))


def test_errors_of_the_modelling_file(folder: Path, remote: AutoModel) -> None:
    with pytest.raises(ValueError, match="no adaptor 'clip' in this model; adaptor_names takes toy_clip, toy_siglip"):
        AutoModel.from_pretrained(folder, trust_remote_code=True, adaptor_names=["clip"])
    with pytest.raises(ValueError, match="image size 30x32 is not a multiple of patch size 4; nearest is 32x32"):
        remote(torch.rand(1, 3, 30, 32))
    with pytest.raises(ValueError, match=r"block indices .* do not exist; the student has 4 blocks"):
        remote.forward_intermediates(torch.rand(1, 3, 32, 32), [9])
    with pytest.raises(ValueError, match="feature_fmt is 'BCHW', expected 'NLC' or 'NCHW'"):
        remote(torch.rand(1, 3, 32, 32), feature_fmt="BCHW")
    assert remote.get_nearest_supported_resolution(30, 34) == (32, 32)


def test_config_says_what_servers_read(folder: Path, student: Student) -> None:
    config = AutoConfig.from_pretrained(folder)
    assert (config.model_type, config.hidden_size, config.num_registers) == ("radio", 32, 4)
    assert config.preferred_resolution == [48, 48]
    forbidden = {
        "model_name",
        "image_size",
        "patch_size",
        "norm_mean",
        "norm_std",
        "video_temporal_patch_size",
        "separate_video_embedder",
    }
    assert not forbidden & set(config.args)  # vLLM passes `args` on beside arguments of these names
