"""Train the same QLoRA model uncompiled and compiled on the same batches, and compare.

    python recipes/compile_qlora.py
    python recipes/compile_qlora.py --max_autotune --warm

Batches take eight shapes in turn, single samples among them. Compiled are attention, MLP, norms and rotary embedding,
on a GPU the loss too; all decoder layers are one graph, with 4-bit weights, adapters and backward's recomputation. Each
run is a process with empty compiler caches, timed in its second half, that fails if a graph breaks or there are over
seven: rotary embedding, layer, that of single samples, last norm, GPU's loss; validation's layer and loss.

Ends with status 1 if losses differ by more than rounding: in float32 by 1e-5 (relative) in a step. In 16 bits, where
not even two runs of the same code agree, one more uncompiled run is in float32: compiled losses may be twice as far
from its losses (mean over steps) as uncompiled ones in 16 bits.

Without a GPU it trains SmolLM2-135M-Instruct in float32: 2 minutes on 2 cores, half of that compiling, 1.4 GiB; five
graphs with validation's one, no break, losses within 4e-7, 1.2 times the tokens/s. On one GPU it trains Llama-3.2-1B's
shape, random weights, in 16 bits and about 4 GiB. Writes report.json and comparison.png to --output_dir.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import lightning.pytorch as L
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_qlora.callbacks import CompileReport, RunReport
from lightning_qlora.modules.attention import AttentionRequest, choose_attention
from lightning_qlora.modules.checkpoints.random_weights import model_or_random_weights
from lightning_qlora.modules.checkpoints.tokenizer import find_tokenizer
from lightning_qlora.modules.cli import Only, positive, run_again, run_recipe
from lightning_qlora.modules.data.stdlib_docs import stdlib_api_cards
from lightning_qlora.modules.distributed.strategies import StrategyOptions, build_strategy
from lightning_qlora.modules.hardware import capabilities, compute_dtype
from lightning_qlora.modules.lora.config import LoraOptions
from lightning_qlora.modules.models.families import load_config
from lightning_qlora.modules.models.options import ComputeOptions
from lightning_qlora.modules.training.causal_lm import QLoRACausalLM
from lightning_qlora.modules.training.run_directory import claim_directory


def batches(text: Tensor, numbers: range, b: int, s: int) -> DataLoader[Any]:
    """Batches by number, cut from ``text`` [tokens], of eight shapes in turn, the first [b, s]."""
    shapes = [(b, s), (b, s // 2), (1, s), (b + 1, s // 2), (1, s // 3), (2 * b, s // 4), (b, s // 5), (2 * b, s // 3)]
    cut = []
    for number in numbers:
        rows, columns = shapes[number % len(shapes)]
        ids = text[(torch.arange(rows * columns).view(rows, columns) + number * 4099) % len(text)]
        cut.append({"input_ids": ids, "labels": ids, "num_loss_tokens": rows * (columns - 1)})
    return DataLoader(cut, batch_size=None)  # type: ignore[arg-type]


def read_text(directory: Path) -> Tensor:
    """Token ids [tokens] of Python's documentation, or random ones for a model without a tokenizer."""
    tokenizer = find_tokenizer(directory)
    if tokenizer is None:
        return torch.randint(load_config(directory).vocab_size, (100_000,), generator=torch.Generator().manual_seed(0))
    text = "\n".join(message["content"] for card in stdlib_api_cards()[:500] for message in card["messages"])
    return torch.tensor(tokenizer(text)["input_ids"])


