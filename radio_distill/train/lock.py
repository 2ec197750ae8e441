"""One job at a time in a run folder, also where machines do not share locks.

The file `lock` is locked while its process lives, names the owner, and is touched every few seconds. The kernel gives the
lock back however a process ends; on file systems whose locks other machines do not see, the touches tell who is alive. They
are watched for a change, never compared with a clock: clocks of machines differ.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from ..errors import CheckpointError
from ..files import parse_json, typed

__all__ = ["Owner", "RunLock", "is_held", "read_owner", "this_process"]

log = logging.getLogger(__name__)

BEAT_SECONDS = 5.0
WATCHED_BEATS = 4
"""So many beats may be late (a stalled file system) before their process counts as dead."""


@dataclass(frozen=True)
class Owner:
    """A process that uses a run folder."""

    host: str
    machine: str
    """Boot id of its kernel: host names repeat (containers) and change."""
    pid: int
    job: str
    """Slurm's number of the job; empty outside of Slurm."""
    since: str

    def __str__(self) -> str:
        job = f"Slurm job {self.job}, " if self.job else ""
        return f"{job}process {self.pid} on {self.host}, since {self.since}"


class RunLock:
    """Held from its creation to `release` or the end of the process. Raises CheckpointError when another job holds it."""

    def __init__(self, folder: Path) -> None:
        self.path, self.owner = folder / "lock", this_process()
        self._file = self.path.open("a+")
        exclusive = _take(self._file.fileno())
        before = read_owner(self.path)
        if exclusive is False or (
            before and not _is_restart(before, self.owner) and _gives_signs(before, exclusive, self.path)
        ):
            self._file.close()
            raise CheckpointError(
                f"{folder} is in use by another job ({before or 'unknown'}); wait for it, or set run= to another folder"
            )
        if before:
            log.warning("%s is still locked by %s, which exited without releasing it; taking it over", folder, before)
        self._write(json.dumps(asdict(self.owner)))
        self._over = threading.Event()
        threading.Thread(target=self._beat, name="run-lock", daemon=True).start()

    def is_ours(self) -> bool:
        """False when another job took the folder over, because this machine seemed dead for a while."""
        return read_owner(self.path) == self.owner

    def check(self) -> None:
        """Raise CheckpointError when another job took the folder over."""
        if not self.is_ours():
            now = read_owner(self.path)
            raise CheckpointError(
                f"{self.path.parent} was taken over by {now or 'someone who removed its lock'} while this job gave no sign of life; "
                "nothing was written. Stop one of the two"
            )

    def release(self) -> None:
        """Record that the process ended regularly, and release the lock."""
        if not self._file.closed:
            self._over.set()
            if self.is_ours():
                self._write("")
            self._file.close()

    def _write(self, text: str) -> None:
        self._file.truncate(0)  # opened for appending: writes go to the end, which is now the beginning
        self._file.write(text)
        self._file.flush()

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            with suppress(OSError):
                os.utime(self.path)


def this_process() -> Owner:
    """The process that calls."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    host = socket.gethostname()
    machine = boot.read_text().strip() if boot.exists() else host
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Owner(host, machine, os.getpid(), os.environ.get("SLURM_JOB_ID", ""), now)


def read_owner(path: Path) -> Owner | None:
    """Who wrote a lock file last; None when it ended properly."""
    try:
        return typed(Owner, parse_json(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def is_held(folder: Path) -> bool:
    """Whether a job is at work in a run folder. Takes half a minute when only its touches can tell."""
    path = folder / "lock"
    owner = read_owner(path)
    if owner is None:
        return False
    with path.open() as file:  # shared: for an exclusive lock NFS wants a file that is open for writing
        free = _lock(file.fileno(), fcntl.LOCK_SH)
    return free is False or _gives_signs(owner, free, path)


def _take(descriptor: int) -> bool | None:
    """Lock a file for good (see `_lock`). Asks for a while, because `is_held` locks it for a moment."""
    for _ in range(10):
        taken = _lock(descriptor, fcntl.LOCK_EX)
        if taken is not False:
            break
        time.sleep(BEAT_SECONDS / 50)
    return taken


def _lock(descriptor: int, how: int) -> bool | None:
    """True: locked; False: another process has it; None: this file system has no locks."""
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


def _is_restart(before: Owner, now: Owner) -> bool:
    """Whether a job follows itself: Slurm ends a job before it starts it again."""
    return bool(before.job) and before.job == now.job and before.pid != now.pid


def _gives_signs(owner: Owner, locks: bool | None, path: Path) -> bool:
    """Whether an owner that holds no lock that we see is alive all the same: where locks do not reach us, touches tell."""
    return (locks is None or owner.machine != this_process().machine) and _is_touched(path)


def _is_touched(path: Path) -> bool:
    """Watch the file's time for a change. Opening it makes network file systems ask their server."""
    first = _touched_at(path)
    for _ in range(WATCHED_BEATS * 5):
        time.sleep(BEAT_SECONDS / 5)
        if _touched_at(path) != first:
            return True
    return False


def _touched_at(path: Path) -> int:
    with path.open() as file:
        return os.fstat(file.fileno()).st_mtime_ns
