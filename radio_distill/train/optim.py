"""LAMB, AdamW, NAdam or an optimizer of the user's, their parameter groups, and the learning-rate schedule.

The first two are one rule, of torch's fused kernel, with two step lengths (g gradient, w weight, t the number of the update, from 1):

    m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
    u  = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + decay w
    w <- w - lr r u               r = 1 (AdamW, arXiv:1711.05101) or |w| / |u| per parameter (LAMB, arXiv:1904.00962, alg. 2)

r is 1 where |w| or |u| is 0, and in groups without decay (biases, norms, tokens), as in timm's and NVIDIA's LAMB; no
gradient is clipped here. A ZeRO-1/2 optimizer holds one flat slice per group that cuts through parameters, so LAMB adds up
the two squared norms of every parameter over all ranks: one all-reduce of 2 numbers per parameter and group.

None counts its own updates: `set_step` writes learning rate and t into every group before an update. A frozen group
(t < 1) keeps weights and moments, so when it thaws its bias correction starts at t = 1. (Counting the frozen steps would
make the first updates after 5000 of them 3 times too long: m is corrected as if it were full, v likewise.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..config.recipe import Optim
from ..errors import RecipeError
from ..loaders import check_call, import_named
from ..tensors import all_reduce

__all__ = [
    "AdamW",
    "Lamb",
    "NAdam",
    "Together",
    "import_optimizer",
    "make_optimizer",
    "named_groups",
    "parameter_groups",
    "schedule",
    "set_step",
]

# Not decayed though they are matrices: position table, class and register tokens (timm's and the reference's names).
NO_DECAY = frozenset({"pos_embed", "cls_token", "reg_token"})

# What takes pixels or tokens in, or gives tokens out: no hidden layer, though its weight may be a matrix.
EMBEDDINGS = NO_DECAY | {"patch_generator", "patch_embed", "embed_tokens", "lm_head"}


def in_adaptors(name: str) -> bool:
    """Whether a parameter of the task belongs to a head; everything else is the trunk, which `freeze_trunk` holds."""
    return "adaptors" in name.split(".")


def parameter_groups(
    module: nn.Module, weight_decay: float, *, freeze_trunk: int = 0, is_head: Callable[[str], bool] = in_adaptors
) -> list[dict[str, Any]]:
    """Up to four groups (trunk and heads, each with and without decay) of all trainable parameters, in module order.

    Weights of two or more dimensions decay, among them the (1, 1) scales of the spectral reparametrisation, without which
    nothing would bound the weights (PHI-S, A.7). Biases, norms, LayerScale, tokens and the position table do not.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        part, decays = ("heads" if is_head(name) else "trunk"), _decays(name, parameter)
        group = groups.setdefault(
            part if decays else f"{part}/no_decay",
            {"params": [], "weight_decay": weight_decay if decays else 0.0, "freeze": 0 if part == "heads" else freeze_trunk},
        )
        group["params"].append(parameter)
    return [{"name": name, **groups[name]} for name in sorted(groups)]


def _decays(name: str, parameter: Tensor) -> bool:
    return parameter.ndim >= 2 and NO_DECAY.isdisjoint(name.split("."))


