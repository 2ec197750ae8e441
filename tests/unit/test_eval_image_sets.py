"""Readers of classification and retrieval on miniatures of the real layouts, and their suites on them."""

import io
import json
import logging
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from radio_distill.errors import DataError
from radio_distill.eval.datasets import open_dataset
from radio_distill.eval.datasets.base import labels_of
from radio_distill.eval.datasets.captions import captions_of
from radio_distill.eval.datasets.imagenet_labels import wnids
from radio_distill.eval.features import FeatureCache
from radio_distill.eval.runner import Outcome, run_suite
from radio_distill.eval.suites import load_suite
from radio_distill.eval.task import Context
from radio_distill.results import table
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
    from radio_distill.eval.datasets.imagenet_packed import places_in_parquet

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
    assert val.notes == ["left out: 1 .json (imagenet1k-validation-01.tar: c.json)"]
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
    (tmp_path / "coco" / "val2014" / "spare.jpg").write_bytes(b"")
    os.utime(tmp_path / "coco" / "coco_test_karpathy.json", ns=(1, 1))
    assert open_dataset("coco_karpathy", "test", tmp_path, kind="captioned").notes == [
        "left out: 1 images that coco_test_karpathy.json does not list for test (spare.jpg)"
    ]


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


def test_an_odd_entry_of_a_caption_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "coco" / "val2014").mkdir(parents=True)
    content = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "text": "a tree"}]}
    (tmp_path / "coco" / "coco_test_karpathy.json").write_text(json.dumps(content))
    with pytest.raises(
        DataError, match=r"coco_test_karpathy.json has an entry that is not as in the file of its name .*'caption'"
    ):
        open_dataset("coco_karpathy", "test", tmp_path, kind="captioned")


class MeanColour:
    """Its summary is the mean colour: the truth, where classes are colours."""

    patch_size = 8

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        return max(8, round(height / 8) * 8), max(8, round(width / 8) * 8)

    def encode(self, images_B3HW: torch.Tensor) -> VisionOutput:
        features = torch.nn.functional.avg_pool2d(images_B3HW, 8)
        return VisionOutput(features.mean((2, 3)), features)


class Colours(MeanColour):
    """The same without a summary."""

    def encode(self, images_B3HW: torch.Tensor) -> VisionOutput:
        return VisionOutput(None, super().encode(images_B3HW).features_BCHW)


def mean_colour() -> MeanColour:
    return MeanColour()


def colours() -> Colours:
    return Colours()


