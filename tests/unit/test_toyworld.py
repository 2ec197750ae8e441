"""The toy world: scenes are functions of (seed, index), and their ground truth is that of the geometry."""

import dataclasses
import io
import json
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image
from toy_scenes import ToyScenes

from radio_distill.errors import DataError
from radio_distill.toyworld import (
    CLASSES,
    KEYPOINT_NAMES,
    PART_NAMES,
    SEGMENT_NAMES,
    render,
    render_images,
    sample_scene,
    write_toyworld,
)
from radio_distill.toyworld.scene import NUMBERS, SEEN

SAMPLES = [render(3, i, size=64) for i in range(6)]


def world_points(sample):
    """The surface point under every pixel centre, from depth and camera alone: (H, W, 3)."""
    size = sample.depth_HW.shape[0]
    y, x = np.mgrid[:size, :size] + 0.5
    rays = np.stack([(x - size / 2) / (1.6 * size), (y - size / 2) / (1.6 * size), np.ones_like(x)], -1)
    return (rays * sample.depth_HW[..., None]) @ sample.camera.rotation_33 + np.array(sample.camera.position)


def test_a_scene_is_the_same_in_every_process_and_batch():
    alone = render(5, 7, size=48)
    assert np.array_equal(alone.image_HW3, render_images(5, [6, 7], size=48)[1])
    code = "from radio_distill.toyworld import render; import sys; s = render(5, 7, 48)\n"
    code += "sys.stdout.buffer.write(s.image_HW3.tobytes() + s.depth_HW.tobytes())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    assert other == alone.image_HW3.tobytes() + alone.depth_HW.tobytes()


def test_seeds_and_indices_give_different_scenes():
    assert len({sample_scene(seed, index) for seed in range(3) for index in range(20)}) == 60


def test_every_class_is_the_subject_about_equally_often():
    counts = np.bincount([sample_scene(0, i).label for i in range(1000)], minlength=len(CLASSES))
    assert counts.min() > 60  # 100 expected, standard deviation 9.5


def test_maps_agree_with_each_other():
    for s in SAMPLES:
        labels = np.array([o.label for o in s.scene.objects])
        thing = s.instances_HW > 0
        names = np.array(SEGMENT_NAMES)[s.segmentation_HW]
        assert (names[thing] == np.array(CLASSES)[labels[s.instances_HW[thing].astype(int) - 1]]).all()
        assert set(names[~thing]) <= {"background", s.scene.ground}
        assert ((s.parts_HW > 0) == thing).all()
        assert all(PART_NAMES[p].startswith(n + " ") for p, n in set(zip(s.parts_HW[thing], names[thing])))
        assert (s.saliency_HW == (s.instances_HW == 1)).all()
        assert ((s.depth_HW > 0) == (names != "background")).all()
        assert s.label == labels[0]
        assert s.saliency_HW.mean() > 0.005


def test_every_class_shows_at_least_two_parts():
    assert all(sum(p.startswith(f"{c} ") for p in PART_NAMES) >= 2 for c in CLASSES)


def test_normals_are_unit_vectors_that_face_the_camera():
    for s in SAMPLES:
        seen = s.depth_HW > 0
        assert np.abs(np.linalg.norm(s.normals_HW3[seen], axis=-1) - 1).max() < 1e-5
        assert not s.normals_HW3[~seen].any()
        size = len(s.depth_HW)
        y, x = np.mgrid[:size, :size] + 0.5
        rays = np.stack([(x - size / 2) / (1.6 * size), (y - size / 2) / (1.6 * size), np.ones_like(x)], -1)
        assert (s.normals_HW3 * rays).sum(-1)[seen].max() < 1e-3


def test_ground_pixels_lie_on_the_ground_plane_with_its_normal():
    for s in SAMPLES:
        ground = (s.instances_HW == 0) & (s.depth_HW > 0)
        assert np.abs(world_points(s)[ground][:, 2]).max() < 1e-3  # float32 at depths up to 40
        up = s.normals_HW3[ground] @ s.camera.rotation_33
        assert np.abs(up - [0, 0, 1]).max() < 1e-5


def test_normals_are_perpendicular_to_the_surface_that_depth_describes():
    s = render(3, 2, size=128)
    points, normals = world_points(s), s.normals_HW3 @ s.camera.rotation_33
    same = s.parts_HW[:, 1:] == s.parts_HW[:, :-1]
    flat = same & (np.abs(normals[:, 1:] - normals[:, :-1]).max(-1) < 1e-6) & (s.instances_HW[:, 1:] > 0)
    step = points[:, 1:] - points[:, :-1]
    height = np.abs((step * normals[:, 1:]).sum(-1))[flat]
    assert flat.sum() > 50
    assert np.median(height) < 1e-5
    assert np.quantile(height, 0.95) < 1e-3  # two parallel faces of one part may still lie behind each other


