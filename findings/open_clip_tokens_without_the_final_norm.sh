#!/usr/bin/env bash
# open_clip_torch 3.3.0, torch 2.15.0, torchvision 0.29.2: patch tokens of a tower with `final_ln_after_pool` (CLIPA's).
#
# Guess:     `output_tokens=True` gives the same patches as `forward_intermediates(normalize_intermediates=True)` does for the last
#            block: both mean "the tower's patch features".
# Behaviour: with `final_ln_after_pool` the first skips the final LayerNorm (only the pooled vector gets it), the second applies it;
#            for a tower without that flag the two agree.
# Seen:      prints "plain tower agrees: True, final_ln_after_pool agrees: False, agrees after ln_post: True"
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.15.0 torchvision==0.29.2 open_clip_torch==3.3.0
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'P'
import torch
from open_clip.transformer import VisionTransformer


def tokens(after_pool):
    torch.manual_seed(0)
    tower = VisionTransformer(
        image_size=32, patch_size=8, width=32, layers=2, heads=2, mlp_ratio=4.0, output_dim=16, pool_type="avg",
        final_ln_after_pool=after_pool, output_tokens=True,
    ).eval()
    torch.nn.init.uniform_(tower.ln_post.weight, 2, 3)
    image = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        direct = tower(image)[1]
        other = tower.forward_intermediates(image, indices=1, normalize_intermediates=True, output_fmt="NLC")["image_intermediates"][0]
        return direct, other, tower.ln_post(direct)


plain, clipa = tokens(False), tokens(True)
agrees = [torch.allclose(a, b, atol=1e-4) for a, b in ((plain[0], plain[1]), (clipa[0], clipa[1]), (clipa[2], clipa[1]))]
print(f"plain tower agrees: {agrees[0]}, final_ln_after_pool agrees: {agrees[1]}, agrees after ln_post: {agrees[2]}")
assert agrees == [True, False, True], "this has changed"
P
