"""A module whose losses and durations the tests choose."""

import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor


class Clock:
    """Stands in for ``perf_counter``; moves only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Batches:
    """A resumable loader of ``losses``, one micro-batch of 2 x 5 tokens each."""

    def __init__(self, losses: list[float]) -> None:
        self.losses = losses
        self.start = self.position = 0

    def __len__(self) -> int:
        return len(self.losses)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        start, self.start = self.start, 0
        for index in range(start, len(self.losses)):
            self.position = index + 1
            yield {"input_ids": torch.zeros(2, 5, dtype=torch.long), "loss": torch.tensor(self.losses[index])}

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["position"]


class ScriptedModule(pl.LightningModule):
    """Logs the losses its batches carry; a training micro-batch takes 2 s, a validation batch 50 s of the clock."""

    def __init__(self, clock: Clock, fail_at: int | None = None, on_batch: Callable[[int], None] | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.clock = clock
        self.fail_at = fail_at
        self.on_batch = on_batch

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if batch_idx == self.fail_at:
            raise RuntimeError("the disk is full of gradients")
        if self.on_batch is not None:
            self.on_batch(batch_idx)
        self.clock.now += 2.0
        self.log("train_loss", batch["loss"], batch_size=2)
        self.log("grad_norm", torch.tensor(0.434), batch_size=2)
        return self.weight * 0.5

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.clock.now += 50.0
        self.log("val_loss", batch["loss"], batch_size=2)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("lightning_qlora.callbacks.measure.perf_counter", clock)
    monkeypatch.setattr("lightning_qlora.callbacks.progress.perf_counter", clock)
    monkeypatch.setattr("lightning_qlora.callbacks.report.perf_counter", clock)
    return clock


@pytest.fixture
def module(clock: Clock) -> Callable[..., ScriptedModule]:
    """``module(fail_at=..., on_batch=...)``"""
    return lambda **options: ScriptedModule(clock, **options)


@pytest.fixture
def batches() -> Callable[[list[float]], Batches]:
    return Batches


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., pl.Trainer]:
    """``trainer(*callbacks, **options)``: a silent CPU trainer."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")

    def make(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
        defaults: dict[str, Any] = {
            "max_steps": 4,
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 1,
            "default_root_dir": tmp_path,
        }
        return pl.Trainer(callbacks=list(callbacks), **{**defaults, **options})

    return make
