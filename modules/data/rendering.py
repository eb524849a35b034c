"""Chats to text by a chat template, and where in that text the trained turns stand.

A template is a program: it may trim contents, move the system prompt, leave out earlier thoughts, write the date, or
open a thought in the prompt that it gives for generation. So nothing is assumed of it. Every message must be found in
what it wrote, and a turn is trained from where generation begins (the generation prompt) to the token that ends it;
what does not come out like this is an error that names the cause. Calls of tools are read back from what the template
wrote, and must be those of the data.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

import jinja2
from transformers import PreTrainedTokenizerBase

from .samples import Message
from .tool_calls import for_template
from .tool_formats import ToolFormat, tool_format
from .tool_schemas import Tool

TrainOn = Literal["all", "last"]

#: Stands for an assistant's content where only what is around it is wanted. No filter changes private-use characters.
_PROBE = "\ue000\ue001"

_END_OF_THOUGHT = "</think>"

#: Words that some templates take as settings and do not write.
_SETTINGS = re.compile(r"/(no_think|think|system_override)\b")

#: Directives of ``strftime`` that templates write.
_DIRECTIVES = ("%-d", "%-m", *(f"%{letter}" for letter in "aAbBcdeHIjmMpSUwWxXyYZ"))


def date_parts(template: str, now: datetime | None = None) -> dict[str, str]:
    """What a template writes of the date: for each directive of ``strftime`` in it, the text at ``now``.

    Empty for a template without ``strftime_now``, whose text does not depend on the day.
    """
    now = now or datetime.now()
    if "strftime_now" not in template:
        return {}
    found = sorted((directive for directive in _DIRECTIVES if directive in template), key=template.index)
    return {directive: now.strftime(directive) for directive in found}


@dataclass(frozen=True)
class Turn:
    """A trained turn in a rendered chat, as positions of characters."""

    start: int
    """Where generation begins."""
    content_end: int
    """Where the content ends, and what ends the turn may begin."""
    end: int
    """Where the turn ends."""


@dataclass(frozen=True)
class RenderedChat:
    """The text of a chat, up to the end of its last trained turn."""

    text: str
    turns: list[Turn]
    messages: int
    """How many messages of the chat it holds."""


@dataclass
class ChatRenderer:
    """Writes chats with a tokenizer's chat template.

    Args:
        tokenizer: Whose template is used.
        train_on: Train all assistant turns of a chat, or the last one alone.
        date: What the template shall write for the directives of ``strftime``, from :func:`date_parts`; default: today.
    """

    tokenizer: PreTrainedTokenizerBase
    train_on: TrainOn = "all"
    date: Mapping[str, str] | None = None
    notes: dict[str, None] = field(default_factory=dict)
    """What a user should know of this template and these chats, each once, as keys."""

    def __post_init__(self) -> None:
        template = self.tokenizer.get_chat_template()
        self.date = date_parts(template) if self.date is None else self.date
        if self.date:
            # A macro of the name takes the place of transformers' function, which reads the clock at each call.
            replaced = "".join(f".replace({json.dumps(key)}, {json.dumps(text)})" for key, text in self.date.items())
            macro = "{%- macro strftime_now(format) -%}{{ format" + replaced + " }}{%- endmacro %}"
            # The line end is not rendered: it follows a block.
            template = f"{macro}\n{template}"
        self._template = template
        self._ignores_generation_prompt: bool | None = None
        self._tool_format: ToolFormat | None = None
        self._tools: list[Tool] | None = None  # of the chat that is being written

    @property
    def tool_format(self) -> ToolFormat:
        """The form in which the template writes calls.

        Raises:
            ValueError: If it is not known.
        """
        if self._tool_format is None:
            self._tool_format = tool_format(self.tokenizer)
        return self._tool_format

    def prompt(self, chat: Sequence[Message], tools: Sequence[Tool] = ()) -> str:
        """The text that generation continues.

        Args:
            chat: The messages so far.
            tools: What the assistant may call.

        Raises:
            ValueError: If the template refuses the chat.
        """
        self._tools = list(tools) or None
        return self._write(chat, header=True)

    def render(self, chat: Sequence[Message], tools: Sequence[Tool] = ()) -> list[RenderedChat]:
        """Write a chat and locate its trained turns.

        Args:
            chat: The messages.
            tools: What the assistant may call.

        Returns:
            One text with all trained turns. If the template rewrites earlier turns once others follow, as those of
            reasoning models do, one text per trained turn, each as the model meets it in generation.

        Raises:
            ValueError: If the template refuses the chat, leaves out part of it, or writes it so that a trained turn
                cannot be located, or that calls are not those of the data when they are read back.
        """
        self._tools = list(tools) or None
        trained = [i for i, message in enumerate(chat) if message["role"] == "assistant" and message.get("train", True)]
        if self.train_on == "last":
            trained = trained[-1:]
        together = self._render_together(chat, trained)
        if together is not None:
            return [together]
        self.notes[
            "The chat template rewrites earlier turns of a chat (templates of reasoning models leave out earlier "
            "thoughts): each trained turn becomes a sample of its own"
        ] = None
        alone = [self._render_together(chat, [position]) for position in trained]
        return [rendered for rendered in alone if rendered is not None]

    def _render_together(self, chat: Sequence[Message], trained: Sequence[int]) -> RenderedChat | None:
        """One text with the turns at these positions; ``None`` if the template rewrites one of the earlier ones."""
        messages = chat[: trained[-1] + 1]  # nothing is learned from what follows the last trained turn
        text = self._write(messages)
        turns = []
        for position in trained[:-1]:
            begun = messages[: position + 1]
            after = self._write(begun)
            turn = self._find(begun, after)
            shared = len(os.path.commonprefix([text, after]))  # noqa: RUF071  characters are meant
            if turn is None or shared < turn.content_end:
                return None
            turns.append(Turn(turn.start, turn.content_end, shared))
        last = self._find(messages, text)
        if last is None:
            text, last = self._with_thought(messages)
        for position, message in enumerate(messages):
            if position in trained:
                continue
            if not self._is_written(_as_history(message), text):
                raise ValueError(
                    f"message {position + 1} ({message['role']}): the chat template leaves its content out of the "
                    "text; put it into a message of a role that the template writes, or choose another template with "
                    "--chat_template"
                )
            if "tool_calls" in message:
                self._find(messages[: position + 1], self._write(messages[: position + 1]))
        for tool in self._tools or ():
            function = tool["function"]
            parts = (function["name"], function["description"], *function["parameters"]["properties"])
            if not all(stands_in(part, text) for part in parts):
                raise ValueError(
                    f"tool {function['name']}: the chat template leaves it, or part of it, out of the text; choose "
                    "another template with --chat_template"
                )
        return RenderedChat(text, [*turns, last], len(messages))

    def _is_written(self, content: str, text: str) -> bool:
        """Whether a text holds what it must of a message that is not trained."""
        return stands_in(content, text)

    def _write(self, messages: Sequence[Message], header: bool = False) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                [for_template(message) for message in messages],
                tools=self._tools,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=header,
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"the tokenizer's chat template refuses it: {error}") from error
        assert isinstance(text, str)
        return text

    def _find(self, messages: Sequence[Message], text: str) -> Turn | None:
        """Find the last of ``messages`` at the end of their text; ``None`` if the template left out its thought."""
        message = messages[-1]
        where = f"message {len(messages)} (assistant)"
        prompt = self._write(messages[:-1], header=True)
        before, tail = self._around(messages)
        begins = prompt if before.startswith(prompt) else before
        if not (prompt.startswith(begins) and text.startswith(begins)):
            raise ValueError(f"{where}: the chat template begins this turn in another way than for generation")
        if not text.endswith(tail):
            raise ValueError(f"{where}: how the chat template ends this turn depends on its content")
        content_end = len(text) - len(tail)
        written = text[len(begins) : content_end]
        length: int | None
        if "tool_calls" in message:
            length = content_end - len(before if text.startswith(before) else begins)
        else:
            length = _length_at_end(written, message["content"])
        if self._tools:
            self._check_calls(message, written if length is None else written[len(written) - length :], where)
        if length is None:
            _, closing, answer = message["content"].rpartition(_END_OF_THOUGHT)
            if closing and _length_at_end(written, answer) is not None:
                return None
            raise ValueError(
                f"{where}: the chat template does not write its content as it is ({message['content']!r:.80} became "
                f"{written!r:.80}); choose another template with --chat_template"
            )
        if (reasoning := message.get("reasoning_content")) and not stands_in(reasoning, written):
            raise ValueError(
                f"{where}: the chat template does not write its reasoning_content; put it at the beginning of the "
                "content, as <think>...</think>, or choose another template with --chat_template"
            )
        start = len(prompt)
        added = written[: len(written) - length]
        if not text.startswith(prompt):
            self.notes[
                f"For generation, the chat template ends the prompt with {prompt[len(begins) :]!r}, which it does not "
                "write before the answers of these data: the model learns to answer without it. Put the reasoning into "
                "the answers, or give a template that agrees with itself with --chat_template"
            ] = None
            start = content_end - length
        elif added.strip() and self._has_no_generation_prompt(messages[:-1], prompt):
            self.notes[
                f"The chat template ignores add_generation_prompt: {added!r} before an answer is not trained, and "
                "where the model is used, prompts must end with it"
            ] = None
            start = content_end - length
        return Turn(start, content_end, len(text))

    def _check_calls(self, message: Message, written: str, where: str) -> None:
        """Read a turn back from what the template wrote, and compare it with the data."""
        calls = [{"name": call["name"], "arguments": call["arguments"]} for call in message.get("tool_calls", ())]
        try:
            parsed = self.tool_format.parse(written)
        except ValueError as error:
            raise ValueError(f"{where}: does not survive the chat template: {error}") from error
        if not calls and parsed.calls:
            raise ValueError(
                f"{where}: its content reads as calls of tools ({written!r:.80}); put them into 'tool_calls'"
            )
        if _as_json(parsed.calls) != _as_json(calls):
            raise ValueError(
                f"{where}: its calls do not survive the chat template: {_as_json(calls):.200} was written as "
                f"{written!r:.200}, which reads as {_as_json(parsed.calls):.200}"
            )
        if calls and _squeezed(parsed.content) != _squeezed(_as_history(message)):
            raise ValueError(
                f"{where}: the chat template does not write the content beside its calls ({message['content']!r:.80} "
                f"became {parsed.content!r:.80}); choose another template with --chat_template, or remove the content"
            )

    def _with_thought(self, messages: Sequence[Message]) -> tuple[str, Turn]:
        """The text of a chat whose last answer has a thought that the template leaves out, and that turn.

        The template writes answers as history, where thoughts are left out. When it is generated, an answer follows the
        generation prompt as it stands in the data.
        """
        prompt, content = self._write(messages[:-1], header=True), messages[-1]["content"]
        before, tail = self._around(messages)
        opening = prompt.removeprefix(before).strip() if prompt.startswith(before) else ""
        if opening and content.lstrip().startswith(opening):
            content = content.lstrip().removeprefix(opening).lstrip()
        self.notes[
            "The chat template leaves thoughts out of answers. For training, an answer with a thought is written after "
            "the generation prompt as it stands in the data"
        ] = None
        written = prompt + content
        return written + tail, Turn(len(prompt), len(written), len(written + tail))

    def _around(self, messages: Sequence[Message]) -> tuple[str, str]:
        """What the template writes before and after the content of the last of ``messages``."""
        written = self._write([*messages[:-1], {"role": "assistant", "content": _PROBE}])
        before, found, tail = written.rpartition(_PROBE)
        if not found:
            raise ValueError(f"message {len(messages)} (assistant): the chat template does not write its content")
        return before, tail

    def _has_no_generation_prompt(self, messages: Sequence[Message], prompt: str) -> bool:
        if self._ignores_generation_prompt is None:
            self._ignores_generation_prompt = self._write(messages) == prompt
        return self._ignores_generation_prompt


def _as_history(message: Message) -> str:
    """What a template must at least write of a message that is not trained: earlier thoughts may be left out."""
    if message["role"] == "assistant":
        return message["content"].rpartition(_END_OF_THOUGHT)[2]
    return message["content"]


def stands_in(content: str, text: str) -> bool:
    """Whether a text holds a content: as it is, with other white space, or as a JSON string (some tool results)."""
    if content.strip() in text:
        return True
    squeezed = _squeezed(text)
    forms = (content, _SETTINGS.sub("", content), json.dumps(content, ensure_ascii=False)[1:-1])
    return any(_squeezed(form) in squeezed for form in forms)


def _length_at_end(written: str, content: str) -> int | None:
    """How many characters at the end of ``written`` are the content, white space apart; ``None`` if it is not there."""
    if written.endswith(content):
        return len(content)
    wanted = _squeezed(content)
    if not _squeezed(written).endswith(wanted):
        return None
    left = len(wanted)
    for position in range(len(written) - 1, -1, -1):
        if left == 0:
            return len(written) - position - 1
        left -= not written[position].isspace()
    return len(written)


def _as_json(calls: list[dict[str, Any]]) -> str:
    return json.dumps(calls, sort_keys=True, ensure_ascii=False)


def _squeezed(text: str) -> str:
    return "".join(text.split())
