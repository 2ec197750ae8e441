"""Checkpoints, meters and messages without a training."""

from pathlib import Path

import pytest
import torch

from radio_distill import runs, viz
from radio_distill.config.load import dump, load_recipe
from radio_distill.errors import CheckpointError, RecipeError
from radio_distill.eval.__main__ import append
from radio_distill.eval.report import write_report
from radio_distill.log.meter import Meter, with_fidelity
from radio_distill.log.sinks import Sinks, console_line, drop_metrics_after, read_metrics
from radio_distill.train import checkpoint
from radio_distill.train.integrity import set_damaged_aside
from radio_distill.train.partition import assign
from radio_distill.train.streams import forwards
from radio_distill.types import Result


def test_fidelity_is_variance_over_error_of_the_summed_interval():
    meter = Meter(torch.device("cpu"))
    for error, variance in ((1.0, 4.0), (3.0, 4.0)):
        meter.add({"error/low/sam": torch.tensor(error), "variance/low/sam": torch.tensor(variance), "loss": torch.tensor(2.0)})
        meter.steps += 1
    metrics = meter.collect()
    assert metrics == {"fidelity/low/sam": 2.0, "loss": 2.0}
    assert meter.steps == 0


def test_a_meter_goes_on_where_it_was_saved():
    meter, other = Meter(torch.device("cpu")), Meter(torch.device("cpu"))
    meter.add({"loss": torch.tensor(0.1)})
    meter.steps = 1
    other.load(meter.state())
    assert other.collect() == meter.collect()


def test_a_perfect_prediction_has_a_finite_fidelity():
    assert with_fidelity({"error/a/b": 0.0, "variance/a/b": 1.0})["fidelity/a/b"] > 1e20


