"""A run that is stopped and resumed by a real Trainer, against the run that was not interrupted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch

from lightning_qlora.modules.data.data_module import ChatDataModule
from lightning_qlora.modules.data.options import DataOptions
from tests.chats import DATED, Clock, make_tokenizer


class Recorder(L.LightningModule):
    """One weight whose end value depends on every batch; remembers the batches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.seen: list[list[list[int]]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.seen.append(batch["input_ids"].tolist())
        return (self.weight * batch["input_ids"].double().mean()).square()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert batch["num_loss_tokens"] > 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-5)


class Stop(Exception):
    pass


class SaveAndStop(L.Callback):
    """Writes a checkpoint in one hook, after ``after`` micro-batches, and ends the run as a crash would."""

    def __init__(self, hook: str, after: int, path: Path) -> None:
        self.after, self.path = after, path
        setattr(self, hook, self.act)

    def act(self, trainer: L.Trainer, module: Recorder, *_: Any) -> None:
        if len(module.seen) == self.after and not trainer.sanity_checking:
            trainer.save_checkpoint(self.path)
            raise Stop


def fit(data: ChatDataModule, *callbacks: L.Callback, resume: Path | None = None, **options: Any) -> Recorder:
    module = Recorder()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        **options,
    )
    try:
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True if resume else None)
    except Stop:
        assert callbacks
    return module


def assert_resumes(make_data: Callable[[], ChatDataModule], path: Path, hook: str, after: int, **options: Any) -> None:
    """Stop after some micro-batches, resume in new objects, and compare with the run that was not interrupted."""
    whole = fit(make_data(), **options)
    stopped = fit(make_data(), SaveAndStop(hook, after, path), **options)
    assert path.is_file(), f"{hook} did not happen after {after} micro-batches"
    resumed = fit(make_data(), resume=path, **options)
    path.unlink()
    assert stopped.seen == whole.seen[:after], f"{hook} {after}"
    assert resumed.seen == whole.seen[after:], f"{hook} {after}"
    # Gradients of a half accumulated step are in no checkpoint; elsewhere the weight must be the same to the bit.
    if after % 4 % options.get("accumulate_grad_batches", 1) == 0:
        assert torch.equal(resumed.weight, whole.weight), f"{hook} {after}"


@pytest.fixture
def make_data(tokenizer, rows) -> Callable[..., ChatDataModule]:
    def make(val_samples: int = 32, **options: Any) -> ChatDataModule:
        data = DataOptions(str(rows), val_samples=val_samples)
        return ChatDataModule(tokenizer, data, **({"batch_size": 3, "seq_len": 64, "seed": 5} | options))

    return make


pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("length", [{"max_epochs": 3}, {"max_steps": 6}], ids=["epochs", "steps"])
def test_a_run_resumes_with_the_next_sample(make_data, tmp_path, length, accumulate, packing):
    # Epochs have 4 micro-batches: 1 to 3 are inside the first, 4 ends it, 5 is inside the second.
    def make() -> ChatDataModule:
        return make_data(packing=True, seq_len=96, batch_size=1) if packing else make_data()

    assert len(make().train_dataloader()) == 4
    for after in range(1, 6):
        options = {"accumulate_grad_batches": accumulate, **length}
        assert_resumes(make, tmp_path / "c.ckpt", "on_train_batch_end", after, **options)


@pytest.mark.parametrize("length", [{"max_epochs": 3}, {"max_steps": 10}], ids=["epochs", "steps"])
@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_validation_end"])
def test_checkpoints_at_the_end_of_an_epoch_resume_with_the_next(make_data, tmp_path, hook, length):
    for after in (4, 8):
        assert_resumes(make_data, tmp_path / "c.ckpt", hook, after, **length)


def test_a_checkpoint_written_in_the_middle_of_a_step_repeats_that_step(make_data, tmp_path):
    for after in (1, 3, 4):
        assert_resumes(make_data, tmp_path / "c.ckpt", "on_train_batch_start", after, max_steps=7)


def test_epochs_that_are_cut_short_resume_too(make_data, tmp_path):
    for after in (1, 2, 3, 4):
        assert_resumes(make_data, tmp_path / "c.ckpt", "on_train_batch_end", after, max_epochs=3, limit_train_batches=2)


def test_loader_workers_start_on_the_order_of_the_right_epoch(make_data, tmp_path):
    assert_resumes(lambda: make_data(num_workers=1), tmp_path / "c.ckpt", "on_train_batch_end", 5, max_steps=7)


def test_a_finished_run_can_be_continued(make_data, tmp_path):
    """The end of a run by max_steps counts as the end of an epoch in Lightning, wherever it falls."""
    whole = fit(make_data(), max_steps=9)
    for first in (2, 4, 5):
        module = fit(make_data(), max_steps=first)
        module.trainer.save_checkpoint(tmp_path / "c.ckpt")
        resumed = fit(make_data(), resume=tmp_path / "c.ckpt", max_steps=9)
        assert module.seen + resumed.seen == whole.seen, first
        assert torch.equal(resumed.weight, whole.weight)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 2}, "global_batch_size 3 -> 2"),
        ({"seed": 6}, "seed 5 -> 6"),
        ({"val_samples": 0}, "dataset_size 11 -> 12"),
        ({"seq_len": 28}, "fingerprint"),
        ({"packing": True}, "fingerprint .*resume with the same data, seq_len, packing"),
    ],
)
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_epoch_end"])
def test_a_checkpoint_of_other_data_is_refused(make_data, tmp_path, hook, changed, message):
    path = tmp_path / "c.ckpt"
    fit(make_data(), SaveAndStop(hook, 4, path), max_epochs=2)
    with pytest.raises(ValueError, match=message):
        fit(make_data(**changed), resume=path, max_epochs=2)


def test_a_run_whose_template_writes_the_date_resumes_on_another_day(rows, tmp_path, monkeypatch):
    def on(day: int) -> ChatDataModule:
        monkeypatch.setattr("lightning_qlora.modules.data.rendering.datetime", Clock(day))
        return ChatDataModule(make_tokenizer(DATED), rows, batch_size=3, seq_len=64, seed=5)

    for length in ({"max_epochs": 2}, {"max_steps": 7}):  # Lightning makes the loaders before or after it resumes
        whole = fit(on(8), **length)
        stopped = fit(on(8), SaveAndStop("on_train_batch_end", 2, tmp_path / "c.ckpt"), **length)
        resumed = fit(on(9), resume=tmp_path / "c.ckpt", **length)
        assert stopped.seen + resumed.seen == whole.seen
        assert fit(on(9), **length).seen != whole.seen
