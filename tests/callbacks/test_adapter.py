"""The adapter of a run, also of one that has nothing left to train."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_qlora.callbacks import SaveAdapter, StepCheckpoint

Make = Callable[..., Any]


class Savings:
    """Stands in for ``save_adapter``: the weight at each call."""

    def __init__(self, module: Any) -> None:
        self.module, self.weights = module, list[float]()
        module.save_adapter = self

    def __call__(self, directory: Path) -> None:
        self.weights.append(self.module.weight.item())


def test_a_run_killed_after_its_last_checkpoint_gets_its_adapter_by_resuming(
    trainer: Make, module: Make, batches: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = module()
    savings = Savings(model)
    trainer(SaveAdapter(tmp_path / "adapter"), StepCheckpoint(tmp_path, 2)).fit(model, batches([1.0] * 8))
    assert len(savings.weights) == 1

    again = module(fail_at=0)
    late = Savings(again)
    fit = trainer(SaveAdapter(tmp_path / "adapter"), enable_checkpointing=False)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        fit.fit(again, batches([1.0] * 8), ckpt_path=tmp_path / "step=4.ckpt")
    assert late.weights == savings.weights
    assert "Nothing left to train: step 4 of 4." in caplog.text

    longer = module()
    twice = Savings(longer)
    fit = trainer(SaveAdapter(tmp_path / "adapter"), enable_checkpointing=False, max_steps=6)
    fit.fit(longer, batches([1.0] * 8), ckpt_path=tmp_path / "step=4.ckpt")
    assert len(twice.weights) == 1  # at the end alone


def test_a_module_that_saves_no_adapter_is_refused(trainer: Make, module: Make, batches: Make, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="SaveAdapter needs ScriptedModule to have a method save_adapter"):
        trainer(SaveAdapter(tmp_path), enable_checkpointing=False).fit(module(), batches([1.0]))
