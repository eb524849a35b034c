"""Peak memory of one call."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


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
