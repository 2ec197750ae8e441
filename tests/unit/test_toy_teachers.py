"""The shipped toy teachers: they load, keep the shapes of their cards, and know the toy world."""

import pytest
import torch
from safetensors import safe_open
from toy_probes import classify_zero_shot, encode_all
from toy_scenes import ToyScenes

from radio_distill.config.load import load_card
from radio_distill.errors import TeacherError
from radio_distill.paths import data_path
from radio_distill.teachers.base import load_teacher
from radio_distill.teachers.text import load_text_tower

NAMES = ("toy_clip", "toy_siglip", "toy_dino", "toy_sam")
TEACHERS = {name: load_teacher(load_card(name)) for name in NAMES}
HELD_OUT = 4


@pytest.fixture(scope="module")
def scenes():
    return ToyScenes.render(HELD_OUT, range(200), size=96)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_have_the_shapes_of_the_card(name):
    teacher = TEACHERS[name]
    card, out = teacher.card, teacher.encode(torch.rand(2, 3, 96, 96))
    height, width = (side // card.input.patch for side in teacher.nearest_size(96, 96))
    assert out.features_BCHW.shape == (2, card.output.features, height, width)
    assert (None if out.summary_BC is None else out.summary_BC.shape[1]) == card.output.summary
    assert not next(teacher.net.parameters()).requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_an_image_alone_or_in_a_batch_gives_the_same_features(name):
    images = torch.rand(3, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    batch, alone = TEACHERS[name].encode(images), TEACHERS[name].encode(images[1:2])
    scale = batch.features_BCHW.std()
    assert (batch.features_BCHW[1:2] - alone.features_BCHW).abs().max() < 1e-4 * scale  # fp32, other GEMM shapes


@pytest.mark.parametrize("name", NAMES)
def test_bf16_stays_close_to_fp32(name):
    images = ToyScenes.render(HELD_OUT, range(2), size=96).images_BHW3
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    exact = TEACHERS[name].encode(x).features_BCHW
    half = load_teacher(load_card(name)).to("cpu", torch.bfloat16).encode(x).features_BCHW
    assert torch.nn.functional.cosine_similarity(exact, half, dim=1).mean() > 0.995  # bf16 keeps 8 bits


def test_a_fixed_teacher_says_which_size_it_takes():
    with pytest.raises(TeacherError, match="image size 98x98: this toy teacher only takes 84x84"):
        TEACHERS["toy_clip"].forward(torch.zeros(1, 3, 98, 98))


def test_a_resizable_teacher_takes_any_multiple_of_its_patch():
    assert TEACHERS["toy_dino"].forward(torch.zeros(1, 3, 98, 42)).features_BCHW.shape[-2:] == (14, 6)
    with pytest.raises(TeacherError, match="image size 96x84 is not a multiple of patch size 7"):
        TEACHERS["toy_dino"].forward(torch.zeros(1, 3, 96, 84))


@pytest.mark.parametrize("name", NAMES)
def test_random_weights_have_the_true_architecture_and_meta_has_no_memory(name):
    shapes = {k: v.shape for k, v in TEACHERS[name].net.state_dict().items()}
    for weights in ("random", "meta"):
        net = load_teacher(load_card(name), weights=weights).net
        assert {k: v.shape for k, v in net.state_dict().items()} == shapes
    assert all(p.is_meta for p in net.parameters())


def test_missing_weights_name_the_file_and_the_command_that_makes_it():
    card = load_card("toy_clip").model_copy(update={"source": "toy/absent.safetensors"})
    with pytest.raises(
        TeacherError, match=r"toy_clip: no weights at .*absent.safetensors; expected .*train_toy_teachers.py --out"
    ):
        load_teacher(card)


def test_weights_of_another_architecture_are_refused():
    card = load_card("toy_clip").model_copy(update={"source": "toy/toy_sam.safetensors"})
    with pytest.raises(TeacherError, match=r"toy_sam\.safetensors does not fit the card"):
        load_teacher(card)


@pytest.mark.parametrize("name", ["toy_clip", "toy_siglip"])
def test_zero_shot_is_far_above_chance_on_held_out_scenes(name, scenes):
    summary = encode_all(TEACHERS[name], torch.from_numpy(scenes.images_BHW3).permute(0, 3, 1, 2)).summary_BC
    guesses = classify_zero_shot(summary, load_text_tower(load_card(name)))
    assert (guesses == torch.from_numpy(scenes.labels_B)).float().mean() > 0.4  # chance is 0.1


def test_text_embeddings_do_not_depend_on_case_punctuation_or_company():
    tower = load_text_tower(load_card("toy_clip"))
    alone = tower.encode(["a red house"])
    among = tower.encode(["A red House!", "a striped blue car next to a tree on grass at night"])
    assert alone.shape == (1, 64)
    assert torch.allclose(alone, among[:1], atol=1e-5)


def test_feature_scales_differ_by_an_order_of_magnitude(scenes):
    images = torch.from_numpy(scenes.images_BHW3[:16]).permute(0, 3, 1, 2)
    spread = [TEACHERS[n].encode(images).features_BCHW.std().item() for n in NAMES]
    assert max(spread) / min(spread) > 10


def test_weights_are_small_and_carry_their_numbers():
    sizes = []
    strength = {
        "toy_clip": "zero_shot_top1",
        "toy_siglip": "segmentation_miou",
        "toy_dino": "knn_top1",
        "toy_sam": "boundary_ap",
    }
    for name in NAMES:
        path = data_path("teachers") / "toy" / f"{name}.safetensors"
        sizes.append(path.stat().st_size)
        with safe_open(path, "pt") as file:
            numbers = file.metadata()
        assert float(numbers[strength[name]]) > float(numbers.get(f"random_weights_{strength[name]}", 0.1))
    assert max(sizes) < 2e6
    assert sum(sizes) < 8e6
