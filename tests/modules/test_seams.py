"""What a newcomer adds in one place: a family, a loss and a batch of another kind, without a line of the library.

An attention backend of one's own is in attention/test_backends.py.
"""

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, HeliumConfig, HeliumForCausalLM

from lightning_qlora.modules import ChatDataModule, QLoRACausalLM, default_lora
from lightning_qlora.modules.checkpoints.safetensors_files import SafetensorsCheckpoint
from lightning_qlora.modules.data.collators import ChatCollator
from lightning_qlora.modules.data.options import DataOptions
from lightning_qlora.modules.models.build import build_model, materialize
from lightning_qlora.modules.models.families import FAMILIES, Family
from lightning_qlora.modules.quantization import NF4Linear

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_family_is_one_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(FAMILIES, "helium", Family("Helium", "helium", "HeliumForCausalLM", "helium"))
    torch.manual_seed(0)
    config = HeliumConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=90, max_position_embeddings=64, initializer_range=0.1, pad_token_id=0,
    )  # fmt: skip
    HeliumForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    checkpoint = SafetensorsCheckpoint(tmp_path)
    model = build_model(checkpoint, default_lora(4))
    materialize(model, checkpoint, torch.device("cpu"), seed=0)
    stock = HeliumForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, NF4Linear)]
    assert len(layers) == 14
    with torch.no_grad():
        for name, layer in layers:
            stock.get_submodule(name.removesuffix(".base_layer")).weight.copy_(layer.dequantize())
    ids = torch.randint(3, 90, (2, 11))
    expected = stock(input_ids=ids, labels=ids)
    torch.testing.assert_close(model.eval()(input_ids=ids).logits, expected.logits, rtol=1e-5, atol=1e-5)
    loss = model.train()(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-5)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def weighted(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy of each token times its weight."""
    return weights * nn.functional.cross_entropy(logits.float(), labels, reduction="none")


def with_weights(samples: list[Any]) -> dict[str, Any]:
    """The usual batch, and a weight for each token: 2 where its id is even, else 1."""
    batch: dict[str, Any] = dict(ChatCollator(pad_token_id=0)(samples))
    return {**batch, "weights": 1.0 + (batch["input_ids"] % 2 == 0).float()}


def trainer(**options: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", devices=1, max_steps=1, logger=False, enable_checkpointing=False, inference_mode=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0, **options,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_a_loss_and_a_collator_are_functions(tiny_llama_dir: Path, tmp_path: Path) -> None:
    rows = [f'{{"prompt": "what is {i}", "completion": "a name of {i}"}}' for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    data = ChatDataModule(
        tokenizer,
        DataOptions(str(tmp_path / "rows.jsonl"), val_samples=0),
        batch_size=3,
        seq_len=64,
        collate_fn=with_weights,
    )
    module = QLoRACausalLM(tiny_llama_dir, default_lora(4), loss=weighted, loss_inputs=["weights"])
    fit = trainer(default_root_dir=tmp_path)
    fit.fit(module, data)
    first = next(iter(data.train_dataloader()))
    labels, ids = first["labels"], first["input_ids"]
    with torch.no_grad():
        logits = logits_before(tiny_llama_dir)(ids)
    counted = labels[:, 1:] != -100
    losses = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    expected = (first["weights"][:, 1:] * losses)[counted].sum() / counted.sum()
    assert float(fit.callback_metrics["train_loss"]) == pytest.approx(float(expected), rel=1e-5)


def logits_before(directory: Path) -> Any:
    """Logits of the model before training: B is zero, so the adapters add nothing."""
    checkpoint = SafetensorsCheckpoint(directory)
    model = build_model(checkpoint, default_lora(4))
    materialize(model, checkpoint, torch.device("cpu"), seed=0)
    return lambda ids: model.eval()(input_ids=ids).logits


@pytest.mark.filterwarnings("ignore")
def test_what_a_batch_must_hold_is_said(tiny_llama_dir: Path, tmp_path: Path) -> None:
    ids = torch.randint(3, 90, (2, 9))
    cases = {
        "The batch holds scores, which the model does not take": {"input_ids": ids, "labels": ids, "scores": ids},
        "The batch lacks labels; it holds input_ids": {"input_ids": ids},
    }
    for message, batch in cases.items():
        module = QLoRACausalLM(tiny_llama_dir, default_lora(4))
        with pytest.raises(ValueError, match=message):
            trainer(default_root_dir=tmp_path).fit(module, DataLoader([batch], batch_size=None))


@pytest.mark.filterwarnings("ignore")
def test_a_batch_without_counts_is_counted(tiny_llama_dir: Path, tmp_path: Path) -> None:
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    losses = []
    for counts in ({}, {"num_loss_tokens": 16, "num_tokens": 18}):
        fit = trainer(default_root_dir=tmp_path)
        batch = {"input_ids": ids, "labels": ids, **counts}
        fit.fit(QLoRACausalLM(tiny_llama_dir, default_lora(4)), DataLoader([batch], batch_size=None))
        losses.append(float(fit.callback_metrics["train_loss"]))
    assert losses[0] == losses[1] > 0
