"""Chats with images to token ids: placeholders by the chat template, expanded by the size of each image.

As in :mod:`~lightning_qlora.modules.data.chat_template`, labels cover what the assistant says. A sample that is longer
than ``seq_len`` loses its end, but never a part of an image: where the cut would fall inside one, the sample is
refused, or its images are shrunk until it does not, as asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

from lightning.pytorch.utilities import rank_zero_info

from .chat_template import TokenizedChats, check_tokenizer, completion_labels, turn_markers
from .checks import BadRows
from .image_processing import ImageProcessing
from .image_rows import IMAGE
from .images import ImageTable, shrunk_size
from .rendering import ChatRenderer, RenderedChat, TrainOn, Turn, stands_in
from .samples import IGNORE_INDEX, Chat, Message, Sample

_PROBE = "\ue003"

OversizedImages = Literal["refuse", "shrink"]


@dataclass(frozen=True)
class ImageLimits:
    """How large images may be.

    Attributes:
        max_side: Pixels of the longer side; ``None`` is no limit but the model's.
        max_pixels: Pixels in all.
        oversized: What to do with a sample that ``seq_len`` would cut inside an image.
    """

    max_side: int | None = None
    max_pixels: int | None = None
    oversized: OversizedImages = "refuse"

    def side(self, width: int, height: int) -> int | None:
        """The longer side in pixels that an image of this size is limited to."""
        longer, limits = max(width, height), [] if self.max_side is None else [self.max_side]
        if self.max_pixels is not None:
            scale: float = (self.max_pixels / (width * height)) ** 0.5
            limits.append(max(1, int(longer * scale)))
        return min(limits, default=None)


@dataclass
class ImageChatRenderer(ChatRenderer):
    """Writes chats whose texts hold :data:`~lightning_qlora.modules.data.image_rows.IMAGE` for each image.

    Chat templates differ in whether they take a message's content as a text or as a list of parts, and some differ by
    role; each is tried once. If the template knows no image parts, the placeholder is written into the text.

    Args:
        processing: Of the model's family.
    """

    processing: ImageProcessing | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._parts: dict[str, bool] = {}
        user: dict[str, object] = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": _PROBE}]}
        assert self.processing is not None
        placeholder = self.processing.placeholder
        text = self._try([user])
        self._parts["user"] = text is not None and text.count(placeholder) == 1
        if not self._parts["user"]:
            self.notes[
                "The chat template writes nothing for an image: "
                f"{self.processing.written} is written where it stands in the text"
            ] = None
        question: dict[str, object] = {"role": "user", "content": self._content("user", _PROBE)}
        parts = [{"type": "text", "text": _PROBE}]
        probes: dict[str, list[dict[str, object]]] = {
            "system": [{"role": "system", "content": parts}, question],
            "assistant": [question, {"role": "assistant", "content": parts}],
        }
        for role, chat in probes.items():
            found = self._try(chat)
            self._parts[role] = found is not None and found.count(_PROBE) == 2

    def _try(self, messages: list[dict[str, object]]) -> str | None:
        """What the template makes of messages; ``None`` if it refuses them, or writes a list as Python does."""
        try:
            text = super()._write(messages)  # type: ignore[arg-type]
        except ValueError:
            return None
        return text if _PROBE in text and "'type'" not in text and '"type"' not in text else None

    def _content(self, role: str, content: str) -> str | list[dict[str, str]]:
        """A content in the form that the template takes."""
        assert self.processing is not None
        if not self._parts.get(role, self._parts["user"]):
            return content.replace(IMAGE, self.processing.written)
        parts: list[dict[str, str]] = []
        for number, piece in enumerate(content.split(IMAGE)):
            parts += [{"type": "image"}] * (number > 0)
            parts += [{"type": "text", "text": piece}] * bool(piece)
        return parts or [{"type": "text", "text": ""}]

    def _write(self, messages: Sequence[Message], header: bool = False) -> str:
        written = [{**message, "content": self._content(message["role"], message["content"])} for message in messages]
        return super()._write(written, header)  # type: ignore[arg-type]

    def _is_written(self, content: str, text: str) -> bool:
        return all(stands_in(piece, text) for piece in content.split(IMAGE))


@dataclass(frozen=True)
class _Expanded:
    """A rendered chat with its images' placeholders expanded."""

    rendered: RenderedChat
    spans: list[tuple[int, int]]
    """Where each image stands, in characters."""


