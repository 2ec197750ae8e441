"""Evaluation metrics against closed forms, slow obvious versions, torchmetrics, and oracles that know the answer."""

import math

import pytest
import torch
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_jaccard_index

from radio_distill.eval.metrics import instances, knn, matching, mlore, surfaces, text
from radio_distill.eval.metrics.means import Means
from radio_distill.eval.metrics.segmentation import Confusion, labels_from_raw


def seeded(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_means_weigh_every_item_alike_whatever_the_batches():
    values = seeded(17)
    means = Means()
    for part in values.split(5):
        means.update({"a": part, "even": part[part > 0]})
    assert means.compute() == pytest.approx({"a": values.mean().item(), "even": values[values > 0].mean().item()})
    assert means.count("a") == 17


def test_names_without_an_item_are_left_out_of_the_means():
    means = Means()
    means.update({"all": torch.ones(2), "large": torch.ones(0)})
    assert means.compute() == {"all": 1.0}


def test_mean_iou_and_accuracies_equal_torchmetrics():
    label, prediction = torch.randint(5, (2, 4, 9, 9), generator=torch.Generator().manual_seed(0))
    label[:, 0] = 255
    confusion = Confusion(5)
    confusion.update(prediction, label)
    result = confusion.compute()
    library = {
        "mIoU": multiclass_jaccard_index(prediction, label, 5, ignore_index=255),
        "mAcc": multiclass_accuracy(prediction, label, 5, average="macro", ignore_index=255),
        "aAcc": multiclass_accuracy(prediction, label, 5, average="micro", ignore_index=255),
    }
    assert result == pytest.approx({name: 100 * x.item() for name, x in library.items()}, rel=1e-6)


def test_absent_classes_do_not_count_as_zero():
    confusion = Confusion(3)
    confusion.update(torch.tensor([0, 1]), torch.tensor([0, 1]))
    assert confusion.compute()["mIoU"] == 100
    assert math.isnan(confusion.iou_K[2])


def test_files_that_write_zero_for_ignore_are_shifted():
    assert labels_from_raw(torch.tensor([0, 1, 150, 255], dtype=torch.uint8)).tolist() == [255, 0, 149, 255]


def test_topk_equals_torchmetrics():
    scores, labels = seeded(50, 7), torch.arange(50) % 7
    hits = text.topk_hits(scores, labels, ks=(1, 3))
    for k in (1, 3):
        library = multiclass_accuracy(scores, labels, 7, top_k=k, average="micro")
        assert hits[f"top{k}"].mean().item() == pytest.approx(100 * library.item())


def test_a_model_that_says_the_same_of_everything_is_not_right():
    same = torch.ones(6, 4)
    assert text.recalls(same, same, torch.arange(6), ks=(1,))["text_to_image_R@1"] < 50
    assert text.topk_hits(torch.zeros(6, 6), torch.arange(6), ks=(1,))["top1"].mean() < 50


def test_a_caption_among_the_nearest_is_a_hit_of_its_image():
    images = torch.eye(3)
    texts = torch.tensor([[1.0, 0, 0], [0, 0.9, 1], [0, 0, 1], [0, 1, 0]])  # the caption 1 of image 1 is nearer to image 2
    result = text.recalls(images, texts, torch.tensor([0, 1, 2, 1]), ks=(1,))
    assert result == {"text_to_image_R@1": 75.0, "image_to_text_R@1": 100.0}


def test_neighbours_do_not_depend_on_how_queries_are_cut(monkeypatch):
    database, labels, queries = seeded(40, 6), torch.arange(40) % 3, seeded(11, 6)
    whole = knn.nearest([database], queries, k=5)
    monkeypatch.setattr(knn, "SIMILARITIES", 80)
    torch.testing.assert_close(knn.nearest([database], queries, k=5), whole)
    guesses = knn.knn_guesses(database, labels, queries, classes=3, k=5)
    assert torch.equal(guesses, knn.votes(whole[0], labels[whole[1]], classes=3).argmax(1))


def test_instances_at_a_bound_are_in_both_bands():
    scores = instances.instance_scores(torch.arange(5.0), torch.tensor([0.5, 1.0, 1024.0, 9216.0, 9217.0]))
    assert {name: x.tolist() for name, x in scores.items()} == {
        "all": [1, 2, 3, 4], "small": [1, 2], "medium": [2, 3], "large": [3, 4],
    }  # fmt: skip


def test_scale_and_shift_of_a_target_are_found():
    target = seeded(2, 1, 6, 7).exp()
    target[:, :, 0] = 0
    assert torch.allclose(
        surfaces.match_scale_and_shift(3 * target - 1, target)[:, :, 1:], target[:, :, 1:].double(), atol=1e-6
    )
    flat = surfaces.match_scale_and_shift(torch.ones_like(target), target)
    assert torch.allclose(flat[1], target[1][target[1] > 0].mean().double(), atol=1e-6)


def test_least_squares_agrees_with_torch():
    prediction, target = seeded(1, 1, 5, 5), seeded(1, 1, 5, 5).abs() + 0.1
    system = torch.stack([prediction.flatten(), torch.ones(25)], 1).double()
    solved = system @ torch.linalg.lstsq(system, target.flatten().double()[:, None]).solution
    assert torch.allclose(surfaces.match_scale_and_shift(prediction, target).flatten(), solved[:, 0], atol=1e-9)


def test_an_image_without_depth_counts_as_zero():
    target = torch.stack([torch.ones(1, 4, 4), torch.zeros(1, 4, 4)])
    assert surfaces.depth_scores(torch.ones(2, 1, 4, 4), target)["d1"].tolist() == [1, 0]
    assert torch.isfinite(surfaces.depth_loss(torch.ones(1, 1, 4, 4), target[1:], version="2024"))


@pytest.mark.parametrize("version", ["2024", "2025"])
def test_losses_have_finite_gradients_at_the_truth(version):
    target = seeded(4, 1, 14, 14).exp()
    prediction = target.clone().requires_grad_()
    surfaces.depth_loss(prediction, target, version=version).backward()
    assert prediction.grad.isfinite().all()
    normal = F.normalize(seeded(2, 3, 5, 5), dim=1)
    guess = torch.cat([normal, torch.zeros(2, 1, 5, 5)], 1).requires_grad_()
    surfaces.angular_loss(guess, normal, torch.ones(2, 1, 5, 5)).backward()
    assert guess.grad.isfinite().all()


def test_gradient_loss_sees_rows_and_columns_only_since_2025():
    target = torch.ones(1, 1, 16, 16)
    bent = target * torch.linspace(1, 2, 16)[:, None]
    assert surfaces.gradient_loss(bent, target) > 0.1
    assert surfaces.gradient_loss(bent, target, version="2024") == 0


def test_an_oracle_scores_perfectly():
    target = seeded(2, 1, 8, 8).exp()
    meter = surfaces.DepthMeter()
    meter.update(target, target)
    result = meter.compute()
    assert result["depth"] == 100
    assert result["sa_rmse"] == 0
    normal = F.normalize(seeded(2, 3, 8, 8), dim=1)
    angles = surfaces.NormalsMeter()
    angles.update(normal, normal, torch.ones(2, 1, 8, 8))
    assert angles.compute()["normals"] == 100
    masks = torch.rand(3, 8, 8) > 0.5
    assert instances.mask_ious(masks, masks) == pytest.approx(torch.full((3,), 100.0).double(), rel=1e-6)


def oracle_meters():
    """Meter, prediction and target of an oracle, and what it scores."""
    label = torch.randint(3, (2, 1, 6, 6), generator=torch.Generator().manual_seed(1))
    label[:, :, 0] = 255
    logits = 20 * F.one_hot(label.clamp(max=2)[:, 0], 3).permute(0, 3, 1, 2).float()
    binary = (label == 1).long()
    two = 20 * F.one_hot(binary[:, 0], 2).permute(0, 3, 1, 2).float()
    yield mlore.SemsegMeter(3), logits, label, {"mIoU": 100, "mIoU_strict": 100}
    yield mlore.SaliencyMeter(), two, binary, {"maxF": 100, "maxF_strict": 100}
    yield mlore.NormalsMeter(), 3 * logits + 1, logits + 1 / 3, {"mean_deg": 0}
    # the published edge loss takes a probability for a logit, so that a perfect map scores 0.09
    yield mlore.EdgeMeter(0.88), 40 * binary.float() - 20, binary.float(), {"loss_strict": 0}
    yield mlore.DepthMeter(), logits[:, :1] + 1, logits[:, :1] + 1, {"rmse": 0, "log_rmse": 0, "abs_rel": 0, "sq_rel": 0}


@pytest.mark.parametrize(("meter", "prediction", "target", "wanted"), oracle_meters(), ids=lambda x: type(x).__name__)
def test_an_oracle_scores_perfectly_in_the_multi_task_meters(meter, prediction, target, wanted):
    meter.update(prediction, target)
    result = meter.compute()
    assert {name: result[name] for name in wanted} == pytest.approx(wanted, abs=1e-5)


def test_an_image_without_people_does_not_count_for_parts():
    logits = torch.tensor([5.0, 0.0]).reshape(1, 2, 1, 1).expand(2, 2, 4, 4)  # everywhere background
    label = torch.zeros(2, 1, 4, 4)
    label[0, 0, 0] = 1
    meter = mlore.SemsegMeter(2, parts=True)
    meter.update(logits, label)
    assert meter.compute()["mIoU"] == pytest.approx(100 * (12 / 16) / 2)  # not (12 + 16) / (16 + 16)


def test_correspondence_finds_the_same_points_again():
    points = torch.stack([*torch.meshgrid(torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 8), indexing="ij"), torch.ones(8, 8)])
    features = seeded(16, 8, 8)
    matches = matching.match(features, features, points, points, num=30)
    metres, pixels = matching.errors(matches, torch.eye(4)[:3], torch.eye(3))
    meter = matching.CorrespondenceMeter()
    meter.update(metres, pixels)
    assert meter.compute()["correspondence"] == 100
    shifted = torch.cat([torch.eye(3), torch.tensor([[0.03], [0], [0]])], 1)
    metres, _ = matching.errors(matches, shifted, torch.eye(3))
    assert metres == pytest.approx(torch.full((30,), 0.03), abs=1e-6)


def test_keypoints_are_found_in_the_same_image():
    features = seeded(64, 9, 9)
    points = torch.tensor([[0, 0, 1], [48, 24, 1], [10, 10, 0]])
    error = matching.keypoint_errors(features, features, points, points, image_size=64, box_scale=0.5)
    assert len(error) == 2  # visible ones
    # aligned corners in, cell over width out: the best cell of x = 48 is 6 of 9, which is read as 42.7
    assert error[0] == 0
    assert error[1] == pytest.approx(math.hypot(6 / 9 - 0.75, 3 / 9 - 0.375) / 0.5, abs=1e-6)


def test_classes_weigh_alike_in_pck():
    meter = matching.PckMeter(0.1)
    meter.update("cat", torch.tensor([0.0, 0.0, 0.0]))
    meter.update("dog", torch.tensor([0.5]))
    meter.update("cow", torch.ones(0))
    assert meter.compute() == {"pck@0.1": 50.0, "pck@0.1_cat": 100.0, "pck@0.1_dog": 0.0}
