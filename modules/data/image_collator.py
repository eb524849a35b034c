"""Batches of samples with and without images. Shapes: B samples, S the longest of them, rounded up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .collators import ChatCollator
from .image_processing import ImageProcessing
from .images import ImageTable
from .samples import Sample


@dataclass(frozen=True)
class ImageCollator:
    """Pad samples to one length on the right, and decode their images.

    Args:
        processing: Of the model's family.
        table: The data set's images.
        pad_token_id: Fills ``input_ids``.
        pad_to_multiple_of: S is the longest sample rounded up to a multiple of this.
    """

    processing: ImageProcessing
    table: ImageTable
    pad_token_id: int
    pad_to_multiple_of: int = 8

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """The batch of B = ``len(samples)`` samples, as the stock processor of the family makes it.

        Returns:
            As :class:`~lightning_qlora.modules.data.samples.Batch`; ``attention_mask`` int64 [B, S] if anything is
            padded; and what the family's model takes beside them: the images of all samples in order, unless the batch
            has none, and marks of the tokens that stand for images.

        Raises:
            ValueError: If an image is not the one any more that was checked.
        """
        batch: dict[str, Any] = {**ChatCollator(self.pad_token_id, self.pad_to_multiple_of)(samples)}
        input_ids = batch["input_ids"]
        lengths = torch.tensor([[len(sample["input_ids"])] for sample in samples])
        if int(lengths.min()) < input_ids.shape[1]:
            batch["attention_mask"] = (torch.arange(input_ids.shape[1]) < lengths).long()
        images = [
            [
                (self.table.load(index, side), side)
                for index, side in zip(sample.get("images", ()), sample.get("max_sides", ()), strict=True)
            ]
            for sample in samples
        ]
        pixels = self.processing.pixels(images) if any(images) else {}
        return batch | self.processing.token_inputs(input_ids, pixels) | pixels
