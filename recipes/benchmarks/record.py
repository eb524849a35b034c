"""Records of benchmarks: what ran, on what, when, and the tables of the README files that are generated from them.

A record is a JSON file in ``results/``: ``name``, ``date``, ``commit``, ``device``, ``versions``, ``command``,
``columns`` and ``rows`` (one list per row, in the order of the columns), and ``notes``; perhaps ``shown``, the numbers
of the rows that are shown. On each page the lines from ``<!-- results: NAME -->`` to ``<!-- end -->`` are generated:

    python recipes/benchmarks/record.py          # rewrite the tables
    python recipes/benchmarks/record.py --check  # fail if they are out of date

Two tables are not a record: ``headline`` sets figures of several records beside their peers', and ``attention_matrix``
shows what the attention backends support, as they say themselves.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"
#: Rows of the headline table: what was measured, its record, the first cells of our row, the peer, and of its row.
HEADLINES = [
    ("QLoRA step, Llama-3.1-8B, 1 GPU, 2 x 2048 tokens", "train_step",
     ["lightning-qlora single, compile default", "llama-3.1-8b"],
     "transformers + peft", ["transformers + peft", "llama-3.1-8b"]),
    ("QLoRA step, Llama-3.2-1B, 1 GPU, 4 x 2048 tokens", "train_step",
     ["lightning-qlora single, compile default", "llama-3.2-1b"],
     "transformers + peft", ["transformers + peft", "llama-3.2-1b"]),
    ("QLoRA step, Llama-3.1-8B, 2 GPUs, 2 x 2048 tokens per GPU", "train_step",
     ["lightning-qlora fsdp2, compile default (at 77096fd)"],
     "accelerate FSDP2", ["accelerate FSDP2 (at 77096fd)"]),
    ("QLoRA step, Qwen3-8B, 1 GPU, 2 x 2048 tokens", "families",
     ["lightning-qlora single, compile default", "qwen3-8b"],
     "transformers + peft", ["transformers + peft", "qwen3-8b"]),
    ("QLoRA step, Gemma2-2B, 1 GPU, 2 x 2048 tokens", "families",
     ["lightning-qlora single, compile default", "gemma2-2b"],
     "transformers + peft", ["transformers + peft", "gemma2-2b"]),
    ("Linear + GRPO loss, 8192 tokens, vocabulary 128256", "chunked_loss",
     ["GRPO, H 2048 bf16", "linear_loss"], "Liger", ["GRPO, H 2048 bf16", "Liger"]),
    ("Linear + DPO loss, 8192 tokens, vocabulary 128256", "chunked_loss",
     ["DPO, H 2048 bf16", "linear_loss"], "Liger", ["DPO, H 2048 bf16", "Liger"]),
]  # fmt: skip
#: What the headline table shows of a row, where its record has it, and in which unit.
_FIGURES = {"tokens/s": "tokens/s", "p50, ms": "ms", "peak GPU, GiB": "GiB", "peak above inputs, MiB": "MiB"}
PACKAGES = ("torch", "triton", "bitsandbytes", "transformers", "peft", "lightning")
#: The README files with generated tables.
PAGES = ("README.md", "recipes/README.md", "recipes/benchmarks/README.md")
_BLOCK = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def save_record(
    name: str,
    columns: list[str],
    rows: list[list[Any]],
    *,
    notes: str = "",
    directory: Path = RESULTS,
    commit: str | None = None,
    **extra: Any,
) -> Path:
    """Write a record of a run that ended just now on this machine, and return its path.

    Args:
        name: File name without ``.json``.
        columns: Headings, each with its unit.
        rows: Values of JSON types, one list a row.
        notes: What a reader must know to understand the figures.
        directory: Where to.
        commit: Of the code measured; read from git unless given.
        extra: More fields, e.g. raw figures.
    """
    record = {
        "name": name,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit or _commit(),
        "device": _device(),
        "versions": _versions(),
        "command": " ".join(["python", *sys.argv]),
        "columns": columns,
        "rows": rows,
        "notes": notes,
        **extra,
    }
    path = directory / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def table(record: dict[str, Any]) -> str:
    """The record as a Markdown table with its origin underneath."""
    shown = record.get("shown", range(len(record["rows"])))
    lines = _lines(record["columns"], [record["rows"][number] for number in shown])
    versions = ", ".join(f"{package} {number}" for package, number in record["versions"].items())
    origin = (
        f"{record['device']}; {versions}; commit {record['commit'][:9]}, {record['date']}. {record['notes']}".strip()
    )
    return "\n".join([*lines, "", f"<sub>{origin}</sub>", ""])


def render(text: str, directory: Path = RESULTS) -> str:
    """``text`` with every generated block renewed, from the records in ``directory``.

    Raises:
        ValueError: If a block names a record that does not exist.
    """

    def block(match: re.Match[str]) -> str:
        if match[2] == "headline":
            return match[1] + headline(directory) + match[3]
        if match[2] == "attention_matrix":
            from lightning_qlora.modules.attention.choice import attention_matrix  # takes seconds

            return match[1] + "\n".join([*_lines(*attention_matrix()), ""]) + match[3]
        path = directory / f"{match[2]}.json"
        if not path.is_file():
            raise ValueError(f"The page shows results {match[2]!r}, but there is no {path}.")
        return match[1] + table(json.loads(path.read_text())) + match[3]

    return _BLOCK.sub(block, text)


def headline(directory: Path = RESULTS) -> str:
    """The headline table: one row per entry of :data:`HEADLINES`, ours beside the peer of the same record."""
    rows, records = [], {}
    for what, name, ours, peer, theirs in HEADLINES:
        record = records.setdefault(name, json.loads((directory / f"{name}.json").read_text()))
        shown = {unit: record["columns"].index(title) for title, unit in _FIGURES.items() if title in record["columns"]}
        cells = []
        for start in (ours, theirs):
            row = next(row for row in record["rows"] if row[: len(start)] == start)
            cells.append(", ".join(f"{_cell(row[column])} {unit}" for unit, column in shown.items()))
        rows.append([what, cells[0], f"{peer}: {cells[1]}"])
    origins = (
        f"{record['name']} ({record['device']}, torch {record['versions']['torch']}, commit {record['commit'][:9]}, "
        f"{record['date']})"
        for record in records.values()
    )
    table = _lines(["measured", "lightning-qlora", "peer"], rows)
    return "\n".join([*table, "", f"<sub>Records: {'; '.join(origins)}.</sub>", ""])


def _lines(columns: list[str], rows: list[list[Any]]) -> list[str]:
    return [_row(columns), _row(["---"] * len(columns)), *map(_row, rows)]


def _row(cells: list[Any]) -> str:
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "" if value is None else str(value)


def _commit() -> str:
    result = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return " + ".join(f"{names.count(name)}x {name}" for name in dict.fromkeys(names))
    return f"CPU, {torch.get_num_threads()} threads"


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def main() -> int:
    """Rewrite the generated tables, or with ``--check`` compare them."""
    parser = argparse.ArgumentParser(description="Make the tables of the README files from recorded results.")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a page is out of date")
    check = parser.parse_args().check
    stale = []
    for page in filter(Path.is_file, (ROOT / name for name in PAGES)):
        text = page.read_text()
        new = render(text)
        if new == text:
            continue
        stale.append(str(page.relative_to(ROOT)))
        if not check:
            page.write_text(new)
    if check and stale:
        print(f"Out of date: {', '.join(stale)}. Run `python recipes/benchmarks/record.py`.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
