"""What a run has cost: the ledger against hand arithmetic, what it says of exports and reports; plans side by side, and at a budget."""

import json
import re
from pathlib import Path

import pytest
import torch

from radio_distill.cli import main
from radio_distill.config.load import dump, list_recipes, load_recipe
from radio_distill.config.recipe import Recipe
from radio_distill.config.sizes import at_step
from radio_distill.distill.training import known_rate
from radio_distill.errors import RecipeError
from radio_distill.eval.report import flop_before, write_report
from radio_distill.plan.budget import rate_of
from radio_distill.plan.cost import partition_cost
from radio_distill.plan.ledger import Ledger, Spent
from radio_distill.plan.side_by_side import at_budget
from radio_distill.plan.stage import plan
from radio_distill.results import append
from radio_distill.train.distributed import World
from radio_distill.types import Result

PLAIN = ["optim.freeze_trunk=0", "balance.ahead=false"]


def test_of_fixed_sizes_it_is_the_plan_times_the_steps() -> None:
    recipe = load_recipe("toy/stage3", PLAIN)
    spent = Ledger(recipe).until(7)
    assert spent.flop == pytest.approx(7 * plan(recipe, world_size=1).step_flop)
    assert spent.tokens == 7 * (16 * 12**2 + 8 * 24**2)


