"""The TeacherService with trained upsamplers: sharp targets in the high partition, de-biased ones in the low."""

import pytest
import torch
import torch.nn.functional as F
from made_upsampler import make

from radio_distill.align import resample_to, resize_map
from radio_distill.balance import Balancer, identity
from radio_distill.config.load import cards_of, load_recipe
from radio_distill.distill.bank import TeacherBank
from radio_distill.distill.targets import TeacherService, views_at
from radio_distill.doctor import examine_recipe
from radio_distill.errors import CheckpointError, TeacherError
from radio_distill.teachers.base import load_teacher
from radio_distill.types import Batch, View
from radio_distill.upsamplers.folder import load_upsampler

CLIP = "partitions.high.teachers.toy_clip.upsampler"
ONLY_CLIP = [
    f"{key}={value}"
    for name in ("toy_siglip", "toy_dino", "toy_sam")
    for key, value in ((f"teachers.{name}", "null"), *((f"partitions.{p}.teachers.{name}", "null") for p in ("low", "high")))
]


def both(weights):
    """The weights of toy_clip's upsampler, in both partitions."""
    return [f"partitions.{p}.teachers.toy_clip.upsampler.weights={weights}" for p in ("low", "high")]


def service_of(weights, *overrides, recipe="toy/stage3_featsharp"):
    loaded = load_recipe(recipe, [*both(weights), *ONLY_CLIP, *overrides])
    teachers = {name: load_teacher(card) for name, card in cards_of(loaded).items()}
    service = TeacherService(loaded, TeacherBank(loaded, teachers), student_patch=8)
    service.balancers.update({name: identity(t.card.output.features) for name, t in teachers.items()})
    return loaded, service


def batch_of(recipe, service, partition, count):
    """Random bytes, every view showing the whole image."""
    sizes = {name: (c.input.size, c.input.patch) for name, c in service.cards.items()}
    generator = torch.Generator().manual_seed(0)
    boxes = torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(count, 1)
    views = {
        spec.name: View(torch.randint(0, 256, (count, 3, spec.size, spec.size), dtype=torch.uint8, generator=generator), boxes)
        for spec in views_at(recipe, partition, sizes, 8, 0)
    }
    return Batch(partition, tuple(f"toy/0/{i}" for i in range(count)), torch.arange(count), views)


def count_calls(teacher):
    calls, forward = [], teacher.forward

    def counted(pixels):
        calls.append(len(pixels))
        return forward(pixels)

    teacher.forward = counted
    return calls


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return make(tmp_path_factory.mktemp("upsampler") / "u", factor=3)


def test_sharp_targets_are_those_of_the_upsampler_in_one_call_of_the_teacher(weights):
    recipe, service = service_of(weights)
    batch, teacher = batch_of(recipe, service, "high", 2), service.encoder.teachers["toy_clip"]
    assert batch.views["toy_clip"].images_B3HW.shape[-2:] == (252, 252)
    calls = count_calls(teacher)
    out = service.encode(batch)["toy_clip"]
    assert calls == [2 * (1 + 9)]
    sharpener, pixels = load_upsampler(weights).sharpener, teacher.normalize(batch.views["toy_clip"].images_B3HW)
    by_hand = sharpener(teacher.forward, pixels, (84, 84))
    assert torch.equal(out.features_BCHW, by_hand.high_BCHW)
    own = service.countable(batch, {"toy_clip": out})["toy_clip"]  # what statistics see
    assert torch.equal(own.features_BCHW, sharpener.denormalize(by_hand.high_BCHW))
    assert torch.equal(out.summary_BC, by_hand.summary_BC)
    assert out.features_BCHW.shape == (2, 96, 36, 36)


def test_sharp_targets_are_reduced_antialiased_to_the_students_grid(weights):
    recipe, service = service_of(weights)
    batch = batch_of(recipe, service, "high", 2)
    encoded = service.encode(batch)
    raw = service.countable(batch, encoded)
    target = service.targets(batch, encoded)["toy_clip"]
    reduced = F.interpolate(raw["toy_clip"].features_BCHW, (24, 24), mode="bilinear", antialias=True, align_corners=False)
    assert torch.allclose(target.features_BCHW, reduced, atol=1e-4)
    assert raw["toy_clip"].features_BCHW.shape[-1] == 36
    assert service.positions(recipe.partitions["high"], "toy_clip") == recipe.partitions["high"].images * 24 * 24


