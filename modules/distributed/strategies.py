"""One name for each way to train: sharded by FSDP2, a copy on each device (DDP), or one device.

All of them offer a module the same two things in ``configure_model``: ``shard(root, groups)``, which does nothing where
nothing is sharded, and ``parameters_device``, where parameters rest between uses.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from ..hardware import PrecisionChoice, check_devices, check_precision, check_precision_name
from ..options import at_least
from .fsdp2 import FSDP2Strategy, check_shard_size, check_sharding
from .precision import on_device, precision_plugin
from .trained_checkpoints import CheckpointOptions, TrainedCheckpoints
from .watchdog import WatchedProcesses

StrategyName = Literal["fsdp2", "ddp", "single"]

#: What ``--strategy`` takes: a strategy, or ``"auto"`` for the one that a memory plan finds faster.
StrategyChoice = Literal["auto", StrategyName]


@dataclass(frozen=True)
class StrategyOptions:
    """Devices, precision and sharding.

    Args:
        strategy: fsdp2 shards the 4-bit base over all GPUs. ddp keeps a copy of it on each GPU, which is faster where
            it fits. single trains on one device. auto takes ddp where its copy fits without much recomputation, else
            fsdp2, and says why.
        devices: GPUs per node; on a machine without GPUs, processes on the CPU.
        num_nodes: Number of machines. Start the same command on each of them with torchrun.
        precision: auto takes bf16-mixed on GPUs with bf16 arithmetic, 16-mixed on older ones, and 32-true on the CPU.
        offload: Keep sharded weights and optimizer state in host memory (fsdp2).
        reshard_after_forward: Free each gathered layer between its forward and its backward, which gathers it again
            (fsdp2).
        prefetch: Layers to gather ahead of the one that computes. 0 leaves it to FSDP2, which gathers one (fsdp2).
        shard_size: GPUs that share one copy of the base (hybrid sharding). Default: all of them (fsdp2).
        timeout_minutes: Minutes that a rank waits for the others before it gives up.

    Raises:
        ValueError: For values out of range, options that the strategy does not have, several devices for ``"single"``,
            or a ``shard_size`` that does not divide the number of ranks.
    """

    strategy: StrategyChoice = "fsdp2"
    devices: int = 1
    num_nodes: int = 1
    precision: PrecisionChoice = "auto"
    offload: bool = False
    reshard_after_forward: bool = True
    prefetch: int = 0
    shard_size: int | None = None
    timeout_minutes: int = 30

    def __post_init__(self) -> None:
        if self.strategy not in ("auto", *get_args(StrategyName)):
            raise ValueError(f"strategy must be 'auto', 'fsdp2', 'ddp' or 'single', got {self.strategy!r}.")
        at_least(1, devices=self.devices, num_nodes=self.num_nodes, timeout_minutes=self.timeout_minutes)
        check_precision_name(self.precision)
        if self.strategy in ("auto", "fsdp2"):
            check_sharding(self.prefetch, self.shard_size)
            if self.world_size > 1:
                check_shard_size(self.shard_size, self.num_nodes, self.devices)
            return
        for option in self.sharding_options:
            raise ValueError(f"{option} is for strategy 'fsdp2': {self.strategy!r} shards nothing. Leave it out.")
        if self.strategy == "single" and self.world_size > 1:
            raise ValueError(
                f"strategy 'single' uses one device, not {self.world_size}. Set devices=1, or take 'ddp' where the "
                "model fits on each device and 'fsdp2' where it does not."
            )

    @property
    def sharding_options(self) -> list[str]:
        """The options that are set and that FSDP2 alone has."""
        options = {
            "offload": self.offload,
            "reshard_after_forward=False": not self.reshard_after_forward,
            "prefetch": self.prefetch,
            "shard_size": self.shard_size,
        }
        return [option for option, is_set in options.items() if is_set]

    @property
    def world_size(self) -> int:
        """The number of ranks, each of them a process with its device."""
        return self.devices * self.num_nodes

    def check(self) -> StrategyOptions:
        """Check that this machine has these devices and that they compute in this precision.

        Returns:
            These options, with a precision in place of ``"auto"``.

        Raises:
            ValueError: As :func:`check_devices` and :func:`check_precision`.
        """
        check_devices(self.devices, self.num_nodes)
        return dataclasses.replace(self, precision=check_precision(self.precision))


class WholeModel(Strategy):
    """Mixin for strategies that shard nothing, so that a module treats every strategy alike."""

    def shard(self, root: nn.Module, groups: Sequence[Sequence[nn.Module]]) -> None:
        """Do nothing: the whole model is on each device. For the arguments see :meth:`FSDP2Strategy.shard`."""

    @property
    def parameters_device(self) -> torch.device:
        """Where parameters rest between uses: the rank's device."""
        return self.root_device


class ReplicatedStrategy(WholeModel, TrainedCheckpoints, WatchedProcesses, DDPStrategy):
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


class OneDeviceStrategy(WholeModel, TrainedCheckpoints, SingleDeviceStrategy):
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
    options: StrategyOptions, checkpoints: CheckpointOptions | None = None
) -> FSDP2Strategy | ReplicatedStrategy | OneDeviceStrategy:
    """The Lightning strategy for these options. Modules train alike under all, and checkpoints are exchangeable.

    The strategy brings the precision: leave the Trainer's at its default. For a precision plugin of your own, build a
    strategy of these classes by itself and give the plugin to the Trainer.

    Args:
        options: Its ``devices`` and ``num_nodes`` must be the Trainer's.
        checkpoints: How checkpoints are written; default ``CheckpointOptions()``. When they are is up to a callback.

    Raises:
        ValueError: For a precision that the hardware lacks, or ``"auto"``, which a memory plan replaces.
    """
    if options.strategy == "auto":
        raise ValueError("strategy='auto' needs a memory plan: pass the options that plan_run() returns.")
    timeout = timedelta(minutes=options.timeout_minutes)
    checkpoints = checkpoints or CheckpointOptions()
    saving: dict[str, Any] = {
        "sharded_checkpoints": checkpoints.sharded_checkpoints,
        "async_save": checkpoints.async_save,
    }
    if options.strategy == "fsdp2":
        return FSDP2Strategy(
            precision=options.precision,
            cpu_offload=options.offload,
            reshard_after_forward=options.reshard_after_forward,
            prefetch=options.prefetch,
            shard_size=options.shard_size,
            timeout=timeout,
            **saving,
        )
    plugin = precision_plugin(options.precision)
    if options.strategy == "ddp":
        return ReplicatedStrategy(precision_plugin=plugin, timeout=timeout, **saving)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return OneDeviceStrategy(device=device, precision_plugin=plugin, **saving)
