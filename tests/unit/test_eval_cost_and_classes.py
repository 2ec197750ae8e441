"""Beside the scores: what an image costs a model, and the classes that a classifier gets wrong."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from radio_distill.eval.features import FeatureCache
from radio_distill.eval.model_cost import COST, cost_of
from radio_distill.eval.models import open_model
from radio_distill.eval.report import write_report
from radio_distill.eval.suite_tables import sections, to_markdown
from radio_distill.eval.task import Context
from radio_distill.eval.worst_classes import read_worst, save_worst, worst_classes
from radio_distill.plan.cost import vit_flops
from radio_distill.results import append


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(root="toy", device=torch.device("cpu"), cache=FeatureCache(tmp_path), pictures=tmp_path / "pictures")


def test_costs_are_those_of_the_architecture_at_the_size_that_the_model_takes(context: Context) -> None:
    opened = open_model("timm:vit_tiny_patch16_224?weights=random")
    costs = {r.metric: r for r in cost_of(opened, 100, context)}
    assert costs["tokens"].value == 36
    assert {r.resolution for r in costs.values()} == {96}
    flops = vit_flops(37, 192, 12, 768, gated=False, patch=16, patches=36)
    assert costs["compute"].value == pytest.approx(flops / 1e9, rel=0.01)
    assert costs["parameters"].value == pytest.approx(5.5, abs=0.2)  # timm's table: 5.72 with the classifier and at 224 px
    assert costs["time"].value > 0
    assert all(r.task == COST and not r.headline for r in costs.values())


def test_measuring_costs_draws_nothing_from_the_generator_of_the_tasks(context: Context) -> None:
    opened = open_model("teacher:toy_clip")
    torch.manual_seed(3)
    cost_of(opened, 84, context)
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.rand(1) == after


def test_the_report_has_one_table_of_costs_whose_last_measurement_counts(context: Context, tmp_path: Path) -> None:
    costs = cost_of(open_model("teacher:toy_clip"), 84, context)
    again = [replace(r, value=123.4) if r.metric == "time" else r for r in costs]
    (section,) = sections([*costs, *again])
    (row,) = section.rows
    assert row[:3] == ("teacher:toy_clip", "84", "144")
    assert row[5] == "123.4"
    assert row[6].endswith("1 thread, fp32")
    append(tmp_path / "results.jsonl", costs)
    assert "cost of an image" in write_report(tmp_path).read_text()
    assert "## cost of an image" in to_markdown([section])


def test_worst_classes_come_first_with_what_they_are_taken_for() -> None:
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    guesses = torch.tensor([0, 1, 1, 2, 1, 0, 2])
    first, second = worst_classes(guesses, labels, ("cat", "dog", "car", "no image"))
    assert first == ("cat", 25.0, 4, "dog", 50.0)
    assert second == ("dog", 50.0, 2, "cat", 50.0)


def test_worst_classes_are_kept_beside_the_pictures_and_shown(context: Context, tmp_path: Path) -> None:
    labels, guesses = torch.tensor([0, 1]), torch.tensor([1, 1])
    save_worst(replace(context, pictures=None), "nothing", guesses, labels, ("a", "b"))
    save_worst(replace(context, pictures=tmp_path / "eval_pictures" / COST), "set kNN, runs/x@3", guesses, labels, ("a<", "b"))
    ((title, classes),) = read_worst(tmp_path / "eval_pictures" / COST)
    assert (title, classes[0].taken_for) == ("set kNN, runs/x@3", "b")
    append(
        tmp_path / "results.jsonl",
        [replace(r, suite=COST, task="x") for r in cost_of(open_model("teacher:toy_clip"), 84, context)],
    )
    page = write_report(tmp_path).read_text()
    assert "Worst classes of set kNN, runs/x@3" in page
    assert "<td>a&lt;</td><td>0.0</td><td>1</td><td>b</td><td>100.0</td>" in page
