"""How right a model's calls of tools are, by their structure: a torchmetrics Metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

#: Why a request is not exactly right, in the order in which they are looked for.
MISTAKES = (
    "unreadable",  # what was written looks like a call and cannot be read
    "number of calls",
    "function",
    "missing argument",
    "unknown argument",
    "type",  # a value that the tool's schema does not allow
    "value",
)

Call = Mapping[str, Any]


class ToolCallMetric(Metric):
    """Shares of requests whose calls are right. With several ranks each counts its requests, and the sums are theirs.

    A call is right if it names the right function, has all arguments that are needed and none that is not known, and
    each value is one of those accepted: what the expected call has, or one of its ``accepted`` values of that argument;
    ``""`` among these means that the argument may be left out. Values are compared as JSON values: ``2`` is ``2.0``,
    but not ``true`` or ``"2"``. Several calls are right in any order.

    ``compute`` returns, each float32 and 0-dim: ``exact``, the share of requests whose calls are all right, no more and
    no fewer; ``functions``, of those that call the right functions, whatever the arguments; ``valid``, of those whose
    calls all name an offered tool and fit its JSON Schema; ``readable``, of those whose calls could be read. All are
    NaN before the first request.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    requests: Tensor
    functions: Tensor
    valid: Tensor
    mistakes: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("requests", "functions", "valid"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("mistakes", torch.zeros(len(MISTAKES), dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self, calls: Sequence[Call] | None, expected: Sequence[Call], tools: Sequence[Mapping[str, Any]]
    ) -> None:
        """Count a request.

        Args:
            calls: What the model calls, each with ``name`` and ``arguments``; ``None`` if that cannot be read.
            expected: What it should call; maybe nothing.
            tools: What it was offered, as chat templates take them.
        """
        self.requests += 1
        mistake = mistake_of(calls, expected, tools)
        if mistake is not None:
            self.mistakes[MISTAKES.index(mistake)] += 1
        if calls is not None:
            self.functions += sorted(c["name"] for c in calls) == sorted(c["name"] for c in expected)
            self.valid += all(is_valid(call, tools) for call in calls)

    def compute(self) -> dict[str, Tensor]:
        """The shares; see the class."""
        right = {
            "exact": self.requests - self.mistakes.sum(),
            "functions": self.functions,
            "valid": self.valid,
            "readable": self.requests - self.mistakes[MISTAKES.index("unreadable")],
        }
        return {name: count.float() / self.requests for name, count in right.items()}


def mistake_of(
    calls: Sequence[Call] | None, expected: Sequence[Call], tools: Sequence[Mapping[str, Any]]
) -> str | None:
    """The first of :data:`MISTAKES` in a model's calls, or ``None`` if they are right; arguments as in
    :meth:`ToolCallMetric.update`."""
    if calls is None:
        return "unreadable"
    if len(calls) != len(expected):
        return "number of calls"
    if sorted(call["name"] for call in calls) != sorted(call["name"] for call in expected):
        return "function"
    found = [[_mistake(call, wanted, tools) for wanted in expected] for call in calls]
    if _all_fit([[mistake is None for mistake in row] for row in found]):
        return None
    # Of a call that fits nowhere: the mistake in which it comes closest to a call of the same function.
    fits_nowhere = [row for row in found if None not in row] or found
    closest = [max((MISTAKES.index(mistake) for mistake in row if mistake), default=-1) for row in fits_nowhere]
    return MISTAKES[min(place for place in closest if place >= 0)]


def is_valid(call: Call, tools: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a call names one of ``tools`` and its arguments fit that one's JSON Schema."""
    schema = _schema(call["name"], tools)
    return schema is not None and _fits(call["arguments"], schema)


def _mistake(call: Call, wanted: Call, tools: Sequence[Mapping[str, Any]]) -> str | None:
    if call["name"] != wanted["name"]:
        return "function"
    accepted = {name: [value] for name, value in wanted["arguments"].items()} | dict(wanted.get("accepted") or {})
    given = call["arguments"]
    if any(name not in given for name, values in accepted.items() if "" not in values):
        return "missing argument"
    if any(name not in accepted for name in given):
        return "unknown argument"
    wrong = [name for name, value in given.items() if not any(_equal(value, each) for each in accepted[name])]
    if not wrong:
        return None
    schema = _schema(call["name"], tools) or {}
    return "value" if all(_argument_fits(given[name], name, schema) for name in wrong) else "type"


def _schema(name: str, tools: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    return next((tool["function"]["parameters"] for tool in tools if tool["function"]["name"] == name), None)


def _argument_fits(value: Any, name: str, schema: Mapping[str, Any]) -> bool:
    # Inside of the whole schema, whose definitions the argument's may refer to.
    return _fits({name: value}, {**schema, "required": []})


def _fits(arguments: Mapping[str, Any], schema: Mapping[str, Any]) -> bool:
    import jsonschema  # here: only models that call tools need it

    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    return bool(kind(schema).is_valid(arguments))


def _equal(value: Any, other: Any) -> bool:
    """Whether two JSON values are the same."""
    if isinstance(value, bool) or isinstance(other, bool):
        return value is other
    if isinstance(value, list) and isinstance(other, list):
        return len(value) == len(other) and all(map(_equal, value, other))
    if isinstance(value, Mapping) and isinstance(other, Mapping):
        return value.keys() == other.keys() and all(_equal(value[key], other[key]) for key in value)
    return bool(value == other)


def _all_fit(fits: Sequence[Sequence[bool]]) -> bool:
    """Whether each row can have a column of its own among those that fit it: bipartite matching by augmenting paths."""
    taken: dict[int, int] = {}

    def place(row: int, tried: set[int]) -> bool:
        for column, fit in enumerate(fits[row]):
            if fit and column not in tried:
                tried.add(column)
                if column not in taken or place(taken[column], tried):
                    taken[column] = row
                    return True
        return False

    return all(place(row, set()) for row in range(len(fits)))
