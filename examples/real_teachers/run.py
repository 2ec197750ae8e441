"""`make real IMAGES=PHOTOS`: two networks with real weights as teachers, on real photos, in minutes of two CPU cores.

    images -> shards, 32 images held out -> statistics -> three upsamplers of EfficientNet-Lite0, three seeds each -> a student of both
           -> fidelity of all of them on the held-out images -> report.html

Without images, generated scenes stand in, and the two photos that scikit-learn ships, where it is installed. Running it again
goes on where it stopped.
"""

import json
import logging
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
KINDS, SEEDS = ("featsharp", "bilinear", "featup"), 3
HELD_OUT, LEAST, CORES = 32, 96, 2
TEACHERS = ("efficientnet_lite0.yaml", "hed.yaml")

log = logging.getLogger("real")


def main(images=None, run="runs/real"):
    """Do all of it in the folder `run`; returns 0 when report.html is written."""
    folder, begin = Path(run).resolve(), time.monotonic()
    images = Path(images).expanduser().resolve() if images else None
    os.chdir(HERE)  # where the cards find the code of their networks
    from radio_distill.data.held_out import HeldOut
    from radio_distill.eval.__main__ import main as evaluate
    from radio_distill.eval.report import write_report
    from radio_distill.viz_command import main as draw

    shards = pack(images or stand_ins(folder), folder / "images")
    data = sources(folder, shards[1:])
    title("statistics of both teachers")
    statistics(folder, data)
    title(f"three upsamplers of EfficientNet-Lite0, {SEEDS} seeds each, {CORES} at a time")
    names = upsamplers(folder, data)
    title("a student of both teachers")
    student(folder, data)
    held_out = HeldOut(str(shards[0]), HELD_OUT, exact=False)
    title(f"fidelity on {held_out.count} held-out images")
    teachers = [f"teacher:{card}" for card in TEACHERS]
    models = [*names, str(folder / "student"), f"random:{folder / 'student'}", *teachers]
    measured = ["--data", str(shards[0]), "--limit", str(held_out.count), "--out", str(folder / "results.jsonl")]
    if evaluate(["--suite", "fidelity", *(word for name in models for word in ("--model", name)), *measured]):
        return 1
    draw([name for name in names if name.endswith("-0")], str(drawn(folder, shards[0])), str(folder / "upsamplers.png"))
    title(f"finished in {(time.monotonic() - begin) / 60:.1f} minutes; open {write_report(folder)}")
    return 0


def stand_ins(folder):
    """Generated scenes, and in a folder beside them the two photos that scikit-learn ships."""
    from radio_distill.toyworld import write_toyworld

    scenes = folder / "scenes"
    if not scenes.exists():
        title("no images=FOLDER: rendering scenes")
        write_toyworld(scenes, count=256, size=256, seed=1, shards=1)
        try:
            from PIL import Image
            from sklearn.datasets import load_sample_images
        except ImportError:
            return scenes
        photos = load_sample_images()
        (folder / "photos").mkdir()
        for file, pixels in zip(photos.filenames, photos.images):
            Image.fromarray(pixels).save(folder / "photos" / Path(file).name, quality=95)
    return scenes


def pack(source, out):
    """Shards of equal size in random order; the first one is held out. Returns them."""
    from radio_distill.data.shards import make_shards
    from radio_distill.errors import DataError

    if not out.exists():
        make_shards(str(source), str(out), count=HELD_OUT, seed=0)
    shards = sorted(out.glob("*.tar"))
    if sum(json.loads((out / "index.json").read_text())["shards"].values()) < LEAST:
        raise DataError(
            f"{source} has fewer than {LEAST} images, of which {HELD_OUT} are held out; give more, or leave out images="
        )
    return shards


def drawn(folder, held_out):
    """Whose maps are drawn: held-out images, or one of scikit-learn's photos where they stand in."""
    return next(iter(sorted((folder / "photos").glob("*.jpg"))), held_out)


def sources(folder, shards):
    """The settings that name the images to train on; a quarter of them from scikit-learn's photos, where they stand in."""
    of_shards = f"data.sources.images.path={json.dumps([str(shard) for shard in shards])}"
    photos = folder / "photos"
    return (
        [of_shards, f"data.sources.photos={{path: {json.dumps(str(photos))}, weight: 0.33}}"]
        if photos.exists()
        else [of_shards]
    )


def statistics(folder, data):
    from radio_distill.distill.gather import main as stats

    if not (folder / "statistics" / "balancers").exists():
        stats(["student.yaml", *data, f"run={folder / 'statistics'}"])


def upsamplers(folder, data):
    """Train what is missing, two at a time; returns what commands call them."""
    runs = {folder / f"{kind}-{seed}": (kind, seed) for seed in range(SEEDS) for kind in KINDS}
    left = [run for run in runs if not (run / "checkpoints" / "latest").exists()]
    calls = [(str(run), *runs[run], [*data, f"balance.path={folder / 'statistics' / 'balancers'}"]) for run in left]
    with ProcessPoolExecutor(CORES, mp_context=multiprocessing.get_context("spawn")) as pool:
        for run, minutes in zip(left, pool.map(upsampler, calls)):
            log.info("  %s: %.1f minutes", run.name, minutes)
    return [f"teacher:{TEACHERS[0]}+featsharp:{run}" for run in runs]


def upsampler(call):
    """One training, in a process of its own; returns its minutes."""
    import torch

    from radio_distill.config.load import load_upsampler_recipe
    from radio_distill.errors import TrainingError
    from radio_distill.upsamplers.train import train_upsampler

    run, kind, seed, overrides = call
    torch.set_num_threads(1)
    begin = time.monotonic()
    alike = ["network.debias=true"]  # FeatUp's own recipes have no de-bias map: here all three do
    recipe = load_upsampler_recipe("upsampler.yaml", [f"run={run}", f"network.kind={kind}", f"seed={seed}", *overrides, *alike])
    if code := train_upsampler(recipe):
        raise TrainingError(f"{run} ended with exit code {code}; run it again to go on")
    return (time.monotonic() - begin) / 60


def student(folder, data):
    from radio_distill.config.load import load_recipe
    from radio_distill.errors import TrainingError
    from radio_distill.runs import latest, read_meta
    from radio_distill.train.launch import launch

    found = latest(folder / "student")
    if found is not None and read_meta(found).step == load_recipe("student.yaml").optim.steps:
        return
    overrides = [*data, f"run={folder / 'student'}", f"balance.path={folder / 'statistics' / 'balancers'}", "balance.window=0"]
    if code := launch("student.yaml", overrides, CORES):
        raise TrainingError(f"the student ended with exit code {code}; see the lines above, then run it again to go on")


def settings(words):
    from radio_distill.errors import RecipeError

    found = dict(word.partition("=")[::2] for word in words)
    if unknown := found.keys() - {"images", "run"}:
        raise RecipeError(f"no setting {min(unknown)!r}; expected images=FOLDER or run=FOLDER")
    return found


def title(text):
    log.info("\n== %s", text)


if __name__ == "__main__":
    from radio_distill.errors import run_and_report

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread in each of two processes
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    sys.exit(run_and_report(lambda: main(**settings(sys.argv[1:]))))
