"""Every number of every recipe and card has a range, is finite, and is no boolean."""

import pkgutil
from collections.abc import Iterator
from importlib import import_module
from typing import Annotated, Any, get_args, get_origin

import pytest
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

import radio_distill.config
import radio_distill.eval.tasks
import radio_distill.teachers
from radio_distill.config.cards import Fields, TeacherCard
from radio_distill.config.load import load, load_card, load_recipe, load_vlm_recipe
from radio_distill.config.recipe import Overrides
from radio_distill.errors import CardError, RecipeError
from radio_distill.eval.suites import load_suite
from radio_distill.student.names import Size

NO_NUMBERS = [True, False, float("nan"), float("inf"), float("-inf"), -(10**19), 10**19]
RECIPE = "toy/stage1"


def models() -> list[type[Fields]]:
    """All that is read from YAML, wherever it is defined."""
    for package in (radio_distill.config, radio_distill.eval.tasks, radio_distill.teachers):
        for module in pkgutil.iter_modules(package.__path__):
            if not module.name.startswith("toy_"):  # programs
                import_module(f"{package.__name__}.{module.name}")
    import_module("radio_distill.eval.published")
    found: list[type[Fields]] = [Fields]
    for model in found:
        found += [sub for sub in model.__subclasses__() if sub not in found]
    return [model for model in found if model.__module__.startswith("radio_distill.")]


def leaves(annotation: Any, rules: tuple[Any, ...] = ()) -> Iterator[Any]:
    """The annotated int and float types within an annotation: of tuples, maps and alternatives every one."""
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        yield from leaves(inner, (*rules, *more))
    elif annotation in (int, float):
        yield Annotated[(annotation, *rules)] if rules else annotation
    elif isinstance(annotation, type) and issubclass(annotation, Fields):
        return  # looked at by itself
    elif getattr(annotation, "__name__", "") != "Literal":
        for inner in get_args(annotation):
            yield from leaves(inner)


NUMBERS = [
    pytest.param(leaf, id=f"{model.__module__.removeprefix('radio_distill.')}.{model.__name__}.{name}")
    for model in models()
    for name, field in model.model_fields.items()
    for leaf in leaves(field.annotation, tuple(field.metadata))
]


def test_all_numbers_are_found() -> None:
    found = {param.id for param in NUMBERS}
    assert len(found) > 120
    assert {
        "config.recipe.Optim.lr",
        "config.cards.TeacherInput.std",
        "config.recipe.Overrides.depth",
        "config.vlm_recipe.Lora.rank",
        "config.jitter.Jitter.zoom",
        "eval.tasks.detection.Detection.cost",
        "eval.published.PublishedTable.rows",
        "teachers.base.Arch.width",
    } <= found


@pytest.mark.parametrize("leaf", NUMBERS)
def test_a_number_has_a_range_is_finite_and_is_no_boolean(leaf: Any) -> None:
    adapter = TypeAdapter(leaf)
    for value in NO_NUMBERS:
        with pytest.raises(ValidationError):
            adapter.validate_python(value)


def test_a_students_overrides_are_the_sizes_of_its_name() -> None:
    assert list(Overrides.model_fields) == list(Size.__dataclass_fields__)


def test_free_values_are_finite() -> None:
    """A map of anything may hide a number: it is of the type that looks for those that are not finite."""
    for model in models():
        for name, field in model.model_fields.items():
            if field.annotation == dict[str, Any]:
                assert _refuses(field, {"deep": [{"x": float("nan")}]}), f"{model.__name__}.{name}"


def _refuses(field: FieldInfo, value: Any) -> bool:
    adapter = TypeAdapter(Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation)
    try:
        adapter.validate_python(value)
    except ValidationError:
        return True
    return False


