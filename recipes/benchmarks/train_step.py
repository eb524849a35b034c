"""Measure one configuration of QLoRA training on random weights of a named shape: ours, or a peer's same work.

    python recipes/benchmarks/train_step.py --shape llama-3.1-8b --batch_size 2
    python recipes/benchmarks/train_step.py --shape llama-3.1-8b --batch_size 2 --devices 2 --memory_cap_gib 14.5
    python recipes/benchmarks/train_step.py --shape llama-3.1-8b --batch_size 2 --peer hf
    python recipes/benchmarks/train_step.py --shape llama-3.1-8b --batch_size 2 --peer accelerate --devices 2

About half a minute each for 8B on an H200; the first run of a shape writes its checkpoint (6 GB for 8B). Without a GPU
it runs the tiny shape on CPU processes. All get the same base weights and the same random tokens, full sequences
without padding, AdamW on float32 adapters and gradients clipped to norm 1. Peers are ``hf``, plain transformers + peft
+ bitsandbytes (under DDP with more than one device), and ``accelerate``, the same with accelerate's FSDP2.

A run adds one row to ``results/train_step.json``, and all its figures under ``runs``. A step's time is that between the
ends of two steps, with the device synchronized; warm-up steps, where compilation happens, do not count.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Annotated, Any, Literal

import bitsandbytes as bnb
import lightning.pytorch as L
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from record import RESULTS, save_record
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_qlora.modules.checkpoints.random_weights import CHECKPOINTS, SHAPES, Shape, checkpoint_of
from lightning_qlora.modules.cli import Only, positive, run_recipe
from lightning_qlora.modules.distributed.collectives import end_process_group, gather_objects, is_distributed
from lightning_qlora.modules.distributed.strategies import StrategyOptions, build_strategy
from lightning_qlora.modules.hardware import capabilities, compute_dtype
from lightning_qlora.modules.lora.config import LoraOptions
from lightning_qlora.modules.models.families import load_config
from lightning_qlora.modules.models.options import ComputeOptions
from lightning_qlora.modules.training.causal_lm import QLoRACausalLM
from lightning_qlora.modules.training.memory_plan import Settings, plan_memory

GIB = 2**30
LEARNING_RATE = 1e-4
COLUMNS = [
    "what", "shape", "precision", "devices", "batch x tokens a device", "r", "tokens/s", "step p50, ms",
    "peak GPU, GiB", "peak GPU while loading, GiB", "load, s", "host peak while loading, GiB",
]  # fmt: skip

STRATEGY_FLAGS = Only("devices", "precision", "strategy", "offload", "reshard_after_forward", "prefetch")
COMPUTE_FLAGS = Only("checkpoint_activations", "offload_activations", "memory_limit_gib", "compile")


def main(
    shape: Literal["tiny", "llama-3.2-1b", "llama-3.1-8b", "qwen2.5-32b", "qwen3-8b", "gemma2-2b"] | None = None,
    batch_size: int = 2,
    seq_len: int | None = None,
    memory_cap_gib: float | None = None,
    steps: int = 8,
    warmup: int = 3,
    profile: bool = False,
    peer: Literal["hf", "accelerate"] | None = None,
    quantized: bool = True,
    checkpoints: Path = CHECKPOINTS,
    results: Path = RESULTS,
    commit: str | None = None,
    lora: Annotated[LoraOptions, Only("lora_r")] = LoraOptions(lora_r=64),
    strategy: Annotated[StrategyOptions, STRATEGY_FLAGS] = StrategyOptions(),
    compute: Annotated[ComputeOptions, COMPUTE_FLAGS] = ComputeOptions(checkpoint_activations="all"),
) -> int:
    """Measure, print and record one configuration.

    Args:
        shape: Shape of the model. Default: llama-3.2-1b on a GPU, tiny on CPU.
        batch_size: Samples per step on each device.
        seq_len: Tokens per sample. Default: 2048 on a GPU, 32 on CPU.
        memory_cap_gib: The most that PyTorch may reserve on each GPU: a T4 has about 14.5.
        steps: Measured steps.
        warmup: Warm-up steps before the measured ones.
        profile: Also write where the GPU's time goes in one more step, next to the results.
        peer: Measure this in place of lightning-qlora. A peer has none of --strategy, --offload,
            --reshard_after_forward, --prefetch, --offload_activations, --memory_limit_gib and --compile.
        quantized: Start from a bitsandbytes 4-bit checkpoint, else from a bfloat16 one.
        checkpoints: Directory where checkpoints of random weights are kept.
        results: Directory of the record.
        commit: Commit of the code measured; read from git unless given.
        lora, strategy, compute: Groups of flags.
    """
    positive(batch_size=batch_size, steps=steps, warmup=warmup)
    strategy = strategy.check()
    devices, precision = strategy.devices, strategy.precision
    on_gpu = torch.cuda.is_available()
    shape = shape or ("llama-3.2-1b" if on_gpu else "tiny")
    seq_len = seq_len or (2048 if on_gpu else 32)
    of_ours = (
        strategy.offload
        or strategy.prefetch
        or not strategy.reshard_after_forward
        or strategy.strategy != "fsdp2"
        or compute.offload_activations
        or compute.memory_limit_gib
        or compute.checkpoint_activations not in (True, "all", False, "none")
        or compute.compile != "off"
    )
    if peer and (of_ours or precision == "bf16-true" or not quantized):
        raise ValueError(
            "A peer takes no --strategy, --offload, --offload_activations, --memory_limit_gib, --prefetch, "
            "--reshard_after_forward or --compile, recomputes all layers or none, starts from 4 bits, and trains in "
            "32-true, 16-mixed or bf16-mixed. Leave the other flags out."
        )
    if peer == "accelerate" and (devices < 2 or not on_gpu):
        raise ValueError("--peer accelerate needs --devices 2 or more GPUs: accelerate does not shard otherwise.")
    if memory_cap_gib is not None and not on_gpu:
        raise ValueError("--memory_cap_gib limits GPU memory, and there is no GPU.")
    directory = checkpoint_of(shape, checkpoints, quantized)
    if peer and devices > 1 and "RANK" not in os.environ:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={devices}"]
        return subprocess.run([*torchrun, *sys.argv], check=False).returncode

    meter = Meter(steps, warmup, memory_cap_gib, with_profile=profile)
    batches = functools.partial(random_batches, SHAPES[shape], batch_size, seq_len, meter.total_steps)
    plan = None
    if peer:
        recomputes = compute.checkpoint_activations in (True, "all")
        train_peer(peer, directory, batches, meter, precision, recomputes, lora.config())
    else:
        plan = plan_memory(
            Settings.of(
                load_config(directory), lora.config(), strategy, compute, batch_size=batch_size, seq_len=seq_len,
                device=capabilities(),
            )
        )  # fmt: skip
        compute = replace(compute, checkpoint_activations=plan.settings.recomputed)
        module = QLoRACausalLM(
            directory,
            lora.config(),
            learning_rate=LEARNING_RATE,
            schedule="constant",
            compute=compute,
        )
        train_ours(module, batches, meter, strategy)
    figures = meter.gather()
    if figures is None:
        return 0

    if plan is not None:
        layers = len(plan.settings.model.layers)
        figures |= {"recomputed_layers": plan.settings.recomputed, "planned_gib": plan.total_bytes / GIB}
        partly = 0 < plan.settings.recomputed < layers
    figures["tokens_per_s"] = batch_size * seq_len * devices / (figures["step_ms"]["p50"] / 1000)
    ours = f"lightning-qlora {strategy.strategy}"
    what = {None: ours, "hf": "transformers + peft", "accelerate": "accelerate FSDP2"}[peer]
    options = {
        f"compile {compute.compile}": compute.compile != "off",
        "offload": strategy.offload,
        "offload activations": compute.offload_activations,
        "no resharding": not strategy.reshard_after_forward,
        f"prefetch {strategy.prefetch}": strategy.prefetch,
        "no checkpointing": compute.checkpoint_activations in (0, "none"),
        f"{compute.checkpoint_activations} layers recomputed": plan is not None and partly,
        f"limit {compute.memory_limit_gib} GiB": compute.memory_limit_gib,
        "16-bit checkpoint": not quantized,
        f"cap {memory_cap_gib} GiB": memory_cap_gib,
    }
    what = ", ".join([what, *(name for name, is_set in options.items() if is_set)])
    settings = [what, shape, precision, devices, f"{batch_size} x {seq_len}", lora.lora_r]
    record_run(settings, figures, results, commit, meter.profile_table() if profile else None)
    return 0


def random_batches(shape: Shape, batch_size: int, seq_len: int, count: int, rank: int) -> list[dict[str, Any]]:
    """``count`` batches for a rank, in the form that QLoRACausalLM takes: input_ids and labels int64 [B, S]."""
    generator = torch.Generator().manual_seed(rank)
    batches = []
    for _ in range(count):
        ids = torch.randint(shape.sizes["vocab_size"], (batch_size, seq_len), generator=generator)
        batches.append({"input_ids": ids, "labels": ids, "num_loss_tokens": batch_size * (seq_len - 1)})
    return batches


class Meter(L.Callback):
    """Times the load and each step, and reads peaks of memory; as a Lightning callback, or by hand in a peer's loop.

    Order of calls: :meth:`begin`, :meth:`loaded`, then :meth:`step_begins` and :meth:`step_ended` for each step.
    """

    def __init__(self, steps: int, warmup: int, memory_cap_gib: float | None, *, with_profile: bool) -> None:
        self.steps, self.warmup, self.cap, self.with_profile = steps, warmup, memory_cap_gib, with_profile
        self.total_steps = warmup + steps + with_profile
        self.losses: list[float] = []
        self.ends: list[float] = []
        self.figures: dict[str, Any] = {}

    def begin(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            if self.cap is not None:
                total = torch.cuda.get_device_properties(device).total_memory
                torch.cuda.set_per_process_memory_fraction(min(1.0, self.cap * GIB / total), device)
            self._synchronize()  # creates the CUDA context: its host memory is no part of the load
        self._host = HostPeak()
        self._began = perf_counter()

    def loaded(self) -> None:
        self._synchronize()
        self._loaded = perf_counter()
        self.figures["load_s"] = self._loaded - self._began
        self.figures["load_host_gib"] = self._host.stop() / GIB
        self._read_peaks("load")

    def step_begins(self) -> None:
        if self.with_profile and len(self.ends) == self.total_steps - 1:
            activity = ProfilerActivity.CUDA if self.device.type == "cuda" else ProfilerActivity.CPU
            self._profiler = torch.profiler.profile(activities=[activity])
            self._profiler.start()

    def step_ended(self, loss: Any) -> None:
        self._synchronize()
        self.ends.append(perf_counter())
        if self.with_profile and len(self.ends) == self.total_steps:
            self._profiler.stop()
        self.losses.append(float(loss))
        if len(self.ends) == 1:
            self.figures["first_step_s"] = self.ends[0] - self._loaded
        if len(self.ends) == self.warmup:
            self._read_peaks("warmup")
        if len(self.ends) == self.total_steps - self.with_profile:
            self._read_peaks("train")

    def gather(self) -> dict[str, Any] | None:
        """On rank 0 the figures, with one list entry a rank except for ``step_ms`` and ``losses``; else ``None``."""
        ranks = gather_objects(self.figures)
        if is_distributed() and dist.get_rank() != 0:
            return None
        times = self._step_ms()[: self.steps]
        p20, p50, p80 = (quantiles(times, n=10, method="inclusive")[i] for i in (1, 4, 7)) if times[1:] else times * 3
        figures = {name: [rank[name] for rank in ranks] for name in self.figures}
        return {"step_ms": {"p20": p20, "p50": p50, "p80": p80, "all": times}, **figures, "losses": self.losses}

    def profile_table(self) -> str:
        """What ran on this rank's device in the profiled step, the 40 longest first, and how long it was busy."""
        gpu = self.device.type == "cuda"
        kind = "CUDA" if gpu else "CPU"
        events: list[Any] = self._profiler.events()  # type: ignore[no-untyped-call]
        events = [e for e in events if e.device_type.name == kind and not e.is_user_annotation]
        total: dict[str, tuple[float, int]] = {}
        busy = end = 0.0
        for event in sorted(events, key=lambda e: e.time_range.start):
            own = event.self_device_time_total if gpu else event.self_cpu_time_total
            name = event.name.removeprefix("void ").replace("at::native::", "")[:150]
            time, count = total.get(name, (0.0, 0))
            total[name] = time + own / 1000, count + 1
            busy += max(0.0, event.time_range.end - max(end, event.time_range.start)) / 1000
            end = max(end, event.time_range.end)
        *times, profiled = self._step_ms()
        head = (
            f"One step of rank 0: {profiled:.1f} ms ({median(times):.1f} ms without the profiler), the device busy for "
            f"{busy:.1f} ms. {len(events)} kernels, copies and fills of {sum(t for t, _ in total.values()):.1f} ms:"
        )
        longest = sorted(total.items(), key=lambda item: -item[1][0])[:40]
        return "\n".join([head, "      ms   count  name", *(f"{t:8.3f} {n:7d}  {name}" for name, (t, n) in longest)])

    def _step_ms(self) -> list[float]:
        """Of the steps after warm-up, the profiled one included."""
        ends = self.ends[self.warmup - 1 :]
        return [(end - start) * 1000 for start, end in itertools.pairwise(ends)]

    def _read_peaks(self, phase: str) -> None:
        gpu = self.device.type == "cuda"
        self.figures[f"{phase}_allocated_gib"] = torch.cuda.max_memory_allocated(self.device) / GIB if gpu else 0.0
        self.figures[f"{phase}_reserved_gib"] = torch.cuda.max_memory_reserved(self.device) / GIB if gpu else 0.0
        if gpu:
            torch.cuda.reset_peak_memory_stats(self.device)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # --- as a callback

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.begin(trainer.strategy.root_device)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.loaded()

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.step_begins()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.step_ended(trainer.callback_metrics["train_loss"])


