#!/usr/bin/env bash
# torch 2.15.0: twelve equal blocks compiled one by one, plain and with a parametrization (spectral_norm, weight_norm).
#
# Guess:     blocks of one class share their compiled code, as twelve plain blocks do (one compilation), so "compile each block" works for
#            blocks with a weight or spectral norm, too.
# Behaviour: torch.nn.utils.parametrize gives every layer a class of its own, which the compiler guards on: every block is compiled anew, and
#            from the ninth on (the recompilation limit) blocks run uncompiled. The old torch.nn.utils.spectral_norm, a hook, compiles once.
# Seen:      prints "compilations of 12 blocks: plain 1, weight_norm 8, spectral_norm 8, spectral_norm as a hook 1"
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.15.0 numpy==2.4.6
"$work/venv/bin/python" -W ignore - 2> "$work/warnings" <<'P'
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import parametrizations, spectral_norm

NORMS = {
    "plain": lambda layer: layer,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "spectral_norm as a hook": spectral_norm,
}


class Block(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.layer = norm(nn.Linear(8, 8))

    def forward(self, x):
        return self.layer(x).relu()


def compilations(norm):
    torch._dynamo.reset()
    counter = CompileCounter()
    with torch.no_grad():
        for _ in range(12):
            torch.compile(Block(norm).eval(), backend=counter)(torch.zeros(2, 8))
    return counter.frame_count


seen = {name: compilations(norm) for name, norm in NORMS.items()}
print("compilations of 12 blocks: " + ", ".join(f"{name} {count}" for name, count in seen.items()))
assert list(seen.values()) == [1, 8, 8, 1], "this has changed"
P
