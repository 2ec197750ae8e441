"""The fidelity suite: what is measured, that it depends on nothing else, the tables beside the paper's, the command line."""

import dataclasses
import logging

import numpy as np
import pytest
import torch
from made_upsampler import made, make

from radio_distill.align import resize_map
from radio_distill.config.load import load_card
from radio_distill.config.upsampler import Network
from radio_distill.data.held_out import HeldOut
from radio_distill.data.jitter import draw_matrices, warp_views
from radio_distill.errors import CardError, CheckpointError, RadioDistillError, TeacherError
from radio_distill.eval.__main__ import main, read
from radio_distill.eval.fidelity import FIRST_SEED, FidelityProtocol, Measured, measure, measured_of, to_results
from radio_distill.eval.fidelity_tables import method, render
from radio_distill.eval.report import write_report
from radio_distill.fingerprint import fingerprint
from radio_distill.homography import covered, warp
from radio_distill.results import append
from radio_distill.teachers.base import load_teacher
from radio_distill.upsamplers.folder import save_upsampler

PROTOCOL = FidelityProtocol(images=3, batch=2, fine=2, levels=(2,))


def values(protocol=PROTOCOL, **models):
    found = measure(models, HeldOut("toy", protocol.images), protocol)
    return {m.model: m.values for m in found}


def pairs(saved):
    """Raw predictions and targets of all valid cells with the bias map and without, one image and one view after the other."""
    teacher, sharpener = load_teacher(saved.card), saved.sharpener
    for i in range(PROTOCOL.images):
        fine = HeldOut("toy", 3).images(i, i + 1, 2 * saved.size)
        matrices = draw_matrices(torch.tensor([FIRST_SEED + i]), PROTOCOL.jitter, (12, 12))
        seen = warp_views(fine, matrices, (84, 84))
        high = sharpener(teacher.forward, teacher.normalize(resize_map(fine, (168, 168))), (84, 84)).high_BCHW
        for matrix, view in zip(matrices.float(), seen):
            balanced = sharpener.balancer.forward(teacher.encode(view).features_BCHW)
            pred = saved.downsampler(warp(high, matrix, (24, 24)), (12, 12))
            bias, cells = sharpener.bias_buffer.buffer, covered(matrix, (12, 12))[0, 0]
            for x in ((pred, balanced + bias), (pred - bias, balanced)):
                yield [sharpener.denormalize(m)[0, :, cells].T.double().numpy() for m in x]


def test_fidelity_is_total_variance_over_total_error_in_raw_units():
    saved = made(factor=2)
    got = values(model=saved)["model"]
    found = list(pairs(saved))
    for name, chosen in (("fidelity", found[::2]), ("fidelity_plain", found[1::2])):
        pred, target = (np.concatenate(x) for x in zip(*chosen))
        assert got[name] == pytest.approx(((target - target.mean(0)) ** 2).sum() / ((pred - target) ** 2).sum(), rel=1e-4)


def test_true_fidelity_asks_for_the_teachers_own_map_of_the_whole_image():
    saved = made("toy_dino", factor=2)
    teacher, sharpener, pairs_ = load_teacher(saved.card), saved.sharpener, []
    for i in range(PROTOCOL.images):
        image = HeldOut("toy", 3).images(i, i + 1, 2 * saved.size)
        pixels = teacher.normalize(image)
        high = sharpener(teacher.forward, pixels, (saved.size,) * 2).high_BCHW
        bias = resize_map(sharpener.bias_buffer.buffer, (24, 24))
        pairs_.append((sharpener.denormalize(high - bias), teacher.encode(image).features_BCHW))
    pred, target = (torch.cat(x).double().flatten(2).transpose(1, 2).flatten(0, 1).numpy() for x in zip(*pairs_))
    got = values(model=saved)["model"]["fidelity_true"]
    assert got == pytest.approx(((target - target.mean(0)) ** 2).sum() / ((pred - target) ** 2).sum(), rel=1e-4)


