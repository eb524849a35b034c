"""The recipe with a tiny Llama: it learns, says so in print and report, resumes, plans memory, and pads if it must."""

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_qlora.callbacks.report import load_report
from tests.recipes.runs import call, recipe_module

pytestmark = pytest.mark.usefixtures("one_thread", "no_group_left")


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> dict[str, Any]:
    rows = [{"prompt": f"name {i}", "chosen": f"yes {i % 5}", "rejected": f"no {i % 7}"} for i in range(60)]
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": str(tiny_llama_dir), "dataset": str(path), "batch_size": 4, "seq_len": 48, "lora_r": 8, "lr": 1e-2,
        "precision": "32-true", "answers": 2,
    }  # fmt: skip


def test_it_learns_what_is_preferred_and_reports_it(flags, tmp_path, capsys):
    recipe, output = recipe_module("preference"), tmp_path / "run"
    flags = {**flags, "output_dir": output, "max_steps": 15, "loss": "dpo", "precompute_reference": True}
    assert call(recipe, **{**flags, "dry_run": True}) == 0
    assert "working memory" in capsys.readouterr().out
    assert not output.exists()

    assert call(recipe, **flags) == 0
    report = load_report(output / "report.json")
    section, losses = report["sections"]["preference"], report["losses"]
    assert losses[0] == pytest.approx(0.693147, abs=1e-4)
    assert losses[-1] < 0.3
    assert len(section["train"]["margin"]) == 15
    (_, first), (_, last) = section["train"]["margin"][0], section["val"]["margin"][-1]
    assert first == pytest.approx(0, abs=1e-4)
    assert last > 1
    assert section["val"]["accuracy"][-1][1] == 1
    assert {"rewards_chosen", "rewards_rejected", "log_probs_chosen", "log_probs_rejected"} <= section["train"].keys()
    assert len(report["sections"]["answers"]["after"]) == 2
    printed = capsys.readouterr().out
    assert "log probs rejected" in printed
    assert "--- after training ---" in printed
    assert "margin by optimizer step" in (output / "report.html").read_text()
    assert (output / "reference.safetensors").is_file()
    assert (output / "adapter" / "adapter_config.json").is_file()


def test_kto_takes_the_same_pairs_and_resumes(flags, tmp_path, capsys):
    recipe = recipe_module("preference")
    flags = {**flags, "loss": "kto", "packing": False, "save_every": 2, "answers": 0}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert call(recipe, **flags, output_dir=whole, max_steps=4) == 0
    assert call(recipe, **flags, output_dir=parts, max_steps=2) == 0
    # The schedule of the first part has ended; that of four steps is taken from there.
    assert call(recipe, **flags, output_dir=parts, max_steps=4, resume=True) == 0
    losses = [load_report(path / "report.json")["losses"] for path in (whole, parts)]
    assert losses[1][0] == losses[0][0]
    assert len(losses[1]) == 4
    section = load_report(parts / "report.json")["sections"]["preference"]
    assert [step for step, _ in section["train"]["kl"]] == [1, 2, 3, 4]


def test_rows_are_padded_where_no_attention_packs_and_that_is_said(flags, tiny_llama_dir, tmp_path, monkeypatch):
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny_llama_dir.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.1}))
    flags = {**flags, "model": str(model), "loss": "dpo", "output_dir": tmp_path / "run", "max_steps": 1, "answers": 0}
    recipe, said = recipe_module("preference"), list[str]()
    monkeypatch.setattr(recipe, "rank_zero_info", said.append)
    assert call(recipe, **flags) == 0
    assert said[0].startswith("Rows are padded, not packed: ")
