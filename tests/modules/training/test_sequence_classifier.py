"""The classifier's LightningModule: steps, packing, ranks, figures, resuming, and files that stock peft reads."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lightning_qlora.modules.checkpoints.tokenizer import load_tokenizer
from lightning_qlora.modules.data.classification import ClassificationDataModule, ClassificationDataOptions
from lightning_qlora.modules.lora.config import default_lora
from lightning_qlora.modules.quantization.nf4_linear import NF4Linear
from lightning_qlora.modules.training.sequence_classifier import QLoRASequenceClassifier
from tests.distributed import RankPools, build

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]

KINDS: dict[str, list[Any]] = {
    "single_label_classification": ["animal", "tool", "place"],
    "multi_label_classification": [["animal"], ["tool", "place"], []],
    "regression": [0.5, 1.5, -2.25],
}


class Losses(Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == len(self.values) + 1:
            self.values.append(float(trainer.callback_metrics["train_loss"]))


def write_texts(path: Path, kind: str, count: int = 33) -> str:
    """Texts of 1 to 10 words; 3 of the 33 are held out, so that one of two ranks has fewer."""
    words = [["cat"], ["saw"], ["town"]]
    rows = [
        {"text": " ".join(words[i % 3] * (1 + i % 10)) + f" {i}", "label": KINDS[kind][i % 3]} for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(
    model_dir: Path, dataset: str, *, packing: bool = False, strategy: Any = "auto", batch_size: int = 10,
    max_steps: int = 3, ckpt: Path | None = None, save: Path | None = None, adapter: Path | None = None,
    accelerator: str = "cpu", devices: int = 1, predict: bool = False, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Train, and return losses, figures, what is trained and predictions."""
    data = ClassificationDataModule(
        load_tokenizer(model_dir), ClassificationDataOptions(dataset), batch_size=batch_size, seq_len=64,
        packing=packing, vocab_size=300, predict_dataset=dataset if predict else None,
    )  # fmt: skip
    data.load()
    module = QLoRASequenceClassifier(
        model_dir, default_lora(4), labels=data.labels, problem_type=data.problem_type, packing=packing,
        learning_rate=5e-3, schedule="constant", tokenizer=data.tokenizer, **options,
    )  # fmt: skip
    losses = Losses()
    trainer = L.Trainer(
        accelerator=accelerator, devices=devices, strategy=strategy, max_steps=max_steps,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        inference_mode=False, use_distributed_sampler=False, num_sanity_val_steps=0, callbacks=[losses],
        gradient_clip_val=1.0,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=ckpt)
    if max_steps == 3 and ckpt is None:
        trainer.validate(module, data, verbose=False)
    if save is not None:
        trainer.save_checkpoint(save)
    if adapter is not None:
        module.save_adapter(adapter)
    trained = [name for name, p in module.named_parameters() if p.requires_grad and "lora_" not in name]
    predictions = []
    if predict:
        trainer.predict(module, datamodule=data)
        predictions = module.predictions()
    return {
        "losses": losses.values, "metrics": module.metrics, "trained": trained, "predictions": predictions,
        "module": module if strategy == "auto" else None, "data": data if strategy == "auto" else None,
        "val_loss": float(trainer.callback_metrics.get("val_loss", torch.nan)),
    }  # fmt: skip


