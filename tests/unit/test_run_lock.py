"""The lock of a run folder: one job at a time, whatever became of the job before, on this machine or another."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict, replace

import pytest

from radio_distill.errors import CheckpointError
from radio_distill.train import lock
from radio_distill.train.lock import Owner, RunLock, is_held, read_owner, this_process

ELSEWHERE = Owner("node7", "another boot id", 4711, "99", "2026-01-01T00:00:00+00:00")
IN_USE = r"is in use by another job \(Slurm job 99, process 4711 on node7, since 2026-01-01.*; wait for it, or set run="


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.02)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


def left_by(folder, owner):
    (folder / "lock").write_text(json.dumps(asdict(owner)))


@pytest.fixture
def touched(tmp_path):
    """Touches the lock as a living process on another machine does."""
    over = threading.Event()

    def touch():
        while not over.wait(0.01):
            (tmp_path / "lock").touch()

    thread = threading.Thread(target=touch)
    thread.start()
    yield
    over.set()
    thread.join()


def test_a_released_lock_is_free_and_names_nobody(tmp_path, caplog):
    RunLock(tmp_path).release()
    assert read_owner(tmp_path / "lock") is None
    assert not is_held(tmp_path)
    RunLock(tmp_path).release()
    assert not caplog.records


def test_a_second_process_is_refused_and_told_who_is_at_work(tmp_path):
    left_by(tmp_path, ELSEWHERE)
    with (tmp_path / "lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert is_held(tmp_path)
        with pytest.raises(CheckpointError, match=IN_USE):
            RunLock(tmp_path)


def test_a_killed_process_leaves_a_lock_that_is_taken_over_at_once_with_a_message(tmp_path, caplog):
    code = "import os, sys; from pathlib import Path; from radio_distill.train.lock import RunLock; "
    code += "held = RunLock(Path(sys.argv[1])); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
    assert read_owner(tmp_path / "lock") is not None
    assert not is_held(tmp_path)
    RunLock(tmp_path).release()
    assert "which exited without releasing it; taking it over" in caplog.text


def test_a_job_on_another_machine_that_touches_its_lock_is_alive_whatever_its_clock_says(tmp_path, touched):
    left_by(tmp_path, ELSEWHERE)
    os.utime(tmp_path / "lock", (4e9, 4e9))  # a clock that is decades ahead
    assert is_held(tmp_path)
    with pytest.raises(CheckpointError, match=IN_USE):
        RunLock(tmp_path)


def test_a_job_on_another_machine_that_gives_no_sign_of_life_is_dead(tmp_path, caplog):
    left_by(tmp_path, ELSEWHERE)
    assert not is_held(tmp_path)
    held = RunLock(tmp_path)
    assert "is still locked by Slurm job 99, process 4711 on node7" in caplog.text
    assert is_held(tmp_path)
    held.release()


def test_a_requeued_job_need_not_wait_for_what_it_was_before(tmp_path, touched, monkeypatch):
    left_by(tmp_path, ELSEWHERE)
    monkeypatch.setenv("SLURM_JOB_ID", "99")
    RunLock(tmp_path).release()


def test_two_machines_of_one_name_are_two_machines(tmp_path, touched):
    left_by(tmp_path, replace(ELSEWHERE, host=this_process().host))
    with pytest.raises(CheckpointError, match="is in use"):
        RunLock(tmp_path)


def test_who_looks_asks_for_a_shared_lock_which_nfs_gives_on_a_file_that_is_open_for_reading(tmp_path, monkeypatch):
    flock = fcntl.flock

    def nfs(descriptor, operation):  # flock(2), "NFS details"
        mode = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
        if operation & fcntl.LOCK_EX and mode == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", nfs)
    left_by(tmp_path, this_process())  # killed
    assert not is_held(tmp_path)
    held = RunLock(tmp_path)
    assert is_held(tmp_path)
    held.release()


def test_a_job_starts_although_someone_looks_at_its_lock_at_that_moment(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 5)
    with (tmp_path / "lock").open("a+") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        threading.Timer(0.15, fcntl.flock, (looking, fcntl.LOCK_UN)).start()
        RunLock(tmp_path).release()


def test_a_look_from_inside_the_job_finds_it_alive(tmp_path, touched, monkeypatch):
    left_by(tmp_path, ELSEWHERE)
    monkeypatch.setenv("SLURM_JOB_ID", ELSEWHERE.job)
    assert is_held(tmp_path)


def test_a_file_system_without_locks_goes_by_signs_of_life(tmp_path, monkeypatch):
    def no_locks(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    first = RunLock(tmp_path)
    with pytest.raises(CheckpointError, match="is in use"):
        RunLock(tmp_path)
    first.release()
    RunLock(tmp_path).release()


def test_a_job_whose_folder_was_taken_over_is_stopped_before_it_writes(tmp_path):
    held = RunLock(tmp_path)
    held.check()
    left_by(tmp_path, ELSEWHERE)
    with pytest.raises(CheckpointError, match=r"was taken over by Slurm job 99, .* Stop one of the two"):
        held.check()
    held.release()
    assert read_owner(tmp_path / "lock") == ELSEWHERE  # not ours to clear
