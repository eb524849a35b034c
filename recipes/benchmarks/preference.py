"""Measure preference tuning (DPO) on random weights of a named shape, beside TRL with peft and bitsandbytes.

    python recipes/benchmarks/preference.py --shape llama-3.1-8b --batch_size 2 --seq_len 1024
    python recipes/benchmarks/preference.py --shape llama-3.1-8b --batch_size 2 --seq_len 1024 --compile default

About two minutes for 8B on an H200; the first run of a shape writes its checkpoint (6 GB for 8B). Without a GPU it runs
the tiny shape on the CPU. Needs trl (pip install trl). One run measures both, one after the other in one process, on
the same base weights and the same random pairs: documents of the full length, half of it prompt, no padding, a
reference that is the base with adapters off, AdamW, gradients clipped to norm 1, all layers recomputed in backward.
TRL keeps adapters in bfloat16, here they are float32.

Adds a row for each to ``results/preference.json``, with the log-probabilities of the first step's answers, which are
those of the base and show that both compute the same. Tokens are those of prompts and answers of both documents of a
pair. A step's time is that between the ends of two steps, with the device synchronized; warm-up steps do not count.
"""

from __future__ import annotations

import gc
import math
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import bitsandbytes as bnb
import lightning.pytorch as L
import torch
from datasets import Dataset
from record import RESULTS, save_record
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils.data import SequentialSampler
from train_step import GIB, LEARNING_RATE, Meter, train_ours
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from lightning_qlora.modules.checkpoints.random_weights import CHECKPOINTS, SHAPES, checkpoint_of
from lightning_qlora.modules.cli import Only, positive, run_recipe
from lightning_qlora.modules.data.preference_collator import PreferenceCollator
from lightning_qlora.modules.distributed.strategies import StrategyOptions
from lightning_qlora.modules.hardware import capabilities, compute_dtype
from lightning_qlora.modules.lora.config import LoraOptions
from lightning_qlora.modules.losses.preference import PreferenceObjective, dpo
from lightning_qlora.modules.models.families import load_config
from lightning_qlora.modules.models.options import ComputeOptions
from lightning_qlora.modules.training.memory_plan import Settings, plan_memory
from lightning_qlora.modules.training.preference import QLoRAPreference

COLUMNS = [
    "what", "shape", "precision", "pairs x tokens of a document", "r", "tokens/s", "step p50, ms", "peak GPU, GiB",
    "log-probability of a chosen answer, first step",
]  # fmt: skip


def main(
    shape: Literal["tiny", "llama-3.2-1b", "llama-3.1-8b", "qwen2.5-32b", "qwen3-8b", "gemma2-2b"] | None = None,
    batch_size: int = 2,
    seq_len: int | None = None,
    steps: int = 8,
    warmup: int = 3,
    only: Literal["both", "ours", "trl"] = "both",
    checkpoints: Path = CHECKPOINTS,
    results: Path = RESULTS,
    commit: str | None = None,
    lora: Annotated[LoraOptions, Only("lora_r")] = LoraOptions(lora_r=64),
    strategy: Annotated[StrategyOptions, Only("precision")] = StrategyOptions(strategy="single"),
    compute: Annotated[ComputeOptions, Only("checkpoint_activations", "compile")] = ComputeOptions(
        checkpoint_activations="all"
    ),
) -> int:
    """Measure, print and record.

    Args:
        shape: Shape of the model. Default: llama-3.2-1b on a GPU, tiny on CPU.
        batch_size: Pairs per step.
        seq_len: Tokens of a document. Default: 1024 on a GPU, 32 on CPU.
        steps: Measured steps.
        warmup: Warm-up steps before the measured ones.
        only: Measure one of the two.
        checkpoints: Directory where checkpoints of random weights are kept.
        results: Directory of the record.
        commit: Commit of the code measured; read from git unless given.
        lora, strategy, compute: Groups of flags. TRL has none of --compile, and recomputes all layers or none.
    """
    positive(batch_size=batch_size, steps=steps, warmup=warmup)
    if only != "ours" and compute.checkpoint_activations not in (True, "all", False, "none"):
        raise ValueError("TRL recomputes all layers or none: --checkpoint_activations all or none, or --only ours.")
    strategy, on_gpu = strategy.check(), torch.cuda.is_available()
    shape = shape or ("llama-3.2-1b" if on_gpu else "tiny")
    seq_len = seq_len or (1024 if on_gpu else 32)
    directory = checkpoint_of(shape, checkpoints, True)
    pairs = random_pairs(SHAPES[shape].sizes["vocab_size"], batch_size * (steps + warmup), seq_len)
    rows, runs = [], {}
    for who in ("ours", "trl"):
        if only not in ("both", who):
            continue
        meter = Meter(steps, warmup, None, with_profile=False)
        if who == "ours":
            what, first = measure_ours(directory, pairs, batch_size, seq_len, meter, lora, strategy, compute)
        else:
            what, first = measure_trl(directory, pairs, batch_size, seq_len, meter, lora, strategy, compute)
        figures = meter.gather()
        assert figures is not None
        tokens = 2 * batch_size * seq_len / (figures["step_ms"]["p50"] / 1000)
        row = [
            what, shape, strategy.precision, f"{batch_size} x {seq_len}", lora.lora_r, tokens,
            figures["step_ms"]["p50"], max(figures["train_allocated_gib"]), first,
        ]  # fmt: skip
        print(*(f"{name}: {value}" for name, value in zip(COLUMNS, row, strict=True)), sep="\n", end="\n\n", flush=True)
        rows.append(row)
        runs[what] = figures
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
            left = torch.cuda.memory_allocated() / GIB
            assert left < 0.5, f"{left:.2f} GiB of {what} are still allocated, and would count for the next"
    notes = "Random weights; DPO with the base as its reference in every step; one process, one after the other."
    save_record("preference", COLUMNS, rows, notes=notes, directory=results, commit=commit, runs=runs)
    return 0