def test_metrics_after_the_checkpoint_are_forgotten_and_half_lines_ignored(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n{"step": 3, "lo')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    drop_metrics_after(tmp_path, 1)
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_the_console_line_shows_fidelity_per_teacher_in_the_order_of_the_partitions():
    recipe = load_recipe("toy/stage3")
    metrics = dict.fromkeys(("loss", "grad_norm", "lr", "images_per_s", "time/data", "time/teachers"), 0.5) | {
        "time/left_h": 7.2
    }
    metrics |= {f"fidelity/{p}/{t}": 1.0 for p in ("high", "low") for t in recipe.teachers}
    metrics |= {"fidelity/high/toy_clip": 1.8, "fidelity/low/toy_clip": 2.5}
    assert console_line(20, recipe, metrics | {"time/left_h": 1.9999}).endswith("eta 1h59")
    line = console_line(20, recipe, metrics)
    assert "step     20/60  loss 0.5000  fidelity toy_clip 2.50/1.80 toy_siglip 1.00/1.00" in line
    assert line.endswith("data 50%  teachers 50%  eta 7h12")


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path):
    with pytest.raises(CheckpointError, match=r"GiB free and a checkpoint needs 931322.* free some space"):
        checkpoint.check_space(tmp_path, 10**15 * 10 // 12)


def test_nothing_half_written_carries_a_final_name(tmp_path):
    def fail(folder):
        raise OSError("disk full")

    meta = runs.Meta(step=5, world_size=1, zero=1, recipe="r", artifact="student")
    arguments = {
        "rank": 0,
        "barrier": lambda: None,
        "save_shared": lambda f: None,
        "rank_state": {},
        "rank_tensors": {},
        "keep_last": 2,
    }
    with pytest.raises(
        CheckpointError, match=r"rank 0 could not write .*step-00000005 \(disk full; .*the checkpoint before it stands"
    ):
        checkpoint.write(tmp_path, meta, save_engine=fail, **arguments)
    assert runs.latest(tmp_path) is None
    checkpoint.write(tmp_path, meta, save_engine=lambda f: f.mkdir(), **arguments)
    assert runs.latest(tmp_path) == tmp_path / "checkpoints" / "step-00000005"
    assert not list((tmp_path / "checkpoints").glob(".tmp*"))


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def alter(path):
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


@pytest.mark.parametrize(
    ("harm", "told"),
    [(cut, "has 4 bytes and was written with 5"), (alter, "is not what was written"), (Path.unlink, "is missing")],
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_taken(tmp_path, caplog, harm, told):
    def save_engine(folder):
        folder.mkdir()
        (folder / "state.pt").write_text("state")

    for step in (2, 4):
        meta = runs.Meta(step=step, world_size=1, zero=1, recipe="r", artifact="student")
        checkpoint.write(
            tmp_path, meta, rank=0, barrier=lambda: None, save_engine=save_engine, save_shared=lambda f: None,
            rank_state={}, rank_tensors={}, keep_last=2,
        )  # fmt: skip
    set_damaged_aside(tmp_path)
    assert not caplog.records
    harm(tmp_path / "checkpoints" / "step-00000004" / "engine" / "state.pt")
    set_damaged_aside(tmp_path)
    assert f"step-00000004 is damaged: engine/state.pt {told}" in caplog.text
    assert (tmp_path / "checkpoints" / "damaged-step-00000004").is_dir()
    assert runs.latest(tmp_path) == tmp_path / "checkpoints" / "step-00000002"


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint; expected a run folder"):
        runs.artifact_folder(tmp_path)
    with pytest.raises(CheckpointError, match="is not a complete checkpoint"):
        runs.read_meta(tmp_path)


def test_a_micro_batch_that_does_not_divide_names_one_that_does():
    recipe = load_recipe("toy/stage1", ["partitions.low.images=32", "partitions.low.micro_batch=12"])
    assignment = assign(images={"low": 32}, costs={"low": 1.0}, world_size=2)
    with pytest.raises(RecipeError, match="micro_batch=12 does not divide the 16 images of a rank; use 8"):
        forwards(recipe, assignment, 0)


def test_metrics_and_pictures_reach_tensorboard_and_wandb_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    recipe = load_recipe("toy/stage1", ["log.tensorboard=true", "log.wandb=test"])
    sinks = Sinks(recipe, tmp_path)
    sinks.write(1, {"loss": 0.5})
    viz.save_png(torch.rand(3, 8, 8), tmp_path / "a.png")
    sinks.picture(1, "pca/low", tmp_path / "a.png")
    sinks.close()
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 0.5}]
    assert list((tmp_path / "tensorboard").glob("events.out.*"))
    assert list((tmp_path / "wandb").glob("offline-run-*"))


class Gone:
    """A wandb run whose server went away."""

    def log(self, values, step):
        raise ConnectionError("no route to host")


def test_wandb_that_goes_away_costs_nothing_but_its_own_curves(tmp_path, caplog):
    sinks = Sinks(load_recipe("toy/stage1"), tmp_path)
    sinks._wandb = Gone()
    for step in (1, 2):
        sinks.write(step, {"loss": 0.5})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    assert caplog.text.count("wandb does not answer (no route to host)") == 1


def test_principal_components_show_what_varies():
    """Two regions with different features get two colours; the picture lies in [0, 1]."""
    features = torch.zeros(2, 5, 4, 4)
    features[:, 3, :, :2] = 7.0
    picture = viz.pca_rgb(features)
    assert picture.shape == (2, 3, 4, 4)
    assert picture.min() >= 0
    assert picture.max() <= 1
    assert (picture[:, 0, :, 0] - picture[:, 0, :, 3]).abs().min() > 0.9


def test_a_report_is_one_file_with_curves_tables_and_pictures(tmp_path):
    for i, name in enumerate(("stage1", "stage2")):
        run = tmp_path / name
        (run / "pictures").mkdir(parents=True)
        (run / "recipe.yaml").write_text(dump(load_recipe("toy/stage1")))
        (run / "metrics.jsonl").write_text(
            "".join(f'{{"step": {s}, "loss": {3 - s}, "fidelity/low/toy_clip": {1 + s + i}.25}}\n' for s in (1, 2))
        )
        viz.save_png(torch.rand(3, 8, 8), run / "pictures" / "step-1-low.png")
    shared = {"suite": "toy", "unit": "percent", "higher_is_better": True, "dataset": "toyworld", "count": 9, "resolution": 96}
    append(
        tmp_path / "results.jsonl",
        [
            Result(task="knn", metric="top1", value=51.26, model="stage2", **shared),
            Result(task="knn", metric="top1", value=33.0, model="teacher:toy_clip", **shared),
        ],
    )
    page = write_report(tmp_path).read_text()
    assert page.count('role="img"') == 2
    assert page.count("data:image/png;base64") == 2
    assert "<td>51.3</td>" in page
    assert "<td>4.25</td>" in page  # fidelity at the end of stage 2
    assert "http" not in page.replace("http-equiv", "")
    assert "| stage2 | 96 | 51.3 |" in (tmp_path / "report.md").read_text()


def test_a_folder_without_runs_has_no_report(tmp_path):
    with pytest.raises(CheckpointError, match=r"is no run and holds none; expected recipe\.yaml"):
        write_report(tmp_path)
