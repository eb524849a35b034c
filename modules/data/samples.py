"""What passes between the parts of the data pipeline: chats, tokenized samples, batches."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NotRequired, TypedDict

import torch

Role = Literal["system", "developer", "user", "assistant", "tool"]


class ToolCall(TypedDict):
    """A call of a tool by an assistant."""

    name: str
    arguments: dict[str, Any]
    id: NotRequired[str]
    accepted: NotRequired[dict[str, list[Any]]]
    """For evaluation: by argument the values that are right too; ``""`` among them means that it may be left out."""


class Message(TypedDict):
    """One message of a chat."""

    role: Role
    content: str
    tool_calls: NotRequired[list[ToolCall]]
    """What an assistant calls; the content may be empty then."""
    tool_call_id: NotRequired[str]
    """Which call a tool's result belongs to, for templates that write it."""
    name: NotRequired[str]
    """The tool that a result is from, for templates that write it."""
    reasoning_content: NotRequired[str]
    """What an assistant thought before it answered, for templates that write it."""
    train: NotRequired[bool]
    """``False`` for an assistant turn that is read but not trained."""


class Chat(TypedDict):
    """One conversation."""

    messages: list[Message]
    images: NotRequired[list[str]]
    """SHA-256 of its images, in the order in which they stand in its messages."""
    tools: NotRequired[list[dict[str, Any]]]
    """What the assistant may call, each as ``{"type": "function", "function": {"name", "description", "parameters"}}``
    with a JSON Schema of its arguments, as chat templates take them."""


IGNORE_INDEX = -100
"""The label that cross-entropy leaves out."""


class Sample(TypedDict):
    """One tokenized chat, or a pack of several one after another; the first two lists have the same length."""

    input_ids: list[int]
    labels: list[int]
    """The token itself where the assistant speaks, ``IGNORE_INDEX`` elsewhere."""
    document_lengths: NotRequired[list[int]]
    """Of a pack, the tokens of each of its samples."""
    images: NotRequired[list[int]]
    """Of a model that takes images, the index of each one in the data set's table."""
    max_sides: NotRequired[list[int | None]]
    """For each image, the longer side in pixels that it is limited to."""
    cost: NotRequired[int]
    """What a rank computes for the sample, in positions: its tokens, and those of the vision tower."""


class Batch(TypedDict):
    """What the loaders yield. The counts are Python ints so that reading them never waits for a device.

    There is no attention mask: attention is causal, so no token sees the padding to its right.
    """

    input_ids: torch.Tensor
    """int64 [B, S], padded on the right."""
    labels: torch.Tensor
    """int64 [B, S], ``IGNORE_INDEX`` on prompts and padding; not shifted."""
    num_tokens: int
    """Tokens of real samples, padding and blank samples excluded."""
    num_loss_tokens: int
    """Predictions that count: labels other than ``IGNORE_INDEX`` in ``labels[:, 1:]``."""


class PackedBatch(TypedDict):
    """What the loaders yield with packing. Padding is a document of its own."""

    input_ids: torch.Tensor
    """int64 [B, S], padded on the right."""
    position_ids: torch.Tensor
    """int64 [B, S], from 0 in each document."""
    document_lengths: list[list[int]]
    """Tokens of each document of each row; a row's sum to S, its padding being its last document. Python ints, so that
    reading them never waits for a device."""
    labels: torch.Tensor
    """int64 [B, S], ``IGNORE_INDEX`` on prompts, padding and the first token of each document; not shifted."""
    num_tokens: int
    """Tokens of real samples, padding and blank packs excluded."""
    num_loss_tokens: int
    """Predictions that count: labels other than ``IGNORE_INDEX`` in ``labels[:, 1:]``."""


Collator = Callable[[list[Sample]], Mapping[str, Any]]
"""Makes a batch of B samples, or of B packs, which have ``document_lengths``."""
