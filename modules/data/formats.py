"""Rows to chats: the row formats in one table, with one function each.

| format | a row has | and may have |
|---|---|---|
| chat | ``messages``: a list of ``{role, content}`` | ``system`` |
| ShareGPT | ``conversations``: a list of ``{from, value}`` | ``system`` |
| prompt and completion | ``prompt``, ``completion``: texts, or lists of messages | ``system`` |
| Alpaca | ``instruction``, ``output`` | ``input``, ``context``, ``history``, ``system`` |
| Dolly | ``instruction``, ``response`` | ``context``, ``input``, ``history``, ``system`` |
| question and answer | ``question``, and ``answer`` or ``response`` | ``context``, ``system`` |

``system_prompt`` is understood for ``system``. ``input`` and ``context`` follow the instruction after an empty line;
``history`` is a list of (question, answer) pairs that come before it, whose answers are trained like any other. The
messages of a ``prompt`` are never trained.

``messages`` and ``conversations`` may also be JSON text, as in CSV files.

Messages: ``from`` is understood for ``role`` and ``value`` for ``content``. Roles are system, developer, user (human),
assistant (gpt, chatgpt, bing, bard, model) and tool (observation, function, function_response). The content is a text
or a list of text parts (``{"type": "text", "text": ...}``). An assistant message may have ``reasoning_content`` (also
``reasoning`` or ``thinking``), and ``weight`` (0 or 1) or ``train``, which say whether it is trained.

Every format may have ``tools`` (also ``functions``), which the assistant may call: see
:mod:`~lightning_qlora.modules.data.tool_schemas`. An assistant message may have ``tool_calls`` (also
``function_call``), as in :mod:`~lightning_qlora.modules.data.tool_calls`; a message of the role ``function_call`` is a
call as JSON text. A tool message may have ``tool_call_id`` and ``name``; a result that is an object is written as JSON.
Every other column is named as not used.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from .samples import Chat, Message, Role
from .tool_calls import check_conversation, read_calls
from .tool_schemas import read_tools

Row = Mapping[str, Any]


@dataclass(frozen=True)
class RowFormat:
    """One way in which a row holds a chat.

    Attributes:
        required: Columns by which the format is recognised.
        optional: Columns that it understands beside them.
        messages: Returns the messages of a row as they stand there, roles and contents not yet checked; raises
            ``ValueError`` for what it cannot take.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...]
    messages: Callable[[Row], list[Any]]


def _listed(row: Row, column: str) -> list[Any]:
    """The messages that stand in a column as a list, or as the JSON of one, as in CSV files."""
    messages = row[column]
    if isinstance(messages, str):
        with contextlib.suppress(json.JSONDecodeError):
            messages = json.loads(messages)
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"{column!r} must be a non-empty list of messages, found {messages!r:.80}")
    return list(messages)


def _prompt_completion(row: Row) -> list[Any]:
    prompt = _listed(row, "prompt") if is_list(row["prompt"]) else [_message("user", row["prompt"])]
    completion = (
        _listed(row, "completion") if is_list(row["completion"]) else [_message("assistant", row["completion"])]
    )
    read_only = [
        {**message, "train": False} if isinstance(message, Mapping) and _role(message) == "assistant" else message
        for message in prompt
    ]
    return [*read_only, *completion]


def _question_answer(row: Row, question: str, answer: str) -> list[Any]:
    """A question, texts that belong to it, and its answer, with earlier pairs before them."""
    prompt = [row[question], *(_text(row, column) for column in ("input", "context"))]
    # What is not a text is refused with the message it would be.
    content = "\n\n".join(part for part in prompt if part) if isinstance(row[question], str) else row[question]
    return [*_history(row), _message("user", content), _message("assistant", row[answer])]


def _history(row: Row) -> list[Any]:
    pairs = row.get("history") or []
    if not is_list(pairs) or not all(is_list(pair) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"'history' must be a list of (question, answer) pairs, found {pairs!r:.80}")
    roles = ("user", "assistant")
    return [_message(role, text) for pair in pairs for role, text in zip(roles, pair, strict=True)]


def _pair(question: str, answer: str, *optional: str) -> RowFormat:
    messages = functools.partial(_question_answer, question=question, answer=answer)
    return RowFormat((question, answer), optional, messages)


#: The first whose required columns are all in a row reads it.
FORMATS = (
    RowFormat(("messages",), (), functools.partial(_listed, column="messages")),
    RowFormat(("conversations",), (), functools.partial(_listed, column="conversations")),
    RowFormat(("prompt", "completion"), (), _prompt_completion),
    _pair("instruction", "output", "input", "context", "history"),
    _pair("instruction", "response", "input", "context", "history"),
    _pair("question", "answer", "context"),
    _pair("question", "response", "context"),
)

#: Columns that every format understands.
_SYSTEM = ("system", "system_prompt")

#: Columns with what the assistant may call, which every format may have.
_TOOLS = ("tools", "functions")

#: Columns that mean the same beside every format.
COMMON_COLUMNS = (*_SYSTEM, *_TOOLS)

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "function_response"), "tool"),
}

#: ShareGPT's role of an assistant's turn that is a call.
_CALL_ROLE = "function_call"

_REASONING = ("reasoning_content", "reasoning", "thinking")

_CALLS = ("tool_calls", "function_call")

_MESSAGE_FIELDS = ("role", "from", "content", "value")


