#!/usr/bin/env bash
# torch 2.15.0: a file of `torch.save` in which one bit of a tensor's data has flipped (a bad disk, a cut and mended download).
#
# Guess:     the file is a zip archive with a CRC-32 for every member, so `torch.load` notices, as Python's zipfile does.
# Behaviour: it loads without a word, with one number changed; the checksum is written and not compared.
# Seen:      prints "zipfile says: bad/data/0, torch.load changed 1 of 1000 numbers"
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.15.0 numpy
cd "$work"
"$work/venv/bin/python" - <<'P'
import zipfile
from pathlib import Path

import torch

numbers = torch.arange(1000.0)
torch.save({"w": numbers}, "bad.pt")
content = bytearray(Path("bad.pt").read_bytes())
where = content.find(numbers.numpy().tobytes())
content[where + 4 * 500 + 2] ^= 1  # in the mantissa of number 500
Path("bad.pt").write_bytes(content)
said = zipfile.ZipFile("bad.pt").testzip()
changed = int((torch.load("bad.pt", weights_only=True)["w"] != numbers).sum())
print(f"zipfile says: {said}, torch.load changed {changed} of {len(numbers)} numbers")
assert said is not None and changed == 1, "this has changed"
P
