"""The flags that say what is trained on, and in which batches."""

from __future__ import annotations

from dataclasses import dataclass

from ..options import at_least
from .sources import DEFAULT_DATASET


@dataclass(frozen=True)
class BatchOptions:
    """Data and batches.

    Args:
        dataset: JSON or JSONL file of chats (messages) or instruction/response pairs, the name of a data set on the
            Hugging Face hub, or stdlib-api-cards, which is made from Python's own documentation.
        batch_size: Samples per micro-batch on each device; with packing, packed rows.
        accumulate: Micro-batches per optimizer step.
        seq_len: Maximum tokens per sample; longer samples are truncated at the end. Each batch is padded to its longest
            sample only.
        packing: Fill rows of up to seq_len tokens with several samples each. Samples in a row do not attend to each
            other.

    Raises:
        ValueError: For a count below 1, or a ``seq_len`` below 2.
    """

    dataset: str = DEFAULT_DATASET
    batch_size: int = 4
    accumulate: int = 1
    seq_len: int = 2048
    packing: bool = False

    def __post_init__(self) -> None:
        at_least(1, batch_size=self.batch_size, accumulate=self.accumulate)
        at_least(2, seq_len=self.seq_len)
