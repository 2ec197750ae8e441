"""A loss, an optimizer, a balancer, a teacher, a suite with a data set and a task: all from the docs' own examples."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from docs_blocks import run_page
from PIL import Image

from radio_distill.balance import Moments, fit
from radio_distill.cli import main
from radio_distill.config.load import cards_of, dump, load_card, load_recipe, resume_conflicts
from radio_distill.errors import CardError, DataError, RecipeError
from radio_distill.eval.__main__ import main as evaluate
from radio_distill.eval.datasets.base import open_dataset
from radio_distill.eval.suites import digest, load_suite
from radio_distill.plan.code import import_code
from radio_distill.results import read
from radio_distill.teachers.base import load_teacher
from radio_distill.toyworld import render_images
from radio_distill.weight_files import local_weights, needs_weights


@pytest.fixture
def page(request, repo, tmp_path, monkeypatch):
    """Write out a docs page, here; modules of its examples are forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield lambda name: run_page(repo / "docs" / name, tmp_path)
    for name in set(sys.modules) - before:
        if "." not in name:
            del sys.modules[name]


def test_plan_tells_and_imports_all_code_of_a_recipe(page, caplog):
    page("training.md")
    with caplog.at_level("INFO"):
        assert main(["plan", "with_balance.yaml"]) == 0
    told = [r.getMessage().partition(" (")[0] for r in caplog.records if r.getMessage().startswith("importing")]
    assert sorted(told) == ["importing my_balance:unit_variance", "importing my_losses:gram", "importing my_optim:muon"]


def test_the_gram_loss_of_the_docs_is_the_loop_over_pairs(page):
    page("training.md")
    from radio_distill.balance import identity
    from radio_distill.losses import Pair, load_terms

    (gram,) = [f for term, f in load_terms(load_recipe("with_gram.yaml")).items() if term.name == "gram"]
    pred, target = torch.randn(2, 2, 4, 2, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[[[1, 1, 0], [1, 1, 1]]], [[[1, 1, 1], [1, 1, 1]]]], dtype=torch.bool)
    expected = torch.zeros(2)
    for b in range(2):
        p, t, seen = pred[b].flatten(1).T, target[b].flatten(1).T, mask[b].flatten()
        for i in range(6):
            for j in range(6):
                if seen[i] and seen[j]:
                    difference = torch.cosine_similarity(p[i], p[j], 0) - torch.cosine_similarity(t[i], t[j], 0)
                    expected[b] += difference**2 / 36
    torch.testing.assert_close(gram(Pair(pred, target, mask, identity(4)), power=2), expected)


def test_the_balancer_of_the_docs_gives_unit_variance_and_a_wrong_one_is_refused(page, tmp_path):
    page("training.md")
    features = 3 * torch.randn(4, 5, 6, 6, generator=torch.Generator().manual_seed(0)) + 7
    moments = Moments(5)
    moments.update(features)
    method = load_recipe("with_balance.yaml").balance.method
    balancer = fit(method, moments, "t")
    balanced = balancer.forward(features)
    assert balanced.var((0, 2, 3), correction=0).mean().item() == pytest.approx(1, rel=1e-2)
    torch.testing.assert_close(balancer.inverse(balanced), features)
    wrong = "def zero(m, c): return 0 * c, m\ndef short(m, c): return c[:2], m\ndef one(m, c): return c\n"
    (tmp_path / "wrong_balance.py").write_text(wrong)
    for name, expected in (
        ("zero", "W of wrong_balance:zero has no inverse"),
        ("short", r"returned shapes \(2, 5\) and \(5,\), expected \(5, 5\) or \(5,\), and \(5,\)"),
        ("one", "returned a Tensor, expected two tensors: W and the offset"),
    ):
        with pytest.raises(RecipeError, match=expected):
            fit(method.model_copy(update={"loader": f"wrong_balance:{name}"}), moments, "t")


