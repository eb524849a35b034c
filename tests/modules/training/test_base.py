"""What Lightning users expect of any module: hyperparameters, load_from_checkpoint, copies, tests, foreign batches."""

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_qlora.modules.data.data_module import ChatDataModule
from lightning_qlora.modules.lora.config import default_lora, lora_to_dict
from lightning_qlora.modules.losses.functional import cross_entropy
from lightning_qlora.modules.training.causal_lm import QLoRACausalLM
from tests.training import qlora

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated"),
]

IDS = torch.randint(3, 300, (4, 12), generator=torch.Generator().manual_seed(0))
ROWS = [{"input_ids": ids, "labels": ids} for ids in IDS]


def loader(batch_size: int = 2) -> DataLoader[Any]:
    """Rows of equal length in PyTorch's own collation: a loader of someone else's."""
    return DataLoader(ROWS, batch_size=batch_size)  # type: ignore[arg-type]


@pytest.fixture
def fit(tmp_path: Path) -> Callable[..., L.Trainer]:
    """``fit(module, **options)`` trains one epoch of two steps on the CPU and returns the Trainer."""

    def run(module: L.LightningModule, data: Any = None, **options: Any) -> L.Trainer:
        trainer = L.Trainer(
            accelerator="cpu", devices=1, default_root_dir=tmp_path, enable_progress_bar=False,
            enable_model_summary=False, inference_mode=False, **{"logger": False, "max_epochs": 1, **options},
        )  # fmt: skip
        trainer.fit(module, data or loader())
        return trainer

    return run


def test_a_checkpoint_holds_what_builds_the_module_again(fit, tiny_llama_dir: Path, tmp_path: Path) -> None:
    lora = default_lora(r=4, targets=["q_proj", "down_proj"])
    trained = qlora(tiny_llama_dir, lora, learning_rate=1e-2, attention="eager", seed=3)
    trainer = fit(trained, enable_checkpointing=True, logger=CSVLogger(tmp_path))
    path = Path(trainer.checkpoint_callback.best_model_path)
    assert torch.load(path, weights_only=True)["hyper_parameters"]["lora"] == lora_to_dict(lora)
    logged = next(tmp_path.rglob("hparams.yaml")).read_text()
    assert "learning_rate: 0.01" in logged
    assert "attention: eager" in logged

    loaded = QLoRACausalLM.load_from_checkpoint(path)
    assert (loaded.learning_rate, loaded.compute, loaded.seed) == (1e-2, trained.compute, 3)
    assert loaded.lora.to_dict() == trained.lora.to_dict()
    assert torch.equal(loaded(IDS), trained.eval()(IDS))
    assert QLoRACausalLM.load_from_checkpoint(path, learning_rate=1e-3).learning_rate == 1e-3
    fit(loaded)  # and it trains


def test_a_loss_that_no_checkpoint_can_hold_is_asked_for(fit, tiny_llama_dir: Path, recwarn) -> None:
    loss = functools.partial(cross_entropy, label_smoothing=0.1)
    trainer = fit(qlora(tiny_llama_dir, default_lora(4), loss=loss), enable_checkpointing=True)
    path = trainer.checkpoint_callback.best_model_path
    with pytest.raises(ValueError, match=r"trained with the loss functools.partial\(<function cross_entropy .* Pass "):
        QLoRACausalLM.load_from_checkpoint(path)
    assert QLoRACausalLM.load_from_checkpoint(path, loss=loss).loss is loss
    assert not [warning for warning in recwarn if "not in the checkpoint" in str(warning.message)]


def test_a_copy_is_whole_and_separate(fit, tiny_llama_dir: Path) -> None:
    module = qlora(tiny_llama_dir, default_lora(4), learning_rate=1e-1)
    fit(copy.deepcopy(module))
    assert module.model is None
    fit(module)
    before = module.eval()(IDS)
    twin = copy.deepcopy(module)
    fit(twin)
    assert torch.equal(module.eval()(IDS), before)
    assert not torch.equal(twin.eval()(IDS), before)


def test_weights_are_averaged_as_lightning_does_it(fit, tiny_llama_dir: Path) -> None:
    """The average of equal weights per step: with one step they are those of the step itself."""
    plain, averaged = (qlora(tiny_llama_dir, default_lora(4), learning_rate=1e-1) for _ in range(2))
    fit(plain, max_steps=1)
    fit(averaged, max_steps=1, callbacks=[WeightAveraging()])
    assert torch.equal(averaged.eval()(IDS), plain.eval()(IDS))


def test_test_loss_is_the_validation_loss(fit, tiny_llama_dir: Path) -> None:
    module = qlora(tiny_llama_dir, default_lora(4))
    trainer = fit(module)
    (validated,), (tested,) = (run(module, loader(), verbose=False) for run in (trainer.validate, trainer.test))
    assert tested == {"test_loss": validated["val_loss"]}


def test_counts_of_pytorchs_own_collation_are_added_up(fit, tiny_llama_dir: Path) -> None:
    """Per sample there, they are tensors [B] in a batch; without them the tokens are counted."""
    module = qlora(tiny_llama_dir, default_lora(4))
    fit(module)
    with torch.no_grad():
        loss, tokens = module.loss_sum({"input_ids": IDS, "labels": IDS, "num_loss_tokens": torch.tensor([11] * 4)})
        expected, counted = module.loss_sum({"input_ids": IDS, "labels": IDS})
    assert (tokens, counted) == (44, 44)
    assert torch.equal(loss, expected)


def test_overfitting_a_few_batches_repeats_them(fit, tiny_llama_dir: Path, tmp_path: Path) -> None:
    """Lightning puts its own sampler into the loader that it gets for this."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"say {i}", "completion": f"{i}!"}) + "\n" for i in range(20)))
    data = ChatDataModule(tiny_llama_dir, path, batch_size=2, seq_len=64)
    module, seen = qlora(tiny_llama_dir, default_lora(4)), []
    module.on_train_batch_end = lambda outputs, batch, index: seen.append(batch["input_ids"])  # type: ignore[method-assign]
    trainer = fit(module, data, max_epochs=2, overfit_batches=3)
    assert trainer.global_step == 6
    assert all(torch.equal(first, second) for first, second in zip(seen[:3], seen[3:], strict=True))
