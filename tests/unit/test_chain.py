"""Chains of recipes: what does not fit together is refused before anything runs. tests/run/test_chain.py runs one."""

import pytest

from radio_distill.chain import check_chain
from radio_distill.cli import main
from radio_distill.config.load import load, load_recipe
from radio_distill.errors import RecipeError

SHIPPED = [
    ["toy/proxy", "toy/proxy_student"], ["toy/fast_stage1", "toy/fast_stage2", "toy/fast_sam"],
    ["proxy/proxy", "proxy/student", "proxy/student_sizes"], ["fast/stage1", "fast/stage2", "fast/sam"],
    ["fast/base_stage1", "fast/base_stage2", "fast/base_sam"], ["upsampler/siglip2_naflex_2x", "fast/featsharp"],
    ["fast/stage1", "fast/stage2_native"],
]  # fmt: skip


@pytest.mark.parametrize("names", SHIPPED)
def test_the_shipped_chains_fit(names: list[str]) -> None:
    check_chain([load(name) for name in names])


def test_the_stages_of_a_chain_start_from_each_other() -> None:
    for _, *later in (names for names in SHIPPED if "fast" in names[0]):
        assert all(load_recipe(name).start.kind == "run" for name in later)


def test_a_recipe_that_needs_a_later_run_is_refused() -> None:
    with pytest.raises(
        RecipeError, match=r"toy_proxy_student: teacher 'toy_proxy' is the run of a later recipe; put that one before it"
    ):
        check_chain([load("toy/proxy_student"), load("toy/proxy")])
    with pytest.raises(RecipeError, match=r"toy_fast_stage2: start.source is the run of itself"):
        check_chain([load("toy/fast_stage2", ["start.source=runs/toy_fast_stage2"])])


def test_recipes_with_one_run_folder_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"toy_stage2: its run folder is .*runs/one, as of a recipe before it"):
        check_chain([load("toy/stage1", ["run=runs/one"]), load("toy/stage2", ["run=runs/one"])])


def test_a_card_that_is_not_of_the_proxys_student_is_refused() -> None:
    with pytest.raises(
        RecipeError,
        match=r"card 'toy_proxy' of the run of toy_proxy does not fit its student: output.features is 192, expected 128; output.summary is 384, expected 256",
    ):
        check_chain([load("toy/proxy", ["student.overrides={embed_dim: 128, num_heads: 4}"]), load("toy/proxy_student")])


def test_chain_refuses_before_it_trains(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chain", "toy/proxy_student", "toy/proxy", "data.sources.toy.path=."]) == 2
    assert "put that one before it" in capsys.readouterr().err
    assert main(["submit", "toy/proxy_student", "toy/proxy", "--dry-run"]) == 2
