"""Tells test_killed_runs.py what each rank is doing. Lightning adds the callback to the recipe by an entry point."""

import os
import struct
from pathlib import Path
from typing import Any

import lightning.pytorch as L

PHASES = ("load", "forward", "backward", "optimizer", "save", "validation", "end")


class PhaseBeacon(L.Callback):
    """Writes the number of the phase and the optimizer steps done into ``$PHASES/<rank>``, 8 bytes.

    ``save`` reaches from the end of a micro-batch to the next, in which checkpoint callbacks have their turn.
    """

    def __init__(self) -> None:
        self.file = os.open(Path(os.environ["PHASES"]) / os.environ.get("LOCAL_RANK", "0"), os.O_WRONLY | os.O_CREAT)

    def tell(self, phase: str, trainer: L.Trainer) -> None:
        os.pwrite(self.file, struct.pack("ii", PHASES.index(phase), trainer.global_step), 0)

    def setup(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        self.tell("load", trainer)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.tell("forward", trainer)

    def on_before_backward(self, trainer: L.Trainer, *_: Any) -> None:
        self.tell("backward", trainer)

    def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
        self.tell("optimizer", trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.tell("save", trainer)

    def on_validation_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.tell("validation", trainer)

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.tell("save", trainer)

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.tell("end", trainer)
