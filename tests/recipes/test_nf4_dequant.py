"""The NF4 recipe and its benchmark, by their command lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
import torch

from lightning_qlora.modules.cli import run_recipe
from tests.recipes.runs import RECIPES, recipe_module

RECIPE = RECIPES / "nf4_dequant.py"
BENCHMARK = RECIPES / "benchmarks" / "nf4_dequant.py"


def run(script: Path, *flags: str, gpu: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if not gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.run([sys.executable, str(script), *flags], env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    return recipe_module("nf4_dequant")


def test_check_needs_no_gpu() -> None:
    result = run(RECIPE, "--check")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("exact (1/16 of the rows)") == 3


def test_check_finds_a_wrong_result(recipe: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = recipe.Shape(256, 1024, torch.float16)
    monkeypatch.setattr(recipe, "interpreted", recipe.nf4.dequantize_quant_state)
    assert "exact" in recipe.compare(shape, "cpu")

    def one_off(packed: torch.Tensor, state: object) -> torch.Tensor:
        weight: torch.Tensor = recipe.nf4.dequantize_quant_state(packed, state)
        weight.view(-1).view(torch.int16)[7] += 1
        return weight

    monkeypatch.setattr(recipe, "interpreted", one_off)
    with pytest.raises(ValueError, match="1 of 16384 elements of a 64 x 256 fp16 weight differ"):
        recipe.compare(shape, "cpu")


def test_what_cannot_run_is_said(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for flags, message in (
        ((), "There is no CUDA GPU to time: run with --check"),
        (("--check", "--iterations", "3"), "--iterations must be at least 4"),
    ):
        assert run_recipe(recipe.main, [*flags, "--output_dir", str(tmp_path / "new")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    result = run(BENCHMARK, "--results", str(tmp_path))
    assert result.returncode == 2
    assert "needs a CUDA GPU" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_bytes_of_a_pass(recipe: ModuleType) -> None:
    assert recipe.bytes_moved(128, torch.bfloat16) == 64 + 2 + 256
    assert recipe.bytes_moved(128, torch.float32) == 64 + 2 + 512


def test_plot_shows_every_series(recipe: ModuleType, tmp_path: Path) -> None:
    recipe.save_plot(tmp_path / "plot.svg", [2**20, 2**22], {"copy": [100.0, 200.0], "ours": [50.0, 99.0]}, "A title")
    svg = ElementTree.parse(tmp_path / "plot.svg").getroot()
    text = (tmp_path / "plot.svg").read_text()
    assert svg.tag.endswith("svg")
    assert all(label in text for label in ("A title", "copy", "ours", "elements"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_recipe_on_a_gpu(tmp_path: Path) -> None:
    result = run(RECIPE, "--iterations", "40", "--output_dir", str(tmp_path), gpu=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("exact (all rows)") == 3
    report = json.loads((tmp_path / "report.json").read_text())
    assert all(row["speedup"] > 1.15 for row in report["loop_microseconds"])  # the puzzle's mark
    assert len(report["elements"]) == len(report["gigabytes_per_second"]["this kernel"])
    ElementTree.parse(tmp_path / "bandwidth.svg")
