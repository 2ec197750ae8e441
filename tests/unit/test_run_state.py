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
from radio_distill.train.integrity import damage, facts_of, refuse_to_start_over, set_damaged_aside
from radio_distill.train.partition import assign
from radio_distill.train.streams import forwards
from radio_distill.train.writing import Files
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
    with pytest.raises(CheckpointError, match=r"GiB free and a checkpoint needs 931322\.\d GiB; free some space"):
        checkpoint.check_space(tmp_path, 10**15 * 10 // 12)


def write(run, step, save, keep=2):
    files = Files(copies=False)
    draft = checkpoint.Draft(run, runs.Meta(step=step, world_size=1, zero=1, recipe="r", artifact="student"), 0)
    draft.open(files, save, lambda: None)
    draft.write(files)
    return draft.publish(keep, lambda: None)


def test_nothing_half_written_carries_a_final_name(tmp_path):
    def fail(*_):
        raise OSError("disk full")

    told = r"rank 0 could not write .*step-00000005 \(disk full; .*the previous checkpoint is intact"
    for save in (fail, lambda _, files: files.later(fail)):
        with pytest.raises(CheckpointError, match=told):
            write(tmp_path, 5, save)
        assert runs.latest(tmp_path) is None
    write(tmp_path, 5, lambda folder, files: files.later(lambda: (folder / "a").write_text("a")))
    assert runs.latest(tmp_path) == tmp_path / "checkpoints" / "step-00000005"
    assert not list((tmp_path / "checkpoints").glob(".tmp*"))


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def alter(path):
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def save(run, step, keep=2):
    def hold(folder, files):
        (folder / "engine").mkdir()
        files.later(lambda: (folder / "engine" / "state.pt").write_text("state"))
        checkpoint.save_rank(folder, files, 0, {}, {})

    return write(run, step, hold, keep)


def steps(run):
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


def put(text):
    return lambda path: path.write_text(text)


@pytest.mark.parametrize(
    ("file", "harm", "told"),
    [
        ("engine/state.pt", cut, "engine/state.pt has 4 bytes and was written with 5"),
        ("engine/state.pt", alter, "engine/state.pt is not what was written"),
        ("engine/state.pt", Path.unlink, "engine/state.pt is missing"),
        ("files.json", Path.unlink, "files.json is missing"),
        ("files.json", put("[]"), "files.json cannot be read"),
        ("files.json", put("{"), "files.json cannot be read"),
        ("files.json", put('{"a": 1}'), "files.json cannot be read"),
        ("files.json", lambda path: path.write_bytes(b"\xff\xfe\0"), "files.json cannot be read"),
        ("meta.json", put("{"), "meta.json is missing or cannot be read"),
        ("meta.json", put("[1]"), "meta.json is missing or cannot be read"),
        ("meta.json", Path.unlink, "meta.json is missing or cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_taken(tmp_path, caplog, file, harm, told):
    for step in (2, 4):
        save(tmp_path, step)
    set_damaged_aside(tmp_path)
    assert not caplog.records
    (tmp_path / "checkpoints" / "latest").write_text("step-00000004\n")
    harm(tmp_path / "checkpoints" / "step-00000004" / file)
    set_damaged_aside(tmp_path)
    if file != "meta.json" or harm is not Path.unlink:  # without it, it never was complete
        assert f"step-00000004 is damaged: {told}" in caplog.text
        assert (tmp_path / "checkpoints" / "damaged-step-00000004").is_dir()
    assert runs.latest(tmp_path) == tmp_path / "checkpoints" / "step-00000002"


def test_a_run_whose_checkpoints_are_all_damaged_stops_instead_of_starting_again(tmp_path):
    for _ in range(2):  # and the same step twice
        cut(save(tmp_path, 5) / "engine" / "state.pt")
        set_damaged_aside(tmp_path)
        with pytest.raises(
            CheckpointError, match=r"all checkpoints of .* are damaged, the newest is .*, or delete .*/checkpoints/damaged-"
        ):
            refuse_to_start_over(tmp_path)
    assert {p.name for p in (tmp_path / "checkpoints").glob("damaged*")} == {"damaged-step-00000005", "damaged-step-00000005.2"}
    save(tmp_path, 5)
    refuse_to_start_over(tmp_path)


def test_ranks_share_the_reading_of_files(tmp_path):
    path = save(tmp_path, 5)
    alter(path / "engine" / "state.pt")  # the first of two files
    assert [damage(path, rank=rank, ranks=2) is None for rank in range(2)] == [False, True]


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        ("zero_pp_rank_12_mp_rank_00_optim_states.pt", 12),
        ("bf16_zero_pp_rank_3_mp_rank_00_optim_states.pt", 3),
        ("mp_rank_00_model_states.pt", 0),
        ("rank-7.json", 7),
        ("student.safetensors", 0),
    ],
)
def test_every_rank_reads_back_what_it_wrote_itself(tmp_path, name, rank):
    (tmp_path / name).write_text("x")
    assert [[*facts_of(tmp_path, r)] for r in (rank, rank + 1)] == [[name], []]


def test_what_latest_names_is_never_deleted(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, keep=3)
    (tmp_path / "checkpoints" / "latest").write_text("step-00000010\n")  # the user goes back
    save(tmp_path, 12)
    assert steps(tmp_path) == [10, 12]
    assert runs.latest(tmp_path).name == "step-00000012"


@pytest.mark.parametrize("name", ["../elsewhere", "/tmp", "step-1", "", "step-00000005/../../x"])
def test_latest_cannot_point_outside(tmp_path, name, caplog):
    save(tmp_path, 5)
    (tmp_path / "checkpoints" / "latest").write_text(name)
    assert runs.latest(tmp_path).name == "step-00000005"
    assert ("is ignored" in caplog.text) == bool(name)


@pytest.mark.parametrize(("size", "text"), [(3, "3 bytes"), (2048, "2.0 KiB"), (20 << 20, "20.0 MiB"), (3 << 39, "1536.0 GiB")])
def test_sizes_are_told_in_a_unit_of_which_there_is_one(size, text):
    assert checkpoint.size_text(size) == text


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
    assert "<td>51.26</td>" in page
    assert "<td>4.25</td>" in page  # fidelity at the end of stage 2
    assert "http" not in page.replace("http-equiv", "")
    assert "| stage2 | 96 | 51.26 |" in (tmp_path / "report.md").read_text()


def test_a_folder_without_runs_has_no_report(tmp_path):
    with pytest.raises(CheckpointError, match=r"is no run and holds none; expected recipe\.yaml"):
        write_report(tmp_path)
