"""Readers of classification and retrieval on miniatures of the real layouts, and their suites on them."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from radio_distill.errors import DataError
from radio_distill.eval.datasets import open_dataset
from radio_distill.eval.datasets.captions import captions_of
from radio_distill.eval.datasets.imagenet_labels import wnids
from radio_distill.eval.datasets.samples import labels_of
from radio_distill.eval.features import FeatureCache
from radio_distill.eval.runner import run_suite
from radio_distill.eval.suites import load_suite
from radio_distill.eval.task import Context
from radio_distill.types import VisionOutput

COLOURS = {"blue": (0, 0, 255), "green": (0, 200, 0), "red": (250, 10, 10)}


def jpeg(colour: tuple[int, int, int] = (90, 90, 90), size: tuple[int, int] = (40, 30)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "JPEG")
    return file.getvalue()


def labelled(name: str, split: str, root: Path):
    return open_dataset(name, split, root, kind="labelled")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes told apart by colour; shades and sizes vary."""
    for split, count in (("train", 4), ("val", 2)):
        for name, colour in COLOURS.items():
            place = tmp_path / "set" / split / name
            place.mkdir(parents=True)
            for i in range(count):
                shade = tuple(int(c * (1 - 0.05 * i)) for c in colour)
                Image.new("RGB", (40 + 7 * i, 30 + i), shade).save(place / f"{i}.{'png' if i else 'jpg'}")
        (tmp_path / "set" / split / "notes.txt").write_text("no class")
    return tmp_path / "set"


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    """1,000 folders; a few hold an image."""
    root = tmp_path / "data"
    for split in ("train", "val"):
        for wnid in wnids():
            (root / "imagenet1k" / split / wnid).mkdir(parents=True)
        for i in (0, 7, 999):
            (root / "imagenet1k" / split / wnids()[i] / "a.JPEG").write_bytes(jpeg())
    return root


def test_folders_of_classes_are_read_in_sorted_order(folder: Path) -> None:
    train, val = labelled("folder", "train", folder), labelled("folder", "val", folder)
    assert train.classes == ("blue", "green", "red")
    assert labels_of(train).tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert labels_of(val.limited(3)).tolist() == [0, 1, 2]
    assert val.keys[:2] == ("blue/0.jpg", "blue/1.png")
    image, label = val[5]
    assert (image.shape, image.dtype, label) == ((3, 31, 47), torch.uint8, 2)
    assert image[0].float().mean() > 200


def test_what_is_wrong_with_a_folder_is_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"(?s)empty/val is missing; expected\n  train/CLASS/\*.jpg.*under the folder given as --data"
    ):
        labelled("folder", "val", tmp_path / "empty")
    (folder / "val" / "red" / "0.jpg").write_bytes(jpeg()[:150])
    with pytest.raises(DataError, match=r"val/red/0.jpg is damaged .*; copy it again"):
        labelled("folder", "val", folder)[4]
    (folder / "train" / "red").rename(folder / "train" / "rot")
    with pytest.raises(DataError, match="train has no class 'red'; both splits must have the same classes"):
        labelled("folder", "val", folder)


def test_imagenet_as_folders(imagenet: Path, caplog: pytest.LogCaptureFixture) -> None:
    val = labelled("imagenet1k", "val", imagenet)
    assert "imagenet1k/val has 3 images here, and 50000 when it is whole" in caplog.text
    assert labels_of(val).tolist() == [0, 7, 999]
    assert (val[1].label, val.classes[7]) == (7, "rooster")
    assert val.id.startswith("imagenet1k/val#")
    (imagenet / "imagenet1k" / "train" / wnids()[3]).rename(imagenet / "imagenet1k" / "train" / "n99999999")
    with pytest.raises(DataError, match="train: 'n99999999' is none of ImageNet's 1,000 WordNet ids"):
        labelled("imagenet1k", "train", imagenet)


def test_imagenet_that_is_missing_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"(?s)imagenet1k/val is missing; expected.*train/n01440764.*parquet.*\.cls.*image-net.org"
    ):
        labelled("imagenet1k", "val", tmp_path)


