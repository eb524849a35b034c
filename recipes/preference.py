r"""Finetune a language model by preferences with QLoRA: DPO, IPO, ORPO, KTO or SimPO, sharded or not.

    python recipes/preference.py
    python recipes/preference.py --loss dpo --devices 2 --model meta-llama/Llama-3.1-8B-Instruct \
        --dataset pairs.jsonl --lr 2e-5 --epochs 1 --precompute_reference --compile default

The reference model is the same 4-bit base with its adapters off, so there is one copy of it, which FSDP2 shards like
the rest; --precompute_reference computes its log-probabilities once before training. Logits of a batch never exist.
The two answers of a pair are documents of one packed row (--packing false pads them). Rows are TRL's: prompt, chosen
and rejected; chosen and rejected alone; or for kto prompt, completion and label.

Without flags it teaches SmolLM2-135M-Instruct by ORPO to prefer cards of five lines over prose, on questions about
Python's own documentation: no GPU and no model hub needed. It prints which share of held-out questions is answered with
a well-formed card: with --max_steps 14 --val_samples 8 none of 8 before and 6 after, in 6 minutes on one core. ORPO
contains the cross-entropy of chosen answers; the other losses need a model that already gives such answers now and
then: here DPO's loss is 0 after nine steps, and the answers are still no cards. Learning rates of this size are for few
steps; take 5e-6 to 5e-5 for your own data.

Prints and writes rewards, margins, accuracy and log-probabilities. Writes report.json and report.html, a peft adapter
and resumable checkpoints to --output_dir. Ctrl-C saves a checkpoint; --resume goes on from the latest.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Annotated

import lightning.pytorch as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_qlora.callbacks import (
    CompareAnswers,
    CompileReport,
    GracefulStop,
    LossProgress,
    MemoryReport,
    PreferenceReport,
    RunReport,
    SaveAdapter,
    StepCheckpoint,
    ThroughputReport,
)
from lightning_qlora.modules.attention import choose_attention
from lightning_qlora.modules.checkpoints.chat_format import ChatFormat
from lightning_qlora.modules.checkpoints.resolve import ModelOptions, base_name
from lightning_qlora.modules.cli import Only, as_metadata, run_recipe
from lightning_qlora.modules.data.options import BatchOptions
from lightning_qlora.modules.data.preference import CARD_PREFERENCES, PreferenceDataModule, PreferenceDataOptions
from lightning_qlora.modules.data.stdlib_docs import is_api_card
from lightning_qlora.modules.distributed.strategies import StrategyOptions, build_strategy
from lightning_qlora.modules.distributed.trained_checkpoints import CheckpointOptions
from lightning_qlora.modules.hardware import capabilities, compute_dtype
from lightning_qlora.modules.lora.config import LoraOptions
from lightning_qlora.modules.models.families import attention_request, load_config
from lightning_qlora.modules.models.options import ComputeOptions
from lightning_qlora.modules.training.options import OptimizationOptions, PreferenceOptions, RunOptions
from lightning_qlora.modules.training.preference import QLoRAPreference
from lightning_qlora.modules.training.run_directory import RunDirectory
from lightning_qlora.modules.training.run_plan import plan_run


def main(
    model: ModelOptions = ModelOptions(),
    preference: PreferenceOptions = PreferenceOptions(loss="orpo"),
    data_options: PreferenceDataOptions = PreferenceDataOptions(),
    answers: int = 8,
    batch: BatchOptions = BatchOptions(batch_size=2, seq_len=192, packing=True),
    optimization: Annotated[
        OptimizationOptions, Only("max_steps", "epochs", "lr", "clip_norm", "seed")
    ] = OptimizationOptions(lr=1e-3),
    lora: LoraOptions = LoraOptions(lora_r=16),
    strategy: StrategyOptions = StrategyOptions(),
    compute: ComputeOptions = ComputeOptions(),
    checkpoints: CheckpointOptions = CheckpointOptions(),
    run: RunOptions = RunOptions(Path("runs/preference")),
) -> int:
    """Train, report and save; returns the exit status.

    Args:
        model, preference, data_options, batch, optimization, lora, strategy, compute, checkpoints, run: Groups.
        answers: How many held-out questions to answer before and after training; with prompt, that one alone.
    """
    flags = as_metadata(locals())  # nothing else is local yet
    strategy = strategy.check()
    files = RunDirectory(run.output_dir)
    checkpoint = files.begin(run, flags)
    device, directory, objective = capabilities(), model.directory(), preference.objective
    config = load_config(directory)
    request = functools.partial(
        attention_request, config, sliding_window=compute.sliding_window,
        compute_capability=device.compute_capability, dtype=compute_dtype(strategy.precision),
    )  # fmt: skip
    try:
        choose_attention(compute.attention, request(packed=batch.packing))
    except ValueError as error:
        if not batch.packing:
            raise
        choose_attention(compute.attention, request(packed=False))
        batch = dataclasses.replace(batch, packing=False)
        rank_zero_info(f"Rows are padded, not packed: {error}")
    planned = plan_run(
        config, lora.config(), strategy, compute, batch_size=batch.batch_size * (2 if objective.paired else 1),
        seq_len=batch.seq_len, accumulate=batch.accumulate, device=device,
    )  # fmt: skip
    strategy, compute, plan = planned.strategy, planned.compute, planned.memory
    if (status := planned.announce(dry_run=run.dry_run)) is not None:
        return status

    chat_format = ChatFormat.of(directory, lora.init_adapter)
    data = PreferenceDataModule(
        chat_format.tokenizer, data_options, batch_size=batch.batch_size, seq_len=batch.seq_len,
        paired=objective.paired, packing=batch.packing, seed=optimization.seed,
        max_position_embeddings=config.max_position_embeddings, vocab_size=config.vocab_size,
    )  # fmt: skip
    data.load()
    optimization = optimization.in_steps(data.steps_per_epoch(strategy.world_size, batch.accumulate))
    micro_batches = data.batches_in(optimization.max_steps, strategy.world_size, batch.accumulate)
    module = QLoRAPreference(
        directory, lora.config(), objective=objective,
        reference_file=files.reference if preference.precompute_reference else None,
        learning_rate=optimization.lr, warmup_steps=optimization.warmup_steps, compute=compute, packing=batch.packing,
        init_adapter=lora.init_adapter, model_name=base_name(model.model, directory), seed=optimization.seed,
    )  # fmt: skip
    module.check_checkpoint(checkpoint)
    module.chat_format = chat_format.trained(directory, data.tokenizer, data.turn_ends)

    examples = [(run.prompt, None)] if run.prompt else data.prompts(answers)
    is_good = is_api_card if data_options.dataset == CARD_PREFERENCES else None
    stop = GracefulStop(files.checkpoints)
    trainer = L.Trainer(
        devices=strategy.devices, num_nodes=strategy.num_nodes, strategy=build_strategy(strategy, checkpoints),
        max_steps=optimization.max_steps, accumulate_grad_batches=batch.accumulate,
        gradient_clip_val=optimization.clip_norm, val_check_interval=max(1, micro_batches // 2),
        check_val_every_n_epoch=None, num_sanity_val_steps=0, inference_mode=False, logger=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[
            CompareAnswers(examples, max_new_tokens=64, is_good=is_good, shown=2),
            LossProgress(),
            PreferenceReport(),
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
    files.release()
    if trainer.is_global_zero and not stop.exit_code:
        print(f"To talk to it: python recipes/chat.py --adapter {files.adapter}", flush=True)
    return stop.exit_code


if __name__ == "__main__":
    sys.exit(run_recipe(main))
