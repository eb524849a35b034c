r"""Train the same samples padded and packed, with each attention that runs here, and compare.

    python recipes/packing_flex.py
    python recipes/packing_flex.py --compile default

Every run trains on the same samples in the same steps, so all losses must agree. Padded, each sample is a row as long
as the longest of its micro-batch: all samples of a step in one, which fills a GPU as packing does, and a few at a time.
Packed, they fill rows of each sequence length. Samples are the demo data's, of 62 to 156 tokens, 86 on average. Speed
counts their tokens, not the padding. Each run is a process of its own, named by the samples of a micro-batch if padded,
else by attention and tokens of a row; --compile adds a run with rows of eight lengths, which must not compile often.
Then one layer's attention by itself, forward and backward: causal over whole rows, and with documents kept apart.
Writes report.json and comparison.png to --output_dir.

On 2 idle CPU cores, SmolLM2-135M-Instruct: 200 seconds, 1.9 GiB; packing trains 1.3 times as many tokens/s, and losses
agree to 7e-7 (relative). On an H200, Llama-3.2-1B's shape: 188 padded rows, 35 % of them padding, 26,400 tokens/s in
6.7 GiB; 16 of them at a time 7,500; packed into rows of 2048, flash 46,500, flex 44,100, sdpa 15,600 in 4.7 GiB.
"""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any, cast

import lightning.pytorch as L
import torch
from torch.utils.data import DataLoader

from lightning_qlora.callbacks import CompileReport, MemoryReport, RunReport, ThroughputReport
from lightning_qlora.modules.attention import AttentionName
from lightning_qlora.modules.attention.timing import attentions_here, measure_attention
from lightning_qlora.modules.checkpoints.random_weights import model_or_random_weights
from lightning_qlora.modules.checkpoints.tokenizer import find_tokenizer
from lightning_qlora.modules.cli import Only, positive, run_again, run_recipe
from lightning_qlora.modules.data.steps import (
    check_rows,
    demo_samples,
    draw_steps,
    packed_batches,
    padded_batches,
    token_counts,
)
from lightning_qlora.modules.distributed.strategies import StrategyOptions, build_strategy
from lightning_qlora.modules.hardware import compute_dtype
from lightning_qlora.modules.lora.config import LoraOptions
from lightning_qlora.modules.models.families import load_config
from lightning_qlora.modules.models.options import ComputeOptions
from lightning_qlora.modules.training.causal_lm import QLoRACausalLM
from lightning_qlora.modules.training.run_directory import claim_directory


def train(module: QLoRACausalLM, batches: list[list[Any]], strategy: StrategyOptions, report: Path) -> None:
    """Train a step on each list of micro-batches, a quarter of the steps as warm-up, and write the report."""
    every, warmup = list(itertools.chain(*batches)), len(batches) // 4
    padding = 1 - sum(batch["num_tokens"] for batch in every) / sum(batch["input_ids"].numel() for batch in every)
    trainer = L.Trainer(
        devices=1, strategy=build_strategy(strategy), max_steps=len(batches),
        accumulate_grad_batches=len(batches[0]), gradient_clip_val=1.0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[
            MemoryReport(), ThroughputReport(warmup_steps=warmup), CompileReport(max_recompiles=2),
            RunReport(report, warmup_steps=warmup, metadata={"padding": padding}),
        ],
    )  # fmt: skip
    trainer.fit(module, DataLoader(every, batch_size=None))  # type: ignore[arg-type]


