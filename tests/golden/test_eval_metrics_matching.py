"""Correspondence, keypoints and boxes against the reference implementations' values."""

import json

import pytest
import torch
from conftest import GOLDEN
from metric_goldens import each

from radio_distill.eval.metrics import matching


@each("navi_correspondence")
def test_correspondence_equals_probe3d(golden):
    facts, t = golden
    meter = matching.CorrespondenceMeter()
    for i, pose in enumerate(t["in.Rt_01"]):
        matches = matching.match(
            t["in.feat_0"][i], t["in.feat_1"][i], t["in.xyz_grid_0"][i], t["in.xyz_grid_1"][i],
            num=facts["num_corr"], chunk=50,
        )  # fmt: skip
        metres, pixels = matching.errors(matches, pose, t["in.intrinsics"][i])
        assert torch.allclose(metres.sort().values, t["out.err3d_sorted"][i], atol=facts["tolerance"]["err"])
        assert torch.allclose(pixels.sort().values, t["out.err2d_sorted"][i], atol=facts["tolerance"]["err"])
        meter.update(metres, pixels)
    produced = meter.compute()
    golden.agrees(produced | {"table4_correspondence": produced["correspondence"]})


@each("spair")
def test_keypoints_equal_probe3d(golden):
    facts, t = golden
    meter, found = matching.PckMeter(0.1), []
    pairs = sorted({name.split(".")[1] for name in t if name.startswith("in.")})
    for pair in pairs:
        category, _, _ = pair.removeprefix("c").partition("p")
        error = matching.keypoint_errors(
            *(t[f"in.{pair}.{name}"] for name in ("feat_i", "feat_j", "kps_i", "kps_j")),
            image_size=facts["image_size"], box_scale=float(t[f"in.{pair}.thresh_scale"]),
        )  # fmt: skip
        meter.update(f"class{category}", error)
        found.append(error)
    assert torch.allclose(torch.cat(found).sort().values, t["out.errors"].sort().values, atol=facts["tolerance"]["err"])
    produced = meter.compute()
    golden.agrees(produced | {"pck@0.1_mean_over_classes": produced["pck@0.1"]})


@each("coco_ap")
def test_box_ap_equals_pycocotools(golden):
    pytest.importorskip("faster_coco_eval")
    from radio_distill.eval.metrics.instances import box_ap

    inputs = json.loads((GOLDEN / "metrics" / golden.facts["inputs"]).read_text())
    golden.agrees(box_ap(inputs["ground_truth"], inputs["detections"]))
