"""FSDP2 for QLoRA on Lightning: 4-bit bases really sharded, adapter-only checkpoints, resume on any number of ranks."""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision
from lightning.pytorch.plugins.precision import Precision as PrecisionPlugin
from lightning.pytorch.strategies import ModelParallelStrategy
from threadpoolctl import threadpool_limits
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_qlora.modules.capabilities import check_precision
from lightning_qlora.modules.nf4_linear import check_mixed_precision_policy


class FSDP2Strategy(ModelParallelStrategy):
    """Shards a LightningModule with FSDP2 (``torch.distributed.fsdp.fully_shard``) over all processes.

    The module builds its model in ``configure_model`` and calls :meth:`shard` there. With one process and no offload
    there is nothing to shard, and :meth:`shard` does nothing: the same script serves one device.

    Checkpoints hold what is trained and nothing of the frozen base, as full tensors under parameter names, so that they
    load on any number of ranks. They are single files, written by rank 0 through Lightning's atomic save.

    Args:
        precision: ``"32-true"``, ``"16-mixed"`` (with dynamic loss scaling; ``Trainer(precision="16-mixed")`` itself
            refuses strategies of this kind), ``"bf16-mixed"`` or ``"bf16-true"``. ``None`` leaves it to the Trainer.
        cpu_offload: Keep parameters, gradients and optimizer state in host memory; layers visit the GPU in turn.
        reshard_after_forward: Free each gathered layer after its forward and gather it again for its backward.
        mp_policy: FSDP2's own mixed-precision policy. The default reduces gradients in float32 and converts no
        parameter:
            the compute dtype comes from autocast, and 4-bit bytes must not be converted.
        timeout: How long a collective may wait for the other ranks.

    Raises:
        ValueError: For a precision that the hardware lacks.
    """

    def __init__(
        self,
        *,
        precision: str | None = None,
        cpu_offload: bool = False,
        reshard_after_forward: bool = True,
        mp_policy: MixedPrecisionPolicy | None = None,
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        super().__init__(
            data_parallel_size=1, tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=timeout
        )
        self.cpu_offload = cpu_offload
        self.reshard_after_forward = reshard_after_forward
        self.mp_policy = mp_policy or MixedPrecisionPolicy(param_dtype=None, reduce_dtype=torch.float32)
        self._sharded = False
        if precision is not None:
            self.precision_plugin = _precision_plugin(precision)

    # --- processes ---------------------------------------------------------------------------------------------------

    def setup_environment(self) -> None:
        """Start the process group: data parallel over all processes of all nodes, unlike Lightning's default mesh."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        if self.root_device.type == "cuda" and self.cpu_offload:
            # Offloaded parameters are reduced (gradient norm, checkpoints) where they rest, on the CPU.
            self._process_group_backend = "cpu:gloo,cuda:nccl"
        plugin = self.precision_plugin
        if isinstance(plugin, MixedPrecision) and plugin.device != self.root_device.type:
            self.precision_plugin = _precision_plugin(plugin.precision, self.root_device.type)
        assert self.cluster_environment is not None
        if self.local_rank > 0 and not self.cluster_environment.creates_processes_externally:
            _exit_with_parent()
        super().setup_environment()
        if self.root_device.type == "cpu":
            # Lightning shares the cores out among torch's threads; other OpenMP runtimes still take them all.
            threadpool_limits(torch.get_num_threads(), user_api="openmp")
        atexit.register(_end_process_group)

    @property
    def mesh(self) -> DeviceMesh:
        """The one-dimensional mesh that parameters are sharded over."""
        return self.device_mesh["data_parallel"]

    # --- the model ---------------------------------------------------------------------------------------------------

    def shard(self, root: nn.Module, groups: Sequence[Sequence[nn.Module]]) -> None:
        """Apply ``fully_shard`` to each group of modules, then to ``root`` for what is left. Call in
        ``configure_model``.

        Args:
            root: The module whose ``forward`` training calls, on the meta device or materialized.
            groups: Modules gathered together, in the order in which forward uses them.

        Raises:
            ValueError: If the mixed-precision policy would convert packed 4-bit weights.
        """
        check_mixed_precision_policy(root, self.mp_policy)
        self._sharded = True
        if self.world_size == 1 and not self.cpu_offload:
            return
        offload: OffloadPolicy = OffloadPolicy()
        if self.cpu_offload:
            offload = CPUOffloadPolicy(pin_memory=self.root_device.type == "cuda")
        options: dict[str, Any] = {"mesh": self.mesh, "mp_policy": self.mp_policy, "offload_policy": offload}
        for group in groups:
            fully_shard(list(group), reshard_after_forward=self.reshard_after_forward, **options)
        fully_shard(root, **options)

    @property
    def parameters_device(self) -> torch.device:
        """Where parameters rest between uses: the rank's device, or the CPU with ``cpu_offload``."""
        return torch.device("cpu") if self.cpu_offload else self.root_device

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

    def model_to_device(self) -> None:
        """Move the module, except the parameters that FSDP2 keeps on the CPU."""
        assert self.model is not None
        if not self.cpu_offload:
            super().model_to_device()
            return
        for module in self.model.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, buffer.to(self.root_device))

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Full tensors, on CPU, of the trained parameters; empty on ranks other than 0. All ranks must call it."""
        assert self.model is not None
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        state = get_model_state_dict(self.model, options=options)
        trained = self._trained_names()
        return {name: tensor for name, tensor in state.items() if name in trained}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Full optimizer state, keyed by parameter name; empty on ranks other than 0. All ranks must call it."""
        assert self.model is not None
        optimizer = getattr(optimizer, "optimizer", optimizer)  # unwrap LightningOptimizer
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return dict(get_optimizer_state_dict(self.model, optimizer, options=options))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint of any number of ranks into the sharded module and its optimizers.

        Raises:
            ValueError: If the file is missing, damaged, partial, or made for a module with other trained parameters.
        """
        assert self.model is not None
        checkpoint = read_checkpoint(self.broadcast(checkpoint_path))
        shapes = {name: tuple(p.shape) for name, p in self.model.named_parameters() if p.requires_grad}
        check_state(checkpoint["state_dict"], shapes, checkpoint_path)
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_model_state_dict(self.model, checkpoint["state_dict"], options=options)
        for optimizer, state in zip(self.optimizers, checkpoint.get("optimizer_states", []), strict=False):
            set_optimizer_state_dict(self.model, optimizer, optim_state_dict=state, options=options)
        return checkpoint

    def _trained_names(self) -> set[str]:
        assert self.model is not None
        return {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint file onto the CPU.

    Raises:
        ValueError: If there is no such file, or it is truncated or not a training checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no checkpoint {path}.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types for a damaged archive
        others = sorted(other.name for other in path.parent.glob("*.ckpt") if other != path)
        hint = f"Others in {path.parent}: {', '.join(others)}." if others else "There is no other one beside it."
        raise ValueError(
            f"Checkpoint {path} is damaged or incomplete ({type(error).__name__}: {error}). {hint}"
        ) from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "optimizer_states", "loops"} <= set(checkpoint):
        raise ValueError(f"{path} is no training checkpoint of a Lightning Trainer: parts are missing.")
    return checkpoint


def check_state(state: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]], source: str | Path) -> None:
    """Check that ``state`` holds exactly the parameters in ``shapes``.

    Raises:
        ValueError: Naming the first parameter that is missing, unexpected, or of another shape.
    """
    remedy = "It was made for another model or LoRA configuration, or is incomplete."
    for name in sorted(shapes.keys() - state.keys()):
        raise ValueError(f"Checkpoint {source} lacks parameter {name!r}. {remedy}")
    for name in sorted(state.keys() - shapes.keys()):
        raise ValueError(f"Checkpoint {source} holds parameter {name!r}, which the model does not train. {remedy}")
    for name, shape in shapes.items():
        if tuple(state[name].shape) != shape:
            raise ValueError(
                f"Checkpoint {source}: {name!r} has shape {tuple(state[name].shape)}, the model {shape}. {remedy}"
            )


def _precision_plugin(precision: str, device: str | None = None) -> PrecisionPlugin:
    checked = check_precision(precision)
    if checked == "16-mixed" or checked == "bf16-mixed":
        return MixedPrecision(checked, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return HalfPrecision(checked) if checked == "bf16-true" else PrecisionPlugin()


def _is_sharded(parameter: torch.Tensor, world_size: int) -> bool:
    return (
        isinstance(parameter, DTensor)
        and parameter.device_mesh.size() == world_size
        and any(placement.is_shard() for placement in parameter.placements)
    )


def _end_process_group() -> None:
    # Not in teardown(): what was trained can still be gathered and saved after fit() has returned.
    if dist.is_initialized():
        with suppress(RuntimeError):
            dist.destroy_process_group()


def _exit_with_parent() -> None:
    """End this process when the one that launched it (rank 0) is gone.

    Rank 0 watches the processes it launched, but nobody watches rank 0: after a SIGKILL the others would wait in a
    collective until its timeout.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        with suppress(OSError):
            print(f"Rank {os.environ.get('LOCAL_RANK')}: the main process (pid {parent}) is gone; exiting.", flush=True)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def all_reduce_sum(values: Sequence[float], device: torch.device) -> list[float]:
    """Sum a few numbers over all ranks in float64; the numbers themselves when there is one process."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return [float(value) for value in tensor.tolist()]
