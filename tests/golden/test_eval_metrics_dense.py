"""Instance masks, depth, normals, the multi-task meters and their losses against the reference implementations' values."""

import torch
from metric_goldens import each

from radio_distill.eval.metrics import instances, mlore, surfaces
from radio_distill.eval.metrics.means import Means


@each("sam_coco")
def test_instance_ious_equal_efficientvit_sam(golden):
    t = golden.tensors
    iou, means = instances.mask_ious(t["in.pred"], t["in.gt"]), Means()
    means.update(instances.instance_scores(iou, t["in.area"]))
    golden.agrees(means.compute() | {"n_evaluated": means.count("all")})
    reference = t["out.iou"]
    kept = iou[t["in.area"] >= 1]
    scale = 100 if reference.max() <= 1 else 1
    assert torch.allclose(kept, scale * reference, atol=golden.facts["tolerance"]["scalar"], rtol=0)


@each("probe3d_depth")
def test_depth_equals_probe3d(golden):
    facts, t = golden
    meter = surfaces.DepthMeter()
    for prediction, target in zip(t["in.pred"].split(2), t["in.gt"].split(2)):
        meter.update(prediction, target)
    produced = meter.compute()
    produced["table4_depth"] = produced["depth"]
    produced["sig_loss"] = surfaces.sigma_loss(t["in.pred"], t["in.gt"]).item()
    for version, suffix in (("2025", ""), ("2024", "_2024")):
        produced[f"gradient_loss{suffix}"] = surfaces.gradient_loss(t["in.pred"], t["in.gt"], version=version).item()
        produced[f"depth_loss{suffix}"] = surfaces.depth_loss(t["in.pred"], t["in.gt"], version=version).item()
    golden.agrees(produced)
    matched = surfaces.match_scale_and_shift(t["in.pred"], t["in.gt"])
    for kind, prediction in (("sa", t["in.pred"]), ("si", matched)):
        for name, per_image in surfaces.depth_scores(prediction, t["in.gt"]).items():
            assert (per_image - t[f"out.{kind}_{name}_per_image"]).abs().max() < facts["tolerance"]["scalar"]


@each("probe3d_snorm")
def test_normals_equal_probe3d(golden):
    t = golden.tensors
    meter = surfaces.NormalsMeter()
    for batch in zip(*(t[f"in.{name}"].split(2) for name in ("pred", "gt", "mask"))):
        meter.update(*batch)
    produced = meter.compute()
    produced["table4_snorm"] = produced["normals"]
    for name, uncertainty in (("uncertainty", True), ("plain", False)):
        loss = surfaces.angular_loss(t["in.pred"], t["in.gt"], t["in.mask"], uncertainty=uncertainty)
        produced[f"angular_loss_{name}"] = loss.item()
    golden.agrees(produced)
    for name, per_image in surfaces.normal_scores(t["in.pred"], t["in.gt"], t["in.mask"]).items():
        assert (per_image - t[f"out.{name}_per_image"]).abs().max() < golden.facts["tolerance"]["scalar"]


@each("mlore_meters")
def test_multi_task_meters_equal_mlore(golden):
    facts, t = golden
    weights = facts["edge_pos_weight"]
    meters = {
        "pascal_semseg": (mlore.SemsegMeter(t["in.pascal_semseg.logits"].shape[1]), "pascal_semseg.logits"),
        "nyud_semseg": (mlore.SemsegMeter(t["in.nyud_semseg.logits"].shape[1]), "nyud_semseg.logits"),
        "human_parts": (mlore.SemsegMeter(t["in.human_parts.logits"].shape[1], parts=True), "human_parts.logits"),
        "saliency": (mlore.SaliencyMeter(), "saliency.logits"),
        "normals": (mlore.NormalsMeter(), "normals.pred"),
        "depth": (mlore.DepthMeter(), "depth.pred"),
        "edge_pascal": (mlore.EdgeMeter(weights["pascal"]), "edge.logits"),
        "edge_nyud": (mlore.EdgeMeter(weights["nyud"]), "edge.logits"),
    }
    produced = {}
    for task, (meter, tensor) in meters.items():
        target = t[f"in.{tensor.split('.')[0]}.gt"]
        for batch in zip(t[f"in.{tensor}"].split(facts["batch_size"]), target.split(facts["batch_size"])):
            meter.update(*batch)
        produced |= {f"{task}_{name}": value for name, value in meter.compute().items()}
    produced |= {f"edge_loss_{set_name}": produced[f"edge_{set_name}_loss"] for set_name in weights}
    golden.agrees(produced)
    # the decoys are the numbers without the reference's oddities, which have their own names
    strict = {
        "pascal_semseg_mIoU_skipping_absent": produced["pascal_semseg_mIoU_strict"],
        "nyud_semseg_mIoU_skipping_absent": produced["nyud_semseg_mIoU_strict"],
        "saliency_maxF_thresholding_probability": produced["saliency_maxF_strict"],
        "edge_loss_nyud_on_logits": produced["edge_nyud_loss_strict"],
    }
    for name, value in strict.items():
        assert abs(value - facts["decoys"][name]) < facts["tolerance"]["scalar"], name
    loss = mlore.balanced_bce(t["in.edge.logits"], t["in.edge.gt"], positive_weight=weights["nyud"])
    assert abs(loss.item() - produced["edge_nyud_loss_strict"]) < 1e-5
