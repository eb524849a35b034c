"""Save a module's adapter when training ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from typing_extensions import override


class SaveAdapter(Callback):
    """Calls ``pl_module.save_adapter(directory)`` on all ranks when training ends, be it complete or stopped early.

    A process that is killed leaves none: the adapter is then in the last checkpoint, and a resumed run writes it.

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
