"""Save a module's adapter when training has ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from typing_extensions import override


class SaveAdapter(Callback):
    """Calls ``pl_module.save_adapter(directory)`` on all ranks when training ends, be it complete or stopped early.

    A process that is killed leaves none: the adapter is then in the last checkpoint, and a resumed run writes it, even
    if that checkpoint is of the last step (``Trainer(max_steps=...)``) and nothing is left to train.

    Args:
        directory: Where the adapter goes; one that is there already is replaced.

    Raises:
        TypeError: Before training, if the module has no ``save_adapter`` method.
    """

    def __init__(self, directory: str | Path) -> None:
        super().__init__()
        self.directory = Path(directory)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not callable(getattr(pl_module, "save_adapter", None)):
            raise TypeError(f"SaveAdapter needs {type(pl_module).__name__} to have a method save_adapter(directory).")

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.save_adapter(self.directory)
        rank_zero_info(f"Adapter saved in {self.directory}")

    @override
    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        # Without a step to do Lightning skips training with all its hooks; after this one the model may be torn down.
        done = checkpoint["global_step"]
        if trainer.state.fn == TrainerFn.FITTING and 0 <= trainer.max_steps <= done:
            rank_zero_info(f"Nothing left to train: step {done} of {trainer.max_steps}.")
            self.on_train_end(trainer, pl_module)
