"""The recipe with a tiny Llama: its runs in one process where that is enough, one from the command line."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from tests.recipes.runs import RECIPES, recipe_module


@pytest.fixture(scope="module")
def recipe(one_thread: None) -> ModuleType:
    return recipe_module("packing_flex")


def test_padded_and_packed_runs_side_by_side(
    recipe: ModuleType, tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    flags: dict[str, Any] = {
        "model": str(tiny_llama_dir), "lengths": [800, 400], "tokens": 1600, "batch_size": 2, "max_steps": 4,
        "precision": "32-true", "lora_r": 4, "output_dir": tmp_path,
    }  # fmt: skip
    if torch.cuda.is_available():
        flags["attentions"] = ["sdpa"]

    def run_here(flag: str, run: str) -> int:
        assert flag == "--run"
        return recipe.main(**flags, run=run)

    monkeypatch.setattr(recipe, "run_again", run_here)
    assert recipe.main(**flags) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    first, second, *packed = report["runs"]
    rows = int(first["run"].removeprefix("padded "))
    assert 1600 / 356 < rows < 1600 / 107
    assert [second["run"], *(run["run"] for run in packed)] == ["padded 2", "sdpa 400", "sdpa 800"]
    assert len(set(report["losses"][first["run"]])) == 4
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
    assert recipe.main(**flags, output_dir=tmp_path / "out") == 137
    assert len(runs) == 1


def test_an_output_directory_that_cannot_be_written_is_refused_at_once(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "model_directory", pytest.fail)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file/out"):
        recipe.main(model="any", output_dir=tmp_path / "file" / "out")


def test_rows_of_eight_lengths_share_their_graphs(tiny_llama_dir: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, str(RECIPES / "packing_flex.py"), f"--model={tiny_llama_dir}", f"--output_dir={tmp_path}",
        "--lengths=[800]", "--tokens=2400", "--max_steps=8", "--lora_r=4", "--precision=32-true", "--compile=default",
        "--backend=aot_eager_decomp_partition", "--run=sdpa varied",
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    compiled = json.loads((tmp_path / "sdpa varied" / "report.json").read_text())["sections"]["compile"]
    # Rotary embedding, layer and last norm, all for several rows.
    assert (compiled["graphs"], compiled["graph_breaks"], compiled["recompiles"]) == (3, 0, 0)


def test_steps_have_the_same_samples_in_every_form(recipe: ModuleType) -> None:
    samples: list[Any] = [{"input_ids": [i] * (20 + i % 31), "labels": [i] * (20 + i % 31)} for i in range(1, 200)]
    steps = recipe.draw_steps(samples, [100, 200, 400], tokens=800, steps=9)
    tokens = [sum(recipe.token_counts(step)) for step in steps]
    assert all(0.8 * 800 < count <= 800 for count in tokens)
    assert len({step[0]["input_ids"][0] for step in steps}) == 9
    for batches, most in (
        (recipe.padded_batches(steps, 99), 1),
        (recipe.padded_batches(steps, 4), 8),
        (recipe.packed_batches(steps, [200]), 1),
        (recipe.packed_batches(steps, [50, 100, 150]), 1),
    ):
        assert {len(step) for step in batches} <= set(range(1, most + 1))
        assert len({len(step) for step in batches}) == 1  # as many micro-batches in each step
        assert [sum(batch["num_tokens"] for batch in step) for step in batches] == tokens
        for step, batch in zip(steps, batches, strict=True):
            found = torch.cat([each["input_ids"].flatten() for each in batch])
            expected = torch.tensor([token for sample in step for token in sample["input_ids"]])
            assert torch.equal(found[found > 0].sort().values, expected.sort().values)
    for length, (batch,) in zip(itertools.cycle([50, 100, 150]), batches, strict=False):
        assert batch["input_ids"].shape[1] <= length + 7


def test_without_a_tokenizer_samples_have_the_usual_lengths(recipe: ModuleType, tmp_path: Path) -> None:
    LlamaConfig(vocab_size=300).save_pretrained(tmp_path)
    samples = recipe.read_samples(tmp_path)
    counts = recipe.token_counts(samples)
    # SmolLM2's tokenizer: 62 to 156, 86 on average.
    assert 60 < min(counts) < max(counts) < 160
    assert 82 < sum(counts) / len(counts) < 90
    assert max(max(sample["input_ids"]) for sample in samples) < 300
    assert samples == recipe.read_samples(tmp_path)


@pytest.mark.parametrize("lengths", [[300, 800], [800, 1700]])
def test_lengths_that_do_not_fit_are_refused(
    lengths: list[int], recipe: ModuleType, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "draw_steps", pytest.fail)
    with pytest.raises(ValueError, match=r"must be at least \d+, for the longest sample, and at most --tokens=1600"):
        recipe.main(model=str(tiny_llama_dir), lengths=lengths, tokens=1600)
