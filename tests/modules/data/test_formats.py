"""Rows to chats: every format, what is refused, and what is named as not used."""

import json
import re
from typing import Any

import pytest

from lightning_qlora.modules.data.formats import to_chat
from tests.chats import chat

SYSTEM = {"role": "system", "content": "be brief"}
ANSWER = {"role": "assistant", "content": "a"}


def only(message: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [message]}


def with_system(*contents: str) -> dict[str, Any]:
    return {"messages": [SYSTEM, *chat(*contents)["messages"]]}


def unlearned(whole: Any, *positions: int) -> Any:
    """``whole`` with these messages read but not trained."""
    return {"messages": [m | {"train": False} if i in positions else m for i, m in enumerate(whole["messages"])]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (chat("q", "a"), chat("q", "a")),
        ({"messages": json.dumps(chat("q", "a")["messages"])}, chat("q", "a")),  # a cell of a CSV file
        (with_system("q", "a"), with_system("q", "a")),
        ({"system": "be brief", **chat("q", "a")}, with_system("q", "a")),
        (  # ShareGPT
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": ""},
            chat("q", "a"),
        ),
        (  # columns of a table: every message has all fields of all rows
            {"messages": [{"role": None, "from": "HUMAN", "content": None, "value": "q"}, ANSWER]},
            chat("q", "a"),
        ),
        ({"prompt": "q", "completion": "a"}, chat("q", "a")),
        ({"prompt": chat("q", "a", "r")["messages"], "completion": "b"}, unlearned(chat("q", "a", "r", "b"), 1)),
        ({"prompt": [SYSTEM, *chat("q")["messages"]], "completion": [ANSWER]}, with_system("q", "a")),
        ({"instruction": "Add", "input": "1 2", "output": "3"}, chat("Add\n\n1 2", "3")),
        ({"instruction": "Add", "input": "", "response": "0"}, chat("Add", "0")),
        ({"instruction": "Who?", "context": "Ann came.", "response": "Ann"}, chat("Who?\n\nAnn came.", "Ann")),
        (
            {"instruction": "q", "output": "b", "history": [["p", "a"]], "system_prompt": "be brief", "input": None},
            with_system("p", "a", "q", "b"),
        ),
        ({"question": "q", "answer": "a", "context": "c"}, chat("q\n\nc", "a")),
        ({"system_prompt": "be brief", "question": "q", "response": "a"}, with_system("q", "a")),
        ({"messages": None, "prompt": "q", "completion": "a"}, chat("q", "a")),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                          {"role": "assistant", "content": ["c"]}]},
            chat("ab", "c"),
        ),
        (
            {"messages": [{"role": "developer", "content": "d"}, *chat("q", "a")["messages"],
                          {"from": "observation", "value": "42"}, {"role": "model", "content": "b"}]},
            {"messages": [{"role": "developer", "content": "d"}, *chat("q", "a")["messages"],
                          {"role": "tool", "content": "42"}, {"role": "assistant", "content": "b"}]},
        ),
    ],
)  # fmt: skip
def test_every_format_becomes_a_chat_and_nothing_is_left_over(row, expected):
    unused: dict[str, None] = {}
    assert to_chat(row, unused) == expected
    assert unused == {}


@pytest.mark.parametrize(
    ("fields", "train"),
    [
        ({"weight": 0}, False),
        ({"weight": 1.0}, True),
        ({"train": False}, False),
        ({"train": True, "weight": None}, True),
    ],
)
def test_weight_and_train_say_which_turns_are_trained(fields, train):
    whole: Any = chat("q", "a", "r", "b")
    whole["messages"][1] |= fields
    assert to_chat(whole, {}) == (chat("q", "a", "r", "b") if train else unlearned(chat("q", "a", "r", "b"), 1))


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_goes_to_the_template(field):
    whole: Any = chat("q", "a")
    whole["messages"][1][field] = "why"
    assert to_chat(whole, {})["messages"][1] == {"role": "assistant", "content": "a", "reasoning_content": "why"}


def test_whatever_else_holds_something_is_named_once():
    unused: dict[str, None] = {}
    for number in range(2):
        row: Any = chat("q", "a") | {"id": number, "tags": [], "source": "", "prompt": "q", "tools": []}
        row["messages"][0] |= {"name": "Ann", "weight": 1}
        to_chat(row, unused)
    assert list(unused) == ["column 'id'", "column 'prompt'", "'name' of user messages", "'weight' of user messages"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x", "id": 1}, r"found the fields \['id', 'text'\], but a row needs one of: 'messages'; 'conv"),
        ({"instruction": "x"}, r"found the fields \['instruction'\], but"),
        (["p", "c"], "expected an object with fields, found list"),
        ({"messages": []}, "'messages' must be a non-empty list of messages, found "),
        ({"messages": "hi"}, "'messages' must be a non-empty list"),
        ({"conversations": ["hi"]}, "message 1: expected {role, content}, found 'hi'"),
        (only({"role": "humane", "content": "x"}), "message 1: unknown role 'humane'; known roles: system, dev"),
        (only({"role": ["user"], "content": "x"}), r"message 1: unknown role \['user'\]"),
        (only({"role": "user", "content": None}), r"message 1 \(user\): the content must be text .*, found None"),
        (only({"role": "user", "content": [{"type": "image_url", "text": None}]}), "the content must be text"),
        ({"prompt": 3, "completion": "c"}, r"message 1 \(user\): the content must be text and nothing else, found 3"),
        ({"prompt": "2+2", "completion": 4}, r"message 2 \(assistant\): the content must be text .*, found 4"),
        ({"instruction": "x", "input": {"a": 1}, "output": "y"}, "'input' must be text, found {'a': 1}"),
        ({"instruction": "x", "history": "y", "output": "y"}, "'history' must be a list of .question, answer. pairs"),
        ({"instruction": "x", "history": [["y"]], "output": "y"}, "'history' must be a list"),
        ({"system": 1, **chat("q", "a")}, "'system' must be text, found 1"),
        ({"system": "s", **with_system("q", "a")}, "there are two system prompts"),
        (chat("q", " \n"), r"message 2 \(assistant\): empty completion"),
        ({"instruction": "x", "response": ""}, "empty completion"),
        ({"instruction": "x", "response": None}, r"message 2 \(assistant\): the content must be text .*, found None"),
        (chat("q"), "no assistant turn, nothing to learn"),
        (unlearned(chat("q", "a"), 1), "no assistant turn is trained, nothing to learn"),
        (only(ANSWER | {"weight": 0.5}), r"message 1 \(assistant\): 'weight' must be 0 or 1 and"),
        ({"prompt": "ab\ud83d", "completion": "c"}, r"message 1 \(user\): character 3 is half of a surrogate"),
        (chat("q", "\udc00"), r"message 2 \(assistant\): character 1 is half of a surrogate pair \('\\udc00'\)"),
        (only(ANSWER), "the assistant speaks before any user turn"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_trained_on_is_refused_by_cause(row, message):
    with pytest.raises(ValueError, match=re.compile(message)):
        to_chat(row, {})
