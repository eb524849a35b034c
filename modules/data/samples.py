"""What passes between the parts of the data pipeline: chats, tokenized samples, batches."""

from typing import NotRequired, TypedDict

import torch

Chat = dict[str, list[dict[str, str]]]

"""One conversation: ``{"messages": [{"role": ..., "content": ...}, ...]}``."""

IGNORE_INDEX = -100

"""The label that cross-entropy leaves out."""


class Sample(TypedDict):
    """One tokenized chat, or a pack of several one after another; the first two lists have the same length."""

    input_ids: list[int]
    labels: list[int]
    """The token itself where the assistant speaks, ``IGNORE_INDEX`` elsewhere."""
    document_lengths: NotRequired[list[int]]
    """Of a pack, the tokens of each of its samples."""


class Batch(TypedDict):
    """What the loaders yield. The counts are Python ints so that reading them never waits for a device."""

    input_ids: torch.Tensor
    """int64 [B, S], padded on the right."""
    attention_mask: torch.Tensor
    """int64 [B, S], 1 on tokens and 0 on padding."""
    labels: torch.Tensor
    """int64 [B, S], ``IGNORE_INDEX`` on prompts and padding; not shifted."""
    num_tokens: int
    """Tokens of real samples, padding and blank samples excluded."""
    num_loss_tokens: int
    """Predictions that count: labels other than ``IGNORE_INDEX`` in ``labels[:, 1:]``."""


class PackedBatch(TypedDict):
    """What the loaders yield with packing. There is no padding mask: padding is a document of its own."""

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
