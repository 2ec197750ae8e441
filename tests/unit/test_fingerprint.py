"""The fingerprint of a teacher: everything that changes its output changes it, and nothing else does."""

import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from made_upsampler import made
from safetensors.torch import save_file

from radio_distill.balance import check_balancers, identity, save_balancers
from radio_distill.config.cards import TeacherCard, TextTower
from radio_distill.config.load import load_card, load_recipe
from radio_distill.distill.serve import check_teachers
from radio_distill.doctor import examine_recipe, examine_resume
from radio_distill.errors import CheckpointError, TeacherError
from radio_distill.fingerprint import Fingerprint, code_digest, fingerprint, known_fingerprint
from radio_distill.teachers.text import tower_digest
from radio_distill.train import run
from radio_distill.train.distributed import World
from radio_distill.train.run import RunFolder
from radio_distill.upsamplers.folder import check_teacher, load_upsampler, save_upsampler

FACTS: dict[str, Any] = {
    "name": "tiny",
    "family": "custom",
    "loader": "tiny_loader:build",
    "licence": "none",
    "input": {"size": 64, "patch": 16, "mean": [0.5] * 3, "std": [0.25] * 3, "resizable": True},
    "output": {"summary": 16, "features": 16},
    "params": {"layer": "a", "deep": {"x": 1}},
}
LOADER = "from tiny_layers import LAYERS\n\ndef build(card, weights):\n    return LAYERS\n"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path with a loader, a module beside it, and weights."""
    (tmp_path / "tiny_loader.py").write_text(LOADER)
    (tmp_path / "tiny_layers.py").write_text("import torch\nLAYERS = 1\n")
    (tmp_path / "unrelated.py").write_text("X = 1\n")
    save_file({"w": torch.zeros(4)}, tmp_path / "w.safetensors")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setenv("RADIO_DISTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path


def card(project: Path, **changes: Any) -> TeacherCard:
    return TeacherCard.model_validate({**FACTS, "source": str(project / "w.safetensors"), **changes})


def input_with(**changes: Any) -> dict[str, Any]:
    return {"input": {**FACTS["input"], **changes}}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (input_with(std=[0.25, 0.25, 0.26]), "input.std: [0.25, 0.25, 0.25] -> [0.25, 0.25, 0.26]"),
        (input_with(mean=[0.1] * 3), "input.mean: [0.5, 0.5, 0.5] -> [0.1, 0.1, 0.1]"),
        (input_with(size=128), "input.size: 64 -> 128"),
        (input_with(patch=8), "input.patch: 16 -> 8"),
        (input_with(resizable=False), "input.resizable: True -> False"),
        ({"params": {"layer": "b", "deep": {"x": 1}}}, "params.layer: a -> b"),
        ({"params": {"layer": "a", "deep": {"x": 2}}}, "params.deep.x: 1 -> 2"),
        ({"params": {"layer": "a"}}, "params.deep.x: 1 -> None"),
        ({"family": "timm"}, "family: custom -> timm"),
        ({"output": {"summary": None, "features": 16}}, "output.summary: 16 -> None"),
    ],
)
def test_every_fact_that_changes_the_output_is_told(project: Path, changes: dict[str, Any], told: str) -> None:
    before, after = fingerprint(card(project)), fingerprint(card(project, **changes))
    assert [str(difference) for difference in before.differences(after)] == [told]
    assert before.digest != after.digest
    assert Fingerprint.from_dict(before.to_dict()) == before


def test_names_licences_notes_and_sizes_for_the_cost_model_do_not_count(project: Path) -> None:
    other = {"name": "x", "licence": "y", "licence_url": "z", "note": "n", "params": {**FACTS["params"], "arch": {"width": 3}}}
    before, after = fingerprint(card(project)), fingerprint(card(project, **other))
    assert before.differences(after) == []
    assert before.digest == after.digest


def test_weights_are_known_by_their_content(project: Path) -> None:
    before = fingerprint(card(project))
    (project / "moved").mkdir()
    shutil.move(project / "w.safetensors", project / "moved" / "renamed.safetensors")
    for source in ("moved/renamed.safetensors", "moved"):  # the file, and a folder that holds it
        moved = fingerprint(card(project, source=str(project / source)))
        assert before.differences(moved) == []
        assert before.digest == moved.digest


def test_weights_replaced_in_place_with_the_same_size_and_time_are_other_weights(project: Path) -> None:
    path = project / "w.safetensors"
    before, stat = fingerprint(card(project)), path.stat()
    save_file({"w": torch.ones(4)}, path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    (difference,) = before.differences(fingerprint(card(project)))
    assert difference.what == "weights"


def test_weights_are_read_once(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by other processes: the digest is kept beside the state of the file."""
    before = fingerprint(card(project))
    from radio_distill import fingerprint as module

    module._read_once.cache_clear()
    monkeypatch.setattr("hashlib.file_digest", None)
    assert fingerprint(card(project)) == before


