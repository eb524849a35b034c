"""How models write calls of tools: known formats, which of them a chat template has, and one for templates without.

| format | a call | several |
|---|---|---|
| ``hermes`` (Qwen2.5, Qwen3) | ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>`` | one after another |
| ``llama3`` (from 3.1 on) | ``{"name": ..., "parameters": {...}}`` and nothing else | separated by ``;`` |

A template that ignores tools is found out by rendering with and without one. :func:`with_tools` then puts code in front
of it that writes the tools into the system prompt, calls as ``hermes`` does, and results as turns of the user; chats
without tools are written as before.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jinja2
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ParsedTurn:
    """What an assistant's turn says and calls.

    Attributes:
        content: The text, without calls and without a thought (``<think>...</think>``) before it.
        calls: For each call its ``name`` and ``arguments``.
    """

    content: str
    calls: list[dict[str, Any]]


@dataclass(frozen=True)
class ToolFormat:
    """A form in which calls are written.

    Attributes:
        name: As in the table of this module.
        parse: Reads a turn without the token that ends it; raises ``ValueError`` for a call that cannot be read.
    """

    name: str
    parse: Callable[[str], ParsedTurn]


_THOUGHT = re.compile(r"^\s*(<think>)?((?!<think>).)*?</think>", re.DOTALL)
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_PYTHON_TAG = "<|python_tag|>"


def _parse_hermes(text: str) -> ParsedTurn:
    text = _THOUGHT.sub("", text, count=1)
    contents: list[str] = []
    calls: list[dict[str, Any]] = []
    position = 0
    while (start := text.find(_OPEN, position)) >= 0:
        contents.append(text[position:start])
        value, end = _object(text, start + len(_OPEN))
        calls.append(_read_call(value, "arguments"))
        closing = _skip(text, end)
        if not text.startswith(_CLOSE, closing):
            raise ValueError(f"a call is not closed by {_CLOSE}: {text[start:]!r:.200}")
        position = closing + len(_CLOSE)
    contents.append(text[position:])
    return ParsedTurn("\n".join(filter(None, (part.strip() for part in contents))), calls)


def _parse_llama3(text: str) -> ParsedTurn:
    text = _THOUGHT.sub("", text, count=1).strip()
    body = text.removeprefix(_PYTHON_TAG).strip()
    if not body.startswith("{"):
        return ParsedTurn(text, [])
    calls: list[dict[str, Any]] = []
    position = 0
    while position < len(body):
        value, end = _object(body, position)
        if not calls and not ("name" in value and ("parameters" in value or "arguments" in value)):
            return ParsedTurn(text, [])  # an answer in JSON
        calls.append(_read_call(value, "parameters" if "parameters" in value else "arguments"))
        position = _skip(body, end, also=";")
    return ParsedTurn("", calls)


FORMATS = {each.name: each for each in (ToolFormat("hermes", _parse_hermes), ToolFormat("llama3", _parse_llama3))}


def _object(text: str, start: int) -> tuple[dict[str, Any], int]:
    """The JSON object that begins at ``start``, white space apart, and where it ends."""
    start = _skip(text, start)
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise ValueError(f"a call is not JSON ({error.msg}): {text[start:]!r:.200}") from error
    if not isinstance(value, dict):
        raise ValueError(f"a call is not an object: {text[start:end]!r:.200}")
    return value, end


def _skip(text: str, position: int, also: str = "") -> int:
    while position < len(text) and (text[position].isspace() or text[position] in also):
        position += 1
    return position


def _read_call(value: Mapping[str, Any], arguments: str) -> dict[str, Any]:
    found = value.get(arguments, {})
    if not isinstance(value.get("name"), str) or not isinstance(found, dict):
        raise ValueError(f"a call has no name, or its {arguments} are not an object: {value!r:.200}")
    return {"name": value["name"], "arguments": found}


# --- which format a template has ------------------------------------------------------------------------------------

#: What templates are tried with. Nothing else in a prompt has these names.
_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_of_tools",
        "description": "Probe.",
        "parameters": {
            "type": "object",
            "properties": {"probed_value": {"type": "integer", "description": "Probe."}},
            "required": ["probed_value"],
        },
    },
}
_CALL = {"name": "probe_of_tools", "arguments": {"probed_value": 7}}
_ASK = {"role": "user", "content": "Probe."}
_CALLING = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "id": "probe0007", "function": _CALL}],
}
_PROBE = "\ue000\ue001"


def with_tools(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer itself if its chat template writes tools, else a copy whose template does; which is said.

    Raises:
        ValueError: If the template takes the tools neither in a system prompt nor in the user's turn, or as
            :func:`tool_format`.
    """
    own = tokenizer.chat_template
    if not own:
        return tokenizer  # is refused where chats are written
    if isinstance(own, str) and _writes_tools(tokenizer):
        tool_format(tokenizer)
        return tokenizer
    changed = copy.deepcopy(tokenizer)
    if isinstance(own, Mapping):
        changed.chat_template = own.get("tool_use") or own["default"]
        rank_zero_info(f"The tokenizer has the chat templates {', '.join(own)}: with tools, {'tool_use'!r} is taken.")
        return with_tools(changed)
    for place in ("system", "user"):
        changed.chat_template = _before(own, place)
        if _writes_tools(changed):
            rank_zero_info(
                f"The chat template ignores tools (found by rendering with and without one): they are written into the "
                f"{place} prompt, calls as {_OPEN}{{...}}{_CLOSE}, and results as turns of the user."
            )
            return changed
    raise ValueError(
        "the chat template writes tools neither by itself nor from a system prompt or a user's turn; give one that "
        "takes 'tools' with --chat_template"
    )