def test_a_teacher_of_one_size_and_a_map_of_the_same_grid_have_no_true_fidelity():
    got = values(clip=made(factor=2), same=made("toy_dino", factor=1, kind="tile"))
    assert not any("fidelity_true" in of_model for of_model in got.values())


def test_plain_fidelity_has_the_same_error_and_the_teachers_own_variance():
    """A constant added to the bias map must change neither number; a pattern changes the variance of the own targets alone."""
    flat, pattern = made(kind="bilinear"), made(kind="bilinear")
    flat.sharpener.bias_buffer.buffer.fill_(3.0)
    none = values(a=made(kind="bilinear", debias=False))["a"]
    got = values(a=flat)["a"]
    assert got["fidelity"] == pytest.approx(none["fidelity"], rel=1e-4)
    assert got["fidelity_plain"] == pytest.approx(none["fidelity"], rel=1e-4)
    pattern.sharpener.bias_buffer.buffer.normal_(std=2.0)
    got = values(a=pattern)["a"]
    assert got["fidelity"] > 2 * got["fidelity_plain"]


def test_no_number_depends_on_what_else_is_measured():
    alone = values(a=made(factor=2))
    together = values(b=made(factor=1, kind="tile"), a=made(factor=2), c=made("toy_dino", kind="s2", factor=2))
    assert together["a"] == alone["a"]
    assert list(together) == ["b", "a", "c"]


def test_no_number_depends_on_another_teacher_of_the_same_name_and_weights():
    """Two cards that differ in `std` alone are two teachers: neither may see the other's pixels."""
    usual = made(factor=2)
    card = usual.card.model_copy(update={"input": usual.card.input.model_copy(update={"std": (0.5, 0.5, 0.5)})})
    pale = dataclasses.replace(made(factor=2), card=card)
    together = values(a=usual, b=pale)
    assert together["b"] == values(b=pale)["b"]
    assert together["a"]["fidelity_plain"] != together["b"]["fidelity_plain"]


def test_a_teacher_that_has_changed_since_the_training_is_refused():
    was = fingerprint(load_card("toy_siglip"))
    with pytest.raises(TeacherError, match="trained for teacher 'toy_clip'"):
        values(a=dataclasses.replace(made(factor=2), fingerprint=was))


def test_teachers_encode_shared_views_once(monkeypatch):
    from radio_distill.teachers.base import Teacher

    counts, forward = [], Teacher.forward

    def counted(self, pixels):
        counts.append(len(pixels))
        return forward(self, pixels)

    monkeypatch.setattr(Teacher, "forward", counted)
    values(a=made(factor=2), b=made(factor=2, mixer="linear"), c=made(factor=2, kind="s2"))
    assert counts == [2 * 5, 2 * 5, 5, 5]  # 5 views, and global view with 4 tiles; of 2 images, then of 1 (in either order)


def test_the_published_downsampler_drops_nothing_here():
    saved = made(factor=2, inputs=("jbu", "tiles"), reference=True)
    assert values(a=saved) == values(a=saved)


def test_over_tiling_is_measured_where_the_teacher_takes_larger_images(caplog):
    caplog.set_level(logging.INFO)
    got = values(dino=made("toy_dino", kind="bilinear"), clip=made("toy_clip", kind="bilinear"))
    assert got["dino"]["overtiling_2"] > 0
    assert "overtiling_2" not in got["clip"]
    assert "toy_clip takes 84 px only: over-tiling is not measured" in caplog.text


def test_results_carry_their_protocol():
    rows = list(measure({"runs/a": made(kind="bilinear")}, HeldOut("toy", 3), PROTOCOL))
    results = to_results(rows, HeldOut("toy", 3), PROTOCOL)
    assert {r.task for r in results} == {"toy_clip"}
    assert {r.grid for r in results} == {24}
    assert measured_of(results) == rows
    assert {r.metric for r in results if r.higher_is_better} == {"fidelity", "fidelity_plain", "fidelity_published"}
    assert {(r.suite, r.model, r.dataset, r.count, r.resolution) for r in results} == {
        ("fidelity", "runs/a", "toyworld", 3, 84)
    }
    assert {r.config_hash for r in results} == {PROTOCOL.digest} != {FidelityProtocol().digest}


