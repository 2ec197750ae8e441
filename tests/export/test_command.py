"""The command: complete or not there, model card, checksums, provenance, and errors."""

import hashlib
import json
import logging
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from made_run import close, make_run, pictures
from made_upsampler import make

import radio_distill
from radio_distill.balance import load_balancers
from radio_distill.cli import main
from radio_distill.errors import CheckpointError
from radio_distill.export.command import export
from radio_distill.network.student import Student
from radio_distill.paths import PACKAGE
from radio_distill.types import Result

CODE = {"modeling_radio_distill.py", "text_tower.py", *(path.name for path in (PACKAGE / "network").glob("[!_]*.py"))}
FILES = {
    "README.md",
    "SHA256SUMS",
    "config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "dynamic/preprocessor_config.json",
    *CODE,
}


@pytest.fixture(scope="module")
def folder(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(run, tmp_path_factory.mktemp("exports") / "hf")


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def blocks(folder: Path) -> list[str]:
    """The Python of a model card."""
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)


# --- the folder ----------------------------------------------------------------------------------------------------------


def test_the_command_line_writes_a_folder(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "student"
    assert main(["export", str(run), "--out", str(out), "adaptors=toy_clip", "dtype=float16"]) == 0
    assert files(out) == FILES | {"provenance.json"}
    assert f"wrote {out} (hf, 0." in capsys.readouterr().out
    assert list(radio_distill.load_student(out).adaptors) == ["toy_clip"]


def test_checksums_and_provenance(folder: Path, run: Path) -> None:
    sums = dict(line.split("  ")[::-1] for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert sums.keys() == files(folder) - {"SHA256SUMS"}
    assert all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest for name, digest in sums.items())
    facts = json.loads((folder / "provenance.json").read_text())
    assert (facts["facts"]["name"], facts["facts"]["step"], facts["format"]) == ("tiny", 7, "hf")
    assert facts["facts"]["teachers"]["toy_clip"]["licence"] == "Apache-2.0"
    assert str(run.parent) not in "".join(path.read_text() for path in folder.rglob("*.*") if path.suffix != ".safetensors")


def test_the_same_run_gives_the_same_files(run: Path, folder: Path, tmp_path: Path) -> None:
    again = export(run, tmp_path / "again")
    for name in FILES - {"README.md", "SHA256SUMS"}:  # the card names its folder
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_a_failure_leaves_nothing_behind(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("radio_distill.export.command.model_card", fail)
    with pytest.raises(KeyboardInterrupt):
        export(run, tmp_path / "hf")
    assert not list(tmp_path.iterdir())


def test_adaptors_predict_the_teachers_own_features(run: Path, folder: Path) -> None:
    """PHI-S is undone: balanced, the export's predictions are those that the training's student learns."""
    from made_run import tiny_recipe, untrained

    trained, _ = untrained(tiny_recipe())
    images, balancers = pictures((16, 16)), load_balancers(run / "checkpoints" / "step-00000007" / "balancers")
    with torch.no_grad():
        got = radio_distill.load_student(folder).encode_adaptors(images)
        want = trained.eval().encode_adaptors(images)
    for name, balancer in balancers.items():
        close(balancer.forward(got[name].features_BCHW), want[name].features_BCHW, 1e-3)


# --- the model card ------------------------------------------------------------------------------------------------------


def test_the_code_of_the_hugging_face_card_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    found = blocks(folder)
    assert len(found) == 2
    names: dict = {}
    for code in found:
        exec(code, names)
    assert names["out"].summary.shape == (1, 96)
    assert names["out"].features.shape == (1, 144, 32)
    assert set(names["outputs"]) == {"backbone", "toy_clip", "toy_siglip", "toy_dino", "toy_sam"}


@pytest.mark.parametrize("form", ["timm", "torch"])
def test_the_code_of_other_cards_runs(run: Path, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    (code,) = blocks(export(run, tmp_path / form, form))
    exec(code, names)
    if form == "timm":
        assert (names["summary"].shape, names["features"].shape) == ((1, 96), (1, 144, 32))
    else:
        assert (names["outputs"]["summary"].shape, names["outputs"]["features"].shape) == ((1, 96), (1, 32, 12, 12))


def test_the_card_tells_teachers_data_and_results(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "mine", "data.sources={photos: {path: /disk/of/somebody/photos}}")
    result = Result("knn", "toy", "top1", 0.5, "ratio", True, "runs/mine@7#abc", "scenes", 100, 48)
    others = [{**asdict(result), "model": model} for model in ("runs/mine@6#abc", "runs/other@7#abc", "teacher:toy_clip#abc")]
    lines = "".join(json.dumps(row) + "\n" for row in [asdict(result), *others])
    (tmp_path / "runs" / "results.jsonl").write_text(lines)
    card = (export(run, tmp_path / "hf") / "README.md").read_text()
    assert "| toy_clip | toy/toy_clip.safetensors | Apache-2.0 |" in card
    assert "| toy_stage1 | photos | 80 | 64 at 48 px |" in card
    assert "/disk/of/somebody" not in card
    assert card.count("| knn | toy | top1 | 0.5 ratio | scenes (100 images, 48 px) |") == 1
    assert "license: other" not in card
    assert "Warning" not in card


def test_the_card_warns_of_licences_that_restrict(run: Path, tmp_path: Path) -> None:
    (tmp_path / "strict.yaml").write_text((radio_card()).replace("licence: Apache-2.0", "licence: Research Only License"))
    strict = make_run(tmp_path / "run", f"teachers.toy_clip={{card: {tmp_path}/strict.yaml}}")
    out = export(strict, tmp_path / "hf")
    card = (out / "README.md").read_text()
    assert "**Warning: toy_clip (Research Only License).**" in card
    assert "license: other" in card
    (tmp_path / "strict.yaml").unlink()
    card = (export(strict, tmp_path / "again") / "README.md").read_text()
    assert "**Warning:** the licence of toy_clip is not known (unknown): nothing is allowed until its makers say so" in card
    assert "These are not permissive licences" not in card


def radio_card() -> str:
    from radio_distill.paths import shipped

    return shipped("teachers")["toy_clip"].read_text()


def test_the_card_follows_a_student_through_its_stages(run: Path, tmp_path: Path) -> None:
    first = make_run(tmp_path / "first", "start={kind: timm, source: /disk/of/somebody/trunk.safetensors}")
    second = make_run(tmp_path / "second", f"start={{kind: run, source: {first}}}", "name=the_second")
    card = (export(second, tmp_path / "hf") / "README.md").read_text()
    assert card.index("| toy_stage1 |") < card.index("| the_second |")
    assert "The first stage started from weights of `trunk.safetensors`" in card
    assert "/disk/of/somebody" not in card


def test_what_others_leave_out_is_told_with_their_names(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        folder = export(run, tmp_path / "hf")
    for text in (
        "adaptors (toy_clip, toy_siglip, toy_dino, toy_sam): transformers' native radio class, timm and vLLM",
        "windowed attention (ViTDet, trained with windows 2, 4): transformers' native radio class",
        "2 global blocks in windowed mode: the reference's loader always takes 4",
        "no summary head (toy_sam): the reference's loader",
        "a width other than ViT-S, B, L or H: vLLM, SGLang, TensorRT-LLM and llama.cpp",
    ):
        assert text in caplog.text
        assert text in (folder / "README.md").read_text()


def test_licences_training_and_results_survive_another_export(tmp_path: Path) -> None:
    (tmp_path / "strict.yaml").write_text(radio_card().replace("licence: Apache-2.0", "licence: Research Only License"))
    strict = make_run(tmp_path / "runs" / "mine", f"teachers.toy_clip={{card: {tmp_path}/strict.yaml}}")
    result = Result("knn", "toy", "top1", 0.5, "ratio", True, "runs/mine@7#abc", "scenes", 100, 48)
    (tmp_path / "runs" / "results.jsonl").write_text(json.dumps(asdict(result)) + "\n")
    first = export(strict, tmp_path / "first", "radio")
    for source in (first, first / "mine.pth.tar"):  # and once more, from folder to folder
        again = export(export(source, tmp_path / source.name / "hf"), tmp_path / source.name / "again", adaptors=[])
        card = (again / "README.md").read_text()
        assert "**Warning: toy_clip (Research Only License).**" in card
        assert "| toy_stage1 |" in card
        assert "| knn | toy | top1 | 0.5 ratio |" in card
        assert card.splitlines().count("# mine") == 1
        facts = [json.loads((folder / "provenance.json").read_text())["facts"] for folder in (first, again)]
        assert facts[0] == facts[1]


def test_provenance_that_cannot_be_read_is_not_passed_over(run: Path, tmp_path: Path) -> None:
    first = export(run, tmp_path / "first")
    (first / "provenance.json").write_text('{"format": "hf"}')
    refused(
        "provenance.json is not what an export writes .* it tells the teachers' licences: export again", first, tmp_path / "b"
    )


# --- load_student --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["", "checkpoints/step-00000007", "checkpoints/step-00000007/student"])
@torch.no_grad()
def test_load_student_takes_every_part_of_a_run(run: Path, student: Student, what: str) -> None:
    loaded, images = radio_distill.load_student(run / what), pictures((16, 16))
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    close(loaded.encode(images).summary_BC, student.encode(images).summary_BC, 0)


def test_torch_hub_loads_a_student(run: Path, repo: Path) -> None:
    model = torch.hub.load(str(repo), "student", str(run), source="local")
    assert model.encode(pictures((16, 16))).features_BCHW.shape == (2, 32, 4, 4)


def test_load_student_needs_only_torch_timm_and_safetensors(folder: Path) -> None:
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {{'pydantic', 'transformers', 'deepspeed', 'open_clip', 'webdataset', 'simplejpeg', 'rich', 'torchmetrics', 'einops'}}:
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import torch
from radio_distill import load_student
print(tuple(load_student({str(folder)!r}).encode(torch.rand(1, 3, 16, 16)).features_BCHW.shape))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout.strip() == "(1, 32, 4, 4)", out.stderr


# --- errors --------------------------------------------------------------------------------------------------------------


def refused(match: str, *args: object, **options: object) -> None:
    with pytest.raises(CheckpointError, match=match):
        export(*args, **options)  # type: ignore[arg-type]


def test_an_existing_folder_is_never_written_over(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    refused(r"mine exists; exports never write over anything: delete it, or choose another --out", run, tmp_path / "mine")


def test_sources_that_hold_no_student(tmp_path: Path, run: Path) -> None:
    out = tmp_path / "out"
    refused("expected a file, a folder or a hub id OWNER/NAME", tmp_path / "nowhere" / "else", out)
    (tmp_path / "empty").mkdir()
    refused("empty holds no checkpoint; expected a run folder", tmp_path / "empty", out)
    upsampler = tmp_path / "up" / "checkpoints" / "step-00000001"
    upsampler.mkdir(parents=True)
    (upsampler / "meta.json").write_text(
        json.dumps({"step": 1, "world_size": 1, "zero": 1, "recipe": "up", "artifact": "upsampler"})
    )
    refused("holds no student: it is a run whose checkpoints hold the upsampler", tmp_path / "up", out)
    make(tmp_path / "saved_upsampler", kind="featsharp", factor=2)
    refused("saved_upsampler holds no checkpoint", tmp_path / "saved_upsampler", out)
    refused("is a folder of timm; load it with timm.create_model", export(run, tmp_path / "timm", "timm"), out)
    assert not out.exists()


def test_a_run_without_balancers(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "checkpoints" / "step-00000007" / "balancers" / "toy_dino.safetensors").unlink()
    refused("no balancer of 'toy_dino': its adaptor predicts balanced features", run, tmp_path / "out")
    export(run, tmp_path / "out", adaptors=["toy_clip"])


def test_options_that_do_not_exist(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    refused("no adaptor 'clip' in this student; it has toy_clip, toy_siglip, toy_dino, toy_sam", run, out, adaptors=["clip"])
    refused("unknown format 'tflite'; expected one of hf, radio, timm, onnx, web, torch", run, out, "tflite")
    refused("unknown dtype 'int8' of format hf; expected one of float32, bfloat16, float16", run, out, dtype="int8")
    refused(
        "unknown dtype 'bfloat16' of format onnx; expected one of float32, float16, int8", run, out, "onnx", dtype="bfloat16"
    )
    refused(
        "dtype=float16 has no effect on format web, which holds float32, float16 and int8", run, out, "web", dtype="float16"
    )
    refused("dtype=bfloat16 has no effect on format torch", run, out, "torch", dtype="bfloat16")
    refused("rms_images has no effect on format onnx; leave it out, or use --format hf", run, out, "onnx", rms_images="toy")
    refused("--text-towers has no effect on format timm", run, out, "timm", text_towers=True)
    assert main(["export", str(run), "--out", str(out), "adaptor=clip"]) == 2
    assert (
        "export has no setting 'adaptor'; expected adaptors=..., dtype=..., rms_images=... or video=..."
        in capsys.readouterr().err
    )


def test_a_damaged_student_is_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    weights = run / "checkpoints" / "step-00000007" / "student" / "student.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    refused("student.safetensors cannot be read", run, tmp_path / "out")
