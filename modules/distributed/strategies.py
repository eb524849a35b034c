"""One name for each way to train: sharded by FSDP2, a copy a device (DDP), or one device."""

from __future__ import annotations

import inspect
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from .fsdp2 import FSDP2Strategy, check_shard_size
from .precision import on_device, precision_plugin
from .trained_checkpoints import TrainedCheckpoints
from .watchdog import DEFAULT_TIMEOUT, WatchedProcesses

StrategyName = Literal["fsdp2", "ddp", "single"]


class ReplicatedStrategy(TrainedCheckpoints, WatchedProcesses, DDPStrategy):
    """DDP for modules with a frozen base: only what is trained is ever sent, at the start and as gradients.

    Where the whole base fits on each device this moves the least data. Every rank must build the same base, and buffers
    must be constants, as they are when all ranks read them from the same files.
    """

    def __init__(self, **options: Any) -> None:
        # By default DDP sends the whole base once, and its buffers in every forward. torch 2.13 renamed the latter.
        known = inspect.signature(DistributedDataParallel.__init__).parameters
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        super().__init__(init_sync=False, gradient_as_bucket_view=True, **{buffers: False}, **options)

    @override
    def configure_ddp(self) -> None:
        """Give all ranks the trained parameters of rank 0, then wrap the module."""
        assert self.model is not None
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                dist.broadcast(parameter.detach(), src=0)
        super().configure_ddp()


class OneDeviceStrategy(TrainedCheckpoints, SingleDeviceStrategy):
    """One device, with checkpoints that continue under the other strategies and theirs under this one."""

    @property
    @override
    def root_device(self) -> torch.device:
        return torch.device("cpu") if isinstance(self.accelerator, CPUAccelerator) else super().root_device

    @override
    def setup_environment(self) -> None:
        self.precision_plugin = on_device(self.precision_plugin, self.root_device)
        super().setup_environment()


def build_strategy(
    name: StrategyName,
    *,
    devices: int = 1,
    num_nodes: int = 1,
    precision: str | None = None,
    cpu_offload: bool = False,
    reshard_after_forward: bool = True,
    prefetch: int = 0,
    shard_size: int | None = None,
    sharded_checkpoints: bool = False,
    async_save: bool = False,
    timeout: timedelta = DEFAULT_TIMEOUT,
) -> Strategy:
    """The Lightning strategy of that name. A module trains alike under each, and their checkpoints are exchangeable.

    Args:
        name: ``"fsdp2"``, ``"ddp"`` or ``"single"``.
        devices: The Trainer's, on each node.
        num_nodes: The Trainer's.
        precision: As of :class:`FSDP2Strategy`.
        cpu_offload, reshard_after_forward, prefetch, shard_size: Of :class:`FSDP2Strategy`; only ``"fsdp2"`` has them.
        sharded_checkpoints, async_save: As of :class:`TrainedCheckpoints`.
        timeout: How long a collective may wait for the other ranks, more than 0; ``"single"`` has none.

    Raises:
        ValueError: If the strategy does not exist or has no such option, an option makes no sense, or ``"single"`` is
            to use several devices.
    """
    ranks = devices * num_nodes
    saving: dict[str, Any] = {"sharded_checkpoints": sharded_checkpoints, "async_save": async_save}
    if name == "fsdp2":
        strategy = FSDP2Strategy(
            precision=precision, cpu_offload=cpu_offload, reshard_after_forward=reshard_after_forward,
            prefetch=prefetch, shard_size=shard_size, timeout=timeout, **saving,
        )  # fmt: skip
        if ranks > 1:  # given, so check now, before the data is loaded; the strategy does when the Trainer starts
            check_shard_size(shard_size, num_nodes, devices)
        return strategy
    if name not in ("ddp", "single"):
        raise ValueError(f"strategy must be 'fsdp2', 'ddp' or 'single', got {name!r}.")
    only_fsdp2 = {
        "cpu_offload": cpu_offload,
        "reshard_after_forward=False": not reshard_after_forward,
        "prefetch": prefetch,
        "shard_size": shard_size,
    }
    for option, is_set in only_fsdp2.items():
        if is_set:
            raise ValueError(f"{option} is for strategy 'fsdp2': {name!r} shards nothing. Leave it out.")
    plugin = None if precision is None else precision_plugin(precision)
    if name == "ddp":
        return ReplicatedStrategy(precision_plugin=plugin, timeout=timeout, **saving)
    if ranks > 1:
        raise ValueError(
            f"strategy 'single' uses one device, not {ranks}. Set devices=1, or take 'ddp' where the "
            "model fits on each device and 'fsdp2' where it does not."
        )
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return OneDeviceStrategy(device=device, precision_plugin=plugin, **saving)
