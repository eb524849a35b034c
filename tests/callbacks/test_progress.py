"""The printed lines, character by character."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest

from lightning_qlora.callbacks import LossProgress
from lightning_qlora.callbacks.measure import GIB
from lightning_qlora.callbacks.progress import duration

LOSSES = [4.0, 3.0, 2.5, 2.25, 2.0, 1.5]

Make = Callable[..., Any]


@pytest.fixture(autouse=True)
def _fixed_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "lightning_qlora.callbacks.progress.peak_memory_bytes", lambda device: (int(1.9 * GIB), "process_peak_rss")
    )


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("step ")]


def rows(text: str) -> dict[str, list[str]]:
    cells = (re.split(r"\s*│\s*", line.strip("│ ")) for line in text.splitlines() if line.startswith("│"))
    return {first: rest for first, *rest in cells}


def test_every_step_of_a_short_run(
    trainer: Make, module: Make, batches: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = trainer(LossProgress(), val_check_interval=2, enable_checkpointing=False)
    fit.fit(module(), batches(LOSSES), batches([9.0]))
    printed = capsys.readouterr().out
    assert lines(printed) == [
        "step 1/4 | loss 4.0000 | lr 1.0e-01 | grad 0.43 | 5 tok/s | 1.9 GiB",
        "step 2/4 | loss 3.0000 | lr 5.0e-02 | grad 0.43 | 5 tok/s | 1.9 GiB | eta 4s",
        "step 2/4 | val_loss 9.0000",
        "step 3/4 | loss 2.5000 | lr 3.3e-02 | grad 0.43 | 5 tok/s | 1.9 GiB | eta 2s",
        "step 4/4 | loss 2.2500 | lr 2.5e-02 | grad 0.43 | 5 tok/s | 1.9 GiB | eta 0s",
        "step 4/4 | val_loss 9.0000",
    ]
    table = rows(printed)
    assert table["first loss"] == ["4.0000", "1"]
    assert table["last loss"] == table["best loss"] == ["2.2500", "4"]
    assert table["best val_loss"] == ["9.0000", "2"]
    assert table["tokens per second"][0] == "5"
    assert table["peak process memory, rank 0"][0] == "1.90 GiB"
    assert table["time"] == ["1m 48s", "4"]  # 4 x 2 s and two validations of 50 s


def test_the_rate_of_the_table_leaves_out_the_first_step(
    trainer: Make, module: Make, batches: Make, clock: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def slow_start(batch_idx: int) -> None:
        clock.now += 500.0 if batch_idx == 0 else 0.0

    trainer(LossProgress(), enable_checkpointing=False).fit(module(on_batch=slow_start), batches(LOSSES))
    printed = capsys.readouterr().out
    assert "step 1/4 | loss 4.0000 | lr 1.0e-01 | grad 0.43 | 0 tok/s" in printed
    assert rows(printed)["tokens per second"][0] == "5"


def test_a_long_run_prints_the_first_every_tenth_and_the_last_step(
    trainer: Make, module: Make, batches: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = trainer(LossProgress(), max_steps=105, enable_checkpointing=False)
    fit.fit(module(), batches([float(i) for i in range(200)]))
    found = lines(capsys.readouterr().out)
    steps = [int(line[5:8]) for line in found]
    assert steps == [1, *range(10, 101, 10), 105]
    assert found[0].startswith("step   1/105 | loss 0.0000 | ")
    assert found[1].endswith("| 5 tok/s | 1.9 GiB | eta 3m 10s")


def test_gradient_accumulation_prints_optimizer_steps(
    trainer: Make, module: Make, batches: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = trainer(LossProgress(2), max_steps=3, accumulate_grad_batches=2, enable_checkpointing=False)
    fit.fit(module(), batches(LOSSES))
    assert [line[:22] for line in lines(capsys.readouterr().out)] == [
        "step 1/3 | loss 3.0000",
        "step 2/3 | loss 2.2500",
        "step 3/3 | loss 1.5000",
    ]


def test_what_is_not_known_is_left_out(
    trainer: Make, module: Make, batches: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = LossProgress(loss_key="a", grad_norm_key="b", val_loss_key="c", tokens_fn=lambda batch: None)
    fit = trainer(progress, max_steps=1, enable_checkpointing=False)
    fit.fit(module(), batches(LOSSES), batches(LOSSES))
    printed = capsys.readouterr().out
    assert lines(printed) == ["step 1/1 | lr 1.0e-01 | 1.9 GiB"]
    assert not {"first loss", "tokens per second"} & rows(printed).keys()


def test_a_run_of_unknown_length_has_no_total_and_no_eta(
    trainer: Make, module: Make, batches: Make, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = batches(LOSSES[:3])
    monkeypatch.setattr(type(endless), "__len__", None)  # as of an IterableDataset
    trainer(LossProgress(1), max_steps=-1, max_epochs=1, enable_checkpointing=False).fit(module(), endless)
    assert lines(capsys.readouterr().out) == [
        "step 1 | loss 4.0000 | lr 1.0e-01 | grad 0.43 | 5 tok/s | 1.9 GiB",
        "step 2 | loss 3.0000 | lr 5.0e-02 | grad 0.43 | 5 tok/s | 1.9 GiB",
        "step 3 | loss 2.5000 | lr 3.3e-02 | grad 0.43 | 5 tok/s | 1.9 GiB",
    ]


def test_losses_that_are_not_finite_are_shown_but_never_best(
    trainer: Make, module: Make, batches: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(LossProgress(), enable_checkpointing=False).fit(module(), batches([math.nan, 2.0, 3.0, -math.inf]))
    printed = capsys.readouterr().out
    assert lines(printed)[0].startswith("step 1/4 | loss nan | ")
    assert rows(printed)["best loss"] == ["2.0000", "2"]


def test_eta_of_a_resumed_run_counts_the_steps_that_are_left(
    trainer: Make, module: Make, batches: Make, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    fit = trainer(max_steps=2, enable_checkpointing=False)
    fit.fit(module(), batches(LOSSES))
    fit.save_checkpoint(tmp_path / "two.ckpt")
    fit = trainer(LossProgress(), max_steps=6, enable_checkpointing=False)
    fit.fit(module(), batches(LOSSES), ckpt_path=tmp_path / "two.ckpt")
    found = lines(capsys.readouterr().out)
    assert found[0].startswith("step 3/6 ")
    assert "eta" not in found[0]
    assert found[1].endswith("| eta 4s")


def test_an_interval_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="every_n_steps is 0"):
        LossProgress(0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.4, "59s"), (59.6, "1m 00s"), (70, "1m 10s"), (3599.6, "1h 00m"), (7500, "2h 05m")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
