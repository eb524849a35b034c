"""What every strategy of several processes needs: ranks that end together, and faults that say where they happened."""

from __future__ import annotations

import atexit
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.strategies import ParallelStrategy
from threadpoolctl import threadpool_limits
from typing_extensions import override

from .collectives import end_process_group, gather_objects
from .precision import on_device

#: How long a collective may wait for the other ranks, unless a strategy is told otherwise.
DEFAULT_TIMEOUT = timedelta(minutes=30)

#: Where a main process leaves its process id for the ranks that it launches.
_MAIN_PROCESS = "LIGHTNING_QLORA_MAIN_PROCESS"


class WatchedProcesses(ParallelStrategy):
    """Mixin for Lightning strategies that start or join a process group.

    - Processes that Lightning launched end when their launcher does, and the process group ends with the process. When
      one of them was killed, those that are left say which, and by what.
    - Ranks whose loaders have different lengths are refused, before training or validation begins: the shorter one
      would leave the others waiting in a collective. Of loaders without a length, that end is noticed when it comes.
    - An exception carries a note with the rank and step it came in, and a rank that has begun no batch for nine tenths
      of ``timeout`` says so: NCCL's own timeout ends the process without an exception.

    Args:
        timeout: How long a collective may wait for the other ranks, more than 0.

    Raises:
        ValueError: For a timeout that is not positive.
    """

    def __init__(self, *args: Any, timeout: timedelta = DEFAULT_TIMEOUT, **kwargs: Any) -> None:
        if timeout <= timedelta(0):
            raise ValueError(f"timeout must be more than 0, got {timeout.total_seconds():g} s.")
        super().__init__(*args, timeout=timeout, **kwargs)  # type: ignore[call-arg]  # the strategy beside the mixin
        self.timeout = timeout
        self._last_batch = 0.0
        self._watching: threading.Event | None = None
        self._loader_group: dist.ProcessGroup | None = None
        if os.environ.get("LOCAL_RANK", "0") == "0":
            # Here, for launched processes inherit it: one whose parent dies while it still imports never sees that one.
            os.environ[_MAIN_PROCESS] = str(os.getpid())

    @override
    def setup_environment(self) -> None:
        self.precision_plugin = on_device(self.precision_plugin, self.root_device)
        if self._main_process is not None:
            _exit_with(self._main_process)
        for rank, process in self._launched:
            _say_when_it_dies(process, rank, weakref.ref(self))
        super().setup_environment()
        if self.root_device.type == "cpu":
            # Lightning shares the cores out among torch's threads; other OpenMP runtimes still take them all.
            threadpool_limits(torch.get_num_threads(), user_api="openmp")
        # Not in teardown(): what was trained can still be gathered and saved after fit() has returned.
        atexit.register(end_process_group)

    @override
    def on_train_start(self) -> None:
        """Check that all ranks have the same number of batches, and watch for ranks that stop.

        Raises:
            ValueError: If the ranks' loaders differ in length.
        """
        super().on_train_start()
        if self.world_size > 1:
            _check_lengths(self._trainer.num_training_batches, "training", "limit_train_batches")
            self._watch_batches()

    @override
    def on_validation_start(self) -> None:
        """Check that all ranks have the same number of batches.

        Raises:
            ValueError: If the ranks' loaders differ in length.
        """
        super().on_validation_start()
        if self.world_size > 1 and not self._trainer.sanity_checking:
            _check_lengths(sum(self._trainer.num_val_batches), "validation", "limit_val_batches")

    @override
    def process_dataloader(self, dataloader: Any) -> Any:
        """Let a loader of unknown length end on all ranks at once, or with a ``ValueError`` on all of them."""
        dataloader = super().process_dataloader(dataloader)
        if self.world_size == 1 or sized_len(dataloader) is not None:
            return dataloader
        if self._loader_group is None:  # of the CPU: asking must not wait for what a GPU still computes
            self._loader_group = dist.new_group(backend="gloo", timeout=self.timeout)
        return _EvenBatches(dataloader, self._loader_group)

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
        # A collective fails when the sockets of the dead close, which is a moment before they are known to be dead.
        deadline = time.monotonic() + (1.0 if self.world_size > 1 and isinstance(exception, RuntimeError) else 0.0)
        while not (fates := self._fates()) and time.monotonic() < deadline:
            time.sleep(0.05)
        for fate in fates:
            exception.add_note(fate)

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

    def _watch_batches(self) -> None:
        self._unwatch()
        self._last_batch = time.monotonic()
        self._watching = ended = threading.Event()
        patience = 0.9 * self.timeout.total_seconds()

        def watch() -> None:
            said_at = 0.0
            while not ended.wait(min(5.0, patience / 4)):
                waited = time.monotonic() - self._last_batch
                if waited > patience and said_at != self._last_batch:
                    said_at = self._last_batch
                    _say(
                        f"No batch has begun for {waited:.0f} s on {self._place()}. If a collective hangs, another "
                        "rank did not reach it: compare the ranks' steps."
                    )

        threading.Thread(target=watch, name="batch-watch", daemon=True).start()

    def _unwatch(self) -> None:
        if self._watching is not None:
            self._watching.set()
            self._watching = None

    @property
    def _launched(self) -> list[tuple[int, subprocess.Popen[bytes]]]:
        """Rank and process of those that this one launched."""
        processes = enumerate(getattr(self.launcher, "procs", []), start=self.global_rank + 1)
        return [(rank, process) for rank, process in processes if isinstance(process, subprocess.Popen)]

    @property
    def _main_process(self) -> int | None:
        """The process that launched this one as a script of its own, if Lightning did.

        ``creates_processes_externally`` does not tell: it becomes true in launched processes too.
        """
        launched = isinstance(self.cluster_environment, LightningEnvironment) and self.local_rank > 0
        if not launched or multiprocessing.parent_process() is not None:
            return None
        return int(os.environ[_MAIN_PROCESS]) if _MAIN_PROCESS in os.environ else None

    def _fates(self) -> list[str]:
        """What became of the processes of this node that are gone, as far as this one launched them, or they this."""
        if self._main_process not in (None, os.getppid()):
            return [f"The main process ({self._main_process}) is gone."]
        return [_fate(rank, process) for rank, process in self._launched if process.poll()]


