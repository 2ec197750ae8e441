"""NAVI's reader on a miniature of the real layout, and the geometry of a view."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from radio_distill.errors import DataError
from radio_distill.eval.datasets import open_dataset
from radio_distill.eval.datasets.navi_files import COPY, main, read_photograph
from radio_distill.eval.datasets.object_views import Photograph, crop_to_object, normals_of, relative_pose

WIDTH, HEIGHT, FOCAL = 48, 32, 60.0


def turn(degrees: float) -> list[float]:
    """Quaternion (w, x, y, z) of a turn about y, of length 2: readers must normalise it."""
    half = np.radians(degrees) / 2
    return [2 * float(np.cos(half)), 0.0, 2 * float(np.sin(half)), 0.0]


def write_view(collection: Path, number: int) -> dict:
    """A photograph of a box half a metre away; disparity is 16-bit."""
    for part in ("images", "depth"):
        (collection / part).mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(collection / "images" / f"{number:03d}.jpg", quality=95)
    depth_mm = np.zeros((HEIGHT, WIDTH))
    depth_mm[8:24, 16:30] = 500 + 5 * np.arange(14)
    disparity = np.divide(65535 * 10, depth_mm, where=depth_mm > 0, out=np.zeros_like(depth_mm))
    Image.fromarray(disparity.round().astype(np.uint16)).save(collection / "depth" / f"{number:03d}.png")
    camera = {"q": turn(10.0 * number), "t": [10.0, 0.0, 500.0], "focal_length": FOCAL, "camera_model": "pixel_5"}
    return {"filename": f"{number:03d}.jpg", "image_size": [HEIGHT, WIDTH], "split": "train", "camera": camera}


def write_collection(folder: Path, views: int) -> None:
    (folder / "annotations.json").parent.mkdir(parents=True, exist_ok=True)
    (folder / "annotations.json").write_text(json.dumps([write_view(folder, i) for i in range(views)]))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("b_object", "a_object"):
        write_collection(tmp_path / "navi_v1" / name / "wild_set", 5)
        write_collection(tmp_path / "navi_v1" / name / "multiview_00_pixel_5", 3)
    write_collection(tmp_path / "navi_v1" / "no_wild_set" / "multiview_00_pixel_5", 2)
    return tmp_path


def views(root: Path, split: str = "test", name: str = "navi", side: int = 32):
    return open_dataset(name, split, root, kind="views").at(side)


def test_lists_are_sorted_every_fourth_view_counts_and_objects_without_a_wild_set_are_left_out(root):
    assert views(root).keys == ["a_object/wild_set/000@32", "a_object/wild_set/004@32", "b_object/wild_set/003@32"]
    train = ["a_object/multiview_00_pixel_5/000@32", "b_object/multiview_00_pixel_5/001@32"]
    assert views(root, "train").keys == train
    for name in ("thumb_1.png", "000_small.jpg"):
        (root / "navi_v1" / "a_object" / "wild_set" / "images" / name).write_bytes(b"")
    assert views(root).notes == [
        "left out: 2 images that are no view (a_object/wild_set/images/000_small.jpg), "
        "1 objects without a wild_set or a multiview_* (no_wild_set)",
        "one view in 4 is kept, of 10, as published",
    ]


def test_a_view_has_the_depth_of_the_file_and_is_cut_to_the_object(root):
    view = views(root)[0]
    assert view.image_3HW.dtype == torch.uint8
    assert {tuple(x.shape[1:]) for x in view[:4]} == {(32, 32)}
    z = view.points_3HW[2]
    assert z[z > 0].min() == pytest.approx(0.5, abs=1e-3)
    assert z[z > 0].max() == pytest.approx(0.565, abs=2e-3)
    assert view.depth_1HW[view.depth_1HW > 0].min() == pytest.approx(0.01, abs=1e-4)
    assert view.depth_1HW.max() == pytest.approx(1)
    assert (z > 0).float().mean() > 0.8  # of 16 x 14 pixels only the square around them is left


def test_points_project_onto_the_pixels_they_were_seen_at():
    photograph = Photograph(torch.zeros(3, 40, 60, dtype=torch.uint8), torch.full((1, 40, 60), 2.0), 50.0, torch.eye(4)[:3])
    points = crop_to_object(photograph, 40, file="x").points_3HW
    step = 2.0 / 50 * 39 / 40  # metres of a pixel; the object's last row and column are cut off
    assert (points[0, 20, 21:] - points[0, 20, 20:-1]).mean() == pytest.approx(step, rel=0.05)
    assert points[:2].abs().amax((1, 2)).tolist() == pytest.approx([0.78, 0.78], abs=0.03)


def test_normals_of_a_plane_point_away_from_the_camera():
    flat = normals_of(torch.full((1, 9, 9), 3.0), focal=20.0)
    assert torch.allclose(flat[:, 1:-1, 1:-1], torch.tensor([0.0, 0, 1]).view(3, 1, 1).expand(3, 7, 7), atol=1e-5)
    assert flat[:, 0].abs().sum() == 0


def test_normals_of_a_slanted_plane_have_its_slope():
    focal, slope = 40.0, 0.5  # z = 2 + slope * x, with x = u z / focal from the corner: the reference's principal point
    u = torch.arange(16) + 0.5
    depth = (2 / (1 - slope * u / focal)).expand(1, 16, 16).contiguous()
    wanted = torch.tensor([-slope, 0, 1]) / (1 + slope**2) ** 0.5
    assert torch.allclose(normals_of(depth, focal)[:, 8, 8], wanted, atol=1e-4)


def test_copies_hold_the_pixels_that_are_made_without_them(root, capsys):
    folder = root / "navi_v1" / "a_object" / "wild_set"
    annotation = json.loads((folder / "annotations.json").read_text())[0]
    before = read_photograph(folder, "000", annotation)
    assert main([str(root / "navi_v1")]) == 0
    assert "36 files, 36 copies made" in capsys.readouterr().out
    with Image.open(folder / "images" / f"{COPY}000.jpg") as file:
        assert file.size == (1536, 1024)
    after = read_photograph(folder, "000", annotation)
    assert torch.equal(before.image_3HW, after.image_3HW)
    assert torch.equal(before.depth_1HW, after.depth_1HW)
    assert after.focal == pytest.approx(FOCAL * 1024 / HEIGHT)
    assert main([str(root / "navi_v1")]) == 0
    assert "36 files, 0 copies made" in capsys.readouterr().out


def test_pairs_are_other_views_of_the_collection_and_the_same_every_time(root):
    pairs = open_dataset("navi_pairs", "test", root, kind="view_pairs").at(32)
    assert len(pairs) == 3
    assert pairs.keys == open_dataset("navi_pairs", "test", root, kind="view_pairs").at(32).keys
    first, second = pairs.places[1], pairs.partners[1]
    assert first.object == second.object
    assert first != second
    pair = pairs[1]
    angle = np.degrees(np.arccos((float(pair.pose_34[:, :3].trace()) - 1) / 2))
    assert angle == pytest.approx(10 * abs(int(first.view) - int(second.view)), abs=0.1)


def test_a_relative_pose_moves_points_from_one_camera_to_the_other():
    generator = torch.Generator().manual_seed(0)
    world = torch.randn(5, 3, generator=generator)
    poses = [
        torch.cat([torch.linalg.qr(torch.randn(3, 3, generator=generator)).Q, torch.randn(3, 1, generator=generator)], 1)
        for _ in range(2)
    ]
    first, second = (world @ p[:, :3].T + p[:, 3] for p in poses)
    between = relative_pose(*poses)
    assert torch.allclose(first @ between[:, :3].T + between[:, 3], second, atol=1e-5)


def test_a_set_that_is_not_there_says_what_was_looked_for(tmp_path):
    with pytest.raises(DataError, match=r"navi: .*navi_v1 is missing; expected[\s\S]*annotations.json[\s\S]*NAVI v1 is public"):
        views(tmp_path)
    (tmp_path / "navi_v1" / "empty").mkdir(parents=True)
    with pytest.raises(DataError, match=r"wild_set/images/\*\.jpg is missing"):
        views(tmp_path)


def test_a_split_that_navi_does_not_have(root):
    with pytest.raises(DataError, match=r"navi has no split 'val'; expected train .* or test"):
        views(root, "val")


def test_images_without_depth_or_camera_and_missing_annotations_are_found_at_the_start(root):
    folder = root / "navi_v1" / "a_object" / "wild_set"
    annotations = (folder / "annotations.json").read_text()
    (folder / "annotations.json").write_text(json.dumps(json.loads(annotations)[1:]))
    with pytest.raises(DataError, match=r"annotations.json has no view 000, which is in images/"):
        views(root)
    (folder / "annotations.json").write_text("[{")
    with pytest.raises(DataError, match=r"annotations.json is not a list of views"):
        views(root)
    (folder / "annotations.json").unlink()
    with pytest.raises(DataError, match=r"wild_set/annotations.json is missing"):
        views(root)
    (folder / "annotations.json").write_text(annotations)
    (folder / "depth" / "002.png").unlink()
    with pytest.raises(DataError, match=r"depth/002.png is missing"):
        views(root)


def test_files_that_do_not_fit_are_named(root):
    folder = root / "navi_v1" / "a_object" / "wild_set"
    data = views(root)
    depth = folder / "depth" / "000.png"
    good = depth.read_bytes()
    Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint8)).save(depth)
    with pytest.raises(DataError, match=r"000.png has uint8 pixels .* expected 16-bit gray"):
        data[0]
    Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint16)).save(depth)
    with pytest.raises(DataError, match=r"000.png shows no object in its middle square"):
        data[0]
    Image.fromarray(np.full((HEIGHT, HEIGHT), 900, np.uint16)).save(depth)
    with pytest.raises(DataError, match=r"000.png: the depth is 1024x1024 and its image 1536x1024"):
        data[0]
    depth.write_bytes(good[:40])
    with pytest.raises(DataError, match=r"000.png is damaged"):
        data[0]
    depth.write_bytes(good)
    Image.new("RGB", (HEIGHT, WIDTH)).save(folder / "images" / "000.jpg")
    with pytest.raises(DataError, match=r"000.jpg is 1024x1536 and annotated as 48x32 .*EXIF rotation"):
        data[0]


def test_a_broken_camera_is_named(root):
    path = root / "navi_v1" / "a_object" / "wild_set" / "annotations.json"
    annotations = json.loads(path.read_text())
    annotations[0]["camera"]["q"] = [1, 0]
    path.write_text(json.dumps(annotations))
    with pytest.raises(DataError, match=r"annotations.json: view 000 has a broken camera .* q \(4 numbers\)"):
        views(root)[0]
