"""The modelling file takes the calls that transformers' own models take."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_run import SIZES, close, flat, pictures
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, CLIPImageProcessor, pipeline

from radio_distill.export.command import export
from radio_distill.network.intermediates import forward_intermediates
from radio_distill.network.packing import unpack_images
from radio_distill.network.student import Student

IMAGES = pictures((16, 32))


@pytest.fixture(scope="module")
def folder(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(run, tmp_path_factory.mktemp("exports") / "hf")


@pytest.fixture(scope="module")
def native(folder: Path) -> Any:
    return AutoModel.from_pretrained(folder).eval()


@pytest.fixture
def remote(folder: Path) -> Any:
    return AutoModel.from_pretrained(folder, trust_remote_code=True).eval()


@torch.no_grad()
def test_hidden_states_are_those_of_the_native_class(folder: Path, native: Any, remote: Any) -> None:
    got, want = remote(pixel_values=IMAGES, output_hidden_states=True), native(IMAGES, output_hidden_states=True)
    assert len(got.hidden_states) == len(want.hidden_states) == 5
    for mine, theirs in zip(got.hidden_states, want.hidden_states):
        close(mine, theirs, 1e-5)
    close(got.last_hidden_state, want.last_hidden_state, 1e-5)
    close(got.features, remote(IMAGES).features, 0)
    by_config = AutoModel.from_pretrained(
        folder, trust_remote_code=True, output_hidden_states=True, adaptor_names=["toy_dino"]
    ).eval()(IMAGES, return_dict=True)
    close(by_config["backbone"].hidden_states[2], got.hidden_states[2], 0)
    assert by_config["toy_dino"]._fields == ("summary", "features")


@torch.no_grad()
def test_hidden_states_of_windowed_attention_are_row_by_row(remote: Any, student: Student) -> None:
    """Against the maps of inner blocks, which are put together on their own way."""
    images = pictures((32, 48))
    states = remote(images, window=2, output_hidden_states=True).hidden_states
    maps = forward_intermediates(student, images, [0, 1, 2, 3], window=2).layers
    for tokens, layer in zip(states[1:], maps, strict=True):
        close(tokens[:, remote.num_summary_tokens :], flat(layer.features_BCHW), 1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the name that older transformers have, too
@pytest.mark.parametrize("how", ["whole", "window", "hidden states", "packed"])
def test_gradient_checkpointing_computes_blocks_twice_and_changes_nothing(remote: Any, how: str) -> None:
    packed = {"image_grid_hw": torch.tensor([[4, 8], [4, 8]])}
    options = {"whole": {}, "window": {"window": 2}, "hidden states": {"output_hidden_states": True}, "packed": packed}[how]
    pixels = remote.model.patch_generator.cut(IMAGES).flatten(0, 1) if how == "packed" else IMAGES
    block, calls = remote.blocks[1], []
    block.mlp.register_forward_pre_hook(lambda *_: calls.append(1))

    def gradient() -> torch.Tensor:
        remote.zero_grad()
        remote.train()(pixels, **options).features.square().sum().backward()
        return block.mlp.fc1.weight.grad

    want = gradient().clone()
    assert len(calls) == 1
    remote.gradient_checkpointing_enable()
    assert remote.is_gradient_checkpointing
    close(gradient(), want, 1e-6)
    assert len(calls) == 3
    remote.gradient_checkpointing_disable()
    gradient()
    assert len(calls) == 4


@torch.no_grad()
def test_the_pipeline_gives_the_summary_of_the_processors_pixels(folder: Path, native: Any) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8))
    got = pipeline("image-feature-extraction", str(folder), trust_remote_code=True)(picture, return_tensors=True)
    pixels = CLIPImageProcessor.from_pretrained(folder)(picture, return_tensors="pt")
    assert pixels["pixel_values"].shape == (1, 3, 48, 48)  # the middle of a picture of any shape
    close(got, native(**pixels).summary, 1e-5)
    half = pipeline("image-feature-extraction", str(folder), trust_remote_code=True, dtype=torch.bfloat16)
    found = half(picture, return_tensors=True)
    assert found.dtype == torch.bfloat16
    assert (found.float() - got).norm() / got.norm() < 0.03


@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.no_grad()
def test_maps_for_detection_heads(remote: Any, student: Student, size: tuple[int, int]) -> None:
    images = pictures(size)
    backbone = remote.as_backbone(out_indices=[2, 4])
    assert (backbone.out_features, backbone.channels) == (["stage2", "stage4"], [32, 32])
    assert not backbone.training
    assert backbone.blocks is remote.blocks
    for got, want in zip(backbone(images).feature_maps, forward_intermediates(student, images, [1, 3]).layers, strict=True):
        close(got, want.features_BCHW, 1e-5)
    states = backbone.forward_with_filtered_kwargs(images, output_hidden_states=True).hidden_states
    close(states[-1], remote(images, output_hidden_states=True).last_hidden_state, 0)
    assert remote.as_backbone(out_features=["stem", "stage1"]).out_indices == [0, 1]


def test_what_a_backbone_cannot_give_is_refused(remote: Any) -> None:
    with pytest.raises(ValueError, match="stage9"):
        remote.as_backbone(out_features=["stage9"])
    with pytest.raises(ValueError, match="output_attentions: the fused attention gives no weights"):
        remote.as_backbone()(IMAGES, output_attentions=True)


# --- images of several sizes in one call ------------------------------------------------------------------------------------

RAGGED = [pictures(size, 1)[0] for size in (*SIZES, (4, 4), (8, 64))]


def packed(model: Any) -> dict[str, torch.Tensor]:
    cut = model.radio_model.model.patch_generator.cut
    grids = [[side // 4 for side in image.shape[1:]] for image in RAGGED]
    return {"pixel_values": torch.cat([cut(image[None])[0] for image in RAGGED]), "image_grid_hw": torch.tensor(grids)}


@torch.no_grad()
def test_packed_images_give_the_numbers_of_the_native_class_and_of_one_after_the_other(
    folder: Path, native: Any, student: Student
) -> None:
    remote = AutoModel.from_pretrained(folder, trust_remote_code=True, adaptor_names=["toy_clip", "toy_sam"]).eval()
    inputs = packed(remote)
    got, theirs = remote(**inputs, output_hidden_states=True), native(**inputs, output_hidden_states=True)
    alone = [student.encode_adaptors(image[None]) for image in RAGGED]
    close(got["backbone"].features, theirs.features, 1e-5)
    close(got["backbone"].summary, theirs.summary, 1e-5)
    for mine, other in zip(got["backbone"].hidden_states, theirs.hidden_states, strict=True):
        close(mine, other, 1e-5)
    for name in ("backbone", "toy_clip", "toy_sam"):
        close(got[name].features, torch.cat([flat(one[name].features_BCHW)[0] for one in alone]), 1e-5)
    close(got["toy_clip"].summary, torch.cat([one["toy_clip"].summary_BC for one in alone]), 1e-5)
    assert got["toy_sam"].summary is None


def test_patches_that_do_not_fit_their_grids_are_refused(remote: Any) -> None:
    inputs = packed(remote)
    with pytest.raises(
        ValueError, match=r"packed patches are \(269, 48\), expected \(6, 48\): 6 patches of the grids \[\[2, 3\]\]"
    ):
        remote(inputs["pixel_values"], image_grid_hw=torch.tensor([[2, 3]]))
    with pytest.raises(ValueError, match="feature_fmt is 'NCHW', but images of several sizes make no map; leave it out"):
        remote(**inputs, feature_fmt="NCHW")


# --- images at their own sizes ------------------------------------------------------------------------------------------------


def random_picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8))


@torch.no_grad()
def test_a_processor_that_keeps_the_aspect_ratio(folder: Path, native: Any, remote: Any, student: Student) -> None:
    """Between the squares of the smallest and the largest training images (48 px): resized as little as that allows."""
    processor = AutoImageProcessor.from_pretrained(folder, subfolder="dynamic")
    sizes = [(60, 30), (200, 500), (48, 48), (3, 90)]
    inputs = processor([random_picture(*size) for size in sizes], return_tensors="pt")
    grids = inputs["image_grid_thw"][:, 1:]
    for (width, height), (rows, cols) in zip(sizes, grids.tolist()):
        assert 144 * 0.8 <= rows * cols <= 144 * 1.2 or min(rows, cols) <= 3
        assert max(rows * width / (cols * height), cols * height / (rows * width)) < 1.4 or min(rows, cols) <= 3
    got, theirs = (model(inputs["pixel_values"], image_grid_hw=grids) for model in (remote, native))
    images = unpack_images(inputs["pixel_values"], grids.tolist(), 4)
    want = torch.cat([flat(student.encode(image[None]).features_BCHW)[0] for image in images])
    close(got.features, want, 1e-5)
    close(theirs.features, want, 1e-5)
    assert 0 <= inputs["pixel_values"].min() < inputs["pixel_values"].max() <= 1
    whole = processor(random_picture(48, 48), return_tensors="pt")["pixel_values"]
    exact = torch.from_numpy(np.array(random_picture(48, 48))).permute(2, 0, 1) / 255
    close(unpack_images(whole, [[12, 12]], 4)[0], exact, 1e-6)


def test_servers_read_how_many_patches_an_image_may_have(tmp_path: Path, run: Path, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    for values in (config, config["args"]):
        assert (values["min_num_patches"], values["max_num_patches"]) == (144, 144)
    from radio_distill import load_student
    from radio_distill.student.checkpoints import save_student

    save_student(load_student(run), tmp_path / "student")  # of its training nothing is known
    config = json.loads((export(tmp_path / "student", tmp_path / "hf") / "config.json").read_text())
    assert (config["min_num_patches"], config["max_num_patches"]) == (56**2, 56**2)  # its nominal size; the table is smaller


@torch.no_grad()
def test_levels_have_names_and_a_measured_scale(run: Path, folder: Path, tmp_path: Path) -> None:
    scaled = export(run, tmp_path / "hf", rms_images="toy", adaptors=[])
    levels = json.loads((scaled / "config.json").read_text())["levels"]
    assert list(levels) == ["stage1", "stage2", "stage3", "stage4"]
    options: dict[str, Any] = {"trust_remote_code": True, "unit_scale": True}
    model = AutoModel.from_pretrained(scaled, **options).eval()
    maps = model.as_backbone(out_features=list(levels))(IMAGES).feature_maps
    states = AutoModel.from_pretrained(scaled)(IMAGES, output_hidden_states=True).hidden_states
    for got, (name, rms) in zip(maps, levels.items(), strict=True):
        close(flat(got), states[int(name.removeprefix("stage"))][:, 8:] / rms, 1e-5)
    again = json.loads((export(scaled, tmp_path / "again") / "config.json").read_text())
    assert again["levels"] == levels
    assert set(json.loads((folder / "config.json").read_text())["levels"].values()) == {None}
    with pytest.raises(ValueError, match="unit_scale: the scale of 'stem' was not measured, expected one of stage1, stage2"):
        model.as_backbone(out_features=["stem"])(IMAGES)
