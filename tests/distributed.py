"""Worker processes that tests hand functions to, so that many tests share the cost of starting ranks.

    def test_something(ranks: RankPools) -> None:
        results = ranks.run(2, "cpu", function, *args)  # [result of rank 0, result of rank 1]

``function`` is a module-level function of a test module. Its asserts fail the test with the rank's own traceback.
"""

import gc
import importlib
import os
import pickle
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from time import monotonic
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist

TESTS = Path(__file__).resolve().parent


def groups(world_size: int) -> list[Any]:
    """``(world_size, device)`` to parametrize a test over: gloo everywhere, and NCCL where there are enough GPUs."""
    reason = f"needs {world_size} CUDA GPUs"
    marks = [pytest.mark.multigpu, pytest.mark.skipif(torch.cuda.device_count() < world_size, reason=reason)]
    return [(world_size, "cpu"), pytest.param(world_size, "cuda", marks=marks)]


def build(name: Any, precision: str = "32-true", **options: Any) -> Any:
    """``build_strategy`` with the fields of its groups of options, which the caller need not tell apart."""
    from lightning_qlora.modules.distributed.strategies import StrategyOptions, build_strategy
    from lightning_qlora.modules.distributed.trained_checkpoints import CheckpointOptions

    saving = {key: options.pop(key) for key in ("sharded_checkpoints", "async_save") if key in options}
    return build_strategy(StrategyOptions(name, precision=precision, **options), CheckpointOptions(**saving))


class RankPools:
    """Worker processes by kind of device, started when first needed: ``world_size`` ranks are the first so many."""

    def __init__(self) -> None:
        self._pools: dict[str, _Pool] = {}

    def __enter__(self) -> "RankPools":
        return self

    def __exit__(self, *_: object) -> None:
        for device in [*self._pools]:
            self.shrink(device, 0)

    def shrink(self, device: str, size: int) -> None:
        """End all workers but the first ``size``."""
        if device in self._pools:
            self._pools[device].shrink(size)

    def run(self, world_size: int, device: str, function: Callable[..., Any], *args: Any, timeout: float = 120) -> Any:
        """Call ``function(*args)`` on every rank at once, inside a process group; returns the results by rank.

        Raises:
            AssertionError: With the traceback of the first rank that raised, died, or took longer than ``timeout``
                seconds. The workers are then started anew for the next call.
        """
        pool = self._pools.setdefault(device, _Pool(device))
        try:
            return pool.run(world_size, function, args, timeout)
        except BaseException:
            pool.shrink(0)
            raise


class _Pool:
    def __init__(self, device: str) -> None:
        self.device = device
        self.workers: list[_Worker] = []
        self.group: tuple[str, int] | None = None  # the module whose functions run in it, and its number of ranks
        self.groups = 0

    def run(self, world_size: int, function: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        if self.group != (function.__module__, world_size):
            for worker in self.workers:
                worker.connection.send_bytes(pickle.dumps(None))  # leave the last group, all at once
            self.group = (function.__module__, world_size)
            self.groups += 1
        self.workers += [_Worker(rank, self.device) for rank in range(len(self.workers), world_size)]
        store = f"{self.workers[0].scratch.name}/store{self.groups}"
        task = pickle.dumps((store, world_size, function.__module__, function.__qualname__, args))
        connections = [worker.connection for worker in self.workers[:world_size]]
        for connection in connections:
            connection.send_bytes(task)
        results: dict[int, Any] = {}
        deadline = monotonic() + timeout
        while len(results) < world_size:
            waiting = [connection for rank, connection in enumerate(connections) if rank not in results]
            ready = wait(waiting, timeout=max(0.0, deadline - monotonic()))
            assert ready, f"ranks {set(range(world_size)) - set(results)} took more than {timeout} s"
            for connection in ready:
                rank = connections.index(connection)  # type: ignore[arg-type]
                try:
                    succeeded, results[rank] = pickle.loads(connections[rank].recv_bytes())
                except EOFError:
                    code = self.workers[rank].process.wait()
                    raise AssertionError(f"rank {rank} died with exit code {code}") from None
                assert succeeded, f"on rank {rank}:\n{results[rank]}"
        return [results[rank] for rank in range(world_size)]

    def shrink(self, size: int) -> None:
        if self.group is not None and self.group[1] > size:
            self.group = None
        for worker in self.workers[size:]:
            worker.kill()
        del self.workers[size:]


class _Worker:
    def __init__(self, rank: int, device: str) -> None:
        self.scratch = tempfile.TemporaryDirectory()
        # The variables of torchrun: Lightning then joins the process group instead of starting processes.
        environment = {
            **os.environ,
            "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0",
            "TORCHELASTIC_RUN_ID": "tests", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        if device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""  # recipes train on the GPUs that they see
        self.connection, theirs = Pipe()
        command = [sys.executable, __file__, str(theirs.fileno()), device]
        self.process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()])
        theirs.close()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.connection.close()
        self.scratch.cleanup()


def _serve(connection: Connection, device: str) -> None:
    # Test modules are imported by the name that pytest gives them, without putting the repository's root on the path.
    namespace = ModuleType("tests")
    namespace.__path__ = [str(TESTS)]
    sys.modules["tests"] = namespace
    rank = int(os.environ["RANK"])
    backend = "gloo"
    if device == "cuda":
        torch.cuda.set_device(rank)
        backend = "cpu:gloo,cuda:nccl"
    while True:
        try:
            task = pickle.loads(connection.recv_bytes())
        except EOFError:
            return  # the test process is gone
        if task is None:  # the next inherits neither process groups, which hold threads and files, nor graphs
            if dist.is_initialized():
                dist.destroy_process_group()
            if "torch._dynamo" in sys.modules:
                torch._dynamo.reset()
            gc.collect()
            continue
        store, world_size, module, function, args = task
        os.environ["WORLD_SIZE"] = os.environ["LOCAL_WORLD_SIZE"] = str(world_size)
        if not dist.is_initialized():
            dist.init_process_group(
                backend, init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
            )
        try:
            result = (True, getattr(importlib.import_module(module), function)(*args))
        except BaseException:
            result = (False, traceback.format_exc())
        connection.send_bytes(pickle.dumps(result))  # not send(): it would share tensors' memory, which dies with us


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])), sys.argv[2])
