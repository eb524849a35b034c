"""What tests of data share: a tokenizer, a file of chats, and what the user is told."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from lightning_qlora.modules.data import (
    chat_template,
    checks,
    data_module,
    image_template,
    resumable,
    sources,
    tool_formats,
    vision,
    vocabulary,
)
from tests.chats import chat, make_tokenizer, write


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def rows(tmp_path) -> Path:
    """12 chats of different length: 11 to train on, so 4 batches of 3, 3, 3 and 2, and one held out."""
    return write(tmp_path / "rows.jsonl", *(chat(f"question {i}", f"answer {i}" + "!" * i) for i in range(12)))


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """What the user is told. Not by caplog: whether Lightning's loggers reach it depends on what ran before."""
    messages: list[str] = []
    modules = (
        chat_template, checks, data_module, image_template, resumable, sources, tool_formats, vision, vocabulary,
    )  # fmt: skip
    for module in modules:
        for name in ("rank_zero_info", "rank_zero_warn"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, messages.append)
    return messages
