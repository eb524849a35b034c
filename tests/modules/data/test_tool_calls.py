"""Rows with tools: how they are read and refused, written and read back, and what of them is trained."""

import json
import re
from typing import Any

import pytest

from lightning_qlora.modules.data import tool_formats
from lightning_qlora.modules.data.chat_template import tokenize_chats
from lightning_qlora.modules.data.data_module import ChatDataModule
from lightning_qlora.modules.data.formats import to_chat
from lightning_qlora.modules.data.options import DataOptions
from lightning_qlora.modules.data.samples import IGNORE_INDEX
from lightning_qlora.modules.data.tool_formats import FORMATS, ParsedTurn, tool_format, with_tools
from lightning_qlora.modules.data.tool_schemas import read_tools
from tests.chats import CHATML, chat, learned_text, make_tokenizer, write


def scale(value: float, names: list[str] | None = None) -> float:
    """Scale a value.

    Args:
        value: what to scale
        names: of what, if any
    """
    return value


PICK = {
    "name": "pick",
    "description": "Pick a colour.",
    "parameters": {
        "type": "object",
        "properties": {"colour": {"type": "string", "enum": ["red", "blue"]}},
        "required": ["colour"],
    },
}
TOOLS = [scale, PICK]


def call(name: str, arguments: Any, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


def row(*messages: dict[str, Any], tools: Any = TOOLS) -> dict[str, Any]:
    return {"tools": tools, "messages": [{"role": "user", "content": "q"}, *messages]}


def calling(*calls: Any, content: Any = None) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


RESULT = {"role": "tool", "content": "4"}
ANSWER = {"role": "assistant", "content": "It is 4."}
SCALE, PICKED = call("scale", {"value": 2, "names": ["é", '"']}), call("pick", '{"colour": "red"}')

# As Llama 3.1: one bare JSON object, the tools in the user's first turn, results as JSON in turns of their own.
LLAMA3 = (
    "{% if tools %}<|start|>system\n\nEnvironment: ipython<|eot|>{% endif %}"
    "{% for message in messages %}"
    "{% if message.role == 'tool' %}<|start|>ipython\n\n{{ message.content | tojson }}<|eot|>"
    "{% elif 'tool_calls' in message %}"
    "{% if message.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    "{% set called = message.tool_calls[0].function %}<|start|>assistant\n\n"
    '{"name": "{{ called.name }}", "parameters": {{ called.arguments | tojson }}}<|eot|>'
    "{% else %}<|start|>{{ message.role }}\n\n"
    "{% if loop.first and tools %}{% for tool in tools %}{{ tool | tojson }}\n\n{% endfor %}{% endif %}"
    "{{ message.content | trim }}<|eot|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n\n{% endif %}"
)
# As Qwen3: schemas in a system turn, calls and results in tags, and a thought in answers after the last question.
QWEN3 = (
    "{% if tools %}<|im_start|>system\n<tools>{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n</tools>"
    "<|im_end|>\n{% endif %}"
    "{% for message in messages %}"
    "{% if message.role == 'tool' %}"
    "{% if messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}\n"
    "<tool_response>\n{{ message.content }}\n</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% else %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ message.content }}"
    "{% for called in message.tool_calls %}{% if not loop.first or message.content %}\n{% endif %}"
    '<tool_call>\n{"name": "{{ called.function.name }}", "arguments": {{ called.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Gemma 2: no tools, no system prompt, and users alternate with the assistant.
GEMMA2 = (
    "{% for message in messages %}"
    "{% if message.role == 'system' or (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|start|>{{ message.role }}\n{{ message.content | trim }}<|eot|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
EXTRA = ("<|start|>", "<|eot|>")


def samples(template: str, *rows: Any) -> tuple[Any, list[Any]]:
    tokenizer = with_tools(make_tokenizer(template, extra=EXTRA))
    return tokenizer, tokenize_chats(tokenizer, [to_chat(each, {}) for each in rows], 4096).samples


# --- reading ---------------------------------------------------------------------------------------------------------


def test_tools_and_calls_are_read_in_every_form():
    tools = read_tools(TOOLS)
    assert [tool["function"]["name"] for tool in tools] == ["scale", "pick"]
    assert tools[0]["function"]["parameters"]["properties"]["value"] == {
        "type": "number", "description": "what to scale",
    }  # fmt: skip
    filled = json.loads(json.dumps(PICK))
    filled["parameters"]["properties"]["value"] = None  # as a table does for the keys of other rows
    for form in (json.dumps([PICK]), [json.dumps(PICK)], [{"type": "function", "function": PICK}], [filled]):
        assert read_tools(form) == tools[1:]
    expected = to_chat(row(calling(SCALE, PICKED), RESULT, RESULT, ANSWER), {})
    assert expected["messages"][1]["tool_calls"] == [
        {"name": "scale", "arguments": {"value": 2, "names": ["é", '"']}},
        {"name": "pick", "arguments": {"colour": "red"}},
    ]
    bare = [{"name": "scale", "parameters": SCALE["function"]["arguments"]}, PICKED["function"]]
    for calls in (bare, json.dumps(bare)):
        message = {"role": "assistant", "content": "", "tool_calls": calls}
        assert to_chat(row(message, RESULT, RESULT, ANSWER), {}) == expected
    sharegpt = {
        "functions": TOOLS,
        "conversations": [
            {"from": "human", "value": "q"}, {"from": "function_call", "value": json.dumps(bare)},
            {"from": "observation", "value": "4"}, {"from": "observation", "value": "4"},
            {"from": "gpt", "value": "It is 4."},
        ],
    }  # fmt: skip
    assert to_chat(sharegpt, {}) == expected


def test_what_tables_fill_with_null_is_left_out_and_named():
    unused: dict[str, None] = {}
    arguments = {"value": 2, "colour": None, "names": None}  # `names` may be null
    filled = call("scale", arguments, id=None)
    found = to_chat(row(calling(filled)), unused)["messages"][1]["tool_calls"]
    assert found == [{"name": "scale", "arguments": {"value": 2, "names": None}}]
    assert list(unused) == ["arguments of calls that are null and must not be"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(RESULT, ANSWER), r"message 2 \(tool\): a tool's result without a call"),
        (row(calling(SCALE), RESULT, RESULT, ANSWER), r"message 4 \(tool\): a tool's result without a call: .* left"),
        ({"messages": [*chat("q")["messages"], RESULT, ANSWER]}, r"message 2 \(tool\): a tool's result without a call"),
        (
            row(calling(call("scale", {"value": 1}, id="a")), RESULT | {"tool_call_id": "b"}),
            "its tool_call_id 'b' is of no call without a result; these are a",
        ),
        (row({"role": "robot", "content": "x"}), "message 2: unknown role 'robot'"),
        (row(calling(call("scale", '{"value": 2'))), r"\(assistant\), call 1 \(scale\): 'arguments' is not JSON at"),
        (row(calling(call("scale", '{"value": NaN}'))), "'arguments' is not JSON: NaN is no number of JSON"),
        (row(calling(call("scale", [2]))), r"'arguments' must be an object, found \[2\]"),
        (row(calling("{")), r"message 2 \(assistant\), call 1 is not JSON at column 2"),
        (row({"from": "function_call", "value": "{}"}), "call 1: expected {name, arguments}, found {}"),
        (row(calling(call("grow", {}))), "calls 'grow', which the row does not offer; its tools are scale, pick"),
        ({"messages": [*chat("q")["messages"], calling(SCALE)]}, "does not offer; it has no column 'tools'"),
        (row({"role": "user", "content": "x", "tool_calls": [SCALE]}), "only the assistant calls tools"),
        (row(ANSWER, tools=[PICK, PICK]), "a tool is named twice: pick; a call could mean either"),
        (row(ANSWER, tools="[{"), "'tools' is not JSON at column 3"),
        (row(ANSWER, tools=[{"description": "x"}]), "'tools', tool 1: expected a function with a name"),
        (row(ANSWER, tools=[lambda value: value]), "'tools', tool 1: the Python function <lambda> cannot be described"),
        (row(ANSWER, tools=[{"name": "f", "parameters": {"type": "array"}}]), "their type is 'array', but arguments"),
        (
            row(ANSWER, tools=[{"name": "f", "parameters": {"properties": {"a": {"type": "text"}}}}]),
            r"tool 1 \(f\): 'parameters' are not a valid JSON Schema of an object: 'text' is not valid .*properties.a",
        ),
        (
            row(ANSWER, tools=[{"name": "f", "parameters": {"properties": {"a": {}}, "required": ["b"]}}]),
            "'required' names b, which 'properties' does not have",
        ),
        (
            row(ANSWER, tools=[{"name": "f", "parameters": {"properties": {"a": {"$ref": "http://x/y"}}}}]),
            "'http://x/y' refers to another document",
        ),
    ],
)  # fmt: skip
def test_rows_with_tools_that_cannot_be_are_refused_by_cause(bad, message):
    with pytest.raises(ValueError, match=re.compile(message)):
        to_chat(bad, {})


# --- writing, and reading back ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("template", "name"), [(LLAMA3, "llama3"), (QWEN3, "hermes")])
def test_a_template_that_writes_tools_stays_and_its_form_is_found(template, name):
    tokenizer = make_tokenizer(template, extra=EXTRA)
    assert with_tools(tokenizer) is tokenizer
    assert tool_format(tokenizer).name == name


@pytest.mark.parametrize(("template", "place"), [(CHATML, "system"), (GEMMA2, "user")])
def test_a_template_that_ignores_tools_gets_them_and_chats_without_stay_as_they_were(template, place, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(tool_formats, "rank_zero_info", said.append)
    tokenizer = make_tokenizer(template, extra=EXTRA)
    changed = with_tools(tokenizer)
    assert len(said) == 1
    assert (
        f"The chat template ignores tools (found by rendering with and without one): they are written into the {place}"
        in said[0]
    )
    assert (tool_format(changed).name, tokenizer.chat_template) == ("hermes", template)
    assert with_tools(changed) is changed
    for messages in (chat("q", "a", "r"), chat("\n q\n", "a")):
        written = [
            t.apply_chat_template(messages["messages"], tokenize=False, add_generation_prompt=True)
            for t in (tokenizer, changed)
        ]
        assert written[0] == written[1]


def test_a_template_whose_calls_are_in_no_known_form_is_refused():
    unknown = LLAMA3.replace('{"name": "{{ called.name }}", "parameters": ', "{{ called.name }}: ").replace(
        "tojson }}}", "tojson }}"
    )
    with pytest.raises(
        ValueError, match=r"writes a call as 'probe_of_tools: .*, which is none of the known forms \(hermes, llama3\)"
    ):
        tool_format(make_tokenizer(unknown, extra=EXTRA))


TOOLS_OF_OURS = (
    "Tools:\nscale(value: number (what to scale), names?: "
    '{"type": "array", "items": {"type": "string"}, "nullable": true, "description": "of what, if any"}): '
    "Scale a value.\n"
    'pick(colour: {"type": "string", "enum": ["red", "blue"]}): Pick a colour.\n'
    'To call one: <tool_call>{"name": ..., "arguments": {...}}</tool_call>'
)


def test_ours_writes_all_of_tools_calls_and_results():
    tokenizer, (sample,) = samples(CHATML, row(calling(SCALE, PICKED, content="Both."), RESULT, RESULT, ANSWER))
    assert tokenizer.decode(sample["input_ids"]) == (
        f"<|im_start|>system\n{TOOLS_OF_OURS}<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nBoth.\n"
        '<tool_call>{"name": "scale", "arguments": {"value": 2, "names": ["é", "\\""]}}</tool_call>\n'
        '<tool_call>{"name": "pick", "arguments": {"colour": "red"}}</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>4</tool_response>\n<tool_response>4</tool_response><|im_end|>\n"
        "<|im_start|>assistant\nIt is 4.<|im_end|>\n"
    )
    tokenizer, (sample,) = samples(GEMMA2, row(calling(SCALE), RESULT, ANSWER))
    assert tokenizer.decode(sample["input_ids"]).startswith(
        f"<|start|>user\n{TOOLS_OF_OURS}\n\nq<|eot|>\n<|start|>assistant"
    )
    system = row(calling(PICKED)) | {"system": "Be brief."}
    tokenizer, (sample,) = samples(CHATML, system)
    assert f"system\nBe brief.\n\n{TOOLS_OF_OURS}<|im_end|>" in tokenizer.decode(sample["input_ids"])


@pytest.mark.parametrize(
    ("template", "end", "tags"),
    [(CHATML, "<|im_end|>", ""), (GEMMA2, "<|eot|>", ""), (QWEN3, "<|im_end|>", "\n"), (LLAMA3, "<|eot|>", None)],
)  # fmt: skip
def test_calls_and_answers_are_trained_and_nothing_else_token_by_token(template, end, tags):
    """Two questions in one chat. What is trained is given as text, and each of its tokens must be where it stands."""
    second = [{"role": "user", "content": "r"}, calling(PICKED), {"role": "tool", "content": "scale it: red"}]
    whole = row(calling(SCALE), RESULT, ANSWER, *second, {"role": "assistant", "content": "red"})
    tokenizer, found = samples(template, whole)
    written = [
        '{"name": "scale", "arguments": {"value": 2, "names": ["é", "\\""]}}',
        '{"name": "pick", "arguments": {"colour": "red"}}',
    ]
    if tags is None:
        turns = [each.replace('"arguments"', '"parameters"') for each in written]
    else:
        turns = [f"<tool_call>{tags}{each}{tags}</tool_call>" for each in written]
    trained = [turns[0], "It is 4.", turns[1], "red"]
    if template == QWEN3:  # whose last turn alone has a thought: each turn is a sample, as it is generated
        expected = [[f"<think>\n\n</think>\n\n{turn}{end}"] for turn in trained]
    else:
        expected = [[turn + end for turn in trained]]
    assert len(found) == len(expected)
    for sample, pieces in zip(found, expected, strict=True):
        assert learned_text(tokenizer, sample["labels"]) == "".join(pieces)
        text = tokenizer.decode(sample["input_ids"])
        spans, position = [], 0
        for piece in pieces:
            begin = text.rindex(piece) if piece == pieces[-1] else text.index(piece, position)
            spans.append((begin, begin + len(piece)))
            position = begin + len(piece)
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        assert offsets["input_ids"] == sample["input_ids"]
        for token, label, (begin, stop) in zip(
            sample["input_ids"], sample["labels"], offsets["offset_mapping"], strict=True
        ):
            inside = any(first <= begin and stop <= last for first, last in spans)
            assert label == (token if inside else IGNORE_INDEX), (tokenizer.decode([token]), begin)


@pytest.mark.parametrize(
    ("template", "bad", "message"),
    [
        (LLAMA3, row(calling(SCALE, PICKED)), "chat 1: the tokenizer's chat template refuses it: one call at a time"),
        (
            LLAMA3, row(calling(PICKED, content="Let me see.")),
            r"message 2 \(assistant\): the chat template does not write the content beside its calls \('Let me see.'",
        ),
        (
            LLAMA3, row({"role": "assistant", "content": '{"name": "pick", "parameters": {"colour": "red"}}'}),
            "its content reads as calls of tools .*; put them into 'tool_calls'",
        ),
        (
            CHATML, row({"role": "assistant", "content": "<tool_call>pick</tool_call>"}),
            "does not survive the chat template: a call is not JSON",
        ),
        (
            QWEN3.replace("called.function.arguments |", "called.function.arguments | upper |"), row(calling(PICKED)),
            "does not survive|none of the known forms",
        ),
        (
            QWEN3.replace("arguments | tojson", "arguments | tojson | replace('red', 'blue')"), row(calling(PICKED)),
            r'its calls do not survive the chat template: .*"red".* was written as .*"blue"',
        ),
        (QWEN3.replace("tool | tojson", "tool.function.parameters | tojson"), row(calling(PICKED)), "tool scale: the"),
    ],
)  # fmt: skip
def test_what_does_not_survive_the_template_is_an_error_that_names_the_row(template, bad, message):
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        samples(template, bad)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("hermes", "<think>\na <tool_call> b\n</think>\n\nhi", ParsedTurn("hi", [])),
        (
            "hermes", 'a<tool_call>{"name": "f", "arguments": {"x": "</tool_call>"}} </tool_call> b',
            ParsedTurn("a\nb", [{"name": "f", "arguments": {"x": "</tool_call>"}}]),
        ),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}}', "a call is not closed by </tool_call>"),
        ("hermes", '<tool_call>{"name": "f", "arguments": "x"}</tool_call>', "its arguments are not an object"),
        ("hermes", "<tool_call>[1]</tool_call>", "a call is not an object"),
        (
            "llama3", '<|python_tag|>{"name": "f", "parameters": {"x": 1}}; {"name": "g", "parameters": {}}',
            ParsedTurn("", [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {}}]),
        ),
        ("llama3", '{"sum": 3}', ParsedTurn('{"sum": 3}', [])),
        ("llama3", '{"name": "f", "parameters": {"x": 1}', "a call is not JSON"),
        ("llama3", "It is {x}.", ParsedTurn("It is {x}.", [])),
    ],
)  # fmt: skip
def test_turns_of_a_model_are_read(name, text, expected):
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            FORMATS[name].parse(text)
    else:
        assert FORMATS[name].parse(text) == expected


def test_the_ordinary_data_module_takes_tools_and_names_or_skips_bad_rows(tmp_path):
    good = row(calling(SCALE), RESULT, ANSWER, tools=[PICK, json.loads(json.dumps(read_tools([scale])[0]))])
    bad = row(calling(call("scale", "{")), tools=good["tools"])
    path = str(write(tmp_path / "rows.jsonl", good, bad, chat("q", "a")))

    def load(**options: Any) -> ChatDataModule:
        data = ChatDataModule(make_tokenizer(), DataOptions(path, **options), batch_size=1, seq_len=2048)
        data.load()
        return data

    with pytest.raises(
        ValueError, match=r"1 of 3 rows cannot be trained on:\n  line 2: message 2 \(assistant\), call 1"
    ):
        load()
    data = load(skip_bad_rows=True)
    assert data.num_train == 2
    assert data.tokenizer.chat_template.endswith(CHATML)
