"""Calls of tools in rows: how they are read, and what a conversation with tools must keep to.

A call is ``{"function": {"name", "arguments"}}``, as in OpenAI's messages, or that function alone; ``parameters`` is
understood for ``arguments``. Arguments are an object, or the JSON text of one. ``id`` is kept for templates that write
it. For evaluation a call may also say what else is right: ``accepted`` has, by argument, a list of values; ``""`` among
them means that the argument may be left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .samples import Message, ToolCall
from .tool_schemas import Tool


def read_calls(value: object, where: str) -> list[ToolCall]:
    """Read the calls of a message.

    Args:
        value: A list of calls, one call, or the JSON text of either.
        where: How messages name the message.

    Raises:
        ValueError: If this is not JSON, or not calls.
    """
    value = _json(value, f"{where}: 'tool_calls'")
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"{where}: 'tool_calls' must be a list of calls, found {value!r:.80}")
    return [_call(each, f"{where}, call {number}") for number, each in enumerate(value, start=1)]


def _call(value: object, where: str) -> ToolCall:
    value = _json(value, where)
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: expected {{name, arguments}}, found {value!r:.80}")
    function = value if value.get("function") is None else _json(value["function"], where)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError(f"{where}: expected {{name, arguments}}, found {value!r:.80}")
    given = function["arguments"] if function.get("arguments") is not None else function.get("parameters")
    arguments = {} if given in (None, "") else _json(given, f"{where} ({function['name']}): 'arguments'")
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{where} ({function['name']}): 'arguments' must be an object, found {arguments!r:.80}")
    call: ToolCall = {"name": function["name"], "arguments": dict(arguments)}
    if value.get("id") is not None:
        call["id"] = str(value["id"])
    if (accepted := value.get("accepted") or function.get("accepted")) is not None:
        accepted = _json(accepted, f"{where} ({function['name']}): 'accepted'")
        if not isinstance(accepted, Mapping) or not all(isinstance(values, list) for values in accepted.values()):
            raise ValueError(f"{where} ({function['name']}): 'accepted' must have a list per argument")
        call["accepted"] = dict(accepted)
    return call


def _json(value: object, where: str) -> Any:
    """``value``, read if it is JSON text. NaN and infinities, which Python reads, are not JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON at column {error.colno}: {error.msg}; found {value!r:.80}") from error
    except _NotJSON as error:
        raise ValueError(f"{where} is not JSON: {error} is no number of JSON; found {value!r:.80}") from error


class _NotJSON(Exception):
    pass


def _refuse_constant(name: str) -> Any:
    raise _NotJSON(name)


def check_conversation(messages: Sequence[Message], tools: Sequence[Tool], unused: dict[str, None]) -> None:
    """Check that calls are of tools that the row offers, and that results follow calls.

    Where a row has neither tools nor calls, its calls may stand in the assistant's text: there a result must only
    follow an assistant's turn. An argument that is null where its schema does not allow that is left out, because
    tables fill arguments of other rows with null.

    Args:
        messages: The conversation; arguments of its calls may be changed.
        tools: What the row offers.
        unused: Gets, as a key, that null arguments were left out.

    Raises:
        ValueError: Naming the message and the cause.
    """
    offered = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    structured = bool(offered) or any("tool_calls" in message for message in messages)
    waiting: list[str | None] = []  # ids of the calls without a result
    before = None
    for number, message in enumerate(messages, start=1):
        where = f"message {number} ({message['role']})"
        if message["role"] == "tool":
            if not structured and before not in ("assistant", "tool"):
                raise ValueError(f"{where}: a tool's result without a call: it follows no turn of the assistant")
            if structured:
                _take(waiting, message.get("tool_call_id"), where)
        else:
            calls = message.get("tool_calls", [])
            for call in calls:
                if call["name"] not in offered:
                    known = f"its tools are {', '.join(offered)}" if offered else "it has no column 'tools'"
                    raise ValueError(f"{where}: calls {call['name']!r}, which the row does not offer; {known}")
                _drop_nulls(call, offered[call["name"]], unused)
            waiting = [call.get("id") for call in calls]
        before = message["role"]


def _take(waiting: list[str | None], call_id: str | None, where: str) -> None:
    """Take the call that a result belongs to from those without one."""
    if not waiting:
        raise ValueError(
            f"{where}: a tool's result without a call: the assistant's turn before it has no tool_calls left without a "
            "result"
        )
    if call_id is None or None in waiting:
        waiting.pop(0)
    elif call_id in waiting:
        waiting.remove(call_id)
    else:
        named = ", ".join(map(str, waiting))
        raise ValueError(f"{where}: its tool_call_id {call_id!r} is of no call without a result; these are {named}")


def _drop_nulls(call: ToolCall, parameters: Mapping[str, Any], unused: dict[str, None]) -> None:
    for name in [name for name, value in call["arguments"].items() if value is None]:
        if not allows_null(parameters["properties"].get(name)):
            del call["arguments"][name]
            unused["arguments of calls that are null and must not be"] = None


def allows_null(schema: Any) -> bool:
    """Whether the schema of an argument allows null: as a type, a value or an alternative, or by naming none."""
    if not isinstance(schema, Mapping):
        return False
    kinds = schema.get("type")
    if kinds == "null" or (isinstance(kinds, list) and "null" in kinds) or schema.get("nullable") is True:
        return True
    if None in schema.get("enum", ()) or ("const" in schema and schema["const"] is None):
        return True
    alternatives = [each for key in ("anyOf", "oneOf") for each in schema.get(key, ())]
    if any(map(allows_null, alternatives)):
        return True
    return not (kinds or alternatives or "enum" in schema or "const" in schema)


def for_template(message: Message) -> dict[str, Any]:
    """A message as chat templates take it."""
    taken = {key: value for key, value in message.items() if key not in ("train", "tool_calls")}
    if calls := message.get("tool_calls"):
        taken["tool_calls"] = [
            {
                "type": "function",
                **({"id": call["id"]} if "id" in call else {}),
                "function": {"name": call["name"], "arguments": call["arguments"]},
            }
            for call in calls
        ]
    return taken