def tool_format(tokenizer: PreTrainedTokenizerBase) -> ToolFormat:
    """The form in which a tokenizer's chat template writes calls, found by rendering one.

    Raises:
        ValueError: If it is none of :data:`FORMATS`.
    """
    try:
        plain = _write(tokenizer, [_ASK, {"role": "assistant", "content": _PROBE}])
        before, _, tail = plain.rpartition(_PROBE)
        written = _write(tokenizer, [_ASK, _CALLING])
    except (jinja2.TemplateError, TypeError) as error:
        raise ValueError(f"the tokenizer's chat template refuses tools or calls: {error}") from error
    opening = before if written.startswith(before) else _write(tokenizer, [_ASK], header=True)
    written = written.removeprefix(opening).removesuffix(tail)
    for each in FORMATS.values():
        try:
            if each.parse(written) == ParsedTurn("", [_CALL]):
                return each
        except ValueError:
            continue
    raise ValueError(
        f"the chat template writes a call as {written!r:.200}, which is none of the known forms "
        f"({', '.join(FORMATS)}); give a template that writes calls in one of these with --chat_template"
    )


def _writes_tools(tokenizer: PreTrainedTokenizerBase) -> bool:
    try:
        return "probed_value" in _write(tokenizer, [_ASK])
    except (jinja2.TemplateError, TypeError):
        return False


def _write(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], header: bool = False) -> str:
    text = tokenizer.apply_chat_template(messages, tools=[_TOOL], tokenize=False, add_generation_prompt=header)
    assert isinstance(text, str)
    return text


# --- tools for templates that ignore them ---------------------------------------------------------------------------

#: Builds other messages from ``messages`` and ``tools``, and gives them to the template that follows. An argument with
#: a type alone is written as ``name: type (description)``, any other as its schema; ``?`` marks optional ones.
_TOOLS_BEFORE = """\
{#- Tools for a chat template that ignores them, by lightning-qlora. The template itself follows at the end. #}
{%- set told = namespace(tools='', messages=[], results=[], placed=false) %}
{%- if tools %}
{%- set told.tools = 'Tools:' %}
{%- for tool in tools %}
{%- set function = tool.function or tool %}
{%- set parameters = function.parameters %}
{%- set told.tools = told.tools + '\\n' + function.name + '(' %}
{%- if parameters.keys() | list | reject('in', ['type', 'properties', 'required']) | list %}
{%- set told.tools = told.tools + (parameters | tojson) %}
{%- else %}
{%- for name, schema in parameters.properties.items() %}
{%- set told.tools = told.tools + (', ' if not loop.first else '') + name %}
{%- if name not in (parameters.required or []) %}
{%- set told.tools = told.tools + '?' %}
{%- endif %}
{%- if schema.type is string and not (schema.keys() | reject('in', ['type', 'description']) | list) %}
{%- set told.tools = told.tools + ': ' + schema.type %}
{%- set told.tools = told.tools + (' (' + schema.description + ')' if schema.description else '') %}
{%- else %}
{%- set told.tools = told.tools + ': ' + (schema | tojson) %}
{%- endif %}
{%- endfor %}
{%- endif %}
{%- set told.tools = told.tools + ')' + (': ' + function.description if function.description else '') %}
{%- endfor %}
{%- set told.tools = told.tools + '\\nTo call one: <tool_call>{"name": ..., "arguments": {...}}</tool_call>' %}
{%- if PLACE == 'system' and messages[0].role not in ['system', 'developer'] %}
{%- set told.messages = [{'role': 'system', 'content': told.tools}] %}
{%- set told.placed = true %}
{%- endif %}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{%- set told.results = told.results + ['<tool_response>' + message.content + '</tool_response>'] %}
{%- if loop.last or messages[loop.index].role != 'tool' %}
{%- set told.messages = told.messages + [{'role': 'user', 'content': told.results | join('\\n')}] %}
{%- set told.results = [] %}
{%- endif %}
{%- elif message.tool_calls %}
{%- set calls = namespace(text=message.content or '') %}
{%- for call in message.tool_calls %}
{%- set function = call.function or call %}
{%- set written = {'name': function.name, 'arguments': function.arguments} | tojson %}
{%- set calls.text = calls.text + ('\\n' if calls.text else '') + '<tool_call>' + written + '</tool_call>' %}
{%- endfor %}
{%- if message.reasoning_content %}
{%- set thought = message.reasoning_content %}
{%- set turn = {'role': 'assistant', 'content': calls.text, 'reasoning_content': thought} %}
{%- else %}
{%- set turn = {'role': 'assistant', 'content': calls.text} %}
{%- endif %}
{%- set told.messages = told.messages + [turn] %}
{%- elif told.tools and not told.placed and message.role in PLACES %}
{%- set both = [message.content, told.tools] if PLACE == 'system' else [told.tools, message.content] %}
{%- set told.messages = told.messages + [{'role': message.role, 'content': both | join('\\n\\n')}] %}
{%- set told.placed = true %}
{%- else %}
{%- set told.messages = told.messages + [message] %}
{%- endif %}
{%- endfor %}
{%- set messages = told.messages %}
"""


def _before(template: str, place: str) -> str:
    """``template`` with the tools written into the first message of the role ``place``."""
    places = ["system", "developer"] if place == "system" else [place]
    return _TOOLS_BEFORE.replace("PLACES", repr(places)).replace("PLACE", repr(place)) + template
