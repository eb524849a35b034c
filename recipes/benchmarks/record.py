"""Records of benchmarks: what ran, on what, when, and the tables of the README that are made from them.

A record is a JSON file in ``results/``: ``name``, ``date``, ``commit``, ``device``, ``versions``, ``command``,
``columns`` and ``rows`` (one list a row, in the order of the columns), and ``notes``; perhaps ``shown``, the numbers of
the rows that the README shows. There, the lines between ``<!-- results: NAME -->`` and ``<!-- end -->`` are generated:

    python recipes/benchmarks/record.py          # rewrite the README's tables
    python recipes/benchmarks/record.py --check  # fail if they are out of date

Of one table there is no record: ``attention_matrix`` says what the attention backends support, as they say themselves.
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
PACKAGES = ("torch", "triton", "bitsandbytes", "transformers", "peft", "lightning")
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
        if match[2] == "attention_matrix":
            from lightning_qlora.modules.attention.choice import attention_matrix  # takes seconds

            return match[1] + "\n".join([*_lines(*attention_matrix()), ""]) + match[3]
        path = directory / f"{match[2]}.json"
        if not path.is_file():
            raise ValueError(f"The README shows results {match[2]!r}, but there is no {path}.")
        return match[1] + table(json.loads(path.read_text())) + match[3]

    return _BLOCK.sub(block, text)


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
    """Rewrite, or with ``--check`` compare, the README's generated tables."""
    parser = argparse.ArgumentParser(description="Make the README's tables from recorded results.")
    parser.add_argument("--check", action="store_true", help="exit with 1 if the README is out of date")
    check = parser.parse_args().check
    readme = ROOT / "README.md"
    text = readme.read_text()
    new = render(text)
    if check and new != text:
        print("README.md is out of date: run `python recipes/benchmarks/record.py`.", file=sys.stderr)
        return 1
    if not check:
        readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
