"""Rows to preferences: which of two answers is better, or whether one answer is good.

| rows | a row has |
|---|---|
| pairs, explicit prompt | ``prompt``, ``chosen``, ``rejected``: texts, or lists of messages |
| pairs, implicit prompt | ``chosen``, ``rejected``: whole chats (lists of messages), or texts, that begin alike |
| labelled answers | ``prompt``, ``completion``: texts or lists of messages; ``label``: true (good) or false |

Rows may have ``system`` (or ``system_prompt``), and messages are what :mod:`.formats` says. A text is a message of its
own: a prompt of the user, an answer of the assistant. The common beginning of two chats is their equal messages; of two
texts, their equal words. Pairs count as two labelled answers where labels are asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from .formats import COMMON_COLUMNS, holds_something, is_list, to_chat
from .samples import Message


class Preference(TypedDict):
    """A prompt and answers to it."""

    prompt: list[Message]
    completions: list[list[Message]]
    """The chosen and the rejected one, or a single one."""
    desirable: list[bool]
    """Which of them are good."""


def to_preference(row: object, unused: dict[str, None], paired: bool) -> Preference:
    """Bring a row into the form of a preference.

    Args:
        row: A mapping of columns.
        unused: Gets, as keys, columns and message fields that hold something and are not used.
        paired: Whether only pairs will do.

    Raises:
        ValueError: If the row has no known format, or cannot be trained on.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"expected an object with fields, found {type(row).__name__}")
    if row.get("chosen") is not None or row.get("rejected") is not None:
        return _pair(row, unused)
    if "completion" in row and "label" in row:
        if paired:
            raise ValueError(
                "it has one answer with a label, but this loss compares a chosen with a rejected answer; --loss kto "
                "takes labels"
            )
        return _labelled(row, unused)
    known = "'chosen' and 'rejected'" + ("" if paired else ", or 'prompt', 'completion' and 'label'")
    raise ValueError(f"found the fields {sorted(map(str, row))}, but a row needs {known}")


def _pair(row: Mapping[str, Any], unused: dict[str, None]) -> Preference:
    chosen: Any = row.get("chosen")
    rejected: Any = row.get("rejected")
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if answer is None or (isinstance(answer, str) and not answer.strip()) or (is_list(answer) and not answer):
            raise ValueError(f"there is no {name} answer ({name!r} is {'missing' if answer is None else 'empty'})")
    if is_list(chosen) != is_list(rejected):
        raise ValueError("one of 'chosen' and 'rejected' is a text and the other a list of messages")
    if chosen == rejected:
        raise ValueError("'chosen' and 'rejected' are equal: nothing is preferred")
    prompt = row.get("prompt")
    # Some data sets repeat the last question as a text beside whole chats, which begin alike.
    if prompt is None or (is_list(chosen) and not is_list(prompt) and chosen[0] == rejected[0]):
        prompt, chosen, rejected = _common_beginning(chosen, rejected)
    _note_unused(row, ("prompt", "chosen", "rejected"), unused)
    (prompt, good), (_, bad) = (_answer(row, prompt, answer, unused) for answer in (chosen, rejected))
    if good == bad:
        raise ValueError("'chosen' and 'rejected' are equal: nothing is preferred")
    return {"prompt": prompt, "completions": [good, bad], "desirable": [True, False]}


def _labelled(row: Mapping[str, Any], unused: dict[str, None]) -> Preference:
    label = row["label"]
    if not isinstance(label, bool):
        raise ValueError(f"the label is {label!r} ({type(label).__name__}), but must be true or false")
    if row.get("prompt") is None or row.get("completion") is None:
        raise ValueError(f"there is no {'prompt' if row.get('prompt') is None else 'completion'!r}")
    _note_unused(row, ("prompt", "completion", "label"), unused)
    prompt, completion = _answer(row, row["prompt"], row["completion"], unused)
    return {"prompt": prompt, "completions": [completion], "desirable": [label]}


def _common_beginning(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Prompt and two answers, of two chats or two texts.

    Raises:
        ValueError: If there is no prompt, or one is the beginning of the other.
    """
    if not is_list(chosen) and not (isinstance(chosen, str) and isinstance(rejected, str)):
        raise ValueError(f"'chosen' must be a text or a list of messages, found {chosen!r:.80}")
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    if isinstance(chosen, str):
        while same and not chosen[same - 1].isspace():  # back to the beginning of a word
            same -= 1
        if not chosen[:same].strip():
            raise ValueError("'chosen' and 'rejected' have no common beginning; write it into a column 'prompt'")
    elif same == 0:
        raise ValueError("'chosen' and 'rejected' have no common beginning, so their prompts differ")
    if same in (len(chosen), len(rejected)):
        shorter, longer = ("chosen", "rejected") if same == len(chosen) else ("rejected", "chosen")
        raise ValueError(f"{shorter!r} is the beginning of {longer!r}, so there is no {shorter} answer")
    return chosen[:same], chosen[same:], rejected[same:]


def _answer(
    row: Mapping[str, Any], prompt: Any, completion: Any, unused: dict[str, None]
) -> tuple[list[Message], list[Message]]:
    """Prompt and completion as messages that are checked."""
    common = {name: row[name] for name in COMMON_COLUMNS if name in row}
    messages = to_chat({**common, "prompt": prompt, "completion": completion}, unused)["messages"]
    answers = len(completion) if is_list(completion) else 1
    if messages[-answers]["role"] != "assistant":
        raise ValueError(
            f"the answer begins with a message of the role {messages[-answers]['role']!r}; it must begin with the "
            "assistant's, after a prompt that both answers share"
        )
    return messages[:-answers], messages[-answers:]


def _note_unused(row: Mapping[str, Any], used: Sequence[str], unused: dict[str, None]) -> None:
    names = [name for name, value in row.items() if name not in (*used, *COMMON_COLUMNS) and holds_something(value)]
    unused.update((f"column {name!r}", None) for name in names)
