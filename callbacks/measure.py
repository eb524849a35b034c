"""What the callbacks measure with: tokens of a batch, time of an optimizer step, peak memory of a process.

Nothing here synchronises the device, and only :func:`gather` talks to other ranks; callers decide when that is worth
it.
"""

import functools
import math
import os
import resource
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal, TypeVar

import lightning.pytorch as pl
import psutil  # type: ignore[import-untyped]
import torch
import torch.distributed as dist
from lightning.pytorch.profilers import Profiler
from torch import Tensor
from typing_extensions import override

GIB = 2**30

MemoryKind = Literal["cuda_max_allocated", "process_peak_rss"]
Count = int | Tensor | None  # a tensor if it lives on an accelerator; None if it is not known
TokensFn = Callable[[Any], Count]
T = TypeVar("T")

# What Lightning calls two moments that no callback hook marks, when it reports them to the trainer's profiler.
SAVE_CHECKPOINT = "save_checkpoint"
FETCH_BATCH = "[_TrainingEpochLoop].train_dataloader_next"


def count_tokens(batch: Any) -> Count:
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


def plus(total: Count, more: Count) -> Count:
    """Their sum, which is not known if one of them is not."""
    return None if total is None or more is None else total + more


# CUDA device index -> bytes that the allocator's peak had reached before it was last reset. One a process, as the
# allocator's own statistics are: one callback looks at phases, another at the whole run.
_earlier_peaks: dict[int, int] = {}


def peak_memory_bytes(device: torch.device) -> tuple[int, MemoryKind]:
    """Peak memory of this process since it started, in bytes, and what was measured.

    On CUDA, what PyTorch's allocator handed out on ``device`` (without the CUDA context, cuBLAS workspaces outside the
    allocator and fragmentation); elsewhere, the largest resident set of the process.
    """
    if device.type == "cuda":
        return max(torch.cuda.max_memory_allocated(device), _earlier_peaks.get(_index(device), 0)), "cuda_max_allocated"
    return peak_rss_bytes(), "process_peak_rss"


