"""Collectives on plain Python values, and the end of the process group."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def is_distributed() -> bool:
    """Whether this process is one of several in a process group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather_objects(value: T) -> list[T]:
    """``value`` of every rank, in order of rank; a collective, for whatever can be pickled, if there are several."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def all_reduce_sum(values: Sequence[float], device: torch.device) -> list[float]:
    """Sum a few numbers over all ranks in float64; the numbers themselves when there is one process."""
    if not is_distributed():
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return [float(value) for value in tensor.tolist()]


def end_process_group() -> None:
    """Leave the process group, if there is one; for ``atexit``, so that this process does not abort while it ends.

    gloo's threads drop the tensors of a collective a moment after it has returned. A tensor that Python has seen needs
    the interpreter for that, and a thread that asks an interpreter that has ended takes the process with it (SIGABRT,
    "terminate called without an active exception": 7 of 1100 processes that ended right after a collective).
    """
    if dist.is_initialized():
        with suppress(RuntimeError):
            dist.destroy_process_group()
        # That joins the threads of groups that nobody holds. DTensor's caches hold those of a mesh for good.
        time.sleep(0.1)
