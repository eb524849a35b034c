"""Signals during training: one process here, two in graceful_stop_script.py."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import Callback

from lightning_qlora.callbacks import GracefulStop, RunReport, StepCheckpoint, load_report

LOSSES = [4.0, 3.0, 2.5, 2.25, 2.0, 1.5, 1.25, 1.0]

Make = Callable[..., Any]


@pytest.fixture(autouse=True)
def _handlers_come_back() -> Iterator[None]:
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    yield
    after = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    signal.signal(signal.SIGINT, before[0])
    signal.signal(signal.SIGTERM, before[1])
    assert after == before


def send(signum: signal.Signals, at: int, times: int = 1) -> Callable[[int], None]:
    def on_batch(batch_idx: int) -> None:
        if batch_idx == at:
            for _ in range(times):
                signal.raise_signal(signum)

    return on_batch


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_training_after_the_step(
    signum: signal.Signals, code: int, trainer: Make, module: Make, batches: Make, tmp_path: Path
) -> None:
    stop = GracefulStop(tmp_path / "ckpt")
    # RunReport after it: the checkpoint must nevertheless hold this step's loss.
    fit = trainer(stop, RunReport(tmp_path / "report.json"), max_steps=8, min_steps=7, val_check_interval=4)
    model = module(on_batch=send(signum, at=2))
    fit.fit(model, batches(LOSSES), batches([9.0]))

    assert fit.global_step == 3
    assert (stop.signum, stop.exit_code) == (signum, code)
    assert stop.checkpoint_path == tmp_path / "ckpt" / "interrupted-step=3.ckpt"
    assert [file.name for file in (tmp_path / "ckpt").iterdir()] == ["interrupted-step=3.ckpt"]
    report = load_report(tmp_path / "report.json")
    assert report["status"] == "interrupted"
    assert report["losses"] == LOSSES[:3]
    assert report["val_losses"] == []  # no validation between the signal and the end
    assert report["sections"]["graceful_stop"] == {"signal": signum.name, "checkpoint": str(stop.checkpoint_path)}
    assert (fit.limit_val_batches, fit.min_steps) == (1.0, 7)  # the trainer is as before

    again = trainer(GracefulStop(tmp_path / "ckpt"), RunReport(tmp_path / "report.json"), max_steps=8)
    resumed = module()
    again.fit(resumed, batches(LOSSES), ckpt_path=stop.checkpoint_path)
    whole = module()
    trainer(max_steps=8, enable_checkpointing=False).fit(whole, batches(LOSSES))
    assert resumed.weight.item() == whole.weight.item() != model.weight.item()
    report = load_report(tmp_path / "report.json")
    assert (report["status"], report["losses"], report["sections"]) == ("completed", LOSSES, {})


def test_without_a_signal_nothing_happens(trainer: Make, module: Make, batches: Make, tmp_path: Path) -> None:
    stop = GracefulStop(tmp_path / "ckpt")
    fit = trainer(stop)
    fit.fit(module(), batches(LOSSES))
    assert (fit.global_step, stop.signum, stop.checkpoint_path, stop.exit_code) == (4, None, None, 0)
    assert not (tmp_path / "ckpt").exists()


def test_an_accumulated_step_is_finished_first(trainer: Make, module: Make, batches: Make, tmp_path: Path) -> None:
    stop = GracefulStop(tmp_path)
    seen: list[int] = []

    def on_batch(batch_idx: int) -> None:
        seen.append(batch_idx)
        send(signal.SIGTERM, at=4)(batch_idx)

    fit = trainer(stop, accumulate_grad_batches=4)
    fit.fit(module(on_batch=on_batch), batches(LOSSES + LOSSES))
    assert (fit.global_step, seen[-1]) == (2, 7)
    assert stop.checkpoint_path is not None


def test_a_signal_after_the_last_step_is_not_lost(trainer: Make, module: Make, batches: Make, tmp_path: Path) -> None:
    class Late(Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            signal.raise_signal(signal.SIGTERM)

    stop = GracefulStop(tmp_path / "ckpt")
    fit = trainer(Late(), stop)
    fit.fit(module(), batches(LOSSES))
    assert (fit.global_step, stop.signum) == (4, signal.SIGTERM)
    again = trainer(enable_checkpointing=False)
    again.fit(module(fail_at=0), batches(LOSSES), ckpt_path=stop.checkpoint_path)  # nothing is left to train
    assert again.global_step == 4


@pytest.mark.parametrize(
    ("save_every", "at", "kept"),
    [(2, 3, ["step=2", "step=4"]), (2, 99, ["step=4", "step=6"]), (4, 2, ["interrupted-step=3"])],
    ids=["with a checkpoint", "after the last step", "without one"],
)
def test_a_step_that_has_a_checkpoint_gets_no_second_one(
    save_every: int, at: int, kept: list[str], trainer: Make, module: Make, batches: Make, tmp_path: Path
) -> None:
    class Late(Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            send(signal.SIGTERM, at=99)(at)

    stop = GracefulStop(tmp_path / "ckpt")
    fit = trainer(Late(), StepCheckpoint(tmp_path / "ckpt", save_every), stop, max_steps=6)
    fit.fit(module(on_batch=send(signal.SIGTERM, at=at)), batches(LOSSES))
    assert sorted(file.stem for file in (tmp_path / "ckpt").iterdir()) == kept
    assert stop.checkpoint_path == tmp_path / "ckpt" / f"{kept[-1]}.ckpt"
    assert stop.signum == signal.SIGTERM
    again = module()
    trainer(max_steps=6, enable_checkpointing=False).fit(again, batches(LOSSES), ckpt_path=stop.checkpoint_path)
    whole = module()
    trainer(max_steps=6, enable_checkpointing=False).fit(whole, batches(LOSSES))
    assert again.weight.item() == whole.weight.item()


def test_a_checkpoint_after_the_last_step_is_counted_too(
    trainer: Make, module: Make, batches: Make, tmp_path: Path
) -> None:
    class Late(Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            signal.raise_signal(signal.SIGTERM)

    fit = trainer(Late(), StepCheckpoint(tmp_path, 2), GracefulStop(tmp_path), max_steps=5)
    fit.fit(module(), batches(LOSSES))
    assert sorted(file.stem for file in tmp_path.iterdir()) == ["interrupted-step=5", "step=4"]


@pytest.mark.parametrize("resumed", [False, True])
def test_sigterm_before_training_ends_it_before_a_step(
    resumed: bool, trainer: Make, module: Make, batches: Make, tmp_path: Path
) -> None:
    """Lightning's handler takes it, and its loop would do a step first, forget it, and end with status 0."""
    path, checkpoint = tmp_path / "report.json", None
    if resumed:
        trainer(RunReport(path), StepCheckpoint(tmp_path, 2), max_steps=2).fit(module(), batches(LOSSES))
        checkpoint = tmp_path / "step=2.ckpt"

    class Slow(Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            signal.raise_signal(signal.SIGTERM)

    stop = GracefulStop(tmp_path / "ckpt")
    fit = trainer(Slow(), RunReport(path), stop)
    with pytest.raises(SystemExit) as end:
        fit.fit(module(fail_at=0), batches(LOSSES), ckpt_path=checkpoint)
    assert (end.value.code, stop.signum, stop.exit_code, stop.checkpoint_path) == (143, signal.SIGTERM, 143, None)
    report = load_report(path)
    assert (report["status"], report["losses"]) == ("interrupted", LOSSES[: fit.global_step])
    assert report["sections"] == {}
    again = trainer(stop, max_steps=3)
    again.fit(module(), batches(LOSSES))  # the same callback, in a run that nothing stops
    assert (again.global_step, stop.signum, stop.exit_code) == (3, None, 0)


def test_a_second_ctrl_c_stops_at_once(
    trainer: Make, module: Make, batches: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter([10.0, 10.6])
    monkeypatch.setattr("lightning_qlora.callbacks.graceful_stop.monotonic", lambda: next(seconds))
    stop = GracefulStop(tmp_path / "ckpt")
    fit = trainer(stop, RunReport(tmp_path / "report.json"))
    with pytest.raises(SystemExit):  # how Lightning ends on KeyboardInterrupt
        fit.fit(module(on_batch=send(signal.SIGINT, at=1, times=2)), batches(LOSSES))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning leaves it ignored
    assert fit.global_step == 1
    assert (stop.signum, stop.checkpoint_path) == (None, None)
    assert load_report(tmp_path / "report.json")["status"] == "interrupted"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_delivered_twice_is_one(
    signum: signal.Signals, trainer: Make, module: Make, batches: Make, tmp_path: Path
) -> None:
    stop = GracefulStop(tmp_path)
    trainer(stop).fit(module(on_batch=send(signum, at=1, times=2)), batches(LOSSES))
    assert stop.checkpoint_path == tmp_path / "interrupted-step=2.ckpt"


def test_handlers_come_back_after_an_error(trainer: Make, module: Make, batches: Make, tmp_path: Path) -> None:
    inside: list[Any] = []
    model = module(fail_at=2, on_batch=lambda _: inside.append(signal.getsignal(signal.SIGTERM)))
    stop = GracefulStop(tmp_path)
    with pytest.raises(RuntimeError, match="gradients"):
        trainer(stop).fit(model, batches(LOSSES))
    assert inside == [stop._handle, stop._handle]  # ours alone: Lightning's, which broadcasts, must not be called
    # the fixture checks what came back


def test_an_ignored_signal_stays_ignored(trainer: Make, module: Make, batches: Make, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        stop = GracefulStop(tmp_path)
        fit = trainer(stop)
        fit.fit(module(on_batch=send(signal.SIGINT, at=1)), batches(LOSSES))
    finally:
        signal.signal(signal.SIGINT, before)
    assert (fit.global_step, stop.signum) == (4, None)


def test_outside_the_main_thread_it_warns(trainer: Make, module: Make, batches: Make, tmp_path: Path) -> None:
    stop = GracefulStop(tmp_path)
    fit = trainer(stop)
    with ThreadPoolExecutor(1) as pool, pytest.warns(UserWarning, match="only the main thread"):
        pool.submit(fit.fit, module(), batches(LOSSES)).result()
    assert (fit.global_step, stop.signum) == (4, None)


def test_forked_children_can_be_terminated(trainer: Make, module: Make, batches: Make, tmp_path: Path) -> None:
    codes: list[int | None] = []

    def on_batch(batch_idx: int) -> None:
        if batch_idx != 1:
            return
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
        child.start()
        assert child.pid is not None
        os.kill(child.pid, signal.SIGINT)  # as a terminal does to all; the parent alone decides
        time.sleep(0.2)
        codes.append(child.exitcode)
        child.terminate()
        child.join(10)
        codes.append(child.exitcode)

    stop = GracefulStop(tmp_path)
    trainer(stop).fit(module(on_batch=on_batch), batches(LOSSES))
    assert codes == [None, -signal.SIGTERM]
    assert stop.signum is None


@pytest.mark.timeout(180)
def test_two_processes_agree_and_resume_exactly(tmp_path: Path) -> None:
    """SIGTERM to rank 0 alone, then, resumed, SIGINT to rank 1 alone, then resumed to the end."""
    script = Path(__file__).with_name("graceful_stop_script.py")
    environment = {key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", "WORLD_SIZE")}
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        env={**environment, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    output: list[str] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            output.append(line)
            if line.startswith("READY"):
                _, phase, rank0, rank1 = line.split()
                assert int(rank0) == process.pid
                if phase == "first":
                    os.kill(process.pid, signal.SIGTERM)
                else:
                    os.kill(int(rank1), signal.SIGINT)
        code = process.wait(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    text = "".join(output)
    assert code == 143, text
    # Its output ended, so that rank 1, which shares the pipe, has exited too; both had reached the end of the script.
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    whole, first, second, third = (ranks[0][phase] for phase in ("whole", "first", "second", "third"))
    for phase in ("whole", "first", "second", "third"):
        assert {**ranks[1][phase], "exit_code": 0} == {**ranks[0][phase], "exit_code": 0}
        assert ranks[1][phase]["exit_code"] == 0
    assert (whole["signum"], first["signum"], second["signum"], third["signum"]) == (None, 15, 2, None)
    assert (first["exit_code"], second["exit_code"]) == (143, 130)
    assert 3 < first["global_step"] < second["global_step"] < whole["global_step"] == third["global_step"] == 10
    for phase in (first, second):
        assert Path(phase["checkpoint"]).name == f"interrupted-step={phase['global_step']}.ckpt"
        assert Path(phase["checkpoint"]).exists()
        assert phase["checkpoint"] in text
    assert third["weights"] == whole["weights"] != second["weights"]

    reports = {phase: load_report(tmp_path / f"{phase}.json") for phase in ("whole", "first", "second", "third")}
    assert [report["status"] for report in reports.values()] == ["completed", "interrupted", "interrupted", "completed"]
    assert reports["third"]["losses"] == reports["whole"]["losses"]
    assert len(reports["whole"]["losses"]) == 10
    assert reports["whole"]["world_size"] == 2
    assert len(reports["whole"]["peak_memory_gib"]) == len(reports["whole"]["devices"]) == 2
    # Two micro-batches a step, each of 1 s, with 5 tokens on rank 0 and 6 on rank 1.
    assert reports["whole"]["step_time_s"] == {"p50": 2.0, "p95": 2.0}
    assert reports["whole"]["tokens_per_s"] == 11.0
    assert "| 11 tok/s |" in text