def test_the_teacher_of_the_docs_plans_and_is_not_missing(page, capsys):
    page("teachers.md")
    recipe = load_recipe("with_patches.yaml")
    card = cards_of(recipe)["patches"]
    assert load_teacher(card).encode(torch.zeros(1, 3, 96, 96)).features_BCHW.shape == (1, 64, 12, 12)
    assert local_weights(card) is None
    assert not needs_weights(card)
    assert needs_weights(card.model_copy(update={"source": "mine.safetensors"}))
    assert main(["plan", "with_patches.yaml"]) == 0
    main(["doctor", "with_patches.yaml"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "teacher patches ok my_teachers:make" in shown
    assert "code of teacher patches ok my_teachers:make" in shown
    Path("my_teachers.py").rename("elsewhere.py")
    del sys.modules["my_teachers"]
    main(["doctor", "with_patches.yaml"])
    assert "code of teacher patches MISSING" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(CardError, match="teacher card 'patches': 'my_teachers:make' cannot be imported: there is no module"):
        import_code(recipe)


def test_the_card_of_the_docs_is_a_teacher(page):
    page("teachers.md")
    assert load_teacher(load_card("my_vit.yaml"), weights="meta").encode(torch.empty(1, 3, 224, 224, device="meta")).features_BCHW.shape == (
        1, 384, 14, 14,
    )  # fmt: skip


def test_a_card_without_a_loader_says_what_it_lacks(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "name: c\nlicence: x\ninput: {size: 8, patch: 8, mean: [0, 0, 0], std: [1, 1, 1]}\noutput: {summary: null, features: 2}\n"
    )
    with pytest.raises(CardError, match=r"(?s)'family' is missing: .*custom.*'source' is missing: Where the weights come from"):
        load_card(tmp_path / "c.yaml")


def road_images(folder: Path) -> None:
    for split, count in (("train", 4), ("val", 2)):
        (folder / "roads" / split).mkdir(parents=True)
        for i, pixels in enumerate(render_images(1, range(count), size=64)):
            Image.fromarray(pixels).save(folder / "roads" / split / f"{i}.jpg")
            Image.fromarray((pixels[..., 0] > 127).astype(np.uint8)).save(folder / "roads" / split / f"{i}.png")


def test_the_suite_of_the_docs_measures_a_data_set_and_a_task_of_its_own(page, tmp_path, capsys):
    page("eval.md")
    road_images(tmp_path / "data")
    command = ["--suite", "roads.yaml", "--model", "teacher:toy_dino", "--data", "data", "--batch", "2", "--workers", "0"]
    assert evaluate([*command, "--preset", "smoke", "brightness.split=val"]) == 0
    results = read(Path("results.jsonl"))
    of_suite = {(r.task, r.metric): r for r in results if r.suite == "roads"}
    assert {("roads", "miou"), ("brightness", "length")} <= of_suite.keys()
    assert of_suite["brightness", "length"].value > 0
    assert of_suite["roads", "miou"].dataset.startswith("roads/val#")
    assert {r.preset for r in of_suite.values()} == {"custom"}
    assert load_suite("roads.yaml").preset == "custom"
    assert load_suite("roads.yaml", "smoke").preset == "smoke"
    assert load_suite("roads.yaml").tasks["roads"].steps == 20000


def test_results_of_a_task_or_data_set_that_was_edited_are_others(page, tmp_path):
    page("eval.md")
    road_images(tmp_path / "data")

    def known() -> tuple[str, str]:
        return digest(load_suite("roads.yaml").tasks["brightness"]), open_dataset(
            "road_data:Roads", "val", "data", kind="segmentation"
        ).id

    before = known()
    assert known() == before
    for name, changed in (("road_tasks.py", (True, False)), ("road_data.py", (True, True))):
        with open(name, "a") as file:
            file.write("# edited\n")
        assert tuple(a != b for a, b in zip(known(), before)) == changed


@pytest.mark.parametrize(
    ("was", "then", "expected"),
    [
        ("title: Roads", "titel: Roads", r"roads.yaml:2: unknown key 'titel', did you mean 'title'\?"),
        ("'road_tasks:Brightness'", "'road_tasks:Brightnes'", r"roads.yaml: .*road_tasks.py has no 'Brightnes', expected a class"),
        ("'road_tasks:Brightness'", "'road_tasks:open_dataset'", "road_tasks:open_dataset is a function, expected a class that extends"),
        ("split: val}", "splitt: val}", "unknown key 'tasks.brightness.splitt', did you mean 'split'"),
    ],
)  # fmt: skip
def test_a_wrong_card_of_the_users_is_told_with_its_line(page, was, then, expected):
    page("eval.md")
    card = Path("roads.yaml")
    card.write_text(card.read_text().replace(was, then))
    with pytest.raises(CardError, match=expected):
        load_suite("roads.yaml")


def test_a_suite_of_the_users_cannot_take_the_name_of_a_shipped_one(page):
    page("eval.md")
    Path("roads.yaml").rename("dense.yaml")
    with pytest.raises(CardError, match=r"dense.yaml: results are filed under the name of the file; .*rename it"):
        load_suite("dense.yaml")
    with pytest.raises(CardError, match=r"no suite 'road.yaml'"):
        load_suite("road.yaml")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def Set(root, split): return 3", "data set 'wrong_set:Set' gave a int, expected a class that extends"),
        ("def Set(root): return 3", r"wrong_set:Set\(root\) cannot be called with 2 values"),
        ("from radio_distill.eval.datasets.base import Dataset\nclass Set(Dataset): pass", "lacks __getitem__, files, keys"),
    ],
)
def test_a_data_set_that_cannot_work_is_refused(page, tmp_path, code, expected):
    (tmp_path / "wrong_set.py").write_text(code)
    with pytest.raises(DataError, match=expected):
        open_dataset("wrong_set:Set", "val", tmp_path, kind="segmentation")


