"""LAMB against timm's, AdamW against torch's, parameter groups, and thawing."""

import torch
from timm.optim import Lamb as TimmLamb
from torch import Tensor, nn
from torch.nn.utils import parametrize

from radio_distill.train.optim import AdamW, Lamb, NAdam, parameter_groups, set_step

DECAYS = [0.02, 0.02, 0.0, 0.0]


def tensors(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(7, 5), (4, 3, 2, 2), (5,), ()]
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def groups(params: list[nn.Parameter]) -> list[dict[str, object]]:
    return [{"params": [p], "weight_decay": decay} for p, decay in zip(params, DECAYS)]


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        if isinstance(optimizer, AdamW):
            set_step(optimizer, step, 0.01)
        optimizer.step()
    return [p.detach() for p in params]


def test_lamb_equals_timms_without_clipping() -> None:
    ours, theirs = tensors(), tensors()
    found = train(Lamb(groups(ours), eps=1e-6), ours, 20)
    wanted = train(TimmLamb(groups(theirs), lr=0.01, eps=1e-6, max_grad_norm=None), theirs, 20)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)  # fp32 rounding over 20 updates


def test_adamw_equals_torchs() -> None:
    ours, theirs = tensors(), tensors()
    found = train(AdamW(groups(ours), eps=1e-6), ours, 20)
    wanted = train(torch.optim.AdamW(groups(theirs), lr=0.01, eps=1e-6), theirs, 20)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_lamb_moves_weights_that_start_at_zero() -> None:
    p = nn.Parameter(torch.zeros(3, 3))
    p.grad = torch.ones(3, 3)
    Lamb([{"params": [p], "weight_decay": 0.02}], lr=0.01, eps=0.0).step()
    torch.testing.assert_close(p.detach(), torch.full((3, 3), -0.01))  # trust ratio 1, Adam's first update is the sign


def test_a_frozen_group_stays_and_then_starts_like_a_fresh_optimizer() -> None:
    frozen, fresh = tensors(), tensors()
    optimizer = Lamb([{"params": frozen, "weight_decay": 0.02, "freeze": 5000}])
    set_step(optimizer, 4999, 0.01)
    for p in frozen:
        p.grad = torch.full_like(p, 3.0)
    optimizer.step()
    torch.testing.assert_close(frozen, fresh, rtol=0, atol=0)
    reference = Lamb([{"params": fresh, "weight_decay": 0.02}])
    for step in range(3):
        set_step(optimizer, 5000 + step, 0.01)
        set_step(reference, step, 0.01)
        for i, p in enumerate([*frozen, *fresh]):
            p.grad = torch.full_like(p, float(i % 4 + step))
        optimizer.step()
        reference.step()
    torch.testing.assert_close(frozen, fresh, rtol=0, atol=0)


class Scaled(nn.Module):
    """Stands for the spectral reparametrisation: a (1, 1) factor of the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, 1))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.scale


class Task(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Module()
        self.student.pos_embed = nn.Parameter(torch.zeros(1, 4, 3))
        self.student.cls_token = nn.Module()
        self.student.cls_token.token = nn.Parameter(torch.zeros(2, 3))
        self.student.qkv = nn.Linear(3, 9)
        parametrize.register_parametrization(self.student.qkv, "weight", Scaled())
        self.student.norm = nn.LayerNorm(3)
        self.student.gamma = nn.Parameter(torch.ones(3))
        self.student.adaptors = nn.ModuleDict({"clip": nn.Linear(3, 4)})
        self.student.unused = nn.Parameter(torch.zeros(3, 3), requires_grad=False)


def test_weights_and_spectral_scales_decay_and_nothing_else() -> None:
    task = Task()
    found = parameter_groups(task, 0.02, freeze_trunk=5000)
    names = {id(p): name.removeprefix("student.") for name, p in task.named_parameters()}
    assert {g["name"]: [names[id(p)] for p in g["params"]] for g in found} == {
        "heads": ["adaptors.clip.weight"],
        "heads/no_decay": ["adaptors.clip.bias"],
        "trunk": ["qkv.parametrizations.weight.original", "qkv.parametrizations.weight.0.scale"],
        "trunk/no_decay": ["pos_embed", "gamma", "cls_token.token", "qkv.bias", "norm.weight", "norm.bias"],
    }
    assert [(g["weight_decay"], g["freeze"]) for g in found] == [(0.02, 0), (0.0, 0), (0.02, 5000), (0.0, 5000)]


def test_nadam_is_torchs_nadam():
    torch.manual_seed(0)
    start, grads = torch.randn(5, 3), torch.randn(7, 5, 3)
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    mine = NAdam([ours], lr=1e-2, betas=(0.9, 0.999), eps=1e-8)
    reference = torch.optim.NAdam([theirs], lr=1e-2, betas=(0.9, 0.999), eps=1e-8)
    for step, grad in enumerate(grads):
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        set_step(mine, step, 1e-2)
        mine.step()
        reference.step()
    torch.testing.assert_close(ours, theirs)
