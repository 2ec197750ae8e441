#!/usr/bin/env bash
# transformers 5.23.0 (torch 2.15.0, torchvision 0.29.2, pillow 13.0.0): the pixel budget of Qwen2VLImageProcessor and a narrow strip.
#
# Guess:     `longest_edge` (once max_pixels) bounds the pixels of an image, and so the patches that a server must have room for: 50,176
#            pixels are 256 patches of 14 px at most, as the docstring of smart_resize has it.
# Behaviour: each side is kept at two patches at least after the other was scaled, and nothing is scaled again: a line of text of 3,900 x 20 px
#            (within the allowed ratio of 200) gives 444 patches, 1.7 times the budget. No error, no warning.
# Seen:      prints "grid 2 x 222: 444 patches, budget 256"; a photograph of 1000 x 750 px gives 216.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.15.0 torchvision==0.29.2 transformers==5.23.0 pillow==13.0.0
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'P'
from PIL import Image
from transformers import Qwen2VLImageProcessor

BUDGET = 256
processor = Qwen2VLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": BUDGET * 14 * 14})


def grid(width, height):
    _, rows, columns = processor(Image.new("RGB", (width, height)), return_tensors="pt")["image_grid_thw"][0].tolist()
    return rows, columns


(rows, columns), photo = grid(3900, 20), grid(1000, 750)
print(f"grid {rows} x {columns}: {rows * columns} patches, budget {BUDGET}; a photograph {photo[0] * photo[1]}")
assert photo[0] * photo[1] <= BUDGET, "a photograph is over the budget, too"
assert (rows, columns) == (2, 222), "this has changed"
P