def test_imagenet_as_parquet_of_the_hub(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    (tmp_path / "imagenet-1k" / "data").mkdir(parents=True)
    for part, labels in enumerate(([3, 4, 5], [6])):
        image = [{"bytes": jpeg((10 * x, 0, 0)), "path": f"{x}.JPEG"} for x in labels]
        file = tmp_path / "imagenet-1k" / "data" / f"validation-{part:05d}-of-00002.parquet"
        parquet.write_table(pyarrow.table({"image": image, "label": labels}), file, row_group_size=2)
    val = labelled("imagenet1k", "val", tmp_path)
    assert labels_of(val).tolist() == [3, 4, 5, 6]
    assert [val[i].label for i in (2, 0, 3)] == [5, 3, 6]
    assert val[3].image_3HW.shape == (3, 30, 40)
    assert val[3].image_3HW[0].float().mean() == pytest.approx(60, abs=3)
    file.write_bytes(file.read_bytes()[:100])
    from radio_distill.eval.datasets.imagenet_parquet import places_in_parquet

    places_in_parquet.cache_clear()
    with pytest.raises(DataError, match=r"00001-of-00002.parquet is damaged .*copy it again"):
        labelled("imagenet1k", "val", tmp_path)


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def test_imagenet_as_webdataset_shards(tmp_path: Path) -> None:
    place = tmp_path / "imagenet"
    place.mkdir()
    write_tar(
        place / "imagenet1k-validation-00.tar", {"a.jpg": jpeg(), "a.cls": b"12", "b.jpg": jpeg((250, 0, 0)), "b.cls": b"7"}
    )
    write_tar(place / "imagenet1k-validation-01.tar", {"c.cls": b"999", "c.json": b"{}", "c.jpg": jpeg()})
    val = labelled("imagenet1k", "val", tmp_path)
    assert labels_of(val).tolist() == [12, 7, 999]
    assert val[1].label == 7
    assert val[1].image_3HW[0].float().mean() > 240


@pytest.mark.parametrize(
    ("members", "said"),
    [({"a.jpg": jpeg()}, "a has no .cls"), ({"a.jpg": jpeg(), "a.cls": b"1000"}, "label 1000, expected 0 to 999")],
)
def test_shards_that_do_not_fit_are_told(tmp_path: Path, members: dict[str, bytes], said: str) -> None:
    write_tar(tmp_path / "val-0.tar", members)
    with pytest.raises(DataError, match=said):
        labelled("imagenet1k", "val", tmp_path)


def coco(root: Path, *, captions: dict[int, list[str]]) -> Path:
    (root / "coco" / "val2014").mkdir(parents=True)
    images = [{"id": i, "file_name": f"COCO_val2014_{i:012d}.jpg"} for i in captions]
    for image in images:
        (root / "coco" / "val2014" / str(image["file_name"])).write_bytes(jpeg())
    annotations = [{"image_id": i, "caption": c} for i, texts in captions.items() for c in texts]
    file = root / "coco" / "coco_test_karpathy.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations}))
    return file


def test_coco_captions_are_read(tmp_path: Path) -> None:
    coco(tmp_path, captions={9: ["a dog", "dog, running"], 4: ["a cat"]})
    test = open_dataset("coco_karpathy", "test", tmp_path, kind="captioned")
    assert list(captions_of(test)) == [("a cat",), ("a dog", "dog, running")]
    assert test[1].captions[0] == "a dog"
    assert captions_of(test.limited(1)) == [("a cat",)]


def test_captions_that_do_not_fit_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)coco_karpathy: .* is missing; expected\n  coco/val2014/\*.jpg.*cocodataset.org"):
        open_dataset("coco_karpathy", "test", tmp_path, kind="captioned")
    file = coco(tmp_path, captions={1: ["a dog"], 2: []})
    with pytest.raises(DataError, match=r"COCO_val2014_000000000002.jpg has no caption"):
        open_dataset("coco_karpathy", "test", tmp_path, kind="captioned")
    file.write_text(file.read_text().replace('"image_id": 1', '"image_id": 5'))
    with pytest.raises(DataError, match="a caption of image 5, which is not among the file's images"):
        open_dataset("coco_karpathy", "test", tmp_path, kind="captioned")
    file.write_text("{}")
    with pytest.raises(DataError, match=r"is no file of captions .*; expected JSON with images and annotations"):
        open_dataset("coco_karpathy", "test", tmp_path, kind="captioned")