def row(name, fidelity, *, teacher="toy_clip", steps=100, **network):
    numbers = {"fidelity": fidelity, "fidelity_plain": fidelity - 0.5, "tv": 0.05, "crf": 0.2, "mmd": -0.001}
    return Measured(name, teacher, 84, 12, Network(**network), steps, numbers)


def table(text, number):
    """Row -> column -> cell."""
    part = text.split(f"### Table {number}:")[1].split("\n\n")[1]
    head, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines()]
    assert all(len(line) == len(head) for line in lines)
    return {line[0]: dict(zip(head[1:], line[1:])) for line in lines}


def test_tables_put_ours_beside_the_papers():
    text = render(
        [
            row("a", 2.0), row("b", 3.0), row("c", 1.5, debias=False), row("d", 1.25, debias=False),
            row("e", 1.75, inputs=("bilinear", "jbu", "tiles")), row("f", 1.0, kind="bilinear", factor=4, debias=False),
            row("g", 4.0, mixer="linear", window=5),
        ]
    )  # fmt: skip
    gains = table(text, 7)
    assert gains["toy_clip, Bilinear + Tiles, 100 steps"]["FeatSharp 2x"] == "1.125 +- 0.884 (2 runs)"
    assert gains["toy_clip, Bilinear + Tiles, 100 steps, plain"]["FeatSharp 2x"] == "1.125 +- 0.884 (2 runs)"
    assert gains["SAM-H (paper)"]["FeatUp 4x"] == "-"
    inputs = table(text, 8)
    assert inputs["Bilinear + Tiles"]["SigLIP fidelity (paper)"] == "1.470"
    assert inputs["Bilinear + Tiles"]["toy_clip 2x, 100 steps fidelity"] == "2.500 +- 0.707 (2 runs)"
    assert inputs["Bilinear First"]["toy_clip 2x, 100 steps TV"] == "0.0500"
    assert inputs["Bilinear + Tiles, no de-bias"]["RADIO CRF (paper)"] == "-"
    assert table(text, 9)["Bilinear"]["toy_clip 4x, 100 steps MMD"] == "-0.0010"
    blocks = table(text, 10)
    assert blocks["Linear"]["toy_clip 2x, 100 steps, Bilinear + Tiles, window 5"] == "4.000"
    assert blocks["Attention + MLP"]["RADIO 4x long (paper)"] == "5.711"


def test_tables_without_anything_measured_are_left_out():
    text = render([row("a", 2.0, kind="tile")])
    assert "### Table 8" in text
    assert not any(f"### Table {n}:" in text for n in (7, 9, 10))


def test_methods_are_named_after_what_they_do():
    assert method(Network()) == "Bilinear + Tiles"
    assert method(Network(inputs=("jafar", "tiles"), norm=False, reference=True)) == "JAFAR + Tiles, no norm, reference"
    assert method(Network(kind="s2", beta=0.25, debias=False)) == "S2 alone, no de-bias, beta 0.25"


def test_the_command_line_prints_tables_and_appends_results(tmp_path, capsys):
    model = make(tmp_path / "clip", kind="bilinear")
    assert main(["--suite", "fidelity", "--model", model, "--limit", "2", "--out", str(tmp_path / "r.jsonl")]) == 0
    assert "Bilinear alone" in capsys.readouterr().out
    assert {r.model for r in read(tmp_path / "r.jsonl")} == {model}


