"""The running average of the weights."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from radio_distill.errors import CheckpointError
from radio_distill.train.ema import Ema


class Net(nn.Module):
    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2, bias=False)
        self.register_buffer("direction", torch.tensor([1.0, 0.0]))
        self.register_buffer("count", torch.tensor(0))
        nn.init.constant_(self.linear.weight, value)


def test_the_average_follows_its_closed_form_and_buffers_are_copied() -> None:
    net = Net(1.0)
    ema = Ema(net, 0.9)
    for step in range(5):
        net.linear.weight.data.fill_(2.0)
        net.direction.copy_(torch.tensor([0.0, 1.0]))
        net.count.fill_(step)
        ema.update()
    state = ema.state_dict()
    torch.testing.assert_close(state["linear.weight"], torch.full((2, 2), 2.0 - 0.9**5))
    assert state["direction"].tolist() == [0.0, 1.0]
    assert state["count"].item() == 4


def test_the_average_of_bf16_weights_is_fp32_and_keeps_moving() -> None:
    net = Net(1.0).bfloat16()
    ema = Ema(net, 0.9996)
    net.linear.weight.data.fill_(2.0)
    for _ in range(10):
        ema.update()
    torch.testing.assert_close(ema.state_dict()["linear.weight"], torch.full((2, 2), 2.0 - 0.9996**10))


def test_a_saved_average_goes_on_in_another_process() -> None:
    ema, other = Ema(Net(3.0), 0.9), Ema(Net(), 0.9)
    other.load_state_dict(ema.state_dict())
    assert torch.equal(other.state_dict()["linear.weight"], torch.full((2, 2), 3.0))


def test_a_compiled_module_has_the_names_of_the_plain_one() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    net[0] = torch.compile(net[0], backend="eager")
    assert Ema(net, 0.9).state_dict().keys() == {"0.weight", "0.bias"}


def test_states_that_do_not_fit_are_refused() -> None:
    ema = Ema(Net(), 0.9)
    with pytest.raises(CheckpointError, match=r"missing \['count', 'direction'\] \(2\), unknown \['extra'\] \(1\)"):
        ema.load_state_dict({"linear.weight": torch.zeros(2, 2), "extra": torch.zeros(1)})
    wrong = {**ema.state_dict(), "linear.weight": torch.zeros(3, 2)}
    with pytest.raises(CheckpointError, match=r"linear.weight has shape \(3, 2\), the model has \(2, 2\)"):
        ema.load_state_dict(wrong)


def test_an_update_takes_as_many_operations_for_many_buffers_as_for_few() -> None:
    class Counted(TorchDispatchMode):
        operations = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.operations += not func.is_view and "detach" not in str(func)
            return func(*args, **(kwargs or {}))

    def operations(count: int) -> int:
        ema = Ema(nn.Sequential(*[Net() for _ in range(count)]), 0.9)
        with Counted() as seen:
            ema.update()
        return seen.operations

    assert operations(12) == operations(1)
