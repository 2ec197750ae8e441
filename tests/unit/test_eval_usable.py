"""Bad images of dense tasks: all named and counted before anything is trained, on all ranks alike; left out where the card allows it."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from PIL import Image

from radio_distill.errors import DataError
from radio_distill.eval.datasets.base import Dataset, open_dataset
from radio_distill.eval.features import ALONE, FeatureCache, Ranks
from radio_distill.eval.models import NamedModel
from radio_distill.eval.probes.batches import each_item
from radio_distill.eval.runner import run_suite
from radio_distill.eval.suites import Suite
from radio_distill.eval.task import Context, Score, Task
from radio_distill.eval.tasks.segmentation import Segmentation
from radio_distill.eval.usable import usable
from radio_distill.results import read

SEGMENTATION = {
    "kind": "segmentation", "dataset": "voc2012", "train": "train", "test": "val", "short_side": 32, "steps": 2, "warmup": 1, "batch": 2
}  # fmt: skip
MODEL = ["teacher:toy_dino"]


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """Four images of each split; one for training and two for the score are damaged."""
    base, random = tmp_path / "data" / "VOCdevkit" / "VOC2012", np.random.default_rng(0)
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (base / folder).mkdir(parents=True)
    for split in ("train", "val"):
        names = [f"{split}_{i}" for i in range(4)]
        (base / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(names))
        for name in names:
            Image.fromarray(random.integers(0, 255, (32, 40, 3), np.uint8)).save(base / "JPEGImages" / f"{name}.jpg")
            Image.fromarray(random.integers(0, 21, (32, 40), np.uint8), "L").save(base / "SegmentationClass" / f"{name}.png")
    cut = base / "JPEGImages" / "val_1.jpg"
    cut.write_bytes(cut.read_bytes()[:-200])
    (base / "JPEGImages" / "val_3.jpg").write_text("<html>404</html>")
    Image.new("L", (40, 32), 99).save(base / "SegmentationClass" / "train_0.png")  # no such class
    return tmp_path


def context_of(folder: Path, ranks: Ranks = ALONE) -> Context:
    return Context(folder / "data", torch.device("cpu"), FeatureCache(folder / "cache" / "features"), ranks=ranks)


class Counts(Task):
    """Counts the images that can be used."""

    kind: Literal["counts"] = "counts"
    split: str = "val"

    def datasets(self, context: Context) -> Sequence[Dataset[Any]]:
        return [open_dataset(self.dataset, self.split, context.root, kind="segmentation")]

    def passes(self, context: Context) -> float:
        return 1.0

    def run(self, opened: NamedModel, context: Context) -> Iterable[Score]:
        (dataset,) = self.usable(context)
        read = len(list(each_item(dataset, context)))
        context.ranks.barrier()
        yield Score("items", read)


def suite(**max_bad: float) -> Suite:
    tasks = {
        "voc2012": Segmentation(**SEGMENTATION, **max_bad),
        "images": Counts(dataset="voc2012", split="train", max_bad=0.5),
    }
    return Suite("dense", "Dense", "smoke", tasks)


NAMED = "voc2012 of teacher:toy_dino: 2 of 4 images of voc2012/val cannot be used: {}/val_1.jpg is damaged or cannot be used (truncated"


def test_bad_images_of_a_dense_task_are_all_named_and_the_other_rows_are_measured(voc: Path) -> None:
    outcome = run_suite(suite(), MODEL, context_of(voc), voc / "results.jsonl")
    (failure,) = outcome.failures
    assert failure.startswith(NAMED.format(voc / "data/VOCdevkit/VOC2012/JPEGImages"))
    assert "val_3.jpg is damaged" in failure
    assert failure.endswith("; mend them, or allow for a share that is left out: max_bad of the task")
    assert [(r.task, r.value, r.count, r.left_out) for r in outcome.results] == [("images", 3, 3, 1)]


def test_bad_images_are_left_out_and_counted_where_the_card_allows_it(voc: Path, caplog: pytest.LogCaptureFixture) -> None:
    outcome = run_suite(suite(max_bad=0.5), MODEL, context_of(voc), voc / "results.jsonl")
    assert not outcome.failures
    assert {(r.task, r.count, r.left_out) for r in outcome.results} == {("voc2012", 2, 3), ("images", 3, 1)}
    assert "train_0.png" in caplog.text


def evaluate(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    outcome = run_suite(suite(), MODEL, context_of(Path(folder), Ranks(rank, 2, dist.barrier)), Path(folder) / "results.jsonl")
    (failure,) = outcome.failures
    assert failure.startswith(NAMED.format(Path(folder) / "data/VOCdevkit/VOC2012/JPEGImages"))
    dist.destroy_process_group()


def test_one_bad_image_does_not_end_a_run_of_two_ranks(voc: Path) -> None:
    torch.multiprocessing.start_processes(evaluate, (str(voc),), nprocs=2, start_method="fork")
    assert [(r.task, r.count, r.left_out) for r in read(voc / "results.jsonl") if r.suite == "dense"] == [("images", 3, 1)]


class Texts(Dataset[str]):
    """Files that hold a number."""

    name, split, reads = "texts", "val", 0

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.glob("*.txt"))

    @property
    def keys(self) -> Sequence[str]:
        return [path.name for path in self.paths]

    def files(self, index: int) -> Sequence[Path]:
        return (self.paths[index],)

    def __getitem__(self, index: int) -> int:
        Texts.reads += 1
        return int(self.paths[index].read_text())


def test_whatever_a_reader_raises_names_the_item_and_sets_without_bad_ones_are_read_once(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(str(i))
    (tmp_path / "2.txt").write_text("two")
    with pytest.raises(
        DataError, match=r"1 of 3 images of texts/val cannot be used: 2.txt: ValueError: .*test_eval_usable.py:\d+"
    ):
        usable(Texts(tmp_path), context_of(tmp_path))
    with pytest.raises(DataError, match=r"3 of 3 images"):  # a set of nothing is no set
        usable(Texts(tmp_path), context_of(tmp_path), max_bad=1, look=refuse)
    (tmp_path / "2.txt").write_text("2")
    assert len(usable(Texts(tmp_path), context_of(tmp_path))) == 3
    before = Texts.reads
    assert len(usable(Texts(tmp_path), context_of(tmp_path))) == 3
    assert Texts.reads == before
    (tmp_path / "2.txt").write_text("three")
    os.utime(tmp_path / "2.txt", (1, 1))
    assert [usable(Texts(tmp_path), context_of(tmp_path), max_bad=0.5)[i] for i in range(2)] == [0, 1]


def refuse(sample: object) -> None:
    raise DataError("not this one")
