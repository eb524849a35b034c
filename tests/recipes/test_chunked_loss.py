"""The recipe from its command line, with a tiny Llama."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

RECIPE = Path(__file__).parents[2] / "recipes" / "chunked_loss.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(RECIPE), *arguments], capture_output=True, text=True, check=False)


def test_report_says_that_nothing_changes_but_the_memory(tiny_llama_dir: Path, tmp_path: Path) -> None:
    done = run(
        f"--model={tiny_llama_dir}", f"--output_dir={tmp_path}", "--max_steps=3", "--seq_len=32", "--most_tokens=1024"
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["differences"]) == 7
    for row in report["differences"]:
        name, *figures = row.values()
        assert max(figures) < 1e-5, name
    last = report["peak_mib"][-1]
    assert last["tokens"] == 1024
    assert 0 < last["chunked"] < 0.5 * last["plain"]
    plain, chunked = report["losses"].values()
    assert len(plain) == 3
    assert max(abs(a - b) / a for a, b in zip(plain, chunked, strict=True)) < 1e-5
    assert (tmp_path / "memory.svg").read_text().startswith("<?xml")


def test_a_wrong_flag_is_refused_before_anything_runs() -> None:
    done = run("--seq_len=1")
    assert done.returncode != 0
    assert "--seq_len must be at least 2, got 1." in done.stderr
    assert "Traceback" not in done.stderr