def test_a_hub_repository_is_known_by_its_revision_until_its_weights_are_here(project: Path) -> None:
    one, other = (known_fingerprint(card(project, source="a/b", revision=r)) for r in ("1", "2"))
    assert [d.what for d in one.differences(other)] == ["revision"]
    here = fingerprint(card(project))
    assert [d.what for d in one.differences(here)] == ["source", "revision"]


@pytest.mark.parametrize("edited", ["tiny_loader.py", "tiny_layers.py"])
def test_the_code_of_a_loader_and_of_what_it_imports_beside_it_counts(project: Path, edited: str) -> None:
    before = fingerprint(card(project))
    with (project / edited).open("a") as file:
        file.write("# another layer\n")
    assert [d.what for d in before.differences(fingerprint(card(project)))] == ["code"]


def test_other_modules_do_not_count_and_nothing_is_imported(project: Path) -> None:
    before = fingerprint(card(project))
    (project / "unrelated.py").write_text("X = 2\n")
    assert fingerprint(card(project)) == before
    assert "tiny_loader" not in sys.modules


def test_the_modules_of_a_package_are_followed(project: Path) -> None:
    package = project / "nets" / "parts"
    package.mkdir(parents=True)
    for path, text in (
        ("__init__.py", ""),
        ("main.py", "from .parts import deep\nfrom . import near\n"),
        ("near.py", "import nets.far"),
    ):
        (project / "nets" / path).write_text(text)
    (package / "__init__.py").write_text("")
    for path in (project / "nets" / "far.py", package / "deep.py", project / "nets" / "stranger.py"):
        path.write_text("X = 1\n")
    digest = code_digest("nets.main:build")
    assert digest
    for path, counts in (
        ("nets/far.py", True),
        ("nets/parts/deep.py", True),
        ("nets/stranger.py", False),
        ("tiny_layers.py", False),
    ):
        (project / path).write_text("X = 2\n")
        assert (code_digest("nets.main:build") != digest) == counts, path
        digest = code_digest("nets.main:build")
    assert code_digest("no_such_module:build") is None
    assert code_digest("json:loads")  # of the standard library: its own package, not all that lies beside it


def test_an_upsampler_serves_its_own_teacher_only(tmp_path: Path) -> None:
    save_upsampler(made(), tmp_path / "u")
    loaded, own = load_upsampler(tmp_path / "u"), load_card("toy_clip")
    check_teacher(loaded, own)
    other = own.model_copy(update={"params": {**own.params, "pooling": "mean"}})
    with pytest.raises(
        TeacherError, match=r"for teacher 'toy_clip' .* differs \(params.pooling: class_token -> mean\); train one"
    ):
        check_teacher(loaded, other)
    paler = own.model_copy(update={"input": own.input.model_copy(update={"std": (0.3, 0.3, 0.3)})})
    with pytest.raises(TeacherError, match=r"input\.std"):
        check_teacher(loaded, paler)


def test_an_upsampler_without_a_fingerprint_is_compared_by_its_card_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import json

    save_upsampler(made(), tmp_path / "u")
    facts = json.loads((tmp_path / "u" / "upsampler.json").read_text())
    assert facts.pop("fingerprint")["weights"]
    (tmp_path / "u" / "upsampler.json").write_text(json.dumps(facts))
    loaded, own = load_upsampler(tmp_path / "u"), load_card("toy_clip")
    assert "has no fingerprint of its teacher" in caplog.text
    check_teacher(loaded, own)
    with pytest.raises(TeacherError, match=r"params\.pooling"):
        check_teacher(loaded, own.model_copy(update={"params": {**own.params, "pooling": "mean"}}))


