"""What every strategy of several processes needs: ranks that end together, and faults that say where they happened."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision
from lightning.pytorch.plugins.precision import Precision as PrecisionPlugin
from lightning.pytorch.strategies import ParallelStrategy
from threadpoolctl import threadpool_limits
from typing_extensions import override

from lightning_qlora.modules.capabilities import check_precision

T = TypeVar("T")

#: How long a collective may wait for the other ranks, unless a strategy is told otherwise.
DEFAULT_TIMEOUT = timedelta(minutes=30)


class WatchedProcesses(ParallelStrategy):
    """Mixin for Lightning strategies that start or join a process group.

    - Processes that Lightning launched end when their launcher does, and the process group ends with the process.
    - Ranks whose loaders have different lengths are refused before training: the shorter one would leave the others
      waiting in a collective.
    - An exception carries a note with the rank and step it came in, and a rank that has begun no batch for nine tenths
      of ``timeout`` says so: NCCL's own timeout ends the process without an exception.

    Args:
        timeout: How long a collective may wait for the other ranks.
    """

    def __init__(self, *args: Any, timeout: timedelta = DEFAULT_TIMEOUT, **kwargs: Any) -> None:
        super().__init__(*args, timeout=timeout, **kwargs)  # type: ignore[call-arg]  # the strategy beside the mixin
        self._patience = 0.9 * timeout.total_seconds()
        self._last_batch = 0.0
        self._watching: threading.Event | None = None

    @override
    def setup_environment(self) -> None:
        self.precision_plugin = on_device(self.precision_plugin, self.root_device)
        assert self.cluster_environment is not None
        if self.local_rank > 0 and not self.cluster_environment.creates_processes_externally:
            _exit_with_parent()
        super().setup_environment()
        if self.root_device.type == "cpu":
            # Lightning shares the cores out among torch's threads; other OpenMP runtimes still take them all.
            threadpool_limits(torch.get_num_threads(), user_api="openmp")
        # Not in teardown(): what was trained can still be gathered and saved after fit() has returned.
        atexit.register(_end_process_group)

    @override
    def on_train_start(self) -> None:
        """Check that all ranks have the same number of batches, and watch for ranks that stop.

        Raises:
            ValueError: If the ranks' loaders differ in length.
        """
        super().on_train_start()
        if self.world_size == 1:
            return
        batches = gather_objects(self._trainer.num_training_batches)
        if len(set(batches)) > 1:
            fewest = batches.index(min(batches))
            raise ValueError(
                f"The ranks' training loaders have {', '.join(map(str, batches))} batches: rank {fewest} would stop "
                f"first and leave the others waiting. Use a sampler that gives every rank the same number, or "
                f"Trainer(limit_train_batches={min(batches)})."
            )
        self._watch()

    @override
    def on_train_end(self) -> None:
        self._unwatch()
        super().on_train_end()

    @override
    def teardown(self) -> None:
        self._unwatch()
        super().teardown()

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        self._last_batch = time.monotonic()  # every loop's every batch comes through here
        return super().batch_to_device(batch, device, dataloader_idx)

    @override
    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        exception.add_note(f"This was {self._place()}.")

    @property
    def _trainer(self) -> Any:
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    def _place(self) -> str:
        place = f"rank {self.global_rank} of {self.world_size}"
        module = self.lightning_module
        if module is None or module._trainer is None:  # an exception before the Trainer attached the module
            return place
        batch = module.trainer.fit_loop.epoch_loop.batch_idx
        return f"{place}, after optimizer step {module.trainer.global_step}, at batch {batch} of the epoch"

    def _watch(self) -> None:
        self._unwatch()
        self._last_batch = time.monotonic()
        self._watching = ended = threading.Event()

        def watch() -> None:
            said_at = 0.0
            while not ended.wait(min(5.0, self._patience / 4)):
                waited = time.monotonic() - self._last_batch
                if waited > self._patience and said_at != self._last_batch:
                    said_at = self._last_batch
                    text = (
                        f"No batch has begun for {waited:.0f} s on {self._place()}. If a collective hangs, another "
                        "rank did not reach it: compare the ranks' steps.\n"
                    )
                    with suppress(OSError):
                        sys.stderr.write(text)
                        sys.stderr.flush()

        threading.Thread(target=watch, name="batch-watch", daemon=True).start()

    def _unwatch(self) -> None:
        if self._watching is not None:
            self._watching.set()
            self._watching = None


def precision_plugin(precision: str, device: str | None = None) -> PrecisionPlugin:
    """Lightning's plugin for ``precision``, for strategies that ``Trainer(precision=...)`` refuses or that know more.

    Args:
        precision: ``"32-true"``, ``"16-mixed"``, ``"bf16-mixed"`` or ``"bf16-true"``.
        device: Device type of autocast; default ``"cuda"`` where there is a GPU.

    Raises:
        ValueError: For a precision that does not exist or that the hardware lacks.
    """
    checked = check_precision(precision)
    if checked == "16-mixed" or checked == "bf16-mixed":
        return MixedPrecision(checked, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return HalfPrecision(checked) if checked == "bf16-true" else PrecisionPlugin()


def on_device(plugin: PrecisionPlugin, device: torch.device) -> PrecisionPlugin:
    """``plugin`` for the device that the Trainer chose, which is known only after the strategy has been built."""
    if isinstance(plugin, MixedPrecision) and plugin.device != device.type:
        return precision_plugin(plugin.precision, device.type)
    return plugin


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


def _end_process_group() -> None:
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
