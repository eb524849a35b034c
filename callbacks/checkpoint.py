"""Checkpoints that fall between optimizer steps, never inside one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override


class StepCheckpoint(ModelCheckpoint):
    """Saves ``step=N.ckpt`` right after every n-th optimizer step, and keeps the latest few.

    A plain ``ModelCheckpoint(every_n_train_steps=n)`` looks at the step count after every *micro-batch*. In Lightning
    2.6 that also saves in the middle of a step that accumulates gradients, and a run resumed from there does the step
    without what was accumulated. It happens in the first step after a resume, and after the last step of an epoch,
    whose own checkpoint is put off until the next validation (unless ``save_on_train_epoch_end``).

    Args:
        directory: Where the checkpoints go.
        every_n_steps: Optimizer steps between two of them.
        keep: How many to keep; those that an earlier, resumed run left may add to them.
    """

    def __init__(self, directory: str | Path, every_n_steps: int, keep: int = 2) -> None:
        super().__init__(
            directory,
            "{step}",
            monitor="step",
            mode="max",
            save_top_k=keep,
            every_n_train_steps=every_n_steps,
            save_on_train_epoch_end=True,
        )
        self._steps_seen = 0

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._steps_seen = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._steps_seen:
            return  # gradients are still accumulating
        self._steps_seen = trainer.global_step
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
