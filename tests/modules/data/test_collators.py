"""Samples and packs to batches, each against tensors written out here."""

from typing import Any

import pytest
import torch

from lightning_qlora.modules.data.collators import ChatCollator, PackedCollator, join_samples
from lightning_qlora.modules.data.samples import IGNORE_INDEX
from tests.chats import numbered


def test_a_batch_is_padded_to_its_longest_sample_rounded_up():
    samples: list[Any] = [
        {"input_ids": [5, 6, 7], "labels": [IGNORE_INDEX, 6, 7]},
        {"input_ids": [8] * 5, "labels": [8] * 5},
    ]
    batch = ChatCollator(pad_token_id=9, pad_to_multiple_of=4)(samples)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 9, 9, 9, 9, 9], [8, 8, 8, 8, 8, 9, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 6, 7] + [-100] * 5, [8] * 5 + [-100] * 3]
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    # The first token of a sample is never predicted, so its label does not count.
    assert (batch["num_tokens"], batch["num_loss_tokens"]) == (8, 2 + 4)
    assert type(batch["num_tokens"]) is type(batch["num_loss_tokens"]) is int
    # Nothing is moved to the device that no model input needs; attention is causal and padding is on the right.
    assert batch.keys() == {"input_ids", "labels", "num_tokens", "num_loss_tokens"}


def test_a_blank_batch_counts_nothing():
    dataset = numbered(3)
    batch = ChatCollator(pad_token_id=0)([dataset[len(dataset)]])
    assert (batch["num_tokens"], batch["num_loss_tokens"]) == (0, 0)
    assert batch["input_ids"].tolist() == [[0] * 8]
    assert (batch["labels"] == IGNORE_INDEX).all()


def test_packs_are_padded_and_their_documents_told_apart():
    samples: list[Any] = [
        {"input_ids": [5, 6, 7], "labels": [IGNORE_INDEX, 6, 7]},
        {"input_ids": [8, 8], "labels": [8, 8]},
        {"input_ids": [9, 10, 11, 12], "labels": [9, IGNORE_INDEX, 11, 12]},
    ]
    packs = [join_samples(samples[:2]), samples[2]]
    assert packs[0] == {
        "input_ids": [5, 6, 7, 8, 8],
        "labels": [IGNORE_INDEX, 6, 7, 8, 8],
        "document_lengths": [3, 2],
    }
    batch = PackedCollator(pad_token_id=1, pad_to_multiple_of=5)(packs)
    tensors = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
    assert {key: tensor.tolist() for key, tensor in tensors.items()} == {
        "input_ids": [[5, 6, 7, 8, 8], [9, 10, 11, 12, 1]],
        "position_ids": [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]],
        # Neither 7 nor 8 predicts what another document begins with.
        "labels": [[-100, 6, 7, -100, 8], [-100, -100, 11, 12, -100]],
    }
    assert {tensor.dtype for tensor in tensors.values()} == {torch.int64}
    assert batch["document_lengths"] == [[3, 2], [4, 1]]
    assert (batch["num_tokens"], batch["num_loss_tokens"]) == (9, 3 + 2)
    counts = [batch["num_tokens"], batch["num_loss_tokens"], *batch["document_lengths"][1]]
    assert {type(count) for count in counts} == {int}
    # The counts are those of the same samples in a batch that is not packed.
    unpacked = ChatCollator(pad_token_id=1)(samples)
    assert (unpacked["num_tokens"], unpacked["num_loss_tokens"]) == (9, 5)


def test_a_blank_pack_counts_nothing_but_has_documents():
    dataset = numbered(3)
    batch = PackedCollator(pad_token_id=0)([dataset[len(dataset)]])
    assert (batch["num_tokens"], batch["num_loss_tokens"]) == (0, 0)
    assert (batch["labels"] == IGNORE_INDEX).all()
    assert batch["document_lengths"] == [[1, 7]]


@pytest.mark.parametrize("document_lengths", [[], [2], [2, 2], [3, 0], [4, -1]])
def test_document_lengths_that_do_not_divide_a_pack_are_refused(document_lengths):
    pack: Any = {"input_ids": [1, 2, 3], "labels": [1, 2, 3], "document_lengths": document_lengths}
    with pytest.raises(ValueError, match="do not divide the 3 tokens of their pack"):
        PackedCollator(pad_token_id=0)([pack])