def named_groups(module: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`parameter_groups`, cut finer for an optimizer that treats kinds of parameters differently, as Muon does.

    A group's `part` is what stood before: `trunk` and `heads` of a student. Its `kind` is one of `matrices` (weights (rows, columns)
    of hidden layers), `embeddings` (patch embedding, position table, tokens), `kernels` (of convolutions) and `vectors` (biases,
    norms, scales). `name` is both and, where weights do not decay, `no_decay`: `trunk/matrices`, `trunk/vectors/no_decay`;
    `names` are the parameters'.
    """
    name_of = {parameter: name for name, parameter in module.named_parameters()}
    found: dict[str, dict[str, Any]] = {}
    for group in groups:
        part, _, rest = group["name"].partition("/")
        for parameter in group["params"]:
            kind = _kind(name_of[parameter], parameter)
            name = "/".join([part, kind, *([rest] if rest else [])])
            new = {**group, "name": name, "part": part, "kind": kind, "rate": group.get("rate", 1.0), "params": [], "names": []}
            fine = found.setdefault(name, new)
            fine["params"].append(parameter)
            fine["names"].append(name_of[parameter])
    return list(found.values())


def _kind(name: str, parameter: Tensor) -> str:
    if not EMBEDDINGS.isdisjoint(name.split(".")):
        return "embeddings"
    if parameter.numel() == max(parameter.shape, default=1):  # a spectral scale is (1, 1)
        return "vectors"
    return "matrices" if parameter.ndim == 2 else "kernels"


def make_optimizer(module: nn.Module, spec: Optim, *, groups: list[dict[str, Any]] | None = None) -> torch.optim.Optimizer:
    """The recipe's optimizer over all trainable parameters of `module`, in `groups` when they are given.

    Raises RecipeError for what is wrong with an optimizer of the user's.
    """
    if groups is None:
        groups = parameter_groups(module, spec.weight_decay, freeze_trunk=spec.freeze_trunk)
    if spec.kind == "custom":
        return _custom(spec, named_groups(module, groups))
    return {"lamb": Lamb, "adamw": AdamW, "nadam": NAdam}[spec.kind](groups, lr=spec.lr, betas=spec.betas, eps=spec.eps)


def import_optimizer(spec: Optim) -> Callable[..., Any]:
    """The function that `optim.loader` names. Raises RecipeError when it is not there or does not take the options."""
    expected = "a function (groups, lr=..., **options) that returns an optimizer, or a list of them"
    function = import_named(str(spec.loader), by="optim.loader", expected=expected, error=RecipeError)
    check_call(function, [], by="optim.loader", options={"lr": spec.lr, **spec.options}, error=RecipeError)
    return function


def _custom(spec: Optim, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    made = import_optimizer(spec)(groups, lr=spec.lr, **spec.options)
    optimizers = made if isinstance(made, list | tuple) else [made]
    for optimizer in optimizers:
        if not isinstance(optimizer, torch.optim.Optimizer):
            what = type(optimizer).__name__
            raise RecipeError(
                f"optim.loader: {spec.loader} returned a {what}, expected a torch.optim.Optimizer, or a list of them"
            )
    given = {p: name for group in groups for name, p in zip(group["names"], group["params"])}
    taken = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    lost = [name for p, name in given.items() if sum(p is other for other in taken) != 1]
    if lost:
        raise RecipeError(
            f"optim.loader: {spec.loader} has {len(lost)} of {len(given)} parameters in no group or in several "
            f"({', '.join(lost[:3])}); every group it gets has to go into one optimizer"
        )
    keys = ("name", "freeze", "rate")
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        if not all(key in group for key in keys):
            raise RecipeError(
                f"optim.loader: {spec.loader} made a group without {', '.join(keys)}; hand the groups on as they are, or a copy "
                "with other values: {**group, 'weight_decay': 0.1}"
            )
    return optimizers[0] if len(optimizers) == 1 else Together(optimizers)


def schedule(spec: Optim) -> Callable[[int], float]:
    """Factor on `lr` at a step counted from 0: linear warm-up to 1, then a cosine that reaches min_lr / lr at the last step."""
    floor = spec.min_lr / spec.lr
    length = max(spec.steps - 1 - spec.warmup, 1)

    def factor(step: int) -> float:
        if step < spec.warmup:
            return (step + 1) / spec.warmup
        progress = min((step - spec.warmup) / length, 1.0)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


def set_step(optimizer: torch.optim.Optimizer, step: int, lr: float) -> None:
    """Prepare update `step` (from 0): the learning rate of every group, and the number of the update as the group counts it.

    A frozen group gets no gradient: what does not know of `step` leaves it alone, too, and starts to count when it thaws.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group["rate"]
        group["step"] = step + 1 - group["freeze"]
        if group["step"] < 1:
            for parameter in group["params"]:
                parameter.grad = None


class AdamW(torch.optim.Optimizer):
    """AdamW on lists of tensors; elementwise, so it runs on whole parameters and on any shard of them (ZeRO 0-3)."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "freeze": 0,
                "step": 1,
                "rate": 1.0,
                "name": "",
            },
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every group that is not frozen; parameters without a gradient stay."""
        for group in self.param_groups:
            self._create_state(group["params"])
            params = [p for p in group["params"] if p.grad is not None]
            if group["step"] >= 1 and params:
                self._update(group, params)

    def _create_state(self, params: list[Tensor]) -> None:
        for p in params:  # also while frozen: a checkpoint of a group without moments could not be converted
            if not self.state[p]:
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        self._fused(group, params, params, lr=group["lr"], weight_decay=group["weight_decay"])

    def _fused(
        self, group: dict[str, Any], params: list[Tensor], moved: list[Tensor], *, lr: float, weight_decay: float
    ) -> None:
        """One pass of torch's kernel: takes the gradients of `params` into their moments, and moves `moved` by the step of AdamW."""
        step = torch.full((), group["step"], dtype=torch.float32, device=params[0].device)
        torch._fused_adamw_(
            moved,
            [_laid_out(p.grad, p) for p in params if p.grad is not None],
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            [],
            [step] * len(params),
            lr=lr,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=weight_decay,
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )


def _laid_out(gradient: Tensor, like: Tensor) -> Tensor:
    """A gradient in the memory order of its weight, which the kernel does not look at."""
    return gradient if gradient.stride() == like.stride() else torch.empty_like(like).copy_(gradient)


