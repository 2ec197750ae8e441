"""Metrics of upsamplers against tensors of the reference implementation, found by globbing."""

import json

import pytest
import torch
from conftest import golden_cases
from safetensors import safe_open
from safetensors.torch import load_file

from radio_distill.balance import identity
from radio_distill.types import VisionOutput
from radio_distill.upsamplers.crf import CrfKernel, crf
from radio_distill.upsamplers.metrics import Fidelity, masked_error, overtiling, total_variation
from radio_distill.upsamplers.mmd import bandwidth, map_mmd, mmd, pick_descendants

PUBLISHED = pytest.mark.parametrize("path", golden_cases("featsharp/metrics*.safetensors"), ids=lambda p: p.stem)
FROM_PAPER = pytest.mark.parametrize("path", golden_cases("metrics/fidelity*.json"), ids=lambda p: p.stem)


def _close(got, ref, tolerance=2e-5):
    return abs(float(got) - float(ref)) < tolerance * max(1, abs(float(ref)))


def _groups(g, prefix):
    """Names of the cases `prefix.NAME.*` of a file."""
    return sorted({key.split(".")[1] for key in g if key.startswith(prefix + ".") and key.count(".") > 1})


@PUBLISHED
def test_total_variation_is_the_published_one(path):
    g = load_file(path)
    for case in _groups(g, "tv"):
        x, valid, scale = (g[f"tv.{case}.{key}"] for key in ("x", "valid", "scale"))
        few = torch.zeros_like(valid)
        few[..., :3] = 1  # how the file's `mostly_invalid` case was made
        assert _close(total_variation(x, valid, scale, least=0.5), g[f"tv.{case}.loss"])
        assert _close(total_variation(x, valid, least=0.5), g[f"tv.{case}.raw"])
        assert _close(total_variation(x, few, scale, least=0.5), g[f"tv.{case}.mostly_invalid_loss"])
        assert _close(total_variation(x, few, least=0.5), g[f"tv.{case}.mostly_invalid_raw"])


@PUBLISHED
def test_crf_is_the_published_one(path):
    g = load_file(path)
    with safe_open(path, "pt") as file:
        kernel = CrfKernel(**json.loads(file.metadata()["config"])["crf"])
    for case in _groups(g, "crf"):
        x, valid, scale = (g[f"tv.{case}.{key}"] for key in ("x", "valid", "scale"))

        def value(x=x, valid=valid, guidance=g[f"crf.{case}.guidance"], **options):
            return crf(x, guidance, torch.arange(len(x)), valid_B1HW=valid, least=0.5, **options)

        assert _close(value(scale_B1HW=scale, kernel=kernel), g[f"crf.{case}.loss"])
        assert _close(value(kernel=kernel), g[f"crf.{case}.raw"])
        other = {"kernel": kernel._replace(w2=3, shift=0.1), "distance": "smooth_l1"}
        assert _close(value(scale_B1HW=scale, **other), g[f"crf.{case}.w2_3_shift_smoothl1_loss"])
        assert _close(value(**other), g[f"crf.{case}.w2_3_shift_smoothl1_raw"])


@PUBLISHED
def test_mmd_is_the_published_one(path):
    g = load_file(path)
    for case in (name for name in _groups(g, "mmd") if name != "sets"):
        low, high = g[f"mmd.{case}.lr"], g[f"mmd.{case}.hr"]
        picked = g[f"mmd.{case}.picked_index"].view(len(low), -1)
        factor = high.shape[2] // low.shape[2]
        cells = torch.nn.functional.unfold(high, factor, stride=factor).unflatten(1, (high.shape[1], -1)).permute(0, 3, 2, 1)
        assert torch.equal(pick_descendants(low, high, "farthest"), cells.take_along_dim(picked[..., None, None], 2)[:, :, 0])
        assert _close(bandwidth(low.movedim(1, -1).flatten(0, 2), "median_with_zeros"), g[f"mmd.{case}.gamma"])
        assert _close(map_mmd(low, high, pick="farthest", kind="median_with_zeros"), g[f"mmd.{case}.value"])
    x, y = g["mmd.sets.x"], g["mmd.sets.y"]
    assert _close(mmd(x, y, bandwidth(x, "median_with_zeros")), g["mmd.sets.value"])
    assert _close(mmd(x, y, 0.05), g["mmd.sets.value_gamma_0.05"])


@PUBLISHED
def test_fidelity_of_a_step_is_the_published_one(path):
    g = load_file(path)
    for case in _groups(g, "fidelity"):
        error = masked_error(g["fidelity.pred"], g["fidelity.target"], g[f"fidelity.{case}.valid"], least=0.5)
        assert _close(error, g[f"fidelity.{case}.masked_mse"])
        assert _close(g["fidelity.variance"] / error, g[f"fidelity.{case}.value"])


@FROM_PAPER
def test_definitions_of_the_paper_give_the_expected_numbers(path):
    facts, t = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
    expected, tolerance = facts["expected"], facts["tolerance"]["rel"]
    seeds, mask = torch.arange(len(t["in.X"])), t["in.hr_mask"]
    fidelity = Fidelity(identity(t["in.X"].shape[1]))
    for one in range(len(t["in.X"])):
        fidelity.update(t["in.X"][one : one + 1], t["in.Y"][one : one + 1])
    masked = masked_error(t["in.X"], t["in.Y"], t["in.mask"], least=0.5)
    low = t["in.Y"].movedim(1, -1).flatten(0, 2)
    got = {
        "fidelity": fidelity.value,
        "mse": fidelity.error,
        "mean_channel_variance": fidelity.variance,
        "fidelity_masked": fidelity.variance / masked,
        "tv_smooth_l1": total_variation(t["in.hr"]),
        "tv_smooth_l1_masked": total_variation(t["in.hr"], mask, least=0.5),
        "crf_mse_all_pixels": crf(t["in.hr"], t["in.guidance"], seeds),
        "crf_mse_all_pixels_masked": crf(t["in.hr"], t["in.guidance"], seeds, valid_B1HW=mask, least=0.5),
        "mmd_gamma": bandwidth(low, "median_with_zeros"),
        "mmd_unbiased_gamma_half_inv_median_sq": map_mmd(t["in.Y"], t["in.hr"], kind="median_with_zeros"),
        "mmd_unbiased_gamma_0.05": mmd(low, t["in.hr"].movedim(1, -1).flatten(0, 2), 0.05),
        "mmd_block_paired": map_mmd(t["in.Y"], t["in.hr"], pick="farthest", kind="median_with_zeros"),
    }
    for name, value in got.items():
        assert float(value) == pytest.approx(expected[name], rel=tolerance), name


@pytest.mark.parametrize("path", golden_cases("metrics/overtiling*.json"), ids=lambda p: p.stem)
def test_overtiling_is_the_published_one(path):
    facts, t = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
    side, patch = facts["native_side"], facts["patch"]

    def encode(images):
        patches, mean = torch.nn.functional.avg_pool2d(images, patch), images.mean((2, 3), keepdim=True)
        return VisionOutput(None, torch.cat([patches, (patches - mean).abs() + mean], dim=1))

    for name, value in facts["expected"].items():
        got = overtiling(encode, t["in.images"], (side, side), int(name.split("_")[-1]), antialias=False)
        assert float(got) == pytest.approx(value, rel=facts["tolerance"]["rel"], abs=facts["tolerance"]["abs"]), name
