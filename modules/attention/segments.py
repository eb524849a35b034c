"""Attention in both directions inside each segment of a row: patches that belong to one image, or to one window of it.

Shapes: B rows, S tokens per row, N heads, D head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .backend import FLASH_CAPABILITY, AttentionBackend
from .documents import DocumentKernel, Documents, attend_documents
from .transformers_interface import BatchAttention


class SegmentAttention(AttentionBackend):
    """All tokens of a segment see each other, and no others: FlashAttention 2 where it runs, else SDPA.

    It is no choice of a user's, and so it is not in the table of backends.
    """

    name = "segments"
    description = "attention in both directions inside each image or window"

    def prepare(
        self,
        *,
        shape: tuple[int, int],
        device: torch.device,
        document_lengths: list[list[int]] | None,
        windows: tuple[int | None, ...],
    ) -> Documents:
        """The segments, whose lengths sum to B S; whole rows without ``document_lengths``."""
        capable = device.type == "cuda" and torch.cuda.get_device_capability(device) >= FLASH_CAPABILITY
        sixteen_bit = torch.is_autocast_enabled(device.type) or torch.get_default_dtype().itemsize == 2
        kernel: DocumentKernel = "flash_full" if capable and sixteen_bit else "full"
        return Documents.of(kernel, document_lengths or [[shape[1]]] * shape[0], device)

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prepared: Documents,
        *,
        window: int | None,
        scale: float,
        softcap: float | None,
        dropout: float,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """See :meth:`AttentionBackend.attend`.

        Raises:
            ValueError: For dropout of attention weights.
        """
        if dropout:
            raise ValueError(
                f"The vision tower's attention_dropout is {dropout}, which attention per image does not have. Set it "
                "to 0 in the vision_config of config.json."
            )
        # Rotary embeddings may come in float32, and autocast does not see into the operator that torch.compile makes.
        on = torch.is_autocast_enabled(value.device.type)
        dtype = torch.get_autocast_dtype(value.device.type) if on else value.dtype
        query, key, value = (each.to(dtype) for each in (query, key, value))
        return attend_documents(query, key, value, prepared, window=None, scale=scale), None


SEGMENTS = SegmentAttention()


def segment_attention(lengths: list[int], device: torch.device) -> BatchAttention:
    """What layers need to know of one row with segments of these lengths. Nothing waits for the device."""
    shape = (1, sum(lengths))
    prepared = SEGMENTS.prepare(shape=shape, device=device, document_lengths=[lengths], windows=(None,))
    return BatchAttention(SEGMENTS, (None,), prepared)
