"""The command line: instant help, exit codes, and what the commands that only look print."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from radio_distill import cli
from radio_distill.cli import HANDLERS, main
from radio_distill.errors import DataError, run_and_report


def test_help_imports_neither_torch_nor_pydantic():
    code = (
        "import sys; from radio_distill.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "demo" in out
    loaded = set(out.splitlines()[-1].strip("[]").replace("'", "").split(", "))
    assert not loaded & {"torch", "pydantic", "yaml", "numpy", "rich", "deepspeed"}


def test_a_list_needs_no_torch_and_a_plan_none_of_the_libraries_of_networks():
    code = (
        "import sys; from radio_distill.cli import main\n"
        "main(['list', 'recipes']); main(['list', 'students']); assert 'torch' not in sys.modules\n"
        "import radio_distill.plan.stage, radio_distill.plan.upsampler, radio_distill.doctor\n"
        "print(sorted(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded = set(out.splitlines()[-1].strip("[]").replace("'", "").split(", "))
    assert "torch" in loaded
    assert not loaded & {"timm", "torchvision", "transformers", "open_clip", "deepspeed", "torch._dynamo", "webdataset"}


def test_a_slip_in_an_evaluations_options_is_told_before_torch_is_imported():
    code = (
        "import sys; from radio_distill.eval.__main__ import main\n"
        "try: main(['--suite', 'imagenets', '--model', 'x'])\nexcept SystemExit as error: assert error.code == 2\n"
        "print(sorted(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "no suite 'imagenets'" in out.stderr
    assert not set(out.stdout.splitlines()[-1].strip("[]").replace("'", "").split(", ")) & {"torch", "timm", "numpy"}


def test_python_dash_m_is_the_same_command():
    out = subprocess.run(
        [sys.executable, "-m", "radio_distill", "--version"], capture_output=True, text=True, check=True
    ).stdout
    assert out.startswith("radio-distill ")


def test_every_command_has_a_handler_and_every_handler_a_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"\n    {command}" in shown for command in HANDLERS)


IMPORTS = re.findall(r"^    from (\.\S+) import (\w+)", Path(cli.__file__).read_text(), re.MULTILINE)


@pytest.mark.parametrize(("module", "name"), [pair for pair in IMPORTS if pair[0] != "."])
def test_what_a_handler_imports_exists(module, name):
    assert hasattr(importlib.import_module(module, "radio_distill"), name)


def test_an_error_the_user_can_mend_has_no_traceback_and_gives_2(capsys):
    def fail():
        raise DataError("no shards")

    assert run_and_report(fail) == 2
    assert capsys.readouterr().err == "error: no shards\n"


def test_an_interrupt_gives_130(capsys):
    def interrupt():
        raise KeyboardInterrupt

    assert run_and_report(interrupt) == 130


def test_an_error_of_ours_keeps_its_traceback():
    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_and_report(fail)


def test_a_wrong_recipe_is_told_before_anything_starts(capsys):
    assert main(["train", "toy/stage1", "optim.stps=3"]) == 2
    err = capsys.readouterr().err
    assert "override optim.stps=3: unknown key 'optim.stps', did you mean 'steps'?" in err


def test_settings_may_follow_flags(capsys):
    assert main(["train", "toy/stage1", "--ranks", "2", "optim.stps=3"]) == 2
    assert "unknown key 'optim.stps'" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["list", "--foo"], ["plan", "toy/stage1", "--gpu-count=3"], ["list", "a=b"]])
def test_an_unknown_flag_is_refused(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_a_count_is_a_positive_number(capsys):
    with pytest.raises(SystemExit):
        main(["train", "toy/stage1", "--ranks", "0"])
    assert "'0', expected a whole number of at least 1" in capsys.readouterr().err


def test_demo_names_its_settings(capsys):
    assert main(["demo", "image=x"]) == 2
    assert "demo has no setting 'image'; expected images=FOLDER or run=FOLDER" in capsys.readouterr().err


def test_plan_prints_text_or_json(capsys):
    assert main(["plan", "toy/stage2", "--gpus", "2"]) == 0
    assert "toy_siglip" in capsys.readouterr().out
    assert main(["plan", "toy/stage2", "--gpus", "2", "--json", "optim.steps=7"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 7


def test_list_shows_cards_recipes_and_students(capsys):
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("dfn_clip", "toy/stage1", "vit_large_patch16_224"))
    assert main(["list", "recipes"]) == 0
    assert "dfn_clip  " not in capsys.readouterr().out
    assert main(["list", "vlms"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("vlm/llava15_projector", "128 conversations", "toy/vlm_sft"))


def test_doctor_without_a_recipe_looks_at_the_machine(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("python", "torch 2", "cpu", "collectives", "HF_HUB_OFFLINE="))
    assert "MISSING" not in shown


def test_doctor_says_what_is_missing_and_how_to_get_it(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    code = main(["doctor", "stage1", "balance.path=nowhere", "data.sources.a.path=nothing_here", f"run={tmp_path}/run"])
    shown = " ".join(capsys.readouterr().out.split())
    assert code == 1
    assert "teacher sam MISSING on a machine with a network: hf download" in shown
    assert "balancers MISSING no folder nowhere; make it with `radio-distill stats`" in shown
    assert "images a MISSING data.sources.a: nothing_here does not exist" in shown
    assert "disk ok" in shown


def test_doctor_reads_the_images(capsys, tmp_path):
    from PIL import Image

    for i in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    main(["doctor", "toy/stage1", f"data.sources.a.path={tmp_path}"])
    assert "3 images; first and last can be read" in capsys.readouterr().out


def test_doctor_tells_what_was_left_out_and_which_shards_are_cut(capsys, tmp_path):
    from radio_distill.data.shards import make_shards

    (tmp_path / "photos").mkdir()
    for i in range(8):
        (tmp_path / "photos" / f"{i}.jpg").write_bytes(b"x" * 700)
    for name in ("a.heic", "._0.jpg"):
        (tmp_path / "photos" / name).write_bytes(b"x")
    *_, last = make_shards(tmp_path / "photos", tmp_path / "shards", count=4)
    last.write_bytes(last.read_bytes()[: 3 * 1536])
    (tmp_path / "shards" / "000000.tar.md5").write_text("")
    main(["doctor", "toy/stage1", *(f"data.sources.{name}.path={tmp_path}/{name}" for name in ("photos", "shards"))])
    said = " ".join(capsys.readouterr().out.split())
    assert "8 images; first and last can be read; left out: 1 .heic, which is an image format" in said
    assert "2 shards; first and last can be read; 1 of 2 shards looked at stop without an end: they are cut" in said
    assert "left out: 1 .md5 (000000.tar.md5)" in said
    last.write_bytes(b"<html>" * 500)
    main(["doctor", "toy/stage1", f"data.sources.shards.path={tmp_path}/shards"])
    assert "images shards MISSING 000001.tar: no tar header at byte 0" in " ".join(capsys.readouterr().out.split())


def test_doctor_wants_the_earlier_stage(capsys, tmp_path):
    assert main(["doctor", "toy/stage2", f"start.source={tmp_path}/none"]) == 1
    assert "train that stage first" in " ".join(capsys.readouterr().out.split())