def _expand(rendered: RenderedChat, placeholder: str, expansions: Sequence[str]) -> _Expanded:
    """Replace placeholders, of which there are as many as ``expansions``."""
    pieces = rendered.text.split(placeholder)
    before = [*accumulate((len(piece) + len(placeholder) for piece in pieces[:-1]), initial=0)][1:]
    grown = [*accumulate((len(text) - len(placeholder) for text in expansions), initial=0)]

    def moved(position: int) -> int:
        return position + grown[sum(end <= position for end in before)]

    text = pieces[0] + "".join(e + piece for e, piece in zip(expansions, pieces[1:], strict=True))
    spans = [
        (end - len(placeholder) + shift, end + shift + len(expansion) - len(placeholder))
        for end, shift, expansion in zip(before, grown, expansions, strict=False)
    ]
    turns = [Turn(moved(turn.start), moved(turn.content_end), moved(turn.end)) for turn in rendered.turns]
    return _Expanded(RenderedChat(text, turns, rendered.messages), spans)


@dataclass(frozen=True)
class TokenizedImageChats(TokenizedChats):
    """Result of :func:`tokenize_image_chats`; its samples have ``images``, ``max_sides`` and ``cost``."""

    num_shrunk: int
    """Images that are made smaller than they are, over all kept samples."""
    image_tokens: list[int]
    """For each sample with images, the tokens at which their features stand."""


@dataclass(frozen=True)
class _Encoded:
    """The tokens of a chat, not cut yet."""

    ids: list[int]
    labels: list[int]
    spans: list[tuple[int, int]]
    """Where each image stands, in tokens."""
    sizes: list[tuple[int, int, int | None]]
    """Width and height of each image after it is shrunk, and its limit."""
    turn_ends: set[int]

    def cut_image(self, seq_len: int) -> int | None:
        """The image that a cut after ``seq_len`` tokens falls into, if any."""
        return next((number for number, (start, end) in enumerate(self.spans) if start < seq_len < end), None)


