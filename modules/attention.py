"""Attention for GPUs without flash attention, as an implementation that transformers' models can be built with.

Where no mask is needed, transformers (5.23) lets SDPA group the queries (``enable_gqa=True``). Only flash attention
can, which needs compute capability 8.0; the memory-efficient kernel takes as many heads of keys as of queries. SDPA
is then left with plain products in float32, which hold all S x S scores
(https://github.com/huggingface/transformers/issues/48633). Repeating keys and values costs S x D a head instead.

Shapes: B samples, S queries, T keys, D head dimension, N heads of queries, K of keys (K divides N).
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

#: Name under which transformers finds :func:`sdpa_repeated_kv`, once it is registered.
SDPA_REPEATED_KV = "sdpa_repeated_kv"

#: First compute capability with flash attention.
FLASH_CAPABILITY = (8, 0)


def default_attention(compute_capability: tuple[int, int] | None) -> str:
    """The attention to train with on a CUDA device of that compute capability, or on the CPU (``None``)."""
    no_flash = compute_capability is not None and compute_capability < FLASH_CAPABILITY
    return SDPA_REPEATED_KV if no_flash else "sdpa"


def register_attention() -> None:
    """Make ``attn_implementation="sdpa_repeated_kv"`` known to transformers, with the masks of its ``"sdpa"``."""
    AttentionInterface.register(SDPA_REPEATED_KV, sdpa_repeated_kv)
    AttentionMaskInterface.register(SDPA_REPEATED_KV, sdpa_mask)


def sdpa_repeated_kv(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers' ``"sdpa"`` computes, with keys and values repeated for the queries that share them.

    Args:
        module: The attention layer; its ``is_causal`` holds if the argument is not given.
        query: [B, N, S, D], float16, bfloat16 or float32, as ``key`` and ``value``.
        key: [B, K, T, D].
        value: [B, K, T, D].
        attention_mask: [B or 1, N or 1, S, T], bool or added to the scores. Without one, several queries are causal and
            a single one (of generation) sees all keys.
        dropout: Probability, 0 outside of training.
        scaling: Of the scores; default D ** -0.5.
        is_causal: Whether queries without a mask see only the keys up to their own position.

    Returns:
        [B, S, N, D], and no attention weights.

    Raises:
        ValueError: For a score cap, a position bias or a paged cache.
    """
    for name in ("softcap", "position_bias", "cache"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{SDPA_REPEATED_KV} knows no {name}. Build the model with attention='eager' or 'sdpa'.")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    # In this order: of symbols, under torch.compile, `and` must not return one.
    is_causal = query.shape[2] > 1 and attention_mask is None and is_causal
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling, is_causal=is_causal
    )
    return output.transpose(1, 2).contiguous(), None
