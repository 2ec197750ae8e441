"""Loss terms as a table: one row or one entry of `loss.terms` is computed, logged, balanced, checked and counted like the others."""

import math

import pytest
import torch

from radio_distill.config import terms
from radio_distill.config.load import cards_of, load_recipe
from radio_distill.config.terms import Term, terms_of, weights_of
from radio_distill.errors import RecipeError
from radio_distill.losses import load_terms
from radio_distill.plan.cost import partition_cost
from tests.unit.test_task import batch_of, build, gradient, rows, whole_counts

HERE = __name__
GRAM = f"loss.terms.gram={{loader: '{HERE}:gram', weight: 0.5, teachers: {{toy_siglip: 0}}, options: {{power: 2}}}}"


def gram(pair, power):
    """Distance of the matrices of cosines between all positions."""
    pred, target = (torch.nn.functional.normalize(x.flatten(2), dim=1) for x in (pair.pred, pair.target))
    return ((pred.mT @ pred - target.mT @ target).abs() ** power).mean((1, 2))


def halves(pair):
    assert pair.pred.dtype == pair.target.dtype == torch.float32
    return 0.5 * (pair.pred - pair.target).square().mean(1).sum((1, 2))


def of_summary(pair):
    return (pair.pred - pair.target).square().mean(1)


def one_number(pair):
    return pair.pred.mean()


def of_no_meta(pair):
    return pair.pred.flatten(1).mean(1) * float(pair.target.sum())


def stage(*overrides):
    recipe, service, task = build("toy/stage1", "partitions.low.images=8", *overrides)
    batch = batch_of(recipe, service, "low", 8)
    return recipe, service, task, batch, whole_counts(recipe, service)["low"]


def test_a_term_of_the_users_is_the_mean_over_images_with_its_weight_per_teacher():
    recipe, service, task, batch, counts = stage(GRAM)
    parts = task(batch, service(batch), counts).parts
    _, _, task_0, _, _ = stage()
    task_0.load_state_dict(task.state_dict())
    task_0.balancers = task.balancers
    without = task_0(batch, service(batch), counts).parts
    assert {k for k in parts if k.endswith("/gram")} == {
        f"loss/low/{name}/gram" for name in recipe.partitions["low"].teachers if name != "toy_siglip"
    }
    added = sum(0.5 * v for k, v in parts.items() if k.endswith("/gram"))
    assert added > 0
    assert parts["loss"].item() == pytest.approx((without["loss"] + added).item(), rel=1e-6)
    assert without == {k: v for k, v in parts.items() if not k.endswith("/gram") and k != "loss"} | {"loss": without["loss"]}


def test_a_term_per_position_is_divided_as_the_built_in_one():
    _, service, task, batch, counts = stage(f"loss.terms.half={{loader: '{HERE}:halves', per: position}}")
    parts = task(batch, service(batch), counts).parts
    for name in ("toy_clip", "toy_siglip"):
        assert parts[f"loss/low/{name}/half"].item() == pytest.approx(0.5 * parts[f"loss/low/{name}/features"].item(), rel=1e-6)


def test_adaloss_balances_a_term_of_the_users():
    _, service, task, batch, counts = stage(GRAM, "loss.adaloss=0.9")
    first = task(batch, service(batch), counts)
    task.update_adaloss()
    assert "toy_clip/gram" in task.adaloss.means
    assert "toy_siglip/gram" not in task.adaloss.means
    torch.testing.assert_close(task.adaloss.means["toy_clip/gram"], first.parts["loss/low/toy_clip/gram"])
    weights = sum(w for name, card in cards_of(task.recipe).items() for w in weights_of(task.recipe, name, card).values())
    task.eval()
    assert math.isfinite(weights)
    assert task(batch, service(batch), counts).total.item() == pytest.approx(weights, rel=0.2)  # every term counts as one


def test_a_term_on_summaries_has_the_head_though_the_built_in_one_is_off():
    off = [f"teachers.{name}.summary_weight=0" for name in load_recipe("toy/stage1").teachers]
    _, service, task, batch, counts = stage(*off, f"loss.terms.s={{loader: '{HERE}:of_summary', head: summary}}")
    parts = task(batch, service(batch), counts).parts
    assert "loss/low/toy_clip/s" in parts
    assert "loss/low/toy_clip/summary" not in parts


