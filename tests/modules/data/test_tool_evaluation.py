"""Requests of chats, conversations in which calls are run, and the data sets that the recipe brings."""

import hashlib
import json
import re
import zipfile
from typing import Any

import pytest

from lightning_qlora.modules.data import bfcl
from lightning_qlora.modules.data.demo_tools import DEMO_TOOLS
from lightning_qlora.modules.data.formats import to_chat
from lightning_qlora.modules.data.rendering import ChatRenderer
from lightning_qlora.modules.data.tool_evaluation import converse, names, requests_of, run_call
from lightning_qlora.modules.data.tool_formats import with_tools
from lightning_qlora.modules.data.tool_requests import result_text, tool_requests
from tests.chats import chat, make_tokenizer


def written(*calls: tuple[str, dict[str, Any]]) -> str:
    return "".join(f"<tool_call>{json.dumps({'name': n, 'arguments': a})}</tool_call>" for n, a in calls)


#: Of what is said and offered in all conversations, on any machine and with any Python.
DIGEST = "6dd591e4c517206eb00b276abc942d8370740b5185e09859a855ceae5b6c84eb"


@pytest.fixture(scope="module")
def rows() -> dict[str, list[Any]]:
    return {split: [to_chat(row, {}) for _, row in tool_requests(split)] for split in ("train", "validation")}


def test_the_conversations_are_always_the_same_and_their_results_are_the_tools_own(rows):
    assert {split: len(chats) for split, chats in rows.items()} == {"train": 900, "validation": 100}
    every = [*rows["train"], *rows["validation"]]
    assert len({row["messages"][0]["content"] for row in every}) == 1000
    used = [call["name"] for row in every for call in row["messages"][1]["tool_calls"]]
    assert {*used} == {*DEMO_TOOLS}
    assert len(DEMO_TOOLS) == 8
    assert len(used) == 1100
    for request in requests_of(every):
        assert [run_call(DEMO_TOOLS, call) for call in request.expected] == request.results
    for row in every:
        assert all(names(row["messages"][-1]["content"], m["content"]) for m in row["messages"] if m["role"] == "tool")
    said = [[row["messages"], [tool["function"]["name"] for tool in row["tools"]]] for row in every]
    assert hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest() == DIGEST


@pytest.mark.parametrize(
    ("name", "arguments", "result"),
    [
        ("convert_length", {"value": 5, "source": "kilometres", "target": "miles"}, "3.11"),
        ("convert_temperature", {"value": 100, "source": "celsius", "target": "fahrenheit"}, "212"),
        ("convert_temperature", {"value": 0, "source": "kelvin", "target": "celsius"}, "-273.15"),
        ("days_between", {"start": "2024-02-28", "end": "2024-03-01"}, "2"),
        ("add_days", {"day": "2023-12-31", "count": 1}, "2024-01-01"),
        ("weekday", {"day": "2000-01-01"}, "Saturday"),
        ("count_words", {"text": " a  b\nc "}, "3"),
        ("percentage", {"percent": 12.5, "number": 80}, "10"),
        ("common_divisor", {"first": 12, "second": 18}, "6"),
        (
            "convert_length",
            {"value": 5, "source": "km", "target": "miles"},
            "error: unknown unit 'km'; known are metres",
        ),
        ("weekday", {"day": "tomorrow"}, "error: Invalid isoformat"),
        ("weekday", {}, "error: weekday() missing 1 required"),
        ("add_days", {"day": "2023-12-31", "count": 10**12}, "error: "),
        ("grow", {}, "error: there is no tool 'grow'; there are convert_length"),
    ],
)
def test_calls_are_run_and_failures_are_results(name, arguments, result):
    found = run_call(DEMO_TOOLS, {"name": name, "arguments": arguments})
    assert found.startswith(result) if result.startswith("error") else found == result


def test_an_answer_must_name_the_result_and_not_a_longer_one():
    assert names("It is 3.1.", "3.1")
    assert names("(3)", "3")
    for other in ("13.1", "3.14", "x3", "30", "1.3", "3.1", "3,5"):
        assert not names(f"It is {other} m", "3"), other


def test_requests_are_the_turns_with_calls_and_first_turns_where_nothing_fits(rows):
    row = rows["validation"][0]
    (request,) = requests_of([row])
    assert request.messages == row["messages"][:1]
    assert request.expected == row["messages"][1]["tool_calls"]
    (nothing,) = requests_of([{"tools": row["tools"], **chat("q", "None fits.", "r", "a")}])
    assert (nothing.expected, nothing.results, len(nothing.messages)) == ([], [], 1)
    assert requests_of([chat("q", "a")]) == []
    assert len(requests_of([row, row])) == 1  # as of templates that make each turn a sample of its own
    first, second = requests_of([{"tools": row["tools"], "messages": [*row["messages"][:-1], *row["messages"]]}])
    assert first.results == []  # the user speaks next, so no answer to these results is known
    assert len(second.messages) == len(row["messages"])


