"""Checkpoints that fall between optimizer steps, never inside one, and never at the cost of an older one."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from typing_extensions import override

_OWN = re.compile(r"(?:interrupted-)?step=(\d+)\.ckpt")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class StepCheckpoint(Checkpoint):
    """Saves ``step=N.ckpt`` right after every n-th optimizer step, and keeps the latest few.

    A plain ``ModelCheckpoint(every_n_train_steps=n)`` looks at the step count after every *micro-batch*. In Lightning
    2.6 that also saves in the middle of a step that accumulates gradients, and a run resumed from there does the step
    without what was accumulated. It happens in the first step after a resume, and after the last step of an epoch,
    whose own checkpoint is put off until the next validation (unless ``save_on_train_epoch_end``). It also removes an
    old checkpoint for each one that it began to write, and those that an earlier, resumed run left stay for good.

    Here an old checkpoint goes only when ``keep`` newer ones are on disk, whichever run wrote them, and those that
    ``GracefulStop`` wrote count as well. A full disk costs the checkpoint and not the run: training goes on with a
    warning, all but the latest checkpoint that is whole make room, and the next one is tried. Other failures end
    training.

    With a strategy that writes while training goes on, ``strategy.finish_saving()`` is called on all ranks before the
    next checkpoint and when training ends; it must wait and raise ``OSError`` on all ranks if one failed. A strategy of
    several processes without that method raises on the writing rank alone, so that even a full disk ends training.

    Args:
        directory: Where the checkpoints go.
        every_n_steps: Optimizer steps between two of them.
        keep: How many to keep.
        adapters: Where ``pl_module.save_adapter(adapters / "step=N")`` puts the adapter of each checkpoint, as many as
            there are checkpoints; ``None`` saves none.

    Raises:
        ValueError: If ``every_n_steps`` or ``keep`` is less than 1.
        TypeError: Before training, if ``adapters`` is given and the module has no ``save_adapter`` method.
    """

    def __init__(
        self, directory: str | Path, every_n_steps: int, keep: int = 2, adapters: str | Path | None = None
    ) -> None:
        super().__init__()
        for name, value in (("every_n_steps", every_n_steps), ("keep", keep)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        self.directory = Path(directory)
        self.every_n_steps, self.keep = every_n_steps, keep
        self.adapters = None if adapters is None else Path(adapters)
        self._steps_seen = 0
        self._saved: Path | None = None  # of the latest step, as far as is known; the same on all ranks

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.adapters is not None and not callable(getattr(pl_module, "save_adapter", None)):
            raise TypeError(f"StepCheckpoint(adapters=...) needs {type(pl_module).__name__}.save_adapter(directory).")

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._steps_seen = trainer.global_step
        self._saved = None

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self._steps_seen:
            return  # gradients are still accumulating
        self._steps_seen = trainer.global_step
        self._saved = None
        if trainer.global_step % self.every_n_steps or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._finish(trainer)
        name = f"step={trainer.global_step}"
        with self._surviving_a_full_disk(trainer):
            trainer.save_checkpoint(self.directory / f"{name}.ckpt", weights_only=False)
            self._saved = self.directory / f"{name}.ckpt"
        if self.adapters is not None:
            self._save_adapter(trainer, pl_module, self.adapters / name)
        self._prune(trainer, self.keep)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish(trainer)
        self._prune(trainer, self.keep)

    def saved(self, trainer: pl.Trainer) -> Path | None:
        """The checkpoint of the step just done, once it is on disk, or ``None``. All ranks must call it."""
        if self._saved is not None:
            self._finish(trainer)
        return self._saved

    def _save_adapter(self, trainer: pl.Trainer, pl_module: Any, directory: Path) -> None:
        partial = directory.with_name(f"{directory.name}.partial")
        try:
            # It gathers on all ranks before one of them writes: that one may go on alone.
            with self._surviving_a_full_disk(trainer, alone=True):
                pl_module.save_adapter(partial)
                if trainer.is_global_zero:
                    shutil.rmtree(directory, ignore_errors=True)
                    partial.replace(directory)
        finally:
            if trainer.is_global_zero:
                shutil.rmtree(partial, ignore_errors=True)

    def _finish(self, trainer: pl.Trainer) -> None:
        finish = getattr(trainer.strategy, "finish_saving", None)
        if finish is not None:
            with self._surviving_a_full_disk(trainer):
                finish()

    @contextmanager
    def _surviving_a_full_disk(self, trainer: pl.Trainer, alone: bool = False) -> Generator[None, None, None]:
        try:
            yield
        except Exception as error:
            # safetensors, which writes adapters, has no errno but this text.
            no_space = getattr(error, "errno", None) in _NO_SPACE or f"(os error {errno.ENOSPC})" in str(error)
            raised_on_all = alone or trainer.world_size == 1 or hasattr(trainer.strategy, "finish_saving")
            if not (no_space and raised_on_all):
                raise
            self._saved = self._saved if alone else None
            rank_zero_warn(f"The disk is full: {error}. Training goes on; all checkpoints but the latest make room.")
            self._prune(trainer, keep=1)

    def _prune(self, trainer: pl.Trainer, keep: int) -> None:
        if not trainer.is_global_zero:
            return
        found = [
            (path.stat().st_mtime_ns, int(match[1]), path)
            for path in self.directory.glob("*.ckpt")
            if (match := _OWN.fullmatch(path.name))
        ]
        # By age, not by step: after a resume from an older one, higher steps belong to a course that was given up.
        found.sort(reverse=True)
        kept = {step for _, step, _ in found[:keep]}
        for _, step, path in found[keep:]:
            trainer.strategy.remove_checkpoint(path)
            if self.adapters is not None and step not in kept:
                shutil.rmtree(self.adapters / f"step={step}", ignore_errors=True)
