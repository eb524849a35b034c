r"""Finetune a language model with QLoRA, its 4-bit base sharded over GPUs by FSDP2.

    python recipes/fsdp2_qlora.py --devices 2
    python recipes/fsdp2_qlora.py --devices 2 --model meta-llama/Llama-3.1-8B-Instruct --dataset chats.jsonl \
        --compile default

Each device holds its share of the packed 4-bit weights; layers are gathered as 4-bit bytes and dequantized inside the
matrix products. Without flags it finetunes SmolLM2-135M-Instruct on API cards made from Python's own documentation: no
GPU and no model hub needed, about 5 minutes and 3 GiB a process on 2 CPU cores, the loss falling from 2.9 to about 1.

--dry_run predicts the memory of each GPU and ends. Writes report.json and report.html, a peft adapter and resumable
checkpoints to --output_dir. Ctrl-C saves a checkpoint; --resume goes on from the latest.
"""

from __future__ import annotations

import sys
from pathlib import Path

import lightning.pytorch as L

from lightning_qlora.callbacks import (
    CompareAnswers,
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
from lightning_qlora.modules.checkpoints.chat_format import ChatFormat
from lightning_qlora.modules.checkpoints.resolve import ModelOptions, base_name
from lightning_qlora.modules.cli import as_metadata, run_recipe
from lightning_qlora.modules.data.data_module import ChatDataModule
from lightning_qlora.modules.data.options import BatchOptions, DataOptions
from lightning_qlora.modules.distributed.strategies import StrategyOptions, build_strategy
from lightning_qlora.modules.distributed.trained_checkpoints import CheckpointOptions
from lightning_qlora.modules.hardware import capabilities, compute_dtype
from lightning_qlora.modules.lora.config import LoraOptions
from lightning_qlora.modules.models.families import attention_request, load_config
from lightning_qlora.modules.models.options import ComputeOptions
from lightning_qlora.modules.training.causal_lm import QLoRACausalLM
from lightning_qlora.modules.training.options import OptimizationOptions, RunOptions
from lightning_qlora.modules.training.run_directory import RunDirectory
from lightning_qlora.modules.training.run_plan import plan_run


def main(
    model: ModelOptions = ModelOptions(),
    data_options: DataOptions = DataOptions(),
    batch: BatchOptions = BatchOptions(),
    optimization: OptimizationOptions = OptimizationOptions(),
    lora: LoraOptions = LoraOptions(),
    strategy: StrategyOptions = StrategyOptions(devices=2),
    compute: ComputeOptions = ComputeOptions(),
    checkpoints: CheckpointOptions = CheckpointOptions(),
    run: RunOptions = RunOptions(Path("runs/fsdp2_qlora")),
) -> int:
    """Train, report and save; returns the exit status. The flags are the fields of these classes."""
    flags = as_metadata(locals())  # nothing else is local yet
    strategy = strategy.check()
    files = RunDirectory(run.output_dir)
    checkpoint = files.begin(run, flags)
    device = capabilities()
    directory = model.directory()
    config = load_config(directory)
    choose_attention(  # refuses what it cannot do, before anything long
        compute.attention,
        attention_request(
            config,
            packed=batch.packing,
            sliding_window=compute.sliding_window,
            compute_capability=device.compute_capability,
            dtype=compute_dtype(strategy.precision),
        ),
    )
    planned = plan_run(
        config,
        lora.config(),
        strategy,
        compute,
        batch_size=batch.batch_size,
        seq_len=batch.seq_len,
        accumulate=batch.accumulate,
        device=device,
    )
    strategy, compute, plan = planned.strategy, planned.compute, planned.memory
    if (status := planned.announce(dry_run=run.dry_run)) is not None:
        return status

    chat_format = ChatFormat.of(directory, lora.init_adapter)
    data = ChatDataModule(
        chat_format.tokenizer,
        data_options,
        batch_size=batch.batch_size,
        seq_len=batch.seq_len,
        packing=batch.packing,
        seed=optimization.seed,
        max_position_embeddings=config.max_position_embeddings,
        vocab_size=config.vocab_size,
    )
    data.load()
    optimization = optimization.in_steps(data.steps_per_epoch(strategy.world_size, batch.accumulate))
    micro_batches = data.batches_in(optimization.max_steps, strategy.world_size, batch.accumulate)
    module = QLoRACausalLM(
        directory,
        lora.config(),
        loss=optimization.loss,
        learning_rate=optimization.lr,
        warmup_steps=optimization.warmup_steps,
        compute=compute,
        packing=batch.packing,
        init_adapter=lora.init_adapter,
        model_name=base_name(model.model, directory),
        seed=optimization.seed,
    )
    module.check_checkpoint(checkpoint)
    module.chat_format = chat_format.trained(directory, data.tokenizer, data.turn_ends)

    examples = [(run.prompt, None)] if run.prompt else [data.example()] if data.example() else []
    stop = GracefulStop(files.checkpoints)
    trainer = L.Trainer(
        devices=strategy.devices,
        num_nodes=strategy.num_nodes,
        strategy=build_strategy(strategy, checkpoints),
        max_steps=optimization.max_steps,
        accumulate_grad_batches=batch.accumulate,
        gradient_clip_val=optimization.clip_norm,
        val_check_interval=max(1, micro_batches // 2),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        inference_mode=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            CompareAnswers(examples),
            LossProgress(),
            SaveAdapter(files.adapter),
            MemoryReport(predicted=plan.parts if device.device_type == "cuda" else None),
            ThroughputReport(),
            *([CompileReport()] if compute.compile != "off" else []),
            RunReport(files.report, html=True, metadata=flags | planned.metadata),
            StepCheckpoint(files.checkpoints, checkpoints.save_every, adapters=files.adapters),
            stop,
        ],
    )
    trainer.fit(module, data, ckpt_path=checkpoint)
    files.release()
    if trainer.is_global_zero and not stop.exit_code:
        print(f"To talk to it: python recipes/chat.py --adapter {files.adapter}")
        export = f"python recipes/export_gguf.py --adapter {files.adapter} --type q8_0 --output {files.root}/model.gguf"
        print(f"To run it in llama.cpp: {export}", flush=True)
    return stop.exit_code


if __name__ == "__main__":
    sys.exit(run_recipe(main))
