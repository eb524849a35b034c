"""The recipe with a tiny Llama, and its runs in one process."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from lightning_qlora.modules.cli import run_recipe
from tests.recipes.runs import arguments, call, recipe_module


@pytest.fixture(scope="module")
def recipe(one_thread: None) -> ModuleType:
    return recipe_module("packing_flex")


def test_padded_and_packed_runs_side_by_side(
    recipe: ModuleType, tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    flags: dict[str, Any] = {
        "model": str(tiny_llama_dir), "lengths": [800, 400], "tokens": 1600, "batch_size": 2, "max_steps": 2,
        "precision": "32-true", "lora_r": 4, "output_dir": tmp_path,
    }  # fmt: skip
    if torch.cuda.is_available():
        flags["attentions"] = ["sdpa"]

    def run_here(flag: str, run: str) -> int:
        assert flag == "--run"
        return call(recipe, **flags, run=run)

    monkeypatch.setattr(recipe, "run_again", run_here)
    assert call(recipe, **flags) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    first, second, *packed = report["runs"]
    rows = int(first["run"].removeprefix("padded "))
    assert 1600 / 356 < rows < 1600 / 107
    assert [second["run"], *(run["run"] for run in packed)] == ["padded 2", "sdpa 400", "sdpa 800"]
    assert len(set(report["losses"][first["run"]])) == 2
    assert first["speed-up"] == 1
    printed = capsys.readouterr().out
    for run in report["runs"]:
        assert run["difference"] < 1e-5, run
        assert run["tokens/s"] > 0
        assert f"{run['run']:>14} {run['tokens/s']:>14.4g}" in printed
    assert packed[1]["padding"] < 0.1 < first["padding"]
    assert [(alone["row"], alone["attention"]) for alone in report["attention_alone"]] == [
        (400, "causal"), (400, "sdpa"), (800, "causal"), (800, "sdpa"),
    ]  # fmt: skip
    assert all(alone["ms"] > 0 for alone in report["attention_alone"])
    if not torch.cuda.is_available():
        assert sorted(report["not_measured"]) == ["flash", "flex", "xformers"]
        assert "needs a GPU" in report["not_measured"]["xformers"]
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_the_exit_status_is_that_of_the_run_that_fails(
    recipe: ModuleType, tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[str] = []

    def fail(flag: str, run: str) -> int:
        runs.append(run)
        return 137

    monkeypatch.setattr(recipe, "run_again", fail)
    flags: dict[str, Any] = {"model": str(tiny_llama_dir), "lengths": [800], "tokens": 1600, "max_steps": 1}
    assert call(recipe, **flags, output_dir=tmp_path / "out") == 137
    assert len(runs) == 1


def test_an_output_directory_that_cannot_be_written_is_refused_at_once(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "model_or_random_weights", pytest.fail)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file/out"):
        call(recipe, model="any", output_dir=tmp_path / "file" / "out")


@pytest.mark.usefixtures("fresh_graphs", "no_group_left")
def test_rows_of_eight_lengths_share_their_graphs(recipe: ModuleType, tiny_llama_dir: Path, tmp_path: Path) -> None:
    flags: dict[str, Any] = {
        "model": tiny_llama_dir, "output_dir": tmp_path, "lengths": [800], "tokens": 2400, "max_steps": 8, "lora_r": 4,
        "precision": "32-true", "compile": "default", "backend": "aot_eager_decomp_partition", "run": "sdpa varied",
    }  # fmt: skip
    assert run_recipe(recipe.main, arguments(flags)) == 0
    compiled = json.loads((tmp_path / "sdpa varied" / "report.json").read_text())["sections"]["compile"]
    # Rotary embedding, layer and last norm, all for several rows.
    assert (compiled["graphs"], compiled["graph_breaks"], compiled["recompiles"]) == (3, 0, 0)


@pytest.mark.parametrize("lengths", [[300, 800], [800, 1700]])
def test_lengths_that_do_not_fit_are_refused(
    lengths: list[int], recipe: ModuleType, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "draw_steps", pytest.fail)
    with pytest.raises(ValueError, match=r"must be at least \d+, for the longest sample, and at most --tokens=1600"):
        call(recipe, model=str(tiny_llama_dir), lengths=lengths, tokens=1600)
