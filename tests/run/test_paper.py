"""`radio-distill paper`: a tenth-size version of every table and figure, on upsamplers and students that are there already."""

import dataclasses
import os
import re
from pathlib import Path

import pytest
import torch
from made_run import make_run
from made_upsampler import made
from PIL import Image

from radio_distill.cli import main
from radio_distill.errors import CardError, RadioDistillError
from radio_distill.eval.published import tasks
from radio_distill.paper.card import OWN, Row, load_entry, load_paper, parse_row
from radio_distill.paper.command import make
from radio_distill.paper.desk import STUDENTS, Desk
from radio_distill.paper.measured import evaluate
from radio_distill.results import read
from radio_distill.upsamplers.folder import save_upsampler

ENTRIES = load_paper().entries


@pytest.fixture(scope="session")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """One tiny student under five names; upsamplers and a VLM are put beside it by `provide`."""
    desk = Desk(tmp_path_factory.mktemp("paper"), quick=True)
    make_run(desk.student_folder("baseline"))
    for name in STUDENTS:
        if name != "baseline":
            os.symlink(desk.student_folder("baseline"), desk.student_folder(name))
    return desk


def provide(name: str, desk: Desk) -> None:
    """The toy upsamplers that an entry names, and the VLM of Tables 2 and 6, untrained."""
    if name in ("table2", "table6"):
        provide_vlms(desk)
    for teacher in desk.of(ENTRIES[name]):
        for row in desk.rows(ENTRIES[name]):
            if row.name != OWN and not (folder := desk.upsampler_folder(teacher, row)).exists():
                save_upsampler(made(teacher, **desk.network(teacher, row).model_dump()), folder)


def provide_vlms(desk: Desk) -> None:
    """The tiny student and a tiny language model of random weights, under the name of every student."""
    from radio_distill.config.vlm_recipe import FromParts
    from radio_distill.vlm.model import build_vlm, save_vlm
    from radio_distill.vlm.toy_lm import write_toy_lm

    lm, first = desk.run / "lm", desk.toys / "vlms" / "baseline"
    if first.exists():
        return
    write_toy_lm(lm, width=32, depth=1, steps=0)
    torch.manual_seed(0)
    save_vlm(build_vlm(FromParts(kind="parts", student=str(desk.student("baseline")), lm=str(lm), size=32, unshuffle=2)), first)
    for name in STUDENTS:
        if name != "baseline":
            os.symlink(first, first.with_name(name))


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, desk: Desk) -> None:
    monkeypatch.setenv("RADIO_DISTILL_CACHE", str(desk.run / "cache"))


@pytest.mark.parametrize("name", ENTRIES)
def test_every_table_and_figure_is_made(name: str, desk: Desk) -> None:
    """Each has its text, with a table, a picture or a curve in it, and nothing is trained."""
    provide(name, desk)
    text, *pictures = make(name, desk)
    words = text.read_text()
    assert words.startswith(f"# {name}: {ENTRIES[name].title}")
    assert "| --- |" in words or pictures
    assert "nan" not in words
    assert str(desk.run) not in words  # rows are named, not given as paths
    for picture in pictures:
        assert picture.name in words
        assert 0 < picture.stat().st_size < 2_000_000
        if picture.suffix == ".png":
            assert torch.tensor(Image.open(picture).getextrema()).diff(dim=1).min() > 50  # not one colour
    assert not desk.scenes_folder.exists()  # nothing was trained


def test_what_is_measured_is_kept_and_shared(desk: Desk) -> None:
    provide("figure13", desk)
    make("figure13", desk)
    before = len(read(desk.results))
    make("figure13", desk)
    assert len(read(desk.results)) == before


def test_gains_are_of_all_groups_and_a_copy_of_the_baseline_gains_nothing(desk: Desk) -> None:
    words = _table2(desk)
    (table,) = re.findall(r"gain in percent over baseline\n(.*?)```", words, re.DOTALL)
    gains = dict(re.findall(r"^(\w.*?) +([+-][\d.]+)\*?$", table, re.MULTILINE))
    assert set(gains.values()) == {"+0.00"}
    assert {"mean of groups", *(str(column.group) for column in tasks().values())} - set(gains) == {"vila"}
    assert "toy_mean_accuracy" in words  # left out: a language model of random weights answers nothing right


def _table2(desk: Desk) -> str:
    """As it was made above, or made now."""
    made = desk.run / "table2.md"
    if not made.exists():
        provide("table2", desk)
        make("table2", desk)
    return made.read_text()


def test_short_toys_lie_apart_and_are_never_taken_for_trained_ones(tmp_path: Path) -> None:
    desks = [Desk(tmp_path), Desk(tmp_path, steps=7), Desk(tmp_path, quick=True)]
    assert [desk.toys for desk in desks] == [tmp_path, tmp_path / "steps-7", tmp_path / "quick"]
    assert [desk.scenes_folder for desk in desks] == [tmp_path / "scenes", tmp_path / "scenes", tmp_path / "quick" / "scenes"]


def test_seeds_that_were_measured_before_are_shown_together(desk: Desk) -> None:
    other = dataclasses.replace(desk, seed=1)
    alone = evaluate(desk, "classification", ["imagenet1k_knn"], str(desk.student("baseline")))
    both = evaluate(other, "classification", ["imagenet1k_knn"], str(desk.student("baseline")))
    assert {r.seed for r in alone} == {0}
    assert "cost" not in {r.suite for r in read(desk.results)}  # to time a toy takes longer than its task
    assert {r.seed for r in both} == {0, 1}
    assert {r.model for r in both} == {r.model for r in alone}


