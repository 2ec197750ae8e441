"""Whole trainings with teachers on ranks of their own, and with several students: the same numbers as without.

Ranks are processes of one test module that train one recipe after the other, so that imports are paid once.
"""

import json
import os
import time
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
from conftest import REPO
from launch import launch
from made_upsampler import make
from PIL import Image
from torch.multiprocessing.spawn import ProcessExitedException

from radio_distill.config.load import load_recipe
from radio_distill.distill.bank import TeacherBank
from radio_distill.distill.loop import train
from radio_distill.errors import RadioDistillError
from radio_distill.runs import artifact_folder
from radio_distill.student.load import load_student
from radio_distill.toyworld import render_images
from radio_distill.train import preempt
from radio_distill.train.status import read_status

pytestmark = pytest.mark.timeout(900)  # a test may make 14 trainings; seconds each, minutes on a busy machine

STEPS = 2
TINY = [
    "student.overrides={patch_size: 8, embed_dim: 32, depth: 1, num_heads: 2}",
    "student.heads={hidden: 16, inner: 0}",
    "start={kind: scratch}",
    f"optim={{steps: {STEPS}, freeze_trunk: 1, warmup: 1}}",
    "data.streams=2",
    "log={every: 1, pictures: 0}",
]
WINDOW = "balance={ahead: false, window: 2, every: 1}"
AHEAD = "balance={ahead: true, window: 1}"
HIGH = ["partitions.low.images=8", "partitions.high.images=2", AHEAD, "partitions.high.micro_batch=1"]
RECIPES = {
    "stage1": ["partitions.low.images=32", WINDOW],
    "stage2": ["partitions.low.images=16", AHEAD, "data.shift_std=0.5"],  # of 8 images, rounding turns axes of PHI-S
    "stage3": HIGH,
    "stage3_tile": HIGH,
    "stage3_s2": HIGH,
    "stage3_featsharp": [*HIGH, "optim.kind=lamb"],
    "stage3_featup": HIGH,
}
PLACES = {"1": 1, "2": 2, "1+1": 2, "1+2": 3, "2+1": 3}
FEW = ("stage1", "stage3_featsharp")
"""Trained in places of three ranks too."""

Job = tuple[str, list[str]]


def next_job(environment: dict[str, str], number: int) -> None:
    """Be a rank of a new job, at a port of its own: the addresses of a process's last job are still in its store."""
    port = 20_000 + (int(environment["MASTER_PORT"]) + 101 * number) % 10_000
    os.environ.update(environment | {"MASTER_PORT": str(port)})


def placement(place: str) -> list[str]:
    students, _, teachers = place.partition("+")
    return [f"engine.placement={{kind: dedicated, student_ranks: {students}, teacher_ranks: {teachers}}}"] if teachers else []


def train_all(rank: int, jobs: list[Job]) -> None:
    environment = dict(os.environ)
    for number, (name, overrides) in enumerate(jobs):
        next_job(environment, number)
        assert train(load_recipe(f"toy/{name}", overrides)) == 0


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [*range(1, STEPS + 1)]
    return [x for row in rows for x in (row["loss"], row["grad_norm"])]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i, pixels in enumerate(render_images(5, range(48), size=64)):
        Image.fromarray(pixels).save(folder / f"{i:02d}.jpg", quality=95)
    return f"data.sources.toy.path={folder}"


@pytest.fixture(scope="module")
def upsamplers(tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("upsamplers"), {}
    for kind in ("featsharp", "featup"):
        found[f"stage3_{kind}"] = []
        for name in ("toy_clip", "toy_siglip"):
            path = make(folder / f"{kind}_{name}", name, kind=kind, factor=3, debias=True)
            maps = {"low": f"{{kind: debias, weights: {path}}}"}
            maps["high"] = f"{{kind: {kind}, factor: 3, weights: {path}, debias: true}}"
            found[f"stage3_{kind}"] += [f"partitions.{p}.teachers.{name}.upsampler={spec}" for p, spec in maps.items()]
    return found


@pytest.fixture(scope="module")
def at(photos, upsamplers, tmp_path_factory):
    """Loss and gradient norm of every step by recipe, for a place."""

    @cache
    def trained(place):
        folder, names = tmp_path_factory.mktemp("place"), RECIPES if PLACES[place] < 3 else FEW
        common = {name: [*TINY, *RECIPES[name], *upsamplers.get(name, []), photos, *placement(place)] for name in names}
        launch(train_all, PLACES[place], [(name, [*common[name], f"run={folder / name}"]) for name in names])
        return {name: losses(folder / name) for name in names}

    return trained


def test_every_toy_stage_is_compared():
    assert set(RECIPES) == {path.stem for path in (REPO / "recipes" / "toy").glob("stage*.yaml")}


@pytest.mark.parametrize(
    ("place", "same", "tolerance"),
    [
        ("2", "1", 1e-4),  # sums over ranks have another order
        ("1+1", "1", 1e-6),
        ("1+2", "1", 1e-6),
        ("2+1", "2", 1e-6),
    ],
)
def test_every_recipe_gives_the_same_losses_wherever_its_teachers_run(at, place, same, tolerance):
    assert len(at(place)) >= len(FEW)
    for recipe, values in at(place).items():
        assert values == pytest.approx(at(same)[recipe], rel=tolerance), recipe


def stop_and_go_on(rank: int, overrides: list[str]) -> None:
    environment, recipe = dict(os.environ), load_recipe("toy/stage1", overrides)
    if rank == 1:
        preempt.ask("SIGUSR1")  # only the teachers hear of it
    assert train(recipe) == preempt.STOPPED
    preempt._received.clear()
    next_job(environment, 1)
    assert train(recipe) == 0


def test_a_teacher_that_is_asked_to_stop_stops_the_job_which_then_goes_on_exactly(at, photos, tmp_path):
    overrides = [*TINY, *RECIPES["stage1"], photos, f"run={tmp_path / 'run'}", *placement("1+1")]
    launch(stop_and_go_on, 2, overrides)
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("step-*")) == ["step-00000001", "step-00000002"]
    assert losses(tmp_path / "run") == at("1")["stage1"]