def test_a_model_that_knows_the_classes_scores_all(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    context = Context(root=folder, device=torch.device("cpu"), cache=FeatureCache(tmp_path / "cache"), resolution=32)
    suite = load_suite("transfer", "smoke", ["knn.k=3", "knn.resize=short_side", "linear.steps=100", "linear.lr=0.1"])
    outcome = run_suite(suite, [f"{Path(__file__).stem}:mean_colour"], context, tmp_path / "results.jsonl")
    assert outcome.failures == []
    assert [(r.task, r.value, r.count) for r in outcome.results] == [("knn", 100.0, 6), ("linear", 100.0, 6)]


def test_images_that_cannot_be_read_fail_a_task_or_are_left_out_and_counted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    good = sorted((folder / "val").rglob("*.*"))
    for split, name in (("train", "cut.jpg"), ("val", "rubbish.png"), ("val", "empty.jpg")):
        (folder / split / good[0].parent.name / name).write_bytes(b"" if name == "empty.jpg" else b"\xff\xd8\xff")

    def measured(*overrides: str) -> Outcome:
        context = Context(root=folder, device=torch.device("cpu"), cache=FeatureCache(tmp_path / "cache"), resolution=32)
        suite = load_suite("transfer", "smoke", ["knn.k=3", "linear.steps=100", "linear.lr=0.1", *overrides])
        return run_suite(suite, [f"{Path(__file__).stem}:mean_colour"], context, tmp_path / "results.jsonl")

    knn, linear = measured().failures
    assert "knn of" in knn
    assert "2 of 8 images of folder/val cannot be used: " in knn
    assert "rubbish.png is damaged or cannot be used (not an image: " in knn
    assert "empty.jpg is damaged" in knn
    assert "max_bad of the task" in linear
    outcome = measured("knn.max_bad=0.25", "linear.max_bad=0.25")
    assert outcome.failures == []
    assert [(r.task, r.value, r.count, r.left_out) for r in outcome.results] == [("knn", 100.0, 6, 3), ("linear", 100.0, 6, 3)]
    assert "2 of 8 images of folder/val cannot be used: " in caplog.text
    assert "knn: 3 images that cannot be read are left out, 6 are scored" in table(outcome.results)


def test_a_model_without_a_summary_is_told(folder: Path, tmp_path: Path) -> None:
    context = Context(root=folder, device=torch.device("cpu"), cache=FeatureCache(tmp_path / "cache"), resolution=32)
    refused = load_suite("transfer", "smoke", ["knn.without_summary=refuse"]).only(["knn"])
    outcome = run_suite(refused, ["teacher:toy_sam"], context, tmp_path / "r.jsonl")
    assert "teacher:toy_sam has no summary, and Knn compares summaries" in outcome.failures[0]


def test_in_transfer_a_model_without_a_summary_is_compared_by_the_mean_of_its_map(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    context = Context(root=folder, device=torch.device("cpu"), cache=FeatureCache(tmp_path / "cache"), resolution=32)
    suite = load_suite("transfer", "smoke", ["knn.k=3"]).only(["knn"])
    with_summary, without = (f"{Path(__file__).stem}:{name}" for name in ("mean_colour", "colours"))
    outcome = run_suite(suite, [with_summary, without], context, tmp_path / "r.jsonl")
    assert [r.value for r in outcome.results] == [100.0, 100.0]
    assert "colours has no summary: it is compared by the mean of its map" in caplog.text


def test_images_of_all_kinds_of_pixels_become_rgb(tmp_path: Path) -> None:
    from radio_distill.eval.datasets.pixels import decode_rgb

    for mode in ("L", "RGBA", "P", "CMYK", "LA"):
        file = io.BytesIO()
        Image.fromarray(np.full((4, 5), 128, np.uint8)).convert(mode).save(file, "TIFF" if mode == "CMYK" else "PNG")
        assert decode_rgb(file.getvalue(), "a").shape == (3, 4, 5)


def class_folders(root: Path, names: list[str], split: str = "val") -> Path:
    for name in names:
        (root / "imagenet1k" / split / name).mkdir(parents=True)
        (root / "imagenet1k" / split / name / "x.jpg").write_bytes(jpeg())
    return root


def by_folder(data) -> dict[str, int]:
    return {key.partition("/")[0]: label for key, label in zip(data.keys, data.labels)}


def torchvision_names() -> list[str]:
    from torchvision.models import ResNet18_Weights

    return list(ResNet18_Weights.DEFAULT.meta["categories"])


@pytest.mark.parametrize(
    ("names", "label", "said"),
    [
        ([str(i) for i in range(1000)], int, "1,000 classes are named by numbers"),
        ([f"{i:04d}" for i in range(1000)], int, "1,000 classes are named by numbers"),
        ([wnids()[i] for i in (3, 1, 999)], wnids().index, "3 classes are named by WordNet ids"),
        ([wnids()[i].upper() for i in (0, 5)], lambda name: wnids().index(name.lower()), "2 classes are named by WordNet ids"),
        ([f"{wnids()[i]}_name" for i in (0, 7)], lambda name: wnids().index(name[:9]), "2 classes are named by WordNet ids"),
        (["tench", "great_white_shark", "Cardigan-Welsh-Corgi"], {"tench": 0, "great_white_shark": 2, "Cardigan-Welsh-Corgi": 264}.get, "open_clip"),
        (["Cardigan", "cardigan", "tench, Tinca tinca"][:2], {"Cardigan": 264, "cardigan": 474}.get, "torchvision"),
    ],
    ids=["numbers", "padded", "some ids", "upper case", "ids and names", "open_clip", "case tells apart"],
)  # fmt: skip
def test_imagenet_folders_are_mapped_by_their_names(tmp_path: Path, names, label, said, caplog) -> None:
    with caplog.at_level("INFO"):
        data = labelled("imagenet1k", "val", class_folders(tmp_path, names))
    assert by_folder(data) == {name: label(name) for name in names}
    assert [data[i].label for i in range(2)] == list(data.labels)[:2]
    assert any(said in note for note in data.notes)
    assert not data.complete
    if len(names) < 1000:
        assert f"{1000 - len(names)} of 1,000 classes have no folder" in "\n".join(data.notes)


def test_a_whole_list_of_names_is_mapped_to_itself(tmp_path: Path) -> None:
    from radio_distill.eval.datasets.imagenet_labels import check_order, class_names, labels_of_names

    names = torchvision_names()
    assert list(labels_of_names(names, "x").of.values()) == list(range(1000))
    check_order(names, "x")
    check_order(class_names(), "x")
    with pytest.raises(DataError, match=r"x: label 0 is called 'Afghan hound', and is 'tench' in ImageNet-1k"):
        check_order(sorted(names), "x")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([str(i) for i in range(1, 1001)], r"1000 names that are numbers, 1 to 1000; .* only when they run from 0 to 999"),
        ([str(i) for i in range(10)], r"10 names that are numbers, 0 to 9"),
        (["01", "1"], "2 names that are numbers"),
        (["cat", "dog"], r"val: 'cat' names none of ImageNet's 1,000 classes; expected WordNet ids \(n01440764\)"),
        (["n01440764", "n00000001"], "'n00000001' is none of ImageNet's 1,000 WordNet ids"),
        (["n01440764", "other"], "'other' is none of ImageNet's"),
        (["n01440764", "n01440764_tench"], r"mean the same class \(tench\); put them together"),
    ],
)
def test_folders_that_cannot_be_mapped_for_certain_are_refused(tmp_path: Path, names: list[str], said: str) -> None:
    with pytest.raises(DataError, match=said):
        labelled("imagenet1k", "val", class_folders(tmp_path, names))


