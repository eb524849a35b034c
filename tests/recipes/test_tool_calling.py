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
    """Every request has the same call, so that a tiny model learns to write it."""
    called = {"role": "assistant", "tool_calls": [{"name": "pick", "arguments": '{"n": 1}'}]}
    rows = [{"tools": [PICK], "messages": [*chat("x" * (i % 5) + f"{i}?")["messages"], called]} for i in range(40)]
    path = tmp_path_factory.mktemp("tools") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_calls_are_learned_evaluated_and_reported(dataset, tiny_llama_dir, tmp_path, capsys):
    recipe = recipe_module("tool_calling")
    output = tmp_path / "run"
    flags: dict[str, Any] = {
        "model": str(tiny_llama_dir), "dataset": str(dataset), "output_dir": output, "max_steps": 30, "lr": 1e-2,
        "batch_size": 8, "seq_len": 256, "lora_r": 16, "packing": False, "val_samples": 3, "precision": "32-true",
        "max_new_tokens": 90, "answer_batch": 2,
    }  # fmt: skip
    assert call(recipe, **{**flags, "dry_run": True}) == 0
    assert not output.exists()
    assert call(recipe, **flags) == 0
    section = load_report(output / "report.json")["sections"]["tool_calls"]
    assert section["before"]["figures"]["calls exact"] == 0
    assert section["after"]["requests"] == 3
    kinds = ("exact", "of the right functions", "valid", "readable")
    assert section["after"]["figures"] == {f"calls {name}": 1 for name in kinds}
    written = '<tool_call>{"name": "pick", "arguments": {"n": 1}}</tool_call>'
    assert [example["written"] for example in section["after"]["examples"]] == [[written]] * 3
    assert "3 held-out requests" in capsys.readouterr().out
    # Who loads the adapter writes tools as in training.
    trained = ChatFormat.of(tiny_llama_dir, output / "adapter").tokenizer
    assert tool_format(trained).name == "hermes"


def test_data_without_tools_are_sent_to_the_ordinary_recipe(tiny_llama_dir, write_chats, tmp_path):
    flags: dict[str, Any] = {
        "model": str(tiny_llama_dir),
        "dataset": str(write_chats(12)),
        "output_dir": tmp_path / "run",
    }
    with pytest.raises(ValueError, match=r"No held-out chat has tools, .*; use recipes/fsdp2_qlora.py"):
        call(recipe_module("tool_calling"), **flags)
