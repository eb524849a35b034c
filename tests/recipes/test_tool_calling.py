"""The recipe with a tiny Llama: figures before and after, the report, the template beside the adapter, a refusal."""

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_qlora.callbacks.report import load_report
from lightning_qlora.modules.checkpoints.chat_format import ChatFormat
from lightning_qlora.modules.data.tool_formats import tool_format
from tests.chats import chat
from tests.recipes.runs import call, recipe_module

pytestmark = pytest.mark.usefixtures("one_thread", "no_group_left")

PICK = {"name": "pick", "description": "p", "parameters": {"properties": {"n": {"type": "integer"}}, "required": ["n"]}}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions with one call each, and one in four that no tool fits."""
    called = {"role": "assistant", "tool_calls": [{"name": "pick", "arguments": '{"n": 1}'}]}
    answers = [called, called, called, {"role": "assistant", "content": "no"}]
    rows = [
        {"tools": [PICK], "messages": [*chat("x" * (i % 5) + f"{i}?")["messages"], answers[i % 4]]} for i in range(40)
    ]
    path = tmp_path_factory.mktemp("tools") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_requests_are_evaluated_before_and_after_and_the_template_goes_with_the_adapter(
    dataset, tiny_llama_dir, tmp_path, capsys
):
    recipe = recipe_module("tool_calling")
    output = tmp_path / "run"
    flags: dict[str, Any] = {
        "model": str(tiny_llama_dir), "dataset": str(dataset), "output_dir": output, "max_steps": 4, "lr": 1e-2,
        "batch_size": 4, "seq_len": 256, "lora_r": 8, "packing": False, "val_samples": 4, "precision": "32-true",
        "max_new_tokens": 8, "answer_batch": 3,
    }  # fmt: skip
    assert call(recipe, **{**flags, "dry_run": True}) == 0
    assert not output.exists()
    assert call(recipe, **flags) == 0
    report = load_report(output / "report.json")
    assert report["losses"][-1] < report["losses"][0]
    section = report["sections"]["tool_calls"]
    for stage in (section["before"], section["after"]):
        assert (stage["requests"], len(stage["examples"])) == (4, 4)
        assert {*stage["figures"]} == {
            "calls exact", "calls of the right functions", "calls valid", "calls readable",
        }  # fmt: skip
        wrong = sum(stage["mistakes"].values())
        assert stage["figures"]["calls exact"] == (4 - wrong) / 4
        assert sum(not example["right"] for example in stage["examples"]) == wrong
        assert all(len(example["written"]) == 1 for example in stage["examples"])  # nothing is run: these are no tools
    assert "4 held-out requests" in capsys.readouterr().out
    # Who loads the adapter writes tools as in training.
    assert tool_format(ChatFormat.of(tiny_llama_dir, output / "adapter").tokenizer).name == "hermes"


def test_data_without_tools_are_sent_to_the_ordinary_recipe(tiny_llama_dir, write_chats, tmp_path):
    flags: dict[str, Any] = {
        "model": str(tiny_llama_dir),
        "dataset": str(write_chats(12)),
        "output_dir": tmp_path / "run",
    }
    with pytest.raises(ValueError, match=r"No held-out chat has tools, .*; use recipes/fsdp2_qlora.py"):
        call(recipe_module("tool_calling"), **flags)
