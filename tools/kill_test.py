"""Kill everything that takes time, at random moments, start it again until it ends, and compare with a run that nobody disturbed.

    python tools/kill_test.py --minutes 30 [--seed 0] [--jobs 2] [--only training-1,shards]

Trainings on one and two ranks, statistics, an upsampler, a VLM, evaluations, exports and shards, all of a toy size, on the CPU. SIGKILL
comes in the first second, at any moment, or while something is being written; it takes the whole job, one of its ranks or its
launcher alone. What must be equal bit for bit: weights, EMA, balancers, optimizer, losses and gradient norms; results; files of exports;
bytes of shards. What is left behind under a temporary name counts as a difference.

Prints a table; exit code 1 when something differs, hangs or does not end. Linux; a few hundred MB in a temporary folder, which stays when something
differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STUDENT = ["student.overrides={patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}", "student.heads={hidden: 16, inner: 0}"]
STAGE = [
    "toy/stage1", "start={kind: scratch}", *STUDENT, "partitions.low.images=32", "balance.ahead=false", "balance.window=4",
    "balance.every=2", "optim.freeze_trunk=2", "optim.steps=10", "data.streams=2", "data.shuffle=16", "log.every=1", "log.pictures=0",
    "checkpoint.every=2", "checkpoint.keep_last=2",
]  # fmt: skip
UPSAMPLER = [
    "toy/upsampler/toy_clip", "images=4", "optim.steps=6", "balance.window=3", "data.streams=2", "data.shuffle=16", "log.every=1",
    "log.pictures=0", "checkpoint.every=2",
]  # fmt: skip
VLM = [
    "toy/vlm_projector",
    "start.size=32",
    "samples=8",
    "optim.steps=8",
    "optim.warmup=2",
    "log.every=1",
    "checkpoint.every=2",
]
PROBE = ["ade20k.steps=40", "ade20k.warmup=5", "ade20k.short_side=48"]

MOMENTS = ("first second", "any moment", "while writing")
MOST_KILLS = 5
"""Of one trial; then it may end."""
MOST_TRIES = 12
"""Starts that end with an error although nobody killed them: another one may hold the folder for a moment."""
UNFINISHED = (".tmp-*", "*.part", "*.tmp", ".*.part")
FIRST = "training-1"
"""Its student is exported, scored, and made the tower of a VLM."""
MOST_ROUNDS = 10_000
LIVE: set[int] = set()
"""Groups of processes that this one has started."""
PATIENCE_S = 90
"""For processes whose launcher or neighbour was killed to end by themselves."""


class Trouble(Exception):
    """A difference, a hang, or a command that does not end."""


@dataclass(frozen=True)
class Job:
    """One thing that is killed. All paths are below the folder that it is given."""

    name: str
    command: Callable[[Path], list[str]]
    """Arguments of `radio-distill`."""
    result: Callable[[Path], dict[str, Any]]
    """What must be equal, by name."""
    ends: Callable[[Path], bool] = lambda work: False
    """Whether it is finished although the command says no: what is there is not made twice."""
    ranks: int = 1
    on_student: bool = False
    """Whether it starts from the student of FIRST."""


@dataclass
class Outcome:
    """Of one trial."""

    kills: Counter[str] = field(default_factory=Counter)
    trouble: str = ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--minutes", type=float, default=30, help="how long to kill; making the undisturbed runs comes before it (30)"
    )
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 31), help="of the moments (random; it is printed)")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="trials side by side (as many as there are cores)"
    )
    parser.add_argument("--only", help="names of jobs, with commas between them")
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="kill_test-"))

    def give_up(number: int, _: Any) -> None:
        for group in list(LIVE):
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        shutil.rmtree(root, ignore_errors=True)
        os._exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, give_up)
    code = test(root, arguments)
    if code == 1:
        print(f"what differs is kept in {root}")
    else:
        shutil.rmtree(root, ignore_errors=True)
    return code


def test(root: Path, arguments: argparse.Namespace) -> int:
    """Make what the jobs need, run them undisturbed, and then again and again with kills."""
    jobs = make_jobs(root)
    names = arguments.only.split(",") if arguments.only else list(jobs)
    if unknown := set(names) - set(jobs):
        print(f"error: no job {sorted(unknown)[0]!r}; there are {', '.join(jobs)}", file=sys.stderr)
        return 2
    say(f"seed {arguments.seed}; {', '.join(names)}")
    prepare(root)
    expected: dict[str, dict[str, Any]] = {}
    seconds: dict[str, float] = {}
    outcomes: dict[str, list[Outcome]] = {name: [] for name in names}

    def whole(name: str) -> None:
        begin = time.monotonic()
        expected[name] = undisturbed(jobs[name], root / "whole" / name)
        seconds[name] = time.monotonic() - begin
        say(f"{name}: {seconds[name]:.0f} s undisturbed, {len(expected[name])} things to compare")

    def killed(number: int) -> None:
        name = names[number % len(names)]
        if time.monotonic() > deadline:
            return
        work = root / "trials" / f"{number}-{name}"
        outcome = trial(jobs[name], work, expected[name], seconds[name], random.Random(f"{arguments.seed} {number}"), deadline)
        if not outcome.trouble:
            shutil.rmtree(work, ignore_errors=True)
        outcomes[name].append(outcome)
        say(f"{name}: {outcome.kills.total()} kills, {outcome.trouble or 'exact'}")

    if FIRST in names or any(jobs[name].on_student for name in names):
        whole(FIRST)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(whole, [name for name in names if name != FIRST]))
        deadline = time.monotonic() + 60 * arguments.minutes
        list(pool.map(killed, range(len(names) * MOST_ROUNDS)))
    print(table(outcomes))
    return int(any(outcome.trouble for found in outcomes.values() for outcome in found))


def make_jobs(root: Path) -> dict[str, Job]:
    """All that is killed, by name."""
    photos, student, toy = f"data.sources.toy.path={root}/photos", root / "whole" / FIRST / "run", root / "toy"
    conversations = f"data.sources.toy={{path: {toy}/captions.json, images: {toy}/images}}"

    def training(ranks: int) -> Job:
        command = ["train", *STAGE, photos, "--ranks", str(ranks), "engine.zero=1"]
        return Job(f"training-{ranks}", lambda work: [*command, f"run={work}/run"], of_run, ranks=ranks)

    vlm = ["vlm", "train", *VLM, conversations, f"start.student={student}", f"start.lm={toy}/lm"]
    scores = ["eval", "--data", "toy", "--preset", "smoke", "--save-minutes", "0", "--model", str(student)]
    probe = [*scores, "--suite", "dense", "--task", "ade20k", "--limit", "12", *PROBE]
    features = [*scores, "--suite", "transfer", "--limit", "200"]
    jobs = (
        training(1),
        training(2),
        Job("statistics", lambda work: ["stats", *STAGE, photos, f"run={work}/run"], of_files("run/balancers")),
        Job("upsampler", lambda work: ["upsampler", *UPSAMPLER, photos, f"run={work}/run"], of_run),
        Job("VLM", lambda work: [*vlm, f"run={work}/run"], of_run, on_student=True),
        Job("evaluation-probe", lambda work: [*probe, "--out", f"{work}/results.jsonl"], of_results, on_student=True),
        Job("evaluation-features", lambda work: [*features, "--out", f"{work}/results.jsonl"], of_results, on_student=True),
        Job(
            "export",
            lambda work: ["export", str(student), "--out", f"{work}/out"],
            of_files("out"),
            ends=lambda work: (work / "out").is_dir(),
            on_student=True,
        ),
        Job(
            "shards",
            lambda work: ["shards", f"{root}/photos", f"{work}/out", "--count", "16"],
            of_files("out"),
            ends=lambda work: (work / "out").is_dir(),
        ),
    )
    return {job.name: job for job in jobs}


def prepare(root: Path) -> None:
    """Photos, and the parts of a VLM."""
    from PIL import Image

    from radio_distill.toyworld import render_images
    from radio_distill.vlm.toy import write_toy

    (root / "photos").mkdir()
    for i, pixels in enumerate(render_images(5, range(96), size=64)):
        Image.fromarray(pixels).save(root / "photos" / f"{i:03d}.jpg", quality=95)
    write_toy(root / "toy", count=60, size=32, steps=0)


def undisturbed(job: Job, work: Path) -> dict[str, Any]:
    """What the job gives when nobody kills it; twice the same, or there would be nothing to compare with."""
    work.mkdir(parents=True)
    process = start(job, work)
    if process.wait() != 0:
        raise SystemExit(f"error: {job.name} fails without any kill ({work}):\n{told(work)}")
    return job.result(work)


def trial(job: Job, work: Path, expected: dict[str, Any], seconds: float, rng: random.Random, deadline: float) -> Outcome:
    """Kill the job up to MOST_KILLS times, let it end, and compare."""
    work.mkdir(parents=True)
    outcome, kills = Outcome(), rng.randint(1, MOST_KILLS)
    try:
        failures = 0
        while True:
            process = start(job, work)
            moment = rng.choice(MOMENTS) if outcome.kills.total() < kills and time.monotonic() < deadline else None
            if moment is not None and wait_for(moment, process, work, seconds, rng):
                kill(job, process, rng)
                outcome.kills[moment] += 1
                continue
            try:
                code = process.wait(timeout=max(120, 20 * seconds))
            except subprocess.TimeoutExpired:
                kill_group(process)
                raise Trouble(f"hangs\n{told(work)}") from None
            if code == 0 or job.ends(work):
                break
            failures += 1
            if failures == MOST_TRIES:
                raise Trouble(f"does not go on, exit code {code}\n{told(work)}")
            time.sleep(2)
        compare(job.result(work), expected)
        left = [
            str(path.relative_to(work)) for pattern in UNFINISHED for path in work.rglob(pattern) if "cache" not in path.parts
        ]
        if left:
            raise Trouble(f"leaves {', '.join(left)} behind")
    except Trouble as trouble:
        outcome.trouble = str(trouble)
    return outcome


def start(job: Job, work: Path) -> subprocess.Popen[bytes]:
    """The command, in a process group of its own, with a cache of its own."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "RADIO_DISTILL_CACHE": str(work / "cache"),
    }  # fmt: skip
    with (work / "log.txt").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "radio_distill", *job.command(work)],
            env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    LIVE.add(process.pid)
    return process


