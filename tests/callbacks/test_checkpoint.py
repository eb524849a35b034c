"""Adapters of old checkpoints, and writes on the side that fail. More: tests/modules/test_checkpointing.py."""

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_qlora.callbacks import GracefulStop, StepCheckpoint

Make = Callable[..., Any]


def test_an_adapter_stays_with_any_checkpoint_of_its_step(
    trainer: Make, module: Make, batches: Make, tmp_path: Path
) -> None:
    """``step=2`` is pruned after step 4, but not the newer checkpoint of that step."""

    def newer(batch_idx: int) -> None:
        if batch_idx == 2:
            (tmp_path / "c" / "interrupted-step=2.ckpt").touch()
            os.utime(tmp_path / "c" / "step=2.ckpt", (1, 1))  # the file system's clock may not have ticked in between

    model = module(on_batch=newer)
    model.save_adapter = lambda directory: directory.mkdir(parents=True)
    fit = trainer(StepCheckpoint(tmp_path / "c", 2, adapters=tmp_path / "a"), max_steps=4)
    fit.fit(model, batches([4.0] * 8))
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"interrupted-step=2.ckpt", "step=4.ckpt"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"step=2", "step=4"}
    fit = trainer(StepCheckpoint(tmp_path / "c", 2, adapters=tmp_path / "a"), max_steps=6)
    fit.fit(model, batches([4.0] * 8), ckpt_path=tmp_path / "c" / "step=4.ckpt")
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"step=4", "step=6"}


def test_a_write_on_the_side_that_fails_is_no_checkpoint_to_stop_with(
    trainer: Make, module: Make, batches: Make, tmp_path: Path
) -> None:
    waits: list[int] = []

    def finish_saving() -> None:
        waits.append(fit.global_step)
        if waits == [2, 2]:  # before the checkpoint of step 2, and when the signal asks for it
            (tmp_path / "step=2.ckpt").unlink()
            raise OSError(errno.ENOSPC, "No space left on device")

    stop = GracefulStop(tmp_path)
    fit = trainer(StepCheckpoint(tmp_path, 2), stop)
    fit.strategy.finish_saving = finish_saving
    model = module(on_batch=lambda batch_idx: signal.raise_signal(signal.SIGTERM) if batch_idx == 1 else None)
    with pytest.warns(UserWarning, match="The disk is full"):
        fit.fit(model, batches([4.0] * 8))
    assert [path.name for path in tmp_path.iterdir()] == ["interrupted-step=2.ckpt"]
    assert stop.checkpoint_path == tmp_path / "interrupted-step=2.ckpt"