def test_balancers_are_refused_when_the_loader_was_edited_after_the_statistics(
    project: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cards = {"tiny": card(project)}
    save_balancers(project / "b", {"tiny": identity(16)}, {"tiny": fingerprint(cards["tiny"])})
    check_balancers(project / "b", cards)
    assert not caplog.text
    (project / "tiny_loader.py").write_text(LOADER + "# edited\n")
    with pytest.raises(CheckpointError, match=r"made for another teacher than 'tiny' is now \(code: .*`radio-distill stats`"):
        check_balancers(project / "b", cards)
    save_balancers(project / "b", {"tiny": identity(16)})
    check_balancers(project / "b", cards)
    assert "has no fingerprint of its teacher" in caplog.text


def test_a_run_goes_on_with_its_own_teachers_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: toy_clip\nname: mine\n")
    recipe = load_recipe("toy/stage1", [f"run={tmp_path / 'run'}", f"teachers.toy_clip.card={mine}"])
    with RunFolder(recipe, is_main=True) as opened:
        assert set(opened.teachers) == set(recipe.teachers)
    mine.write_text("extends: toy_clip\nname: mine\nlicence: other\n")  # changes nothing that is computed
    with RunFolder(recipe, is_main=True):
        pass
    mine.write_text("extends: toy_clip\nname: mine\ninput: {std: [0.3, 0.3, 0.3]}\n")
    told = r"started with other teachers or other code.*\n  toy_clip\.input\.std: \[0\.268.*\] -> \[0\.3"
    with pytest.raises(CheckpointError, match=told):
        RunFolder(recipe, is_main=True)
    (finding,) = examine_resume(recipe)  # and `doctor` says so before
    assert finding.missing
    assert re.search(told, finding.text)
    (tmp_path / "run" / "teachers.json").unlink()  # a run of an older version
    caplog.clear()
    with RunFolder(recipe, is_main=True):
        assert "its teachers are taken to be those of today" in caplog.text
    (tmp_path / "run" / "teachers.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"teachers\.json cannot be read"):
        RunFolder(recipe, is_main=True)


def test_a_run_goes_on_with_its_own_code_only(project: Path) -> None:
    own = {"loss.terms.gram": "{loader: 'own_code:gram'}", "balance.method": "{kind: custom, loader: 'own_code:whiten'}"}
    own["optim"] = "{kind: custom, loader: 'own_code:muon', lr: 0.01, steps: 10}"
    (project / "own_code.py").write_text("import tiny_layers\n")
    recipe = load_recipe(
        "toy/stage1", [f"run={project / 'run'}", "engine.zero=0", *(f"{key}={value}" for key, value in own.items())]
    )
    with RunFolder(recipe, is_main=True) as opened:
        assert set(own) <= set(opened.teachers)
    (project / "tiny_layers.py").write_text("LAYERS = 2\n")  # what the loss imports has changed
    with pytest.raises(
        CheckpointError, match=r"other teachers or other code.*\n  balance\.method\.code: .*\n  loss\.terms\.gram\.code"
    ):
        RunFolder(recipe, is_main=True)


def test_doctor_says_no_to_an_upsampler_and_to_balancers_of_another_teacher(tmp_path: Path) -> None:
    save_upsampler(made(factor=2), tmp_path / "u")
    save_balancers(tmp_path / "b", {"toy_clip": identity(96)}, {"toy_clip": fingerprint(load_card("toy_clip"))})
    (tmp_path / "pale.yaml").write_text("extends: toy_clip\nname: pale\ninput: {std: [0.3, 0.3, 0.3]}\n")
    up = f"{{upsampler: {{kind: featsharp, factor: 2, weights: {tmp_path / 'u'}}}}}"
    others = [
        f"{group}.{name}=null"
        for group in ("partitions.low.teachers", "teachers")
        for name in ("toy_siglip", "toy_dino", "toy_sam")
    ]
    settings = [f"run={tmp_path / 'run'}", f"balance.path={tmp_path / 'b'}", f"partitions.low.teachers.toy_clip={up}", *others]
    recipe = load_recipe("toy/stage1", settings)
    found = {f.what: f for f in examine_recipe(recipe)}
    assert not found["upsampler toy_clip"].missing
    assert not found["balancers"].missing
    recipe = load_recipe("toy/stage1", [*settings, f"teachers.toy_clip.card={tmp_path / 'pale.yaml'}"])
    found = {f.what: f for f in examine_recipe(recipe)}
    for what in ("upsampler toy_clip", "balancers"):
        assert found[what].missing
        assert "input.std: [0.268" in found[what].text


def other_machine(rank: int, folder: str) -> None:
    """Two ranks, the second of which has another copy of a teacher."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    if rank:
        run.fingerprints = lambda recipe: {"tiny": Fingerprint({}, "a.pt", None, "b" * 64)}  # type: ignore[attr-defined]
    mine = SimpleNamespace(teachers={"tiny": Fingerprint({}, "a.pt", None, "a" * 64)})
    world = World(rank, 2, rank, torch.device("cpu"))
    with pytest.raises(TeacherError, match=r"other code than rank 0; .*\n  rank 1: tiny.weights: a{12} -> b{12}$"):
        run._refuse_other_teachers(mine, None, world)  # type: ignore[arg-type]
    dist.destroy_process_group()


def test_ranks_with_another_copy_of_a_teacher_are_named_on_all_ranks(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(other_machine, (str(tmp_path),), nprocs=2, start_method="fork")


def test_a_teacher_rank_refuses_to_stand_for_another_teacher(project: Path) -> None:
    cards = {"tiny": card(project)}
    told = fingerprint(cards["tiny"]).brief()
    check_teachers(cards, {"tiny": told})
    check_teachers(cards, {"tiny": {**told, "weights": None}})  # they are not on the students' machine
    (project / "tiny_loader.py").write_text(LOADER + "# edited\n")
    with pytest.raises(
        TeacherError, match="the code of teacher tiny on this teacher rank differ from those on the student ranks"
    ):
        check_teachers(cards, {"tiny": told})


@pytest.mark.parametrize("kind", ["toy", "transformers"])
def test_the_weights_of_a_text_tower_are_part_of_what_its_numbers_depend_on(kind: str, tmp_path: Path) -> None:
    toy, weights = load_card("toy_clip"), tmp_path / "tower.safetensors"
    weights.write_bytes(b"one")
    place = {"source": str(weights)} if kind == "toy" else {"source": "elsewhere"}
    made = toy.model_copy(update={**place, "text": TextTower(kind=kind, model=str(weights))})
    before = tower_digest(made)
    assert before == tower_digest(made)
    weights.write_bytes(b"two")
    assert tower_digest(made) != before