class NAdam(AdamW):
    """Adam with Nesterov momentum (Dozat 2016), decoupled weight decay; torch.optim.NAdam's rule and momentum schedule.

    mu_t = b1 (1 - 0.96^(0.004 t) / 2)
    m_hat = mu_(t+1) m / (1 - mu_1 ... mu_(t+1)) + (1 - mu_t) g / (1 - mu_1 ... mu_t)
    """

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        grads = [p.grad for p in params if p.grad is not None]
        averages = [self.state[p]["exp_avg"] for p in params]
        squares = [self.state[p]["exp_avg_sq"] for p in params]
        torch._foreach_lerp_(averages, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)

        updates = list(torch._foreach_sqrt(squares))
        torch._foreach_div_(updates, math.sqrt(1 - beta2 ** group["step"]))
        torch._foreach_add_(updates, group["eps"])
        torch._foreach_reciprocal_(updates)
        torch._foreach_mul_(updates, self._momentum(group, averages, grads))
        if group["weight_decay"]:
            torch._foreach_add_(updates, params, alpha=group["weight_decay"])
        torch._foreach_add_(params, updates, alpha=-group["lr"])

    def _momentum(self, group: dict[str, Any], averages: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        beta, t = group["betas"][0], group["step"]
        now, then = _nesterov(beta, t), _nesterov(beta, t + 1)
        ahead = torch._foreach_mul(averages, then / (1 - _nesterov_product(beta, t + 1)))
        torch._foreach_add_(ahead, grads, alpha=(1 - now) / (1 - _nesterov_product(beta, t)))
        return list(ahead)


def _nesterov(beta: float, t: int) -> float:
    return beta * (1 - 0.5 * 0.96 ** (0.004 * t))


def _nesterov_product(beta: float, t: int) -> float:
    return math.prod(_nesterov(beta, i) for i in range(1, t + 1))


class Together(torch.optim.Optimizer):
    """Several optimizers as one, for the engine: each steps its own groups; learning rates, moments and checkpoints are one's."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        self._parts = [(optimizer, len(optimizer.param_groups)) for optimizer in optimizers]
        self._hand_out()

    def _hand_out(self) -> None:
        """Give every optimizer its share of the groups, and the one state, which is kept by parameter."""
        groups = iter(self.param_groups)
        for optimizer, count in self._parts:
            optimizer.param_groups, optimizer.state = list(islice(groups, count)), self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update by each of them."""
        for optimizer, _ in self._parts:
            optimizer.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        super().load_state_dict(state_dict)
        self._hand_out()


@dataclass(frozen=True)
class _Slice:
    """How one rank's flat slice of a group is made of parameters."""

    sizes: list[int]
    """Lengths of consecutive pieces; the last one is padding."""
    owners: Tensor
    """Index in the group of the parameter that each piece (but the padding) belongs to."""
    num_params: int
    """Parameters of the group over all ranks."""
    ranks: dist.ProcessGroup


class Lamb(AdamW):
    """LAMB; exact under ZeRO-1/2 once it has been told by `attach_zero` how parameters were cut."""

    _slices: dict[str, _Slice]

    def __init__(self, params: Iterable[Tensor] | Iterable[dict[str, Any]], **options: Any) -> None:
        super().__init__(params, **options)
        self._slices = {}

    def attach_zero(self, zero: Any) -> None:
        """Read from DeepSpeed's ZeRO-1/2 optimizer which piece of every flat slice belongs to which parameter."""
        for group, params in zip(self.param_groups, zero.bit16_groups):
            (flat,) = group["params"]
            pieces = [(i, p._hp_mapping.get_hp_fragment_address()) for i, p in enumerate(params) if p._hp_mapping is not None]
            sizes = [address.numel for _, address in pieces]
            assert all(address.start == sum(sizes[:i]) for i, (_, address) in enumerate(pieces)), "pieces are not consecutive"
            owners = torch.tensor([i for i, _ in pieces], dtype=torch.long, device=flat.device)
            sizes.append(flat.numel() - sum(sizes))
            self._slices[group["name"]] = _Slice(sizes, owners, len(params), zero.dp_process_group)

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        if not group["weight_decay"]:
            super()._update(group, params)
            return
        moves = [torch.zeros_like(p) for p in params]
        self._fused(group, params, moves, lr=1.0, weight_decay=0.0)
        torch._foreach_add_(moves, params, alpha=-group["weight_decay"])
        self._adapt(group, params, moves)
        torch._foreach_add_(params, moves, alpha=group["lr"])

    def _adapt(self, group: dict[str, Any], params: list[Tensor], updates: list[Tensor]) -> None:
        """Scale the updates of a decaying group in place, by the ratio of each parameter."""
        cut, empty = self._slices.get(group["name"]), params[0].new_zeros(2, 0)
        if cut is not None:
            params, updates = (list(flat[0].split(cut.sizes))[:-1] for flat in (params, updates))
        squares = _squared_norms(params, updates, empty)
        if cut is not None:
            total = squares.new_zeros(2, cut.num_params)
            total[:, cut.owners] = squares
            all_reduce(total, group=cut.ranks)
            squares = total[:, cut.owners]
        weight, update = squares.sqrt()
        ratio = torch.where((weight > 0) & (update > 0), weight / update, 1.0)
        torch._foreach_mul_(updates, list(ratio.unbind()))


def _squared_norms(params: list[Tensor], updates: list[Tensor], empty: Tensor) -> Tensor:
    """(2, number of pieces): squared norms of weights and updates; `empty` for a rank that holds no piece at all."""
    if not params:
        return empty
    return torch.stack([*torch._foreach_norm(params), *torch._foreach_norm(updates)]).square().view(2, -1)