class HostPeak:
    """Peak of this process's own memory (anonymous and shared pages) above what it had, sampled every 2 ms.

    Pages of mapped files are left out: they are the page cache's, and the kernel takes them back when it needs them.
    """

    def __init__(self) -> None:
        self._start = self._peak = self._bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """End sampling and return the peak in bytes."""
        self._stop.set()
        self._thread.join()
        return self._peak - self._start

    def _sample(self) -> None:
        while not self._stop.wait(0.002):
            self._peak = max(self._peak, self._bytes())

    @staticmethod
    def _bytes() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssShmem")))


class RandomData(L.LightningDataModule):
    """Each rank's own batches, from a function of the rank."""

    def __init__(self, batches: Callable[[int], list[dict[str, Any]]]) -> None:
        super().__init__()
        self.batches = batches

    def train_dataloader(self) -> DataLoader[Any]:
        """The batches as they are."""
        assert self.trainer is not None
        return DataLoader(self.batches(self.trainer.global_rank), batch_size=None)  # type: ignore[arg-type]


def train_ours(
    module: QLoRACausalLM,
    batches: Callable[[int], list[dict[str, Any]]],
    meter: Meter,
    strategy: StrategyOptions,
) -> None:
    """Train with the recipe's own stack."""
    trainer = L.Trainer(
        devices=strategy.devices,
        strategy=build_strategy(strategy),
        max_steps=meter.total_steps,
        gradient_clip_val=1.0,
        inference_mode=False,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[meter],
    )
    trainer.fit(module, RandomData(batches))


