"""The detector's parts against other implementations and closed forms; the task end to end with an oracle."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.ops import generalized_box_iou
from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

from radio_distill.eval.datasets.base import open_dataset
from radio_distill.eval.detection.boxes import from_corners, giou, inverse_sigmoid, to_corners
from radio_distill.eval.detection.data import Jitter, Whole
from radio_distill.eval.detection.denoising import Denoising, Truth
from radio_distill.eval.detection.detector import Architecture, Detections, Detector, SimplePyramid, Stage
from radio_distill.eval.detection.loss import Weights, detection_loss, match
from radio_distill.eval.detection.transformer import DeformableAttention, sample_levels
from radio_distill.eval.features import FeatureCache
from radio_distill.eval.models import open_model
from radio_distill.eval.task import Context
from radio_distill.eval.tasks.detection import Detection

SMALL = Architecture(32, 4, 64, 2, 1, 2, 10, (2.0, 1.0, 0.5))
ONE = Weights(1.0, 5.0, 2.0)


def truth(*counts: int, seed: int = 0) -> list[Truth]:
    rng = torch.Generator().manual_seed(seed)
    return [Truth(torch.randint(5, (n,), generator=rng), torch.rand(n, 4, generator=rng) * 0.3 + 0.3) for n in counts]


def test_generalised_iou_is_torchvisions() -> None:
    a, b = to_corners(truth(6)[0].boxes_N4), to_corners(truth(4, seed=1)[0].boxes_N4)
    torch.testing.assert_close(giou(a[:, None], b[None]), generalized_box_iou(a, b))
    torch.testing.assert_close(to_corners(from_corners(a)), a)
    torch.testing.assert_close(inverse_sigmoid(a).sigmoid(), a.clamp(1e-3, 1 - 1e-3))


def test_sampling_of_levels_is_transformers() -> None:
    sizes = [(6, 5), (3, 4)]
    rng = torch.Generator().manual_seed(0)
    value = torch.randn(2, 42, 3, 8, generator=rng)
    places = torch.rand(2, 7, 3, 2, 4, 2, generator=rng) * 1.4 - 0.2
    weights = torch.rand(2, 7, 3, 2, 4, generator=rng)
    want = MultiScaleDeformableAttention()(value, torch.tensor(sizes), sizes, None, places, weights, 64)
    torch.testing.assert_close(sample_levels(value, sizes, places, weights), want, atol=1e-5, rtol=1e-5)


def test_attention_at_the_start_looks_around_its_reference() -> None:
    torch.manual_seed(0)
    layer = DeformableAttention(8, 4, 1, 1)
    for linear in (layer.value, layer.out):
        torch.nn.init.eye_(linear.weight)
    memory = torch.arange(25.0).view(1, 25, 1).expand(1, 25, 8)  # cell (row, column) holds 5 row + column
    got = layer(torch.zeros(1, 1, 8), torch.full((1, 1, 2), 0.5), memory, [(5, 5)])
    want = torch.tensor([13.0, 17.0, 11.0, 7.0]).repeat_interleave(2)  # right, below, left, above of cell (2, 2)
    torch.testing.assert_close(got[0, 0], want, atol=1e-4, rtol=0)


def test_the_pyramid_has_a_level_per_factor_and_a_pooled_one() -> None:
    maps = SimplePyramid(12, 8, (4.0, 2.0, 1.0, 0.5))(torch.randn(2, 12, 6, 4))
    assert [tuple(m.shape) for m in maps] == [(2, 8, 24, 16), (2, 8, 12, 8), (2, 8, 6, 4), (2, 8, 3, 2), (2, 8, 2, 1)]
    assert torch.equal(maps[-1], maps[-2][:, :, ::2, ::2])
    with pytest.raises(ValueError, match=r"pyramid factor 3, expected 4, 2, 1 or 0\.5"):
        SimplePyramid(12, 8, (3,))


def test_matching_finds_the_queries_that_lie_on_the_objects() -> None:
    (objects,) = truth(3)
    boxes = torch.rand(1, 8, 4) * 0.1
    boxes[0, [5, 0, 7]] = objects.boxes_N4
    pairs = match(Stage(torch.zeros(1, 8, 5), boxes), [objects], Weights(2, 5, 2))
    assert dict(zip(pairs.objects.tolist(), pairs.queries.tolist())) == {0: 5, 1: 0, 2: 7}


def test_more_objects_than_queries_is_an_error() -> None:
    with pytest.raises(ValueError, match="3 objects and 2 queries; use more queries"):
        match(Stage(torch.zeros(1, 2, 5), torch.rand(1, 2, 4)), truth(3), ONE)


def test_denoising_keeps_positives_near_and_negatives_further_off() -> None:
    torch.manual_seed(0)
    objects = truth(2, 0, 3)
    noise = Denoising.draw(objects, 5, 300)
    assert noise is not None
    assert (noise.most, noise.groups) == (3, 100)
    assert noise.boxes_BQ4.min() >= 0
    drawn = noise.boxes_BQ4[2].view(100, 2, 3, 4)
    boxes = to_corners(drawn)
    away = (boxes - to_corners(objects[2].boxes_N4)).abs() / (objects[2].boxes_N4[:, 2:].repeat(1, 2) / 2)
    inside = (boxes > 0) & (boxes < 1) & (drawn[..., 2:] > 0).all(-1, keepdim=True)  # the others were clipped
    assert (away[:, 0] <= 1 + 1e-4).all()
    assert (away[:, 1][inside[:, 1]] >= 1 - 1e-4).all()
    same = (noise.labels_BQ[2].view(100, 2, 3) == objects[2].labels_N).float().mean()
    assert same == pytest.approx(0.75 + 0.25 / 5, abs=0.05)  # a quarter is drawn anew, from 5 classes
    images, queries, which = noise.answers(objects)
    assert len(images) == 100 * 5
    torch.testing.assert_close(queries[images == 2][:6], torch.tensor([0, 1, 2, 6, 7, 8]))
    assert which[images == 2][:3].tolist() == [0, 1, 2]


def test_denoising_groups_are_hidden_from_each_other_and_from_the_queries() -> None:
    noise = Denoising.draw(truth(1), 5, 2)
    assert noise is not None
    hidden = noise.mask(2)
    want = torch.ones(6, 6, dtype=torch.bool)
    want[:2, :2] = want[2:4, 2:4] = want[4:, 4:] = False
    want[:4, 4:] = False  # denoising queries see the real ones
    assert torch.equal(hidden, want)


def test_denoising_does_not_change_what_the_queries_answer() -> None:
    torch.manual_seed(0)
    detector = Detector(SMALL, 16, 5).eval()
    x = torch.randn(2, 16, 4, 4)
    alone, beside = detector(x), detector(x, truth(2, 1), denoise=6)
    torch.testing.assert_close(beside.decoded[-1].boxes_BQ4, alone.decoded[-1].boxes_BQ4, atol=1e-5, rtol=1e-5)
    assert len(beside.denoised) == 2
    assert not alone.denoised


def test_training_lowers_the_loss_and_reaches_every_parameter() -> None:
    torch.manual_seed(0)
    detector = Detector(SMALL, 16, 5)
    x, objects = torch.randn(3, 16, 6, 6), truth(1, 0, 2)
    optimizer = torch.optim.AdamW(detector.parameters(), 2e-3)
    losses = []
    for _ in range(15):
        value = detection_loss(detector(x, objects, denoise=4), objects, cost=Weights(2, 5, 2), weights=ONE, objects=3)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.75 * losses[0]
    assert not [name for name, p in detector.named_parameters() if p.grad is None]


def test_a_batch_without_objects_has_a_loss() -> None:
    detector = Detector(SMALL, 16, 5)
    objects = truth(0, 0)
    value = detection_loss(detector(torch.randn(2, 16, 4, 4), objects, denoise=4), objects, cost=ONE, weights=ONE, objects=1)
    value.backward()
    assert value.isfinite()


def test_jitter_moves_boxes_with_the_image() -> None:
    sample = open_dataset("coco2017", "train2017", "toy", kind="instances")[1]
    masks = torch.stack([torch.from_numpy(m) for m in sample.masks])
    painted = sample._replace(image_3HW=(255 * masks[:1].byte()).expand(3, -1, -1), boxes_N4=sample.boxes_N4[:1],
                              labels_N=sample.labels_N[:1], crowd_N=sample.crowd_N[:1])  # fmt: skip
    seen = 0
    for seed in range(12):
        example = Jitter(64, (0.5, 2.0))(painted, np.random.default_rng(seed))
        assert example.image_3SS.shape == (3, 64, 64)
        inside = (example.image_3SS[0] > 127).nonzero()
        if not len(example.truth.labels_N) or not len(inside):
            continue
        seen += 1
        corners = to_corners(example.truth.boxes_N4)[0] * 64
        want = torch.cat([inside.min(0).values.flip(0), inside.max(0).values.flip(0) + 1])
        torch.testing.assert_close(corners, want.float(), atol=1.5, rtol=0)  # pixels: resized edges are blurred
    assert seen >= 6


def test_crowds_are_not_trained_on() -> None:
    sample = open_dataset("coco2017", "train2017", "toy", kind="instances")[0]
    crowds = sample._replace(crowd_N=torch.ones_like(sample.crowd_N))
    assert len(Jitter(64, (1.0, 1.0))(crowds, np.random.default_rng(0)).truth.labels_N) == 0


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(root="toy", device=torch.device("cpu"), cache=FeatureCache(tmp_path), limit=5, batch=2)


def small(**values: object) -> Detection:
    return Detection.model_validate({
        "kind": "detection", "dataset": "coco2017", "train": "train2017", "test": "val2017", "side": 64, "dim": 32, "heads": 4,
        "ffn": 64, "points": 2, "encoder": 1, "decoder": 1, "queries": 12, "denoise": 4, "steps": 2, "batch": 2, **values,
    })  # fmt: skip


class Oracle(torch.nn.Module):
    """Answers with the ground truth of the images in their order."""

    def __init__(self, task: Detection, context: Context) -> None:
        super().__init__()
        self.samples = iter([task.datasets(context)[0][i] for i in range(5)])

    def detect(self, features: torch.Tensor, *, limit: int) -> list[Detections]:
        samples = [next(self.samples) for _ in features]
        return [Detections(torch.ones(len(s.labels_N)), s.labels_N, s.boxes_N4 / 192) for s in samples]


def test_an_oracle_has_ap_100(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    task = small()
    monkeypatch.setattr(Detection, "fit_detector", lambda *_: Oracle(task, context))
    scores = {s.metric: s for s in task.run(open_model("teacher:toy_clip"), context)}
    assert scores["AP"].value == pytest.approx(100)
    assert {s.metric for s in scores.values() if s.headline} <= {"AP", "AP_small", "AP_medium", "AP_large"}


def test_the_task_runs_end_to_end(context: Context) -> None:
    scores = {s.metric: s.value for s in small().run(open_model("teacher:toy_clip"), context)}
    assert 0 <= scores["AP"] <= 100


def test_boxes_end_where_the_image_does(context: Context) -> None:
    class Everything(torch.nn.Module):
        def detect(self, features: torch.Tensor, *, limit: int) -> list[Detections]:
            square = torch.tensor([[-0.1, -0.1, 1.1, 1.1]])
            return [Detections(torch.ones(1), torch.zeros(1, dtype=torch.long), square) for _ in features]

    task = small()
    found = task.detections(Everything(), open_model("teacher:toy_clip"), task.datasets(context)[0], context)  # type: ignore[arg-type]
    for sample, detections in found:
        height, width = sample.image_3HW.shape[1:]
        assert detections.corners_N4.tolist() == [[0, 0, width, height]]


def test_whole_images_fill_the_square_with_their_longest_side() -> None:
    sample = open_dataset("coco2017", "val2017", "toy", kind="instances")[0]
    wide = sample._replace(image_3HW=torch.full((3, 30, 60), 255, dtype=torch.uint8))
    square = Whole(40)(wide)
    assert square[:, :20].eq(255).all()
    assert square[:, 20:].eq(0).all()
