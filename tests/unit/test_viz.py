"""Pictures: labelled panels, and the rows of `radio-distill viz`."""

import dataclasses

import numpy as np
import torch
from made_upsampler import made, make
from PIL import Image

from radio_distill import viz
from radio_distill.cli import main
from radio_distill.data.held_out import HeldOut
from radio_distill.viz_command import draw_upsamplers


def test_rows_of_a_panel_carry_their_names():
    rows = {"image": torch.zeros(2, 3, 4, 4), "toy_siglip student": torch.zeros(2, 3, 8, 8)}
    labelled = viz.panel(rows, side=64)
    column = labelled.shape[2] - 2 * 68
    pictures = labelled[:, :, column:].unfold(1, 64, 68).unfold(2, 64, 68)  # both rows, both columns
    assert labelled.shape[1] == 2 * 68
    assert not pictures.any()
    assert labelled[:, :, column:].sum() == 3 * ((2 * 68) ** 2 - 4 * 64**2)  # white between them
    names = labelled[:, :, :column].mean(0)
    ink = [(part < 0.5).sum() for part in names.chunk(2)]
    assert 0 < ink[0] < ink[1]  # the longer name has more ink
    assert names[:, 0].min() == names[:, -1].min() == 1  # nothing is cut off


def test_columns_of_a_panel_carry_their_names():
    rows = {"image": torch.zeros(2, 3, 4, 4)}
    plain, headed = viz.panel(rows, side=64), viz.panel(rows, side=64, columns=["48 px", "toy_siglip"])
    assert torch.equal(headed[:, viz.HEAD_PX :], plain)
    left, right = headed[0, : viz.HEAD_PX, -2 * 68 :].chunk(2, dim=1)
    assert 0 < (left < 0.5).sum() < (right < 0.5).sum()
    assert headed[0, : viz.HEAD_PX, : -2 * 68].min() == 1  # nothing over the names of rows


def test_one_set_of_colours_for_all_maps_of_a_teacher():
    upsamplers = [
        made(kind="bilinear", factor=3, debias=False),
        made(kind="tile", factor=2),
        made(kind="tile", factor=2, seed=1),
    ]
    rows = draw_upsamplers([*upsamplers, made("toy_dino", kind="bilinear")], HeldOut("toy", 2))
    assert list(rows) == [
        "image", "toy_clip own", "toy_clip bilinear", "toy_clip 3x Bilinear alone, no de-bias", "toy_clip 2x Tiles alone",
        "toy_clip 2x Tiles alone #2", "toy_dino own", "toy_dino bilinear", "toy_dino Real 2x",
        "toy_dino 2x Bilinear alone",
    ]  # fmt: skip
    assert {tuple(picture.shape) for name, picture in rows.items() if "clip" in name} == {(2, 3, 36, 36)}
    assert torch.allclose(rows["toy_clip bilinear"], rows["toy_clip 3x Bilinear alone, no de-bias"], atol=1e-3)
    assert (rows["toy_clip 2x Tiles alone"] - rows["toy_clip 2x Tiles alone #2"]).abs().max() > 0.01


def test_two_teachers_of_one_name_have_rows_of_their_own():
    usual = made(factor=2)
    card = usual.card.model_copy(update={"input": usual.card.input.model_copy(update={"std": (0.5, 0.5, 0.5)})})
    rows = draw_upsamplers([usual, dataclasses.replace(made(factor=2), card=card)], HeldOut("toy", 1))
    assert {"toy_clip own", "toy_clip #2 own"} <= set(rows)
    assert not torch.equal(rows["toy_clip own"], rows["toy_clip #2 own"])


def test_the_command_draws_a_file(tmp_path, capsys):
    Image.fromarray(np.full((90, 120, 3), 99, np.uint8)).save(tmp_path / "a.png")
    model, out = make(tmp_path / "u", kind="bilinear"), tmp_path / "new" / "v.png"
    assert main(["viz", model, "--images", str(tmp_path / "a.png"), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert Image.open(out).height == 4 * 228  # image, own map, bilinear, upsampler


def test_what_the_command_cannot_draw_is_told(tmp_path, capsys):
    model = make(tmp_path / "u", kind="bilinear")
    assert main(["viz", model, "--images", "toy", "--out", "v.jpg"]) == 2
    assert "--out is 'v.jpg', expected a name that ends in .png" in capsys.readouterr().err
    assert main(["viz", model, "--images", str(tmp_path / "none"), "--out", "v.png"]) == 2
    assert "does not exist" in capsys.readouterr().err