def wait_for(moment: str, process: subprocess.Popen[bytes], work: Path, seconds: float, rng: random.Random) -> bool:
    """Wait for the moment; False when the process has ended before it."""
    begin = time.monotonic()
    until = begin + (rng.uniform(0, 1) if moment == "first second" else rng.uniform(0, seconds))
    if moment == "while writing":
        until = rng.choice((begin, until))  # the first thing that appears under a temporary name, or one after a random moment
        while not (time.monotonic() > until and any(any(work.rglob(pattern)) for pattern in UNFINISHED)):
            if process.poll() is not None:
                return False
            time.sleep(0.002)
        until = time.monotonic() + rng.uniform(0, 0.03)
    while time.monotonic() < until:
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    return process.poll() is None


def kill(job: Job, process: subprocess.Popen[bytes], rng: random.Random) -> None:
    """SIGKILL to the whole job, or to one of its processes; then the others must end by themselves."""
    children = [pid for pid in members(process.pid) if pid != process.pid]
    if job.ranks == 1 or not children or rng.random() < 0.6:
        kill_group(process)
        return
    victim = rng.choice([process.pid, *children])
    os.kill(victim, signal.SIGKILL)
    end = time.monotonic() + PATIENCE_S
    while process.poll() is None or members(process.pid):
        if time.monotonic() > end:
            kill_group(process)
            raise Trouble(f"goes on {PATIENCE_S} s after its {'launcher' if victim == process.pid else 'rank'} was killed")
        time.sleep(0.05)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    while members(process.pid):
        time.sleep(0.01)