def stop_before_the_answer(rank: int, overrides: list[str], gone: Path) -> None:
    """Stop after a step whose next batch the teachers still work on when the student has left."""
    encode, seen = TeacherBank.encode, []

    def slow(bank, batch):
        seen.append(batch)
        while len(seen) == 3 and not gone.exists():  # after statistics and step 0
            time.sleep(0.01)
        return encode(bank, batch)

    preempt.ask("SIGUSR1")
    with mock.patch.object(TeacherBank, "encode", slow):
        assert train(load_recipe("toy/stage1", overrides)) == preempt.STOPPED
    if rank == 0:
        gone.touch()


def test_a_student_that_stops_does_not_wait_for_its_next_batch_and_its_teachers_end_like_it(photos, tmp_path):
    overrides = [*TINY, *RECIPES["stage1"], AHEAD, photos, f"run={tmp_path / 'run'}", *placement("1+1")]
    launch(stop_before_the_answer, 2, overrides, tmp_path / "gone")


def fail(rank: int, overrides: list[str], folder: Path, how: str) -> None:
    recipe, encode = load_recipe("toy/stage1", overrides), TeacherBank.encode

    def broken(bank, batch):
        if how == "lost":
            raise MemoryError("out of memory")
        outputs = encode(bank, batch)
        outputs["toy_dino"].features_BCHW[3] = float("nan")
        return outputs

    with mock.patch.object(TeacherBank, "encode", broken):
        try:
            text = f"exit code {train(recipe)}"
        except (RadioDistillError, MemoryError) as error:
            text = str(error)
    (folder / f"{how}-{rank}").write_text(text)


@pytest.mark.parametrize(
    ("how", "student", "teacher"),
    [
        ("nan", "teacher 'toy_dino' gave non-finite features at step 0 on rank 0 (partition 'low') for 1 of 32", "exit code 0"),
        ("lost", "the connection to teacher rank 1 of block 0 is gone; the log of that rank says why", "out of memory"),
    ],
)
def test_what_goes_wrong_at_a_teacher_is_told_by_the_student(photos, tmp_path, how, student, teacher):
    overrides = [*TINY, *RECIPES["stage1"], photos, f"run={tmp_path / 'run'}", *placement("1+1")]
    launch(fail, 2, overrides, tmp_path, how)
    assert student in (tmp_path / f"{how}-0").read_text()
    assert teacher in (tmp_path / f"{how}-1").read_text()
    assert not (tmp_path / "run" / "checkpoints").exists()


def hang(rank: int, overrides: list[str], folder: Path, batches: int) -> None:
    """Train; rank 1's teachers hang after so many batches, and its watchdog is the first to see it."""
    os.dup2(os.open(folder / f"{rank}.stderr", os.O_CREAT | os.O_WRONLY), 2)
    encode, seen = TeacherBank.encode, []

    def hanging(bank, batch):
        seen.append(batch)
        if rank == 1 and len(seen) > batches:
            time.sleep(1000)
        return encode(bank, batch)

    with mock.patch.object(TeacherBank, "encode", hanging):
        train(load_recipe("toy/stage1", [*overrides, f"engine.watchdog_minutes={[5, 0.15][rank]}"]))


@pytest.mark.parametrize(
    ("place", "batches", "step"),
    [
        ("2", 0, 0),  # in the statistics, before the first step
        ("1+1", 2, 1),
    ],
)
def test_a_rank_whose_teacher_hangs_shows_its_stacks_and_ends_with_1(photos, tmp_path, place, batches, step):
    overrides = [*TINY, *RECIPES["stage1"], AHEAD, photos, f"run={tmp_path / 'run'}", *placement(place)]
    with pytest.raises(ProcessExitedException) as ended:
        launch(hang, 2, overrides, tmp_path, batches)
    assert ended.value.exit_code == 1
    shown = (tmp_path / "1.stderr").read_text()
    assert "Timeout (0:00:09)!" in shown
    assert "in hanging\n" in shown
    assert read_status(tmp_path / "run").step == step


SMALL = (
    "{model: vit_small_patch16_224, max_size: 256, overrides: {patch_size: 8, embed_dim: 16, depth: 2, num_heads: 2}, "
    "heads: {hidden: 8}, spectral: false}"
)


def stop_once(rank: int, overrides: list[str]) -> None:
    environment, recipe = dict(os.environ), load_recipe("toy/stage1", overrides)
    preempt.ask("SIGUSR1")
    assert train(recipe) == preempt.STOPPED
    preempt._received.clear()
    next_job(environment, 1)
    assert train(recipe) == 0


def test_several_students_learn_what_each_would_learn_alone(at, photos, tmp_path):
    common = [*TINY, *RECIPES["stage1"], photos]
    launch(stop_once, 1, [*common, f"run={tmp_path / 'both'}", f"students.small={SMALL}"])
    launch(train_all, 1, [("stage1", [*common, f"run={tmp_path / 'alone'}", f"student={SMALL}"])])
    assert losses(tmp_path / "both") == at("1")["stage1"]
    assert losses(tmp_path / "both" / "students" / "small") == losses(tmp_path / "alone")
    student = load_student(artifact_folder(tmp_path / "both" / "students" / "small"))
    assert student.arch.trunk.embed_dim == 16