def test_what_is_measured_is_written_at_once_and_not_measured_again(tmp_path, capsys):
    """The first upsampler's rows are in the file although the second one's teacher is missing; the next call measures the rest."""
    first, second, out = (
        make(tmp_path / "a", kind="bilinear"),
        make(tmp_path / "b", kind="bilinear", seed=1),
        tmp_path / "r.jsonl",
    )
    facts = tmp_path / "b" / "upsampler.json"
    whole = facts.read_text()
    facts.write_text(whole.replace('"name": "toy_clip"', '"name": "nobody"').replace('"toy/toy_clip.safetensors"', '"gone"'))
    call = ["--suite", "fidelity", "--model", first, "--model", second, "--limit", "2", "--out", str(out)]
    with pytest.raises(RadioDistillError):
        main(call)
    before = read(out)
    assert {r.model for r in before} == {first}
    facts.write_text(whole)
    assert main(call) == 0
    assert read(out)[: len(before)] == before
    assert {r.model for r in read(out)[len(before) :]} == {second}
    printed = capsys.readouterr().out
    assert first in printed
    assert second in printed


def test_tables_of_upsamplers_come_back_from_the_file_of_results(tmp_path):
    rows = [row("a", 2.0), row("b", 3.0), row("c", 1.5, debias=False)]
    append(tmp_path / "results.jsonl", to_results(rows, HeldOut("toy", 3), PROTOCOL))
    write_report(tmp_path)
    words = (tmp_path / "report.md").read_text()
    for number in (7, 8, 10):
        assert table(words, number) == table(render(rows), number)
    assert table(words, 8)["Bilinear + Tiles"]["toy_clip 2x, 100 steps fidelity"] == "2.500 +- 0.707 (2 runs)"
    assert "| a | toy_clip | 84 | 24 | 2x Bilinear + Tiles | 100 | 2.000 | 1.500 | 0.0500 | 0.200 | -0.0010 |" in words
    assert "Table 8" in (tmp_path / "report.html").read_text()


def test_small_numbers_keep_their_digits():
    numbers = {**row("a", 2.0).values, "mmd": 0.0000432}
    assert "| 4.32e-05 |" in render([row("a", 2.0)._replace(values=numbers)])


def test_a_card_of_the_users_lends_an_upsampler_the_code_that_its_folder_may_not_name(tmp_path, monkeypatch, capsys):
    """A teacher with a `loader`: the folder keeps the card as facts, the command names the card itself."""
    (tmp_path / "lent_nets.py").write_text("from radio_distill.teachers.toy import build\n")
    monkeypatch.syspath_prepend(tmp_path)
    toy = load_card("toy_dino")
    card = toy.model_copy(update={"name": "lent", "family": "custom", "loader": "lent_nets:build"})
    (tmp_path / "lent.yaml").write_text(card.model_dump_json())
    save_upsampler(dataclasses.replace(made("toy_dino", kind="bilinear"), card=card), tmp_path / "up")
    call = ["--suite", "fidelity", "--limit", "1", "--out", str(tmp_path / "r.jsonl"), "--model"]
    with pytest.raises(CardError, match="use the card file with the `loader` itself"):
        main([*call, str(tmp_path / "up")])
    assert main([*call, f"teacher:{tmp_path / 'lent.yaml'}+featsharp:{tmp_path / 'up'}"]) == 0
    assert "| lent |" in capsys.readouterr().out
    with pytest.raises(TeacherError, match="trained for teacher 'lent' and is asked to serve 'toy_siglip'"):
        main([*call, f"teacher:toy_siglip+featsharp:{tmp_path / 'up'}"])


def test_wrong_use_of_the_command_line_is_told(tmp_path):
    with pytest.raises(RadioDistillError, match="--resolution has no effect on the upsampler"):
        main(["--suite", "fidelity", "--model", make(tmp_path / "up"), "--resolution", "96"])
    (tmp_path / "empty").mkdir()
    tmp_path /= "empty"
    with pytest.raises(CheckpointError, match=r"holds no checkpoint; expected a run folder"):
        main(["--suite", "fidelity", "--model", str(tmp_path)])
