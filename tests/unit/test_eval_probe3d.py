"""The probe3d suite: heads, inner blocks, oracles that must score everything, and what goes wrong."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from radio_distill.config.load import load_card
from radio_distill.errors import DataError
from radio_distill.eval.blocks import _indices, with_blocks
from radio_distill.eval.datasets.base import Subset
from radio_distill.eval.datasets.object_views import KeypointPair, KeypointPairs, ObjectView, Sized, SquareImage, ViewPair
from radio_distill.eval.datasets.toy import ToyKeypointPairs, ToyPairs, ToySquares, ToyViews
from radio_distill.eval.encode import Fit
from radio_distill.eval.features import FeatureCache
from radio_distill.eval.models import NamedModel, open_model
from radio_distill.eval.probes.surfaces import DepthProbe, Dpt, LinearHead, NormalsProbe, SurfaceItem
from radio_distill.eval.suites import load_suite
from radio_distill.eval.task import Context
from radio_distill.eval.tasks import surfaces
from radio_distill.eval.tasks.matching import Correspondence, Keypoints
from radio_distill.eval.tasks.surfaces import Depth, Normals
from radio_distill.teachers.base import load_teacher
from radio_distill.types import VisionOutput


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context("toy", torch.device("cpu"), FeatureCache(tmp_path / "features"), pictures=tmp_path / "pictures")


def scores(task, opened: NamedModel, context: Context) -> dict[str, float]:
    return {s.metric: s.value for s in task.run(opened, context)}


class Looked:
    """A model that knows every image: `know` says which map belongs to it."""

    patch_size = 1

    def __init__(self) -> None:
        self.maps: dict[int, torch.Tensor] = {}

    def know(self, image_3HW: torch.Tensor, map_CHW: torch.Tensor) -> None:
        self.maps[hash(image_3HW.numpy().tobytes())] = map_CHW

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        return height, width

    def encode(self, images_B3HW: torch.Tensor) -> VisionOutput:
        pixels = (images_B3HW * 255).round().byte()
        return VisionOutput(None, torch.stack([self.maps[hash(x.numpy().tobytes())] for x in pixels]))

    def opened(self) -> NamedModel:
        return NamedModel("oracle", self, {}, dict)


# Heads


@pytest.mark.parametrize("version", ["2024", "2025"])
def test_a_dpt_gives_sixteen_times_the_cells_and_depth_within_its_bins(version):
    probe = DepthProbe(lambda out: Dpt(5, out, hidden=6, version=version), version)
    features = torch.randn(2, 20, 3, 4)
    assert Dpt(5, 4, hidden=6, version=version)(features).shape == (2, 4, 48, 64)
    depth = probe(features, (30, 40))
    assert depth.shape == (2, 1, 30, 40)
    assert depth.min() > 0.001
    assert depth.max() < 1


def test_the_dpt_of_2024_is_its_formula():
    torch.manual_seed(0)
    head = Dpt(5, 7, hidden=6)
    features = torch.randn(1, 20, 3, 3)
    levels = [F.interpolate(p(x), scale_factor=2) for p, x in zip(head.project, features.split(5, dim=1))]

    def unit(block, x):
        first, second = block.convolutions[0], block.convolutions[2]
        return x + second(first(x).relu()).relu()

    x = unit(head.fuse[3], levels[3])
    for i in (2, 1, 0):
        x = unit(head.fuse[i], unit(head.skips[i], levels[i]) + x)
    x = head.out[2](head.out[0](F.interpolate(x, scale_factor=4)).relu())
    wanted = F.interpolate(x, scale_factor=2)
    assert torch.allclose(head(features), wanted, atol=1e-6)
    weights = wanted.relu() + 0.1  # bins are read before the last enlargement, which must change nothing
    assert torch.allclose(head(features, lambda y: y.relu() + 0.1), weights, atol=1e-6)


def test_depth_is_the_expectation_over_256_even_bins():
    probe = DepthProbe(lambda out: LinearHead(3, out), "2024")
    torch.nn.init.zeros_(probe.head.out.weight)
    torch.nn.init.zeros_(probe.head.out.bias)
    assert torch.allclose(probe(torch.randn(1, 3, 2, 2), (5, 5)), torch.tensor(0.5005))
    torch.nn.init.constant_(probe.head.out.bias[-1:], 1e6)
    assert probe(torch.randn(1, 3, 2, 2), (5, 5)).min().item() == pytest.approx(1.0, abs=1e-3)


def test_versions_differ_in_corners_alone():
    torch.manual_seed(0)
    old = NormalsProbe(lambda out: LinearHead(3, out, version="2024"), "2024")
    mended = NormalsProbe(lambda out: LinearHead(3, out, version="2025"), "2025")
    mended.load_state_dict(old.state_dict())
    x = torch.randn(1, 3, 4, 4)
    assert old(x, (16, 16)).shape == mended(x, (16, 16)).shape == (1, 4, 16, 16)
    assert not torch.allclose(old(x, (16, 16)), mended(x, (16, 16)), atol=1e-3)


def test_jitter_of_the_reference_loses_what_is_darker_than_the_mean():
    image = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, 16, 16).contiguous()
    view = ObjectView(
        image, torch.ones(1, 16, 16), torch.ones(3, 16, 16), torch.ones(3, 16, 16), torch.eye(3), torch.eye(4)[:3]
    )
    fit = Fit("exact", (16, 16), (1, 1), fixed=False)
    draws = {
        kind: [SurfaceItem(fit, kind)(view, np.random.default_rng(i)).image_3HW for i in range(20)]
        for kind in ("clamped", "plain", "none")
    }
    assert all(torch.equal(x, image) for x in draws["none"])
    same = sum(torch.equal(x, image) for x in draws["clamped"])
    assert 0 < same < 10  # 20 %
    changed = [x for x in draws["clamped"] if not torch.equal(x, image)]
    assert min(int(x.min()) for x in changed) >= round(0.406 * 255)
    assert max(int(x.max()) for x in changed) <= round(0.714 * 255)
    assert min(int(x.min()) for x in draws["plain"]) < 60


# Inner blocks


def test_blocks_are_the_last_of_every_quarter():
    assert _indices(24) == [5, 11, 17, 23]
    assert _indices(12) == [2, 5, 8, 11]
    assert _indices(4) == [0, 1, 2, 3]
    assert _indices(3) == [0, 0, 1, 2]


@pytest.mark.parametrize("name", ["teacher:toy_dino", "teacher:toy_siglip", "timm:vit_tiny_patch16_224?weights=random"])
def test_the_last_of_four_blocks_is_the_models_own_map(name):
    opened = open_model(name)
    images = torch.rand(2, 3, 80, 64)
    own = opened.model.encode(images).features_BCHW
    blocks = with_blocks(opened)
    maps = blocks.model.encode(images).features_BCHW
    assert maps.shape[1] == 4 * own.shape[1]
    assert torch.allclose(maps[:, -own.shape[1] :], own, atol=1e-5)
    assert not torch.allclose(maps[:, : own.shape[1]], own, atol=1e-2)
    assert blocks.id != opened.id


def test_a_student_gives_its_blocks_through_the_final_norm():
    from radio_distill.network.arch import StudentArch, TrunkArch
    from radio_distill.network.student import Student

    torch.manual_seed(0)
    trunk = TrunkArch("toy", embed_dim=16, depth=8, num_heads=2, mlp_hidden=32, patch_size=8)
    student = Student(StudentArch(trunk=trunk, adaptors=(), summary_idxs=(0,))).eval()
    images = torch.rand(1, 3, 32, 48)
    maps = with_blocks(NamedModel("student", student, {}, student.state_dict)).model.encode(images).features_BCHW
    assert maps.shape == (1, 64, 4, 6)
    assert torch.allclose(maps[:, 48:], student.encode(images).features_BCHW, atol=1e-5)


def test_a_model_whose_blocks_cannot_be_reached_is_told_what_to_do():
    with pytest.raises(DataError, match=r"inner blocks of oracle \(Looked\) cannot be reached.*head: linear.*encode_blocks"):
        with_blocks(Looked().opened())


def test_toy_blocks_are_those_that_the_network_runs():
    net = load_teacher(load_card("toy_sam")).net
    x = torch.rand(1, 3, 192, 192)
    tokens = net.tokens(net.embed(x))
    *_, last = net.block_outputs(tokens, (24, 24))
    assert torch.equal(net.norm(last), net.mix(tokens, (24, 24)))


# Oracles


def test_predicted_truth_scores_100(context, monkeypatch):
    shared = {"dataset": "navi", "resolution": 48, "test_images": 4}
    tasks = [Depth(kind="probe3d_depth", **shared), Normals(kind="probe3d_normals", **shared)]
    monkeypatch.setattr(Depth, "fit_probe", lambda *_: None)
    monkeypatch.setattr(Normals, "fit_probe", lambda *_: None)
    monkeypatch.setattr(surfaces, "with_blocks", lambda opened: opened)
    monkeypatch.setattr(Depth, "predictions", lambda s, p, o, test, c: ((v, 3 * v.depth_1HW[None] + 1) for v in test))
    monkeypatch.setattr(Normals, "predictions", lambda s, p, o, test, c: ((v, 7 * v.normals_3HW[None]) for v in test))
    depth, normals = (scores(task, Looked().opened(), context) for task in tasks)
    assert depth["score"] == pytest.approx(100)
    assert depth["si_rmse"] == pytest.approx(0, abs=1e-5)
    assert depth["sa_d1"] < 0.1  # the scale is wrong
    assert normals["score"] == pytest.approx(100)
    assert normals["rmse"] == pytest.approx(0, abs=0.1)
    assert len(list((context.pictures or Path()).glob("*.png"))) == 2


class Pairs(Sized[ViewPair]):
    """Real pairs of the toy world, or every view with itself."""

    name, split = "toyworld", "test"

    def __init__(self, same: bool) -> None:
        self.same = same
        self.real = ToyPairs("test").at(64)

    @property
    def keys(self):
        return self.real.keys[:4]

    def files(self, index: int):
        return ()

    def __getitem__(self, index: int) -> ViewPair:
        pair = self.real[index]
        return ViewPair(pair.first, pair.first, torch.eye(4)[:3]) if self.same else pair


@pytest.mark.parametrize(("same", "least"), [(True, 100.0), (False, 85.0)])
def test_features_that_are_places_in_the_world_find_all_correspondences(context, monkeypatch, same, least):
    pairs, oracle = Pairs(same), Looked()
    for pair in (pairs[i] for i in range(len(pairs))):
        for view in (pair.first, pair.second):
            rotation, shift = view.pose_34[:, :3], view.pose_34[:, 3]
            world = torch.einsum("ji,jhw->ihw", rotation, view.points_3HW - shift[:, None, None])
            oracle.know(view.image_3HW, torch.cat([world, 0.3 * torch.ones_like(world[:1]), (world**2).sum(0, keepdim=True)]))
    monkeypatch.setattr(Correspondence, "datasets", lambda *_: [pairs])
    task = Correspondence(kind="correspondence", dataset="navi_pairs", resolution=64, every=1, matches=60)
    found = scores(task, oracle.opened(), context)
    assert found["score"] >= least
    assert found["recall@0.05m"] >= least


class SameImage(KeypointPairs):
    """Every scene with itself."""

    name, split, side = "toyworld", "test", 64

    def __init__(self) -> None:
        self.real = ToyKeypointPairs("test").at(64)

    @property
    def keys(self):
        return [f"{i}" for i in range(6)]

    def files(self, index: int):
        return ()

    @property
    def images(self):
        return ToySquares("test").at(64)

    def __getitem__(self, index: int) -> KeypointPair:
        pair = self.real[index]
        return pair._replace(second=pair.first, keypoints_second_K3=pair.keypoints_first_K3)


def test_features_that_tell_every_place_apart_find_all_keypoints(context, monkeypatch):
    pairs, oracle = SameImage(), Looked()
    every_cell = torch.eye(32 * 32).view(-1, 32, 32)
    images: list[SquareImage] = [pairs.images[pairs[i].first] for i in range(len(pairs))]
    for image in images:
        oracle.know(image.image_3HW, every_cell)
    monkeypatch.setattr(Keypoints, "datasets", lambda *_: [pairs])
    found = scores(Keypoints(kind="keypoints", dataset="spair71k", resolution=64, threshold=0.25), oracle.opened(), context)
    assert found["pck"] == 100
    assert {name for name in found if name.startswith("pck_view")} <= {"pck_view_0", "pck_view_1", "pck_view_2"}


# Runs


@pytest.mark.parametrize(("kind", "head", "version"), [(Depth, "linear", "2025"), (Normals, "dpt", "2024")])
def test_a_probe_is_trained_and_scored_on_generated_scenes(context, kind, head, version):
    task = kind(
        kind=kind.model_fields["kind"].annotation.__args__[0],
        dataset="navi", head=head, version=version, resolution=40, hidden=4, batch=2, epochs=1, warmup_epochs=0.5,
        train_images=4, test_images=2,
    )  # fmt: skip
    opened = open_model("teacher:toy_dino")
    found = scores(task, opened, context)
    assert found == scores(task, opened, context)  # the same again
    assert 0 <= found["score"] <= 100
    assert task.passes(context) == 6


def test_views_of_the_toy_world_have_one_object_with_depth_and_normals():
    view = ToyViews("test").at(64)[0]
    valid = view.depth_1HW > 0
    assert 0.1 < valid.float().mean() < 1
    lengths = view.normals_3HW.norm(dim=0, keepdim=True)
    assert torch.allclose(lengths[valid], torch.ones(()), atol=1e-4)
    assert lengths[~valid].max() == 0


def test_pairs_with_too_few_points_are_named(context):
    task = Correspondence(kind="correspondence", dataset="navi_pairs", resolution=32, every=8, pairs=1)
    message = (
        r"1 of 1 images of toyworld/val cannot be used: 72000/0@32: too few correspondences: the views have \d+ and \d+ points"
    )
    with pytest.raises(DataError, match=message):
        scores(task, open_model("teacher:toy_dino"), context)


def test_the_card_names_the_tasks_of_table_4_and_has_the_protocols_numbers():
    tasks = load_suite("probe3d").tasks
    assert set(tasks) == {
        "probe3d_depth", "probe3d_surface_normals", "probe3d_correspondence", "spair71k", "navi_depth_linear",
    }  # fmt: skip
    depth = tasks["probe3d_depth"]
    assert isinstance(depth, Depth)
    assert (depth.version, depth.resolution, depth.batch, depth.epochs, depth.lr) == ("2024", 512, 8, 10, 5e-4)
    assert depth.jitter == "clamped"
    assert not depth.shuffle


def test_a_limit_counts_pairs_and_keeps_their_images(context):
    task = Keypoints(kind="keypoints", dataset="spair71k", resolution=64, pairs=3)
    (pairs,) = task.datasets(context)
    assert isinstance(pairs, Subset)
    assert len(pairs) == 3
    assert 3 < task.passes(context) <= 6
