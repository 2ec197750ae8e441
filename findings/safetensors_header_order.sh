#!/usr/bin/env bash
# safetensors 0.8.0, numpy 2.4.6: bytes of a file with metadata.
#
# Guess:     the same tensors with the same metadata give the same bytes, so that a hash of the file tells whether anything changed.
# Behaviour: two or more metadata keys are written in an order that differs from process to process; the hash differs, too.
#            Within one process, and with at most one key, it stays the same. Compare tensors and metadata, or sort the header.
# Seen:      prints "12 processes, without metadata: 1 hash, with three keys: more than one"
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q safetensors==0.8.0 numpy==2.4.6
cat > "$work/digest.py" <<'P'
import hashlib
import sys

import numpy as np
from safetensors.numpy import save

metadata = {"x": "1", "y": "2", "z": "3"} if sys.argv[1] == "with" else None
print(hashlib.sha256(save({"a": np.zeros(2)}, metadata)).hexdigest())
P
hashes() { for _ in $(seq 12); do "$work/venv/bin/python" "$work/digest.py" "$1"; done | sort -u | wc -l; }
without=$(hashes without)
with=$(hashes with)
echo "12 processes, without metadata: $without hash, with three keys: $([ "$with" -gt 1 ] && echo more than one || echo "$with")"
[ "$without" = 1 ] && [ "$with" -gt 1 ] || { echo "this has changed"; exit 1; }