def test_a_part_of_imagenet_is_not_filed_as_the_papers_protocol(tmp_path: Path) -> None:
    from radio_distill.eval.runner import preset_of

    data = labelled("imagenet1k", "val", class_folders(tmp_path, list(wnids()[:3])))
    suite = load_suite("classification", "paper")
    context = Context(root=tmp_path, device=torch.device("cpu"), cache=FeatureCache(tmp_path / "cache"))
    assert preset_of(suite, context, [data]) == "custom"
    data.complete = True
    assert preset_of(suite, context, [data]) == "paper"


def test_archives_beside_the_folders_do_not_hide_them(tmp_path: Path) -> None:
    root = class_folders(tmp_path, list(wnids()[:2]))
    write_tar(root / "imagenet1k" / "ILSVRC2012_img_val.tar", {"ILSVRC2012_val_00000001.JPEG": jpeg()})
    write_tar(root / "imagenet1k" / "my-val.tar", {"a.jpg": jpeg(), "a.cls": b"5"})
    assert labels_of(labelled("imagenet1k", "val", root)).tolist() == [0, 1]


def test_an_archive_or_a_flat_folder_alone_says_what_to_do(tmp_path: Path) -> None:
    place = tmp_path / "imagenet"
    (place / "val").mkdir(parents=True)
    (place / "val" / "ILSVRC2012_val_00000001.JPEG").write_bytes(jpeg())
    with pytest.raises(DataError, match=r"val has no folders of classes: sort its images into them"):
        labelled("imagenet1k", "val", tmp_path)
    write_tar(place / "ILSVRC2012_img_val.tar", {"ILSVRC2012_val_00000001.JPEG": jpeg()})
    write_tar(place / "retrieval-0.tar", {"a.jpg": jpeg()})  # no word `val` in it
    with pytest.raises(DataError, match=r"ILSVRC2012_img_val.tar is image-net.org's archive: unpack it"):
        labelled("imagenet1k", "val", tmp_path)


def test_keys_of_shards_include_their_folder_and_members_may_lie_apart(tmp_path: Path) -> None:
    samples = {f"{wnids()[i]}/0001": i for i in (0, 1, 2)}
    members = {f"{key}.png": jpeg((80 * i, 0, 0)) for key, i in samples.items()}
    write_tar(tmp_path / "val.tar", {**members, **{f"{key}.cls": str(i).encode() for key, i in samples.items()}})
    val = labelled("imagenet1k", "val", tmp_path)
    assert labels_of(val).tolist() == [0, 1, 2]
    assert [round(val[i].image_3HW[0].float().mean().item(), -1) for i in range(3)] == [0, 80, 160]


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({f"{wnids()[3]}_7.jpg": jpeg(), f"{wnids()[3]}_7.cls": b"4"}, f"its .cls says 4, which is {wnids()[4]}; expected"),
        ({"a.jpg": jpeg(), "a.png": jpeg(), "a.cls": b"4"}, "a is there twice"),
        ({"a.jpg": jpeg(), "a.cls": b"cat"}, "'cat' names none of ImageNet's 1,000 classes"),
        ({"22.05.jpg": jpeg(), "22.cls": b"1"}, "22 has no image"),  # the key ends at the first dot
    ],
)
def test_shards_whose_names_and_labels_disagree_are_told(tmp_path: Path, members: dict[str, bytes], said: str) -> None:
    write_tar(tmp_path / "val.tar", members)
    said = said.replace("22 has no image", "22: no image|22 has no image")
    with pytest.raises(DataError, match=said):
        labelled("imagenet1k", "val", tmp_path)


