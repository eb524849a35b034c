"""Held-out requests with tools, and the conversations in which a model answers them: its calls are run, its results go
back to it."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .rendering import ChatRenderer
from .samples import Chat, Message, ToolCall
from .tool_requests import result_text
from .tool_schemas import Tool


@dataclass(frozen=True)
class ToolRequest:
    """A place in a chat where the assistant should call tools, or see that none fits.

    Attributes:
        messages: Before that turn.
        tools: What the assistant may call.
        expected: The calls of the data; empty if there is none to make.
        results: What the tools of the data returned, if the assistant answers next; a right answer names each.
    """

    messages: list[Message]
    tools: list[Tool]
    expected: list[ToolCall]
    results: list[str]


@dataclass
class Outcome:
    """What a model made of a request.

    Attributes:
        request: The request.
        calls: Of its first turn, each with ``name`` and ``arguments``; ``None`` if it cannot be read.
        written: The turns as it wrote them.
        answer: The turn without a call in which it ended, or ``None``.
    """

    request: ToolRequest
    calls: list[dict[str, Any]] | None = None
    written: list[str] = field(default_factory=list)
    answer: str | None = None

    @property
    def is_right(self) -> bool:
        """Whether the answer names all results."""
        return self.answer is not None and all(names(self.answer, result) for result in self.request.results)


def requests_of(chats: Sequence[Chat]) -> list[ToolRequest]:
    """The requests in chats with tools: each turn with calls, and of a chat without any call its first turn."""
    found = []
    # A chat is there once per sample, of which it has several where its template rewrites earlier turns.
    for chat in {id(chat): chat for chat in chats}.values():
        if "tools" not in chat:
            continue
        messages = chat["messages"]
        places = [place for place, message in enumerate(messages) if "tool_calls" in message]
        places = places or [place for place, message in enumerate(messages) if message["role"] == "assistant"][:1]
        for place in places:
            expected = messages[place].get("tool_calls", [])
            after = messages[place + 1 :]
            results = [m["content"] for m in itertools.takewhile(lambda message: message["role"] == "tool", after)]
            follows = after[len(results)] if len(after) > len(results) else None
            answered = follows is not None and follows["role"] == "assistant" and "tool_calls" not in follows
            found.append(ToolRequest(messages[:place], chat["tools"], expected, results if answered else []))
    return found


def converse(
    requests: Sequence[ToolRequest],
    ask: Callable[[list[str]], Sequence[str]],
    renderer: ChatRenderer,
    functions: Mapping[str, Callable[..., Any]] | None = None,
    *,
    most_turns: int = 3,
) -> list[Outcome]:
    """Have a model answer requests, running what it calls.

    Args:
        requests: What it is asked.
        ask: The model: from prompts to what it writes after each, without the token that ends a turn.
        renderer: Writes prompts, and knows the form of calls.
        functions: The tools by name. Without them only the first turn is written.
        most_turns: Turns after which a conversation is given up.

    Returns:
        For each request what came of it. A call that fails returns its error to the model, as a text.
    """
    outcomes = [Outcome(request) for request in requests]
    chats = [copy.deepcopy(request.messages) for request in requests]
    open_ones = list(range(len(requests)))
    for turn in range(most_turns):
        texts = ask([renderer.prompt(chats[index], requests[index].tools) for index in open_ones])
        still_open = []
        for index, text in zip(open_ones, texts, strict=True):
            outcome = outcomes[index]
            outcome.written.append(text)
            try:
                parsed = renderer.tool_format.parse(text)
            except ValueError:
                continue
            if turn == 0:
                outcome.calls = parsed.calls
            if not parsed.calls:
                outcome.answer = parsed.content
            elif functions is not None:
                calls: list[ToolCall] = [{"name": c["name"], "arguments": c["arguments"]} for c in parsed.calls]
                chats[index].append({"role": "assistant", "content": parsed.content, "tool_calls": calls})
                chats[index] += [{"role": "tool", "content": run_call(functions, call)} for call in calls]
                still_open.append(index)
        open_ones = still_open
        if not open_ones:
            break
    return outcomes


def run_call(functions: Mapping[str, Callable[..., Any]], call: ToolCall) -> str:
    """The result of a call as the model reads it; of one that fails, ``error:`` and why."""
    if call["name"] not in functions:
        return f"error: there is no tool {call['name']!r}; there are {', '.join(functions)}"
    try:
        return result_text(functions[call["name"]](**call["arguments"]))
    except Exception as error:  # a tool may raise anything, and what it raises is its result
        return f"error: {error}"


def names(answer: str, result: str) -> bool:
    """Whether a text names a result, and not only a longer word or number that it is part of."""
    return re.search(rf"(?<![\w.]){re.escape(result)}(?!\w|[.,]\d)", answer) is not None
