"""What the callbacks measure with: tokens of a batch, time of an optimizer step, peak memory of a process.

Nothing here synchronises the device or talks to other ranks; callers decide when that is worth it.
"""

import resource
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor

GIB = 2**30

MemoryKind = Literal["cuda_max_allocated", "process_peak_rss"]
TokensFn = Callable[[Any], int | Tensor | None]


def count_tokens(batch: Any) -> int | Tensor | None:
    """Tokens of one micro-batch on this rank.

    ``batch["num_tokens"]`` if there (an int, or an integer tensor of any shape whose sum is meant), else the number of
    elements of ``batch["input_ids"]`` ([B, S], padding included), else ``None``: unknown.

    A count that lives on an accelerator is returned as a 0-d tensor there, because ``int()`` would wait for the device.
    """
    if not isinstance(batch, Mapping):
        return None
    if "num_tokens" in batch:
        count = batch["num_tokens"]
        if not isinstance(count, Tensor):
            return int(count)
        return int(count.sum()) if count.device.type == "cpu" else count.sum()
    ids = batch.get("input_ids")
    return ids.numel() if isinstance(ids, Tensor) else None


def peak_memory_bytes(device: torch.device) -> tuple[int, MemoryKind]:
    """Peak memory of this process since it started, in bytes, and what was measured.

    On CUDA, what PyTorch's allocator handed out on ``device`` (without the CUDA context, cuBLAS workspaces outside the
    allocator and fragmentation); elsewhere, the largest resident set of the process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "cuda_max_allocated"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # getrusage(2): kibibytes on Linux, bytes on macOS.
    return (peak if sys.platform == "darwin" else peak * 1024), "process_peak_rss"


@dataclass(frozen=True)
class StepSample:
    """One optimizer step as :class:`StepMeter` saw it.

    Attributes:
        count: how far ``trainer.global_step`` advanced; more than 1 when several optimizers stepped in one batch.
        seconds: host time since the previous step ended, validation left out.
        tokens: tokens of this rank over all micro-batches of the step; ``None`` if the batches do not say.
    """

    count: int
    seconds: float
    tokens: int | Tensor | None


class StepMeter:
    """Turns ``on_train_batch_end`` calls, one a micro-batch, into samples, one an optimizer step.

    The time is the host's, without a device synchronisation: on a GPU a single step may look too short, but over many
    steps the host cannot run ahead of the device, so that sums and medians are right. Waiting for data and writing
    checkpoints is part of a step's time; validation is not.

    Args:
        tokens_fn: tokens of one micro-batch, see :func:`count_tokens`.
    """

    def __init__(self, tokens_fn: TokensFn = count_tokens) -> None:
        self._tokens_fn = tokens_fn
        self._tokens: int | Tensor | None = 0
        self._global_step = 0
        self._step_began = 0.0
        self._pause_began = 0.0

    def start(self, global_step: int) -> None:
        """Begin to measure; ``global_step`` is the number of optimizer steps done before."""
        self._global_step = global_step
        self._tokens = 0
        self._step_began = perf_counter()

    def pause(self) -> None:
        """Stop the clock (validation begins)."""
        self._pause_began = perf_counter()

    def resume(self) -> None:
        """Start the clock again."""
        self._step_began += perf_counter() - self._pause_began

    def update(self, batch: Any, global_step: int) -> StepSample | None:
        """Count a micro-batch that has just ended; a sample if it completed an optimizer step, else ``None``."""
        tokens = self._tokens_fn(batch)
        self._tokens = None if tokens is None or self._tokens is None else self._tokens + tokens
        count = global_step - self._global_step
        if count == 0:
            return None
        now = perf_counter()
        sample = StepSample(count=count, seconds=now - self._step_began, tokens=self._tokens)
        self._global_step, self._step_began, self._tokens = global_step, now, 0
        return sample