def test_classes_in_shards_may_be_names(tmp_path: Path) -> None:
    write_tar(tmp_path / "val.tar", {"a.jpg": jpeg(), "a.cls": b"n01443537\n", "b.jpg": jpeg(), "b.cls": b"n01440764"})
    assert labels_of(labelled("imagenet1k", "val", tmp_path)).tolist() == [1, 0]


def test_a_shard_that_just_stops_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "val.tar", {f"{i}.{e}": jpeg() if e == "jpg" else b"3" for i in range(4) for e in ("jpg", "cls")})
    data = (tmp_path / "val.tar").read_bytes()
    (tmp_path / "val.tar").write_bytes(data[: len(data) // 2 // 512 * 512])
    with pytest.raises(DataError, match=r"val.tar is damaged .*cut"):
        labelled("imagenet1k", "val", tmp_path)


@pytest.mark.parametrize("names", [["goldfish", "tench"], ["cat", "dog"]])
def test_parquet_that_names_its_classes_is_mapped_or_refused(tmp_path: Path, names: list[str]) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    (tmp_path / "data").mkdir()
    table = pyarrow.table({"image": [{"bytes": jpeg(), "path": "x"}] * 3, "label": [0, 1, 0]})
    facts = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(facts)})
    parquet.write_table(table, tmp_path / "data" / "validation-00000-of-00001.parquet")
    if names[0] == "cat":
        with pytest.raises(DataError, match="'cat' names none of ImageNet's 1,000 classes"):
            labelled("imagenet1k", "val", tmp_path)
    else:
        assert labels_of(labelled("imagenet1k", "val", tmp_path)).tolist() == [1, 0, 1]


def test_classes_and_images_are_those_of_torchvisions_imagefolder(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    for split in ("train", "val"):
        for place in ("cat", "dog/husky", "dog/poodle/white", "10", "9"):
            (tmp_path / split / place).mkdir(parents=True)
            for i in range(3):
                (tmp_path / split / place / f"{i}.jpg").write_bytes(jpeg())
    theirs, ours = ImageFolder(str(tmp_path / "train")), labelled("folder", "train", tmp_path)
    assert list(ours.classes) == theirs.classes
    assert {str(tmp_path / "train" / key): label for key, label in zip(ours.keys, ours.labels)} == dict(theirs.samples)


def test_what_is_no_class_and_no_image_is_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    (folder / "train" / ".ipynb_checkpoints" / "a.jpg").write_bytes(jpeg())
    (folder / "train" / "red" / "._0.jpg").write_bytes(b"")
    (folder / "train" / "red" / "a.heic").write_bytes(b"")
    (folder / "train" / "loose.jpg").write_bytes(jpeg())
    (folder / "train" / "empty").mkdir()
    train = labelled("folder", "train", folder)
    assert train.classes == ("blue", "empty", "green", "red")
    assert len(train) == 12
    (left_out, empty) = train.notes
    assert left_out == (
        "left out: 2 hidden (.ipynb_checkpoints), 1 .heic, which is an image format that is not read: convert them (red/a.heic), "
        "1 .txt (notes.txt), 1 images beside the folders of classes (loose.jpg)"
    )
    assert empty == "1 classes without images (empty)"
    assert f"folder/train: {left_out}" in caplog.text


def test_classes_that_differ_in_case_alone_are_told(folder: Path) -> None:
    (folder / "val" / "red").rename(folder / "val" / "Red")
    with pytest.raises(DataError, match=r"train has no class 'Red' \(it has 'red': rename one\); both splits"):
        labelled("folder", "val", folder)


def test_a_dry_run_tells_what_was_found_and_left_out(folder: Path, tmp_path: Path) -> None:
    from radio_distill.eval.runner import describe

    (folder / "val" / "red" / "a.heic").write_bytes(b"")
    context = Context(root=folder, device=torch.device("cpu"), cache=FeatureCache(tmp_path / "cache"), resolution=32)
    lines = list(describe(load_suite("transfer", "smoke").only(["knn"]), [], context))
    found = next(i for i, line in enumerate(lines) if line.startswith("  folder/val#"))
    assert lines[found].endswith(": 6 items")
    assert lines[found + 1] == (
        "    left out: 1 .heic, which is an image format that is not read: convert them (red/a.heic), 1 .txt (notes.txt)"
    )