def random_pairs(vocab_size: int, count: int, seq_len: int) -> list[dict[str, list[int]]]:
    """Pairs under TRL's names of columns: prompt, chosen and rejected answer, each half of ``seq_len``."""
    draw = torch.Generator().manual_seed(0)
    half = seq_len // 2
    sizes = {"prompt_ids": seq_len - half, "chosen_ids": half, "rejected_ids": half}
    return [
        {name: torch.randint(2, vocab_size, (size,), generator=draw).tolist() for name, size in sizes.items()}
        for _ in range(count)
    ]


def measure_ours(
    directory: Path, pairs: list[dict[str, list[int]]], batch_size: int, seq_len: int, meter: Meter, lora: LoraOptions,
    strategy: StrategyOptions, compute: ComputeOptions,
) -> tuple[str, float]:  # fmt: skip
    """Train with the recipe's own stack; returns its name and the mean log-probability of the first chosen answers."""
    collate = PreferenceCollator(pad_token_id=0, packed=True)
    samples = []
    for number, pair in enumerate(pairs):
        documents = [(pair["prompt_ids"], pair[name]) for name in ("chosen_ids", "rejected_ids")]
        samples.append(
            {
                "input_ids": [token for prompt, answer in documents for token in (*prompt, *answer)],
                "labels": [token for prompt, answer in documents for token in (*[-100] * len(prompt), *answer)],
                "document_lengths": [len(prompt) + len(answer) for prompt, answer in documents],
                "index": [number],
            }
        )
    batches = [collate(samples[start : start + batch_size]) for start in range(0, len(samples), batch_size)]
    plan = plan_memory(
        Settings.of(
            load_config(directory), lora.config(), strategy, compute, batch_size=2 * batch_size, seq_len=seq_len,
            device=capabilities(),
        )
    )  # fmt: skip
    compute = replace(compute, checkpoint_activations=plan.settings.recomputed)
    module = QLoRAPreference(
        directory, lora.config(), objective=PreferenceObjective(dpo), learning_rate=LEARNING_RATE, schedule="constant",
        packing=True, compute=compute,
    )  # fmt: skip
    first = _FirstStep()
    train_ours(module, lambda _: batches, meter, strategy, first)
    recomputed = "" if compute.checkpoint_activations == len(plan.settings.model.layers) else (
        f", {compute.checkpoint_activations} layers recomputed"
    )  # fmt: skip
    meter.figures["planned_gib"] = plan.total_bytes / GIB
    name = "lightning-qlora" + (f", compile {compute.compile}" if compute.compile != "off" else "") + recomputed
    return name, first.log_prob


class _FirstStep(L.Callback):
    """Keeps the chosen answers' log-probability of the first step."""

    log_prob = math.nan

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 1:
            self.log_prob = float(trainer.callback_metrics["train_log_probs_chosen"])


class _Timed(TrainerCallback):  # type: ignore[misc]
    """Calls the meter where Lightning would."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.meter.loaded()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.meter.step_begins()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.meter.step_ended(math.nan)  # the loss comes in a log, later


def measure_trl(
    directory: Path, pairs: list[dict[str, list[int]]], batch_size: int, seq_len: int, meter: Meter, lora: LoraOptions,
    strategy: StrategyOptions, compute: ComputeOptions,
) -> tuple[str, float]:  # fmt: skip
    """The same with TRL's DPOTrainer on peft and bitsandbytes."""
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    class Tokenized(DPOTrainer):  # type: ignore[misc]
        """Takes pairs that are tokens already."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(self.train_dataset)  # the order of ours

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    dtype = compute_dtype(strategy.precision)
    meter.begin(device)
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, device_map={"": device}, attn_implementation="sdpa"
    )
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype = dtype
    words = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    with tempfile.TemporaryDirectory() as scratch:
        settings = DPOConfig(
            scratch, per_device_train_batch_size=batch_size, max_steps=meter.total_steps, beta=0.1,
            learning_rate=LEARNING_RATE, lr_scheduler_type="constant", optim="adamw_torch", weight_decay=0.0,
            max_grad_norm=1.0, max_length=seq_len, bf16=strategy.precision == "bf16-mixed",
            fp16=strategy.precision == "16-mixed", use_cpu=not on_gpu,
            gradient_checkpointing=compute.checkpoint_activations in (True, "all"),
            gradient_checkpointing_kwargs={"use_reentrant": False}, logging_steps=1, report_to=[], save_strategy="no",
            disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = Tokenized(
            model, args=settings, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer,
            peft_config=lora.config(), callbacks=[_Timed(meter)],
        )  # fmt: skip
        trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    meter.losses = [float(log["loss"]) for log in logs]
    return "TRL + peft + bitsandbytes", float(logs[0]["logps/chosen"])


if __name__ == "__main__":
    sys.exit(run_recipe(main))
