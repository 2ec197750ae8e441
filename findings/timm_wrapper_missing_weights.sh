#!/usr/bin/env bash
# transformers 5.23.0, timm 1.0.31, torch 2.15.0: a timm checkpoint without its LayerScale weights, opened by transformers.
#
# Guess:     what the checkpoint lacks has the value that timm gives it: LayerScale 1e-5, as `init_values` in the model's arguments says. The
#            report says of missing weights that they "were newly initialized".
# Behaviour: transformers builds the model without memory and then initialises layers of PyTorch that it knows (a missing LayerNorm is 1 and
#            0). What timm's own modules hold as parameters (LayerScale's gamma, class token, position embedding) is whatever was in the memory.
# Seen:      prints "timm: gamma is 1e-05 True, transformers: norm is 1 True, gamma is 1e-05 False"
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.15.0 torchvision==0.29.2 transformers==5.23.0 timm==1.0.31
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - "$work" <<'P'
import json
import sys
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from transformers import AutoModel

folder = Path(sys.argv[1])
arguments = {"depth": 1, "embed_dim": 32, "num_heads": 2, "init_values": 1e-5}
model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **arguments)
lacks = ("blocks.0.ls1.gamma", "norm.weight")
save_file({name: value for name, value in model.state_dict().items() if name not in lacks}, folder / "model.safetensors")
facts = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "model_args": arguments, "pretrained_cfg": {"input_size": [3, 224, 224]}}
(folder / "config.json").write_text(json.dumps(facts))
memory = [torch.full((5000,), 7.0) for _ in range(2000)]  # so that free memory is not all zeros
del memory
read = AutoModel.from_pretrained(folder).timm_model
scale = torch.full((32,), 1e-5)
seen = [torch.equal(model.blocks[0].ls1.gamma, scale), torch.equal(read.norm.weight, torch.ones(32)), torch.equal(read.blocks[0].ls1.gamma, scale)]
print(f"timm: gamma is 1e-05 {seen[0]}, transformers: norm is 1 {seen[1]}, gamma is 1e-05 {seen[2]}")
assert seen == [True, True, False], "this has changed"
P