def test_low_targets_get_the_same_debias_map(weights):
    recipe, service = service_of(weights)
    batch, teacher = batch_of(recipe, service, "low", 2), service.encoder.teachers["toy_clip"]
    calls = count_calls(teacher)
    out = service.countable(batch, service.encode(batch))["toy_clip"]
    assert calls == [2]
    plain = teacher.encode(batch.views["toy_clip"].images_B3HW)
    saved = load_upsampler(weights)
    bias, balancer = saved.sharpener.bias_buffer.buffer, saved.sharpener.balancer
    expected = balancer.inverse(balancer.forward(plain.features_BCHW) + bias)
    assert torch.allclose(out.features_BCHW, expected, atol=1e-4)
    assert torch.equal(out.summary_BC, plain.summary_BC)
    assert not torch.allclose(out.features_BCHW, plain.features_BCHW, atol=0.01)


@pytest.mark.parametrize("partition", ["low", "high"])
def test_a_sharp_map_is_balanced_by_one_product(weights, partition, monkeypatch):
    recipe, service = service_of(weights)
    encoded = service.encode(batch := batch_of(recipe, service, partition, 2))
    raw, channels = service.countable(batch, encoded)["toy_clip"].features_BCHW, 96
    matrix = torch.linalg.qr(torch.randn(channels, channels, generator=torch.Generator().manual_seed(0)))[0]
    offset = raw.mean((0, 2, 3)) + 3
    balancer = Balancer("phi_s", 2 * matrix, matrix.T.contiguous() / 2, offset, offset)
    service.balancers["toy_clip"] = balancer
    products, baddbmm = [], torch.baddbmm
    monkeypatch.setattr(torch, "baddbmm", lambda *args: products.append(1) or baddbmm(*args))
    target = service.targets(batch, encoded)["toy_clip"]
    assert len(products) == 1
    expected = resample_to(
        balancer.forward(raw),
        *(batch.views[name].boxes_B4 for name in ("toy_clip", "student")),
        target.features_BCHW.shape[-2:],
        aligned=True,
    )[0]
    torch.testing.assert_close(target.features_BCHW, expected, atol=2e-4, rtol=1e-4)


def test_a_cap_on_the_teachers_batch_gives_the_same_targets(weights):
    recipe, service = service_of(weights)
    _, capped = service_of(weights, "teachers.toy_clip.chunk=7")
    calls = count_calls(capped.encoder.teachers["toy_clip"])
    batch = batch_of(recipe, service, "high", 2)
    one, other = service.encode(batch)["toy_clip"], capped.encode(batch)["toy_clip"]
    assert calls == [7, 7, 7]  # the last is filled up: all have one shape
    assert torch.allclose(one.features_BCHW, other.features_BCHW, atol=1e-3)


@pytest.mark.parametrize("kind", ["tile", "s2"])
def test_untrained_kinds_deliver_the_same_grid(kind):
    recipe = load_recipe(f"toy/stage3_{kind}", ONLY_CLIP)
    teachers = {name: load_teacher(card) for name, card in cards_of(recipe).items()}
    service = TeacherService(recipe, TeacherBank(recipe, teachers), student_patch=8)
    batch = batch_of(recipe, service, "high", 1)
    features = service.encode(batch)["toy_clip"].features_BCHW
    assert features.shape == (1, 96, 36, 36)
    assert torch.isfinite(resize_map(features, (24, 24))).all()


def test_a_wrong_upsampler_stops_before_any_work(tmp_path):
    with pytest.raises(TeacherError, match="holds a 2x featsharp for 'toy_clip', but the recipe asks for a 3x featsharp"):
        service_of(make(tmp_path / "u", factor=2))
    with pytest.raises(TeacherError, match="trained for teacher 'toy_siglip'"):
        service_of(make(tmp_path / "s", teacher="toy_siglip", factor=3))
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        service_of(tmp_path / "nothing")


def findings(recipe):
    return {f.what: f for f in examine_recipe(recipe) if f.what.startswith("upsampler")}


def test_doctor_finds_upsamplers_or_says_how_to_train_them(weights, tmp_path):
    here, _ = service_of(weights)
    found = findings(here)["upsampler toy_clip"]
    assert (found.missing, found.text) == (False, f"{weights}: 3x featsharp, step 100")
    missing = findings(load_recipe("toy/stage3_featsharp"))
    assert all(finding.missing for finding in missing.values())
    assert "radio-distill upsampler toy/upsampler/toy_siglip data.sources" in missing["upsampler toy_siglip"].text
    elsewhere = load_recipe("toy/stage3_featsharp", both(f"{tmp_path}/x"))
    assert f"RECIPE teacher=toy_clip run={tmp_path}/x" in findings(elsewhere)["upsampler toy_clip"].text
    other = load_recipe("toy/stage3_featsharp", [*both(weights), f"{CLIP}.factor=2", *ONLY_CLIP])
    assert "but the recipe asks for a 2x featsharp" in " ".join(f.text for f in examine_recipe(other) if f.missing)
