"""`embed` and `curate` on a Ray cluster of this machine's cores. Skipped where ray is not installed; docs/scale.md says with which it was run."""

import os
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
from made_curation import blobs, embedded, kept_of, recipe_of

from radio_distill.cli import main
from radio_distill.curate.embeddings import EmbeddingFolder
from radio_distill.curate.on_ray import in_folder, on_ray
from radio_distill.curate.run import curate
from radio_distill.errors import DataError
from radio_distill.toyworld import write_toyworld


@pytest.fixture(scope="module")
def cluster():
    """Two cores of this machine, or the cluster that RAY_ADDRESS names; nothing is reported to anybody."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray = pytest.importorskip("ray")
        ray.init(include_dashboard=False, logging_level="ERROR", **({} if "RAY_ADDRESS" in os.environ else {"num_cpus": 2}))
        with on_ray("auto") as joined:
            yield joined
        ray.shutdown()


def test_a_curation_on_ray_is_that_of_one_machine_bit_for_bit(cluster, tmp_path, monkeypatch):
    x, _ = blobs([20_000 // rank for rank in range(1, 13)], width=16, spread=0.15)
    folder = embedded(tmp_path / "embedded", x)
    monkeypatch.setattr("radio_distill.curate.spread.PART", 2 * 16 * 8192)  # eight parts
    settings = {"count": 3000, "duplicates": 0.995, "iterations": 4}
    alone, apart = (curate(recipe_of(folder, tmp_path / str(ray), ray=ray, **settings)) for ray in (None, "auto"))
    for path in (alone / "clusters").iterdir():
        ours, theirs = np.load(apart / "clusters" / path.name), np.load(path)
        assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)
    assert kept_of(apart) == kept_of(alone)


def test_embeddings_made_on_ray_are_those_of_one_process(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_toyworld("scenes", count=12, size=48, seed=0, shards=3)
    arguments = ["--model", "teacher:toy_clip", "--size", "48", "--batch", "2", "--workers", "0"]
    assert main(["embed", "scenes", "alone", *arguments]) == 0
    assert main(["embed", "scenes", "apart", *arguments, "--ray", "auto"]) == 0
    alone, apart = (EmbeddingFolder(tmp_path / name) for name in ("alone", "apart"))
    assert np.array_equal(apart.load(), alone.load())
    assert [apart.keys(i) for i in range(3)] == [alone.keys(i) for i in range(3)]
    assert apart.header() == alone.header()


def test_what_fails_in_a_task_is_told(cluster):
    with pytest.raises(DataError, match=r"^\S+ has no /nowhere/000000.safetensors; all machines"):
        cluster.get(cluster.run(EmbeddingFolder(Path("/nowhere")).slices, [(0, 0, 5)]))
    with pytest.raises(DataError, match=r"failed \(ZeroDivisionError: .*what is written stays"):
        cluster.get(cluster.run(divmod, 1, 0))
    with pytest.raises(DataError, match=r"a task of the Ray cluster failed .*Worker"):
        cluster.get(cluster.run(os._exit, 3))
    with pytest.raises(DataError, match="has no folder /nowhere/at/all"):
        cluster.get(cluster.run(in_folder, "/nowhere/at/all", os.getcwd))


def test_one_value_of_a_list_is_no_list(cluster):
    assert [cluster.get(handle) for handle in cluster.run_for_each(1, list, (5,))] == [5]
    assert [cluster.get(handle) for handle in cluster.run_for_each(2, list, (5, 6))] == [5, 6]


def test_a_task_that_finds_no_room_is_told(cluster):
    with (
        pytest.raises(DataError, match="has 2 cores and a task takes 9; add machines, or take fewer --workers"),
        on_ray("auto", cores=9),
    ):
        pass


def test_no_cluster_and_no_ray_are_told(monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DataError, match=r'pip install "radio-distill\[ray\]"'), on_ray("auto"):
        pass
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


@pytest.mark.parametrize("address", ["auto", "localhost", "localhost:nine", ""])
def test_an_address_without_a_cluster_is_told(address, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", no_cluster)
    with pytest.raises(DataError, match=f"no Ray cluster at '{address}' .*ray start --head"), on_ray(address):
        pass


def no_cluster(**_):
    raise ConnectionError("Could not find any running Ray instance.")


def test_a_silent_port_is_told_at_once(monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(DataError, match=f"no Ray cluster at '127.0.0.1:{port}'"), on_ray(f"127.0.0.1:{port}"):
        pass
