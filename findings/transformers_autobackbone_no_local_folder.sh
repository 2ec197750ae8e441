#!/usr/bin/env bash
# transformers 5.23.0, huggingface_hub 2.4.0, torch 2.15.0: AutoBackbone and a folder on the disk.
#
# Guess:     AutoBackbone.from_pretrained reads a folder that save_pretrained wrote, as AutoModel and the backbone's own class do.
# Behaviour: it asks the hub whether a repository of that name exists before anything else, also for a path that is a folder here:
#            an absolute path is no valid name, so the call ends in HFValidationError. AutoModel and Dinov2Backbone read the same folder.
# Seen:      prints "AutoModel: Dinov2Model, Dinov2Backbone: Dinov2Backbone, AutoBackbone: HFValidationError"
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.15.0 transformers==5.23.0 huggingface_hub==2.4.0
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - "$work/backbone" <<'P'
import sys

from transformers import AutoBackbone, AutoModel, Dinov2Backbone, Dinov2Config

folder = sys.argv[1]
config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14, out_features=["stage1"])
Dinov2Backbone(config).save_pretrained(folder)


def read(cls):
    try:
        return type(cls.from_pretrained(folder)).__name__
    except Exception as error:
        return type(error).__name__


seen = {cls.__name__: read(cls) for cls in (AutoModel, Dinov2Backbone, AutoBackbone)}
print(", ".join(f"{name}: {what}" for name, what in seen.items()))
assert seen == {"AutoModel": "Dinov2Model", "Dinov2Backbone": "Dinov2Backbone", "AutoBackbone": "HFValidationError"}, "this has changed"
P