def to_chat(row: object, unused: dict[str, None]) -> Chat:
    """Bring a row into the form of a chat.

    Args:
        row: A mapping of columns.
        unused: Gets, as keys, the columns and message fields that hold something and are not used.

    Raises:
        ValueError: If the row has no known format, or cannot be trained on.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"expected an object with fields, found {type(row).__name__}")
    found = [each for each in FORMATS if all(column in row for column in each.required)]
    if not found:
        known = "; ".join(" and ".join(map(repr, each.required)) for each in FORMATS)
        raise ValueError(f"found the fields {sorted(map(str, row))}, but a row needs one of: {known}")
    # A data set of several formats has all their columns in each row, those of the others empty.
    row_format = next((f for f in found if not any(row[column] is None for column in f.required)), found[0])
    tools = next((read_tools(row[column], column) for column in _TOOLS if row.get(column)), [])
    used = (*row_format.required, *row_format.optional, *_SYSTEM, *_TOOLS)
    unused.update((f"column {column!r}", None) for column in row if column not in used and holds_something(row[column]))
    messages = [_checked(message, number, unused) for number, message in enumerate(row_format.messages(row), start=1)]
    for system in filter(None, (_text(row, column) for column in _SYSTEM)):
        if messages[0]["role"] == "system":
            raise ValueError("there are two system prompts: a column 'system' and a system message; keep one")
        messages.insert(0, _checked(_message("system", system), 1, unused))
    _check_order(messages)
    check_conversation(messages, tools, unused)
    return {"messages": messages, "tools": tools} if tools else {"messages": messages}


def _checked(message: object, number: int, unused: dict[str, None]) -> Message:
    """Bring a message into the form that chat templates take."""
    if not isinstance(message, Mapping):
        raise ValueError(f"message {number}: expected {{role, content}}, found {message!r:.80}")
    name, role = _either(message, "role", "from"), _role(message)
    if role is None:
        raise ValueError(f"message {number}: unknown role {name!r}; known roles: {', '.join((*_ROLES, _CALL_ROLE))}")
    where = f"message {number} ({role})"
    content = _either(message, "content", "value")
    calls = content if name == _CALL_ROLE else next((message[field] for field in _CALLS if message.get(field)), None)
    if calls and role != "assistant":
        raise ValueError(f"{where}: has tool_calls, but only the assistant calls tools")
    if calls and (content is None or name == _CALL_ROLE):
        content = ""
    if role == "tool" and isinstance(content, Mapping):
        content = json.dumps(content, ensure_ascii=False)
    checked: Message = {"role": role, "content": _content(content, where)}
    fields = {*_MESSAGE_FIELDS, *_CALLS}
    if role == "tool":
        fields |= {"name", "tool_call_id"}
        if isinstance(message.get("name"), str):
            checked["name"] = message["name"]
        if message.get("tool_call_id") is not None:
            checked["tool_call_id"] = str(message["tool_call_id"])
    if role == "assistant":
        fields |= {*_REASONING, "weight", "train"}
        if calls:
            checked["tool_calls"] = read_calls(calls, where)
        if reasoning := next((message[field] for field in _REASONING if message.get(field)), None):
            checked["reasoning_content"] = _content(reasoning, f"{where}, reasoning")
        if not _is_trained(message, where):
            checked["train"] = False
        elif not checked["content"].strip() and not calls:
            raise ValueError(f"{where}: empty completion, nothing to learn; remove the row")
    for field, value in message.items():
        if field not in fields and holds_something(value):
            unused[f"{field!r} of {role} messages"] = None
    return checked


def _role(message: Row) -> Role | None:
    name = _either(message, "role", "from")
    if name == _CALL_ROLE:
        return "assistant"
    return _ROLES.get(name.lower()) if isinstance(name, str) else None


def _content(content: object, where: str) -> str:
    if is_list(content):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in cast("list[Any]", content)]
        texts = [part for part in parts if isinstance(part, str)]
        content = "".join(texts) if len(texts) == len(parts) else content
    if not isinstance(content, str):
        raise ValueError(f"{where}: the content must be text and nothing else, found {content!r:.80}")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: character {error.start + 1} is half of a surrogate pair ({content[error.start]!r}), as a cut "
            "emoji leaves, and no tokenizer takes it; mend or remove the row"
        ) from error
    return content


def _is_trained(message: Row, where: str) -> bool:
    """What ``weight`` and ``train`` say; both may be absent."""
    values = [message[field] for field in ("weight", "train") if message.get(field) is not None]
    if not all(isinstance(value, bool | int | float) and value in (0, 1) for value in values):
        raise ValueError(f"{where}: 'weight' must be 0 or 1 and 'train' true or false, found {values}")
    return all(values)


def _check_order(messages: list[Message]) -> None:
    roles = [message["role"] for message in messages]
    if not any(message["role"] == "assistant" and message.get("train", True) for message in messages):
        what = "no assistant turn is trained" if "assistant" in roles else "no assistant turn"
        raise ValueError(f"{what}, nothing to learn; remove the row")
    if "user" not in roles[: roles.index("assistant")]:
        raise ValueError("the assistant speaks before any user turn; a chat begins with what it answers")


def _message(role: str, content: object) -> dict[str, Any]:
    return {"role": role, "content": content}


def _either(message: Row, field: str, other: str) -> object:
    """The one of two fields that is there; a table has both, one of them empty."""
    return message[field] if message.get(field) is not None else message.get(other)


def _text(row: Row, column: str) -> str:
    """The text of an optional column; empty if it has none."""
    text = row.get(column)
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{column!r} must be text, found {text!r:.80}")
    return text or ""


def is_list(value: object) -> bool:
    """Whether a value is a list of something, and no text."""
    return isinstance(value, Sequence) and not isinstance(value, str)


def holds_something(value: object) -> bool:
    """Whether a column of a table has a value in its row."""
    return value is not None and value not in ("", [], {})
