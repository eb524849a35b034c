"""Record how fast one layer's attention is: causal over whole rows, and inside the documents of packed rows.

    python recipes/benchmarks/packed_attention.py

Rows are packed with the demo data, as many of each length as hold the tokens of a step. On a GPU these are the heads of
Llama-3.2-1B, on a CPU those of the demo model. Writes ``results/attention.json``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from record import RESULTS, save_record

from lightning_qlora.modules.attention import AttentionName
from lightning_qlora.modules.attention.timing import attentions_here, measure_attention
from lightning_qlora.modules.checkpoints.random_weights import model_or_random_weights
from lightning_qlora.modules.checkpoints.tokenizer import find_tokenizer
from lightning_qlora.modules.cli import run_recipe
from lightning_qlora.modules.data.steps import check_rows, demo_samples, draw_steps, packed_batches
from lightning_qlora.modules.hardware import check_precision, compute_dtype
from lightning_qlora.modules.models.families import load_config


def main(
    model: str | None = None,
    lengths: list[int] | None = None,
    tokens: int | None = None,
    attentions: list[AttentionName] | None = None,
    results: Path = RESULTS,
    commit: str | None = None,
) -> None:
    """Measure, print and record.

    Args:
        model: Model whose heads and tokenizer count. Default: Llama-3.2-1B's shape on a GPU, the demo model on a CPU.
        lengths: Lengths of the rows. Default: 2048 and 8192 tokens on a GPU, 256 and 1024 on a CPU.
        tokens: Tokens in all rows together. Default: 16384 on a GPU, 1024 on a CPU.
        attentions: Attention implementations to measure. Default: all that run here.
        results: Directory of the record.
        commit: Commit of the code measured; read from git unless given.
    """
    on_gpu = torch.cuda.is_available()
    lengths = lengths or ([2048, 8192] if on_gpu else [256, 1024])
    tokens = (16384 if on_gpu else 1024) if tokens is None else tokens
    directory = model_or_random_weights(model)
    config = load_config(directory)
    dtype = compute_dtype(check_precision("auto"))
    backends, refused = attentions_here(attentions, dtype)
    samples = demo_samples(find_tokenizer(directory), config.vocab_size)
    check_rows(samples, lengths, tokens)
    steps = draw_steps(samples, lengths, tokens, 1)
    rows = []
    for length in lengths:
        documents = packed_batches(steps, [length])[0][0]["document_lengths"]
        found = measure_attention(config, documents, backends, dtype)
        rows += [{"row": length, "rows": len(documents), **each} for each in found]
    path = save_record(
        "attention",
        [*rows[0]],
        [list(row.values()) for row in rows],
        notes=f"One layer, forward and backward, {dtype}, without projections; causal over whole rows, the others "
        "inside the documents of packed rows. On a GPU the time is the device's, without the host's launches.",
        directory=results,
        commit=commit,
        refused=refused,
    )
    print(path.read_text())


if __name__ == "__main__":
    sys.exit(run_recipe(main))
