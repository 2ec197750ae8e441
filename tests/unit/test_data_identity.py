"""Identity of data sets: what must change it, what must not, and that features, results and reports follow it."""

import logging
import os
import shutil
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image

from radio_distill.config.recipe import Source
from radio_distill.data import identity
from radio_distill.data.files import list_folder
from radio_distill.data.held_out import HeldOut
from radio_distill.data.identity import Identity, identify
from radio_distill.data.sources import list_source
from radio_distill.errors import DataError
from radio_distill.eval.datasets import open_dataset
from radio_distill.eval.datasets.base import READERS, Dataset
from radio_distill.eval.features import ALONE, FeatureCache, Ranks
from radio_distill.eval.runner import run_suite
from radio_distill.eval.suites import load_suite
from radio_distill.eval.task import Context
from radio_distill.types import Result, VisionOutput

OLD = 1_000_000_000
COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220)}


def known(root: Path) -> Identity:
    names = list_folder(root).images
    return identify(names, [f"{root}/{name}" for name in names])


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nine files, of which four are read."""
    monkeypatch.setattr(identity, "SAMPLED", 4)
    (tmp_path / "set").mkdir()
    for i in range(9):
        (tmp_path / "set" / f"{i}.jpg").write_bytes(bytes([i]) * 1000)
        os.utime(tmp_path / "set" / f"{i}.jpg", (OLD, OLD))
    return tmp_path / "set"


@pytest.mark.parametrize("which", range(9))
def test_an_edit_in_place_that_keeps_the_size_is_noticed_in_every_file(root: Path, which: int) -> None:
    before = known(root)
    (root / f"{which}.jpg").write_bytes(b"x" * 1000)
    after = known(root)
    assert after.digest != before.digest
    assert (after.content != before.content) == (which in (0, 2, 4, 6))  # those are read, of the others the time tells


def test_more_fewer_longer_and_renamed_files_are_other_content(root: Path) -> None:
    seen = [known(root).content]
    for change in (
        lambda: (root / "7.jpg").write_bytes(b"x" * 1001),
        lambda: (root / "9.jpg").write_bytes(b""),
        lambda: (root / "9.jpg").rename(root / "99.jpg"),
        lambda: (root / "5.jpg").unlink(),
    ):
        change()
        seen.append(known(root).content)
    assert all(a != b for a, b in pairwise(seen))


def test_a_copy_has_the_same_content_and_with_its_times_the_same_identity(root: Path) -> None:
    shutil.copytree(root, root.parent / "as_old")  # copy2 keeps times
    shutil.copytree(root, root.parent / "as_new", copy_function=shutil.copyfile)
    assert known(root.parent / "as_old") == known(root)
    assert known(root.parent / "as_new").content == known(root).content
    assert known(root.parent / "as_new").digest != known(root).digest  # measured again, rather than wrong


def test_what_is_read_whole_needs_no_times(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "SAMPLED", 9)
    before = known(root)
    assert before.times == ""
    os.utime(root / "3.jpg", (OLD + 7, OLD + 7))
    assert known(root) == before
    monkeypatch.setattr(identity, "WHOLE_BYTES", 999)
    monkeypatch.setattr(identity, "PIECE_BYTES", 10)
    assert known(root).times != ""


def test_of_a_large_file_pieces_are_read_and_the_time_counts(tmp_path: Path) -> None:
    file = tmp_path / "a.tar"
    file.write_bytes(bytes(3 << 20))
    before = identify([], [str(file)])
    for place in (0, 1 << 20, (3 << 20) - 1):
        data = bytearray(3 << 20)
        data[place] = 1
        file.write_bytes(data)
        assert identify([], [str(file)]).digest != before.digest
    assert identify([], [str(file)]).content != before.content  # its last byte


def test_a_file_that_vanished_is_named(root: Path) -> None:
    with pytest.raises(DataError, match=r"nothing.jpg is missing \(No such file or directory\); the data set is not complete"):
        identify([], [f"{root}/nothing.jpg"])


def test_names_that_are_no_text_are_names_all_the_same(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.jpg")
    (tmp_path / name).write_bytes(b"x")
    assert known(tmp_path).files == 1
    assert list_source("x", Source(path=str(tmp_path))).files == (name,)


def test_the_cost_is_a_look_at_every_file_and_a_few_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """So that 100,000 files take less than 2 s; here 5,000 are measured, with twice the time, as others use the machine."""
    (tmp_path / "a").mkdir()
    for i in range(5000):
        (tmp_path / "a" / f"{i:05d}.jpg").touch()
    reads = list[str]()
    monkeypatch.setattr(identity, "_read", lambda path, size: reads.append(path) or b"")
    start = time.process_time()
    assert known(tmp_path).files == 5000
    assert len(reads) == identity.SAMPLED
    assert (time.process_time() - start) * 100_000 / 5000 < 4


@pytest.mark.parametrize("place", READERS.values())
def test_every_reader_says_which_files_it_reads(place: str) -> None:
    from importlib import import_module

    module = import_module(f"radio_distill.eval.datasets.{place.partition(':')[0]}")
    readers = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Dataset) and value.__module__ == module.__name__
    ]
    real = [r for r in readers if "Toy" not in "".join(c.__name__ for c in r.__mro__) and not r.__abstractmethods__]
    assert real
    assert all("files" not in reader.__abstractmethods__ for reader in real)


def images(root: Path, shade: float = 1.0) -> Path:
    for split, count in (("train", 4), ("val", 2)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                colours = tuple(int(c * shade) for c in colour)
                Image.new("RGB", (32, 32), colours).save(root / split / name / f"{i}.bmp")  # all of one size
    return root


class MeanColour:
    patch_size = 8

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        return 32, 32

    def encode(self, images_B3HW: torch.Tensor) -> VisionOutput:
        features = torch.nn.functional.avg_pool2d(images_B3HW, 8)
        return VisionOutput(features.mean((2, 3)), features)


def mean_colour() -> MeanColour:
    return MeanColour()


def knn(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Result]:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    context = Context(root=root, device=torch.device("cpu"), cache=FeatureCache(tmp_path / "cache"), resolution=32)
    suite = load_suite("transfer", "smoke", ["knn.k=1"]).only(["knn"])
    outcome = run_suite(suite, [f"{Path(__file__).stem}:mean_colour"], context, tmp_path / "results.jsonl")
    assert outcome.failures == []
    return outcome.results


def test_sets_of_equal_names_and_other_pixels_are_each_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clean = images(tmp_path / "clean")
    corrupted = images(tmp_path / "corrupted")
    for red, blue in zip(sorted((corrupted / "val" / "red").iterdir()), sorted((corrupted / "val" / "blue").iterdir())):
        red.rename(red.with_name("swap"))
        blue.rename(red)
        red.with_name("swap").rename(blue)
    values = {root.name: knn(root, tmp_path, monkeypatch)[0] for root in (clean, corrupted)}
    assert (values["clean"].value, values["corrupted"].value) == (100.0, 0.0)
    assert values["clean"].dataset != values["corrupted"].dataset
    (again,) = knn(clean, tmp_path, monkeypatch)
    assert again == values["clean"]
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert sum('"knn"' in line for line in lines) == len(values)  # the third was not measured again


@pytest.mark.parametrize("split", ["val", "train"])
def test_a_set_that_was_cleaned_in_place_is_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str) -> None:
    """Also when only what it is compared with has changed: the scored images stay the same."""
    root = images(tmp_path / "set")
    (first,) = knn(root, tmp_path, monkeypatch)
    images(tmp_path / "other", shade=0.5)
    for colour, other in (("red", "blue"), ("blue", "red")):
        for file in sorted((tmp_path / "other" / split / other).iterdir()):
            shutil.copyfile(file, root / split / colour / file.name)
    (second,) = knn(root, tmp_path, monkeypatch)
    assert (first.value, second.value) == (100.0, 0.0)
    assert (first.dataset == second.dataset) == (split == "train")


def test_the_log_says_what_identity_took(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = open_dataset("folder", "val", images(tmp_path / "set"), kind="labelled")
    context = Context(root=tmp_path / "set", device=torch.device("cpu"), cache=FeatureCache(tmp_path / "cache"))
    with caplog.at_level(logging.INFO):
        assert context.identity(data) is context.identity(data)
    (said,) = [message for message in caplog.messages if message.startswith("identity")]
    assert said.startswith("identity of folder/val: 4 files, 1.25e-05 GB, known by all bytes in 0.")


def test_ranks_take_the_times_of_the_first_and_stop_where_content_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = open_dataset("folder", "val", images(tmp_path / "set"), kind="labelled")
    first = data.identify()._replace(times="as the first rank sees them")

    def asked(told: object) -> Identity:
        monkeypatch.setattr("radio_distill.eval.task.gather", lambda own: [told, own])
        ranks = Ranks(1, 2, ALONE.barrier)
        return Context(root=tmp_path, device=torch.device("cpu"), cache=FeatureCache(tmp_path), ranks=ranks).identity(data)

    assert asked(first) == first
    with pytest.raises(
        DataError, match=r"folder/val is not the same everywhere: rank 0 sees 1 files, 2 bytes, rank 1 sees 4 f"
    ):
        asked(Identity("other", "", 1, 2))
    with pytest.raises(DataError, match=r"a\.jpg is missing"):  # what one rank fails at, all know
        asked("a.jpg is missing")


def test_held_out_images_are_known_by_their_bytes(tmp_path: Path) -> None:
    one, two = images(tmp_path / "a" / "set"), images(tmp_path / "b" / "set", shade=0.9)
    ids = [HeldOut(str(root / "val"), 4).id for root in (one, two, one)]
    assert ids[0] == ids[2] != ids[1]
    assert ids[0].startswith("val#")
    assert HeldOut("toy", 4).id == "toyworld"
