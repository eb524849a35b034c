"""What the hardware at hand can do: the one place that answers it, and the names that skips and fallbacks quote."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from .environment import environment, gpus_of_driver

Precision = Literal["32-true", "16-mixed", "bf16-mixed", "bf16-true"]

#: What ``--precision`` takes: a precision, or ``"auto"`` for :func:`default_precision`.
PrecisionChoice = Literal["auto", Precision]

#: First compute capability with bf16 arithmetic. ``torch.cuda.is_bf16_supported()`` also counts emulation and so
#: answers yes on a T4 (7.5), where bf16 matrix products are many times slower than fp16 ones.
BF16_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Capabilities:
    """What one device can do.

    Attributes:
        device_type: ``"cuda"`` or ``"cpu"``.
        name: The device's own name, e.g. ``"Tesla T4"``.
        compute_capability: ``(major, minor)`` of a CUDA device, else ``None``.
        memory_bytes: Device memory of a CUDA device; physical host memory on CPU.
        bf16: Whether bf16 arithmetic is native (CUDA) or at least not refused (CPU).
    """

    device_type: Literal["cuda", "cpu"]
    name: str
    compute_capability: tuple[int, int] | None
    memory_bytes: int
    bf16: bool


def capabilities(index: int = 0) -> Capabilities:
    """Describe CUDA device ``index``, or the CPU where there is no CUDA device."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        return Capabilities("cuda", properties.name, capability, properties.total_memory, capability >= BF16_CAPABILITY)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Capabilities("cpu", "cpu", None, memory, True)


def default_precision() -> Precision:
    """The fastest precision that is safe on all devices: ``bf16-mixed`` or ``16-mixed`` on GPUs, ``32-true`` on CPU."""
    if capabilities().device_type == "cpu":
        return "32-true"
    bf16 = all(capabilities(index).bf16 for index in range(torch.cuda.device_count()))
    return "bf16-mixed" if bf16 else "16-mixed"


def check_precision_name(precision: str) -> None:
    """Check that ``precision`` is a :data:`PrecisionChoice`, whatever the hardware.

    Raises:
        ValueError: If it is not.
    """
    if precision not in get_args(PrecisionChoice):
        raise ValueError(f"Unknown precision {precision!r}. Choose auto or one of {', '.join(get_args(Precision))}.")


def check_precision(precision: str) -> Precision:
    """Return ``precision`` if every visible device can compute in it; for ``"auto"`` :func:`default_precision`.

    Raises:
        ValueError: For an unknown precision, or bf16 on a GPU without bf16 arithmetic (compute capability < 8.0).
    """
    check_precision_name(precision)
    if precision == "auto":
        return default_precision()
    if precision.startswith("bf16"):
        for index in range(torch.cuda.device_count()):
            device = capabilities(index)
            if device.compute_capability is not None and not device.bf16:
                major, minor = device.compute_capability
                raise ValueError(
                    f"precision={precision!r} needs a GPU with bf16 arithmetic (compute capability 8.0 or newer), but "
                    f"device {index} is a {device.name} with {major}.{minor}. Use precision='16-mixed' instead."
                )
    return precision  # type: ignore[return-value]


def compute_dtype(precision: str) -> torch.dtype:
    """Dtype of matrix products and of the frozen, unquantized weights under ``precision``."""
    return {"16": torch.float16, "bf16": torch.bfloat16, "32": torch.float32}[precision.split("-")[0]]


def check_gpus_are_seen() -> None:
    """Check that torch sees the GPUs of this machine, if it has any and ``CUDA_VISIBLE_DEVICES`` does not hide them.

    Raises:
        ValueError: If it sees none, with the cause and the remedy: training would take the CPU.
    """
    if torch.cuda.is_available() or not gpus_of_driver()[1]:
        return
    if problem := environment().no_gpu_seen():
        raise ValueError(problem)


#: Of these, what starts the processes of several machines sets one: torchrun, Lightning itself, SLURM, LSF, MPI.
_LAUNCHERS = ("GROUP_RANK", "NODE_RANK", "SLURM_PROCID", "LSB_JOBID", "OMPI_COMM_WORLD_RANK")


def check_devices(devices: int, num_nodes: int = 1) -> int:
    """Return ``devices`` if that many processes can each have a device of their own, on each of ``num_nodes`` machines.

    On CPU any positive number of processes may share the machine; with CUDA each needs a GPU.

    Raises:
        ValueError: For fewer than one device, more than there are GPUs, GPUs that torch does not see, or several
            machines without a launcher, where each would wait for the others for ever.
    """
    check_gpus_are_seen()
    if num_nodes > 1 and not any(name in os.environ for name in _LAUNCHERS):
        raise ValueError(
            f"num_nodes={num_nodes} but nothing says which of these machines this is. Start the same command on each "
            f"with torchrun --nnodes={num_nodes} --nproc_per_node={devices} --rdzv_backend=c10d "
            "--rdzv_endpoint=<first machine>:29500, or set NODE_RANK, MASTER_ADDR and MASTER_PORT."
        )
    if devices < 1:
        raise ValueError(f"devices must be at least 1, got {devices}.")
    if torch.cuda.is_available() and devices > torch.cuda.device_count():
        raise ValueError(
            f"devices={devices} but this machine has {torch.cuda.device_count()} CUDA device(s). Lower --devices, or "
            "check CUDA_VISIBLE_DEVICES."
        )
    cores = os.cpu_count() or 1
    if not torch.cuda.is_available() and devices > max(4, cores):
        raise ValueError(
            f"devices={devices} processes on a machine with {cores} CPU core(s) and no GPU: lower --devices."
        )
    return devices


def peak_mib(function: Callable[[], Any], device: str) -> float:
    """Memory in MiB that ``function()`` takes above what is in use before.

    Args:
        function: Is called once.
        device: ``"cuda"``: of the current GPU, as PyTorch's allocator hands it out. Else of this process, on Linux.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        in_use = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - in_use) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before, and would be used again unseen
    Path("/proc/self/clear_refs").write_text("5")  # restarts VmHWM, the peak of resident memory
    before = _resident_kib("VmRSS")
    function()
    return (_resident_kib("VmHWM") - before) / 1024


def _resident_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))
