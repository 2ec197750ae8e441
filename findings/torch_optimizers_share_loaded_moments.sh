#!/usr/bin/env bash
# torch 2.13.0: Optimizer.load_state_dict and the optimizer that the state came from.
#
# Guess:     as with modules, loading copies: two optimizers are apart afterwards, and a step of the one leaves the other alone.
# Behaviour: moments whose dtype and device already fit are taken as they are, so both optimizers hold the same tensors and every
#            step of the first one moves the moments of the second. Modules do copy. `copy.deepcopy(a.state_dict())` keeps them apart.
# Seen:      prints "a step of the first changes the second: True; with deepcopy: False; weights of modules: False"
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy
"$work/venv/bin/python" - <<'P'
import copy

import torch


def changed(copied):
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    first, second = (torch.optim.AdamW([p], lr=0.1) for p in parameters)
    parameters[0].grad = torch.ones(3)
    first.step()
    second.load_state_dict(copy.deepcopy(first.state_dict()) if copied else first.state_dict())
    before = second.state[parameters[1]]["exp_avg"].clone()
    first.step()
    return not torch.equal(before, second.state[parameters[1]]["exp_avg"])


one, two = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
two.load_state_dict(one.state_dict())
one.weight.data.add_(1)
found = changed(False), changed(True), torch.equal(one.weight, two.weight)
print(f"a step of the first changes the second: {found[0]}; with deepcopy: {found[1]}; weights of modules: {found[2]}")
assert found == (True, False, False), "this has changed"
P