def test_flickr30k_is_read_from_both_files(tmp_path: Path) -> None:
    images = tmp_path / "flickr30k" / "flickr30k-images"
    images.mkdir(parents=True)
    for name in ("1.jpg", "2.jpg"):
        (images / name).write_bytes(jpeg())
    lines = tmp_path / "flickr30k" / "flickr30k_test_karpathy.txt"
    lines.write_text("image,caption\n2.jpg,Two men , one hat .\n2.jpg,A hat .\n1.jpg,A boat .\n")
    expected = [("A boat .",), ("Two men , one hat .", "A hat .")]
    assert list(captions_of(open_dataset("flickr30k", "test", tmp_path, kind="captioned"))) == expected
    lines.unlink()
    sentences = {"1.jpg": expected[0], "2.jpg": expected[1]}
    listed = [{"filename": n, "split": "test", "sentences": [{"raw": t} for t in s]} for n, s in sentences.items()]
    listed.append({"filename": "3.jpg", "split": "train", "sentences": []})
    (lines.parent / "dataset_flickr30k.json").write_text(json.dumps({"images": listed}))
    assert list(captions_of(open_dataset("flickr30k", "test", tmp_path, kind="captioned"))) == expected
    (images / "2.jpg").unlink()
    from radio_distill.eval.datasets.captions import _cached

    _cached.cache_clear()
    with pytest.raises(DataError, match=r"1 of 2 images are missing, the first is .*2.jpg"):
        open_dataset("flickr30k", "test", tmp_path, kind="captioned")


class MeanColour:
    """Its summary is the mean colour: the truth, where classes are colours."""

    patch_size = 8

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        return max(8, round(height / 8) * 8), max(8, round(width / 8) * 8)

    def encode(self, images_B3HW: torch.Tensor) -> VisionOutput:
        features = torch.nn.functional.avg_pool2d(images_B3HW, 8)
        return VisionOutput(features.mean((2, 3)), features)


def mean_colour() -> MeanColour:
    return MeanColour()


def test_a_model_that_knows_the_classes_scores_all(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    context = Context(root=folder, device=torch.device("cpu"), cache=FeatureCache(tmp_path / "cache"), resolution=32)
    suite = load_suite("transfer", "smoke", ["knn.k=3", "knn.resize=short_side", "linear.steps=100", "linear.lr=0.1"])
    outcome = run_suite(suite, [f"{Path(__file__).stem}:mean_colour"], context, tmp_path / "results.jsonl")
    assert outcome.failures == []
    assert [(r.task, r.value, r.count) for r in outcome.results] == [("knn", 100.0, 6), ("linear", 100.0, 6)]


def test_a_model_without_a_summary_is_told(folder: Path, tmp_path: Path) -> None:
    context = Context(root=folder, device=torch.device("cpu"), cache=FeatureCache(tmp_path / "cache"), resolution=32)
    outcome = run_suite(load_suite("transfer", "smoke").only(["knn"]), ["teacher:toy_sam"], context, tmp_path / "r.jsonl")
    assert "teacher:toy_sam has no summary, and Knn compares summaries" in outcome.failures[0]


def test_images_of_all_kinds_of_pixels_become_rgb(tmp_path: Path) -> None:
    from radio_distill.eval.datasets.pixels import decode_rgb

    for mode in ("L", "RGBA", "P", "CMYK", "LA"):
        file = io.BytesIO()
        Image.fromarray(np.full((4, 5), 128, np.uint8)).convert(mode).save(file, "TIFF" if mode == "CMYK" else "PNG")
        assert decode_rgb(file.getvalue(), "a").shape == (3, 4, 5)
