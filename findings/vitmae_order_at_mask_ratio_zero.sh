#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0: ViTMAEModel with mask_ratio=0.
#
# Guess:     nothing is masked, so `last_hidden_state` holds the patches in the image's own order, and two forward passes of one
#            image in evaluation mode agree.
# Behaviour: patches are shuffled all the same, by fresh noise in every pass, also in evaluation mode; whoever takes the tokens for a
#            map gets another scrambled one each time. `ids_restore` undoes it; passing `noise=` fixes it.
# Seen:      two passes differ by more than 1 in places; sorted over patches they agree to 1e-6; taken by ids_restore they agree, too.
#            prints "same order: False, same patches: True, same after ids_restore: True"
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 numpy
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'P'
import torch
from transformers import ViTMAEConfig, ViTMAEModel

torch.manual_seed(0)
config = ViTMAEConfig(
    hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8, mask_ratio=0.0,
    decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=32,
)
model, image = ViTMAEModel(config).eval(), torch.rand(1, 3, 32, 32)
with torch.no_grad():
    one, two = model(image), model(image)


def in_order(out):
    patches = out.last_hidden_state[:, 1:]
    return patches.gather(1, out.ids_restore[..., None].expand(-1, -1, patches.shape[-1]))


same = torch.allclose(one.last_hidden_state, two.last_hidden_state, atol=1e-5)
patches = torch.allclose(one.last_hidden_state.sort(1).values, two.last_hidden_state.sort(1).values, atol=1e-5)
restored = torch.allclose(in_order(one), in_order(two), atol=1e-5)
print(f"same order: {same}, same patches: {patches}, same after ids_restore: {restored}")
assert (same, patches, restored) == (False, True, True), "this has changed"
P
