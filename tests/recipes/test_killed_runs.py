"""SIGKILL of one of two ranks at random moments: the other ends and says why, no checkpoint is hurt, resuming is exact.

    KILLED_RUNS=10 pytest tests/recipes/test_killed_runs.py -s

kills at 40 points, 20 with checkpoints in one file and 20 with sharded ones written on the side, in about 15 minutes.
"""

import contextlib
import ctypes
import os
import random
import re
import shutil
import signal
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

import pytest

from lightning_qlora.callbacks.report import load_report
from lightning_qlora.modules.distributed.trained_checkpoints import read_checkpoint
from tests.distributed import RankPools
from tests.recipes.phase_beacon import PHASES
from tests.recipes.runs import STEPS, Flags, Run, assert_between_steps, checkpoints, difference, on, train_in_pool

RUNS = int(os.environ.get("KILLED_RUNS", "1"))
FORMS: tuple[Flags, Flags] = ({}, {"sharded_checkpoints": True, "async_save": True})
#: Where a run is killed besides loading and validation. "write": as soon as a file of a checkpoint is there.
IN_STEPS = ("forward", "backward", "optimizer", "save", "write")


@dataclass(frozen=True)
class Kill:
    """``delay`` seconds after ``rank`` has entered ``phase`` with at least ``step`` steps done, or after the start."""

    rank: int
    phase: str
    step: int
    delay: float


