"""AdamW, norms and scaling on shards against torch's own on whole tensors."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.optim import AdamW

from lightning_qlora.modules.training.optimizer import ShardAdamW, global_norm, gradients, scale_
from tests.distributed import RankPools, groups

SHAPES = [(7, 5), (2, 3), (1, 4), (64,)]  # three ranks: rows that do not divide, and ranks without any


def values(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()


def check_steps(device: str, mesh_shape: tuple[int, ...]) -> None:
    """Steps, clipping and a state that goes to torch's AdamW and back, with one parameter that gets no gradient."""
    mesh = init_device_mesh(device, mesh_shape)
    placements = [Replicate()] * (len(mesh_shape) - 1) + [Shard(0)]

    def shard(tensor: Tensor) -> DTensor:
        return distribute_tensor(tensor.to(device), mesh, placements)

    options: dict[str, Any] = {"lr": 0.1, "betas": (0.8, 0.95), "weight_decay": 0.1}
    ours = [nn.Parameter(shard(value)) for value in values(0)]
    theirs = [nn.Parameter(value) for value in values(0)]
    optimizer, reference = ShardAdamW(ours, **options), AdamW(theirs, **options)
    for step in range(4):
        for mine, other, value in zip(ours[:-1], theirs[:-1], values(step + 1), strict=False):
            mine.grad, other.grad = shard(value), value
        norm = global_norm(gradients(optimizer))
        assert not isinstance(norm, DTensor)
        scale_(gradients(optimizer), 3.0)
        scale_(gradients(optimizer), 1 / (3 * norm))
        expected = nn.utils.clip_grad_norm_(theirs, 1e-12)
        torch.testing.assert_close(norm.cpu(), expected)
        for parameter in theirs[:-1]:
            parameter.grad *= 1e12
        optimizer.step()
        reference.step()
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(whole(mine), other.detach(), rtol=1e-5, atol=1e-6)
        if step == 1:  # as after a checkpoint: torch leaves the step count on the CPU
            state = copy.deepcopy(optimizer.state_dict())
            for entry in state["state"].values():
                assert set(entry) == {"step", "exp_avg", "exp_avg_sq"}
                assert isinstance(entry["exp_avg"], DTensor)
                assert entry["exp_avg"].placements == tuple(placements)
                entry["step"] = entry["step"].cpu()
            optimizer = ShardAdamW(ours, **options)
            optimizer.load_state_dict(state)
    for mine, other in zip(ours[:-1], theirs[:-1], strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(whole(optimizer.state[mine][key]), reference.state[other][key])
        assert optimizer.state[mine]["step"] == reference.state[other]["step"] == 4


@pytest.mark.parametrize(("world_size", "device"), [*groups(1), *groups(2), *groups(3)])
def test_shards_are_updated_as_whole_tensors_are(ranks: RankPools, world_size: int, device: str) -> None:
    ranks.run(world_size, device, check_steps, device, (world_size,))


@pytest.mark.parametrize(("world_size", "device"), groups(2))
def test_copies_are_not_counted_twice(ranks: RankPools, world_size: int, device: str) -> None:
    """As in hybrid sharding, here of two copies in one shard each."""
    ranks.run(world_size, device, check_steps, device, (2, 1))


def test_plain_parameters_need_no_process_group() -> None:
    assert not dist.is_initialized()
    parameter = nn.Parameter(torch.ones(3))
    optimizer = ShardAdamW([parameter], lr=0.5, weight_decay=0.0)

    def closure() -> float:
        optimizer.zero_grad()
        loss = (parameter * torch.tensor([1.0, -2.0, 2.0])).sum()
        loss.backward()
        return float(loss)

    assert optimizer.step(closure) == 1.0
    assert global_norm(gradients(optimizer)) == 3.0
    torch.testing.assert_close(parameter.detach(), torch.tensor([0.5, 1.5, 0.5]))


def test_steps_are_counted_whatever_the_default_dtype() -> None:
    """bfloat16 counts to 256; Lightning's ``bf16-true`` makes it the default while it calls a user's step."""
    parameter = nn.Parameter(torch.ones(3))
    optimizer = ShardAdamW([parameter])
    parameter.grad = torch.ones(3)
    torch.set_default_dtype(torch.bfloat16)
    try:
        for _ in range(258):
            optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert optimizer.state[parameter]["step"] == 258


def test_a_state_of_adamw_loads_and_the_other_way_round() -> None:
    def train(first: type[AdamW], second: type[AdamW]) -> Tensor:
        parameter = nn.Parameter(torch.ones(3))
        optimizer = first([parameter], lr=0.5)
        for step in range(6):
            if step == 3:
                state = optimizer.state_dict()
                optimizer = second([parameter])
                optimizer.load_state_dict(state)
            parameter.grad = torch.tensor([1.0, -2.0, 0.1 * step])
            optimizer.step()
        return parameter.detach()

    expected = train(AdamW, AdamW)
    torch.testing.assert_close(train(AdamW, ShardAdamW), expected)
    torch.testing.assert_close(train(ShardAdamW, AdamW), expected)


def test_a_loss_scaler_unscales_before_clipping() -> None:
    """``AdamW(fused=True)`` would unscale inside its step, so that clipping would see scaled gradients."""
    parameter = nn.Parameter(torch.ones(2))
    optimizer, scaler = ShardAdamW([parameter]), torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale((parameter * 2).sum()).backward()
    scaler.unscale_(optimizer)
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [2.0, 2.0]
    scaler.step(optimizer)
    assert optimizer.state[parameter]["exp_avg"].tolist() == pytest.approx([0.2, 0.2])
