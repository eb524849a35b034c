"""Reading conversations: the embedded set, JSON and JSON Lines files, data sets that ``datasets`` can load."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import datasets

from .samples import Chat
from .stdlib_docs import stdlib_api_cards

DEFAULT_DATASET = "stdlib-api-cards"

_ROLES = ("system", "user", "assistant")

_PAIR_FIELDS = (("instruction", "response"), ("instruction", "output"), ("prompt", "completion"))


def load_chats(dataset: str | Path) -> list[Chat]:
    """Read conversations from the embedded set, a JSON or JSON Lines file, or a data set that ``datasets`` can load.

    A row is one of ``{"messages": [{"role": ..., "content": ...}, ...]}`` with the roles system, user and assistant,
    ``{"instruction": ..., "response": ...}`` (``output`` is understood for ``response``) with an optional ``input``, or
    ``{"prompt": ..., "completion": ...}``.

    Args:
        dataset: ``"stdlib-api-cards"``; a path ending in ``.json`` (one list of rows) or ``.jsonl`` (one row a line);
            or the name of a data set on the hub or of a local directory, whose ``train`` split is read.

    Returns:
        One chat a row, in the order of the source, with nothing but role and content in its messages.

    Raises:
        ValueError: If the source is missing, empty or not JSON (naming the line), or a row cannot be trained on (naming
            it).
    """
    if str(dataset) == DEFAULT_DATASET:
        return stdlib_api_cards()
    path = Path(dataset)
    if path.suffix in (".json", ".jsonl"):
        rows = _read_json(path)
    elif path.is_file():
        raise ValueError(
            f"{path}: unknown file type {path.suffix!r}; save the rows as .json (a list) or .jsonl (one a line)"
        )
    else:
        rows = _read_hub(str(dataset))
    chats = [_to_chat(row, where) for where, row in rows]
    if not chats:
        raise ValueError(f"{dataset}: the data set is empty; it needs at least one row")
    return chats


def _read_json(path: Path) -> Iterator[tuple[str, object]]:
    """Yield (where, row) of a file; ``where`` names the place for error messages."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; pass an existing .json or .jsonl file, or {DEFAULT_DATASET!r}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    if path.suffix == ".jsonl":
        # Not splitlines(): JSON strings may hold U+2028 and friends, which are no line ends here.
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield f"{path}, line {number}", _parse(line, path, first_line=number)
        return
    if not text.strip():
        return
    rows = _parse(text, path, first_line=1)
    if not isinstance(rows, list):
        raise ValueError(f"{path}: holds a JSON {type(rows).__name__}, not a list of rows; one object a line is .jsonl")
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", row


def _parse(text: str, path: Path, first_line: int) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        hint = "; one object a line is .jsonl" if path.suffix == ".json" and error.msg == "Extra data" else ""
        raise ValueError(f"{path}, line {line}, column {error.colno}: not JSON: {error.msg}{hint}") from error


def _read_hub(name: str) -> Iterator[tuple[str, object]]:
    try:
        rows = datasets.load_dataset(name, split="train")
    except (
        Exception
    ) as error:  # the hub client raises a dozen unrelated types, from timeouts to parsers of the data files
        raise ValueError(
            f"the data set {name!r} cannot be loaded ({type(error).__name__}: {error}); pass {DEFAULT_DATASET!r}, an "
            "existing .json or .jsonl file, or the name of a data set with a train split on a hub that this machine "
            "can reach"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"{name}, row {number}", row


def _to_chat(row: object, where: str) -> Chat:
    """Bring a row into the form of a chat, or say what is wrong with it."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: expected an object with fields, found {type(row).__name__}")
    if "messages" in row:
        return {"messages": _check_messages(row["messages"], where)}
    for prompt_field, completion_field in _PAIR_FIELDS:
        if prompt_field in row and completion_field in row:
            prompt, completion = row[prompt_field], row[completion_field]
            context = row.get("input") if prompt_field == "instruction" else None
            if context and isinstance(prompt, str) and isinstance(context, str):
                prompt = f"{prompt}\n\n{context}"
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
            return {"messages": _check_messages(messages, where)}
    raise ValueError(
        f"{where}: found the fields {sorted(map(str, row))}, but a row needs 'messages', or 'instruction' and "
        "'response', or 'prompt' and 'completion'"
    )


def _check_messages(messages: object, where: str) -> list[dict[str, str]]:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"{where}: 'messages' must be a non-empty list of {{role, content}}, found {messages!r:.80}")
    checked: list[dict[str, str]] = []
    for number, message in enumerate(messages, start=1):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, None)
        if role not in _ROLES:
            raise ValueError(f"{where}, message {number}: unknown role {role!r}; known roles: {', '.join(_ROLES)}")
        if not isinstance(content, str) or message.get("tool_calls"):
            raise ValueError(f"{where}, message {number} ({role}): the content must be text and nothing else")
        try:
            content.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where}, message {number} ({role}): character {error.start + 1} is half of a surrogate pair "
                f"({content[error.start]!r}), as a cut emoji leaves, and no tokenizer takes it; mend or remove the row"
            ) from error
        if role == "assistant" and not content.strip():
            raise ValueError(f"{where}, message {number}: empty completion, nothing to learn; remove the row")
        checked.append({"role": role, "content": content})
    roles = [message["role"] for message in checked]
    if "assistant" not in roles:
        raise ValueError(f"{where}: no assistant turn, nothing to learn; remove the row")
    if "user" not in roles[: roles.index("assistant")]:
        raise ValueError(f"{where}: the assistant speaks before any user turn; a chat begins with what it answers")
    return checked