def members(group: int) -> list[int]:
    """The living processes of a group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group, *_ = stat.read_text().rpartition(")")[2].split()
        except (OSError, ValueError):  # it has just ended
            continue
        if int(its_group) == group and state not in "ZX":
            found.append(int(stat.parent.name))
    return found


def of_run(work: Path) -> dict[str, Any]:
    """The newest checkpoint's tensors and every step's loss and gradient norm."""
    from radio_distill.runs import latest

    checkpoint = latest(work / "run")
    if checkpoint is None:
        return {}
    rows = [json.loads(line) for line in (work / "run/metrics.jsonl").read_text().splitlines()]
    found: dict[str, Any] = {"steps": [row["step"] for row in rows]}
    timed = ("time/", "images_per_s", "samples_per_s", "memory", "tokens_per_s")
    for row in rows:
        found |= {f"step {row['step']} {k}": v for k, v in row.items() if not k.startswith(timed)}
    for path in sorted(checkpoint.rglob("*")):
        name = str(path.relative_to(checkpoint))
        if path.suffix == ".safetensors":
            found[name] = digest(path)
        elif path.suffix == ".pt":
            found[name] = dict(tensors_of(path))
    return found


def tensors_of(path: Path) -> Iterator[tuple[str, str]]:
    """Every tensor of a file of DeepSpeed's (weights, optimizer), by where it stands, as a digest."""
    import torch

    from radio_distill.train.engine import no_code

    def walk(value: Any, where: str) -> Iterator[tuple[str, str]]:
        if isinstance(value, torch.Tensor):
            data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            yield where, hashlib.sha256(data).hexdigest()
        elif isinstance(value, dict):
            for key, item in value.items():
                yield from walk(item, f"{where}.{key}")
        elif isinstance(value, list | tuple):
            for i, item in enumerate(value):
                yield from walk(item, f"{where}.{i}")

    with no_code():
        yield from walk(torch.load(path, map_location="cpu", weights_only=False), "")