def test_calls_of_the_model_are_run_their_results_go_back_and_answers_are_checked(rows):
    renderer = ChatRenderer(with_tools(make_tokenizer()))
    requests = requests_of(rows["validation"][:4])
    script = {
        0: [written(*((c["name"], c["arguments"]) for c in requests[0].expected)), "right"],
        1: ["I do not know."],
        2: ['<tool_call>{"name": "weekday"'],
        3: [written(("weekday", {"day": "?"})), written(("weekday", {"day": "?"})), written(("weekday", {"day": "?"}))],
    }
    asked: list[list[str]] = []

    def ask(prompts: list[str]) -> list[str]:
        asked.append(prompts)
        texts = []
        for prompt in prompts:
            index = next(i for i, r in enumerate(requests) if r.messages[0]["content"] in prompt)
            text = script[index].pop(0)
            if text == "right":
                text = "It is " + " and ".join(re.findall("<tool_response>(.*?)</tool_response>", prompt)) + "."
            texts.append(text)
        return texts

    outcomes = converse(requests, ask, renderer, DEMO_TOOLS)
    assert [len(prompts) for prompts in asked] == [4, 2, 1]
    assert all(prompt.endswith("<|im_start|>assistant\n") for prompts in asked for prompt in prompts)
    assert outcomes[0].calls == [{"name": c["name"], "arguments": c["arguments"]} for c in requests[0].expected]
    assert [outcome.is_right for outcome in outcomes] == [True, False, False, False]
    assert (outcomes[1].calls, outcomes[2].calls) == ([], None)
    assert "error: Invalid isoformat" in asked[1][1]
    assert outcomes[3].answer is None
    script[0] = [written(*((c["name"], c["arguments"]) for c in requests[0].expected))]
    assert converse(requests[:1], ask, renderer)[0].answer is None  # without functions nothing is run
    assert len(asked) == 4


def test_results_are_texts():
    assert [result_text(value) for value in ("a", 2.0, 2.5, 3, [1], None)] == ["a", "2", "2.5", "3", "[1]", "null"]


def test_functions_of_bfcl_are_read_from_a_wheel_once_and_split_by_function(tmp_path, monkeypatch):
    """Two functions that are held out and two that are not, by the rule of the module."""
    held = [name for name in map("f{}".format, range(200)) if bfcl._is_held_out(name)][:2]
    kept = [name for name in map("f{}".format, range(200)) if not bfcl._is_held_out(name)][:2]

    def function(name: str) -> dict[str, Any]:
        properties = {"a": {"type": "float", "optional": True}, "type": {"type": "dict", "properties": {}}}
        return {"name": name, "description": "d", "parameters": {"type": "dict", "properties": properties}}

    def entry(number: int, *offered: str) -> str:
        question = [[{"role": "user", "content": f"question {number}"}]]
        return json.dumps({"id": f"n{number}", "question": question, "function": [*map(function, offered)]})

    truth = {"a": [1, 2, ""], "type": [{"x": ["u", "v"]}]}
    wheel = tmp_path / "some.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for kind in bfcl._KINDS:
            lines, answers = [], []
            if kind == "multiple":
                lines = [entry(1, *kept), entry(2, held[0], kept[0]), entry(3, kept[0], held[0])]
                for number, name in enumerate((kept[0], held[0], kept[0]), start=1):
                    answers.append(json.dumps({"id": f"n{number}", "ground_truth": [{name: truth}]}))
            elif kind == "irrelevance":
                lines = [entry(4, *held), entry(5, *kept)]
            archive.writestr(bfcl._FILE.format(folder="", kind=kind), "\n".join(lines))
            archive.writestr(bfcl._FILE.format(folder="possible_answer/", kind=kind), "\n".join(answers))
    fetched = []
    monkeypatch.setenv("LIGHTNING_QLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bfcl, "fetch_wheel", lambda *args, **options: fetched.append(args) or wheel)
    found = {split: dict(bfcl.bfcl_functions(split)) for split in ("train", "validation")}
    assert {split: [*each] for split, each in found.items()} == {"train": ["n1", "n5"], "validation": ["n2", "n4"]}
    assert len(fetched) == 1
    read: Any = to_chat(found["train"]["n1"], {})
    assert read["tools"][0]["function"]["parameters"] == {
        "type": "object",
        "properties": {"a": {"type": "number"}, "type": {"type": "object", "properties": {}}},
    }
    assert read["messages"][1]["tool_calls"] == [
        {
            "name": kept[0],
            "arguments": {"type": {"x": "u"}},
            "accepted": {"a": [1, 2, ""], "type": [{"x": "u"}, {"x": "v"}]},
        }
    ]
    assert requests_of([to_chat(found["validation"]["n4"], {})])[0].expected == []
