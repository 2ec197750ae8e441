#!/usr/bin/env bash
# torch 2.15.0 (CPU): AdamW(fused=True), a model in channels_last, and a checkpoint that was saved in the usual memory format.
#
# Guess:     `fused` only changes the speed: a model that is put into channels_last and resumes from an optimizer's state dict makes the same
#            steps as with fused=False, within rounding.
# Behaviour: load_state_dict keeps the moments in the memory order in which they were saved, and the fused kernel walks weights, gradients and
#            moments by memory order, not by index: each weight of a convolution is updated with another weight's moments. No error, no
#            warning; the shapes agree. fused=False and foreach=True are right.
# Seen:      prints "difference to fused=False: 0.0000 contiguous, 0.0169 channels_last" after one step with learning rate 0.01
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.15.0 numpy
"$work/venv/bin/python" - <<'P'
import copy

import torch
from torch import nn


def step(model, optimizer, images):
    optimizer.zero_grad()
    model(images).square().mean().backward()
    optimizer.step()


def first():
    torch.manual_seed(0)
    model = nn.Conv2d(8, 16, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(3):
        step(model, optimizer, torch.randn(4, 8, 12, 12))
    return model.state_dict(), optimizer.state_dict()


def resumed(saved, memory_format, fused):
    weights, state = copy.deepcopy(saved)
    model = nn.Conv2d(8, 16, 3)
    model.load_state_dict(weights)
    model.to(memory_format=memory_format)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    optimizer.load_state_dict({**state, "param_groups": [{**state["param_groups"][0], "fused": fused}]})
    torch.manual_seed(1)
    step(model, optimizer, torch.randn(4, 8, 12, 12).to(memory_format=memory_format))
    return model.weight.detach()


saved = first()
off = {
    name: float((resumed(saved, form, True) - resumed(saved, form, False)).abs().max())
    for name, form in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last))
}
print(f"difference to fused=False: {off['contiguous']:.4f} contiguous, {off['channels_last']:.4f} channels_last")
assert off["contiguous"] < 1e-5, "it differs without channels_last, too"
assert off["channels_last"] > 1e-3, "this has changed"
P
