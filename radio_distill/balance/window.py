"""The statistics window: gather every teacher's moments at the start of a stage and refit the balancers from them.

The sums of all ranks are merged only when balancers are refitted (every `balance.every` steps of the window); rank 0 solves,
everybody receives the same matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..config.cards import TeacherCard
from ..config.recipe import Balance, BalanceKind, BuiltInBalance
from ..types import VisionOutput
from . import Balancer, Dispersion, Moments, fit_on_first_rank

__all__ = ["StatisticsWindow"]


class StatisticsWindow:
    """Moments of features and angular dispersion of summaries, by teacher."""

    def __init__(
        self,
        spec: Balance,
        cards: dict[str, TeacherCard],
        device: torch.device,
        methods: Mapping[str, BalanceKind] | None = None,
        *,
        summaries: bool = False,
    ) -> None:
        """methods: of teachers that are not equalised by `spec.method`. summaries: standardise them, too."""
        self.spec = spec
        self._methods = {**dict.fromkeys(cards, spec.method), **(methods or {})}
        self._outputs = {name: card.output for name, card in cards.items()}
        self._device, self._summaries = device, summaries
        self.clear()

    def clear(self) -> None:
        """Forget everything seen."""
        outputs = self._outputs
        self.moments = {name: Moments(out.features, device=self._device) for name, out in outputs.items()}
        self.dispersions = {name: Dispersion(out.summary, device=self._device) for name, out in outputs.items() if out.summary}
        standardized = outputs if self._summaries else {}
        self.summaries = {name: Moments(out.summary, device=self._device) for name, out in standardized.items() if out.summary}

    def is_open(self, step: int) -> bool:
        """Whether statistics are gathered at this step of the training."""
        return step < self.spec.window and not self.spec.ahead

    def refit_due(self, step: int) -> bool:
        """Whether the balancers are refitted at this step: the first and last step of the window, and every `every` steps."""
        return self.is_open(step) and (step % self.spec.every == 0 or step == self.spec.window - 1)

    def observe(self, raw: dict[str, VisionOutput]) -> None:
        """Add one micro-batch of raw teacher outputs. No communication, no host synchronisation."""
        for name, out in raw.items():
            self.moments[name].update(out.features_BCHW)
            if out.summary_BC is not None:
                self.dispersions[name].update(out.summary_BC)
                if name in self.summaries:
                    self.summaries[name].update(out.summary_BC)

    def refit(self, previous: dict[str, Balancer]) -> dict[str, Balancer]:
        """Balancers from the sums of all ranks, which stay as they are; the axes of `previous` ones are kept. A collective."""
        balancers = {}
        for name, moments in self.moments.items():
            balancer = fit_on_first_rank(self._methods[name], moments.all_reduce(), name, previous=previous.get(name))
            if name in self.dispersions:
                balancer = replace(balancer, dispersion=self.dispersions[name].all_reduce())
            if name in self.summaries:
                standardize = BuiltInBalance(kind="standardize")
                own = fit_on_first_rank(standardize, self.summaries[name].all_reduce(), f"{name}, summaries")
                balancer = replace(balancer, summary_mean_C=own.mean_C, summary_std_C=own.inverse_weight)
            balancers[name] = balancer
        return balancers

    def state(self) -> dict[str, Tensor]:
        """This rank's sums, for an exact resume."""
        states = {f"moments.{name}": m.state_dict() for name, m in self.moments.items()}
        states |= {f"summaries.{name}": m.state_dict() for name, m in self.summaries.items()}
        states |= {f"dispersion.{name}": d.state_dict() for name, d in self.dispersions.items()}
        return {f"{name}.{key}": x for name, state in states.items() for key, x in state.items()}

    def add(self, state: dict[str, Tensor]) -> None:
        """Add what `state` returned on some rank to this rank's sums; to none at all it is an exact copy."""
        for kind, of_kind in (("moments", self.moments), ("summaries", self.summaries)):
            for name, moments in of_kind.items():
                other = Moments(moments.channels, device=moments.device)
                other.load_state_dict(_part(state, f"{kind}.{name}."))
                moments.merge(other)
        for name, dispersion in self.dispersions.items():
            theirs, own = _part(state, f"dispersion.{name}."), dispersion.state_dict()
            dispersion.load_state_dict({k: v if k == "reference" else own[k] + v for k, v in theirs.items()})


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)}
