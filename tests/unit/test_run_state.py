"""Checkpoints, meters and messages without a training."""

import pytest
import torch

from radio_distill.config.load import load_recipe
from radio_distill.errors import CheckpointError, RecipeError
from radio_distill.log.meter import Meter, with_fidelity
from radio_distill.log.sinks import console_line, drop_metrics_after, read_metrics
from radio_distill.train import checkpoint
from radio_distill.train.partition import assign
from radio_distill.train.streams import forwards


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


def test_the_console_line_shows_fidelity_per_teacher_and_partition():
    metrics = {
        "loss": 0.4312, "grad_norm": 0.82, "lr": 9.8e-4, "images_per_s": 2310.0, "time/data": 0.01, "time/teachers": 0.7, "time/left_h": 7.2,
        "fidelity/low/dfn": 2.5, "fidelity/high/dfn": 1.8,
    }  # fmt: skip
    line = console_line(1200, 50000, metrics)
    assert "step   1200/50000  loss 0.4312  fidelity dfn 2.50/1.80  grad 0.82  lr 9.8e-04  2310 img/s  data 1%" in line
    assert line.endswith("eta 7h12")


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path):
    with pytest.raises(CheckpointError, match=r"GiB free and a checkpoint needs 931322.* free some space"):
        checkpoint.check_space(tmp_path, 10**15 * 10 // 12)


def test_nothing_half_written_carries_a_final_name(tmp_path):
    def fail(folder):
        raise OSError("disk full")

    meta = checkpoint.Meta(step=5, world_size=1, zero=1, recipe="r", student="student")
    arguments = {
        "rank": 0,
        "barrier": lambda: None,
        "save_shared": lambda f: None,
        "rank_state": {},
        "rank_tensors": {},
        "keep_last": 2,
    }
    with pytest.raises(OSError, match="disk full"):
        checkpoint.write(tmp_path, meta, save_engine=fail, **arguments)
    assert checkpoint.latest(tmp_path) is None
    checkpoint.write(tmp_path, meta, save_engine=lambda f: f.mkdir(), **arguments)
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoints" / "step-00000005"
    assert not list((tmp_path / "checkpoints").glob(".tmp*"))


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint; expected a run folder"):
        checkpoint.student_folder(tmp_path)
    with pytest.raises(CheckpointError, match="is not a complete checkpoint"):
        checkpoint.read_meta(tmp_path)


def test_a_micro_batch_that_does_not_divide_names_one_that_does():
    recipe = load_recipe("toy/stage1", ["partitions.low.images=32", "partitions.low.micro_batch=12"])
    assignment = assign(images={"low": 32}, costs={"low": 1.0}, world_size=2)
    with pytest.raises(RecipeError, match="micro_batch=12 does not divide the 16 images of a rank; use 8"):
        forwards(recipe, assignment, 0)
