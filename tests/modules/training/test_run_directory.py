"""When a run may begin, and from where."""

import errno
import fcntl
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator

import pytest

from lightning_qlora.modules.training.run_directory import RunDirectory, claim_directory, writable_directory


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


def checkpoint(run: RunDirectory, name: str, age: float = 0.0) -> None:
    """An empty file of that name, ``age`` seconds old."""
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    path = run.checkpoints / name
    path.touch()
    os.utime(path, (1e9 - age, 1e9 - age))


def test_what_was_claimed_and_never_used_is_gone(run):
    assert run.start(resume=False) is None
    assert run.latest_checkpoint() is None
    assert [path.name for path in run.root.iterdir()] == [".lock"]
    assert not run.holds_run()
    run.release()
    assert not run.root.exists()
    run.root.mkdir()
    run.start(resume=False)
    run.release()
    assert list(run.root.iterdir()) == []  # it was there before


OTHER_RUN = """
import sys
from pathlib import Path
from lightning_qlora.modules.training.run_directory import RunDirectory
try:
    run = RunDirectory(Path(sys.argv[1]))
    run.start(resume=False)
    print("started", flush=True)
    sys.stdin.readline()
except ValueError as error:
    print(error, flush=True)
"""


@pytest.fixture
def other_run(run) -> Iterator[Callable[[], subprocess.Popen]]:
    """Starts a run in another process, which then waits; its first line says how that went."""
    processes = []

    def start() -> subprocess.Popen:
        command = [sys.executable, "-c", OTHER_RUN, str(run.root)]
        processes.append(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=run.root.parent)
        )
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_a_second_run_in_the_same_directory_is_refused_from_the_first_second(run, other_run):
    """Neither has written anything yet. A lock that a killed run left behind is in nobody's way."""
    first = other_run()
    assert first.stdout.readline() == "started\n"
    for resume in (False, True):
        with pytest.raises(
            ValueError, match=rf"output_dir \S*/run is in use by another run \(process {first.pid} on "
        ) as e:
            run.start(resume)
    assert re.search(
        r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\)\. Name another directory, or wait until that run", str(e.value)
    )
    assert [path.name for path in run.root.iterdir()] == [".lock"]
    first.kill()
    first.wait()
    assert (run.root / ".lock").read_text().startswith(f"process {first.pid} on ")
    assert run.start(resume=False) is None
    assert RunDirectory(run.root).start(resume=False) is None  # the same process, as from a notebook
    second = other_run()
    assert f"in use by another run (process {os.getpid()} on " in second.stdout.readline()
    run.release()
    third = other_run()
    assert third.stdout.readline() == "started\n"
    third.communicate("\n")
    assert not (run.root / ".lock").exists()


def test_a_claim_ends_with_its_object(tmp_path):
    claim = claim_directory(tmp_path / "new")
    assert claim is claim_directory(tmp_path / "." / "new")
    del claim
    assert not (tmp_path / "new").exists()


def test_a_file_system_without_locks_is_said_once_and_used(run, monkeypatch):
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with pytest.warns(UserWarning, match="is on a file system without locks .*make sure that no other run uses it"):
        assert run.start(resume=False) is None


def test_a_directory_of_other_things_holds_no_run(run):
    run.checkpoints.mkdir(parents=True)
    (run.root / "notes.txt").touch()
    assert not run.holds_run()
    assert run.start(resume=False) is None


@pytest.mark.parametrize("part", ["report.json", "adapter/config.json", "checkpoints/step=3.ckpt", "adapters/step=3/x"])
def test_any_part_of_a_run_is_not_overwritten(run, part):
    (run.root / part).parent.mkdir(parents=True, exist_ok=True)
    (run.root / part).write_text("precious")
    with pytest.raises(ValueError, match=r"already holds a run\. Continue it with --resume, or name another directory"):
        run.start(resume=False)
    assert (run.root / part).read_text() == "precious"


def report(run: RunDirectory, **fields: object) -> None:
    run.root.mkdir(exist_ok=True)
    run.report.write_text(json.dumps(fields))


@pytest.mark.parametrize("status", ["failed", "interrupted", "running"])
def test_a_run_that_ended_before_its_first_step_is_in_nobodys_way(run, status):
    report(run, status=status, global_step=0, losses=[])
    assert not run.holds_run()
    assert run.start(resume=False) is None
    assert run.start(resume=True) is None
    checkpoint(run, "step=3.ckpt")  # the report of a run that was killed may be older than its checkpoint
    with pytest.raises(ValueError, match="already holds a run"):
        run.start(resume=False)


