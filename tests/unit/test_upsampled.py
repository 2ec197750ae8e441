"""Upsamplers as a library: `Upsampled` around a teacher, `radio_distill.load_upsampler`, torch.hub, and what wrong use is told."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import REPO
from made_upsampler import made, make
from safetensors.torch import load_file, save_file

import radio_distill
from radio_distill import Upsampled, load_card, load_teacher, load_upsampler
from radio_distill.errors import CheckpointError, TeacherError
from radio_distill.types import VisionModel


def model(teacher="toy_clip", *, chunk=None, **options):
    return Upsampled(load_teacher(load_card(teacher)), made(teacher, **options), chunk=chunk)


def images(height, width, batch=1):
    torch.manual_seed(1)
    return torch.rand(batch, 3, height, width)


def test_encode_is_the_teacher_on_tiles_stitched_by_hand():
    upsampled, x = model(kind="tile", factor=2, debias=False), images(168, 168)
    tiles = [upsampled.teacher.encode(x[..., i : i + 84, j : j + 84]).features_BCHW for i in (0, 84) for j in (0, 84)]
    stitched = torch.cat([torch.cat(tiles[:2], 3), torch.cat(tiles[2:], 3)], 2)
    small = F.interpolate(x, (84, 84), mode="bilinear", antialias=True)
    out = upsampled.encode(x)
    assert torch.allclose(out.features_BCHW, stitched, atol=1e-3 * stitched.abs().max())
    assert torch.allclose(out.summary_BC, upsampled.teacher.encode(small).summary_BC, atol=1e-4)
    assert isinstance(upsampled, VisionModel)


def test_rectangular_images_keep_their_shape_where_the_teacher_takes_any():
    upsampled = model("toy_dino", factor=2, inputs=("jbu", "tiles", "rgb"))
    assert upsampled.encode(images(140, 224)).features_BCHW.shape == (1, 96, 20, 32)
    assert upsampled.nearest_size(145, 220) == (140, 224)
    assert upsampled.encode(images(145, 220)).features_BCHW.shape == (1, 96, 20, 32)


def test_images_of_any_shape_are_resized_for_a_teacher_of_one_size():
    upsampled, x = model(factor=3), images(200, 300)
    fitting = F.interpolate(x, (252, 252), mode="bilinear", antialias=True)
    assert upsampled.nearest_size(200, 300) == (252, 252)
    assert torch.allclose(upsampled.encode(x).features_BCHW, upsampled.encode(fitting).features_BCHW, atol=1e-3)


def test_balanced_maps_are_those_before_denormalisation():
    upsampled, x = model(), images(168, 168)
    balanced = upsampled.encode(x, denormalize=False).features_BCHW
    again = upsampled.saved.sharpener.denormalize(balanced)
    assert torch.equal(upsampled.encode(x).features_BCHW, again)
    assert not torch.allclose(balanced, again, atol=0.1)


def test_a_cap_on_the_teachers_batch_changes_nothing():
    x = images(168, 168, batch=2)
    one, other = model().encode(x), model(chunk=3).encode(x)
    assert torch.allclose(one.features_BCHW, other.features_BCHW, atol=1e-4)
    assert torch.allclose(one.summary_BC, other.summary_BC, atol=1e-4)


def test_the_teacher_computes_in_its_own_precision_whatever_the_network_around_it_does():
    saved, seen = made(), []
    teacher = load_teacher(saved.card).to("cpu", torch.bfloat16)
    teacher.net.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    Upsampled(teacher, saved).encode(images(168, 168))
    assert seen == [False]


def test_bytes_are_images_too():
    x = (images(168, 168) * 255).byte()
    assert torch.equal(model().encode(x).features_BCHW, model().encode(x.float() / 255).features_BCHW)


def test_a_summary_is_the_teachers_own():
    upsampled, x = model(), images(168, 168)
    assert torch.equal(upsampled.summarise(x), upsampled.teacher.encode(x).summary_BC)


def test_a_missing_summary_is_none_and_told_where_it_is_asked_for():
    upsampled, x = model("toy_sam", kind="bilinear"), images(384, 384)
    assert upsampled.encode(x).summary_BC is None
    with pytest.raises(TeacherError, match="teacher 'toy_sam' has no summary, only features; take their mean"):
        upsampled.summarise(x)


@pytest.mark.parametrize(("height", "width"), [(60, 168), (168, 83)])
def test_an_image_smaller_than_a_tile_is_refused(height, width):
    with pytest.raises(TeacherError, match=rf"image of {height}x{width} px is smaller than one tile .* at 3x \(84x84 px\)"):
        model(factor=3).encode(images(height, width))


def test_an_upsampler_of_another_teacher_is_refused():
    with pytest.raises(
        TeacherError, match=r"trained for teacher 'toy_clip' and is asked to serve 'toy_siglip', which differs .*weights"
    ):
        Upsampled(load_teacher(load_card("toy_siglip")), made("toy_clip"))


def test_another_size_is_refused_only_where_the_teacher_takes_one():
    with pytest.raises(TeacherError, match=r"asked to serve 'toy_clip', which differs \(size: 70 -> 84\)"):
        Upsampled(load_teacher(load_card("toy_clip")), dataclasses.replace(made("toy_clip"), size=70))
    dino = Upsampled(load_teacher(load_card("toy_dino")), dataclasses.replace(made("toy_dino"), size=70))
    assert dino.encode(images(140, 140)).features_BCHW.shape[-2:] == (20, 20)


def test_statistics_of_another_width_are_refused():
    from radio_distill.balance import identity
    from radio_distill.config.upsampler import Network
    from radio_distill.upsamplers.sharpener import Sharpener

    with pytest.raises(TeacherError, match="the balancer is for 64 channels, but the upsampler for 96"):
        Sharpener(Network(), 96, (12, 12), identity(64))


def test_weights_without_statistics_are_refused(tmp_path):
    folder = make(tmp_path / "u")
    path = tmp_path / "u" / "upsampler.safetensors"
    save_file({key: x for key, x in load_file(path).items() if key != "balancer.weight"}, path)
    with pytest.raises(CheckpointError, match=r"lacks the statistics of its teacher \(balancer\.weight\)"):
        radio_distill.load_upsampler(folder)


def test_a_saved_upsampler_gives_the_same_maps(tmp_path):
    saved, x = made(seed=3), images(168, 168)
    loaded = load_upsampler(make(tmp_path / "u", seed=3))
    one, other = (Upsampled(load_teacher(s.card), s).encode(x) for s in (saved, loaded))
    assert torch.equal(one.features_BCHW, other.features_BCHW)
    assert loaded.provenance == saved.provenance


def test_torch_hub_loads_teacher_and_upsampler(tmp_path):
    path = make(tmp_path / "u", factor=3)
    hub = torch.hub.load(str(REPO), "upsampler", path, source="local")
    x = images(252, 252)
    ours = Upsampled(load_teacher(load_card("toy_clip")), load_upsampler(path))
    assert torch.equal(hub.encode(x).features_BCHW, ours.encode(x).features_BCHW)


def test_importing_the_package_imports_nothing_else():
    code = "import sys, json, radio_distill; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert not set(loaded) & {"torch", "pydantic", "numpy", "yaml"}
    assert all(hasattr(radio_distill, name) for name in radio_distill.__all__)
    with pytest.raises(AttributeError, match="module 'radio_distill' has no attribute 'load_upsampled'"):
        _ = radio_distill.load_upsampled