def row(name: str, report: dict[str, Any], padded: dict[str, Any]) -> dict[str, Any]:
    """What the table shows of a run's report.json; ``difference`` is the largest of its losses, relative."""
    speed, before = (median(each["sections"]["throughput"]["steps_tokens_per_s"]) for each in (report, padded))
    return {
        "run": name,
        "tokens/s": speed,
        "speed-up": speed / before,
        "padding": report["metadata"]["padding"],
        "peak GiB": max(report["peak_memory_gib"]),
        "last loss": report["losses"][-1],
        "difference": max(abs(a - b) / abs(b) for a, b in zip(report["losses"], padded["losses"], strict=True)),
        **{key: report["sections"]["compile"][key] for key in ("graphs", "recompiles")},
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print dicts of the same keys."""
    for cells in ([*rows[0]], *(each.values() for each in rows)):
        print(" ".join(f"{cell:>14.4g}" if isinstance(cell, float) else f"{cell:>14}" for cell in cells))


def save_plot(path: Path, rows: list[dict[str, Any]], lengths: list[int]) -> None:
    """Draw tokens/s and peak memory over the length of a row; the padded runs' are lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    by_name = {each["run"]: each for each in rows}
    for axes, what in zip(figure.subplots(1, 2), ("tokens/s", "peak GiB"), strict=True):
        for name in [name for name in by_name if name.startswith("padded")]:
            axes.axhline(by_name[name][what], linestyle="--", color=f"{0.3 + 0.4 * len(axes.lines)}", label=name)
        for attention in dict.fromkeys(name.split()[0] for name in by_name if not name.startswith("padded")):
            axes.plot(lengths, [by_name[f"{attention} {n}"][what] for n in lengths], marker="o", label=attention)
        axes.set(title=what, xlabel="tokens of a row", ylim=(0, 1.1 * max(each[what] for each in rows)))
        axes.set(xscale="log", xticks=lengths, xticklabels=lengths)
        axes.minorticks_off()
    axes.legend(loc="lower right")
    figure.savefig(path)


def main(
    model: str | None = None,
    lengths: list[int] | None = None,
    attentions: list[AttentionName] | None = None,
    tokens: int | None = None,
    batch_size: int = 4,
    max_steps: int | None = None,
    backend: str = "inductor",
    output_dir: Path = Path("runs/packing_flex"),
    run: str | None = None,
    lora: Annotated[LoraOptions, Only("lora_r")] = LoraOptions(lora_r=64),
    strategy: Annotated[StrategyOptions, Only("precision")] = StrategyOptions("single"),
    compute: Annotated[ComputeOptions, Only("compile")] = ComputeOptions(),
) -> int:
    """Measure each run and compare.

    Args:
        model: Demo model, transformers directory, GGUF file or hub name. Default: the demo model; on a GPU random
            weights of Llama-3.2-1B's shape.
        lengths: Lengths in tokens of the packed rows, as in --lengths '[512,1024]'. Default: 1024, 2048, 4096 and 8192
            on a GPU, 256 and 1024 on CPU.
        attentions: Attention implementations to measure, as in --attentions '[sdpa,flex]'. Default: all that run here.
        tokens: Tokens in the packed rows of a step, padding included. Default: 16384 on a GPU, 1024 on CPU.
        batch_size: Samples per micro-batch in the second padded run.
        max_steps: Optimizer steps, of which a quarter are warm-up. Default: 16 on a GPU, 4 on CPU.
        backend: Backend of torch.compile.
        output_dir: Directory for the reports.
        run: Do only this run of those that output_dir is for (what this recipe calls itself with).
        lora, strategy, compute: Groups of flags; activations are always checkpointed.
    """
    on_gpu = torch.cuda.is_available()
    lengths = sorted(lengths or ([1024, 2048, 4096, 8192] if on_gpu else [256, 1024]))
    tokens = (16384 if on_gpu else 1024) if tokens is None else tokens
    max_steps = (16 if on_gpu else 4) if max_steps is None else max_steps
    positive(batch_size=batch_size, max_steps=max_steps)
    _claim = None if run else claim_directory(output_dir)  # while this runs, no other may use it
    strategy = strategy.check()
    dtype = compute_dtype(strategy.precision)
    usable, refused = attentions_here(attentions, dtype)
    directory = model_or_random_weights(model)
    config = load_config(directory)
    samples = demo_samples(find_tokenizer(directory), config.vocab_size)
    check_rows(samples, lengths, tokens)
    counts = token_counts(samples)
    steps = draw_steps(samples, lengths, tokens, max_steps)
    if run is not None:
        attention, rows = cast(tuple[Any, str], run.split())
        padded = attention == "padded"
        settings = replace(compute, checkpoint_activations=True, attention="sdpa" if padded else attention)
        module = QLoRACausalLM(
            directory, lora.config(), compute=settings, compile_backend=backend, packing=not padded
        )  # fmt: skip
        varied = [max(max(counts), lengths[-1] * part // 16) for part in range(9, 17)]
        row_lengths = varied if rows == "varied" else [int(rows)]
        batches: Any = padded_batches(steps, int(rows)) if attention == "padded" else packed_batches(steps, row_lengths)
        train(module, batches, strategy, output_dir / run / "report.json")
        return 0

    print(f"{len(counts)} samples of {min(counts)} to {max(counts)} tokens, {mean(counts):.0f} on average")
    print(*(f"{name} is not measured: {reason}" for name, reason in refused.items()), sep="\n")
    names = [f"padded {max(map(len, steps))}", f"padded {batch_size}"]
    names += [f"{name} {length}" for length in lengths for name in usable]
    names += [f"{name} varied" for name in usable] if compute.compile != "off" else []
    for name in dict.fromkeys(names):
        print(f"--- {name}", flush=True)
        if status := run_again("--run", name):
            return status
    reports = {name: json.loads((output_dir / name / "report.json").read_text()) for name in names}
    first = reports[names[0]]
    table = [row(name, report, first) for name, report in reports.items()]
    print_table(table)
    alone = []
    for length in lengths:
        documents = packed_batches(steps[:1], [length])[0][0]["document_lengths"]
        found = measure_attention(config, documents, usable, dtype)
        for each in found:
            step = next((r["peak GiB"] for r in table if r["run"] == f"{each['attention']} {length}"), None)
            alone.append({"row": length, **each, "of step's peak": each["mask MiB"] / 1024 / step if step else 0.0})
    print_table(alone)
    summary: dict[str, Any] = {key: first[key] for key in ("devices", "precision", "versions")}
    summary |= {"tokens_of_samples": counts, "not_measured": refused, "runs": table, "attention_alone": alone}
    summary["losses"] = {name: report["losses"] for name, report in reports.items()}
    (output_dir / "report.json").write_text(json.dumps(summary, indent=1) + "\n")
    save_plot(output_dir / "comparison.png", table, lengths)
    print(f"Wrote {output_dir / 'report.json'} and {output_dir / 'comparison.png'}.")
    most = 1e-4 if strategy.precision == "32-true" else 1e-2
    if differing := [each["run"] for each in table if each["difference"] > most]:
        print(f"The losses of {', '.join(differing)} differ by more than {most} from the first run's.", file=sys.stderr)
    return int(bool(differing))


if __name__ == "__main__":
    sys.exit(run_recipe(main))