@pytest.mark.parametrize("status", ["failed", "interrupted", "running"])
def test_a_run_that_ended_before_its_first_checkpoint_begins_anew(run, status, capsys):
    """Killed while that was being written on the side, it has the adapter already."""
    report(run, status=status, global_step=7, losses=[1.0] * 7)
    checkpoint(run, "step=7.ckpt.partial")
    (run.adapters / "step=7").mkdir(parents=True)
    with pytest.raises(ValueError, match="already holds a run"):
        run.start(resume=False)
    assert run.start(resume=True) is None
    assert "run holds no checkpoint yet: beginning at step 0." in capsys.readouterr().out


def test_a_finished_run_without_a_checkpoint_is_not_begun_anew(run):
    report(run, status="completed", global_step=4, losses=[1.0] * 4)
    with pytest.raises(ValueError, match="holds no checkpoint to go on from, but the report of a completed run"):
        run.start(resume=True)
    report(run, status="interrupted", global_step=0, losses=[])
    run.adapter.mkdir()
    with pytest.raises(ValueError, match=r"no checkpoint to go on from.*--init_adapter \S*/run/adapter and"):
        run.start(resume=True)
    checkpoint(run, "step=4.ckpt")
    assert run.start(resume=True) == run.checkpoints / "step=4.ckpt"


def test_flags_that_changed_are_named_when_a_run_goes_on(run):
    report(run, model="a", metadata={"lr": 3e-4, "lora_r": 8, "prompt": None, "output_dir": "run", "resume": False})
    checkpoint(run, "step=4.ckpt")
    same = {"model": "a", "lr": 3e-4, "lora_r": 8, "prompt": None, "output_dir": "../run", "resume": True, "new": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run.start(True, same) == run.start(True) == run.checkpoints / "step=4.ckpt"
    with pytest.warns(UserWarning, match=r"was last started: model a -> b, prompt None -> Why\?\.$"):
        run.start(True, same | {"model": "b", "prompt": "Why?"})
    with pytest.warns(UserWarning, match=r"lr 0\.0003 -> 0\.03\. lr has no effect: the checkpoint's schedule"):
        run.start(True, same | {"lr": 0.03})


def test_what_cannot_be_written_is_refused_and_a_check_leaves_nothing(tmp_path, monkeypatch):
    writable_directory(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    message = r"output_dir .* cannot be written \(.*\)\. Name another directory\."
    for path in (tmp_path / "file" / "run", tmp_path / ("long" * 100)):
        with pytest.raises(ValueError, match=message):
            writable_directory(path)
        with pytest.raises(ValueError, match=message):
            RunDirectory(path).start(resume=False)

    def denied(**_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(tempfile, "TemporaryFile", denied)  # what a permission says does not hold for root
    with pytest.raises(ValueError, match=r"cannot be written \(PermissionError: .*Permission denied\)"):
        writable_directory(tmp_path)


@pytest.mark.parametrize("exists", [True, False])
def test_a_run_that_is_not_there_cannot_be_resumed(run, exists):
    if exists:
        run.root.mkdir()
    with pytest.raises(ValueError, match="There is no run to resume in output_dir"):
        run.start(resume=True)


@pytest.mark.parametrize("resume", [True, False])
def test_a_file_is_no_directory(run, resume):
    run.root.write_text("precious")
    with pytest.raises(ValueError, match=r"is a file\. Name a directory"):
        run.start(resume)


def test_a_run_resumes_from_its_highest_step(run):
    # Each beats the ones before it, by the number or else by the file's age.
    for name, age in (("step=8.ckpt", 0), ("step=9.ckpt", 99), ("step=10.ckpt", 50), ("epoch=1-step=10-v1.ckpt", 5)):
        checkpoint(run, name, age)
        assert run.start(resume=True) == run.checkpoints / name
    for name in ("last.ckpt", "step=99.ckpt.part", "step=99.ckpt.partial", "step=3.ckpt"):
        checkpoint(run, name)
        assert run.start(resume=True) == run.checkpoints / "epoch=1-step=10-v1.ckpt"


def test_a_directory_of_shards_is_a_checkpoint(run):
    checkpoint(run, "step=8.ckpt")
    (run.checkpoints / "step=9.ckpt").mkdir()
    (run.checkpoints / "step=10.ckpt.partial").mkdir()
    assert run.start(resume=True) == run.checkpoints / "step=9.ckpt"


def test_a_run_without_a_checkpoint_resumes_at_the_beginning(run):
    run.root.mkdir()
    run.report.touch()
    assert run.start(resume=True) is None
