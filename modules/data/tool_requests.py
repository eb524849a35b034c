"""A thousand conversations over the tools of :mod:`~lightning_qlora.modules.data.demo_tools`, the same ones each time.

    system:    the tools that are offered: what is needed, and one or two others
    user:      How many kilometres are 12 miles?
    assistant: calls convert_length(value=12, source="miles", target="kilometres")
    tool:      19.31
    assistant: 12 miles are 19.31 kilometres.

The tools take turns, with four ways to ask for each; numbers, units, dates and words are drawn. One conversation in ten
asks for two things and has two calls. Every result was computed by the tool itself. No request occurs twice; the last
hundred conversations are the split ``validation``, so what is held out are values and combinations, not phrasings.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from typing import Any, NamedTuple

from .demo_tools import DEMO_TOOLS

TOOL_REQUESTS = "tool-requests"

_COUNT, _TRAIN = 1000, 900
_LENGTHS = ("metres", "kilometres", "miles", "yards", "feet", "inches")
_TEMPERATURES = ("celsius", "fahrenheit", "kelvin")
_WORDS = """
    red blue old new sky sea town road tree stone bird river wind light night summer paper window garden song
""".split()  # noqa: SIM905  a list of quoted names is harder to read

Arguments = dict[str, Any]


class _Kind(NamedTuple):
    """How a tool is asked for."""

    draw: Callable[[random.Random], Arguments]
    questions: tuple[str, ...]
    answer: str


def _number(draw: random.Random) -> int | float:
    """A whole number, or in one case of four one with a decimal."""
    return draw.randint(11, 999) / 10 if draw.random() < 0.25 else draw.randint(2, 900)


def _day(draw: random.Random) -> date:
    return date(1990, 1, 1) + timedelta(days=draw.randrange(20_000))


def _units(names: tuple[str, ...]) -> Callable[[random.Random], Arguments]:
    def drawn(draw: random.Random) -> Arguments:
        source, target = draw.sample(names, 2)
        return {"value": _number(draw), "source": source, "target": target}

    return drawn


def _two_days(draw: random.Random) -> Arguments:
    start = _day(draw)
    return {"start": start.isoformat(), "end": (start + timedelta(days=draw.randint(2, 400))).isoformat()}


def _divisor(draw: random.Random) -> Arguments:
    common = draw.randint(2, 12)
    return {"first": common * draw.randint(2, 40), "second": common * draw.randint(2, 40)}


_KINDS = {
    "convert_length": _Kind(
        _units(_LENGTHS),
        ("Convert {value} {source} to {target}.", "How many {target} are {value} {source}?",
         "What is {value} {source} in {target}?", "I have {value} {source}. I need {target}."),
        "{value} {source} are {result} {target}.",
    ),
    "convert_temperature": _Kind(
        _units(_TEMPERATURES),
        ("Convert {value} {source} to {target}.", "How warm is {value} {source} in {target}?",
         "What is {value} {source} in {target}?", "It is {value} {source}. Give me {target}."),
        "{value} {source} is {result} {target}.",
    ),
    "days_between": _Kind(
        _two_days,
        ("How many days are between {start} and {end}?", "Count the days from {start} to {end}.",
         "How long is it from {start} to {end}?", "We start on {start} and end on {end}. How many days?"),
        "There are {result} days from {start} to {end}.",
    ),
    "add_days": _Kind(
        lambda draw: {"day": _day(draw).isoformat(), "count": draw.randint(2, 400)},
        ("What date is {count} days after {day}?", "Add {count} days to {day}.",
         "It starts on {day} and ends {count} days later. When?", "Which day comes {count} days after {day}?"),
        "{count} days after {day} is {result}.",
    ),
    "weekday": _Kind(
        lambda draw: {"day": _day(draw).isoformat()},
        ("What weekday is {day}?", "Which day of the week is {day}?", "On which weekday falls {day}?",
         "Tell me the weekday of {day}."),
        "{day} is a {result}.",
    ),
    "count_words": _Kind(
        lambda draw: {"text": " ".join(draw.choices(_WORDS, k=draw.randint(3, 8)))},
        ('How many words are in "{text}"?', 'Count the words: "{text}"', 'How many words has "{text}"?',
         'Give me the number of words in "{text}".'),
        "The text has {result} words.",
    ),
    "percentage": _Kind(
        lambda draw: {"percent": draw.randint(1, 99), "number": _number(draw)},
        ("What is {percent} % of {number}?", "Take {percent} % of {number}.", "How much is {percent} % of {number}?",
         "I get {percent} % of {number}. How much is that?"),
        "{percent} % of {number} is {result}.",
    ),
    "common_divisor": _Kind(
        _divisor,
        ("What is the greatest common divisor of {first} and {second}?",
         "Find the common divisor of {first} and {second}.",
         "Which number divides both {first} and {second}?", "gcd of {first} and {second}?"),
        "The greatest common divisor of {first} and {second} is {result}.",
    ),
}  # fmt: skip


def result_text(value: object) -> str:
    """What a tool returns, as the model reads it: texts as they are, whole numbers without decimals, else JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, ensure_ascii=False)


def tool_requests(split: str) -> Iterator[tuple[str, object]]:
    """Rows of ``train`` (900) or ``validation`` (100), each with where it stands."""
    draw, asked = random.Random(20), set[str]()
    names = list(_KINDS)
    for number in range(_COUNT):
        while True:
            called = [names[number % len(names)]]
            if number % 10 == 9:
                called.append(draw.choice(names))
            row = _conversation(draw, called)
            question = row["messages"][0]["content"]
            if question not in asked:
                break
        asked.add(question)
        if (split == "train") == (number < _TRAIN):
            yield f"conversation {number + 1}", row


def _conversation(draw: random.Random, called: list[str]) -> dict[str, Any]:
    questions, calls, results, answers = [], [], [], []
    for name in called:
        kind = _KINDS[name]
        arguments = kind.draw(draw)
        result = result_text(DEMO_TOOLS[name](**arguments))
        questions.append(draw.choice(kind.questions).format(**arguments))
        calls.append({"name": name, "arguments": arguments})
        results.append({"role": "tool", "content": result})
        answers.append(kind.answer.format(**arguments, result=result))
    others = [name for name in _KINDS if name not in called]
    offered = [*dict.fromkeys(called), *draw.sample(others, draw.choice((1, 1, 2)))]
    draw.shuffle(offered)
    return {
        "tools": [DEMO_TOOLS[name] for name in offered],
        "messages": [
            {"role": "user", "content": " ".join(questions)},
            {"role": "assistant", "content": "", "tool_calls": calls},
            *results,
            {"role": "assistant", "content": " ".join(answers)},
        ],
    }
