"""LAMB against timm's, AdamW against torch's, parameter groups, and thawing."""

from copy import deepcopy

import pytest
import torch
from timm.optim import Lamb as TimmLamb
from torch import Tensor, nn
from torch.nn.utils import parametrize

from radio_distill.config.recipe import Optim
from radio_distill.errors import RecipeError
from radio_distill.train.optim import AdamW, Lamb, NAdam, Together, make_optimizer, named_groups, parameter_groups, set_step

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


def test_adamw_is_torchs_fused_one_to_the_last_bit_whatever_the_memory_order_of_gradients() -> None:
    ours, theirs = tensors(), tensors()
    found = train(AdamW(groups(ours), eps=1e-6), ours, 5)
    wanted = train(torch.optim.AdamW(groups(theirs), lr=0.01, eps=1e-6, fused=True), theirs, 5)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)

    plain, turned = nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(3, 4))
    plain.grad = torch.arange(12.0).view(3, 4)
    turned.grad = plain.grad.t().contiguous().t()
    for parameter in (plain, turned):
        AdamW([parameter], lr=0.01).step()
    assert torch.equal(plain, turned)


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


def test_named_groups_tell_hidden_matrices_from_everything_else() -> None:
    task = Task()
    found = named_groups(task, parameter_groups(task, 0.02, freeze_trunk=5))
    assert {g["name"]: [name.removeprefix("student.") for name in g["names"]] for g in found} == {
        "heads/matrices": ["adaptors.clip.weight"],
        "heads/vectors/no_decay": ["adaptors.clip.bias"],
        "trunk/matrices": ["qkv.parametrizations.weight.original"],
        "trunk/vectors": ["qkv.parametrizations.weight.0.scale"],
        "trunk/embeddings/no_decay": ["pos_embed", "cls_token.token"],
        "trunk/vectors/no_decay": ["gamma", "qkv.bias", "norm.weight", "norm.bias"],
    }
    names = {p: name for name, p in task.named_parameters()}
    assert all([names[p] for p in g["params"]] == g["names"] for g in found)
    assert {(g["part"], g["kind"], g["freeze"]) for g in found if g["kind"] == "matrices"} == {
        ("heads", "matrices", 0),
        ("trunk", "matrices", 5),
    }


def muon_and_adamw(groups, *, lr: float, momentum: float = 0.95):
    """What a user's `optim.loader` is: Muon for hidden matrices of the trunk, AdamW for the rest."""
    hidden = [g for g in groups if g["part"] == "trunk" and g["kind"] == "matrices"]
    rest = [g for g in groups if g not in hidden]
    return [torch.optim.Muon(hidden, lr=lr, momentum=momentum), torch.optim.AdamW(rest, lr=lr)]


def forget(groups, *, lr: float):
    return torch.optim.SGD(groups[1:], lr=lr)


def strip(groups, *, lr: float):
    return torch.optim.SGD([p for g in groups for p in g["params"]], lr=lr)


def nothing(groups, *, lr: float):
    return None


def custom(name: str, **options: object) -> Optim:
    return Optim(kind="custom", loader=f"{__name__}:{name}", lr=0.1, options=options, freeze_trunk=0)


def steps(task: nn.Module, optimizer: torch.optim.Optimizer, count: range) -> None:
    for step in count:
        generator = torch.Generator().manual_seed(step)
        for p in task.parameters():
            p.grad = torch.randn(p.shape, generator=generator) if p.requires_grad else None
        set_step(optimizer, step, 0.1 / (step + 1))
        optimizer.step()


def test_muon_moves_hidden_matrices_and_adamw_the_rest_as_each_does_alone() -> None:
    torch.manual_seed(0)
    ours, theirs = Task(), Task()
    theirs.load_state_dict(ours.state_dict())
    optimizer = make_optimizer(ours, custom("muon_and_adamw", momentum=0.9))
    assert isinstance(optimizer, Together)
    steps(ours, optimizer, range(3))

    decays = {p: g["weight_decay"] for g in parameter_groups(theirs, 0.02) for p in g["params"]}
    hidden = theirs.student.qkv.parametrizations.weight.original
    alone = [torch.optim.Muon([{"params": [hidden], "weight_decay": 0.02}], lr=0.1, momentum=0.9)]
    alone.append(torch.optim.AdamW([{"params": [p], "weight_decay": decays[p]} for p in decays if p is not hidden], lr=0.1))
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for p in theirs.parameters():
            p.grad = torch.randn(p.shape, generator=generator) if p.requires_grad else None
        for one in alone:
            for group in one.param_groups:
                group["lr"] = 0.1 / (step + 1)
            one.step()
    torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()), rtol=0, atol=0)


def test_together_goes_on_from_its_state_as_if_it_had_not_stopped() -> None:
    torch.manual_seed(0)
    whole, again = Task(), Task()
    first = make_optimizer(whole, custom("muon_and_adamw"))
    steps(whole, first, range(2))
    again.load_state_dict(whole.state_dict())
    second = make_optimizer(again, custom("muon_and_adamw"))
    second.load_state_dict(deepcopy(first.state_dict()))
    steps(whole, first, range(2, 4))
    steps(again, second, range(2, 4))
    torch.testing.assert_close(list(again.parameters()), list(whole.parameters()), rtol=0, atol=0)


def test_an_optimizer_that_knows_no_freezing_leaves_a_frozen_trunk_alone() -> None:
    task = Task()
    spec = custom("muon_and_adamw").model_copy(update={"freeze_trunk": 2})
    optimizer = make_optimizer(task, spec)
    before = {name: p.detach().clone() for name, p in task.named_parameters()}
    steps(task, optimizer, range(2))
    moved = {name for name, p in task.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"student.adaptors.clip.weight", "student.adaptors.clip.bias"}  # and no weight decay on the trunk
    steps(task, optimizer, range(2, 3))
    assert optimizer.state[task.student.gamma]["step"] == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("forget", r"1 of 10 parameters in no group or in several \(student.adaptors.clip.weight\); every group"),
        ("strip", r"made a group without name, freeze, rate; hand the groups on as they are"),
        ("nothing", r"returned a NoneType, expected a torch.optim.Optimizer, or a list of them"),
        ("no_such", r"test_optim.py has no 'no_such', expected a function \(groups, lr=..., \*\*options\)"),
    ],
)
def test_an_optimizer_of_the_users_that_cannot_work_is_refused(name: str, expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        make_optimizer(Task(), custom(name))


def test_options_that_the_users_function_lacks_are_named() -> None:
    with pytest.raises(RecipeError, match=r"optim.loader: .*muon_and_adamw.* cannot be called with .*momentun"):
        make_optimizer(Task(), custom("muon_and_adamw", momentun=0.9))
