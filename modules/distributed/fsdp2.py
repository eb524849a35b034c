"""FSDP2 for QLoRA on Lightning: 4-bit bases really sharded, adapter-only checkpoints, resume on any number of ranks."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from typing_extensions import override

from .host_grad_scaler import HostGradScaler
from .precision import precision_plugin
from .trained_checkpoints import TrainedCheckpoints
from .watchdog import DEFAULT_TIMEOUT, WatchedProcesses


class FSDP2Strategy(TrainedCheckpoints, WatchedProcesses, ModelParallelStrategy):
    """Shards a LightningModule with FSDP2 (``torch.distributed.fsdp.fully_shard``) over all processes of all nodes.

    The module builds its model in ``configure_model`` and calls :meth:`shard` there. With one process and no offload
    there is nothing to shard, and :meth:`shard` does nothing: the same script serves one device.

    Micro-batches that only accumulate gradients reduce nothing. Until the last one, each rank then holds the whole
    gradients of the trained parameters (0.6 GiB for rank 64 adapters of an 8B Llama, shared among the ranks otherwise).

    Args:
        precision: ``"32-true"``, ``"16-mixed"`` (with dynamic loss scaling; ``Trainer(precision="16-mixed")`` itself
            refuses strategies of this kind), ``"bf16-mixed"``, ``"bf16-true"``, or ``"auto"`` for what the hardware
            does best. ``None`` leaves it to the Trainer.
        cpu_offload: Keep parameters, gradients and optimizer state in host memory; layers visit the GPU in turn.
        reshard_after_forward: Free each gathered layer after its forward and gather it again for its backward.
        prefetch: Groups to gather ahead of the one that computes, each held in memory meanwhile. 0 leaves it to FSDP2,
            which gathers one ahead: in forward as early as the host comes to it, in backward before it is needed.
        shard_size: Ranks that share one copy of the model (hybrid sharding); copies only exchange gradients. It must
            divide the number of ranks; that of one node keeps the gathers inside nodes. Default: all ranks.
        reduce_every_micro_batch: Reduce gradients in accumulating micro-batches too: more traffic, less memory.
        mp_policy: FSDP2's own mixed-precision policy. The default reduces gradients in float32 and converts no
            parameter: the compute dtype comes from autocast, and 4-bit bytes must not be converted.
        sharded_checkpoints, async_save: As of :class:`TrainedCheckpoints`.
        timeout: How long a collective may wait for the other ranks.

    Raises:
        ValueError: For a precision that the hardware lacks, or a size or timeout that makes no sense.
    """

    def __init__(
        self,
        *,
        precision: str | None = None,
        cpu_offload: bool = False,
        reshard_after_forward: bool = True,
        prefetch: int = 0,
        shard_size: int | None = None,
        reduce_every_micro_batch: bool = False,
        mp_policy: MixedPrecisionPolicy | None = None,
        sharded_checkpoints: bool = False,
        async_save: bool = False,
        timeout: timedelta = DEFAULT_TIMEOUT,
    ) -> None:
        super().__init__(
            data_parallel_size=1,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            sharded_checkpoints=sharded_checkpoints,
            async_save=async_save,
            timeout=timeout,
        )
        check_sharding(prefetch, shard_size)
        self.cpu_offload = cpu_offload
        self.reshard_after_forward = reshard_after_forward
        self.prefetch = prefetch
        self.shard_size = shard_size
        self.reduce_every_micro_batch = reduce_every_micro_batch
        self.mp_policy = mp_policy or MixedPrecisionPolicy(param_dtype=None, reduce_dtype=torch.float32)
        self._mesh: DeviceMesh | None = None
        if precision is not None:
            self.precision_plugin = precision_plugin(precision)

    # --- processes ---------------------------------------------------------------------------------------------------

    @override
    def setup_environment(self) -> None:
        """Start the process group: data parallel over all processes of all nodes, unlike Lightning's default mesh.

        Raises:
            ValueError: If ``shard_size`` does not divide the number of ranks.
        """
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        check_shard_size(self.shard_size, self.num_nodes, self.num_processes)
        if self.root_device.type == "cuda" and self.cpu_offload:
            # Offloaded parameters are reduced (gradient norm, checkpoints) where they rest, on the CPU.
            self._process_group_backend = "cpu:gloo,cuda:nccl"
        super().setup_environment()
        scaler = getattr(self.precision_plugin, "scaler", None)
        if self.root_device.type == "cuda" and self.cpu_offload and scaler is not None:
            self.precision_plugin.scaler = HostGradScaler.like(scaler)  # type: ignore[attr-defined]
        self._mesh = self.device_mesh["data_parallel"]
        if self.shard_size not in (None, self.world_size):
            shape = (self.world_size // self.shard_size, self.shard_size)
            self._mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=("replicate", "shard"))

    @property
    def mesh(self) -> DeviceMesh:
        """What parameters are sharded over: all ranks, or with ``shard_size`` (replicate, shard)."""
        if self._mesh is None:
            raise RuntimeError("There is no mesh before the Trainer has set up the processes.")
        return self._mesh

    # --- the model ---------------------------------------------------------------------------------------------------

    def shard(self, root: nn.Module, groups: Sequence[Sequence[nn.Module]]) -> None:
        """Apply ``fully_shard`` to each group of modules, then to ``root`` for what is left. Call in
        ``configure_model``.

        Args:
            root: The module whose ``forward`` training calls, on the meta device or materialized.
            groups: Modules gathered together, in the order in which forward uses them.

        Raises:
            ValueError: If a module refuses the mixed-precision policy, e.g. because it would convert packed 4-bit
                weights. A module is asked by its method ``check_mixed_precision_policy(policy)``, if it has one.
        """
        _check_mixed_precision_policy(root, self.mp_policy)
        if self.world_size == 1 and not self.cpu_offload:
            return
        offload: OffloadPolicy = OffloadPolicy()
        if self.cpu_offload:
            offload = CPUOffloadPolicy(pin_memory=self.root_device.type == "cuda")
        options: dict[str, Any] = {"mesh": self.mesh, "mp_policy": self.mp_policy, "offload_policy": offload}
        for group in groups:
            # Backward begins where forward ends, and would gather the last group again at once: a frozen head stays.
            # (A trained one does not: after validation its unsharded parameters would stand in the module.)
            stays = group is groups[-1] and not _is_trained(group)
            fully_shard(list(group), reshard_after_forward=self.reshard_after_forward and not stays, **options)
        fully_shard(root, **options)
        _set_prefetch(root, groups, self.prefetch)

    @property
    def parameters_device(self) -> torch.device:
        """Where parameters rest between uses: the rank's device, or the CPU with ``cpu_offload``."""
        return torch.device("cpu") if self.cpu_offload else self.root_device

    @override
    def setup(self, trainer: L.Trainer) -> None:
        """As Lightning's, after checking that every trained parameter really is sharded over all ranks.

        Raises:
            RuntimeError: If one is not: its gradient would silently not be summed over the ranks.
        """
        assert self.model is not None
        if self.world_size > 1:
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad and not _is_sharded(parameter, self.world_size):
                    raise RuntimeError(
                        f"Parameter {name!r} is trained but not sharded over the {self.world_size} ranks. Call "
                        "`self.trainer.strategy.shard(model, groups)` in configure_model()."
                    )
        super().setup(trainer)

    @override
    def model_to_device(self) -> None:
        """Move the module, except the parameters that FSDP2 keeps on the CPU."""
        assert self.model is not None
        if not self.cpu_offload:
            super().model_to_device()
            return
        for module in self.model.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, buffer.to(self.root_device))

    @contextmanager
    @override
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Lightning runs the micro-batches that only accumulate in here: their gradients are summed on each rank."""
        assert self.model is not None
        sharded = [module for module in self.model.modules() if isinstance(module, FSDPModule)]
        for module in sharded:
            module.set_requires_gradient_sync(self.reduce_every_micro_batch, recurse=False)
        try:
            yield
        finally:
            for module in sharded:
                module.set_requires_gradient_sync(True, recurse=False)


def check_sharding(prefetch: int, shard_size: int | None) -> None:
    """Check what can be checked before the number of ranks is known.

    Raises:
        ValueError: For a negative ``prefetch``, or a ``shard_size`` below 2.
    """
    if prefetch < 0:
        raise ValueError(f"prefetch must not be negative, got {prefetch}. Use 0 for FSDP2's own.")
    if shard_size is not None and shard_size < 2:
        raise ValueError(f"shard_size must be at least 2, got {shard_size}. To shard nothing, use DDP.")


def check_shard_size(shard_size: int | None, num_nodes: int, devices: int) -> None:
    """Check that ranks, ``devices`` on each of ``num_nodes``, hold whole copies of ``shard_size`` parts each.

    Raises:
        ValueError: If ``shard_size`` does not divide the number of ranks.
    """
    ranks = num_nodes * devices
    if shard_size is not None and ranks % shard_size:
        raise ValueError(
            f"shard_size={shard_size} does not divide the {ranks} ranks ({num_nodes} nodes of {devices}). Choose a "
            "divisor, usually the devices of a node."
        )


def _check_mixed_precision_policy(root: nn.Module, policy: MixedPrecisionPolicy) -> None:
    """Ask every module that has an opinion, before any is sharded."""
    for name, module in root.named_modules():
        check = getattr(module, "check_mixed_precision_policy", None)
        if check is None:
            continue
        try:
            check(policy)
        except ValueError as error:
            raise ValueError(f"{name or type(module).__name__}: {error}") from error


def _set_prefetch(root: nn.Module, groups: Sequence[Sequence[nn.Module]], ahead: int) -> None:
    """Gather ``ahead`` groups before they are needed, in the order of ``groups`` and back; 0 leaves it to FSDP2."""
    sharded: list[FSDPModule] = [group[0] for group in groups if isinstance(group[0], FSDPModule)]
    first = next((i for i, group in enumerate(groups) if _is_trained(group)), 0)
    if ahead:
        assert isinstance(root, FSDPModule)
        root.set_modules_to_forward_prefetch(sharded[:ahead])
        for i, module in enumerate(sharded):
            module.set_modules_to_forward_prefetch(sharded[i + 1 : i + 1 + ahead])
            module.set_modules_to_backward_prefetch(sharded[max(first, i - ahead) : i][::-1])
    if first > 0:
        # What comes before is frozen (the embedding) and has no backward, yet FSDP2 would gather it, for an empty list
        # means its default. This group is there already, so that nothing is gathered.
        sharded[first].set_modules_to_backward_prefetch([sharded[first]])


def _is_trained(group: Sequence[nn.Module]) -> bool:
    return any(parameter.requires_grad for module in group for parameter in module.parameters())


def _is_sharded(parameter: torch.Tensor, world_size: int) -> bool:
    return (
        isinstance(parameter, DTensor)
        and parameter.device_mesh.size() == world_size
        and any(placement.is_shard() for placement in parameter.placements)
    )
