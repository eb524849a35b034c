"""What `report.json` says of runs that end well, are interrupted, fail or are resumed."""

import errno
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_qlora.callbacks import GracefulStop, Report, RunReport, StepCheckpoint, load_report
from lightning_qlora.callbacks.report import write_json
from lightning_qlora.callbacks.report_schema import _FIELDS

LOSSES = [4.0, 3.0, 2.5, 2.25, 2.0, 1.5, 1.25, 1.0]

Make = Callable[..., Any]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "report.json"


def test_a_completed_run_in_exact_figures(path: Path, trainer: Make, module: Make, batches: Make) -> None:
    report = RunReport(path, metadata={"model": "tiny", "seed": 3}, warmup_steps=1)
    fit = trainer(report, max_steps=3, accumulate_grad_batches=2, val_check_interval=4, enable_checkpointing=False)
    fit.fit(module(), batches(LOSSES), batches([7.0, 9.0]))
    result = load_report(path)
    assert result["losses"] == [3.0, 2.25, 1.5]  # of the last micro-batch of each step
    assert result["val_losses"] == [(2, 8.0)]
    # 2 micro-batches of 2 s and 10 tokens a step; the 100 s of validation do not count.
    assert result["step_time_s"] == {"p50": 4.0, "p95": 4.0}
    assert result["tokens_per_s"] == 5.0
    assert result["warmup_steps"] == 1
    assert (result["status"], result["error"]) == ("completed", None)
    assert (result["global_step"], result["resumed_from_step"]) == (3, 0)
    assert (result["model"], result["metadata"]) == ("tiny", {"seed": 3})
    assert (result["world_size"], result["strategy"], result["precision"]) == (1, "SingleDeviceStrategy", "32-true")
    assert result["memory_kind"] == "process_peak_rss"
    assert len(result["peak_memory_gib"]) == len(result["devices"]) == 1
    assert 0.05 < result["peak_memory_gib"][0] < 100
    assert result["versions"]["torch"] == torch.__version__ or torch.__version__.startswith(result["versions"]["torch"])
    assert {"python", "lightning", "transformers", "peft", "bitsandbytes"} <= result["versions"].keys()
    assert result["end_time"] is not None
    assert result["start_time"] <= result["end_time"]
    assert sorted(file.name for file in path.parent.iterdir()) == ["report.html", "report.json"]  # nothing temporary


def test_the_first_steps_are_not_timed(path: Path, trainer: Make, module: Make, batches: Make, clock: Any) -> None:
    def slow_start(batch_idx: int) -> None:
        clock.now += (500.0, 50.0, 1.0, 3.0)[batch_idx]

    fit = trainer(RunReport(path, warmup_steps=2), enable_checkpointing=False)
    fit.fit(module(on_batch=slow_start), batches(LOSSES))
    result = load_report(path)
    assert result["step_time_s"] == {"p50": 4.0, "p95": pytest.approx(4.9)}
    assert result["tokens_per_s"] == 20 / 8


def test_nothing_is_claimed_when_every_step_is_warm_up(path: Path, trainer: Make, module: Make, batches: Make) -> None:
    trainer(RunReport(path, warmup_steps=4), enable_checkpointing=False).fit(module(), batches(LOSSES))
    result = load_report(path)
    assert (result["tokens_per_s"], result["step_time_s"]) == (None, None)
    assert len(result["losses"]) == 4


def test_it_is_written_at_the_start_and_every_few_steps(path: Path, trainer: Make, module: Make, batches: Make) -> None:
    seen: list[tuple[str, int, Any]] = []

    def look(batch_idx: int) -> None:
        result = load_report(path)
        seen.append((result["status"], len(result["losses"]), result["end_time"]))

    fit = trainer(RunReport(path, flush_every_n_steps=2), max_steps=5, enable_checkpointing=False)
    fit.fit(module(on_batch=look), batches(LOSSES))
    assert seen == [("running", count, None) for count in (0, 0, 2, 2, 4)]
    assert len(load_report(path)["losses"]) == 5


