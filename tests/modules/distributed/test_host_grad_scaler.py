"""A loss on one device, gradients on the CPU: scale, overflow, state. A "meta" tensor stands in for a loss on a GPU."""

import pytest
import torch
from torch import Tensor, nn

from lightning_qlora.modules.distributed.host_grad_scaler import HostGradScaler


def backward(parameter: Tensor, scaled_gradient: float) -> None:
    parameter.grad = torch.full_like(parameter, scaled_gradient)


@pytest.fixture
def weight() -> nn.Parameter:
    return nn.Parameter(torch.zeros(3))


def test_the_numbers_stay_where_gradients_are(weight):
    scaler, optimizer = HostGradScaler(init_scale=8.0), torch.optim.SGD([weight], lr=1.0)
    assert scaler.scale(torch.ones((), device="meta")).device.type == "meta"
    backward(weight, 8 * 0.25)
    scaler.unscale_(optimizer)
    assert weight.grad.tolist() == [0.25] * 3
    scaler.step(optimizer)
    scaler.update()
    assert weight.tolist() == [-0.25] * 3

    usual = torch.amp.GradScaler("cpu", init_scale=8.0)  # follows the loss: "meta" has no numbers
    usual.scale(torch.ones((), device="meta"))
    with pytest.raises((RuntimeError, NotImplementedError)):
        usual.unscale_(torch.optim.SGD([weight], lr=1.0))


def test_an_overflow_skips_the_step_and_halves_the_scale(weight):
    scaler, optimizer = HostGradScaler(init_scale=8.0), torch.optim.SGD([weight], lr=1.0)
    loss = torch.tensor(3.0)
    assert scaler.scale(loss) == 24
    backward(weight, float("inf"))
    scaler.step(optimizer)
    scaler.update()
    assert weight.tolist() == [0.0] * 3
    assert scaler.get_scale() == 4
    assert scaler.scale(loss) == 12


def test_the_loss_keeps_its_gradient(weight):
    scaler = HostGradScaler(init_scale=8.0)
    scaler.scale((weight + 1).sum()).backward()
    assert weight.grad.tolist() == [8.0] * 3


def test_it_goes_on_from_another_scaler():
    other = torch.amp.GradScaler("cpu", init_scale=32.0, growth_interval=7)
    other.scale(torch.ones(()))
    assert HostGradScaler.like(other).state_dict() == other.state_dict()
    off = HostGradScaler.like(torch.amp.GradScaler("cpu", enabled=False))
    assert off.scale(torch.tensor(3.0)) == 3
