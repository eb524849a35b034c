"""The recipe with a tiny Llama and a backend that generates no code: its comparison, in one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.recipes.runs import call, recipe_module

FLAGS: dict[str, Any] = {"backend": "aot_eager_decomp_partition", "seq_len": 20, "lora_r": 4, "max_steps": 8}


pytestmark = pytest.mark.usefixtures("no_group_left")


@pytest.fixture(scope="module")
def recipe(one_thread: None) -> ModuleType:
    return recipe_module("compile_qlora")


@pytest.fixture
def compare(
    recipe: ModuleType, tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> Callable[..., tuple[dict[str, Any], list[str]]]:
    """``compare(**flags)``: the comparison, with its runs in this process; returns the report and the lines printed.

    ``.ci/run`` has the recipe start processes.
    """

    def run(**changes: Any) -> tuple[dict[str, Any], list[str]]:
        flags = FLAGS | {"model": str(tiny_llama_dir), "output_dir": tmp_path} | changes
        caches: list[str] = []

        def run_here(flag: str, run: str, TORCHINDUCTOR_CACHE_DIR: str, TRITON_CACHE_DIR: str) -> int:
            assert flag == "--run"
            caches.append(TORCHINDUCTOR_CACHE_DIR)
            torch._dynamo.reset()  # a process of its own would have compiled nothing yet
            return call(recipe, **flags, run=run)

        monkeypatch.setattr(recipe, "run_again", run_here)
        assert call(recipe, **flags) == 0
        report = json.loads((tmp_path / "report.json").read_text())
        assert len(set(caches)) == len(report["runs"])  # each run compiles anew
        return report, capsys.readouterr().out.splitlines()

    return run


def test_compiled_and_uncompiled_runs_side_by_side(compare: Callable[..., Any], tmp_path: Path) -> None:
    report, printed = compare(precision="32-true")
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
    assert f"{compiled['last loss']:.5g}" in printed[-3]
    assert printed[-1].startswith("Losses agree: difference of ")
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "default" / "report.html").is_file()


def test_16_bits_are_judged_by_their_distance_from_float32(compare: Callable[..., Any], tmp_path: Path) -> None:
    report, printed = compare(precision="bf16-mixed", backend="eager", max_steps=4)
    assert report["precision"] == "bf16-mixed"
    assert [each["run"] for each in report["runs"]] == ["off", "float32", "default"]
    uncompiled, exact, compiled = report["runs"]
    assert json.loads((tmp_path / "float32" / "report.json").read_text())["precision"] == "32-true"
    assert 1e-5 < uncompiled["mean diff."] < 1e-2
    assert exact["difference"] == 0
    assert compiled["mean diff."] == pytest.approx(uncompiled["mean diff."])  # the same operators in the same order
    assert f"rounding explains {2 * uncompiled['mean diff.']:.2g}." in printed[-1]


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
    flags = FLAGS | {"model": str(tiny_llama_dir), "run": "off", "max_steps": 2}
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
