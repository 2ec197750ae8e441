"""What a metric says of an input it cannot score: what was given, what was expected, what to do."""

import sys

import pytest
import torch

from radio_distill.errors import DataError, RadioDistillError
from radio_distill.eval.metrics import instances, knn, matching, mlore, surfaces, text
from radio_distill.eval.metrics.instances import box_ap
from radio_distill.eval.metrics.means import Means
from radio_distill.eval.metrics.segmentation import Confusion

BOXES = {
    "images": [{"id": 1, "width": 100, "height": 100}],
    "categories": [{"id": 3, "name": "cup"}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [10, 10, 50, 50], "area": 2500, "iscrowd": 0}],
}


@pytest.mark.parametrize(
    "score",
    [
        lambda a, b: Confusion(3).update(a[:, 0].long(), b[:, 0].long()),
        instances.mask_ious,
        surfaces.depth_scores,
        surfaces.match_scale_and_shift,
        surfaces.depth_loss,
        mlore.DepthMeter().update,
        mlore.EdgeMeter(0.9).update,
        lambda a, b: mlore.balanced_bce(a, b, positive_weight=0.9),
        lambda a, b: mlore.SaliencyMeter().update(a.expand(-1, 2, -1, -1), b),
        lambda a, b: mlore.NormalsMeter().update(a.expand(-1, 3, -1, -1), b.expand(-1, 3, -1, -1)),
        lambda a, b: surfaces.normal_scores(a.expand(-1, 3, -1, -1), b.expand(-1, 3, -1, -1), b),
        lambda a, b: mlore.SemsegMeter(3).update(a.expand(-1, 3, -1, -1), b),
    ],
)
def test_a_mask_of_another_size_is_an_error(score):
    with pytest.raises(DataError, match=r"prediction is .*4x4 and the annotation .*4x5; resize the prediction"):
        score(torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 5))


def test_a_mask_of_valid_normals_of_another_size_is_an_error():
    with pytest.raises(DataError, match="mask of the normals"):
        surfaces.angular_loss(torch.ones(1, 4, 4, 4), torch.ones(1, 3, 4, 4), torch.ones(1, 1, 4, 5))


def test_unknown_label_ids_are_named():
    with pytest.raises(DataError, match=r"labels: unknown id 150, 200; expected 0 to 149 or 255 \(ignored\)"):
        Confusion(150).update(torch.zeros(4).long(), torch.tensor([0, 150, 200, 255]))
    with pytest.raises(DataError, match="predicted labels: unknown id 7; expected 0 to 2"):
        Confusion(3).update(torch.tensor([7]), torch.tensor([1]))
    with pytest.raises(DataError, match="labels of the images: unknown id 4"):
        text.topk_hits(torch.zeros(1, 3), torch.tensor([4]))
    with pytest.raises(DataError, match="labels of the database: unknown id -1"):
        knn.knn_guesses(torch.ones(2, 3), torch.tensor([0, -1]), torch.ones(1, 3), classes=2)
    with pytest.raises(DataError, match="edge labels: unknown id 2"):
        mlore.EdgeMeter(0.9).update(torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 2))


@pytest.mark.parametrize(
    "score",
    [
        lambda: Means().compute(),
        lambda: Confusion(3).compute(),
        lambda: mlore.SaliencyMeter().compute(),
        lambda: mlore.DepthMeter().compute(),
        lambda: matching.PckMeter().compute(),
        lambda: surfaces.DepthMeter().compute(),
        lambda: knn.knn_guesses(torch.ones(0, 3), torch.ones(0).long(), torch.ones(1, 3), classes=2),
        lambda: text.recalls(torch.ones(2, 3), torch.ones(0, 3), torch.ones(0).long()),
        lambda: box_ap({**BOXES, "annotations": []}, []),
    ],
)
def test_an_empty_set_is_an_error(score):
    if "box_ap" in score.__code__.co_names:
        pytest.importorskip("faster_coco_eval")
    with pytest.raises(DataError, match="there is nothing to score; expected at least one"):
        score()


def test_an_image_without_a_caption_is_an_error():
    with pytest.raises(DataError, match=r"1 of 3 images have no caption \(first: image 1\)"):
        text.recalls(torch.ones(3, 2), torch.ones(2, 2), torch.tensor([0, 2]))


def test_too_few_correspondences_are_an_error():
    points = torch.zeros(3, 4, 4)
    points[2, 0] = 1
    with pytest.raises(
        DataError, match=r"too few correspondences: the views have 4 and 4 points with depth, expected at least 10"
    ):
        matching.match(torch.ones(2, 4, 4), torch.ones(2, 4, 4), points, points, num=10)


def test_keypoints_that_do_not_pair_up_are_an_error():
    with pytest.raises(DataError, match="5 keypoints in one image and 4 in the other"):
        matching.keypoint_errors(
            torch.ones(2, 4, 4), torch.ones(2, 4, 4), torch.ones(5, 3), torch.ones(4, 3), image_size=8, box_scale=1
        )


def test_a_pair_without_a_common_keypoint_has_no_error():
    hidden = torch.tensor([[1, 1, 0]])
    features = torch.ones(2, 4, 4)
    assert matching.keypoint_errors(features, features, hidden, hidden, image_size=8, box_scale=1).shape == (0,)


def test_masks_and_areas_must_be_as_many():
    with pytest.raises(DataError, match="3 masks were scored for 2 annotated areas"):
        instances.instance_scores(torch.ones(3), torch.ones(2))


def test_boxes_of_unknown_images_and_categories_are_errors():
    pytest.importorskip("faster_coco_eval")
    found = {"image_id": 1, "category_id": 3, "bbox": [10, 10, 50, 50], "score": 0.5}
    assert box_ap(BOXES, [found])["AP"] == pytest.approx(100)
    assert box_ap(BOXES, [])["AP"] == 0
    assert "APs" not in box_ap(BOXES, [found])  # nothing small is annotated
    with pytest.raises(DataError, match="image_id 9"):
        box_ap(BOXES, [{**found, "image_id": 9}])
    with pytest.raises(DataError, match="category_id 4"):
        box_ap(BOXES, [{**found, "category_id": 4}])


def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(RadioDistillError, match=r"radio-distill\[coco\]"):
        box_ap(BOXES, [])