def save_plot(path: Path, runs: dict[str, dict[str, Any]]) -> None:
    """Draw losses over steps, and beside them tokens/s."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    losses, speed = figure.subplots(1, 2, width_ratios=[2, 1])
    for i, (name, run) in enumerate(runs.items()):  # the curves lie on each other: the first is the widest
        losses.plot(range(1, len(run["losses"]) + 1), run["losses"], label=name, linewidth=2 * (len(runs) - i))
    losses.set(title="Loss", xlabel="step")
    losses.legend()
    speed.bar(list(runs), [run["tokens_per_s"] for run in runs.values()])
    speed.set(title="Tokens/s")
    figure.savefig(path)


def row(name: str, report: dict[str, Any], first: dict[str, Any], exact: dict[str, Any]) -> dict[str, Any]:
    """What the table shows of a run's report.json; differences are those of its losses from ``exact``'s, relative."""
    differences = [abs(a - b) / abs(b) for a, b in zip(report["losses"], exact["losses"], strict=True)]
    return {
        "run": name,
        "last loss": report["losses"][-1],
        "difference": max(differences),
        "mean diff.": mean(differences),
        "tokens/s": report["tokens_per_s"],
        "speed-up": report["tokens_per_s"] / first["tokens_per_s"],
        "peak GiB": max(report["peak_memory_gib"]),
        **{key: report["sections"]["compile"][key] for key in ("graphs", "graph_breaks", "recompiles", "compile_s")},
    }


def judge(rows: list[dict[str, Any]]) -> int:
    """Print how far off the losses are at most; 1 if that is more than rounding explains, else 0."""
    exact = "float32" in [each["run"] for each in rows]
    what, limit = ("mean diff.", 2 * rows[0]["mean diff."]) if exact else ("difference", 1e-5)
    worst = max(rows, key=lambda each: each[what])
    verdict = "differ" if worst[what] > limit else "agree"
    print(f"Losses {verdict}: {what} of {worst['run']!r} is {worst[what]:.2g}, rounding explains {limit:.2g}.")
    return int(verdict == "differ")


def main(
    model: str | None = None,
    max_autotune: bool = False,
    max_steps: int | None = None,
    batch_size: int = 2,
    seq_len: int | None = None,
    backend: str = "inductor",
    warm: bool = False,
    output_dir: Path = Path("runs/compile_qlora"),
    run: str | None = None,
    lora: Annotated[LoraOptions, Only("lora_r")] = LoraOptions(lora_r=64),
    strategy: Annotated[StrategyOptions, Only("devices", "precision")] = StrategyOptions(),
    compute: Annotated[ComputeOptions, Only("attention", "sliding_window")] = ComputeOptions(),
) -> int:
    """Run each mode and compare.

    Args:
        model: Demo model, transformers directory, GGUF file or hub name. Default: the demo model; on a GPU random
            weights of Llama-3.2-1B's shape.
        max_autotune: Also compile with Triton's matrix products timed against the vendor's library.
        max_steps: Optimizer steps, of which the first half is warm-up. Default: 32 on a GPU, 8 on CPU.
        batch_size: Samples in batches of the first of the eight shapes.
        seq_len: Tokens per sample in batches of the first shape. Default: 2048 on a GPU, 64 on CPU.
        backend: Backend of torch.compile.
        warm: Run each compiled mode once more with the compiler caches of its first run.
        output_dir: Directory for the reports.
        run: Do only this run of those that output_dir is for (what this recipe calls itself with).
        lora, strategy, compute: Groups of flags; activations are always checkpointed.
    """
    on_gpu = torch.cuda.is_available()
    max_steps = (32 if on_gpu else 8) if max_steps is None else max_steps
    seq_len = (2048 if on_gpu else 64) if seq_len is None else seq_len
    positive(max_steps=max_steps, batch_size=batch_size)
    if seq_len < 10:
        raise ValueError(f"--seq_len must be at least 10: the shortest samples have a fifth of it. Got {seq_len}.")
    _claim = None if run else claim_directory(output_dir)  # while this runs, no other may use it
    strategy = strategy.check()
    choose_attention(  # refuses what it cannot do, before anything long
        compute.attention,
        AttentionRequest(
            windows=(compute.sliding_window,), compute_capability=capabilities().compute_capability,
            dtype=compute_dtype(strategy.precision),
        ),
    )  # fmt: skip
    if run is None:
        uncompiled = ["off"] if strategy.precision == "32-true" else ["off", "float32"]
        return compare(uncompiled, ["default", *["max-autotune"] * max_autotune], warm, output_dir)
    attention, mode = compute.attention, run.split()[0]
    if run == "float32":
        attention, mode = "auto", "off"  # some attention is for 16 bits only
        strategy = replace(strategy, precision="32-true")

    directory = model_or_random_weights(model)
    settings = replace(compute, checkpoint_activations=True, attention=attention, compile=mode)  # type: ignore[arg-type]
    module = QLoRACausalLM(directory, lora.config(), compute=settings, compile_backend=backend)
    report = RunReport(output_dir / run / "report.json", warmup_steps=max_steps // 2, metadata={"compile": run})
    trainer = L.Trainer(
        devices=strategy.devices, strategy=build_strategy(strategy), max_steps=max_steps, gradient_clip_val=1.0,
        val_check_interval=max_steps, num_sanity_val_steps=0, inference_mode=False, use_distributed_sampler=False,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[CompileReport(max_graphs=7), report],
    )  # fmt: skip
    text, first = read_text(directory), max_steps * trainer.global_rank  # other batches on each rank
    numbers = range(first, first + max_steps), range(2)
    trainer.fit(module, *(batches(text, each, batch_size, seq_len) for each in numbers))
    return 0


def compare(uncompiled: list[str], modes: list[str], warm: bool, output_dir: Path) -> int:
    """Call this recipe for each run, and put the reports side by side."""
    reports: dict[str, dict[str, Any]] = {}
    for mode in uncompiled + modes:
        with tempfile.TemporaryDirectory() as cache:
            for name in [mode, f"{mode} warm"] if warm and mode in modes else [mode]:
                print(f"--- {name}", flush=True)
                caches = {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}
                if status := run_again("--run", name, **caches):
                    return status
                reports[name] = json.loads((output_dir / name / "report.json").read_text())
    first, exact = reports["off"], reports.get("float32", reports["off"])
    rows = [row(name, report, first, exact) for name, report in reports.items()]
    for cells in ([*rows[0]], *(r.values() for r in rows)):
        print(" ".join(f"{cell:>12.5g}" if isinstance(cell, float) else f"{cell:>12}" for cell in cells))
    summary = {key: first[key] for key in ("devices", "precision", "versions")}
    summary |= {"runs": rows, "losses": {name: report["losses"] for name, report in reports.items()}}
    (output_dir / "report.json").write_text(json.dumps(summary, indent=1) + "\n")
    save_plot(output_dir / "comparison.png", reports)
    print(f"Wrote {output_dir / 'report.json'} and {output_dir / 'comparison.png'}.")
    return judge(rows)


if __name__ == "__main__":
    sys.exit(run_recipe(main))
