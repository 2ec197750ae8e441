"""Which reader reads which data set: `module:Class` in this package, called with (root, split); toy readers with (split)."""

from __future__ import annotations

__all__ = ["READERS", "TOY_READERS"]

READERS: dict[str, str] = {
    "imagenet1k": "imagenet:open_imagenet",
    "folder": "image_folder:ImageFolder",
    "coco_karpathy": "captions:open_coco",
    "flickr30k": "captions:open_flickr30k",
    "pascal_context": "pascal_context:PascalContext",
    "nyudv2": "nyudv2:NyuDv2",
    "ade20k": "segmentation:Ade20k",
    "voc2012": "segmentation:Voc2012",
    "coco2017": "instances:CocoInstances",
    "navi": "navi:NaviViews",
    "navi_pairs": "navi:NaviPairs",
    "spair71k": "spair:SPair",
}
"""By the name that suite cards use."""

TOY_READERS: dict[str, str] = {
    "multitask": "toy_multitask:ToyMultitask",
    "segmentation": "segmentation:ToySegmentation",
    "instances": "instances:ToyInstances",
    "labelled": "toy:ToyLabelled",
    "captioned": "captions:ToyCaptioned",
    "views": "toy_views:ToyViews",
    "view_pairs": "toy_views:ToyPairs",
    "keypoint_pairs": "toy_views:ToyKeypointPairs",
}
"""By the kind of sample: generated scenes that stand in for every data set of that kind."""
