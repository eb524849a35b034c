"""When a run may begin, and from where."""

import errno
import json
import os
import tempfile
import warnings

import pytest

from lightning_qlora.modules.training.run_directory import RunDirectory, writable_directory


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