def test_a_row_of_the_table_is_all_that_a_term_in_the_package_needs(monkeypatch):
    row = Term("half", "features", "position", f"{HERE}:halves", lambda recipe, teacher: 0.25, lambda recipe: {})
    monkeypatch.setattr(terms, "TERMS", (*terms.TERMS, row))
    _, service, task, batch, counts = stage("loss.adaloss=0.9")
    task(batch, service(batch), counts)
    task.update_adaloss()
    assert "toy_clip/half" in task.adaloss.means


def test_the_gradient_of_a_term_does_not_depend_on_how_a_batch_is_split():
    recipe, service, task = build("toy/stage1", "partitions.low.images=32", GRAM)
    batch, counts = batch_of(recipe, service, "low", 32), whole_counts(recipe, service)
    whole = gradient(task, service, [batch], counts)
    split = gradient(task, service, [rows(batch, slice(0, 16)), rows(batch, slice(16, 32))], counts)
    torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-6)


def test_plan_counts_the_matrix_products_of_a_term():
    grid = 6
    cards = cards_of(load_recipe("toy/stage1"))
    found = partition_cost(load_recipe("toy/stage1", [GRAM]), "low").losses_forward
    widths = [cards[name].output.features for name in cards if name != "toy_siglip"]
    assert found == sum(2 * 2 * grid**4 * c for c in widths)  # two Gram matrices, N x C x N
    assert partition_cost(load_recipe("toy/stage1"), "low").losses_forward == 0


def test_plan_says_what_it_cannot_count(caplog):
    recipe = load_recipe("toy/stage1", [f"loss.terms.t={{loader: '{HERE}:of_no_meta'}}"])
    assert partition_cost(recipe, "low").losses_forward == 0
    assert f"FLOPs of loss term {HERE}:of_no_meta are not counted" in caplog.text


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("loss.terms.gram={loader: gram}", "'loss.terms.gram.loader' is 'gram', expected package.module:name"),
        ("loss.terms.summary={loader: 'a:b'}", "loss term 'summary': expected a name of .* none of features, summary, relation, mesa; rename it"),
        ("loss.terms.gram={loader: 'a:b', teachers: {toy_clap: 1}}", "loss term 'gram' names teacher 'toy_clap', did you mean 'toy_clip'"),
        ("loss.terms.gram={loader: 'a:b', wieght: 1}", "unknown key 'loss.terms.gram.wieght', did you mean 'weight'"),
        ("optim.loader=a:b", "'optim.loader' has no effect on optim.kind=adamw; set optim.kind=custom"),
        ("optim.kind=custom", "'optim.loader' is missing: optim.kind=custom needs package.module:function"),
        ("optim={kind: custom, loader: 'a:b'}", "'engine.zero' is 1: it cuts parameters into flat pieces, .*; set engine.zero=0"),
        ("balance.method={kind: custom}", "'balance.method.loader' is missing"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_the_recipe_is_said_before_anything_is_imported(override, expected):
    with pytest.raises(RecipeError, match=expected):
        load_recipe("toy/stage1", [override])


def test_a_mosaic_has_no_summary_for_any_term():
    term = f"loss.terms.s={{loader: '{HERE}:of_summary', head: summary}}"
    with pytest.raises(RecipeError, match=r"one summary for many images; set loss\.terms\.s\.teachers\.toy_sam=0"):
        load_recipe("toy/stage2", [term, "teachers.toy_sam.card=toy_dino", "teachers.toy_sam.summary_weight=0"])  # fmt: skip


def test_a_term_that_gives_one_number_for_a_batch_is_refused():
    _, service, task, batch, counts = stage(f"loss.terms.t={{loader: '{HERE}:one_number'}}")
    with pytest.raises(
        RecipeError, match=r"loss.terms.t: .*one_number returned torch.float32 \(\), expected the loss of each of 8 images"
    ):
        task(batch, service(batch), counts)


def test_options_that_a_term_does_not_take_are_named_before_anything_runs():
    recipe = load_recipe("toy/stage1", [f"loss.terms.t={{loader: '{HERE}:gram', options: {{powr: 2}}}}"])
    with pytest.raises(RecipeError, match=r"loss.terms.t.loader: .*gram.* cannot be called with 1 value, powr="):
        load_terms(recipe)
    assert [term.name for term in terms_of(recipe)] == ["features", "summary", "relation", "t"]
