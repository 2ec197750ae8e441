"""Spectral reparametrisation and weight noise: against singular values, and what they must not do."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.profiler import ProfilerActivity, profile

from radio_distill.config.recipe import Student as Spec
from radio_distill.network.arch import AdaptorSlot
from radio_distill.network.student import Student
from radio_distill.student.build import build_student
from radio_distill.student.damp import apply_damp, set_damp_step
from radio_distill.student.spectral import (
    ALPHA,
    SpectralNorm,
    SpectralParts,
    _iterate,
    apply_spectral,
    fold,
    fold_state,
    power_iterate,
)
from radio_distill.train.optim import parameter_groups


def make() -> Student:
    torch.manual_seed(0)
    overrides = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4}
    spec = Spec(model="vit_tiny_patch16_224", overrides=overrides, max_size=32)
    student = build_student(spec, [AdaptorSlot("clip", 10, 12, True)])
    for linear in (m for m in student.modules() if isinstance(m, nn.Linear)):
        nn.init.normal_(linear.weight, std=0.2)
    return student.eval()


def weights(student: Student) -> dict[str, torch.Tensor]:
    return {name: m.weight for name, m in student.named_modules() if isinstance(m, nn.Linear)}


def chunks(name: str, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return weight.chunk(3 if name.endswith("qkv") else 1)


@torch.no_grad()
def test_init_current_leaves_the_weights_as_they_are() -> None:
    student = make()
    before = {name: w.clone() for name, w in weights(student).items()}
    apply_spectral(student)
    for name, weight in weights(student).items():
        torch.testing.assert_close(weight, before[name], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_init_one_makes_every_norm_one() -> None:
    student = make()
    apply_spectral(student, init="one")
    for _ in range(200):
        power_iterate(student)
    for name, weight in weights(student).items():
        for part in chunks(name, weight):
            if "patch_generator" not in name:
                assert torch.linalg.matrix_norm(part, 2) == pytest.approx(1, abs=1e-3)


@torch.no_grad()
def test_one_iteration_a_step_follows_a_moving_weight() -> None:
    weight = torch.randn(12, 8)
    norm = SpectralNorm(weight)
    for _ in range(100):
        weight += 0.01 * torch.randn(12, 8)
        _iterate([(norm, weight)])
    assert norm.sigma(weight) == pytest.approx(float(torch.linalg.matrix_norm(weight, 2)), rel=0.02)


def test_the_forward_pass_never_changes_u_and_v() -> None:
    student = make()
    apply_spectral(student)
    before = {name: b.clone() for name, b in student.named_buffers()}
    student.train().forward_tokens(torch.rand(1, 3, 16, 16)).features_BCHW.sum().backward()
    assert all(torch.equal(before[name], b) for name, b in student.named_buffers())
    power_iterate(student)
    assert not all(torch.equal(before[name], b) for name, b in student.named_buffers())


def test_ranks_start_and_stay_equal() -> None:
    students = [make(), make()]
    for seed, student in enumerate(students):
        torch.manual_seed(seed)  # ranks may differ in the global generator
        apply_spectral(student)
        power_iterate(student)
    for a, b in zip(students[0].state_dict().values(), students[1].state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_gradients_flow_through_sigma() -> None:
    weight = torch.randn(6, 4, dtype=torch.float32)
    norm = SpectralNorm(weight)
    linear = weight.clone().requires_grad_()
    norm(linear).square().sum().backward()
    # the effective weight does not change when W is scaled, so the gradient is orthogonal to W
    assert linear.grad is not None
    assert (linear.grad * linear).sum().abs() < 1e-4 * linear.grad.norm() * linear.norm()


@pytest.mark.parametrize("parts", [1, 3])
def test_the_gradient_is_that_of_the_formula(parts: int) -> None:
    torch.manual_seed(0)
    weight, gradient = torch.randn(48, 24), torch.randn(48, 24)
    norm = SpectralParts(weight, parts)
    norms = list(norm.parts)
    leaves = [weight.clone().requires_grad_(), *[n.scale for n in norms]]
    found = torch.autograd.grad(norm(leaves[0]), leaves, gradient)

    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    rows = zip(exact[0].chunk(parts), exact[1:], norms, strict=True)
    chunks = [w * (F.softplus(s) + ALPHA) / (n._u.double() @ w @ n._v.double() + n.eps) for w, s, n in rows]
    wanted = torch.autograd.grad(torch.cat(chunks), exact, gradient.double())
    for ours, theirs in zip(found, wanted):
        bar = 1.5e-7 if ours.numel() > 1 else 1e-5  # that of a scale is a sum that nearly cancels
        assert (ours.double() - theirs).norm() / theirs.norm() < bar


def test_an_iteration_before_the_backward_pass_changes_no_gradient() -> None:
    def gradient(iterate: bool) -> torch.Tensor:
        student = make()
        apply_spectral(student, init="one")
        out = student.encode(torch.ones(1, 3, 16, 16)).features_BCHW.sum()
        if iterate:
            power_iterate(student)
        return torch.autograd.grad(out, next(student.model.blocks.parameters()))[0]

    assert torch.equal(gradient(False), gradient(True))


def test_one_class_for_all_linears_of_a_class_and_the_order_of_torchs_parametrize() -> None:
    student, other = make(), make()
    apply_spectral(student)
    apply_damp(student, 0.1)
    kinds = {type(m) for name, m in student.named_modules() if isinstance(m, nn.Linear)}
    assert len(kinds) == 1
    for linear in [m for m in other.modules() if isinstance(m, nn.Linear)]:
        parametrize.register_parametrization(linear, "weight", nn.Identity())
    fixed = [name for name, _ in student.named_parameters() if "scale" not in name]
    assert fixed == [name for name, _ in other.named_parameters()]
    copied = copy.deepcopy(student)
    assert all(torch.equal(a, b) for a, b in zip(copied.state_dict().values(), student.state_dict().values()))
    fold(copied)
    assert {type(m) for m in copied.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    assert list(copied.state_dict()) == list(make().state_dict())


def test_scales_decay_and_the_patch_projection_is_left_alone() -> None:
    student = make()
    apply_spectral(student)
    scales = {name: p for name, p in student.named_parameters() if name.endswith("scale")}
    assert {tuple(p.shape) for p in scales.values()} == {(1, 1)}
    kept = {id(p) for group in parameter_groups(student, 0.1) if not group["weight_decay"] for p in group["params"]}
    assert not {id(p) for p in scales.values()} & kept
    assert not any("patch_generator" in name for name in scales)
    assert any(name.startswith("adaptors.clip.head_mlp") for name in scales)
    assert len(scales) == 2 * (3 + 1 + 2) + 4


@torch.no_grad()
def test_folding_a_module_and_folding_its_state_agree() -> None:
    student = make()
    apply_spectral(student, init="one")
    apply_damp(student, 0.1)
    images = torch.rand(1, 3, 16, 16)
    want = student.encode_adaptors(images)
    state = fold_state(student.train().state_dict())
    fold(student)
    assert student.training
    assert set(state) == set(student.state_dict()) == set(make().state_dict())
    for key, value in student.state_dict().items():
        torch.testing.assert_close(state[key], value)
    torch.testing.assert_close(student.eval().encode_adaptors(images)["clip"], want["clip"])


@torch.no_grad()
def test_swiglu_halves_are_chunks_of_their_own() -> None:
    module = nn.ModuleDict({"w12": nn.Linear(6, 16)})
    nn.init.normal_(module["w12"].weight)
    apply_spectral(module, init="one")
    for _ in range(300):
        power_iterate(module)
    for half in module["w12"].weight.chunk(2):
        assert torch.linalg.matrix_norm(half, 2) == pytest.approx(1, abs=1e-3)


# --- weight noise --------------------------------------------------------------------------------------------------------


def test_noise_is_a_function_of_seed_and_step() -> None:
    student = make().train()
    plain = {name: w.detach().clone() for name, w in weights(student).items()}
    apply_damp(student, 0.1)
    other = copy.deepcopy(student)
    drawn = []
    for step in (1, 2):
        for each in (student, other):
            set_damp_step(each, seed=7, step=step)
        drawn.append({name: w.detach() for name, w in weights(student).items()})
        assert all(torch.equal(w, drawn[-1][name]) for name, w in weights(other).items())
    for name in plain:
        assert not torch.equal(drawn[0][name], drawn[1][name])
    ratio = torch.cat([(drawn[0][name] / plain[name]).flatten() for name in plain])
    assert ratio.mean() == pytest.approx(1, abs=2e-3)
    assert ratio.std() == pytest.approx(0.1, rel=0.02)


def test_there_is_no_noise_in_eval_mode() -> None:
    student = make()
    plain = {name: w.detach().clone() for name, w in weights(student).items()}
    apply_damp(student, 0.1)
    assert all(torch.equal(w, plain[name]) for name, w in weights(student).items())


def test_layers_get_different_noise() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for linear in module:
        nn.init.ones_(linear.weight)
    apply_damp(module, 0.1)
    set_damp_step(module, 0, 0)
    assert not torch.equal(module[0].weight, module[1].weight)


def test_the_norms_of_weights_of_one_shape_are_iterated_together() -> None:
    def operations(count: int) -> int:
        net = nn.Sequential(*[nn.Linear(8, 8) for _ in range(count)])
        apply_spectral(net)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            power_iterate(net)
        names = [event.name for event in seen.events()]
        return sum(name in ("aten::linalg_vector_norm", "aten::clamp_min_", "aten::clamp_min", "aten::div") for name in names)

    assert operations(12) == operations(1) > 0
