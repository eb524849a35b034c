"""Tools that an assistant may call: JSON Schema functions, their JSON text or Python functions, in one checked form."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

Tool = dict[str, Any]


def read_tools(value: object, where: str = "tools") -> list[Tool]:
    """Bring tools into the form that chat templates take.

    Args:
        value: A list, or the JSON text of one. Each tool is ``{"type": "function", "function": {...}}``, or the
            function alone: ``name``, ``description`` and ``parameters``, a JSON Schema of type object; or a Python
            function with type hints and a docstring in Google's style, of which transformers' ``get_json_schema`` makes
            that.
        where: How messages name what is read.

    Returns:
        ``{"type": "function", "function": {"name", "description", "parameters", ...}}`` for each. Schema keys that are
        null are left out, because tables fill the keys of other rows with null.

    Raises:
        ValueError: If this is not a list of functions, a schema is not valid, or a name occurs twice.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{where!r} is not JSON at column {error.colno}: {error.msg}; found {value!r:.80}"
            ) from error
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"{where!r} must be a list of functions, found {value!r:.80}")
    tools = [_tool(each, f"{where!r}, tool {number}") for number, each in enumerate(value, start=1)]
    names = [tool["function"]["name"] for tool in tools]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{where!r}: a tool is named twice: {', '.join(twice)}; a call could mean either, rename one")
    return tools


def _tool(value: object, where: str) -> Tool:
    if callable(value):
        return _of_python(value, where)
    if isinstance(value, str):  # a list of JSON texts, as some data sets have it
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{where} is not JSON at column {error.colno}: {error.msg}; found {value!r:.80}"
            ) from error
    function = value.get("function") or value if isinstance(value, Mapping) else value
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise ValueError(f"{where}: expected a function with a name, found {value!r:.80}")
    where = f"{where} ({function['name']})"
    cleaned = _without_nulls({key: item for key, item in function.items() if key != "type"})
    cleaned.setdefault("description", "")
    if not isinstance(cleaned["description"], str):
        raise ValueError(f"{where}: 'description' must be text, found {cleaned['description']!r:.80}")
    parameters = cleaned.get("parameters") or {}
    if not isinstance(parameters, Mapping):
        raise ValueError(f"{where}: 'parameters' must be a JSON Schema, found {parameters!r:.80}")
    cleaned["parameters"] = {"type": "object", "properties": {}} | dict(parameters)
    if problem := _problem(json.dumps(cleaned["parameters"], sort_keys=True)):
        raise ValueError(f"{where}: 'parameters' are not a valid JSON Schema of an object: {problem}")
    return {"type": "function", "function": cleaned}


def _of_python(function: Any, where: str) -> Tool:
    from transformers.utils import get_json_schema
    from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException

    try:
        tool: Tool = get_json_schema(function)
    except (DocstringParsingException, TypeHintParsingException) as error:
        raise ValueError(f"{where}: the Python function {function.__name__} cannot be described: {error}") from error
    return tool


def _without_nulls(schema: Any) -> Any:
    """A schema without the keys that are null. Values that may be null stay: ``const``, ``default``, lists."""
    if isinstance(schema, Mapping):
        return {
            key: _without_nulls(value)
            for key, value in schema.items()
            if value is not None or key in ("const", "default")
        }
    return [_without_nulls(each) for each in schema] if isinstance(schema, list | tuple) else schema


@functools.lru_cache(maxsize=4096)  # rows repeat their tools
def _problem(parameters: str) -> str | None:
    """What is wrong with the JSON text of a schema."""
    import jsonschema  # here: most data have no tools

    schema = json.loads(parameters)
    if schema["type"] != "object":
        return f"their type is {schema['type']!r}, but arguments are an object"
    if not isinstance(schema["properties"], Mapping):
        return f"'properties' is {schema['properties']!r:.80}, not an object"
    for reference in _references(schema):
        if not reference.startswith("#"):
            return f"{reference!r} refers to another document; write that part into the schema"
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        place = ".".join(map(str, error.absolute_path))
        return f"{error.message:.200}" + (f" (at {place})" if place else "")
    if unknown := sorted(set(schema.get("required", [])) - schema["properties"].keys()):
        return f"'required' names {', '.join(unknown)}, which 'properties' does not have"
    return None


def _references(schema: Any) -> list[str]:
    if isinstance(schema, Mapping):
        own = [schema["$ref"]] if isinstance(schema.get("$ref"), str) else []
        return own + [found for value in schema.values() for found in _references(value)]
    return [found for each in schema for found in _references(each)] if isinstance(schema, list) else []
