"""Readers of pixel classes and of instances, on miniatures of the real layouts in the real file formats."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from radio_distill.errors import DataError
from radio_distill.eval.datasets import open_dataset
from radio_distill.eval.datasets.instances import CocoInstances, decode_mask
from radio_distill.eval.datasets.segmentation import Ade20k, Voc2012

RNG = np.random.default_rng(0)


def jpeg(path: Path, width: int = 24, height: int = 16) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)


def png(path: Path, ids: np.ndarray, *, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(ids.astype(np.uint8), "L")
    if palette:
        image = Image.fromarray(ids.astype(np.uint8), "P")
        image.putpalette([c for i in range(256) for c in (i, 255 - i, (7 * i) % 256)])
    image.save(path)


@pytest.fixture
def ade(tmp_path: Path) -> Path:
    base = tmp_path / "ADEChallengeData2016"
    for split, prefix, count in (("training", "ADE_train", 3), ("validation", "ADE_val", 2)):
        for i in range(1, count + 1):
            jpeg(base / "images" / split / f"{prefix}_{i:08d}.jpg")
            ids = np.zeros((16, 24))
            ids[:8], ids[8:, :12] = 1, 150
            png(base / "annotations" / split / f"{prefix}_{i:08d}.png", ids)
    return tmp_path


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    base = tmp_path / "VOCdevkit" / "VOC2012"
    names = ["2007_000032", "2007_000039", "2008_000001"]
    for name in names:
        jpeg(base / "JPEGImages" / f"{name}.jpg")
    for name in names[:2]:
        ids = np.zeros((16, 24))
        ids[4:8, 4:8], ids[3, 3:9] = 20, 255
        png(base / "SegmentationClass" / f"{name}.png", ids, palette=True)
    lists = base / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_000032\n")
    (lists / "val.txt").write_bytes(b"\xef\xbb\xbf2007_000039\r\n")  # as an editor of Windows saves it
    return tmp_path


COCO: dict[str, Any] = {
    "images": [
        {"id": 9, "file_name": "000000000009.jpg", "height": 16, "width": 24},
        {"id": 4, "file_name": "000000000004.jpg", "height": 16, "width": 24},
        {"id": 5, "file_name": "000000000005.jpg", "height": 16, "width": 24},
    ],
    "categories": [{"id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}],
    "annotations": [
        {"id": 1, "image_id": 9, "category_id": 90, "iscrowd": 0, "area": 24.0, "bbox": [2, 3, 6, 4],
         "segmentation": [[2, 3, 8, 3, 8, 7, 2, 7]]},
        {"id": 2, "image_id": 9, "category_id": 1, "iscrowd": 1, "area": 32.0, "bbox": [0, 0, 2, 16],
         "segmentation": {"size": [16, 24], "counts": [0, 32, 352]}},
        {"id": 3, "image_id": 4, "category_id": 1, "iscrowd": 1, "area": 32.0, "bbox": [0, 0, 2, 16],
         "segmentation": {"size": [16, 24], "counts": [0, 32, 352]}},
    ],
}  # fmt: skip


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    for split in ("train2017", "val2017"):
        for row in COCO["images"]:
            jpeg(tmp_path / split / row["file_name"])
        write(tmp_path, COCO, split)
    return tmp_path


def write(root: Path, content: Any, split: str = "val2017") -> None:
    path = root / "annotations" / f"instances_{split}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def without(field: str, **others: Any) -> dict[str, Any]:
    return {key: value for key, value in {**COCO["annotations"][0], **others}.items() if key != field}


def changed(**parts: Any) -> dict[str, Any]:
    return {**json.loads(json.dumps(COCO)), **parts}


def test_ade20k_shifts_labels_down_and_ignores_zero(ade: Path) -> None:
    dataset = open_dataset("ade20k", "validation", ade, kind="segmentation")
    assert list(dataset.keys) == ["ADE_val_00000001", "ADE_val_00000002"]
    assert len(dataset.classes) == 150
    sample = dataset[0]
    assert sample.image_3HW.shape == (3, 16, 24)
    assert sample.labels_HW[0, 0] == 0
    assert sample.labels_HW[15, 0] == 149
    assert sample.labels_HW[15, 23] == 255


def test_voc2012_reads_palette_indices_of_the_listed_images(voc: Path) -> None:
    dataset = open_dataset("voc2012", "val", voc, kind="segmentation")
    assert list(dataset.keys) == ["2007_000039"]
    labels = dataset[0].labels_HW
    assert sorted(labels.unique().tolist()) == [0, 20, 255]
    assert len(dataset.classes) == 21


def test_a_missing_folder_is_named_with_the_layout(tmp_path: Path, voc: Path) -> None:
    with pytest.raises(DataError, match=r"ADE20k: .*images/training is missing; expected\n.*ADEChallengeData2016/images"):
        Ade20k(tmp_path, "training")
    with pytest.raises(DataError, match=r"trainval.txt is missing; expected\n.*ImageSets/Segmentation"):
        Voc2012(voc, "trainval")
    with pytest.raises(DataError, match=r"COCO 2017: .*val2017 is missing; expected\n.*train2017"):
        CocoInstances(tmp_path, "val2017")


def test_images_without_annotation_are_told(ade: Path, voc: Path) -> None:
    next((ade / "ADEChallengeData2016/annotations/training").iterdir()).unlink()
    with pytest.raises(DataError, match="1 of 3 images of training lack their file or annotation"):
        Ade20k(ade, "training")
    (voc / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt").write_text("2008_000001\n")
    with pytest.raises(DataError, match=r"1 of 1 images of SegmentationClass lack .*2008_000001"):
        Voc2012(voc, "val")


@pytest.mark.parametrize(
    ("ids", "told"),
    [
        (np.full((16, 24), 151), r"ADE_val_00000001.png: unknown id 150; expected 0 to 149 or 255"),
        (np.ones((16, 20)), r"ADE_val_00000001.png is 20x16 and its image 24x16"),
    ],
)
def test_labels_that_do_not_fit_are_told(ade: Path, ids: np.ndarray, told: str) -> None:
    png(ade / "ADEChallengeData2016/annotations/validation/ADE_val_00000001.png", ids)
    with pytest.raises(DataError, match=told):
        Ade20k(ade, "validation")[0]


def test_damaged_files_are_named(ade: Path) -> None:
    path = ade / "ADEChallengeData2016/images/validation/ADE_val_00000001.jpg"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError, match=r"ADE_val_00000001.jpg is damaged"):
        Ade20k(ade, "validation")[0]
    label = ade / "ADEChallengeData2016/annotations/validation/ADE_val_00000002.png"
    Image.new("RGB", (24, 16)).save(label)
    with pytest.raises(DataError, match=r"has mode RGB, expected L or P"):
        Ade20k(ade, "validation")[1]


def test_coco_gives_boxes_labels_and_masks_of_polygons_and_run_lengths(coco: Path) -> None:
    dataset: Any = open_dataset("coco2017", "val2017", coco, kind="instances")
    assert list(dataset.keys) == ["000000000004.jpg", "000000000005.jpg", "000000000009.jpg"]
    assert dataset.annotated(crowds=True) == [0, 2]
    assert dataset.annotated(crowds=False) == [2]
    assert len(dataset[1].boxes_N4) == 0
    sample = dataset[2]
    assert sample.image_id == 9
    assert sample.labels_N.tolist() == [1, 0]
    assert sample.boxes_N4.tolist() == [[2, 3, 8, 7], [0, 0, 2, 16]]
    assert sample.crowd_N.tolist() == [False, True]
    polygon, runs = (decode_mask(mask, 16, 24) for mask in sample.masks)
    box = torch.zeros(16, 24, dtype=torch.bool)
    box[3:7, 2:8] = True
    assert torch.equal(polygon, box)
    assert runs.sum() == 32
    assert runs[:, :2].all()


def test_compressed_run_lengths_are_the_same_mask() -> None:
    from faster_coco_eval import mask as library

    runs = {"size": [16, 24], "counts": [5, 30, 349]}
    packed = library.frPyObjects(runs, 16, 24)
    text = {**packed, "counts": packed["counts"].decode()}
    assert torch.equal(decode_mask(runs, 16, 24), decode_mask(text, 16, 24))
    two = decode_mask([[0, 0, 4, 0, 4, 4, 0, 4], [8, 8, 12, 8, 12, 12, 8, 12]], 16, 24)
    assert two.sum() == 32  # the parts of an object are joined


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (changed(annotations=[{**COCO["annotations"][0], "image_id": 77}]), "annotations of image 77"),
        (changed(annotations=[{**COCO["annotations"][0], "category_id": 12}]), r"category 12 is annotated, but not listed .*\(annotation 1 and 0 others"),
        (changed(annotations=[without("image_id")]), "annotation 1 has image_id None, expected a whole number"),
        (changed(annotations=[without("category_id")]), "annotation 1 has category_id None, expected a whole number"),
        (changed(annotations=[without("bbox", segmentation=[])]), "annotation 1 has neither bbox nor segmentation; mend it"),
        (changed(annotations=[without("area", bbox=[1, 2, 3])]), r"annotation 1 has bbox \[1, 2, 3\] and area None, expected \[x, y"),
        (changed(annotations=[without("id", area="big")]), "annotation None has bbox .* and area 'big', expected"),
        (changed(annotations=[without("id", bbox=[1, 2, float("nan"), 4])]), r"bbox \[1, 2, nan, 4\]"),
        (changed(annotations=[without("id", iscrowd="0")]), "annotation None has iscrowd '0', expected 0 or 1"),
        (changed(annotations=["row"]), "annotation number 0 has image_id 'row', expected a whole number"),
        (changed(images=[*COCO["images"], COCO["images"][0]]), "lists image 9 more than once"),
        (changed(images=[{"id": "9", "file_name": "a.jpg"}]), "image 9 has id '9', expected a whole number"),
        (changed(images=[*COCO["images"], {**COCO["images"][0], "id": 1, "file_name": "x.jpg"}]), r"1 of 4 images are not in .*x.jpg"),
        (changed(images=[], annotations=[]), "lists no images"),
        ({"images": []}, r"no.* a COCO annotation file of images, annotations, categories \(it lacks 'annotations'\)"),
        ([1], "not a COCO annotation file"),
    ],
)  # fmt: skip
def test_annotation_files_that_do_not_fit_are_told(coco: Path, content: Any, told: str) -> None:
    write(coco, content)
    with pytest.raises(DataError, match=told):
        CocoInstances(coco, "val2017")


@pytest.mark.parametrize(
    ("row", "box", "area"),
    [
        (without("area"), [2, 3, 8, 7], 24.0),
        (without("id", area=None, iscrowd=None), [2, 3, 8, 7], 24.0),
        (without("bbox"), [2, 3, 8, 7], 24.0),
        (without("area", segmentation={"size": [16, 24], "counts": [0, 32, 352]}), [2, 3, 8, 7], 32.0),
        (without("area", segmentation=[]), [2, 3, 8, 7], 24.0),
        (without("segmentation"), [2, 3, 8, 7], 24.0),
        (without("iscrowd"), [2, 3, 8, 7], 24.0),
        (without("id", bbox=[2, 3, 0, 4]), [2, 3, 2, 7], 24.0),
    ],
)
def test_what_a_coco_annotation_lacks_is_taken_from_what_it_has(coco: Path, row: Any, box: list[float], area: float) -> None:
    images = [{key: value for key, value in image.items() if key in ("id", "file_name")} for image in COCO["images"]]
    write(coco, changed(annotations=[row], images=images))
    sample = CocoInstances(coco, "val2017")[2]
    assert sample.boxes_N4.tolist() == [box]
    assert sample.areas_N.tolist() == [area]
    assert sample.crowd_N.tolist() == [False]


@pytest.mark.parametrize(
    ("mask", "told"),
    [
        ([], "it has no polygon"),
        (None, "it has no polygon"),
        ([[1, 2, 3, 4]], "a polygon of 4 numbers; expected x and y of at least three points"),
        ([[1, 2, 3, 4, 5, 6, 7]], "a polygon of 7 numbers"),
        (["abc"], "a polygon of 3 numbers"),
        ({"size": [16, 24], "counts": [0, 32]}, "no mask of 24x16"),
        ({"size": [16, 24], "counts": [0, 3200]}, "no mask of 24x16"),
        ({"size": [16, 24], "counts": [-3, 387]}, "no mask of 24x16"),
        ({"size": [24, 16], "counts": [0, 32, 352]}, "its run lengths are of 16x24"),
        ({"size": [16, 24], "counts": "zzzz"}, "no mask of 24x16"),
        ({"size": [16, 24]}, "no mask of 24x16"),
    ],
)
def test_masks_that_are_none_are_told_by_their_annotation_and_boxes_are_read(coco: Path, mask: Any, told: str) -> None:
    write(coco, changed(annotations=[{**COCO["annotations"][0], "segmentation": mask}]))
    sample = CocoInstances(coco, "val2017")[2]
    assert sample.boxes_N4.tolist() == [[2, 3, 8, 7]]
    with pytest.raises(DataError, match=f"instances_val2017.json: annotation 1: .*{told}.*mend the annotation, or remove it"):
        decode_mask(sample.masks[0], 16, 24)


def test_an_image_of_another_size_than_annotated_is_told(coco: Path) -> None:
    jpeg(coco / "val2017" / "000000000009.jpg", width=20)
    with pytest.raises(DataError, match=r"000000000009.jpg is 20x16 and instances_val2017.json says 24x16"):
        CocoInstances(coco, "val2017")[2]


def test_the_toy_world_has_both_kinds_of_samples() -> None:
    pixels = open_dataset("ade20k", "training", "toy", kind="segmentation")[0]
    assert pixels.image_3HW.shape[1:] == pixels.labels_HW.shape
    objects = open_dataset("coco2017", "val2017", "toy", kind="instances")[3]
    assert objects.image_id == 3
    for box, mask, area in zip(objects.boxes_N4.int().tolist(), objects.masks, objects.areas_N):
        assert decode_mask(mask, 192, 192).sum() == area
        assert mask[box[1] : box[3], box[0] : box[2]].sum() == area
        assert mask[box[1]].any()
        assert mask[:, box[2] - 1].any()


def test_what_is_not_read_is_counted_with_an_example(ade: Path, voc: Path, coco: Path) -> None:
    ade_base, voc_base = ade / "ADEChallengeData2016", voc / "VOCdevkit" / "VOC2012"
    jpeg(ade_base / "images" / "training" / "extra.JPG")
    (ade_base / "images" / "training" / "._ADE_train_00000001.jpg").write_bytes(b"")
    png(ade_base / "annotations" / "training" / "alone.png", np.ones((16, 24)))
    assert Ade20k(ade, "training").notes == [
        "left out: 1 annotations without an image (annotations/training/alone.png), "
        "1 hidden (images/training/._ADE_train_00000001.jpg), 1 images that are no .jpg (images/training/extra.JPG)"
    ]
    (voc_base / "JPEGImages" / "phone.heic").write_bytes(b"")
    assert Voc2012(voc, "val").notes == [
        "left out: 2 images that val.txt does not list (JPEGImages/2007_000032.jpg), "
        "1 .heic, which is an image format that is not read: convert them (JPEGImages/phone.heic)"
    ]
    jpeg(coco / "val2017" / "000000000077.jpg")
    assert CocoInstances(coco, "val2017").notes == [
        "left out: 1 images that instances_val2017.json does not list (000000000077.jpg)",
        "2 images without an object (000000000004.jpg): nothing is trained on them",
    ]
