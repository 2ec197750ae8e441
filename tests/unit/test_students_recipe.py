"""Recipes with several students, and what is said about those, and placements, that cannot run."""

from pathlib import Path

import pytest

from radio_distill.config.load import load_recipe, load_upsampler_recipe, load_vlm_recipe
from radio_distill.errors import CheckpointError, RecipeError
from radio_distill.runs import latest_of_all

B = "students.b={model: vit_base_patch16_224, start: {kind: run, source: runs/other/students/b}}"


def test_each_student_has_the_recipe_that_would_train_it_alone():
    own, sibling = load_recipe("stage1", [B]).each()
    alone = load_recipe("stage1", ["name=stage1_b", "run=runs/stage1/students/b", "checkpoint.keep_last=3"])
    assert own == load_recipe("stage1", [B])
    assert (sibling.student.model, sibling.start.source, sibling.students) == (
        "vit_base_patch16_224",
        "runs/other/students/b",
        {},
    )
    assert sibling.model_copy(update={"student": alone.student, "start": alone.start}) == alone


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("students.h={model: vit_huge_patch14_224}", "has patches of 14 px and the recipe's student of 16; targets are shared"),
        ("students.a/b={model: vit_base_patch16_224}", "student 'a/b': its name is that of a folder; use letters, digits"),
        ("students.b={max_size: 128}", "'partitions.low.size' is 256, more than students.b.max_size 128; raise that"),
        ("students.b={start: {kind: run}}", "'students.b.start.source' is missing: a start of kind 'run' needs it"),
    ],
)
def test_a_student_that_cannot_share_the_targets_is_refused(override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe("stage1", [override])


def test_an_upsampler_has_no_teacher_ranks():
    with pytest.raises(RecipeError, match="'dedicated', which only stages have: an upsampler's teacher runs on every rank"):
        load_upsampler_recipe("upsampler/dfn_clip_3x", ["engine.placement={kind: dedicated}"])


def test_a_vlm_has_no_teacher_ranks():
    with pytest.raises(RecipeError, match="'dedicated', which only stages have: a VLM has no teachers"):
        load_vlm_recipe("toy/vlm_projector", ["engine.placement={kind: dedicated}"])


def test_students_go_on_from_the_step_of_the_first(tmp_path: Path):
    runs = [tmp_path / "run", tmp_path / "run" / "students" / "b"]
    assert latest_of_all(runs) == [None, None]
    for run, steps in zip(runs, ((2, 4), (2, 4, 6))):  # the job died after the sibling's save
        for step in steps:
            folder = run / "checkpoints" / f"step-{step:08d}"
            folder.mkdir(parents=True)
            (folder / "meta.json").write_text("{}")
        (run / "checkpoints" / "latest").write_text(f"step-{steps[-1]:08d}\n")
    assert latest_of_all(runs) == [run / "checkpoints" / "step-00000004" for run in runs]
    (runs[1] / "checkpoints" / "step-00000004" / "meta.json").unlink()
    with pytest.raises(CheckpointError, match="is missing, and the students of a recipe resume together from step-00000004"):
        latest_of_all(runs)
