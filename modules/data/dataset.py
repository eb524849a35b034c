"""Tokenized samples in memory, and the blank one for ranks that get none of the last batch."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset

from .samples import IGNORE_INDEX, Sample


class SampleDataset(Dataset[Any]):
    """Samples, plus a blank one at index ``len(self)``.

    Args:
        samples: Dicts of lists, all with the same keys.
        blank: A sample that adds nothing to the loss.
    """

    def __init__(self, samples: Sequence[Mapping[str, Any]], blank: Mapping[str, Any]) -> None:
        self.replace(samples)
        self.blank = blank

    def replace(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """Hold other samples, also for the loaders that have this data set already."""
        import datasets  # here: it takes a second to import

        # Arrow holds the lists: compact, and shared with loader workers instead of copied. Built in memory, so no cache
        # files.
        self.rows = datasets.Dataset.from_list(list(samples)) if samples else []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.blank if index == len(self) else self.rows[index]


class ChatDataset(SampleDataset):
    """Tokenized chats; the blank sample is a single token without a label.

    Args:
        samples: The tokenized chats.
        blank_token_id: The token of the blank sample, usually the pad token.
    """

    def __init__(self, samples: Sequence[Sample], blank_token_id: int) -> None:
        super().__init__(samples, {"input_ids": [blank_token_id], "labels": [IGNORE_INDEX]})
