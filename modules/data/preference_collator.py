"""Documents to batches: the two of a pair side by side, in a packed row or as rows of their own.

A *document* is a prompt with one answer, of which the answer is trained. The loss compares documents, so whole
documents stay together: a pair's two are neighbours in a packed row, or rows of one batch.

Shapes: B rows of a batch, S the longest of them, rounded up; P pairs or labelled answers; D documents.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .collators import ChatCollator, PackedCollator, join_samples
from .samples import IGNORE_INDEX, Sample

#: What the other answer's columns begin with, in samples of labelled answers.
OTHER = "other_"


@dataclass(frozen=True)
class PreferenceCollator:
    """Batches of documents, padded on the right.

    Args:
        pad_token_id: Fills ``input_ids``.
        packed: Keep a sample's documents in one row; else each document has its own.
        pad_to_multiple_of: S is the longest row rounded up to a multiple of this.
    """

    pad_token_id: int
    packed: bool = False
    pad_to_multiple_of: int = 8

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch for :class:`~lightning_qlora.modules.training.preference.QLoRAPreference`.

        A sample holds one or more pairs or labelled answers: ``input_ids`` and ``labels`` of its documents one after
        another, ``document_lengths``, and ``index``, the place of each pair or answer in the data. Labelled answers
        also have ``desirable``, and ``other_input_ids``, ``other_labels``, ``other_document_lengths``: the same prompts
        with answers to other prompts. A sample without pairs or answers is blank.

        Returns:
            ``input_ids`` and ``labels`` int64 [B, S], ``num_tokens``, ``num_loss_tokens`` and, packed, ``position_ids``
            and ``document_lengths``, all as of :class:`ChatCollator` and :class:`PackedCollator`; ``documents`` int64
            [D], which of all documents these are, leaving out padding and blank ones, in the order of the data (the two
            of a pair one after the other); ``completion_tokens`` float32 [D], how many tokens of each are trained;
            ``index`` int64 [P]; ``num_pairs``, P. Labelled answers: ``desirable`` bool [P], and ``other``, a batch of
            the other documents.
        """
        batch = self._documents(samples)
        index = [place for sample in samples for place in sample["index"]]
        batch |= {"index": torch.tensor(index, dtype=torch.int64), "num_pairs": len(index)}
        if "desirable" in samples[0]:
            flags = [flag for sample in samples for flag in sample["desirable"]]
            batch["desirable"] = torch.tensor(flags, dtype=torch.bool)
            names = ("input_ids", "labels", "document_lengths")
            others = [{"index": each["index"], **{name: each[OTHER + name] for name in names}} for each in samples]
            batch["other"] = self._documents(others)
        return batch

    def _documents(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        split = [[*_documents_of(sample)] for sample in samples]
        if self.packed:
            rows = [join_samples(documents) for documents in split]
            batch: dict[str, Any] = {**PackedCollator(self.pad_token_id, self.pad_to_multiple_of)(rows)}
            counts = [len(lengths) for lengths in batch["document_lengths"]]  # with padding, a document at a row's end
        else:
            flat = [document for documents in split for document in documents]
            batch = {**ChatCollator(self.pad_token_id, self.pad_to_multiple_of)(flat)}
            counts = [len(documents) for documents in split]
        firsts = itertools.accumulate(counts, initial=0)
        real = [len(documents) if sample["index"] else 0 for documents, sample in zip(split, samples, strict=True)]
        numbers = [first + i for first, count in zip(firsts, real, strict=False) for i in range(count)]
        tokens = [
            sum(label != IGNORE_INDEX for label in document["labels"][1:])
            for documents, sample in zip(split, samples, strict=True)
            for document in documents
            if sample["index"]
        ]
        batch["documents"] = torch.tensor(numbers, dtype=torch.int64)
        batch["completion_tokens"] = torch.tensor(tokens, dtype=torch.float32)
        return batch


def _documents_of(sample: Mapping[str, Any]) -> Iterator[Sample]:
    start = 0
    for length in sample["document_lengths"]:
        end = start + length
        yield {"input_ids": sample["input_ids"][start:end], "labels": sample["labels"][start:end]}
        start = end
