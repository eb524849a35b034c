"""AdamW and gradient norms on the shards that a rank holds.

An elementwise update needs no communication, yet each operation on a list of DTensors is dispatched tensor by tensor:
for a few hundred small adapters that costs more than the update itself, and a norm over them is an all-reduce each. So
these functions take the local shards, a list at a time, and communicate once at most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer
from torch.optim.adamw import adamw
from typing_extensions import override

from ..dtensor import local_tensor


class ShardAdamW(AdamW):
    """``torch.optim.AdamW`` by its fused kernel on each rank's own shards; the same thing for plain parameters.

    Its state has AdamW's keys, as DTensors where the parameters are, so that checkpoints of either optimizer load into
    the other. Unlike ``AdamW(fused=True)`` it leaves unscaling to ``GradScaler.unscale_``, before clipping.

    Args:
        params: Parameters of one floating-point dtype and device, or groups of them.
        lr: Learning rate.
        betas: Decay of the running means of the gradient and of its square.
        eps: Added to the root of the mean square.
        weight_decay: Share of ``lr`` by which parameters shrink in a step.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay)

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient. Returns ``closure``'s loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            rows: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = []
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                elif state["step"].device != parameter.device:  # loaded from a checkpoint
                    state["step"] = state["step"].to(parameter.device)
                shard = local_tensor(parameter)
                if shard.numel() > 0:  # the last ranks may hold no row of a small parameter
                    mean, square = local_tensor(state["exp_avg"]), local_tensor(state["exp_avg_sq"])
                    rows.append((shard, local_tensor(parameter.grad), mean, square, state["step"]))
                else:
                    state["step"] += 1
            if rows:
                shards, gradients, means, squares, steps = map(list, zip(*rows, strict=True))
                beta1, beta2 = group["betas"]
                adamw(
                    shards, gradients, means, squares, [], steps, fused=True, amsgrad=False, beta1=beta1, beta2=beta2,
                    lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
                )  # fmt: skip
        return loss


def gradients(optimizer: Optimizer) -> list[Tensor]:
    """The gradients of what ``optimizer`` trains, as far as there are any; DTensors where parameters are sharded.

    To look for them in the module takes milliseconds a step (8B), in which the device has nothing to do.
    """
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


@torch.no_grad()
def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norm over all elements of all ``tensors``, 0-dim, equal on all ranks; all ranks must call it.

    Args:
        tensors: On one device; plain, or sharded over one mesh dimension (and perhaps replicated over another).
    """
    norm = torch.nn.utils.get_total_norm([local_tensor(tensor) for tensor in tensors])
    for tensor in tensors:
        if isinstance(tensor, DTensor):
            squared = norm.square()
            for dimension, placement in enumerate(tensor.placements):
                if placement.is_shard():
                    dist.all_reduce(squared, group=tensor.device_mesh.get_group(dimension))
            return squared.sqrt()
    return norm


@torch.no_grad()
def scale_(tensors: Sequence[Tensor], factor: float | Tensor) -> None:
    """Multiply all ``tensors`` in place by ``factor``, a number or a 0-dim tensor, in one launch."""
    if tensors:
        # No public function multiplies a list of tensors; torch's own gradient clipping is made of this one.
        torch._foreach_mul_([local_tensor(tensor) for tensor in tensors], factor)
