"""Rows with images to chats, in whose texts a character stands for each image.

Images may be given

* as parts of a message's content, beside ``{"type": "text", "text": ...}``: ``{"type": "image", "path": ...}`` or with
  ``url`` (``file://`` or ``data:``), ``base64``, ``bytes``; ``{"type": "image_url", "image_url": {"url": ...}}`` too;
* in a column ``image`` or ``images`` of the row, one or a list of them. Parts ``{"type": "image"}`` and, in texts,
  ``<image>`` say where they belong, as in LLaVA's ``conversations``; without any, they come before the first question.

A line end beside a written ``<image>`` is dropped, because a chat template writes its own. All formats of
:mod:`~lightning_qlora.modules.data.formats` are understood.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .formats import to_chat
from .images import StoredImage, stored_image
from .samples import Chat

#: Stands for an image in the text of a message: of Unicode's private use, which texts do not have.
IMAGE = "\ue002"

_WRITTEN = re.compile(r"\n?<image>\n?")

_COLUMNS = ("images", "image")

#: Columns of lists of messages, and of texts, that may say where images belong; in the order in which they are written.
_MESSAGES = ("messages", "conversations", "prompt", "completion")
_JSON = ("messages", "conversations")
_TEXTS = ("prompt", "instruction", "question", "input", "context")


def to_image_chat(row: object, unused: dict[str, None], folder: Path) -> tuple[Chat, list[StoredImage]]:
    """Bring a row into the form of a chat.

    Args:
        row: A mapping of columns.
        unused: As of :func:`~lightning_qlora.modules.data.formats.to_chat`.
        folder: What relative paths are relative to.

    Returns:
        The chat, with :data:`IMAGE` in its texts for each image, and the images in that order.

    Raises:
        ValueError: If the row cannot be trained on, has more images than places for them or fewer, or an image in an
            answer.
    """
    if not isinstance(row, Mapping):
        return to_chat(row, unused), []
    listed = _listed_images(row, folder)
    written = _Writer(folder, iter(listed or ()), named=listed is not None)
    rest = {column: value for column, value in row.items() if column not in _COLUMNS}
    for column in _MESSAGES:
        if (messages := _messages(rest.get(column), as_json=column in _JSON)) is not None:
            rest[column] = [written.message(message, number) for number, message in enumerate(messages, start=1)]
    for column in _TEXTS:
        if isinstance(rest.get(column), str):
            rest[column] = written.text(rest[column])
    chat = to_chat(rest, unused)
    if listed and not written.places:
        first = next(message for message in chat["messages"] if message["role"] == "user")
        first["content"] = IMAGE * len(listed) + first["content"]
        written.images += listed
    elif listed is not None and written.from_column != len(listed):
        raise ValueError(f"there are {written.from_column} places for the {len(listed)} images of the row")
    for number, message in enumerate(chat["messages"], start=1):
        if message["role"] == "assistant" and IMAGE in message["content"]:
            raise ValueError(f"message {number} (assistant): an answer holds an image, which cannot be learned here")
    if sum(message["content"].count(IMAGE) for message in chat["messages"]) != len(written.images):
        raise ValueError(f"a text holds the character {IMAGE!r} (U+E002), which stands for images here; remove it")
    return chat, written.images


def _listed_images(row: Mapping[str, Any], folder: Path) -> list[StoredImage] | None:
    """The images of the row's column; ``None`` if it has no such column."""
    for column in _COLUMNS:
        value = row.get(column)
        if value is not None:
            values = list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
            return [stored_image(each, folder) for each in values]
    return None


def _messages(value: object, as_json: bool) -> list[Any] | None:
    """A list of messages, or the JSON of one, as in CSV files; ``None`` for anything else."""
    if isinstance(value, str) and as_json:
        with contextlib.suppress(json.JSONDecodeError):
            value = json.loads(value)
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else None


class _Writer:
    """Writes :data:`IMAGE` where images belong, and collects them.

    Args:
        folder: What relative paths are relative to.
        waiting: The images of the row's column.
        named: Whether the row has such a column, so that ``<image>`` in a text means one of them.
    """

    def __init__(self, folder: Path, waiting: Iterator[StoredImage], named: bool) -> None:
        self.folder, self.waiting, self.named = folder, waiting, named
        self.images: list[StoredImage] = []
        self.places = 0
        self.from_column = 0

    def message(self, message: Any, number: int) -> Any:
        if not isinstance(message, Mapping):
            return message
        written = dict(message)
        for field in ("content", "value"):
            content = message.get(field)
            try:
                if isinstance(content, str):
                    written[field] = self.text(content)
                elif isinstance(content, Sequence):
                    written[field] = "".join(self._part(part) for part in content)
            except ValueError as error:
                raise ValueError(f"message {number}: {error}") from error
        return written

    def text(self, text: str) -> str:
        return _WRITTEN.sub(self._next, text) if self.named else text

    def _part(self, part: Any) -> str:
        if isinstance(part, str):
            return self.text(part)
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in (None, "text") and isinstance(part, Mapping) and isinstance(part.get("text"), str):
            return part["text"]  # type: ignore[no-any-return]
        if kind not in ("image", "image_url"):
            raise ValueError(f"the content must be text and images, found {part!r:.80}")
        given = {key: value for key, value in part.items() if key not in ("type", "text") and value is not None}
        if not given and self.named:
            return self._next()
        self.places += 1
        self.images.append(stored_image(given, self.folder))
        return IMAGE

    def _next(self, _: object = None) -> str:
        self.places += 1
        self.from_column += 1
        image = next(self.waiting, None)
        if image is not None:  # what is missing is counted at the end
            self.images.append(image)
        return IMAGE
