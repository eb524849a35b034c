"""Samples to batches: padded on the right, or packed rows with their documents' lengths.

Shapes: B samples (or packs) per batch of one rank, S the longest of the batch, rounded up.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from .samples import IGNORE_INDEX, Batch, PackedBatch, Sample


@dataclass(frozen=True)
class ChatCollator:
    """Pad samples to one length on the right.

    Args:
        pad_token_id: Fills ``input_ids``.
        pad_to_multiple_of: S is the longest sample rounded up to a multiple of this: few distinct shapes, tensor cores
            fed.
    """

    pad_token_id: int
    pad_to_multiple_of: int = 8

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Return the batch of B = ``len(samples)`` samples. A sample of one token without a label counts as blank."""
        longest = max(len(sample["input_ids"]) for sample in samples)
        width = math.ceil(longest / self.pad_to_multiple_of) * self.pad_to_multiple_of
        lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
        labels = _pad_right((sample["labels"] for sample in samples), width, IGNORE_INDEX)
        return {
            "input_ids": _pad_right((sample["input_ids"] for sample in samples), width, self.pad_token_id),
            "labels": labels,
            # tokenize_chats keeps no sample shorter than two tokens.
            "num_tokens": int(lengths[lengths > 1].sum()),
            "num_loss_tokens": int((labels[:, 1:] != IGNORE_INDEX).sum()),
        }


@dataclass(frozen=True)
class PackedCollator:
    """Pad packs to one length on the right, and say where their documents are.

    Args:
        pad_token_id: Fills ``input_ids``.
        pad_to_multiple_of: S is the longest pack rounded up to a multiple of this. Packs of one data set differ by
            about a short sample, so nearly all batches have one shape.
    """

    pad_token_id: int
    pad_to_multiple_of: int = 8

    def __call__(self, packs: Sequence[Sample]) -> PackedBatch:
        """Return the batch of B = ``len(packs)`` packs, from :func:`join_samples`.

        A sample without ``document_lengths`` is a pack of one document. A pack of one token counts as blank.

        Raises:
            ValueError: If the document lengths of a pack do not sum to its tokens.
        """
        padded = ChatCollator(self.pad_token_id, self.pad_to_multiple_of)(packs)
        width = padded["input_ids"].shape[1]
        document_lengths = []
        for pack in packs:
            tokens = len(pack["input_ids"])
            lengths = list(pack.get("document_lengths", [tokens]))
            if sum(lengths) != tokens or min(lengths) < 1:
                raise ValueError(
                    f"document_lengths {lengths} do not divide the {tokens} tokens of their pack: they must be at "
                    "least 1 and sum to that"
                )
            document_lengths.append([*lengths, width - tokens] if tokens < width else lengths)
        position_ids = torch.stack([torch.cat([*map(torch.arange, lengths)]) for lengths in document_lengths])
        # The last token of a document must not learn to predict the first of the next.
        labels = padded["labels"].masked_fill(position_ids == 0, IGNORE_INDEX)
        return {
            "input_ids": padded["input_ids"],
            "position_ids": position_ids,
            "document_lengths": document_lengths,
            "labels": labels,
            "num_tokens": padded["num_tokens"],
            "num_loss_tokens": int((labels[:, 1:] != IGNORE_INDEX).sum()),
        }


def join_samples(samples: Iterable[Sample]) -> Sample:
    """Return the pack of these samples, in their order."""
    pack: Sample = {"input_ids": [], "labels": [], "document_lengths": []}
    for sample in samples:
        pack["input_ids"] += sample["input_ids"]
        pack["labels"] += sample["labels"]
        pack["document_lengths"].append(len(sample["input_ids"]))
    return pack


def _pad_right(rows: Iterable[list[int]], width: int, value: int) -> torch.Tensor:
    return torch.tensor([row + [value] * (width - len(row)) for row in rows], dtype=torch.int64)