class _EvenBatches:
    """A loader of unknown length that fails on all ranks if it ends on some: they would wait for each other forever."""

    def __init__(self, loader: Any, group: dist.ProcessGroup) -> None:
        self._loader, self._group = loader, group

    def __getattr__(self, name: str) -> Any:  # its sampler, its state
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator[Any]:
        batches, missing = iter(self._loader), object()
        for count in itertools.count():
            batch = next(batches, missing)
            ended = torch.zeros(dist.get_world_size(), dtype=torch.uint8)
            ended[dist.get_rank()] = batch is missing
            dist.all_reduce(ended, group=self._group)
            if ended.all():
                return
            if ended.any():
                raise ValueError(
                    f"The loaders of the ranks {ended.nonzero().flatten().tolist()} ended after {count} batches, those "
                    "of the others go on. Give every rank the same number of batches, or limit them by the Trainer "
                    "(max_steps, limit_train_batches, limit_val_batches)."
                )
            yield batch


def _exit_with(main: int) -> None:
    """End this process when the one that launched it (rank 0) is gone.

    Rank 0 watches the processes it launched, but nobody watches rank 0: after a SIGKILL the others would wait in a
    collective until its timeout.
    """

    def watch() -> None:
        while os.getppid() == main:
            time.sleep(1)
        _say(f"Rank {os.environ['LOCAL_RANK']}: the main process ({main}) is gone; exiting.")
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _check_lengths(own: float, loaders: str, limit: str) -> None:
    batches = gather_objects(own)
    if len(set(batches)) > 1:
        fewest = batches.index(min(batches))
        raise ValueError(
            f"The ranks' {loaders} loaders have {', '.join(map(str, batches))} batches: rank {fewest} would stop first "
            "and leave the others waiting. Use a sampler that gives every rank the same number, or "
            f"Trainer({limit}={min(batches)})."
        )


def _say_when_it_dies(process: subprocess.Popen[bytes], rank: int, strategy: weakref.ref[WatchedProcesses]) -> None:
    """At once: Lightning, which looks every 5 s, then ends this process by SIGKILL, and tells the exit code at most."""

    def watch() -> None:
        if process.wait():
            here = strategy()  # weak: the process may outlive it, and the model with it must not
            _say(_fate(rank, process) + (f" This is {here._place()}." if here is not None else ""))

    threading.Thread(target=watch, name="process-watch", daemon=True).start()


def _fate(rank: int, process: subprocess.Popen[bytes]) -> str:
    name, code = f"Rank {rank} (process {process.pid})", process.returncode
    if code >= 0:
        return f"{name} ended with exit code {code}."
    out_of_memory = ", as the kernel does when memory runs out" if code == -signal.SIGKILL else ""
    return f"{name} was killed by {signal.Signals(-code).name}{out_of_memory}."


def _say(text: str) -> None:
    with suppress(OSError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