def test_a_keypoint_visible_in_both_views_is_one_point_of_space():
    pairs = 0
    for index in range(6):
        views = [render(3, index, size=128, view=v) for v in (0, 1)]
        first, second = (v.keypoints for v in views)
        assert first.names == second.names
        assert set(first.names) <= set(KEYPOINT_NAMES)
        assert np.array_equal(first.points_K3, second.points_K3)
        for k in np.flatnonzero(first.visible_K & second.visible_K):
            found = []
            for view in views:
                x, y = view.keypoints.pixels_K2[k]
                # The depth map at the pixel that holds the keypoint, or a neighbour where the point is on an edge.
                patch = world_points(view)[max(0, int(y) - 1) : int(y) + 2, max(0, int(x) - 1) : int(x) + 2].reshape(-1, 3)
                found.append(np.linalg.norm(patch - first.points_K3[k], axis=1).min())
            assert max(found) < 0.12, (index, first.names[k], found)
            pairs += 1
    assert pairs > 15


def test_a_hidden_keypoint_has_a_surface_in_front_of_it():
    s = render(3, 1, size=128)
    x, y = s.keypoints.pixels_K2.astype(int).T
    inside = (x >= 0) & (y >= 0) & (x < 128) & (y < 128)
    hidden = inside & ~s.keypoints.visible_K
    assert hidden.any()
    assert (s.depth_HW[y[hidden], x[hidden]] < s.keypoints.depth_K[hidden]).mean() > 0.8  # the rest lies beside an edge


def test_captions_and_questions_speak_of_the_scene():
    for s in SAMPLES:
        assert all(o.name in s.caption for o in s.scene.objects)
        answers = dict(s.questions)
        subject = s.scene.objects[0]
        assert answers[f"what color is the {subject.name}?"] == subject.colour
        assert answers["what is on the ground?"] == s.scene.ground
        sizes = [(s.instances_HW == n).sum() / s.instances_HW.size for n in range(1, 1 + len(s.scene.objects))]
        if all(share == 0 or share >= SEEN for share in sizes):
            assert answers["how many objects are there?"] == NUMBERS[sum(share > 0 for share in sizes)]
        else:
            assert "how many objects are there?" not in answers
        for number, (other, share) in enumerate(zip(s.scene.objects[1:], sizes[1:]), 2):
            columns = [np.nonzero(s.instances_HW == n)[1] for n in (1, number)]
            asked = answers.get(f"is the {other.name} left or right of the {subject.name}?")
            if share < SEEN:
                assert asked is None
            elif abs(columns[1].mean() - columns[0].mean()) > 6:
                assert asked == ("left" if columns[1].mean() < columns[0].mean() else "right")


def test_a_batch_holds_what_single_samples_hold():
    scenes = ToyScenes.render(3, range(3), size=64)
    for i in range(3):
        assert scenes.labels_B[i] == SAMPLES[i].label
        assert np.array_equal(scenes.images_BHW3[i], SAMPLES[i].image_HW3)
        assert np.array_equal(scenes.parts_BHW[i], SAMPLES[i].parts_HW)
        assert np.abs(scenes.normals_BHW3[i] - SAMPLES[i].normals_HW3).max() < 1e-3  # float16
    assert len(dataclasses.fields(scenes)) == 9


def test_shards_hold_every_sample_once_and_are_the_same_bytes_every_time(tmp_path):
    for name in ("a", "b"):
        write_toyworld(tmp_path / name, count=5, size=32, seed=3, shards=2, dense=True)
    files = {}
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
        with tarfile.open(path) as tar:
            files |= {m.name: tar.extractfile(m).read() for m in tar.getmembers()}
    assert sorted({n.split(".")[0] for n in files}) == [f"{i:08d}" for i in range(5)]
    sample = render(3, 4, 32)
    assert files["00000004.txt"].decode() == sample.caption
    assert int(files["00000004.cls"]) == sample.label
    assert Image.open(io.BytesIO(files["00000004.jpg"])).size == (32, 32)
    assert np.array_equal(np.load(io.BytesIO(files["00000004.npz"]))["parts"], sample.parts_HW)
    assert len(json.loads(files["00000004.json"])["keypoints"]) == len(sample.keypoints.names)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_an_existing_folder_is_not_overwritten(tmp_path):
    with pytest.raises(DataError, match=r"exists and is not overwritten; choose another folder"):
        write_toyworld(tmp_path, count=4, size=32, seed=0, shards=1)


def test_more_shards_than_scenes_is_an_error(tmp_path):
    with pytest.raises(DataError, match="2 scenes cannot fill 3 shards; expected 1 to 2 shards"):
        write_toyworld(tmp_path / "x", count=2, size=32, seed=0, shards=3)
