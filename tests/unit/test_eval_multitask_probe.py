"""The multi-task probe: its views, losses and scores against closed forms, an oracle, and a whole small run."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from radio_distill.errors import DataError
from radio_distill.eval.datasets import open_dataset
from radio_distill.eval.datasets.multitask import MultitaskSample
from radio_distill.eval.features import FeatureCache
from radio_distill.eval.metrics.mlore import balanced_bce
from radio_distill.eval.models import open_model
from radio_distill.eval.probes.multitask import MultitaskAugment, losses, pad
from radio_distill.eval.probes.pictures import MultitaskPictures
from radio_distill.eval.published import tasks as published
from radio_distill.eval.suites import load_suite
from radio_distill.eval.task import Context
from radio_distill.eval.tasks.multitask import MultitaskProbe

ALL = {"semseg": 1.0, "parsing": 2.0, "saliency": 5.0, "normals": 10.0, "depth": 1.0, "edge": 50.0}


def context(tmp_path: Path, **changes: object) -> Context:
    return Context(root="toy", device=torch.device("cpu"), cache=FeatureCache(tmp_path / "cache"), **changes)  # type: ignore[arg-type]


def probe(**changes: object) -> MultitaskProbe:
    fields = {"kind": "multitask", "dataset": "nyudv2", "targets": ALL, "edge_weight": 0.9, "canvas": (64, 64), "input": 42}
    return MultitaskProbe.model_validate({**fields, "steps": 2, "lr": 1e-3, **changes})


@pytest.fixture(scope="module")
def sample() -> MultitaskSample:
    return open_dataset("nyudv2", "val", "toy", kind="multitask")[0]


def oracle(sample: MultitaskSample) -> dict[str, torch.Tensor]:
    """Raw outputs of heads that know the truth."""
    certain = 60.0
    classes = {"semseg": 14, "parsing": 35, "saliency": 2}
    outputs = {n: certain * F.one_hot(sample.targets[n][0].long() % 255, k).permute(2, 0, 1)[None] for n, k in classes.items()}
    edge = certain * (2 * sample.targets["edge"].float() - 1)
    return {
        **outputs,
        "normals": 3 * sample.targets["normals"][None],
        "depth": sample.targets["depth"][None],
        "edge": edge[None],
    }


def test_an_oracle_scores_100_percent_and_no_error(tmp_path: Path) -> None:
    task, shared = probe(), context(tmp_path, limit=6, pictures=tmp_path)
    test, _ = task.datasets(shared)
    seen = [pad(test[i], (200, 196)) for i in range(len(test))]
    pictures = MultitaskPictures(shared, "oracle", {"semseg": 14, "edge": 1})
    scores = {s.metric: s.value for s in task.score([(s, oracle(s)) for s in seen], test, pictures)}
    for metric in ("semseg_miou_strict", "parsing_miou_strict", "saliency_maxf", "saliency_maxf_strict"):
        assert scores[metric] == pytest.approx(100), metric
    assert scores["depth_rmse"] == pytest.approx(0, abs=1e-6)
    assert scores["normals_mean_deg"] == pytest.approx(0, abs=0.1)  # acos near 1 in fp32 targets
    assert scores["edge_loss_strict"] == pytest.approx(0, abs=1e-6)
    edges = np.mean([s.targets["edge"][s.targets["edge"] != 255].float().mean() for s in seen])
    floor = 0.9 * edges * math.log1p(math.exp(-1)) + 0.1 * (1 - edges) * math.log(2)
    assert scores["edge_loss"] == pytest.approx(floor, rel=1e-4)  # the probability is taken as a logit once more


def test_a_run_on_the_toy_world_gives_every_number_of_the_paper_and_a_picture(tmp_path: Path) -> None:
    shared = context(tmp_path, limit=3, pictures=tmp_path)
    scores = {s.metric: s for s in probe(batch=2).run(open_model("teacher:toy_clip"), shared)}
    columns = [name for name, task in published().items() if task.group in ("pascal_context", "nyudv2")]
    assert {f"pascal_{m}" for m in scores} | {f"nyud_{m}" for m in scores} >= set(columns)
    for name in columns:
        metric = name.split("_", 1)[1]
        assert scores[metric].headline
        assert scores[metric].higher_is_better == published()[name].higher_is_better
    assert not scores["edge_loss"].headline
    assert all(math.isfinite(s.value) for s in scores.values())
    assert (tmp_path / "nyudv2_teacher_toy_clip.png").is_file()


@pytest.mark.parametrize("suite", ["pascal_context", "nyudv2"])
@pytest.mark.parametrize("preset", ["paper", "fast", "smoke"])
def test_cards_hold_the_protocol_in_every_preset(suite: str, preset: str) -> None:
    (task,) = load_suite(suite, preset).tasks.values()
    assert isinstance(task, MultitaskProbe)
    if preset == "paper":
        assert (task.steps, task.batch, task.max_norm, task.weight_decay) == (40_000, 4, 10, 1e-6)
        assert (task.lr, task.edge_weight) == ((2e-5, 0.925) if suite == "pascal_context" else (1e-5, 0.88))


def test_views_have_the_size_of_the_canvas_and_depth_shrinks_as_things_grow(sample: MultitaskSample) -> None:
    flat = MultitaskSample(sample.image_3HW, {**sample.targets, "depth": torch.full((1, 192, 192), 6.0)})
    for scale in (0.5, 2.0):
        view = MultitaskAugment((160, 130), (scale, scale))(flat, np.random.default_rng(0))
        assert {tuple(x.shape[-2:]) for x in (view.image_3HW, *view.targets.values())} == {(160, 130)}
        depths = set(view.targets["depth"].unique().tolist()) - {0.0}
        assert depths == {6.0 / scale}
    assert view.image_3HW.dtype == torch.uint8


def test_a_flip_mirrors_everything_and_turns_the_x_of_normals(sample: MultitaskSample) -> None:
    views = [MultitaskAugment((192, 192), (1.0, 1.0))(sample, np.random.default_rng(i)) for i in range(8)]
    flipped = [v for v in views if not torch.equal(v.targets["semseg"], sample.targets["semseg"])]
    assert 0 < len(flipped) < 8
    for view in flipped:
        assert torch.equal(view.targets["semseg"], sample.targets["semseg"].flip(-1))
        assert torch.equal(view.targets["normals"][0], -sample.targets["normals"][0].flip(-1))
        assert torch.equal(view.targets["normals"][1:], sample.targets["normals"][1:].flip(-1))


def test_crops_avoid_more_than_three_quarters_of_one_class() -> None:
    semseg = torch.zeros(1, 40, 400, dtype=torch.uint8)
    semseg[..., 180:220] = 1  # one crop in ten shows both classes
    image = torch.zeros(3, 40, 400, dtype=torch.uint8)
    augment = MultitaskAugment((40, 40), (1.0, 1.0))
    shares = [
        augment(MultitaskSample(image, {"semseg": semseg}), np.random.default_rng(i)).targets["semseg"].float().mean()
        for i in range(40)
    ]
    assert sum(0.25 < s < 0.75 for s in shares) > 8  # a plain crop: 2


def test_padding_is_in_the_middle_and_not_annotated(sample: MultitaskSample) -> None:
    padded = pad(sample, (196, 100))  # 192 wide already
    assert tuple(padded.image_3HW.shape) == (3, 196, 192)
    assert torch.equal(padded.image_3HW[:, 2:-2], sample.image_3HW)
    assert padded.image_3HW[:, 0, 0].tolist() == [124, 116, 104]
    assert (padded.targets["semseg"][:, :2] == 255).all()
    assert (padded.targets["normals"][:, -2:] == 0).all()


def test_losses_are_those_of_the_harness() -> None:
    torch.manual_seed(0)
    outputs = {"semseg": 3, "parsing": 3, "saliency": 2, "normals": 3, "depth": 1, "edge": 1}
    raw = {name: torch.randn(2, k, 4, 5) for name, k in outputs.items()}
    labels = {name: torch.randint(0, k, (2, 1, 4, 5)).byte() for name, k in (("semseg", 3), ("saliency", 2), ("edge", 2))}
    for label in labels.values():
        label[0, 0, 0, 0] = 255
    parsing = torch.zeros(2, 1, 4, 5, dtype=torch.uint8)
    parsing[1, 0, 2] = 2
    normals = F.normalize(torch.randn(2, 3, 4, 5), dim=1)
    normals[:, :, 1] = 0
    depth = torch.rand(2, 1, 4, 5) * (torch.rand(2, 1, 4, 5) > 0.3)
    got = losses(raw, {**labels, "parsing": parsing, "normals": normals, "depth": depth}, edge_weight=0.8)

    assert got["semseg"].item() == pytest.approx(
        F.cross_entropy(raw["semseg"], labels["semseg"][:, 0].long(), ignore_index=255).item()
    )
    assert got["parsing"].item() == pytest.approx(F.cross_entropy(raw["parsing"][1:], parsing[1:, 0].long()).item())
    log_p, positive, total, count = raw["saliency"].log_softmax(1), 0, 0.0, 0
    cells = [(b, y, x) for b in range(2) for y in range(4) for x in range(5) if labels["saliency"][b, 0, y, x] != 255]
    positive = sum(int(labels["saliency"][b, 0, y, x]) for b, y, x in cells)
    for b, y, x in cells:
        label, count = int(labels["saliency"][b, 0, y, x]), count + 1
        share = positive / len(cells)
        total -= (1 - share if label else share) * log_p[b, label, y, x].item()
    assert got["saliency"].item() == pytest.approx(total / count, rel=1e-5)
    unit = F.normalize(raw["normals"], dim=1)
    assert got["normals"].item() == pytest.approx((unit - normals).abs().sum(1)[:, [0, 2, 3]].mean().item(), rel=1e-5)
    assert got["depth"].item() == pytest.approx((raw["depth"] - depth).abs()[depth > 0].mean().item(), rel=1e-5)
    assert got["edge"].item() == pytest.approx(balanced_bce(raw["edge"], labels["edge"], positive_weight=0.8).item())


def test_nothing_annotated_is_a_loss_of_zero_with_zero_gradients() -> None:
    outputs = {"semseg": 3, "parsing": 3, "saliency": 2, "normals": 3, "depth": 1, "edge": 1}
    raw = {name: torch.randn(1, k, 4, 4, requires_grad=True) for name, k in outputs.items()}
    empty = {"normals": torch.zeros(1, 3, 4, 4), "depth": torch.zeros(1, 1, 4, 4)}
    targets = {n: empty.get(n, torch.full((1, 1, 4, 4), 255, dtype=torch.uint8)) for n in outputs}
    for name, loss in losses(raw, targets, edge_weight=0.9).items():
        loss.backward()
        assert loss.item() == 0, name
        assert not raw[name].grad.any(), name  # type: ignore[union-attr]


def test_unknown_and_lacking_kinds_of_annotation_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="unknown kind of annotation 'boundary', expected some of semseg"):
        probe(targets={"boundary": 1.0})
    lists = tmp_path / "NYUDv2" / "gt_sets"
    for folder in ("images", "segmentation", "normals", "edge"):
        (tmp_path / "NYUDv2" / folder).mkdir(parents=True)
        (tmp_path / "NYUDv2" / folder / "1.png").touch()
    (tmp_path / "NYUDv2" / "depth").mkdir()
    (tmp_path / "NYUDv2" / "depth" / "1.npy").touch()
    lists.mkdir()
    for split in ("train", "val"):
        (lists / f"{split}.txt").write_text("1\n")
    shared = Context(root=tmp_path, device=torch.device("cpu"), cache=FeatureCache(tmp_path / "cache"))
    with pytest.raises(DataError, match="nyudv2 has no parsing, only semseg, depth, normals, edge"):
        probe().datasets(shared)