SLIPS = [
    ("optim.lr=.inf", "'optim.lr' is inf, expected a finite number"),
    ("optim.lr=true", "'optim.lr' is true, expected a number"),
    ("optim.lr=1e30", "'optim.lr' is 1e+30, expected at most 100"),
    ("optim.eps=.nan", "'optim.eps' is nan, expected a finite number"),
    ("optim.eps=0", "'optim.eps' is 0, expected more than 0"),
    ("optim.clip=0", "'optim.clip' is 0, expected more than 0"),
    ("optim.betas=[0.9, 1.5]", r"'optim.betas.1' is 1.5, expected less than 1"),
    ("optim.steps=true", "'optim.steps' is true, expected a number"),
    ("optim.steps=99999999999999999999999", "'optim.steps' is 99999999999999999999999, expected at most 1e+09"),
    ("name=''", "'name' is '', expected a name for a folder"),
    ("name=../../x", "'name' is '../../x', expected a name for a folder"),
    ("seed=-1", "'seed' is -1, expected at least 0"),
    ("student.mean=[.inf, 0, 0]", "'student.mean.0' is inf, expected a finite number"),
    ("student.std=[0, 0, 0]", "'student.std.0' is 0, expected at least 0.001"),
    ("student.layer_scale=.nan", "'student.layer_scale' is nan, expected a finite number"),
    ("student.overrides.depth=-1", "'student.overrides.depth' is -1, expected more than 0"),
    ("student.overrides.patch_size=true", "'student.overrides.patch_size' is true, expected a number"),
    ("student.num_registers=-1", "'student.num_registers' is -1, expected at least 0"),
    ("loss.adaloss=1", "'loss.adaloss' is 1, expected less than 1"),
    ("student.overrides.width=64", "unknown key 'student.overrides.width'"),
    ("student.heads.hidden=1e12", "'student.heads.hidden' is 1000000000000.0, expected at most 1e+09"),
    ("partitions.low.weight=.inf", "'partitions.low.weight' is inf, expected a finite number"),
    ("partitions.low.teachers.toy_clip.size=0", "'partitions.low.teachers.toy_clip.size' is 0, expected more than 0"),
    ("teachers.toy_clip.chunk=0", "'teachers.toy_clip.chunk' is 0, expected more than 0"),
    ("engine.deepspeed={prescale_gradients: .nan}", "'engine.deepspeed' is a map, expected"),
    ("engine.watchdog_minutes=.inf", "'engine.watchdog_minutes' is inf, expected a finite number"),
]


@pytest.mark.parametrize(("override", "told"), SLIPS)
def test_a_slip_is_told_with_its_key_and_what_was_expected(override: str, told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(RECIPE, [override])
    assert told in str(caught.value)


def test_slips_in_other_files_are_told_alike(tmp_path: Any) -> None:
    with pytest.raises(RecipeError, match=r"'jitter.zoom' is nan, expected a finite number"):
        load("toy/upsampler/toy_clip", ["jitter.zoom=.nan"])
    with pytest.raises(RecipeError, match=r"'start.tiles' is true, expected a number"):
        load_vlm_recipe("toy/vlm_projector", ["start.tiles=true"])
    with pytest.raises(CardError, match=r"'tasks.imagenet1k_knn.temperature' is inf, expected a finite number"):
        load_suite("classification", overrides=["imagenet1k_knn.temperature=.inf"])
    for slip, told in (
        ("input: {std: [0, 0, 0]}", r"'input.std.0' is 0, expected at least 0.001"),
        ("input: {std: [.nan, 1, 1]}", r"'input.std.0' is nan, expected a finite number"),
        ("input: {mean: [123.7, 0, 0]}", r"'input.mean.0' is 123.7, expected at most 1"),
        ("output: {features: true}", r"'output.features' is true, expected a number"),
    ):
        (tmp_path / "card.yaml").write_text(f"extends: toy_clip\nname: c\n{slip}\n")
        with pytest.raises(CardError, match=told):
            load_card(tmp_path / "card.yaml")


def test_the_numbers_that_people_use_pass() -> None:
    assert load_recipe(RECIPE, ["optim.lr=1e-3", "optim.steps=1e3", "optim.clip=null", "seed=0"]).optim.steps == 1000
    pixels_to_255 = {"size": 64, "patch": 16, "mean": [0, 0, 0], "std": [1 / 255] * 3}
    facts = {"name": "x", "family": "timm", "source": "x", "licence": "x", "output": {"summary": None, "features": 4}}
    assert TeacherCard.model_validate({**facts, "input": pixels_to_255}).input.std[0] == 1 / 255
