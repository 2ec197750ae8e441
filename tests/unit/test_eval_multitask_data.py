"""Readers of PascalContext and NYUDv2 on miniatures of the real layouts, written with the real file formats."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from radio_distill.errors import DataError
from radio_distill.eval.datasets import open_dataset
from radio_distill.eval.datasets.multitask import borders
from radio_distill.eval.datasets.pascal_context import PART_OF, WITH_NORMALS

HEIGHT, WIDTH = 6, 8
PALETTE = [c for i in range(256) for c in (i, 255 - i, 7)]
UP_GREEN = (127, 255, 127)  # y of the normal is 1, x and z nearly 0


def write(path: Path, pixels: np.ndarray, *, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels.astype(np.uint8), "P" if palette else None)
    if palette:
        image.putpalette(PALETTE)
    image.save(path)


def write_mat(path: Path, **variables: object) -> None:
    savemat = pytest.importorskip("scipy.io").savemat
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, variables)


def struct(**fields: object) -> np.ndarray:
    """A MATLAB struct of 1x1."""
    array = np.empty((1, 1), [(name, object) for name in fields])
    array[0, 0] = tuple(fields.values())
    return array


def part(name: str, rows: slice) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[rows] = 1
    return struct(part_name=name, mask=mask)


def thing(label: int, *parts: np.ndarray) -> np.ndarray:
    mask = np.ones((HEIGHT, WIDTH), np.uint8)
    return struct(
        **{"class": "person"}, class_ind=float(label), mask=mask, parts=np.hstack(parts) if parts else np.empty((0, 0))
    )


@pytest.fixture
def pascal(tmp_path: Path) -> Path:
    base = tmp_path / "PASCALContext"
    context = np.full((HEIGHT, WIDTH), 284, np.uint16)  # person: with normals
    context[:, 5:] = 187  # grass: without
    for key, source in (("2008_000002", "VOC12"), ("2008_000003", "pascal-context")):
        write(base / "JPEGImages" / f"{key}.jpg", np.full((HEIGHT, WIDTH, 3), 90))
        semseg = np.full((HEIGHT, WIDTH), 15)
        semseg[0] = 255
        write(base / "semseg" / source / f"{key}.png", semseg, palette=True)
        write(base / "normals_distill" / f"{key}.png", np.broadcast_to(UP_GREEN, (HEIGHT, WIDTH, 3)))
        write(base / "sal_distill" / f"{key}.png", np.where(np.arange(WIDTH) < 5, 200, 100)[None].repeat(HEIGHT, 0))
        write_mat(base / "pascal-context" / "trainval" / f"{key}.mat", LabelMap=context)
    people = np.hstack([thing(15, part("head", np.s_[0:2]), part("lfoot", np.s_[4:6])), thing(12, part("head", np.s_[:]))])
    write_mat(base / "human_parts" / "2008_000002.mat", anno=struct(imname="2008_000002", objects=people))
    write_mat(base / "human_parts" / "2008_000003.mat", anno=struct(imname="2008_000003", objects=thing(15)))
    lists = base / "ImageSets" / "Context"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("2008_000002\n2008_000003\n")
    return tmp_path


@pytest.fixture
def nyud(tmp_path: Path) -> Path:
    base = tmp_path / "NYUDv2"
    write(base / "images" / "1.png", np.full((HEIGHT, WIDTH, 3), 90))
    segmentation = np.full((HEIGHT, WIDTH), 40)
    segmentation[0] = 0
    write(base / "segmentation" / "1.png", segmentation)
    write(base / "normals" / "1.png", np.broadcast_to(UP_GREEN, (HEIGHT, WIDTH, 3)))
    write(base / "edge" / "1.png", np.eye(HEIGHT, WIDTH) * 255)
    (base / "depth").mkdir()
    np.save(base / "depth" / "1.npy", np.full((HEIGHT, WIDTH), 2.5, np.float32))
    (base / "gt_sets").mkdir()
    (base / "gt_sets" / "val.txt").write_text("1\n")
    return tmp_path


def test_pascal_context_is_read_as_the_harness_reads_it(pascal: Path) -> None:
    data = open_dataset("pascal_context", "val", pascal, kind="multitask")
    image, targets = data[0]
    assert (image.dtype, tuple(image.shape)) == (torch.uint8, (3, HEIGHT, WIDTH))
    assert targets["semseg"][0, :, 0].tolist() == [255, 15, 15, 15, 15, 15]
    assert targets["parsing"][0, :, 0].tolist() == [1, 1, 0, 0, 6, 6]  # the dog's head is nobody's
    assert targets["saliency"][0, 0].tolist() == [1, 1, 1, 1, 1, 0, 0, 0]
    assert targets["normals"][1, 0].tolist() == [1, 1, 1, 1, 1, 0, 0, 0]  # none on grass
    assert targets["normals"][0, 0, 0].item() == pytest.approx(2 * 127 / 255 - 1)
    assert set(targets["edge"].unique().tolist()) == {0, 1}
    assert targets["edge"][0, :, :4].sum() == 0
    assert not targets["edge"][0, :, 7].any()


def test_pascal_context_takes_masks_of_either_folder_and_nobody_without_parts(pascal: Path) -> None:
    targets = open_dataset("pascal_context", "val", pascal, kind="multitask")[1].targets
    assert targets["semseg"][0, 1, 0] == 15
    assert not targets["parsing"].any()
    (pascal / "PASCALContext" / "JPEGImages" / "2009.jpg").write_bytes(b"")
    assert open_dataset("pascal_context", "val", pascal, kind="multitask").notes == [
        "left out: 1 images that val.txt does not list (JPEGImages/2009.jpg)"
    ]


def test_the_parts_of_pascal_are_the_24_of_a_person_in_six_groups() -> None:
    assert len(PART_OF) == 24
    assert set(PART_OF.values()) == set(range(1, 7))


def test_the_classes_with_normals_are_those_that_both_lists_of_names_have() -> None:
    assert len(set(WITH_NORMALS)) == len(WITH_NORMALS) == 170
    shared = {"air conditioner": 3, "chair": 72, "person": 284, "tvmonitor": 427, "wall": 440, "wire": 457}
    outside = {"aeroplane": 2, "fire place": 148, "grass": 187, "poster": 306, "sky": 360, "unknown": 431, "wool": 459}
    assert not set(shared.values()) - set(WITH_NORMALS)
    assert not set(outside.values()) & set(WITH_NORMALS)


def test_nyudv2_is_read_as_the_harness_reads_it(nyud: Path) -> None:
    data = open_dataset("nyudv2", "val", nyud, kind="multitask")
    _, targets = data[0]
    assert targets["semseg"][0, :, 0].tolist() == [255, 39, 39, 39, 39, 39]
    assert targets["depth"].unique().tolist() == [2.5]
    assert torch.equal(targets["edge"][0].bool(), torch.eye(HEIGHT, WIDTH).bool())
    assert targets["normals"][1].unique().tolist() == [1]
    assert len(data.classes) == 40


def test_a_missing_set_says_what_is_looked_for_and_a_packed_one_how_to_unpack_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"NYUDv2/gt_sets/val.txt is missing; expected[\s\S]*NYUDv2.tar.gz of ATRC"):
        open_dataset("nyudv2", "val", tmp_path, kind="multitask")
    (tmp_path / "PASCALContext.tar.gz").touch()
    with pytest.raises(DataError, match=r"archive is there but packed: tar -xzf .*PASCALContext.tar.gz -C"):
        open_dataset("pascal_context", "val", tmp_path, kind="multitask")


def test_a_missing_split_an_empty_one_and_missing_files_are_named(nyud: Path) -> None:
    with pytest.raises(DataError, match=r"gt_sets/train.txt is missing"):
        open_dataset("nyudv2", "train", nyud, kind="multitask")
    (nyud / "NYUDv2" / "gt_sets" / "val.txt").write_text("1\n2\n")
    with pytest.raises(DataError, match=r"1 of 2 files are missing in .*images \(2.png"):
        open_dataset("nyudv2", "val", nyud, kind="multitask")
    (nyud / "NYUDv2" / "gt_sets" / "val.txt").write_text("\n")
    with pytest.raises(DataError, match="lists no images"):
        open_dataset("nyudv2", "val", nyud, kind="multitask")


def test_an_image_without_semantic_mask_is_named(pascal: Path) -> None:
    (pascal / "PASCALContext" / "semseg" / "VOC12" / "2008_000002.png").unlink()
    with pytest.raises(DataError, match=r"1 of 2 images have a file in neither .*\(2008_000002.png"):
        open_dataset("pascal_context", "val", pascal, kind="multitask")


def test_annotations_of_another_size_are_named(nyud: Path, pascal: Path) -> None:
    np.save(nyud / "NYUDv2" / "depth" / "1.npy", np.ones((HEIGHT, WIDTH + 1), np.float32))
    with pytest.raises(DataError, match=r"NYUDv2: depth of 1 is 9x6 and its image 8x6"):
        open_dataset("nyudv2", "val", nyud, kind="multitask")[0]
    write(pascal / "PASCALContext" / "normals_distill" / "2008_000002.png", np.zeros((3, 3, 3)))
    with pytest.raises(DataError, match=r"normals of 2008_000002 is 3x3 and its image 8x6"):
        open_dataset("pascal_context", "val", pascal, kind="multitask")[0]


def test_unknown_labels_and_parts_are_named(nyud: Path, pascal: Path) -> None:
    write(nyud / "NYUDv2" / "segmentation" / "1.png", np.full((HEIGHT, WIDTH), 41))
    with pytest.raises(DataError, match=r"segmentation/1.png: unknown id 40; expected 0 to 39 or 255"):
        open_dataset("nyudv2", "val", nyud, kind="multitask")[0]
    objects = thing(15, part("tail", np.s_[:]))
    write_mat(pascal / "PASCALContext" / "human_parts" / "2008_000002.mat", anno=struct(imname="x", objects=objects))
    with pytest.raises(DataError, match=r"2008_000002.mat: unknown part 'tail' of a person"):
        open_dataset("pascal_context", "val", pascal, kind="multitask")[0]


def test_damaged_files_are_named(nyud: Path, pascal: Path) -> None:
    (nyud / "NYUDv2" / "depth" / "1.npy").write_bytes(b"no numbers")
    with pytest.raises(DataError, match=r"depth/1.npy is damaged"):
        open_dataset("nyudv2", "val", nyud, kind="multitask")[0]
    (pascal / "PASCALContext" / "human_parts" / "2008_000002.mat").write_bytes(b"no matrix" * 30)
    with pytest.raises(DataError, match=r"2008_000002.mat cannot be read as a MATLAB file"):
        open_dataset("pascal_context", "val", pascal, kind="multitask")[0]


def test_borders_are_those_of_opencv_and_scikit_image() -> None:
    ids = np.array([[0] * 6 + [5] * 6] * 3 + [[0] * 4 + [7] * 8] * 2 + [[0] * 2 + [7] * 3 + [9] * 7] * 4)
    # thin(abs(cv2.Laplacian(ids, cv2.CV_64F)) > 0) with opencv 5.0.0 and scikit-image 0.26.0
    expected = ["." * 12] * 3 + [".....##.....", "...##..###..", "..#.#.......", *[".#..#......."] * 3]
    assert ["".join(".#"[x] for x in row) for row in borders(ids)] == expected