def of_results(work: Path) -> dict[str, Any]:
    """Every number, once, but those that time gives."""
    from radio_distill.eval.model_cost import COST
    from radio_distill.results import read

    rows = [r for r in read(work / "results.jsonl") if r.task != COST]
    keys = [f"{r.suite} {r.task} {r.model} {r.metric} {r.resolution}" for r in rows]
    return {"rows": sorted(keys), **{key: (r.value, r.count, r.config_hash) for key, r in zip(keys, rows)}}


def of_files(folder: str) -> Callable[[Path], dict[str, Any]]:
    """The bytes of all files of a folder."""
    return lambda work: {
        str(path.relative_to(work)): digest(path) for path in sorted((work / folder).rglob("*")) if path.is_file()
    }


def digest(path: Path) -> str:
    """Of the bytes; of safetensors with its header in order, in which the library puts metadata in another one every time."""
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        end = 8 + int.from_bytes(data[:8], "little")
        data = json.dumps(json.loads(data[8:end]), sort_keys=True).encode() + data[end:]
    return hashlib.sha256(data).hexdigest()


def compare(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise Trouble naming what differs."""
    differing = [key for key in {**expected, **found} if found.get(key) != expected.get(key)]
    if differing:
        raise Trouble(
            f"{len(differing)} of {len(expected)} differ: "
            + ", ".join(f"{key} ({str(expected.get(key))[:40]} -> {str(found.get(key))[:40]})" for key in differing[:4])
        )


def told(work: Path) -> str:
    """The end of what the job has said."""
    return "\n".join((work / "log.txt").read_text(errors="replace").splitlines()[-25:])


def table(outcomes: dict[str, list[Outcome]]) -> str:
    """Markdown."""
    lines = [f"| what | trials | kills | {' | '.join(MOMENTS)} | exact |", "|---|---|---|" + "---|" * (len(MOMENTS) + 1)]
    whole: Counter[str] = Counter()
    for name, found in outcomes.items():
        kills = sum((outcome.kills for outcome in found), Counter[str]())
        exact = sum(not outcome.trouble for outcome in found)
        whole += kills + Counter({"trials": len(found), "exact": exact})
        lines.append(row(name, len(found), kills, exact))
    return "\n".join([*lines, row("all", whole["trials"], whole, whole["exact"])])


def row(name: str, trials: int, kills: Counter[str], exact: int) -> str:
    by_moment = [kills[moment] for moment in MOMENTS]
    return f"| {' | '.join(map(str, (name, trials, sum(by_moment), *by_moment, f'{exact} of {trials}')))} |"


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