class _Sampler:
    """Makes samples of rendered chats.

    Args:
        processing: Of the model's family.
        table: The data set's images.
        limits: How large images may be.
        seq_len: Tokens kept of a sample.
    """

    def __init__(self, processing: ImageProcessing, table: ImageTable, limits: ImageLimits, seq_len: int) -> None:
        self.processing, self.table, self.limits, self.seq_len = processing, table, limits, seq_len
        self.tokenizer = processing.tokenizer
        self.markers = turn_markers(self.tokenizer) - processing.never_trained

    def sample(self, rendered: RenderedChat, images: Sequence[int]) -> tuple[Sample, bool, set[int]]:
        """The sample of a chat with these images, whether it lost its end, and the tokens that end its turns.

        Raises:
            ValueError: If the text has more placeholders than images or fewer, or an image would be cut.
        """
        checked = [self.table.checked[index] for index in images]
        sides: list[int | None] = [self.limits.side(image.width, image.height) for image in checked]
        found = rendered.text.count(self.processing.placeholder)
        if found != len(images):
            raise ValueError(
                f"the chat has {len(images)} images, but the chat template wrote {self.processing.placeholder} "
                f"{found} times; choose another template with --chat_template"
            )
        shrinking = False
        while True:
            made = self._encode(rendered, images, sides)
            length, inside = len(made.ids), made.cut_image(self.seq_len)
            learns = any(label != IGNORE_INDEX for label in made.labels[1 : self.seq_len])
            fails = inside is not None or (bool(images) and not learns and self.limits.oversized == "shrink")
            if length <= self.seq_len or not (fails or shrinking):
                break
            smaller = self._smaller(made, sides)
            if inside is not None and (self.limits.oversized == "refuse" or smaller is None):
                raise ValueError(self._why_cut(inside, length))
            if smaller is None:  # what is left has no image cut, but may have nothing to learn
                break
            sides, shrinking = smaller, True
        kept = sum(end <= self.seq_len for _, end in made.spans)
        sample: Sample = {
            "input_ids": made.ids[: self.seq_len],
            "labels": made.labels[: self.seq_len],
            "images": list(images[:kept]),
            "max_sides": sides[:kept],
            "cost": min(length, self.seq_len) + sum(self.processing.cost(*each) for each in made.sizes[:kept]),
        }
        return sample, length > self.seq_len, made.turn_ends

    def _encode(self, rendered: RenderedChat, images: Sequence[int], sides: Sequence[int | None]) -> _Encoded:
        """The tokens of a chat with its images limited to ``sides``."""
        checked = [self.table.checked[index] for index in images]
        sizes = [
            (*shrunk_size(image.width, image.height, side), side) for image, side in zip(checked, sides, strict=True)
        ]
        expansions = [self.processing.expansion(*size) for size in sizes]
        expanded = _expand(rendered, self.processing.placeholder, expansions)
        encoded = self.tokenizer(expanded.rendered.text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        labels, ends = completion_labels(ids, offsets, expanded.rendered, self.markers)
        labels = [IGNORE_INDEX if label in self.processing.never_trained else label for label in labels]
        return _Encoded(ids, labels, _token_spans(offsets, expanded.spans), sizes, ends)

    def _smaller(self, made: _Encoded, sides: Sequence[int | None]) -> list[int | None] | None:
        """Limits at which images take about an eighth fewer tokens; ``None`` if they cannot be made smaller."""
        least = self.processing.least_side
        longer = [self.processing.longer_side(*size) for size in made.sizes]
        if self.processing.fixed_size or all(side <= least for side in longer):
            return None
        return [side if now <= least else max(least, int(now * 0.93)) for now, side in zip(longer, sides, strict=True)]

    def _why_cut(self, image: int, tokens: int) -> str:
        cause = f"seq_len={self.seq_len} would cut the sample of {tokens} tokens inside its image {image + 1}"
        if self.processing.fixed_size:
            return f"{cause}, and images of this model take as many tokens whatever their size; raise seq_len"
        if self.limits.oversized == "shrink":
            return f"{cause}, even with images of {self.processing.least_side} pixels; raise seq_len"
        return (
            f"{cause}; raise seq_len, limit the size of images with --max_image_size, or have them shrunk until the "
            "sample fits with --oversized_images shrink"
        )


def _token_spans(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The tokens of stretches of a text, as [first, end); tokens that are partly of one count as of it."""
    found, token = [], 0
    for start, end in spans:
        while token < len(offsets) and offsets[token][1] <= start:
            token += 1
        first = token
        while token < len(offsets) and offsets[token][0] < end:
            token += 1
        found.append((first, token))
    return found


def tokenize_image_chats(
    processing: ImageProcessing,
    chats: Sequence[Chat],
    table: ImageTable,
    seq_len: int,
    *,
    limits: ImageLimits = ImageLimits(),
    train_on: TrainOn = "all",
    date: Mapping[str, str] | None = None,
    places: Sequence[str] | None = None,
    bad: BadRows | None = None,
) -> TokenizedImageChats:
    """Tokenize chats with images; text-only ones among them become samples without.

    Args:
        processing: Of the model's family, with its tokenizer.
        chats: With :data:`~lightning_qlora.modules.data.image_rows.IMAGE` in their texts, and the ``images`` for it.
        table: Holds these images.
        seq_len, train_on, date, places, bad: As for
            :func:`~lightning_qlora.modules.data.chat_template.tokenize_chats`.
        limits: How large images may be.

    Raises:
        ValueError: As ``tokenize_chats``; and if images and placeholders do not fit together, or an image would be cut.
    """
    tokenizer = processing.tokenizer
    check_tokenizer(tokenizer, seq_len)
    places = places or [f"chat {number}" for number in range(1, len(chats) + 1)]
    bad = bad or BadRows("the data", skip=False)
    renderer = ImageChatRenderer(tokenizer, train_on, date, processing=processing)
    sampler = _Sampler(processing, table, limits, seq_len)
    found = TokenizedImageChats([], [], 0, 0, (), 0, [])
    turn_ends: set[int] = set()
    truncated = dropped = shrunk = longest = 0
    for index, chat in enumerate(chats):
        try:
            _refuse_written(chat, processing)
            images = [table.index(digest) for digest in chat.get("images", [])]
            made = []
            for rendered in renderer.render(chat["messages"]):
                held = sum(message["content"].count(IMAGE) for message in chat["messages"][: rendered.messages])
                made.append(sampler.sample(rendered, images[:held]))
        except ValueError as error:
            bad.add(places[index], error)
            continue
        for sample, is_truncated, ends in made:
            turn_ends |= ends
            longest = max(longest, len(sample["input_ids"]))
            if all(label == IGNORE_INDEX for label in sample["labels"][1:]):
                dropped += 1
                continue
            found.samples.append(sample)
            found.kept.append(index)
            truncated += is_truncated
            shrunk += _num_shrunk(sample, table)
            if sample["images"]:
                found.image_tokens.append(sample["input_ids"].count(processing.image_token_id))
    bad.settle(len(chats))
    if not found.samples:
        raise ValueError(
            f"seq_len={seq_len} cuts away the completion of all {dropped} samples, so nothing is left to learn; raise "
            "seq_len"
        )
    for note in renderer.notes:
        rank_zero_info(f"{note}.")
    return replace(
        found, num_truncated=truncated, num_dropped=dropped, turn_ends=tuple(sorted(turn_ends)), num_shrunk=shrunk
    )


def _refuse_written(chat: Chat, processing: ImageProcessing) -> None:
    """Check that no text holds a token that stands for an image: it would be one placeholder too many."""
    for number, message in enumerate(chat["messages"], start=1):
        if written := [token for token in processing.tokens() if token in message["content"]]:
            raise ValueError(
                f"message {number} ({message['role']}): its text holds {written[0]!r}, which stands for an image, and "
                "there is none for it; remove it, or give the row a column 'images'"
            )


def _num_shrunk(sample: Sample, table: ImageTable) -> int:
    pairs = zip(sample["images"], sample["max_sides"], strict=True)
    return sum(
        side is not None and side < max(table.checked[index].width, table.checked[index].height)
        for index, side in pairs
    )