def peak_rss_bytes() -> int:
    """Largest resident set of this process since it started, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # getrusage(2): kibibytes on Linux, bytes on macOS.
    return peak if sys.platform == "darwin" else peak * 1024


def rss_bytes() -> int:
    """Resident set of this process now, in bytes."""
    pid = os.getpid()
    if (statm := _open_statm(pid)) is None:
        return int(psutil.Process(pid).memory_info().rss)
    return int(os.pread(statm, 64, 0).split()[1]) * resource.getpagesize()


@functools.cache  # of each process, for a launcher may fork
def _open_statm(pid: int) -> int | None:
    """Linux' figures of the process's memory. psutil opens the file each time, which in a step takes 0.1 ms more."""
    try:
        return os.open(f"/proc/{pid}/statm", os.O_RDONLY)
    except FileNotFoundError:
        return None


@dataclass(frozen=True)
class DevicePeak:
    """What PyTorch's CUDA allocator held between two calls of :func:`restart_device_peak`, in bytes.

    Attributes:
        allocated: peak of memory in tensors.
        reserved: peak of memory taken from the device: tensors and what the allocator keeps for later ones.
        allocated_now: memory in tensors at the end.
    """

    allocated: int
    reserved: int
    allocated_now: int


def restart_device_peak(device: torch.device) -> DevicePeak | None:
    """Peaks of the CUDA allocator since the last call, which then begin anew; ``None`` if ``device`` is no CUDA device.

    Does not wait for the device: the allocator's books are kept by the host, as it queues work. Reset the peaks with
    this function alone, and :func:`peak_memory_bytes` still knows the peak since the process started.
    """
    if device.type != "cuda":
        return None
    # The nested form: `memory_stats()` also flattens and sorts about 100 entries, which takes longer than the query.
    stats = torch.cuda.memory_stats_as_nested_dict(device)
    if not stats:  # CUDA is not yet initialised
        return DevicePeak(0, 0, 0)
    allocated, reserved = stats["allocated_bytes"]["all"], stats["reserved_bytes"]["all"]
    index = _index(device)
    _earlier_peaks[index] = max(_earlier_peaks.get(index, 0), allocated["peak"])
    torch.cuda.reset_peak_memory_stats(device)
    return DevicePeak(allocated["peak"], reserved["peak"], allocated["current"])


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


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
    tokens: Count


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
        self._tokens: Count = 0
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
        self._tokens = plus(self._tokens, self._tokens_fn(batch))
        count = global_step - self._global_step
        if count == 0:
            return None
        now = perf_counter()
        sample = StepSample(count=count, seconds=now - self._step_began, tokens=self._tokens)
        self._global_step, self._step_began, self._tokens = global_step, now, 0
        return sample


class TimedSteps:
    """Optimizer steps without the first few, which compile, autotune and grow the allocator.

    Args:
        tokens_fn: tokens of one micro-batch, see :func:`count_tokens`.
        warmup_steps: first optimizer steps that are not timed.

    Attributes:
        seconds: host time of each timed step; see :class:`StepMeter`.
        tokens: of all timed steps on this rank; ``None`` if one of them could not be counted.
    """

    def __init__(self, tokens_fn: TokensFn, warmup_steps: int) -> None:
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps is {warmup_steps}, but it counts steps: pass 0 or more")
        self.warmup_steps = warmup_steps
        self._meter = StepMeter(tokens_fn)
        self._first_step = 0
        self.pause, self.resume = self._meter.pause, self._meter.resume
        self.seconds: list[float] = []
        self.tokens: Count = 0

    def start(self, global_step: int) -> None:
        """Begin to measure; ``global_step`` is the number of optimizer steps done before."""
        self._first_step = global_step
        self.seconds, self.tokens = [], 0
        self._meter.start(global_step)

    def update(self, batch: Any, global_step: int) -> tuple[StepSample | None, bool]:
        """Count a micro-batch that has just ended; the step it completed, if any, and whether that is a timed one."""
        step = self._meter.update(batch, global_step)
        if step is None or global_step - self._first_step <= self.warmup_steps:
            return step, False
        self.seconds += [step.seconds / step.count] * step.count
        self.tokens = plus(self.tokens, step.tokens)
        return step, True

    def step_time_s(self) -> dict[str, float] | None:
        """``p50`` and ``p95`` of :attr:`seconds`; ``None`` without a timed step."""
        if not self.seconds:
            return None
        return {"p50": percentile(self.seconds, 0.5), "p95": percentile(self.seconds, 0.95)}

    def tokens_per_s(self, tokens_of_ranks: list[int | None]) -> float | None:
        """Tokens per second of all ranks; ``None`` without a timed step, or where a rank could not count."""
        tokens = [count for count in tokens_of_ranks if count is not None]
        seconds = sum(self.seconds)
        return sum(tokens) / seconds if len(tokens) == len(tokens_of_ranks) and seconds > 0 else None


class Stopwatch:
    """Adds up the host's time between :meth:`start` and :meth:`stop`."""

    def __init__(self) -> None:
        self._seconds = self._began = 0.0

    def start(self) -> None:
        """Begin an interval."""
        self._began = perf_counter()

    def stop(self) -> None:
        """End the interval."""
        self._seconds += perf_counter() - self._began

    def take(self) -> float:
        """The seconds of all intervals since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def percentile(values: list[float], fraction: float) -> float:
    """The value below which ``fraction`` (0 to 1) of ``values`` lie, interpolated between neighbours."""
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def with_prefix(value: float) -> str:
    """``value`` with three digits and a prefix: 12.3 T for 12.3e12."""
    exponent = min(5, max(0, int(math.log10(value)) // 3)) if value > 0 else 0
    return f"{value / 1000**exponent:.3g} {['', 'k', 'M', 'G', 'T', 'P'][exponent]}"


def rounded(value: float) -> str:
    """``value`` without decimals, or with two digits below 10: 12,346 and 0.48."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def is_distributed() -> bool:
    """Whether this process is one of several in a process group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather(value: T) -> list[T]:
    """``value`` of every rank, in order of rank; a collective if there are several."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def observe(
    trainer: pl.Trainer, action: str, started: Callable[[], None], stopped: Callable[[], None]
) -> Callable[[], None]:
    """Call ``started`` and ``stopped`` around each ``action`` that ``trainer`` reports to its profiler.

    For moments that no callback hook marks: :data:`SAVE_CHECKPOINT`, and :data:`FETCH_BATCH`, which waits for the
    loader. The trainer's own profiler goes on as before.

    Returns:
        A function that ends this; after the last one, ``trainer.profiler`` is again what it was.
    """
    profiler: Profiler = trainer.profiler  # type: ignore[attr-defined]  # Lightning sets it without declaring it
    if not isinstance(profiler, _ObservedProfiler):
        profiler = trainer.profiler = _ObservedProfiler(profiler)  # type: ignore[attr-defined]
    observers = profiler.observers.setdefault(action, [])
    observers.append((started, stopped))

    def forget() -> None:
        if (started, stopped) in observers:
            observers.remove((started, stopped))
        if trainer.profiler is profiler and not any(profiler.observers.values()):  # type: ignore[attr-defined]
            trainer.profiler = profiler.inner  # type: ignore[attr-defined]

    return forget


class _ObservedProfiler(Profiler):
    """Hands everything on to ``inner``; see :func:`observe`."""

    def __init__(self, inner: Profiler) -> None:
        super().__init__()
        self.inner = inner
        self.observers: dict[str, list[tuple[Callable[[], None], Callable[[], None]]]] = {}

    @override
    def start(self, action_name: str) -> None:
        self.inner.start(action_name)
        for started, _ in self.observers.get(action_name, ()):
            started()

    @override
    def stop(self, action_name: str) -> None:
        for _, stopped in self.observers.get(action_name, ()):
            stopped()
        self.inner.stop(action_name)

    @override
    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        self.inner.setup(stage, local_rank, log_dir)

    @override
    def summary(self) -> str:
        return self.inner.summary()

    @override
    def describe(self) -> None:
        self.inner.describe()

    @override
    def teardown(self, stage: str | None) -> None:
        self.inner.teardown(stage)

    def __del__(self) -> None:
        pass  # the base class would end `inner`, which outlives this

    def __getattr__(self, name: str) -> Any:
        # Only what this class has not: attributes of a particular profiler.
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)
