"""The recipe with a tiny Llama and a backend that generates no code: its comparison from the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.recipes.runs import RECIPES, call, recipe_module

RECIPE = RECIPES / "compile_qlora.py"
FLAGS: dict[str, Any] = {"backend": "aot_eager_decomp_partition", "seq_len": 20, "lora_r": 4, "max_steps": 8}


pytestmark = pytest.mark.usefixtures("no_group_left")


@pytest.fixture(scope="module")
def recipe(one_thread: None) -> ModuleType:
    return recipe_module("compile_qlora")


def test_compiled_and_uncompiled_runs_side_by_side(tiny_llama_dir: Path, tmp_path: Path) -> None:
    flags = FLAGS | {"model": tiny_llama_dir, "output_dir": tmp_path}
    command = [sys.executable, str(RECIPE), *(f"--{name}={value}" for name, value in flags.items())]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
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
def test_16_bits_are_judged_by_their_distance_from_float32(
    recipe: ModuleType, tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    flags = FLAGS | {"model": str(tiny_llama_dir), "output_dir": tmp_path, "precision": "bf16-mixed"}

    caches = set[str]()

    def run_here(flag: str, run: str, TORCHINDUCTOR_CACHE_DIR: str, TRITON_CACHE_DIR: str) -> int:
        assert flag == "--run"
        caches.add(TORCHINDUCTOR_CACHE_DIR)
        torch._dynamo.reset()  # a process of its own would have compiled nothing yet
        return call(recipe, **flags, run=run)

    monkeypatch.setattr(recipe, "run_again", run_here)
    assert call(recipe, **flags) == 0
    assert len(caches) == 3  # each run compiles anew
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["precision"] == "bf16-mixed"
    assert [each["run"] for each in report["runs"]] == ["off", "float32", "default"]
    uncompiled, exact, compiled = report["runs"]
    assert json.loads((tmp_path / "float32" / "report.json").read_text())["precision"] == "32-true"
    assert 1e-5 < uncompiled["mean diff."] < 1e-2
    assert exact["difference"] == 0
    assert compiled["mean diff."] == pytest.approx(uncompiled["mean diff."])  # the same operators in the same order
    assert f"rounding explains {2 * uncompiled['mean diff.']:.2g}." in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("uncompiled", "differences", "status"),
    [
        (None, {"difference": 0.9e-5, "mean diff.": 0.1e-5}, 0),
        (None, {"difference": 1.1e-5, "mean diff.": 0.1e-5}, 1),
        (1e-3, {"difference": 9e-3, "mean diff.": 1.9e-3}, 0),
        (1e-3, {"difference": 9e-3, "mean diff.": 2.1e-3}, 1),
    ],
)
def test_losses_that_differ_by_more_than_rounding_are_a_failure(
    recipe: ModuleType,
    capsys: pytest.CaptureFixture[str],
    uncompiled: float | None,
    differences: dict[str, float],
    status: int,
) -> None:
    in_float32 = {"run": "off", "difference": 0.0, "mean diff.": 0.0}
    in_16_bits = {"run": "off", "difference": 2 * (uncompiled or 0), "mean diff.": uncompiled}
    rows = [in_float32] if uncompiled is None else [in_16_bits, in_float32 | {"run": "float32"}]
    assert recipe.judge([*rows, {"run": "default", **differences}]) == status
    assert ("Losses agree" if status == 0 else "of 'default'") in capsys.readouterr().out


def test_attention_and_window_are_those_asked_for(recipe: ModuleType, tiny_llama_dir: Path, tmp_path: Path) -> None:
    flags = FLAGS | {"model": str(tiny_llama_dir), "run": "off"}
    for window in (5, 1000):
        given = {"attention": "sdpa", "sliding_window": window, "output_dir": tmp_path / str(window)}
        assert call(recipe, **flags, **given) == 0
    narrow, wide = (json.loads((tmp_path / f"{w}/off/report.json").read_text())["losses"] for w in (5, 1000))
    assert abs(narrow[0] - wide[0]) > 1e-3
    with pytest.raises(ValueError, match="attention='flex' needs a GPU"):
        call(recipe, **flags, attention="flex", output_dir=tmp_path / "flex")


def test_samples_too_short_to_cut_are_refused(recipe: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--seq_len must be at least 10"):
        call(recipe, seq_len=9, output_dir=tmp_path)