def on_ranks(model_dir: Path, dataset: str, batch_size: int, strategy: str, accelerator: str, adapter: Path) -> Any:
    devices = torch.distributed.get_world_size()
    return run(
        model_dir, dataset, strategy=build(strategy, devices=devices), batch_size=batch_size, adapter=adapter,
        accelerator=accelerator, devices=devices, predict=True,
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_train_as_padded_ones(kind, tiny_llama_dir, tmp_path):
    dataset = write_texts(tmp_path / "texts.jsonl", kind)
    padded = run(tiny_llama_dir, dataset, batch_size=30)
    packed = run(tiny_llama_dir, dataset, batch_size=30, packing=True)  # all of them in one step
    assert padded["trained"] == ["model.score.weight"]
    assert padded["losses"] == pytest.approx(packed["losses"], rel=1e-4)
    assert padded["losses"][-1] < padded["losses"][0]
    assert padded["val_loss"] == pytest.approx(packed["val_loss"], rel=1e-4)
    assert padded["metrics"].texts == packed["metrics"].texts == 3
    assert padded["metrics"].figures == pytest.approx(packed["metrics"].figures, rel=1e-3)


@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
def test_two_ranks_train_evaluate_and_predict_as_one(strategy, ranks: RankPools, tiny_llama_dir, tmp_path):
    dataset = write_texts(tmp_path / "texts.jsonl", "single_label_classification")
    one = run(tiny_llama_dir, dataset, batch_size=8, predict=True, adapter=tmp_path / "one")
    two = ranks.run(2, "cpu", on_ranks, tiny_llama_dir, dataset, 4, strategy, "cpu", tmp_path / "two", timeout=300)
    for rank in two:
        assert rank["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert rank["metrics"].confusion == one["metrics"].confusion
        assert rank["metrics"].figures == pytest.approx(one["metrics"].figures, rel=1e-5)
        assert [row["label"] for row in rank["predictions"]] == [row["label"] for row in one["predictions"]]
        for ours, theirs in zip(rank["predictions"], one["predictions"], strict=True):
            assert ours["probabilities"] == pytest.approx(theirs["probabilities"], abs=1e-5)
    described = [(tmp_path / name / "classification.json").read_text() for name in ("one", "two")]
    assert described[0] == described[1]


def test_a_resumed_run_goes_on_exactly(tiny_llama_dir, tmp_path):
    dataset = write_texts(tmp_path / "texts.jsonl", "single_label_classification")
    whole = run(tiny_llama_dir, dataset, max_steps=6, batch_size=8)
    run(tiny_llama_dir, dataset, max_steps=2, batch_size=8, save=tmp_path / "two.ckpt")
    saved = torch.load(tmp_path / "two.ckpt", weights_only=False)["state_dict"]
    assert all("lora_" in name or name == "model.score.weight" for name in saved)
    rest = run(tiny_llama_dir, dataset, max_steps=6, batch_size=8, ckpt=tmp_path / "two.ckpt")
    assert rest["module"].metrics == whole["module"].metrics
    for (name, a), (_, b) in zip(whole["module"].named_parameters(), rest["module"].named_parameters(), strict=True):
        if a.requires_grad:
            assert torch.equal(a, b), name
    other = write_texts(tmp_path / "other.jsonl", "multi_label_classification")
    with pytest.raises(ValueError, match=r"does not fit this run|was made for single_label_classification"):
        run(tiny_llama_dir, other, max_steps=6, batch_size=8, ckpt=tmp_path / "two.ckpt")


def test_what_is_saved_opens_in_transformers_and_peft(tiny_llama_dir, tmp_path):
    dataset = write_texts(tmp_path / "texts.jsonl", "single_label_classification")
    ours = run(tiny_llama_dir, dataset, adapter=tmp_path / "adapter", predict=True)
    described = json.loads((tmp_path / "adapter" / "classification.json").read_text())
    described["id2label"] = dict(enumerate(described.pop("labels")))
    stock = AutoModelForSequenceClassification.from_pretrained(tiny_llama_dir, dtype=torch.float32, **described)
    assert stock.config.id2label == dict(enumerate(ours["data"].labels))
    with torch.no_grad():
        for name, layer in ours["module"].model.named_modules():
            if isinstance(layer, NF4Linear):
                stock.get_submodule(name.removesuffix(".base_layer")).weight.copy_(layer.dequantize())
    peer = PeftModel.from_pretrained(stock, tmp_path / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    texts = ours["data"].predict_texts
    with torch.no_grad():
        logits = peer(**tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")).logits
    expected = [dict(zip(ours["data"].labels, row, strict=True)) for row in logits.softmax(-1).tolist()]
    for prediction, row in zip(ours["predictions"], expected, strict=True):
        assert prediction["probabilities"] == pytest.approx(row, abs=1e-5)
    again = run(tiny_llama_dir, dataset, max_steps=1, init_adapter=tmp_path / "adapter")
    assert again["losses"][0] < ours["losses"][0]
    other = write_texts(tmp_path / "other.jsonl", "multi_label_classification")
    with pytest.raises(ValueError, match="was trained for single_label_classification"):
        run(tiny_llama_dir, other, init_adapter=tmp_path / "adapter")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": ["a"]}, "needs at least 2 labels"),
        ({"labels": ["a", "a"]}, "names that differ"),
        ({"labels": ["a", "b"], "class_weights": [1.0, 0.0]}, "2 positive numbers, one for each of a, b"),
        ({"labels": ["a"], "problem_type": "regression", "class_weights": [1.0]}, "does not have. Leave them out"),
        ({"labels": ["a", "b"], "problem_type": "ranking"}, "problem_type must be one of"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, message, tiny_llama_dir):
    with pytest.raises(ValueError, match=message):
        QLoRASequenceClassifier(tiny_llama_dir, default_lora(4), **options)


@pytest.mark.parametrize("kind", ["single_label_classification", "multi_label_classification"])
def test_class_weights_are_those_of_torch(kind, tiny_llama_dir):
    weights, logits = [0.5, 2.0, 1.0], torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    module = QLoRASequenceClassifier(
        tiny_llama_dir, default_lora(4), labels=["a", "b", "c"], problem_type=kind, class_weights=weights
    )
    if kind == "single_label_classification":
        labels = torch.tensor([0, 1, 1, 2])
        each = torch.nn.functional.cross_entropy(logits, labels, reduction="none") * torch.tensor(weights)[labels]
        expected = each.sum()
    else:
        labels = torch.tensor([[0, 1, 0], [1, 1, 0], [0, 0, 0], [0, 0, 1.0]])
        criterion = torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor(weights))
        expected = criterion(logits, labels) * 4
    loss, count = module._loss(logits, {"labels": labels})
    torch.testing.assert_close(loss, expected)
    assert count == 4
