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
    """One group of worker processes for each number of ranks and kind of device, started when first needed."""

    def __init__(self) -> None:
        self._pools: dict[tuple[int, str], _Pool] = {}

    def __enter__(self) -> "RankPools":
        return self

    def __exit__(self, *_: object) -> None:
        self.end(lambda world_size, device: True)

    def end(self, which: Callable[[int, str], bool]) -> None:
        """End the groups for whose number of ranks and kind of device ``which`` returns true."""
        for key in [key for key in self._pools if which(*key)]:
            self._pools.pop(key).kill()

    def run(self, world_size: int, device: str, function: Callable[..., Any], *args: Any, timeout: float = 120) -> Any:
        """Call ``function(*args)`` on every rank at once, inside a process group; returns the results by rank.

        Raises:
            AssertionError: With the traceback of the first rank that raised, died, or took longer than ``timeout``
                seconds. The group is then started anew for the next call.
        """
        pool = self._pools.pop((world_size, device), None) or _Pool(world_size, device)
        try:
            results = pool.run(function, args, timeout)
        except BaseException:
            pool.kill()
            raise
        self._pools[world_size, device] = pool
        return results


class _Pool:
    def __init__(self, world_size: int, device: str) -> None:
        self.scratch = tempfile.TemporaryDirectory()
        self.processes: list[subprocess.Popen[bytes]] = []
        self.connections: list[Connection] = []
        for rank in range(world_size):
            ours, theirs = Pipe()
            # The variables of torchrun: Lightning then joins the process group instead of starting processes.
            environment = {
                **os.environ,
                "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0",
                "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
                "TORCHELASTIC_RUN_ID": "tests", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
                "OMP_NUM_THREADS": "1",
            }  # fmt: skip
            command = [sys.executable, __file__, str(theirs.fileno()), device, f"{self.scratch.name}/store"]
            self.processes.append(subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()]))
            self.connections.append(ours)
            theirs.close()

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        task = pickle.dumps((function.__module__, function.__qualname__, args))
        for connection in self.connections:
            connection.send_bytes(task)
        results: dict[int, Any] = {}
        deadline = monotonic() + timeout
        while len(results) < len(self.connections):
            waiting = [connection for rank, connection in enumerate(self.connections) if rank not in results]
            ready = wait(waiting, timeout=max(0.0, deadline - monotonic()))
            assert ready, f"ranks {set(range(len(self.connections))) - set(results)} took more than {timeout} s"
            for connection in ready:
                rank = self.connections.index(connection)  # type: ignore[arg-type]
                try:
                    succeeded, results[rank] = pickle.loads(self.connections[rank].recv_bytes())
                except EOFError:
                    raise AssertionError(f"rank {rank} died with exit code {self.processes[rank].wait()}") from None
                assert succeeded, f"on rank {rank}:\n{results[rank]}"
        return [results[rank] for rank in range(len(self.connections))]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        for connection in self.connections:
            connection.close()
        self.scratch.cleanup()


def _serve(connection: Connection, device: str, store: str) -> None:
    # Test modules are imported by the name that pytest gives them, without putting the repository's root on the path.
    namespace = ModuleType("tests")
    namespace.__path__ = [str(TESTS)]
    sys.modules["tests"] = namespace
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = "gloo"
    if device == "cuda":
        torch.cuda.set_device(rank)
        backend = "cpu:gloo,cuda:nccl"
    last_module, joined = None, 0
    while True:
        try:
            module, function, args = pickle.loads(connection.recv_bytes())
        except EOFError:
            return  # the test process is gone
        if module != last_module:  # it inherits neither process groups, which hold threads and files, nor graphs
            if dist.is_initialized():
                dist.destroy_process_group()
            if "torch._dynamo" in sys.modules:
                torch._dynamo.reset()
            gc.collect()
            last_module, joined = module, joined + 1
            dist.init_process_group(
                backend, init_method=f"file://{store}{joined}", rank=rank, world_size=world_size,
                timeout=timedelta(seconds=60),
            )  # fmt: skip
        try:
            result = (True, getattr(importlib.import_module(module), function)(*args))
        except BaseException:
            result = (False, traceback.format_exc())
        connection.send_bytes(pickle.dumps(result))  # not send(): it would share tensors' memory, which dies with us


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])), sys.argv[2], sys.argv[3])
