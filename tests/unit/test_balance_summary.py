"""`balance.summary: standardize`: class tokens by coordinate, as EUPE learns them; exports give the teacher's own."""

from pathlib import Path

import pytest
import torch

from radio_distill.balance import identity, load_balancers, save_balancers
from radio_distill.balance.window import StatisticsWindow
from radio_distill.config.load import load, load_card, load_recipe
from radio_distill.config.recipe import StageBalance
from radio_distill.config.recipe import Student as Spec
from radio_distill.distill.training import export_student
from radio_distill.errors import RecipeError
from radio_distill.network.arch import AdaptorSlot
from radio_distill.student.build import build_student
from radio_distill.student.checkpoints import load_saved
from radio_distill.student.plain import fold_summary
from radio_distill.types import VisionOutput

WIDE = torch.tensor([1e-2, 1.0, 50.0, 3.0, *[1.0] * 92])


def outputs(count: int, seed: int) -> VisionOutput:
    draw = torch.Generator().manual_seed(seed)
    return VisionOutput(torch.randn(count, 96, generator=draw) * WIDE + 7, torch.randn(count, 96, 2, 2, generator=draw))


def window(*parts: VisionOutput) -> StatisticsWindow:
    made = StatisticsWindow(StageBalance(), {"dino": load_card("toy_dino")}, torch.device("cpu"), summaries=True)
    for part in parts:
        made.observe({"dino": part})
    return made


def test_summaries_have_mean_zero_and_deviation_one_in_every_coordinate(tmp_path: Path) -> None:
    parts = [outputs(20, seed) for seed in range(3)]
    summaries_BC = torch.cat([part.summary_BC for part in parts if part.summary_BC is not None])
    balancer = window(*parts).refit({})["dino"]
    std_C, mean_C = torch.std_mean(summaries_BC.double(), 0)
    torch.testing.assert_close(balancer.summary(summaries_BC).double(), (summaries_BC - mean_C) / std_C, rtol=1e-4, atol=1e-4)
    save_balancers(tmp_path, {"dino": balancer})
    assert torch.equal(load_balancers(tmp_path)["dino"].summary(summaries_BC), balancer.summary(summaries_BC))


def test_a_resumed_window_and_two_ranks_have_the_same_sums() -> None:
    parts = [outputs(20, seed) for seed in range(3)]
    whole, resumed = window(*parts), window()
    resumed.add(window(*parts[:2]).state())
    resumed.observe({"dino": parts[2]})
    assert all(torch.equal(x, y) for x, y in zip(whole.state().values(), resumed.state().values(), strict=True))
    merged = window(parts[2])
    merged.add(window(*parts[:2]).state())
    balancers = [w.refit({})["dino"] for w in (whole, merged)]
    for x, y in zip(*[b.summary_affine() for b in balancers]):  # type: ignore[arg-type]
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


def test_without_it_nothing_is_gathered_or_changed() -> None:
    plain = StatisticsWindow(StageBalance(), {"dino": load_card("toy_dino")}, torch.device("cpu"))
    part = outputs(9, 0)
    plain.observe({"dino": part})
    balancer = plain.refit({})["dino"]
    assert part.summary_BC is not None
    assert balancer.summary(part.summary_BC) is part.summary_BC
    assert balancer.summary_affine() is None
    assert not [name for name in plain.state() if name.startswith("summaries")]


@torch.no_grad()
def test_exports_predict_the_teachers_own_summaries_and_the_next_stage_starts_from_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    overrides = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4}
    spec = Spec(model="vit_tiny_patch16_224", overrides=overrides, max_size=32, spectral=False)
    student = build_student(spec, [AdaptorSlot("dino", 96, 96, True)]).eval()
    balancer = window(outputs(20, 0)).refit({})["dino"]
    export_student(student, student.state_dict(), {"dino": balancer}, tmp_path / "student")
    images = torch.rand(2, 3, 16, 16)
    learned = student.encode_adaptors(images)["dino"].summary_BC
    exported = load_saved(tmp_path / "student").eval()
    raw = exported.encode_adaptors(images)["dino"].summary_BC
    assert learned is not None
    assert raw is not None
    torch.testing.assert_close(balancer.summary(raw), learned, rtol=1e-4, atol=1e-4)
    fold_summary(exported.adaptor("dino"), balancer.summary_affine())
    again = exported.encode_adaptors(images)["dino"].summary_BC
    torch.testing.assert_close(again, learned, rtol=1e-4, atol=1e-4)


def test_statistics_without_summaries_are_refused(tmp_path: Path) -> None:
    from radio_distill.distill.build import _with_summary

    recipe = load_recipe("toy/proxy", [f"balance.path={tmp_path}", "balance.window=0", "balance.ahead=false"])
    assert recipe.balance.summary == "standardize"
    with pytest.raises(
        RecipeError, match=r"no statistics of the summaries of 'toy_dino'; make them with `radio-distill stats`"
    ):
        _with_summary(recipe, load_card("toy_dino"), identity(96))
    off = load_recipe("toy/proxy", ["balance.summary=none"])
    own = window(outputs(20, 0)).refit({})["dino"]
    assert _with_summary(off, load_card("toy_dino"), own).summary_affine() is None
    sam = identity(64)
    assert _with_summary(recipe, load_card("toy_sam"), sam) is sam  # it has no summary


def test_angles_over_the_teachers_dispersion_do_not_go_with_it() -> None:
    with pytest.raises(RecipeError, match=r"which balance\.summary=standardize changes; set one of the two back"):
        load_recipe("toy/stage1", ["balance.summary=standardize", "loss.summary=angle"])


def test_upsamplers_have_no_such_field() -> None:
    with pytest.raises(RecipeError, match="summary"):
        load("toy/upsampler/toy_clip", ["balance.summary=standardize"])
