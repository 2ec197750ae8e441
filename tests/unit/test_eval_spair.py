"""SPair-71k's reader on a miniature of the real layout."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from radio_distill.errors import DataError
from radio_distill.eval.datasets import open_dataset
from radio_distill.eval.datasets.object_views import images_of


def write_image(root: Path, category: str, name: str, size: tuple[int, int], points: list) -> None:
    for part in ("JPEGImages", "ImageAnnotation"):
        (root / part / category).mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((size[1], size[0], 3), np.uint8)).save(root / "JPEGImages" / category / f"{name}.jpg")
    facts = {
        "filename": f"{name}.jpg",
        "image_width": size[0],
        "image_height": size[1],
        "kps": {str(i): p for i, p in enumerate(points)},
    }
    (root / "ImageAnnotation" / category / f"{name}.json").write_text(json.dumps(facts))


def write_pair(root: Path, number: int, category: str, first: str, second: str, size: tuple[int, int]) -> Path:
    folder = root / "PairAnnotation" / "test"
    folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "filename": f"{number:06d}-{first}-{second}:{category}",
        "category": category,
        "trg_bndbox": [10, 10, 30, 50],
        "trg_imsize": [*size, 3],
        "viewpoint_variation": number % 3,
    }
    path = folder / f"{number:06d}-{first}-{second}:{category}.json"
    path.write_text(json.dumps(facts))
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "SPair-71k"
    for category in ("cat", "bus"):
        write_image(folder, category, "2008_000001", (80, 40), [[20, 10], None, [79, 39]])
        write_image(folder, category, "2008_000002", (50, 100), [[25, 50], [1, 2], None])
        write_pair(folder, 2, category, "2008_000001", "2008_000002", (50, 100))
        write_pair(folder, 1, category, "2008_000002", "2008_000001", (80, 40))
    return tmp_path


def pairs(root: Path, side: int = 160, split: str = "test"):
    return open_dataset("spair71k", split, root, kind="keypoint_pairs").at(side)


def test_pairs_come_class_by_class_and_share_their_images(root):
    data = pairs(root)
    assert sorted(data.keys) == [
        "bus/2008_000001-2008_000002@160",
        "bus/2008_000002-2008_000001@160",
        "cat/2008_000001-2008_000002@160",
        "cat/2008_000002-2008_000001@160",
    ]
    assert [key[:3] for key in data.keys] == ["bus", "bus", "cat", "cat"]
    assert len(images_of(data.limited(1))) == 4
    assert data.notes == []
    (root / "SPair-71k" / "JPEGImages" / "cat" / "spare.jpg").write_bytes(b"")
    assert pairs(root).limited(1).notes == ["left out: 1 images of no pair of test (JPEGImages/cat/spare.jpg)"]


def test_keypoints_and_boxes_follow_the_padding_to_a_square(root):
    data = pairs(root)
    pair = data[data.keys.index("cat/2008_000001-2008_000002@160")]
    assert pair.keypoints_first_K3.tolist() == [[40, 20, 1], [0, 0, 0], [158, 78, 1]]
    assert pair.keypoints_second_K3.tolist() == [[40, 80, 1], [1, 3, 1], [0, 0, 0]]  # whole pixels, rounded down
    assert pair.box_scale == pytest.approx(0.4)
    image = images_of(data)[pair.first].image_3HW
    assert image.shape == (3, 160, 160)
    assert image[:, :75].max() < 20  # the photograph
    assert image[:, 85:].min() > 235  # white


def test_at_most_200_pairs_of_a_class_are_drawn_and_always_the_same(tmp_path):
    folder = tmp_path / "SPair-71k"
    write_image(folder, "cow", "a", (20, 20), [[1, 1]])
    write_image(folder, "cow", "b", (20, 20), [[1, 1]])
    for i in range(203):
        write_pair(folder, i, "cow", "a", "b", (20, 20))
    data = pairs(tmp_path)
    assert len(data) == 200
    assert data.notes == ["200 of 203 pairs: at most 200 of a class, as published"]
    assert [p.viewpoint for p in data.pairs] == [p.viewpoint for p in pairs(tmp_path).pairs]
    assert [p.viewpoint for p in data.pairs] != sorted(p.viewpoint for p in data.pairs)


def test_a_set_that_is_not_there_or_not_complete_says_what_was_looked_for(root, tmp_path_factory):
    with pytest.raises(DataError, match=r"spair71k: .*PairAnnotation/test/\*\.json is missing; expected[\s\S]*JPEGImages"):
        pairs(tmp_path_factory.mktemp("empty"))
    with pytest.raises(DataError, match="spair71k has no split 'dev'; expected one of train, val, test"):
        pairs(root, split="dev")
    (root / "SPair-71k" / "JPEGImages" / "cat" / "2008_000002.jpg").unlink()
    with pytest.raises(DataError, match=r"JPEGImages/cat/2008_000002.jpg is missing"):
        pairs(root)


def test_annotations_that_are_damaged_are_named(root):
    path = root / "SPair-71k" / "PairAnnotation" / "test" / "000001-2008_000002-2008_000001:cat.json"
    facts = json.loads(path.read_text())
    for changed, message in (
        ({**facts, "trg_bndbox": [5, 5, 5, 5]}, "trg_bndbox is empty"),
        ({k: v for k, v in facts.items() if k != "category"}, "is not a pair's annotation .*category"),
    ):
        path.write_text(json.dumps(changed))
        with pytest.raises(DataError, match=message):
            pairs(root)
    path.write_text("{")
    with pytest.raises(DataError, match=r":cat.json is not a pair's annotation"):
        pairs(root)
    path.write_text(json.dumps(facts))
    image = root / "SPair-71k" / "ImageAnnotation" / "cat" / "2008_000001.json"
    image.write_text(json.dumps({"image_width": 80, "image_height": 40, "kps": {"0": [1], "7": None}}))
    data = pairs(root)
    with pytest.raises(DataError, match=r"2008_000001.json is not an image's annotation"):
        data[2]


def test_images_of_other_sizes_are_other_images(root):
    ids = {images_of(pairs(root, side)).id for side in (32, 64)}
    assert len(ids) == 2
    assert torch.equal(images_of(pairs(root, 32))[0].image_3HW[:, -1, -1], torch.tensor([255, 255, 255], dtype=torch.uint8))
