"""The directory of one training run: what is in it, whether a new run may use it, and when checkpoints go there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override

_STEP = re.compile(r"step=(\d+)(?:-v\d+)?\.ckpt$")


@dataclass(frozen=True)
class RunDirectory:
    """Paths of a run: ``report.json``, ``adapter/`` (peft format) and ``checkpoints/`` (resumable).

    Args:
        root: The directory; need not exist.
    """

    root: Path

    @property
    def report(self) -> Path:
        """The run's report."""
        return self.root / "report.json"

    @property
    def adapter(self) -> Path:
        """The finished adapter."""
        return self.root / "adapter"

    @property
    def checkpoints(self) -> Path:
        """Training checkpoints, named ``...step=N.ckpt``."""
        return self.root / "checkpoints"

    def latest_checkpoint(self) -> Path | None:
        """The checkpoint of the highest step, the newest file among equals."""
        found = [
            (int(match[1]), path) for path in self.checkpoints.glob("*.ckpt") if (match := _STEP.search(path.name))
        ]
        return max(found, key=lambda item: (item[0], item[1].stat().st_mtime))[1] if found else None

    def holds_run(self) -> bool:
        """Whether something of a run is in here."""
        return self.report.exists() or self.adapter.exists() or any(self.checkpoints.glob("*"))

    def start(self, resume: bool) -> Path | None:
        """Decide where a run begins; returns the checkpoint to resume from, ``None`` to begin at step 0.

        Raises:
            ValueError: If a new run would overwrite an old one, or there is no run to resume.
        """
        if self.root.exists() and not self.root.is_dir():
            raise ValueError(f"output_dir {self.root} is a file. Name a directory.")
        if not resume:
            if self.holds_run():
                raise ValueError(
                    f"output_dir {self.root} already holds a run. Continue it with --resume, or name another directory."
                )
            return None
        if not self.holds_run():
            raise ValueError(f"There is no run to resume in output_dir {self.root}.")
        return self.latest_checkpoint()


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
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._steps_seen = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._steps_seen:
            return  # gradients are still accumulating
        self._steps_seen = trainer.global_step
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
