"""When a run may begin, and from where."""

import json
import os

import pytest

from lightning_qlora.modules.run_directory import RunDirectory


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


def checkpoint(run: RunDirectory, name: str, age: float = 0.0) -> None:
    """An empty file of that name, ``age`` seconds old."""
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    path = run.checkpoints / name
    path.touch()
    os.utime(path, (1e9 - age, 1e9 - age))


def test_nothing_is_made_by_looking(run):
    assert run.start(resume=False) is None
    assert run.latest_checkpoint() is None
    assert not run.root.exists()


def test_a_directory_of_other_things_holds_no_run(run):
    run.checkpoints.mkdir(parents=True)
    (run.root / "notes.txt").touch()
    assert not run.holds_run()
    assert run.start(resume=False) is None


@pytest.mark.parametrize("part", ["report.json", "adapter/adapter_config.json", "checkpoints/step=3.ckpt"])
def test_any_part_of_a_run_is_not_overwritten(run, part):
    (run.root / part).parent.mkdir(parents=True, exist_ok=True)
    (run.root / part).write_text("precious")
    with pytest.raises(ValueError, match=r"already holds a run\. Continue it with --resume, or name another directory"):
        run.start(resume=False)
    assert (run.root / part).read_text() == "precious"


@pytest.mark.parametrize(
    ("status", "step", "holds"),
    [("failed", 0, False), ("failed", 1, True), ("running", 0, True), ("completed", 0, True)],
)
def test_a_run_that_failed_before_its_first_step_is_in_nobodys_way(run, status, step, holds):
    run.root.mkdir()
    run.report.write_text(json.dumps({"status": status, "global_step": step}))
    assert run.holds_run() is holds
    assert run.start(resume=True) is None


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
