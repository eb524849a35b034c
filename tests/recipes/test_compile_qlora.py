"""The recipe from its command line, with a tiny Llama and a backend that generates no code."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "compile_qlora.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(RECIPE), *arguments], capture_output=True, text=True, check=False)


FLAGS = ["--backend=aot_eager_decomp_partition", "--seq_len=20", "--lora_r=4", "--max_steps=8"]


@pytest.fixture(scope="module")
def recipe() -> Iterator[ModuleType]:
    """The recipe as a module; what it imports lies beside it."""
    sys.path.insert(0, str(RECIPE.parent))
    yield import_module(RECIPE.stem)
    sys.path.remove(str(RECIPE.parent))


def test_compiled_and_uncompiled_runs_side_by_side(tiny_llama_dir: Path, tmp_path: Path) -> None:
    done = run(f"--model={tiny_llama_dir}", f"--output_dir={tmp_path}", *FLAGS)
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
    assert f"{compiled['last loss']:.5g}" in done.stdout.splitlines()[-3]
    assert done.stdout.splitlines()[-1].startswith("Losses agree: difference of ")
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "default" / "report.html").is_file()


@pytest.mark.slow
def test_16_bits_are_judged_by_a_second_uncompiled_run(tiny_llama_dir: Path, tmp_path: Path) -> None:
    done = run(f"--model={tiny_llama_dir}", f"--output_dir={tmp_path}", "--precision=bf16-mixed", *FLAGS)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["precision"] == "bf16-mixed"
    assert [each["run"] for each in report["runs"]] == ["off", "off again", "default"]
    _, again, compiled = report["runs"]
    assert 1e-5 < again["mean diff."] < 1e-2
    assert compiled["difference"] <= 1e-6  # the same operators in the same order
    assert f"rounding explains {3 * again['mean diff.']:.2g}." in done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("again", "differences", "status"),
    [
        (None, {"difference": 0.9e-5, "mean diff.": 0.1e-5}, 0),
        (None, {"difference": 1.1e-5, "mean diff.": 0.1e-5}, 1),
        (1e-3, {"difference": 9e-3, "mean diff.": 2.9e-3}, 0),
        (1e-3, {"difference": 9e-3, "mean diff.": 3.1e-3}, 1),
    ],
)
def test_losses_that_differ_by_more_than_rounding_are_a_failure(
    recipe: ModuleType,
    capsys: pytest.CaptureFixture[str],
    again: float | None,
    differences: dict[str, float],
    status: int,
) -> None:
    rows = [{"run": "off", "difference": 0.0, "mean diff.": 0.0}]
    rows += [] if again is None else [{"run": "off again", "difference": 2 * again, "mean diff.": again}]
    assert recipe.judge([*rows, {"run": "default", **differences}]) == status
    assert ("Losses agree" if status == 0 else "of 'default'") in capsys.readouterr().out


def test_attention_and_window_are_those_asked_for(tiny_llama_dir: Path, tmp_path: Path) -> None:
    flags = [f"--model={tiny_llama_dir}", *FLAGS, "--run=off", "--attention=sdpa"]
    for window in (5, 1000):
        done = run(*flags, f"--output_dir={tmp_path / str(window)}", f"--sliding_window={window}")
        assert done.returncode == 0, done.stderr
    narrow, wide = (json.loads((tmp_path / f"{w}/off/report.json").read_text())["losses"] for w in (5, 1000))
    assert abs(narrow[0] - wide[0]) > 1e-3
    refused = run(*flags[:-1], "--attention=flex", f"--output_dir={tmp_path / 'flex'}")
    assert refused.returncode == 2
    assert "attention='flex' needs a GPU" in refused.stderr


def test_samples_too_short_to_cut_are_refused(tmp_path: Path) -> None:
    done = run("--seq_len=9", f"--output_dir={tmp_path}")
    assert done.returncode == 2
    assert "--seq_len must be at least 10" in done.stderr
