"""What training changes in how a model is talked to: said, saved beside the adapter, and read by transformers."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GenerationConfig

from lightning_qlora.modules.checkpoints import chat_format
from lightning_qlora.modules.checkpoints.chat_format import ChatFormat, copy_changes

OTHER_TEMPLATE = "{% for message in messages %}{{ message['content'] }}<|endoftext|>{% endfor %}"


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    messages: list[str] = []
    monkeypatch.setattr(chat_format, "rank_zero_info", messages.append)
    return messages


@pytest.mark.parametrize("generation", [{"eos_token_id": [2, 1], "temperature": 0.6}, None], ids=["file", "config"])
def test_a_turn_end_at_which_the_model_does_not_stop_is_added(
    tiny_llama_dir: Path, tmp_path: Path, said: list[str], generation: dict[str, object] | None
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_llama_dir, base)
    (base / "generation_config.json").unlink()
    if generation:
        (base / "generation_config.json").write_text(json.dumps(generation))
    before = ChatFormat.of(base)
    stops = (2, 1) if generation else (2,)
    assert (before.stops, before.changed) == (stops, {})
    assert before.trained(base, before.tokenizer, [2]).changed == {}
    assert said == []

    after = before.trained(base, before.tokenizer, [0, 2])
    named = "'<|im_end|>' (2), '<|im_start|>' (1)" if generation else "'<|im_end|>' (2)"
    assert said == [
        f"The data end answers with '<|endoftext|>' (0), but the model stops at {named} (the tokenizer's eos_token is "
        "'<|im_end|>'): it would not stop. The token is added to eos_token_id in generation_config.json, which is "
        "saved beside the adapter and in merged models."
    ]
    assert after.stops == (*stops, 0)
    (tmp_path / "adapter").mkdir()
    after.save(tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == ["generation_config.json"]
    read = GenerationConfig.from_pretrained(tmp_path / "adapter")
    assert read.eos_token_id == [*stops, 0]
    assert read.temperature == (0.6 if generation else None)
    assert ChatFormat.of(base, tmp_path / "adapter").stops == (*stops, 0)


def test_another_template_goes_with_the_adapter_into_the_merged_model(
    tiny_llama_dir: Path, tmp_path: Path, said: list[str]
) -> None:
    before = ChatFormat.of(tiny_llama_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    tokenizer.chat_template = OTHER_TEMPLATE
    after = before.trained(tiny_llama_dir, tokenizer, [2])
    assert said == ["The chat template is not the base model's: it is saved beside the adapter."]
    (tmp_path / "adapter").mkdir()
    after.save(tmp_path / "adapter")
    assert ChatFormat.of(tiny_llama_dir, tmp_path / "adapter").tokenizer.chat_template == OTHER_TEMPLATE
    # A template may also stand in tokenizer_config.json: the file must be the one that is read.
    merged = tmp_path / "merged"
    shutil.copytree(tiny_llama_dir, merged)
    config = json.loads((merged / "tokenizer_config.json").read_text())
    (merged / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "old"}))
    copy_changes(tmp_path / "adapter", merged)
    assert AutoTokenizer.from_pretrained(merged).chat_template == OTHER_TEMPLATE
    assert ChatFormat.of(merged).stops == before.stops
    # Training goes on from that adapter in its own format.
    again = ChatFormat.of(tiny_llama_dir, tmp_path / "adapter")
    assert again.trained(tiny_llama_dir, again.tokenizer, [2]).changed == after.changed
