"""Training steps on the same samples, padded or packed: to compare them, and nothing but them."""

from __future__ import annotations

import itertools
import math
import random
import re

from transformers import PreTrainedTokenizerBase

from .chat_template import tokenize_chats
from .collators import ChatCollator, PackedCollator, join_samples
from .packing import pack_samples
from .samples import IGNORE_INDEX, Batch, PackedBatch, Sample
from .stdlib_docs import stdlib_api_cards

_BLANK: Sample = {"input_ids": [0], "labels": [IGNORE_INDEX]}


def demo_samples(tokenizer: PreTrainedTokenizerBase | None, vocab_size: int) -> list[Sample]:
    """The demo data in a model's tokens; without a tokenizer, random tokens of about the same number.

    That number is then a fit to what SmolLM2's tokenizer and chat template make (R2 = 0.91).

    Args:
        tokenizer: The model's; ``None`` for a model of random weights, which has none.
        vocab_size: Random tokens are below this.
    """
    chats = stdlib_api_cards()
    if tokenizer is not None:
        return tokenize_chats(tokenizer, chats, seq_len=2**20).samples
    draw = random.Random(0)
    samples: list[Sample] = []
    for chat in chats:
        text = "\n".join(message["content"] for message in chat["messages"])
        count = 34 + len(re.findall(r"[A-Za-z]{1,8}|\d|[^\w\s]+|_|\n", text))
        ids = draw.choices(range(vocab_size), k=count)
        samples.append({"input_ids": ids, "labels": [IGNORE_INDEX] * (count // 2) + ids[count // 2 :]})
    return samples


def token_counts(samples: list[Sample]) -> list[int]:
    """Tokens of each sample."""
    return [len(sample["input_ids"]) for sample in samples]


def check_rows(samples: list[Sample], lengths: list[int], tokens: int) -> None:
    """Check that rows of each of ``lengths`` hold every sample, and steps of ``tokens`` such rows.

    Raises:
        ValueError: If not, in terms of the flags ``--lengths`` and ``--tokens``.
    """
    longest = max(token_counts(samples))
    if not longest <= min(lengths) <= max(lengths) <= tokens:
        raise ValueError(
            f"--lengths are {lengths}, but must be at least {longest}, for the longest sample, and at most "
            f"--tokens={tokens}."
        )


def draw_steps(samples: list[Sample], lengths: list[int], tokens: int, steps: int) -> list[list[Sample]]:
    """Samples of each step in random order, as many as fit into ``tokens // length`` rows of each of the lengths."""
    order = itertools.cycle(random.Random(0).sample(samples, len(samples)))
    drawn = []
    for _ in range(steps):
        step: list[Sample] = []
        while sum(token_counts(step)) < 0.98 * tokens:
            step.append(next(order))
        while any(len(pack_samples(token_counts(step), length)) > tokens // length for length in lengths):
            step.pop()
        drawn.append(step)
    return drawn


def padded_batches(steps: list[list[Sample]], batch_size: int) -> list[list[Batch]]:
    """For each step the same number of micro-batches of at most ``batch_size`` samples."""
    count = math.ceil(max(map(len, steps)) / batch_size)
    collate = ChatCollator(pad_token_id=0)
    return [[collate(step[i::count] or [_BLANK]) for i in range(count)] for step in steps]


def packed_batches(steps: list[list[Sample]], lengths: list[int]) -> list[list[PackedBatch]]:
    """For each step one micro-batch, of rows of at most as many tokens as its turn in ``lengths`` says."""
    batches = []
    for step, length in zip(steps, itertools.cycle(lengths), strict=False):
        packs = pack_samples(token_counts(step), length)
        batches.append([PackedCollator(pad_token_id=0)([join_samples(step[i] for i in pack) for pack in packs])])
    return batches
