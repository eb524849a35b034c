"""The flags that say what is trained on, and in which batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..options import at_least
from .sources import DEFAULT_DATASET


@dataclass(frozen=True)
class DataOptions:
    """Data.

    The files that ``dataset`` may be stand in :mod:`~lightning_qlora.modules.data.sources`, the formats of rows in
    :mod:`~lightning_qlora.modules.data.formats`.

    Args:
        dataset: A .json, .jsonl, .ndjson, .csv, .tsv or .parquet file (also .gz), a directory of save_to_disk, the name
            of a data set on the Hugging Face hub; or stdlib-api-cards, which is made from Python's own documentation,
            tool-requests, conversations with calls of eight small tools, or bfcl-functions, requests with tools that
            pip fetches. Rows are chats (messages), ShareGPT (conversations), prompt and completion, Alpaca
            (instruction, input, output), Dolly (instruction, context, response), or question and answer; all may have
            tools.
        subset: Subset (configuration) of a data set on the hub.
        split: Split to train on, or a part of one, such as train[:10%].
        val_dataset: Data to validate on, like dataset; used whole. Default: the split validation of dataset, or else
            rows held out of it.
        val_samples: Maximum rows of the split validation to use, or to hold out (never more than a tenth of the data);
            0 turns both off.
        train_on: Train all assistant turns of a chat, or the last one alone.
        chat_template: How turns are written, for base models, which bring no template: plain, chatml, llama3, or a file
            with a Jinja template. Saved beside the adapter. Default: the tokenizer's own.
        pad_token: Token of the vocabulary that fills batches. Default: the tokenizer's, or another special token if
            that one ends texts too.
        skip_bad_rows: Leave out rows that cannot be trained on, with a warning, instead of refusing the data.
        show_samples: Print this many training samples with what is trained in colour, before training and in the
            report.

    Raises:
        ValueError: For a negative count, or an unknown ``train_on``.
    """

    dataset: str = DEFAULT_DATASET
    subset: str | None = None
    split: str = "train"
    val_dataset: str | None = None
    val_samples: int = 32
    train_on: Literal["all", "last"] = "all"
    chat_template: str | None = None
    pad_token: str | None = None
    skip_bad_rows: bool = False
    show_samples: int = 0

    def __post_init__(self) -> None:
        at_least(0, val_samples=self.val_samples, show_samples=self.show_samples)
        if self.train_on not in ("all", "last"):
            raise ValueError(f"--train_on must be 'all' or 'last', got {self.train_on!r}.")


@dataclass(frozen=True)
class BatchOptions:
    """Batches.

    Args:
        batch_size: Samples per micro-batch on each device; with packing, packed rows.
        accumulate: Micro-batches per optimizer step.
        seq_len: Maximum tokens per sample; longer samples are truncated at the end. Each batch is padded to its longest
            sample only.
        packing: Fill rows of up to seq_len tokens with several samples each. Samples in a row do not attend to each
            other.

    Raises:
        ValueError: For a count below 1, or a ``seq_len`` below 2.
    """

    batch_size: int = 4
    accumulate: int = 1
    seq_len: int = 2048
    packing: bool = False

    def __post_init__(self) -> None:
        at_least(1, batch_size=self.batch_size, accumulate=self.accumulate)
        at_least(2, seq_len=self.seq_len)
