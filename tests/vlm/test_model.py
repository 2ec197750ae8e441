"""The tower is the student; the model answers; what is saved loads in transformers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from made_run import pictures
from PIL import Image
from scipy.fft import dct

from radio_distill import load_student
from radio_distill.config.vlm_recipe import FromParts, Patches
from radio_distill.errors import CheckpointError, DataError, RecipeError
from radio_distill.export.command import export
from radio_distill.network.packing import unpack_images
from radio_distill.network.token_merging import merge_tokens
from radio_distill.toyworld import render_images
from radio_distill.types import CLIP_MEAN
from radio_distill.vlm.model import Vlm, build_vlm, load_vlm, save_vlm
from radio_distill.vlm.tiles import open_image, views
from radio_distill.vlm.tower import join, to_tokens, with_places


def scene_images(count: int) -> list[Image.Image]:
    return [Image.fromarray(pixels) for pixels in render_images(5, range(count), size=40)]


def test_the_tower_gives_the_students_map_and_every_token_is_a_square_of_patches(vlm: Vlm, student: Path) -> None:
    images = pictures((32, 32))
    features = load_student(student).encode(images).features_BCHW
    tokens = vlm.model.model.vision_tower(images).hidden_states[-1]
    assert tokens.shape == (2, 16, 4 * 32)
    slow = torch.stack(
        [features[:, :, 2 * y + dy, 2 * x + dx] for y in range(4) for x in range(4) for dy in (0, 1) for dx in (0, 1)]
    )
    slow = slow.unflatten(0, (16, 4)).permute(2, 0, 3, 1).flatten(2)  # batch, token, channel, place in the square
    torch.testing.assert_close(tokens, slow, atol=1e-5, rtol=1e-5)
    assert torch.equal(to_tokens(features, 1), features.flatten(2).transpose(1, 2))


def test_places_of_tokens_are_a_cosine_transform_about_as_long_as_the_tokens() -> None:
    tokens = torch.randn(2, 4 * 6, 5)
    found = with_places(tokens, 4, 6)
    assert torch.equal(found[..., :5], tokens)
    places = found[..., 5:].double() / tokens.double().norm(dim=2).mean(1)[:, None, None] * 8**0.5
    for axis, (side, channels) in enumerate(((4, places[..., :8]), (6, places[..., 8:]))):
        basis = torch.from_numpy(dct(np.eye(side), axis=0) / 2)[1:].T  # cosines of the centres, from the first on
        grid = channels.unflatten(1, (4, 6)).movedim(1 + axis, 1)
        torch.testing.assert_close(grid[0, :, 0, : side - 1], basis, atol=1e-6, rtol=0)
        assert torch.equal(grid[0], grid[0, :, :1].expand_as(grid[0]))


@pytest.mark.parametrize("size", [32, Patches(min_num_patches=16, max_num_patches=80)])
def test_a_tower_with_places_is_saved_and_answers_in_a_batch_as_alone(
    size: int | Patches, parts: FromParts, tmp_path: Path
) -> None:
    placed = build_vlm(parts.model_copy(update={"size": size, "positions": True}))
    plain = build_vlm(parts.model_copy(update={"size": size}))
    seen = [image.crop((0, 0, 40, height)) for image, height in zip(scene_images(3), (40, 24, 32))]
    pictures = join([placed.pictures(image, key="") for image in seen])
    inputs = pictures.inputs()
    with torch.no_grad():
        mine, theirs = (v.model.model.vision_tower(**inputs).hidden_states[-1] for v in (placed, plain))
    assert torch.equal(mine[..., :-16], theirs)
    save_vlm(placed, tmp_path / "placed")
    loaded = load_vlm(tmp_path / "placed")
    asked = ["is there a tree?", "what is on the ground?", "what is the largest object?"]
    alone = [placed.answer([q], [[image]], max_new_tokens=4)[0] for q, image in zip(asked, seen)]
    assert loaded.answer(asked, [[image] for image in seen], max_new_tokens=4) == alone


def test_the_tower_never_trains(vlm: Vlm) -> None:
    tower = vlm.model.train().model.vision_tower
    assert not any(module.training for module in tower.modules())
    assert not any(p.requires_grad for p in tower.parameters())
    assert not tower(pictures((32, 32)).requires_grad_()).hidden_states[-1].requires_grad
    vlm.model.eval()


def test_a_student_in_bfloat16_stays_so_and_features_have_the_dtype_of_the_pixels(parts: FromParts, tmp_path: Path) -> None:
    half = build_vlm(parts.model_copy(update={"dtype": "bfloat16"}))
    save_vlm(half, tmp_path / "half")
    for model in (half.model, load_vlm(tmp_path / "half").model):
        dtypes = {p.dtype for p in model.model.vision_tower.parameters()}
        assert dtypes == {torch.bfloat16}
        assert {p.dtype for p in model.model.language_model.parameters()} == {torch.float32}
        assert model.model.vision_tower(pictures((32, 32))).hidden_states[-1].dtype == torch.float32


def test_transformers_loads_what_is_saved_and_computes_the_same(vlm: Vlm, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    save_vlm(vlm, tmp_path / "vlm")
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(tmp_path / "vlm"),
        AutoProcessor.from_pretrained(tmp_path / "vlm"),
    )
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "is there a tree?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    batch = processor(images=scene_images(1), text=[text], return_tensors="pt", add_special_tokens=False)
    assert int((batch["input_ids"] == model.config.image_token_id).sum()) == vlm.tower.num_tokens == 16
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, vlm.model(**batch).logits)
    images = [[image] for image in scene_images(1)]
    assert load_vlm(tmp_path / "vlm").answer(["is there a tree?"], images) == vlm.answer(["is there a tree?"], images)


def test_answers_of_a_batch_are_those_of_its_questions_alone(vlm: Vlm) -> None:
    questions = ["is there a tree?", "what is the largest object of all?", "how many?", "compare <image> with <image>"]
    images = [[i] for i in scene_images(2)] + [[], scene_images(2)]
    alone = [vlm.answer([q], [i], max_new_tokens=5)[0] for q, i in zip(questions, images)]
    assert vlm.answer(questions, images, max_new_tokens=5) == alone


def test_a_question_that_marks_other_images_than_there_are_is_refused(vlm: Vlm) -> None:
    with pytest.raises(
        DataError, match=r"conversation 'compare <image> with <image>' marks 2 images .* and has 1; expected a mark"
    ):
        vlm.answer(["compare <image> with <image>"], [scene_images(1)])


@pytest.mark.parametrize(("tiles", "tokens"), [(0, 0), (1, 16), (2, 80)])
def test_tiles_are_images_of_their_own(parts: FromParts, tiles: int, tokens: int) -> None:
    vlm = build_vlm(parts.model_copy(update={"tiles": tiles}))
    assert vlm.tower.num_tokens == tokens
    assert vlm.pictures(scene_images(1)[0], key="one").pixels.shape == (vlm.tower.num_views, 3, 32, 32)
    assert len(vlm.answer(["is there a tree?"], [scene_images(1)], max_new_tokens=2)) == 1


def test_merged_tokens_are_those_of_token_merging_also_after_saving(parts: FromParts, vlm: Vlm, tmp_path: Path) -> None:
    from transformers import AutoProcessor

    merged = build_vlm(parts.model_copy(update={"merge": 5}))
    images = pictures((32, 32))
    tokens = vlm.model.model.vision_tower(images).hidden_states[-1]
    assert torch.equal(merged.model.model.vision_tower(images).hidden_states[-1], merge_tokens(tokens, 5).tokens_BKC)
    save_vlm(merged, tmp_path / "vlm")
    batch = AutoProcessor.from_pretrained(tmp_path / "vlm")(images=scene_images(1), text=["<image>"], return_tensors="pt")
    assert int((batch["input_ids"] == merged.model.config.image_token_id).sum()) == merged.tower.num_tokens == 5
    asked = (["is there a tree?"], [scene_images(1)])
    assert load_vlm(tmp_path / "vlm").answer(*asked) == merged.answer(*asked)


def random_image(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8))


RAGGED = [random_image(*size) for size in ((60, 20), (16, 44), (200, 150), (5, 3))]


@pytest.fixture(scope="module")
def own_sizes(parts: FromParts) -> Vlm:
    torch.manual_seed(0)
    return build_vlm(parts.model_copy(update={"size": Patches(min_num_patches=24, max_num_patches=90)}))


@pytest.mark.parametrize("unshuffle", [1, 2])
@torch.no_grad()
def test_images_that_keep_their_aspect_ratio_are_seen_as_the_export_serves_them(
    parts: FromParts, student: Path, tmp_path: Path, unshuffle: int
) -> None:
    from transformers import AutoImageProcessor, AutoModel

    size = Patches(min_num_patches=24, max_num_patches=90)
    vlm = build_vlm(parts.model_copy(update={"size": size, "unshuffle": unshuffle}))
    export(student, tmp_path / "hf", adaptors=[])
    budget = {"shortest_edge": 24 * 4**2, "longest_edge": 90 * 4**2}
    processor = AutoImageProcessor.from_pretrained(tmp_path / "hf", subfolder="dynamic", size=budget)
    whole = load_student(student)
    served = AutoModel.from_pretrained(tmp_path / "hf", trust_remote_code=True).eval()
    seen = join([vlm.pictures(image, key="one") for image in RAGGED])
    found = vlm.model.model.vision_tower(*seen).hidden_states[-1]
    assert found.shape == (1, vlm.tower.tokens_of(seen), unshuffle**2 * 32)
    if unshuffle == 1:
        batch = processor(RAGGED, return_tensors="pt")
        theirs = served(batch["pixel_values"], image_grid_hw=batch["image_grid_thw"][:, 1:]).features
        torch.testing.assert_close(found[0], theirs, atol=1e-5, rtol=1e-5)
    slow = []
    for image in RAGGED:
        one = vlm.pictures(image, key="one")
        ((height, width),) = one.sizes_V2.tolist()
        assert not height % (4 * unshuffle)
        assert 24 <= height * width / 16 <= 90 * 1.2
        assert 0.6 < (height / width) / (image.height / image.width) < 1.7
        (pixels,) = unpack_images(one.pixels, [[height // (4 * unshuffle), width // (4 * unshuffle)]], 4 * unshuffle)
        slow.append(to_tokens(whole.encode(pixels[None]).features_BCHW, unshuffle)[0])
    torch.testing.assert_close(found[0], torch.cat(slow), atol=1e-5, rtol=1e-5)


def test_images_at_their_own_sizes_answer_in_a_batch_as_alone_and_in_transformers(own_sizes: Vlm, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    questions, images = ["is there a tree?", "how many?", "compare <image> with <image>", "why?"], [
        RAGGED[:1], RAGGED[1:2], RAGGED[2:], []
    ]  # fmt: skip
    alone = [own_sizes.answer([q], [i], max_new_tokens=5)[0] for q, i in zip(questions, images)]
    assert own_sizes.answer(questions, images, max_new_tokens=5) == alone
    save_vlm(own_sizes, tmp_path / "vlm")
    assert load_vlm(tmp_path / "vlm").answer(questions, images, max_new_tokens=5) == alone
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(tmp_path / "vlm"),
        AutoProcessor.from_pretrained(tmp_path / "vlm"),
    )
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": questions[0]}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    batch = processor(images=images[0], text=[text], return_tensors="pt", add_special_tokens=False)
    seen = own_sizes.pictures(RAGGED[0], key="one")
    assert torch.equal(batch["image_sizes"], seen.sizes_V2)
    assert int((batch["input_ids"] == model.config.image_token_id).sum()) == own_sizes.tower.tokens_of(seen) > 4
    tokens = model.generate(**batch, max_new_tokens=5, do_sample=False)[:, batch["input_ids"].shape[1] :]
    assert processor.decode(tokens[0], skip_special_tokens=True).strip() == alone[0]


def test_views_are_the_padded_square_and_its_parts() -> None:
    image = Image.fromarray(np.arange(5 * 9 * 3, dtype=np.uint8).reshape(5, 9, 3))
    whole, *parts = views(image, 2)
    assert whole.size == (10, 10)
    assert [part.size for part in parts] == [(5, 5)] * 4
    rows = [
        np.concatenate([np.asarray(parts[0]), np.asarray(parts[1])], 1),
        np.concatenate([np.asarray(parts[2]), np.asarray(parts[3])], 1),
    ]
    assert np.array_equal(np.concatenate(rows), np.asarray(whole))
    assert np.array_equal(np.asarray(whole)[2:7, 0:9], np.asarray(image))
    assert np.asarray(whole)[0, 0].tolist() == [int(255 * x) for x in CLIP_MEAN]


def test_errors_name_what_does_not_fit(parts: FromParts, student: Path, tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"start.size is 30, no multiple of the student's patch 4 times start.unshuffle 2; nearest is 32"
    ):
        build_vlm(parts.model_copy(update={"size": 30}))
    with pytest.raises(RecipeError, match=r"start.merge is 17, but a picture has 16 tokens; expected at most that"):
        build_vlm(parts.model_copy(update={"merge": 17}))
    with pytest.raises(
        CheckpointError, match=r"start.lm=.* holds no config.json; expected the folder of a causal language model"
    ):
        build_vlm(parts.model_copy(update={"lm": str(tmp_path)}))
    with pytest.raises(CheckpointError, match="holds no vlm: it is a run whose checkpoints hold the student"):
        load_vlm(student)
    with pytest.raises(DataError, match="the image of conversation mix/7 cannot be read"):
        open_image(b"no image", "mix/7")
