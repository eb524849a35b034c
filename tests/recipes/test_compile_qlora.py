"""The recipe from its command line, with a tiny Llama and a backend that generates no code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

RECIPE = Path(__file__).parents[2] / "recipes" / "compile_qlora.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(RECIPE), *arguments], capture_output=True, text=True, check=False)


def test_compiled_and_uncompiled_runs_side_by_side(tiny_llama_dir: Path, tmp_path: Path) -> None:
    flags = ["--backend=aot_eager_decomp_partition", "--seq_len=20", "--lora_r=4", "--max_steps=8"]
    done = run(f"--model={tiny_llama_dir}", f"--output_dir={tmp_path}", *flags)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    uncompiled, compiled = report["runs"]
    assert (uncompiled["run"], compiled["run"]) == ("off", "default")
    losses = report["losses"]["off"]
    assert len(set(losses)) == 8
    assert max(abs(a - b) / b for a, b in zip(report["losses"]["default"], losses, strict=True)) < 1e-5
    assert compiled["difference"] < 1e-5
    assert (uncompiled["graphs"], uncompiled["compile_s"]) == (0, 0)
    # In training rotary embedding, layer, layer for single samples, last norm; in validation layer.
    assert (compiled["graphs"], compiled["graph_breaks"]) == (5, 0)
    assert compiled["compile_s"] > 0
    assert f"{compiled['last loss']:.5g}" in done.stdout.splitlines()[-2]
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "default" / "report.html").is_file()


def test_samples_too_short_to_cut_are_refused(tmp_path: Path) -> None:
    done = run("--seq_len=9", f"--output_dir={tmp_path}")
    assert done.returncode == 2
    assert "--seq_len must be at least 10" in done.stderr
