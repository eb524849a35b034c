r"""Finetune a language model with QLoRA to call tools, and have it call them.

    python recipes/tool_calling.py
    python recipes/tool_calling.py --model Qwen/Qwen3-8B --dataset conversations.jsonl --epochs 2 --packing \
        --seq_len 4096 --compile default

Rows have the tools that the assistant may call (a column tools: functions with JSON Schema) and messages, of which some
have tool_calls and others are their results. Calls and answers are trained, results are not. Every row is written with
the model's chat template, read back and compared before training; a template that ignores tools gets them. Held-out
requests are answered before and after training: calls are compared by structure and checked against their schemas.

Without flags it finetunes SmolLM2-135M-Instruct on 900 conversations over eight small tools, made here: no GPU and no
model hub needed; 30 steps of about 9 conversations, and 5 GiB on CPU cores. These tools are run: the model's calls are
executed, their results go back to it, and its final answers are checked. On a GPU take --epochs 3 --batch_size 8
--val_samples 100: then 98 % of the calls were exact and 96 % of the final answers right. --dataset bfcl-functions has
2 551 requests with tools; what is reported there, on functions that were not trained on, is no score of the benchmark
that they are from.

Writes report.json and report.html, a peft adapter and resumable checkpoints to --output_dir. Ctrl-C saves a checkpoint;
--resume goes on from the latest.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import lightning.pytorch as L

from lightning_qlora.callbacks import (
    CompileReport,
    GracefulStop,
    LossProgress,
    MemoryReport,
    RunReport,
    SaveAdapter,
    StepCheckpoint,
    ThroughputReport,
    ToolCallReport,
)
from lightning_qlora.modules.attention import choose_attention
from lightning_qlora.modules.checkpoints.chat_format import ChatFormat
from lightning_qlora.modules.checkpoints.resolve import ModelOptions, base_name
from lightning_qlora.modules.cli import Only, as_metadata, positive, run_recipe
from lightning_qlora.modules.data.data_module import ChatDataModule
from lightning_qlora.modules.data.demo_tools import DEMO_TOOLS
from lightning_qlora.modules.data.options import BatchOptions, DataOptions
from lightning_qlora.modules.data.rendering import ChatRenderer
from lightning_qlora.modules.data.tool_evaluation import converse, requests_of
from lightning_qlora.modules.data.tool_requests import TOOL_REQUESTS
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
from lightning_qlora.modules.training.tool_call_metrics import MISTAKES, ToolCallMetric, mistake_of

_NAMES = {"functions": "of the right functions"}


def evaluate(module: QLoRACausalLM, data: ChatDataModule, max_new_tokens: int, batch_size: int) -> dict[str, Any]:
    """Figures of the held-out requests, in the form that ``ToolCallReport`` takes."""
    requests = requests_of(data.val_chats)
    functions = DEMO_TOOLS if data.options.dataset == TOOL_REQUESTS else None
    outcomes = converse(
        requests, lambda prompts: module.complete(prompts, max_new_tokens, batch_size),
        ChatRenderer(data.tokenizer, date=data.date), functions,
    )  # fmt: skip
    metric = ToolCallMetric(sync_on_compute=False)  # every rank has all outcomes
    for outcome in outcomes:
        metric.update(outcome.calls, outcome.request.expected, outcome.request.tools)
    counts = dict(zip(MISTAKES, metric.mistakes.tolist(), strict=True))
    shares = {name: float(share) for name, share in metric.compute().items()}
    figures = {f"calls {_NAMES.get(name, name)}": share for name, share in shares.items()}
    if functions is not None:
        figures["final answers right"] = sum(outcome.is_right for outcome in outcomes) / len(outcomes)
    examples = [
        {
            "request": outcome.request.messages[-1]["content"],
            "expected": json.dumps([{c["name"]: c["arguments"]} for c in outcome.request.expected], ensure_ascii=False),
            "written": outcome.written,
            "right": mistake_of(outcome.calls, outcome.request.expected, outcome.request.tools) is None,
        }
        for outcome in outcomes[:10]
    ]
    return {"requests": len(requests), "figures": figures, "mistakes": counts, "examples": examples}


def main(
    model: ModelOptions = ModelOptions(),
    data_options: DataOptions = DataOptions(TOOL_REQUESTS, val_samples=40),
    batch: BatchOptions = BatchOptions(batch_size=4, seq_len=512, packing=True),
    optimization: OptimizationOptions = OptimizationOptions(lr=1e-3),
    lora: LoraOptions = LoraOptions(lora_r=16),
    strategy: StrategyOptions = StrategyOptions(),
    compute: ComputeOptions = ComputeOptions(),
    checkpoints: CheckpointOptions = CheckpointOptions(),
    run: Annotated[RunOptions, Only("output_dir", "resume", "dry_run")] = RunOptions(Path("runs/tool_calling")),
    max_new_tokens: int = 96,
    answer_batch: int = 40,
) -> int:
    """Train, evaluate, report and save; returns the exit status.

    Args:
        model, data_options, batch, optimization, lora, strategy, compute, checkpoints, run: Groups of flags.
        max_new_tokens: Tokens after which a turn of the model is cut, in evaluation.
        answer_batch: Held-out requests that a device answers at once.
    """
    flags = as_metadata(locals())  # nothing else is local yet
    positive(max_new_tokens=max_new_tokens, answer_batch=answer_batch)
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
    planned = plan_run(
        config, lora.config(), strategy, compute, batch_size=batch.batch_size, seq_len=batch.seq_len,
        accumulate=batch.accumulate, device=device,
    )  # fmt: skip
    strategy, compute, plan = planned.strategy, planned.compute, planned.memory
    if (status := planned.announce(dry_run=run.dry_run)) is not None:
        return status
    chat_format = ChatFormat.of(directory, lora.init_adapter)
    data = ChatDataModule(
        chat_format.tokenizer, data_options, batch_size=batch.batch_size, seq_len=batch.seq_len, packing=batch.packing,
        seed=optimization.seed, max_position_embeddings=config.max_position_embeddings, vocab_size=config.vocab_size,
    )  # fmt: skip
    data.load()
    if not requests_of(data.val_chats):
        raise ValueError("No held-out chat has tools, so nothing could be evaluated; use recipes/fsdp2_qlora.py.")
    optimization = optimization.in_steps(data.steps_per_epoch(strategy.world_size, batch.accumulate))
    module = QLoRACausalLM(
        directory, lora.config(), loss=optimization.loss, learning_rate=optimization.lr,
        warmup_steps=optimization.warmup_steps, compute=compute, packing=batch.packing, init_adapter=lora.init_adapter,
        model_name=base_name(model.model, directory), seed=optimization.seed,
    )  # fmt: skip
    module.check_checkpoint(checkpoint)
    module.chat_format = chat_format.trained(directory, data.tokenizer, data.turn_ends)

    stop = GracefulStop(files.checkpoints)
    trainer = L.Trainer(
        devices=strategy.devices, num_nodes=strategy.num_nodes, strategy=build_strategy(strategy, checkpoints),
        max_steps=optimization.max_steps, accumulate_grad_batches=batch.accumulate,
        gradient_clip_val=optimization.clip_norm,
        val_check_interval=max(1, data.batches_in(optimization.max_steps, strategy.world_size, batch.accumulate)),
        check_val_every_n_epoch=None, num_sanity_val_steps=0, inference_mode=False, logger=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[
            ToolCallReport(lambda module: evaluate(module, data, max_new_tokens, answer_batch)),
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
    files.release()
    return stop.exit_code


if __name__ == "__main__":
    sys.exit(run_recipe(main))