def train_peer(
    peer: str, directory: Path, batches: Callable[[int], list[dict[str, Any]]], meter: Meter, precision: str,
    checkpoint_activations: bool, lora: LoraConfig,
) -> None:  # fmt: skip
    """Train with transformers, peft and bitsandbytes; on several devices under DDP or accelerate's FSDP2."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    dtype = compute_dtype(precision)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        atexit.register(end_process_group)
    meter.begin(device)
    capped = getattr(AutoConfig.from_pretrained(directory), "attn_logit_softcapping", None) is not None
    attention = "eager" if capped else "sdpa"  # which is what transformers takes for Gemma 2 by itself
    model: Any = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, device_map={"": device}, attn_implementation=attention
    )
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype = dtype
    if checkpoint_activations:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(model, lora).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: Any = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    backward: Callable[[Tensor], None]
    if peer == "accelerate":
        from accelerate import Accelerator
        from accelerate.utils import FullyShardedDataParallelPlugin

        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            reshard_after_forward=True,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=[type(model.get_base_model().model.layers[0]).__name__],
            cpu_ram_efficient_loading=False,
        )
        mixed = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "no"}[dtype]
        accelerator = Accelerator(mixed_precision=mixed, fsdp_plugin=plugin)
        model, optimizer = accelerator.prepare(model, optimizer)
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all(isinstance(p, DTensor) for p in trained), "accelerate did not shard"
        backward, clip, step = accelerator.backward, accelerator.clip_grad_norm_, optimizer.step
    else:
        if world_size > 1:
            model = nn.parallel.DistributedDataParallel(model, device_ids=[rank] if device.type == "cuda" else None)
        scaler = torch.amp.GradScaler(device.type, enabled=precision == "16-mixed")
        clip = nn.utils.clip_grad_norm_

        def backward(loss: Tensor) -> None:
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            scaler.unscale_(optimizer)

        def step() -> None:
            scaler.step(optimizer)
            scaler.update()

    meter.loaded()
    for batch in batches(rank):
        meter.step_begins()
        ids, labels = batch["input_ids"].to(device), batch["labels"].to(device)
        with torch.autocast(device.type, dtype, enabled=precision.endswith("mixed")):
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        backward(loss)
        clip(trained, 1.0)
        step()
        optimizer.zero_grad()
        meter.step_ended(loss.detach())


def record_run(
    settings: list[Any], figures: dict[str, Any], directory: Path, commit: str | None, profile: str | None = None,
    name: str = "train_step",
) -> None:  # fmt: skip
    """Print a run and add it to the record, which keeps its other rows if they are of the same machine and code.

    Args:
        settings: The first cells of the row, which tell it from others.
        figures: From :meth:`Meter.gather`, with ``tokens_per_s``.
        directory: Of the record.
        commit: Of the code measured.
        profile: A table for a text file of its own.
        name: Of the record.
    """
    label = ", ".join(str(value) for value in settings)
    print(json.dumps({"run": label, **figures}, indent=1))
    row = [
        *settings, figures["tokens_per_s"], figures["step_ms"]["p50"], max(figures["train_allocated_gib"]),
        max(figures["load_allocated_gib"]), max(figures["load_s"]), max(figures["load_host_gib"]),
    ]  # fmt: skip
    path = directory / f"{name}.json"
    before = json.loads(path.read_text()) if path.is_file() else None
    notes = "Random weights; tokens/s of all devices together; the host's peak is above what it had before."
    save = functools.partial(save_record, name, COLUMNS, notes=notes, directory=directory, commit=commit)
    now = json.loads(save([row], runs={label: figures}).read_text())
    if before and _origin(before) == _origin(now):
        others = [old for old in before["rows"] if old[: len(settings)] != settings]
        save([*others, row], runs=before["runs"] | {label: figures})
    elif before:
        print(f"{path} was of another machine, version or commit: its {len(before['rows'])} rows are replaced.")
    if profile is not None:
        print(profile)
        slug = re.sub(r"[^\w.]+", "-", label)
        (directory / f"{name}-{slug}.profile.txt").write_text(f"{label}\n{profile}\n")


def _origin(record: dict[str, Any]) -> list[Any]:
    """What rows of one record share: not how many of the machine's GPUs were visible."""
    return [re.sub(r"\b\d+x ", "", record["device"]), record["versions"], record["commit"]]


if __name__ == "__main__":
    sys.exit(run_recipe(main))