def test_drawn_sizes_are_added_up_step_by_step_and_a_resumed_run_counts_on() -> None:
    recipe = load_recipe("toy/fast_stage2", PLAIN)
    ledger, tokens, taught = Ledger(recipe), 0, 0.0
    for step in range(9):
        for name in recipe.partitions:
            cell = at_step(recipe, name, step)
            sizes = [f"partitions.{name}.size={cell.size}"]
            tokens += cell.images * (cell.size // 8) ** 2
            cost = partition_cost(load_recipe("toy/fast_stage2", [*PLAIN, *sizes]), name)
            taught += cell.images * (sum(cost.teachers.values()) + cost.balance)
    assert ledger.until(9).tokens == tokens
    assert ledger.until(9).teacher_flop == pytest.approx(taught)
    assert Ledger(recipe).until(9) == ledger.until(9)
    assert ledger.until(4).tokens < tokens
    assert ledger.until(9).tokens == tokens, "also after a look back"


def test_a_frozen_trunk_costs_its_forward_alone_and_statistics_ahead_cost_the_teachers() -> None:
    cost = partition_cost(load_recipe("toy/stage1"), "low")
    frozen = Ledger(load_recipe("toy/stage1", ["optim.freeze_trunk=5", "balance.ahead=false"])).until(5)
    assert frozen.student_flop == pytest.approx(5 * 64 * (cost.student_forward + 3 * cost.heads_forward))
    ahead = Ledger(load_recipe("toy/stage1", ["balance={ahead: true, window: 20}"])).until(0)
    assert ahead == Spent(0.0, 0.0, pytest.approx(20 * 64 * sum(cost.teachers.values())))


def test_several_students_share_the_teachers_and_a_cache_spares_them(tmp_path: Path) -> None:
    alone = Ledger(load_recipe("toy/stage1", PLAIN)).until(1)
    small = "students.small={model: vit_small_patch16_224, overrides: {patch_size: 8, embed_dim: 64, depth: 2, num_heads: 2}, max_size: 256}"
    both = Ledger(load_recipe("toy/stage1", [*PLAIN, small])).until(1)
    assert (both.tokens, both.teacher_flop) == (2 * alone.tokens, alone.teacher_flop)
    assert both.student_flop > alone.student_flop
    cached = Ledger(load_recipe("toy/stage1", [*PLAIN, f"cache.read={tmp_path}"])).until(1)
    assert 0 < cached.teacher_flop < alone.teacher_flop / 3, "the balancers are left"


def test_the_rate_is_that_of_known_gpus_alone() -> None:
    assert rate_of("NVIDIA H200") == 790e12
    assert rate_of("NVIDIA A100-SXM4-80GB") == 250e12
    assert rate_of("Radeon") is None
    assert known_rate(load_recipe("toy/stage1"), World(0, 2, 0, torch.device("cpu"))) is None


def write_run(folder: Path, name: str, flop: float, fidelity: float, *overrides: str) -> None:
    path = folder / name
    path.mkdir()
    (path / "recipe.yaml").write_text(dump(load_recipe("toy/stage1", [f"name={name}", *overrides])))
    rows = [
        {
            "step": 10 * i,
            "loss": 1.0,
            "fidelity/low/toy_dino": fidelity * i,
            "cost/student_flop": flop * i,
            "cost/teacher_flop": 0.0,
        }
        for i in (1, 2)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_report_draws_runs_against_flops_behind_those_they_started_from(tmp_path: Path) -> None:
    write_run(tmp_path, "first", 1e15, 1.0)
    write_run(tmp_path, "second", 2e15, 2.0, f"start={{kind: run, source: {tmp_path / 'first'}}}")
    for name, value in (("first", 40.0), ("second", 50.0)):
        facts = {"unit": "percent", "higher_is_better": True, "dataset": "toy#1", "count": 200, "resolution": 96}
        append(
            tmp_path / "results.jsonl",
            [Result(suite="toy", task="knn", metric="top1", value=value, model=f"{name}@20", **facts)],
        )
    page = write_report(tmp_path).read_text()
    assert "<h2>Cost</h2>" in page
    assert "knn top1 at 96 px" in page
    assert "6 PFLOP" in page, "2 of the first and 4 of its own"
    runs = [
        (tmp_path / n, load_recipe(tmp_path / n / "recipe.yaml"), [{"cost/student_flop": 5.0}]) for n in ("first", "second")
    ]
    assert flop_before(runs) == {"first": 0.0, "second": 5.0}


def test_a_report_of_runs_without_a_ledger_has_no_costs(tmp_path: Path) -> None:
    write_run(tmp_path, "old", 0.0, 1.0)
    assert "<h2>Cost</h2>" not in write_report(tmp_path).read_text()


def test_plan_shows_two_chains_and_what_they_cost_together(capsys: pytest.CaptureFixture[str]) -> None:
    chain = ["fast/stage1", "fast/stage2", "fast/sam"]
    assert main(["plan", *chain, "--gpus", "8", "--against", "stage1,stage2,stage3_featsharp"]) == 0
    printed = capsys.readouterr().out
    hours = [
        sum(plan(load_recipe(n), world_size=8).gpu_hours for n in names)
        for names in (chain, ["stage1", "stage2", "stage3_featsharp"])
    ]
    assert 670 <= hours[0] <= 880
    assert f"{hours[1] / hours[0]:.1f} times fewer" in printed
    assert f"{hours[0]:,.0f}\n" in printed
    assert "both are assumptions of `plan`, not measured runs" in printed
    everyone = "fast_stage1, fast_stage2, fast_sam, stage1, stage2, stage3_featsharp"
    assert f"note: {everyone}: no images yet" in printed


def test_a_budget_buys_steps(capsys: pytest.CaptureFixture[str]) -> None:
    recipes = [load_recipe("fast/stage1"), load_recipe("fast/stage2")]
    bought = at_budget(recipes, lambda recipe: plan(recipe, world_size=8), 200)
    hours = sum(plan(recipe, world_size=8).gpu_hours for recipe in bought)
    assert 199.9 < hours <= 200
    assert bought[0].optim.steps / bought[1].optim.steps == pytest.approx(50 / 69, rel=1e-3)
    assert main(["plan", "fast/stage1", "--budget", "72", "--gpus", "8"]) == 0
    assert "for 72 GPU-hours: fast/stage1 optim.steps=2" in capsys.readouterr().out
    with pytest.raises(RecipeError, match=r"--budget 1e-06: not enough for a step of each recipe"):
        at_budget(recipes, lambda recipe: plan(recipe, world_size=8), 1e-6)


def test_plan_without_a_recipe_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "optim.steps=3"]) == 2
    assert "plan needs a recipe" in capsys.readouterr().err


SHIPPED = [name for name in list_recipes(Recipe) if name.startswith(("fast/", "proxy/"))]


@pytest.mark.parametrize("name", SHIPPED)
def test_the_headers_of_fast_and_proxy_recipes_say_what_plan_says(name: str) -> None:
    stated = re.search(r"([\d,]+) H200-hours", list_recipes()[name].read_text())
    assert float(stated.group(1).replace(",", "")) == pytest.approx(plan(load_recipe(name), world_size=8).gpu_hours, rel=0.01)


@pytest.mark.parametrize(("names", "hours"), [(SHIPPED[-3:], 3560), (["fast/stage1", "fast/stage2", "fast/sam"], 770)])
def test_the_recipes_page_adds_them_up(names: list[str], hours: int, repo: Path) -> None:
    assert sum(plan(load_recipe(name), world_size=8).gpu_hours for name in names) == pytest.approx(hours, rel=0.01)
    assert f"`{names[0]}`" in next(
        line for line in (repo / "docs/recipes.md").read_text().splitlines() if f"{hours:,} hours together" in line
    )
