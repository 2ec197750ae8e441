"""Joining the process group from every launcher's variables, without a C++ compiler."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launch import launch

from radio_distill.config.recipe import Recipe
from radio_distill.errors import TrainingError
from radio_distill.train.distributed import init, shutdown
from radio_distill.train.engine import Engine


def slurm_task(rank: int, folder: Path) -> None:
    size = os.environ["WORLD_SIZE"]
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        del os.environ[name]
    os.environ.update(SLURM_PROCID=str(rank), SLURM_NTASKS=size, SLURM_LOCALID=str(rank))
    os.environ.update(PATH="", CXX="no-such-compiler", TORCH_EXTENSIONS_DIR=str(folder / "extensions"))
    world = init("gloo")
    assert (world.rank, world.size, world.local_rank, world.device, world.is_main) == (
        rank,
        2,
        rank,
        torch.device("cpu"),
        rank == 0,
    )
    ranks = torch.tensor(float(rank))
    dist.all_reduce(ranks)
    (folder / str(rank)).write_text(str(ranks.item()))
    shutdown()
    assert not dist.is_initialized()


def test_slurm_tasks_find_each_other_without_a_compiler(tmp_path: Path) -> None:
    launch(slurm_task, 2, tmp_path)
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["1.0", "1.0"]
    assert not (tmp_path / "extensions").exists()


def twice(rank: int) -> None:
    for seed in range(2):
        world = init("gloo")
        recipe = Recipe.model_validate({"name": "t", "teachers": {}, "partitions": {}, "optim": {"freeze_trunk": 0}})
        engine = Engine.create(recipe, torch.nn.Linear(3, 1), world)
        engine.backward(engine(torch.full((1, 3), float(seed))).sum())
        engine.step()
        shutdown()


def test_one_process_can_train_two_runs_after_each_other() -> None:
    launch(twice, 1)


def alone(rank: int, folder: Path) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    assert init("gloo") == init("gloo")
    (folder / "environment").write_text(" ".join(os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    shutdown()
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & set(os.environ)


def test_a_process_without_a_launcher_is_a_job_of_one_and_needs_no_port(tmp_path: Path) -> None:
    launch(alone, 1, tmp_path)
    assert (tmp_path / "environment").read_text() == "0 1 0"


@pytest.mark.parametrize("names", [("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")])
def test_several_processes_without_an_address_are_told_how_to_get_one(
    names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in zip(names, "021"):
        monkeypatch.setenv(name, value)
    with pytest.raises(TrainingError, match=rf"{names[1]}=2 but MASTER_ADDR and MASTER_PORT not set; start with torchrun"):
        init("gloo")
