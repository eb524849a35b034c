"""Recipes as modules, and runs of the main one as a user starts it, for the tests beside this file."""

import contextlib
import importlib.util
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from time import monotonic
from types import ModuleType
from typing import Any

from lightning_qlora.callbacks.report import Report, load_report
from lightning_qlora.modules.cli import group_flags, run_recipe
from lightning_qlora.modules.distributed.trained_checkpoints import read_checkpoint
from tests.distributed import RankPools

RECIPES = Path(__file__).parents[2] / "recipes"
RECIPE = RECIPES / "fsdp2_qlora.py"
STEPS = 20
GLOBAL_BATCH, ACCUMULATE = 4, 2
BATCHES_AN_EPOCH = 7

Flags = dict[str, object]


@cache
def recipe_module(name: str) -> ModuleType:
    """A recipe as a module under a name of its own, for benchmarks have the same. What it imports lies beside it."""
    spec = importlib.util.spec_from_file_location(f"{name}_recipe", RECIPES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where the command line looks up the types that annotations name
    sys.path.insert(0, str(RECIPES))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(RECIPES))
    return module


def call(recipe: ModuleType, **flags: Any) -> Any:
    """``recipe.main`` with flags by name, whatever group they are in."""
    return recipe.main(**group_flags(recipe.main, flags))


def arguments(flags: Mapping[str, object]) -> list[str]:
    return [f"--{name}={value}" for name, value in flags.items()]


class Run:
    """The recipe as a user starts it, in a session of its own. Leaving the context kills what is left of it."""

    def __init__(self, flags: Mapping[str, object], **variables: str) -> None:
        ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES")
        environment = {key: value for key, value in os.environ.items() if key not in ours}
        # On the CPU: gloo sums in a fixed order, so that equal runs have equal losses to the last bit.
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | variables
        self.process = subprocess.Popen(
            [sys.executable, str(RECIPE), *arguments(flags)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        self.text = ""
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)  # every process that could write has ended

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def wait_for_step(self, step: int, timeout: float = 120) -> None:
        self._read_until(lambda line: line is not None and re.match(rf"step +{step}/", line) is not None, timeout)

    def wait(self, timeout: float = 240) -> int:
        """Wait until all processes have ended; returns the exit code of the first."""
        self._read_until(lambda line: line is None, timeout)
        return self.process.wait(10)

    def second_process(self) -> int | None:
        """The process id of rank 1, if it has been started."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        found = [int(pid) for pid in children if RECIPE.name in Path(f"/proc/{pid}/cmdline").read_text()]
        return found[0] if found else None

    def _read_until(self, is_it: Callable[[str | None], bool], timeout: float) -> None:
        deadline = monotonic() + timeout
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - monotonic()))
            except queue.Empty:
                raise AssertionError(f"nothing more came within {timeout} s after:\n{self.text}") from None
            self.text += line or ""
            if is_it(line):
                return
            assert line is not None, f"it ended before that:\n{self.text}"


def run_here(flags: Flags, recipe: str = "fsdp2_qlora") -> int:
    """The recipe in this process, which is a rank of a pool."""
    return run_recipe(recipe_module(recipe).main, arguments(flags))


def train_in_pool(
    ranks: RankPools, devices: int, flags: Flags, timeout: float = 120, recipe: str = "fsdp2_qlora"
) -> Report:
    """Run to the end as ``Run`` does, to the last bit, but without the half minute in which its processes start."""
    assert ranks.run(devices, "cpu", run_here, flags, recipe, timeout=timeout) == [0] * devices
    return completed(flags)


def completed(flags: Mapping[str, object]) -> Report:
    """The report of a run that came to its end."""
    report = load_report(Path(str(flags["output_dir"])) / "report.json")
    assert report["status"] == "completed"
    assert len(report["losses"]) == flags["max_steps"]
    return report


def difference(losses: list[Any], expected: list[Any]) -> float:
    """The largest relative difference over the steps."""
    return max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))


def on(devices: int, output_dir: Path) -> Flags:
    return {"devices": devices, "batch_size": GLOBAL_BATCH // devices, "output_dir": output_dir}


def checkpoints(output_dir: Path) -> list[str]:
    return sorted(path.name for path in (output_dir / "checkpoints").iterdir())


def assert_between_steps(output_dir: Path) -> None:
    """No checkpoint was written while gradients of a step were accumulating: what is resumed would lack them."""
    paths = list((output_dir / "checkpoints").glob("*.ckpt"))
    assert paths
    for path in paths:
        checkpoint = read_checkpoint(path)
        batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["processed"]
        assert batches == BATCHES_AN_EPOCH or batches % ACCUMULATE == 0, (path, batches)
        assert f"step={checkpoint['global_step']}." in path.name
