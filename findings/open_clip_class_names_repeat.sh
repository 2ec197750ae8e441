#!/usr/bin/env bash
# open_clip_torch 3.3.0: the class names of ImageNet that it ships for zero-shot classification.
#
# Guess:     1,000 classes have 1,000 names.
# Behaviour: 998: "missile" and "sunglasses" each stand for two classes, which therefore get the same text embedding; whichever comes second
#            can never be the only best, so at most 998 classes can be told apart by any model.
# Seen:      prints "1000 names, 998 different, twice: missile, sunglasses"
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.15.0 torchvision==0.29.2 open_clip_torch==3.3.0
"$work/venv/bin/python" - <<'P'
from collections import Counter

from open_clip import IMAGENET_CLASSNAMES

twice = sorted(name for name, count in Counter(IMAGENET_CLASSNAMES).items() if count > 1)
print(f"{len(IMAGENET_CLASSNAMES)} names, {len(set(IMAGENET_CLASSNAMES))} different, twice: {', '.join(twice)}")
assert twice == ["missile", "sunglasses"], "this has changed"
P
