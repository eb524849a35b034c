"""The recipe with a tiny Llama and a small vocabulary, and what it does on a GPU, in small."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from lightning_qlora.modules.cli import run_recipe
from tests.recipes.runs import arguments, recipe_module


@pytest.fixture(scope="module")
def recipe(one_thread: None) -> ModuleType:
    return recipe_module("chunked_loss")


def assert_same_losses(plain: list[float], chunked: list[float]) -> None:
    assert len(plain) == len(chunked) == 3
    assert len(set(plain)) == 3
    assert max(abs(a - b) / a for a, b in zip(plain, chunked, strict=True)) < 1e-5


def test_report_says_that_nothing_changes_but_the_memory(
    recipe: ModuleType, tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(recipe.SIZES, "cpu", (32768, 64, torch.float32))
    flags = {"model": tiny_llama_dir, "output_dir": tmp_path, "max_steps": 3, "seq_len": 32, "most_tokens": 1024}
    assert run_recipe(recipe.main, arguments(flags)) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["differences"]) == 8
    for name, figures in report["differences"].items():
        assert len(figures) == 3
        assert max(figures) < 1e-5, name
        assert name in printed
    memory = report["peak_mib"]
    assert memory["tokens"] == [128, 256, 512, 1024]
    assert 0 < memory["chunked"][-1] < 0.5 * memory["plain"][-1]
    assert_same_losses(*(report["finetune"][name]["losses"] for name in ("plain", "chunked")))
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_directory_both_kinds_of_model_start_from_the_same_weights(
    recipe: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(recipe.SHAPES, "llama-3.2-1b", recipe.SHAPES["tiny"])
    ids = torch.randint(256, (3, 2, 10), generator=torch.Generator().manual_seed(0))
    found = [recipe.finetune(chunked, None, ids, "cpu") for chunked in (False, True)]
    assert_same_losses(*(run["losses"] for run in found))


@pytest.mark.parametrize(
    ("figures", "plain", "chunked", "wrong"),
    [
        ([9e-6, 0.0, 0.0], [5.0, 4.0], [5.00004, 4.00007], None),  # 0.8e-5 and, in step 2, 1.75e-5
        ([0.0, 0.0, 2e-5], [5.0, 4.0], [5.0, 4.0], "focal"),
        ([float("nan"), 0.0, 0.0], [5.0, 4.0], [5.0, 4.0], "focal"),
        ([0.0, 0.0, 0.0], [5.0, 4.0], [5.00006, 4.0], "step 1"),
        ([0.0, 0.0, 0.0], [5.0, 4.0], [5.0, float("nan")], "step 2"),
        ([2e-5, 0.0, 0.0], [5.0, 4.0], [5.0, 4.1], "focal, step 2"),
    ],
)
def test_exits_with_1_if_more_than_rounding_differs(
    figures: list[float], plain: list[float], chunked: list[float], wrong: str | None, recipe: ModuleType,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    def finetune(in_chunks: bool, *_: Any) -> dict[str, Any]:
        return {"losses": chunked if in_chunks else plain, "peak_mib": 1.0}

    monkeypatch.setattr(recipe, "differences", lambda _: {"cross-entropy": [0.0, 0.0, 0.0], "focal": figures})
    monkeypatch.setattr(recipe, "finetune", finetune)
    monkeypatch.setattr(recipe, "loss_memory", lambda *_: 1.0)
    monkeypatch.setattr(recipe, "resolve_model", lambda _: None)
    monkeypatch.setattr(recipe, "default_precision", lambda: "32-true")
    if wrong is None:
        recipe.main(max_steps=2, output_dir=tmp_path)
    else:
        with pytest.raises(SystemExit) as stop:
            recipe.main(max_steps=2, output_dir=tmp_path)
        # A text is what Python prints on stderr, and exits with 1.
        assert stop.value.code == f"error: what differs from plain torch by more than rounding: {wrong}"
    assert (tmp_path / "report.json").exists()  # in any case


def test_logits_off_by_a_thousandth_are_more_than_rounding(recipe: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    right = recipe.linear_loss
    monkeypatch.setattr(recipe, "linear_loss", lambda hidden, *a, **k: right(1.001 * hidden, *a, **k))
    for figures in recipe.differences("cpu").values():
        assert min(figures) > recipe.TOLERANCES["32-true"]


@pytest.mark.parametrize("flags", [{"seq_len": 1}, {"most_tokens": 7}, {"max_steps": -1}, {"batch_size": 0}])
def test_a_wrong_flag_is_refused_before_anything_runs(
    flags: dict[str, int], recipe: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("differences", "resolve_model"):
        monkeypatch.setattr(recipe, name, pytest.fail)
    with pytest.raises(ValueError, match="--batch_size 1, --seq_len 2"):
        recipe.main(**flags)
