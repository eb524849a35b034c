"""The recipe with a tiny Llama on texts that one word tells apart: figures, yardstick, predictions, report, dry run."""

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_qlora.callbacks.report import load_report
from tests.recipes.runs import call, recipe_module

pytest.importorskip("sklearn")
pytestmark = pytest.mark.usefixtures("one_thread", "no_group_left")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    labels = ["animal", "place", "tool"]
    rows = [{"text": f"{'x' * (i % 7)} {labels[i % 3]} {i}", "label": labels[i % 3]} for i in range(90)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_training_learns_and_everything_is_written(dataset, tiny_llama_dir, tmp_path, capsys):
    recipe = recipe_module("sequence_classification")
    output = tmp_path / "run"
    flags: dict[str, Any] = {
        "model": str(tiny_llama_dir), "dataset": str(dataset), "output_dir": output, "max_steps": 25, "lr": 1e-2,
        "batch_size": 16, "seq_len": 32, "lora_r": 8, "packing": False, "class_weights": "balanced",
        "predict": dataset, "precision": "32-true",
    }  # fmt: skip
    assert call(recipe, **{**flags, "dry_run": True}) == 0
    table = capsys.readouterr().out
    assert "trained head" in table
    assert not output.exists()

    assert call(recipe, **flags) == 0
    section = load_report(output / "report.json")["sections"]["classification"]
    assert section["texts"] == 9
    assert section["figures"]["macro_f1"] >= 0.8
    assert sum(map(sum, section["confusion"])) == 9
    assert section["yardsticks"]["TF-IDF and logistic regression"]["accuracy"] > 0.5
    printed = capsys.readouterr().out
    assert "TF-IDF and logistic regression" in printed
    page = (output / "report.html").read_text()
    assert "Confusion" in page
    assert 'style="--share: 100%"' in page
    predictions = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    assert [row["text"] for row in predictions] == [json.loads(x)["text"] for x in dataset.read_text().splitlines()]
    right = [row["label"] in row["text"] for row in predictions]
    assert sum(right) >= 0.9 * len(right)
    assert all(sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5) for row in predictions)
    config = json.loads((output / "adapter" / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])


def test_a_run_whose_steps_are_whole_epochs_is_validated(dataset, tiny_llama_dir, tmp_path):
    """The data are 6 micro-batches, and a step would take 50."""
    flags: dict[str, Any] = {
        "model": str(tiny_llama_dir), "dataset": str(dataset), "output_dir": tmp_path / "run", "max_steps": 2,
        "accumulate": 50, "batch_size": 16, "seq_len": 32, "lora_r": 8, "precision": "32-true",
    }  # fmt: skip
    assert call(recipe_module("sequence_classification"), **flags) == 0
    report = load_report(tmp_path / "run" / "report.json")
    assert len(report["losses"]) == 2
    assert report["sections"]["classification"]["texts"] == 9