def test_writing_takes_half_a_hundredth_of_the_time_at_most(
    path: Path, trainer: Make, module: Make, batches: Make, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a long run has many losses, or the disk is slow."""
    written: list[int] = []

    def slow(path: Path, report: Any) -> None:
        written.append(report["global_step"])
        clock.now += 0.5

    monkeypatch.setattr("lightning_qlora.callbacks.report.write_json", slow)
    fit = trainer(RunReport(path, flush_every_n_steps=10, html=False), max_steps=85, enable_checkpointing=False)
    fit.fit(module(), batches([1.0] * 90))
    assert written == [0, 10, 60, 85]  # the first but that of the start, then after 50 steps of 2 s, and at the end


def test_waiting_for_the_device_does_not_put_off_writing(
    path: Path, trainer: Make, module: Make, batches: Make, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(RunReport):
        def _drain_losses(self) -> None:
            clock.now += 10.0 * bool(self._pending)
            super()._drain_losses()

    written: list[int] = []
    monkeypatch.setattr(
        "lightning_qlora.callbacks.report.write_json", lambda path, report: written.append(report["global_step"])
    )
    fit = trainer(Slow(path, flush_every_n_steps=10, html=False), max_steps=35, enable_checkpointing=False)
    fit.fit(module(), batches([1.0] * 35))
    assert written == [0, 10, 20, 30, 35]


def test_a_later_fit_that_fails_before_training_leaves_the_report_of_a_failed_one(
    path: Path, trainer: Make, module: Make, batches: Make
) -> None:
    report = RunReport(path)
    with pytest.raises(RuntimeError, match="full of gradients"):
        trainer(report, enable_checkpointing=False).fit(module(fail_at=3), batches(LOSSES))
    before = load_report(path)
    with pytest.raises(FileNotFoundError):
        trainer(report).fit(module(), batches(LOSSES), ckpt_path=path.with_name("absent.ckpt"))
    assert load_report(path) == before


def test_ranks_that_write_nothing_keep_no_losses(
    path: Path, trainer: Make, module: Make, batches: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = RunReport(path)
    fit = trainer(report, enable_checkpointing=False)
    monkeypatch.setattr(pl.Trainer, "is_global_zero", False)
    fit.fit(module(), batches(LOSSES))
    assert report._pending == report._losses == []
    assert not path.exists()


def test_losses_that_are_not_finite_are_null_in_valid_json(
    path: Path, trainer: Make, module: Make, batches: Make
) -> None:
    fit = trainer(RunReport(path, metadata={"limit": math.inf}), enable_checkpointing=False)
    fit.fit(module(), batches([1.0, math.nan, math.inf, 2.0]))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    result = load_report(path)
    assert result["losses"] == [1.0, None, None, 2.0]
    assert result["metadata"] == {"limit": None}


def test_an_exception_is_reported_and_raised(path: Path, trainer: Make, module: Make, batches: Make) -> None:
    fit = trainer(RunReport(path), enable_checkpointing=False)
    with pytest.raises(RuntimeError, match="full of gradients"):
        fit.fit(module(fail_at=3), batches(LOSSES))
    result = load_report(path)
    assert result["status"] == "failed"
    assert result["error"] == "RuntimeError: the disk is full of gradients"
    assert result["losses"] == LOSSES[:3]
    assert result["tokens_per_s"] == 5.0
    assert result["end_time"] is not None


def test_what_cannot_be_read_any_more_does_not_hide_the_runs_own_error(
    path: Path, trainer: Make, module: Make, batches: Make
) -> None:
    """As after a CUDA error; reading a meta tensor raises too."""
    report = RunReport(path, tokens_fn=lambda batch: torch.ones((), device="meta"))
    with pytest.raises(RuntimeError, match="full of gradients"):
        trainer(report, enable_checkpointing=False).fit(module(fail_at=3), batches(LOSSES))
    result = load_report(path)
    assert result["status"] == "failed"
    assert result["losses"] == LOSSES[:3]


def test_a_failure_before_the_first_step_is_reported_but_replaces_no_report(
    path: Path, trainer: Make, module: Make, batches: Make
) -> None:
    class NoModel(Callback):
        def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
            raise ValueError("no such model")

    with pytest.raises(ValueError, match="no such model"):
        trainer(RunReport(path), NoModel(), enable_checkpointing=False).fit(module(), batches(LOSSES))
    result = load_report(path)
    assert (result["status"], result["error"], result["losses"]) == ("failed", "ValueError: no such model", [])

    trainer(RunReport(path), enable_checkpointing=False, max_steps=2).fit(module(), batches(LOSSES))
    with pytest.raises(ValueError, match="no such model"):
        trainer(RunReport(path), NoModel(), enable_checkpointing=False).fit(module(), batches(LOSSES))
    assert load_report(path)["status"] == "completed"


def test_keyboard_interrupt_is_an_interruption(path: Path, trainer: Make, module: Make, batches: Make) -> None:
    def interrupt(batch_idx: int) -> None:
        if batch_idx == 2:
            raise KeyboardInterrupt

    with pytest.raises(SystemExit):  # Lightning's answer to it
        trainer(RunReport(path), enable_checkpointing=False).fit(module(on_batch=interrupt), batches(LOSSES))
    result = load_report(path)
    assert (result["status"], result["losses"]) == ("interrupted", LOSSES[:2])


def test_a_resumed_run_is_reported_whole(
    path: Path, trainer: Make, module: Make, batches: Make, tmp_path: Path
) -> None:
    """The first run gets 2 steps beyond its checkpoint: they are done again and must appear once."""
    checkpoints = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=3)
    fit = trainer(RunReport(path), checkpoints, max_steps=8, val_check_interval=2)
    with pytest.raises(RuntimeError, match="gradients"):
        fit.fit(module(fail_at=5), batches(LOSSES), batches([9.0]))
    first = load_report(path)
    assert len(first["losses"]) == 5
    assert first["val_losses"] == [(2, 9.0), (4, 9.0)]

    fit = trainer(RunReport(path), enable_checkpointing=False, max_steps=8, val_check_interval=2)
    again = LOSSES[:3] + [loss / 2 for loss in LOSSES[3:]]
    fit.fit(module(), batches(again), batches([6.0]), ckpt_path=checkpoints.best_model_path)
    result = load_report(path)
    assert result["losses"] == again
    assert result["val_losses"] == [(2, 9.0), (4, 6.0), (6, 6.0), (8, 6.0)]
    assert (result["resumed_from_step"], result["global_step"]) == (3, 8)
    assert result["start_time"] == first["start_time"]
    assert result["step_time_s"] == {"p50": 2.0, "p95": 2.0}


def test_losses_that_a_checkpoint_does_not_know_are_null(
    path: Path, trainer: Make, module: Make, batches: Make, tmp_path: Path
) -> None:
    fit = trainer(ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=2, filename="two"), max_steps=2)
    fit.fit(module(), batches(LOSSES))
    fit = trainer(RunReport(path), enable_checkpointing=False)
    fit.fit(module(), batches(LOSSES), ckpt_path=tmp_path / "ckpt" / "two.ckpt")
    assert load_report(path)["losses"] == [None, None, 2.5, 2.25]


def test_resuming_a_finished_run_leaves_its_report(
    path: Path, trainer: Make, module: Make, batches: Make, tmp_path: Path
) -> None:
    checkpoints = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=4)
    trainer(RunReport(path), checkpoints).fit(module(), batches(LOSSES))
    before = path.read_bytes()
    fit = trainer(RunReport(path), enable_checkpointing=False)
    fit.fit(module(), batches(LOSSES), ckpt_path=checkpoints.best_model_path)
    assert path.read_bytes() == before


def test_a_run_killed_between_its_last_checkpoint_and_its_end_is_completed_by_resuming(
    path: Path, trainer: Make, module: Make, batches: Make, tmp_path: Path
) -> None:
    fit = trainer(RunReport(path), StepCheckpoint(tmp_path / "ckpt", 4), val_check_interval=4)
    fit.fit(module(), batches(LOSSES), batches([9.0]))
    completed = load_report(path)
    # What the process wrote last, and what of it the file that is left must keep.
    stopped = {"losses": LOSSES[:2], "global_step": 2, "end_time": None}
    sections = {"graceful_stop": {}, "a": {"b": 1}}
    for status in ("running", "interrupted"):
        write_json(path, completed | stopped | {"status": status, "sections": sections})
        fit = trainer(RunReport(path), enable_checkpointing=False)
        fit.fit(module(fail_at=0), batches(LOSSES), batches([9.0]), ckpt_path=tmp_path / "ckpt" / "step=4.ckpt")
        result = load_report(path)
        assert result == completed | {"end_time": result["end_time"], "sections": {"a": {"b": 1}}}
        assert (result["status"], result["losses"], result["val_losses"]) == ("completed", LOSSES[:4], [(4, 9.0)])
        assert result["end_time"] is not None
        assert "completed" in path.with_suffix(".html").read_text()
    path.write_text("{")
    fit = trainer(RunReport(path), enable_checkpointing=False)
    fit.fit(module(fail_at=0), batches(LOSSES), ckpt_path=tmp_path / "ckpt" / "step=4.ckpt")
    result = load_report(path)
    assert (result["status"], result["losses"], result["global_step"]) == ("completed", LOSSES[:4], 4)


def test_sections_of_other_callbacks_are_asked_for_after_their_end(
    path: Path, trainer: Make, module: Make, batches: Make
) -> None:
    class Graphs(Callback):
        report_key = "graphs"
        state = "unfinished"

        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.state = "finished"

        def report_section(self) -> dict[str, Any]:
            return {"state": self.state, "seconds": math.nan}

    trainer(RunReport(path), Graphs(), enable_checkpointing=False).fit(module(), batches(LOSSES))
    assert load_report(path)["sections"] == {"graphs": {"state": "finished", "seconds": None}}


def test_a_data_module_has_a_section_too(path: Path, trainer: Make, module: Make, batches: Make) -> None:
    class Data(pl.LightningDataModule):
        report_key = "data"

        def train_dataloader(self) -> Any:
            return batches(LOSSES)

        def report_section(self) -> dict[str, Any]:
            return {"samples": len(LOSSES)}

    trainer(RunReport(path), enable_checkpointing=False).fit(module(), datamodule=Data())
    assert load_report(path)["sections"] == {"data": {"samples": len(LOSSES)}}


def test_a_disk_that_is_full_for_a_while_does_not_end_training(
    path: Path, trainer: Make, module: Make, batches: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(path: Path, report: Report) -> None:
        if report["status"] == "running":
            raise OSError(errno.ENOSPC, "No space left on device")
        write_json(path, report)

    monkeypatch.setattr("lightning_qlora.callbacks.report.write_json", write)
    with pytest.warns(UserWarning, match=r"could not write .*No space left on device\). Training goes on"):
        trainer(RunReport(path, flush_every_n_steps=2), enable_checkpointing=False).fit(module(), batches(LOSSES))
    assert load_report(path)["losses"] == LOSSES[:4]


def test_graceful_stop_reports_no_section_without_a_signal(
    path: Path, trainer: Make, module: Make, batches: Make, tmp_path: Path
) -> None:
    trainer(RunReport(path), GracefulStop(tmp_path)).fit(module(), batches(LOSSES))
    assert load_report(path)["sections"] == {}


def test_uncountable_batches_cost_the_throughput_and_a_warning(
    path: Path, trainer: Make, module: Make, batches: Make
) -> None:
    report = RunReport(path, tokens_fn=lambda batch: None)
    with pytest.warns(UserWarning, match="cannot tell the tokens of a batch of type dict"):
        trainer(report, enable_checkpointing=False).fit(module(), batches(LOSSES))
    result = load_report(path)
    assert result["tokens_per_s"] is None
    assert result["step_time_s"] is not None


def test_a_missing_loss_is_an_error_at_the_first_step(path: Path, trainer: Make, module: Make, batches: Make) -> None:
    fit = trainer(RunReport(path, loss_key="loss"), enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"no metric 'loss' after optimizer step 1; logged were .*'train_loss'"):
        fit.fit(module(), batches(LOSSES))


def test_validation_alone_writes_no_report(path: Path, trainer: Make, module: Make, batches: Make) -> None:
    trainer(RunReport(path), enable_checkpointing=False).validate(module(), batches(LOSSES), verbose=False)
    assert not path.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flush_every_n_steps": 0}, "flush_every_n_steps is 0"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"metadata": {"path": Path()}}, "metadata cannot be written as JSON"),
        ({"metadata": {"model": 7}}, r"metadata\['model'\] is 7"),
    ],
)
def test_bad_arguments(path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunReport(path, **options)


def test_an_interrupted_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    assert json.loads(path.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def valid(path: Path, trainer: Make, module: Make, batches: Make) -> dict[str, Any]:
    fit = trainer(RunReport(path), max_steps=2, val_check_interval=1, enable_checkpointing=False)
    fit.fit(module(), batches(LOSSES), batches([1.0]))
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def test_every_field_is_documented_written_and_validated(valid: dict[str, Any]) -> None:
    fields = set(Report.__annotations__)
    assert fields == valid.keys() == _FIELDS.keys()
    documented = {line.split()[0] for line in (Report.__doc__ or "").splitlines() if line.strip()}
    assert fields <= documented


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("status", "done"),
        ("error", 1),
        ("global_step", -1),
        ("global_step", True),
        ("losses", [1.0, "2"]),
        ("val_losses", [[1, 2.0, 3.0]]),
        ("val_losses", [[1.5, 2.0]]),
        ("tokens_per_s", "fast"),
        ("step_time_s", {"p50": 1.0}),
        ("peak_memory_gib", [None]),
        ("memory_kind", "rss"),
        ("devices", "cpu"),
        ("sections", []),
    ],
)
def test_a_wrong_field_is_named(valid: dict[str, Any], path: Path, field: str, value: Any) -> None:
    path.write_text(json.dumps({**valid, field: value}))
    with pytest.raises(ValueError, match=f"{field} must be "):
        load_report(path)


def test_what_is_not_a_report_is_refused(valid: dict[str, Any], path: Path) -> None:
    for text, message in [
        ("{", "is not JSON"),
        ("[]", "has no 'schema_version'"),
        (json.dumps({**valid, "schema_version": 2}), "has schema version 2"),
        (json.dumps({key: value for key, value in valid.items() if key != "losses"}), "lacks the field 'losses'"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_report(path)
    with pytest.raises(FileNotFoundError):
        load_report(path.with_name("other.json"))