def plan(run: int, draw: random.Random) -> list[Kill]:
    """Four kills of a run of 20 steps: while it loads, in two phases of a step, and in the validation half way."""
    first, second = IN_STEPS[run % 5], IN_STEPS[(run + 2) % 5]
    kills = [
        Kill(draw.randrange(2), first, draw.randint(1, 8), draw.uniform(0, 0.02)),
        Kill(draw.randrange(2), "validation", STEPS // 2, draw.uniform(0, 0.05)),
        Kill(draw.randrange(2), second, draw.randint(STEPS // 2 + 1, STEPS - 3), draw.uniform(0, 0.02)),
    ]
    kills.insert(draw.randint(0, 3), Kill(draw.randrange(2), "load", 0, draw.uniform(0, 20)))
    return kills


class Beacon:
    """What the ranks of a run are doing, by the files of :mod:`phase_beacon`."""

    def __init__(self, directory: Path) -> None:
        """Makes the callback known to Lightning, as an installed package would."""
        self.directory = directory
        package = directory / "phase_beacon-0.dist-info"
        package.mkdir(parents=True)
        (package / "METADATA").write_text("Metadata-Version: 2.1\nName: phase-beacon\nVersion: 0\n")
        (package / "entry_points.txt").write_text(
            "[lightning.pytorch.callbacks_factory]\nbeacon = phase_beacon:PhaseBeacon\n"
        )
        shutil.copy(Path(__file__).with_name("phase_beacon.py"), directory)
        paths = [str(directory), os.environ.get("PYTHONPATH", "")]
        self.variables = {"PHASES": str(directory), "PYTHONPATH": os.pathsep.join(filter(None, paths))}

    def reset(self) -> None:
        for rank in (0, 1):
            (self.directory / str(rank)).unlink(missing_ok=True)

    def read(self, rank: int) -> tuple[str, int]:
        """The phase of ``rank``, and how many steps it has done."""
        with contextlib.suppress(FileNotFoundError, struct.error):
            phase, step = struct.unpack("ii", (self.directory / str(rank)).read_bytes())
            return PHASES[phase], step
        return "start", 0


@contextlib.contextmanager
def adopting_orphans() -> Iterator[None]:
    """Make this process the parent of its descendants' orphans, so that it can wait for them (Linux)."""
    set_child_subreaper = 36
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(set_child_subreaper, 1, 0, 0, 0) == 0
    try:
        yield
    finally:
        libc.prctl(set_child_subreaper, 0, 0, 0, 0)


def wait_for(kill: Kill, run: Run, beacon: Beacon, output_dir: Path) -> None:
    """Return at the moment of ``kill``."""
    started = monotonic()
    if kill.phase == "load":
        while monotonic() < started + kill.delay and beacon.read(kill.rank)[0] in ("start", "load"):
            sleep(0.01)
        while kill.rank == 1 and run.second_process() is None:
            sleep(0.01)
        return
    while True:
        if run.process.poll() is not None:
            run.wait()
            raise AssertionError(f"it ended before {kill}:\n{run.text}")
        phase, step = beacon.read(kill.rank)
        if kill.phase == "write":
            phase = "write" if any((output_dir / "checkpoints").glob("*.partial*")) else phase
        # On a busy machine a short phase may pass unseen; a later moment is as good.
        if (step >= kill.step and phase == kill.phase) or step > kill.step + 1:
            sleep(kill.delay)
            return
        assert phase != "end", f"it ended without {kill}"
        assert monotonic() < started + 120, f"{kill} did not come, but {phase} of step {step}"
        sleep(0.0005)


def run_and_kill(flags: Flags, kill: Kill, beacon: Beacon, output_dir: Path) -> str:
    """The other rank must end by itself, not with success, and say what happened. Returns a line about it."""
    beacon.reset()
    with adopting_orphans(), Run(flags, **beacon.variables) as run:
        wait_for(kill, run, beacon, output_dir)
        second = run.second_process()
        killed_at = monotonic()
        os.kill(run.process.pid if kill.rank == 0 else second, signal.SIGKILL)
        code = run.wait(timeout=60)
        ended_after = monotonic() - killed_at
        phase, step = beacon.read(kill.rank)
        context = f"{kill}, in fact in {phase} of step {step}:\n{run.text}"
        if kill.rank == 0:
            assert code == -signal.SIGKILL, context
            said = rf"he main process \({run.process.pid}\) is gone"
            code = 1 if second is None else os.waitstatus_to_exitcode(os.waitpid(second, 0)[1])
        else:
            # Lightning's own words, if it was quicker.
            said = rf"Rank 1 \(process {second}\) was killed by SIGKILL|PID {second} terminated with code -9"
        assert code != 0, context
        assert second is None or re.search(said, run.text), context
    return f"{kill}: in {phase} of step {step}; the other ended {ended_after:.1f} s later with {code}"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", range(RUNS))
def test_a_killed_run_resumes_exactly(ranks: RankPools, flags: Flags, whole: Path, tmp_path: Path, number: int) -> None:
    """Four kills one after the other, and checkpoints of another form after each; a minute and a half on two cores."""
    expected = load_report(whole / "report.json")
    assert checkpoints(whole) == [f"step={step}.ckpt" for step in (STEPS - 1, STEPS)]
    assert_between_steps(whole)
    seed = int(os.environ.get("KILLS_SEED", random.randrange(2**32))) + number
    print(f"\nKILLS_SEED={seed - number}")
    output_dir, beacon = tmp_path / "run", Beacon(tmp_path / "beacon")
    flags, resumed_from = flags | on(2, output_dir), set[int]()
    for i, kill in enumerate(plan(seed if RUNS == 1 else number, random.Random(seed))):
        before = kept(output_dir)
        form = FORMS[(number + i) % 2]
        resume = {"resume": (output_dir / "report.json").exists()}
        print(run_and_kill(flags | form | resume, kill, beacon, output_dir))
        after = kept(output_dir)
        assert max(after, default=0) >= max(before, default=0)
        assert all(after[step] == before[step] for step in after.keys() & before.keys())
        if after:
            assert load_report(output_dir / "report.json")["status"] in ("running", "failed")
            assert_between_steps(output_dir)
            resumed_from.add(max(after))
    shutil.copytree(output_dir, tmp_path / "copy")

    two = train_in_pool(ranks, 2, flags | {"resume": True})
    assert two["resumed_from_step"] >= STEPS // 2
    assert two["losses"] == expected["losses"]
    # Lightning does not repeat a validation that was due at the very step of a checkpoint.
    assert two["val_losses"] == [pair for pair in expected["val_losses"] if pair[0] not in resumed_from]
    adapter = Path("adapter", "adapter_model.safetensors")
    assert (output_dir / adapter).read_bytes() == (whole / adapter).read_bytes()

    one = train_in_pool(ranks, 1, flags | {"resume": True} | on(1, tmp_path / "copy"))
    assert one["resumed_from_step"] == two["resumed_from_step"]
    assert difference(one["losses"], expected["losses"]) <= 1e-5


def kept(output_dir: Path) -> dict[int, dict[str, bytes]]:
    """The files of each finished checkpoint by its step; all of them can be read."""
    found = {}
    for path in (output_dir / "checkpoints").glob("*.ckpt"):
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        assert read_checkpoint(path)["global_step"] > 0
        found[int(path.stem.partition("=")[2])] = {file.name: file.read_bytes() for file in files}
    return found