def test_a_toy_upsampler_is_trained_when_it_is_missing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["paper", "figure11", f"run={tmp_path}", "quick=true"]) == 0
    assert capfd.readouterr().out.split()[-2:] == [f"{tmp_path}/figure11.md", f"{tmp_path}/figure11.png"]
    assert (tmp_path / "quick" / "upsamplers" / "toy_dino-featsharp-2x" / "checkpoints" / "latest").exists()


def test_steps_shorten_toy_vlms_in_proportion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr("radio_distill.paper.desk._train", lambda recipe, overrides: asked.append(overrides))
    monkeypatch.setattr(Desk, "student", lambda *_: tmp_path)
    monkeypatch.setattr("radio_distill.vlm.toy.write_toy", lambda *_, **__: None)
    Desk(tmp_path, steps=6).vlm("baseline")
    steps = [dict(x.split("=", 1) for x in overrides)["optim.steps"] for overrides in asked]
    assert steps == ["80", "30"]  # of 800 and 300


def test_upsamplers_of_real_teachers_are_listed_with_their_commands(tmp_path: Path) -> None:
    with pytest.raises(RadioDistillError) as told:
        make("table13", Desk(tmp_path, teachers=("dfn_clip",)))
    lines = str(told.value).splitlines()
    assert lines[0].startswith("4 upsamplers of dfn_clip are not in")  # random weights need none of their own
    assert "teacher=dfn_clip size=378 preset=paper network.factor=2 network.kind=featup" in lines[1]
    assert f"run={tmp_path / 'upsamplers' / 'dfn_clip-featup-2x'} --ranks 8" in lines[1]
    with pytest.raises(RadioDistillError, match=r"expected the run of stage3 \(or a link to it\) there"):
        make("figure9", Desk(tmp_path, students=str(tmp_path)))


def test_the_command_that_is_listed_loads() -> None:
    from radio_distill.config.load import load_upsampler_recipe

    settings = [
        "name=x",
        "teacher=siglip",
        "size=378",
        "preset=paper",
        "network.factor=4",
        *load_paper().upsamplers["featsharp"],
    ]
    recipe = load_upsampler_recipe("upsampler/dfn_clip_2x", [*settings, "data.sources.sa1b.path=x/{0000..0001}.tar"])
    assert (recipe.teacher, recipe.network.factor, recipe.network.inputs, recipe.optim.steps) == (
        "siglip",
        4,
        ("jbu", "tiles"),
        9000,
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tabel1"], "the paper has no 'tabel1', did you mean 'table1'"),
        (["table1", "teacher=toy_dino"], "unknown setting 'teacher', did you mean 'teachers'"),
        (["table1", "steps=0"], "steps=0, expected a whole number of at least 1"),
        (["table1", "quick=yes"], "quick=yes, expected true or false"),
        (["table3", "students=/nowhere"], "students=/nowhere is no folder"),
        (["figure15", "teachers=toy_clip"], "teacher toy_clip takes 84 px only"),
    ],
)
def test_wrong_use_is_told(arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["paper", *arguments, f"run={tmp_path}"]) == 2
    assert words in capsys.readouterr().err


def test_rows_of_the_card() -> None:
    assert parse_row("own") == Row("own", 1, 1)
    assert parse_row("jbu-tiles@4x3") == Row("jbu-tiles", 4, 3)
    assert parse_row("jbu-tiles@4x3").label == "jbu-tiles-4x-long"
    with pytest.raises(ValueError, match="is no row"):
        parse_row("featsharp@99")
    with pytest.raises(CardError):
        load_entry("figure2")


def run_in_the_docs(repo: Path) -> dict[str, str]:
    """Entry -> settings of the command that made what is under its heading."""
    page = (repo / "docs" / "paper_results.md").read_text()
    runs = {}
    for name, command, shown in re.findall(
        r"^## (\w+)\n\n    radio-distill paper (.*)\n((?:(?!## ).*\n)*)", page, re.MULTILINE
    ):
        names = [word for word in command.split() if "=" not in word]
        assert name in names
        assert set(names) <= set(ENTRIES)
        assert "| --- |" in shown or f"(images/paper_{name}" in shown
        for image in re.findall(r"\((images/.*?)\)", shown):
            assert (repo / "docs" / image).stat().st_size < 150_000
        runs[name] = " ".join(word for word in command.split() if "=" in word)
    assert len(runs) == page.count("\n## ")
    return runs


def test_every_table_and_figure_has_an_entry_and_a_line_in_the_docs(repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = {f"table{n}" for n in range(1, 15)} | {f"figure{n}" for n in (1, *range(4, 17))}
    assert set(ENTRIES) == wanted
    lines = (repo / "docs" / "paper.md").read_text().splitlines()
    runs = run_in_the_docs(repo)
    for name, entry in ENTRIES.items():
        (line,) = [line for line in lines if line.startswith(f"| `{name}` |")]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[1:3] == [entry.title, str(entry.toy_minutes)]
        assert cells[3].startswith(entry.needs)
        assert cells[4] == (entry.ours or "-")
        assert cells[5] == (runs[name] or "full")
    assert main(["paper"]) == 0
    listed = capsys.readouterr().out
    assert all(f"{name} " in listed and entry.title in listed for name, entry in ENTRIES.items())
