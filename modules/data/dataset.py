"""Tokenized samples in memory, and the blank one for ranks that get none of the last batch."""

from collections.abc import Sequence

from torch.utils.data import Dataset

from .samples import IGNORE_INDEX, Sample


class ChatDataset(Dataset[Sample]):
    """Tokenized chats, plus one blank sample at index ``len(self)``: a single token without a label.

    Args:
        samples: The tokenized chats.
        blank_token_id: The token of the blank sample, usually the pad token.
    """

    def __init__(self, samples: Sequence[Sample], blank_token_id: int) -> None:
        self.replace(samples)
        self.blank: Sample = {"input_ids": [blank_token_id], "labels": [IGNORE_INDEX]}

    def replace(self, samples: Sequence[Sample]) -> None:
        """Hold other samples, also for the loaders that have this data set already."""
        import datasets  # here: it takes a second to import

        # Arrow holds the lists: compact, and shared with loader workers instead of copied. Built in memory, so no cache
        # files.
        self.rows = datasets.Dataset.from_list(list(samples)) if samples else []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        if index == len(self):
            return self.blank
        row: Sample = self.rows[index]
        return row