def test_the_path_of_a_card_is_relative_to_the_recipe_and_a_moved_project_resumes(page, tmp_path, monkeypatch):
    page("teachers.md")
    recipe = load_recipe("with_patches.yaml")
    Path("run").mkdir()
    Path("run/recipe.yaml").write_text(dump(recipe))
    monkeypatch.chdir("run")
    assert load_recipe("../with_patches.yaml") == recipe
    assert load_recipe("recipe.yaml") == recipe  # the resolved copy, from another folder
    monkeypatch.chdir(tmp_path)
    (tmp_path / "moved").mkdir()
    for name in ("with_patches.yaml", "patches.yaml"):
        (tmp_path / "moved" / name).write_text(Path(name).read_text())
    moved = load_recipe("moved/with_patches.yaml")
    assert moved.teachers["patches"].card == str(tmp_path / "moved" / "patches.yaml")
    assert resume_conflicts(recipe, moved) == []
    Path("other.yaml").write_text(Path("patches.yaml").read_text())
    override = load_recipe("moved/with_patches.yaml", ["teachers.patches.card=other.yaml"])  # from here, not from there
    assert override.teachers["patches"].card == str(tmp_path / "other.yaml")
    assert resume_conflicts(recipe, override) == ["teachers.patches.card: patches.yaml -> other.yaml"]


def test_every_docs_page_that_is_cited_exists(repo):
    cited = set()
    for folder in ("radio_distill", "docs", "tests", "tools", "recipes", "teachers", "eval", "slurm", "bench"):
        for path in (repo / folder).rglob("*"):
            if path.suffix in (".py", ".md", ".yaml", ".sh", ".sbatch"):
                text = path.read_text()
                cited |= {(name, path) for name in re.findall(r"docs/(\w+\.md)", text)}
                if path.suffix == ".md":
                    cited |= {(name, path) for name in re.findall(r"\]\((\w+\.md)\)", text)}
    cited |= {(name, repo / "README.md") for name in re.findall(r"docs/(\w+\.md)", (repo / "README.md").read_text())}
    assert len(cited) > 20
    assert [(name, str(path)) for name, path in cited if not (repo / "docs" / name).is_file()] == []
