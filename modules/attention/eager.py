"""Attention in plain products: it supports everything, and holds S x S scores per head.

Shapes: B rows, S tokens per row or queries, T keys, N heads of queries, K of keys and values (K divides N), D head
dimension.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backend import AttentionBackend, document_numbers


class EagerAttention(AttentionBackend):
    """Plain products with a mask of S x S per distinct window, made once per batch.

    Memory: about 10 bytes per score in 16 bit and 13 in float32, for each layer whose activations are kept.
    """

    name = "eager"
    description = "plain products, which hold S x S scores per head"
    caps_scores = True
    drops_out = True
    holds_scores = True

    def prepare(
        self,
        *,
        shape: tuple[int, int],
        device: torch.device,
        document_lengths: list[list[int]] | None,
        windows: tuple[int | None, ...],
    ) -> dict[int | None, Tensor]:
        """Masks by window, bool, [B, 1, S, S] or, where a row is one document, [1, 1, S, S]."""
        position = torch.arange(shape[1], device=device)
        behind = (position[:, None] - position)[None, None]
        visible = behind >= 0
        documents = document_numbers(document_lengths, shape, device)
        if documents is not None:
            visible = visible & (documents[:, None, :, None] == documents[:, None, None, :])
        return {window: visible if window is None else visible & (behind < window) for window in windows}

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prepared: dict[int | None, Tensor],
        *,
        window: int | None,
        scale: float,
        softcap: float | None,
        dropout: float,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`AttentionBackend.attend`."""
        return plain_products(query, key, value, prepared[window], scale=scale, softcap=softcap, dropout=dropout)


def plain_products(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``softmax(cap(scale Q K^T) + mask) V``, with softmax and cap in float32 (float64 for float64).

    Args:
        query: [B, N, S, D], floating point.
        key: [B, K, T, D], same dtype.
        value: [B, K, T, D], same dtype.
        mask: [B or 1, N or 1, S, T], bool (true where a query sees a key) or added to the scores; ``None`` if all
            queries see all keys. A query that sees nothing gets the mean of the values, and no NaN.
        scale: Of the scores.
        softcap: Scores become ``softcap * tanh(score / softcap)``, before the mask; ``None`` leaves them as they are.
        dropout: Probability that a weight becomes 0.

    Returns:
        [B, S, N, D], and the weights [B, N, S, T], both in the dtype of ``query``.
    """
    rows, heads, queries, _ = query.shape
    # The queries that share keys are taken together, so that nothing is repeated. Scaled before the product, which in
    # float16 could overflow.
    grouped = (query * scale).reshape(rows, key.shape[1], -1, query.shape[3])
    scores = (grouped @ key.transpose(2, 3)).view(rows, heads, queries, key.shape[2])
    if scores.dtype.itemsize == 2:
        scores = scores.float()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    weights = F.dropout(scores.softmax(-1).to(query.dtype), dropout, training=dropout > 0)
    output = weights.view(rows, key.shape[1], -1, key.shape[2]) @ value
    return output.view(rows, heads, queries, -1).transpose(1, 2).contiguous(), weights


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """[1, 1, S, T], bool: query i sees the keys up to i, as ``is_causal`` of ``scaled_dot_product_attention``."""
    return torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device).tril()
