"""Calls against what was expected: each mistake by its name, accepted values, any order, schemas, and the shares."""

import copy
from typing import Any

import pytest
import torch

from lightning_qlora.modules.training.tool_call_metrics import MISTAKES, ToolCallMetric, is_valid, mistake_of


def tool(name: str, required: list[str], **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": required, "$defs": {"n": {"type": "integer"}}}
    return {"type": "function", "function": {"name": name, "description": "", "parameters": parameters}}


TOOLS = [
    tool("move", ["x"], x={"$ref": "#/$defs/n"}, unit={"type": "string"}, path={"type": "array"}),
    tool("stop", []),
]


def call(name: str, accepted: dict[str, list[Any]] | None = None, **arguments: Any) -> dict[str, Any]:
    return {"name": name, "arguments": arguments} | ({"accepted": accepted} if accepted else {})


LOOSE = call("move", {"unit": ["m", "metre", ""], "x": [1, 2]}, x=1)


@pytest.mark.parametrize(
    ("calls", "expected", "mistake"),
    [
        ([call("move", x=1)], [call("move", x=1)], None),
        ([call("move", x=1.0)], [call("move", x=1)], None),
        ([call("move", x=True)], [call("move", x=1)], "type"),
        ([call("move", x="1")], [call("move", x=1)], "type"),
        ([call("move", x=2)], [call("move", x=1)], "value"),
        ([call("move", unit="m")], [call("move", x=1, unit="m")], "missing argument"),
        ([call("move", x=1, unit="m")], [call("move", x=1)], "unknown argument"),
        ([call("stop")], [call("move", x=1)], "function"),
        ([], [call("stop")], "number of calls"),
        ([call("stop")], [], "number of calls"),
        ([], [], None),
        (None, [], "unreadable"),
        ([call("move", x=1, path=[1, {"a": [2]}])], [call("move", x=1, path=[1, {"a": [2.0]}])], None),
        ([call("move", x=1, path=[1, 2])], [call("move", x=1, path=[2, 1])], "value"),
        ([call("move", x=2)], [LOOSE], None),
        ([call("move", x=1, unit="metre")], [LOOSE], None),
        ([call("move", x=1, unit="mile")], [LOOSE], "value"),
        ([call("move", x=1, unit="")], [LOOSE], None),
        # in any order
        ([call("stop"), call("move", x=2), call("move", x=1)],
         [call("move", x=1), call("move", x=2), call("stop")], None),
        # the first fits both, the second only the first: a greedy assignment would fail
        ([call("move", x=1), call("move", x=3)], [call("move", {"x": [1, 3]}, x=1), call("move", x=1)], None),
        ([call("move", x=1), call("move", x=1)], [call("move", x=1), call("move", x=2)], "value"),
        ([call("move", x=1), call("move", x="2")], [call("move", x=1), call("move", x=2)], "type"),
    ],
)  # fmt: skip
def test_each_mistake_is_named(calls, expected, mistake):
    assert mistake_of(calls, expected, TOOLS) == mistake
    if calls and expected:
        assert mistake_of(calls[::-1], expected, TOOLS) == mistake


def test_calls_are_checked_against_the_schema_of_the_tool_they_name():
    assert is_valid(call("move", x=1, unit="m"), TOOLS)
    assert is_valid(call("stop"), TOOLS)
    for invalid in (call("move"), call("move", x="1"), call("move", x=1, unit=2), call("run")):
        assert not is_valid(invalid, TOOLS)


def test_shares_are_of_all_requests_and_ranks_add_up():
    requests: list[tuple[Any, Any]] = [
        ([call("move", x=1)], [call("move", x=1)]),
        ([call("move", x=2)], [call("move", x=1)]),
        ([call("move", x="2")], [call("move", x=1)]),
        (None, [call("stop")]),
        ([call("run")], [call("stop")]),
    ]
    parts = [ToolCallMetric(), ToolCallMetric()]
    for index, (calls, expected) in enumerate(requests):
        parts[index % 2].update(calls, expected, TOOLS)
    whole = copy.deepcopy(parts[0])
    whole.merge_state(parts[1])
    shares = {name: float(share) for name, share in whole.compute().items()}
    assert shares == pytest.approx({"exact": 0.2, "functions": 0.6, "valid": 0.4, "readable": 0.8})
    counts = dict(zip(MISTAKES, whole.mistakes.tolist(), strict=True))
    assert {name: count for name, count in counts.items() if count} == {
        "unreadable": 1,
        "function": 1,
        "type": 1,
        "value": 1,
    }
    with pytest.warns(UserWarning, match="compute"):
        assert all(torch.isnan(share) for share in ToolCallMetric().compute().values())
