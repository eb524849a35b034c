r"""Finetune a Llama with QLoRA, its 4-bit base sharded over GPUs by FSDP2.

    python recipes/fsdp2_qlora.py --devices 2
    python recipes/fsdp2_qlora.py --devices 2 --model meta-llama/Llama-3.1-8B-Instruct --dataset chats.jsonl \
        --checkpoint_activations --compile default

Each device holds its share of the packed 4-bit weights; layers are gathered as 4-bit bytes and dequantized inside the
matrix products. Without flags it finetunes SmolLM2-135M-Instruct on API cards made from Python's own documentation: no
GPU and no model hub needed, about 5 minutes and 3 GiB a process on 2 CPU cores, the loss falling from 2.9 to about 1.

--dry_run predicts the memory of each GPU and ends. Writes report.json and report.html, a peft adapter and resumable
checkpoints to --output_dir. Ctrl-C saves a checkpoint; --resume goes on from the latest.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Literal

import lightning.pytorch as L
from lightning.pytorch.utilities.rank_zero import rank_zero_only

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
from lightning_qlora.modules.attention import AttentionName, AttentionRequest, choose_attention
from lightning_qlora.modules.checkpoints.config import load_config
from lightning_qlora.modules.checkpoints.demo_model import DEMO_MODEL
from lightning_qlora.modules.checkpoints.resolve import base_name, resolve_model
from lightning_qlora.modules.checkpoints.tokenizer import load_tokenizer
from lightning_qlora.modules.cli import as_metadata, positive, run_recipe
from lightning_qlora.modules.data.data_module import ChatDataModule
from lightning_qlora.modules.distributed.strategies import StrategyName, build_strategy
from lightning_qlora.modules.hardware import capabilities, check_devices, check_precision, compute_dtype
from lightning_qlora.modules.lora.config import default_lora
from lightning_qlora.modules.models.activation_offload import check_offload
from lightning_qlora.modules.models.compilation import CompileMode
from lightning_qlora.modules.training.causal_lm import QLoRACausalLM
from lightning_qlora.modules.training.memory_plan import Settings, plan_memory
from lightning_qlora.modules.training.run_directory import RunDirectory


def main(
    devices: int = 2,
    num_nodes: int = 1,
    strategy: StrategyName = "fsdp2",
    model: str = DEMO_MODEL,
    dataset: str = "stdlib-api-cards",
    output_dir: Path = Path("runs/fsdp2_qlora"),
    max_steps: int = 30,
    batch_size: int = 4,
    accumulate: int = 1,
    seq_len: int = 2048,
    packing: bool = False,
    attention: AttentionName = "auto",
    sliding_window: int | None = None,
    precision: Literal["auto", "32-true", "16-mixed", "bf16-mixed", "bf16-true"] = "auto",
    lr: float = 3e-4,
    clip_norm: float = 1.0,
    lora_r: int = 64,
    lora_alpha: int = 128,
    lora_dropout: float = 0.0,
    init_adapter: Path | None = None,
    seed: int = 0,
    resume: bool = False,
    save_every: int = 10,
    sharded_checkpoints: bool = False,
    async_save: bool = False,
    compile: CompileMode = "off",
    checkpoint_activations: bool = False,
    offload_activations: bool = False,
    offload: bool = False,
    reshard_after_forward: bool = True,
    prefetch: int = 0,
    shard_size: int | None = None,
    timeout_minutes: int = 30,
    prompt: str | None = None,
    dry_run: bool = False,
) -> int:
    """Train, report and save.

    Args:
        devices: GPUs to train on, on each node; processes on the CPU where there is no GPU.
        num_nodes: Machines; start the same command on each with torchrun.
        strategy: fsdp2 shards the base; ddp keeps a copy on each GPU, faster where it fits; single is for one device.
        model: Demo model, transformers directory (16-bit or bitsandbytes 4-bit safetensors), GGUF file, or hub name.
        dataset: JSON or JSONL file of chats (messages) or instruction/response pairs, a datasets name, or the default.
        output_dir: Where report.json, adapter/ and checkpoints/ go; must not hold another run.
        max_steps: Optimizer steps.
        batch_size: Samples of one micro-batch on one device.
        accumulate: Micro-batches of one optimizer step.
        seq_len: Longest sample in tokens; longer ones are cut at the end. Batches are padded to their own longest.
        packing: Fill rows of seq_len with several samples each, which do not see one another; batch_size counts rows.
        attention: What computes attention; auto takes the fastest that the GPU has for what is asked.
        sliding_window: Tokens that one sees, itself included; default all before it.
        precision: auto takes bf16-mixed or 16-mixed on a GPU, as the hardware allows, and 32-true on CPU.
        lr: Peak learning rate; 5 % of the steps warm up, then cosine decay to 0.
        clip_norm: Largest norm of all gradients together; 0 for any.
        lora_r: Rank of the adapters, which sit on all seven projections.
        lora_alpha: Scale of the adapters, times 1/r.
        lora_dropout: Dropout before the adapters.
        init_adapter: Directory of a peft adapter of the same rank and alpha to continue from.
        seed: Of initialisation, data order and dropout.
        resume: Go on from the latest checkpoint in output_dir.
        save_every: Optimizer steps between checkpoints, each with its adapter; the last two are kept.
        sharded_checkpoints: Each rank writes its own part, into a directory, instead of rank 0 all into one file.
        async_save: Write checkpoints while training goes on.
        compile: Compile each layer and the loss as one graph: half a minute at the start, then faster steps.
        checkpoint_activations: Recompute each layer in backward to save memory.
        offload_activations: Keep what layers are recomputed from in host memory.
        offload: Keep sharded weights and optimizer state in host memory.
        reshard_after_forward: Free gathered layers between forward and backward (fsdp2).
        prefetch: Layers to gather ahead; 0 leaves it to FSDP2, which gathers one.
        shard_size: GPUs that share one copy of the base (hybrid sharding); default all of them.
        timeout_minutes: How long a rank waits for the others before it gives up.
        prompt: What to ask before and after training; default a held-out question of the data.
        dry_run: Print the predicted memory of each device, and end, with status 1 if a GPU has less.
    """
    flags = as_metadata(locals())  # nothing else is local yet
    positive(
        max_steps=max_steps, batch_size=batch_size, accumulate=accumulate, save_every=save_every, num_nodes=num_nodes,
        timeout_minutes=timeout_minutes,
    )  # fmt: skip
    if clip_norm < 0:
        raise ValueError(f"--clip_norm must be at least 0, which is none, got {clip_norm}.")
    check_devices(devices, num_nodes)
    check_offload(checkpoint_activations=checkpoint_activations, offload_activations=offload_activations)
    precision = check_precision(precision)
    launched = build_strategy(
        strategy, devices=devices, num_nodes=num_nodes, precision=precision, cpu_offload=offload,
        reshard_after_forward=reshard_after_forward, prefetch=prefetch, shard_size=shard_size,
        sharded_checkpoints=sharded_checkpoints, async_save=async_save, timeout=timedelta(minutes=timeout_minutes),
    )  # fmt: skip
    lora = default_lora(lora_r, lora_alpha, lora_dropout)
    device = capabilities()
    directory = resolve_model(model)
    config = load_config(directory)
    choose_attention(  # refuses what it cannot do, before anything long
        attention,
        AttentionRequest(
            packed=packing, windows=(sliding_window,), compute_capability=device.compute_capability,
            dtype=compute_dtype(precision), dropout=config.attention_dropout,
        ),
    )  # fmt: skip
    plan = plan_memory(Settings(
        config=config, lora=lora, batch_size=batch_size, seq_len=seq_len,
        world_size=devices * num_nodes, strategy=strategy, precision=precision, offload=offload,
        checkpoint_activations=checkpoint_activations, offload_activations=offload_activations,
        compile=compile != "off", accumulate=accumulate, reshard_after_forward=reshard_after_forward,
        prefetch=prefetch, shard_size=shard_size, compute_capability=device.compute_capability,
    ))  # fmt: skip
    too_much = plan.check(device.memory_bytes) if device.device_type == "cuda" else None
    if rank_zero_only.rank == 0 and (dry_run or too_much):
        print(plan.table(), too_much or "", sep="\n", flush=True)
    if dry_run:
        return int(too_much is not None)
    run = RunDirectory(output_dir)
    checkpoint = run.start(resume, flags) if rank_zero_only.rank == 0 else run.latest_checkpoint() if resume else None

    data = ChatDataModule(
        load_tokenizer(directory), dataset, batch_size=batch_size, seq_len=seq_len, seed=seed, val_samples=32,
        packing=packing, max_position_embeddings=config.max_position_embeddings,
    )  # fmt: skip
    data.load()
    module = QLoRACausalLM(
        directory, lora, learning_rate=lr, warmup_steps=max_steps // 20, checkpoint_activations=checkpoint_activations,
        offload_activations=offload_activations, init_adapter=init_adapter, model_name=base_name(model, directory),
        seed=seed, compile=compile, attention=attention, sliding_window=sliding_window, packing=packing,
    )  # fmt: skip
    module.check_checkpoint(checkpoint)

    examples = [(prompt, None)] if prompt else [data.example()] if data.example() else []
    stop = GracefulStop(run.checkpoints)
    trainer = L.Trainer(
        devices=devices, num_nodes=num_nodes, strategy=launched, max_steps=max_steps,
        accumulate_grad_batches=accumulate, gradient_clip_val=clip_norm,
        val_check_interval=max(1, max_steps * accumulate // 2), check_val_every_n_epoch=None, num_sanity_val_steps=0,
        inference_mode=False, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[
            CompareAnswers(examples),
            LossProgress(),
            SaveAdapter(run.adapter),
            MemoryReport(predicted=plan.parts if device.device_type == "cuda" else None),
            ThroughputReport(),
            *([CompileReport()] if compile != "off" else []),
            RunReport(run.report, html=True, metadata=flags),
            StepCheckpoint(run.checkpoints, save_every, adapters=run.adapters),
            stop,
        ],
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=checkpoint)
    return stop.exit_code


if __name__ == "__main__":
    sys.exit(run_recipe(main))
