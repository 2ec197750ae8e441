#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0: SwinModel and an image whose patch grid is smaller than the attention window.
#
# Guess:     the small image is refused (or computed with a smaller window), and the model is what it was before: a forward pass in
#            evaluation mode changes nothing.
# Behaviour: the pass ends in a RuntimeError, and the block has kept the smaller window: from then on every image fails, also those
#            of the model's own size that had worked before.
# Seen:      prints "windows before [8, 8, 8, 8], after [4, 8, 8, 8]; own size before: works, after: RuntimeError"
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 numpy
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'P'
import torch
from transformers import SwinConfig, SwinModel

torch.manual_seed(0)
config = SwinConfig(image_size=64, patch_size=4, embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=8)
model, own, small = SwinModel(config).eval(), torch.rand(1, 3, 64, 64), torch.rand(1, 3, 16, 16)


def windows():
    return [block.window_size for stage in model.encoder.layers for block in stage.blocks]


def outcome(image):
    try:
        with torch.no_grad():
            model(image)
    except RuntimeError:
        return "RuntimeError"
    return "works"


before, first = windows(), outcome(own)
outcome(small)
after, again = windows(), outcome(own)
print(f"windows before {before}, after {after}; own size before: {first}, after: {again}")
assert (before, after, first, again) == ([8] * 4, [4, 8, 8, 8], "works", "RuntimeError"), "this has changed"
P
