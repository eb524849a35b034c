"""How attention reaches transformers' layers: inputs that are prepared once per batch, and the function they call.

Calls that training does not make (a KV cache, a mask of the user's) go to SDPA with transformers' masks, whatever the
backend; with a soft cap, to plain products with those masks.

Shapes: B rows, S tokens per row or queries, T keys, N heads of queries, K of keys (K divides N), D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.masking_utils import and_masks, sdpa_mask, sliding_window_overlay

from .backend import AttentionBackend
from .choice import find_backend
from .eager import causal_mask, plain_products
from .sdpa import causal_by_default, sdpa_repeated_kv


class BatchAttention(NamedTuple):
    """What the layers need to know of a batch's attention. A named tuple, which torch.compile takes apart.

    Attributes:
        backend: What computes.
        windows: The windows that were prepared.
        prepared: From the backend's ``prepare``.
    """

    backend: AttentionBackend
    windows: tuple[int | None, ...]
    prepared: Any


def attention_inputs(
    backend: str | AttentionBackend,
    *,
    shape: tuple[int, int],
    device: torch.device,
    document_lengths: list[list[int]] | None = None,
    windows: tuple[int | None, ...] = (None,),
) -> dict[str, Any]:
    """Keyword arguments of transformers' model that make a batch's attention causal inside its documents.

    Call it once per batch, outside of what is compiled. Nothing waits for the device.

    Args:
        backend: What computes, from :func:`~.choice.choose_attention`, or its name.
        shape: [B, S] of the batch.
        device: Of the batch.
        document_lengths: The lengths of the documents per row, which sum to S; ``None`` if a row is one document.
        windows: The distinct attention windows of the model's layers: see ``attention_window`` in :func:`attention`.

    Raises:
        ValueError: If ``document_lengths`` do not describe the batch.
    """
    rows, length = shape
    if document_lengths is not None:
        fits = [sum(row) == length and min(row) > 0 for row in document_lengths]
        if len(fits) != rows or not all(fits):
            raise ValueError(
                f"document_lengths must list, for each of {rows} rows, lengths of at least 1 that sum to its {length} "
                f"tokens (padding is a document too), got {document_lengths}."
            )
    backend, windows = find_backend(backend), tuple(dict.fromkeys(windows))
    prepared = backend.prepare(shape=shape, device=device, document_lengths=document_lengths, windows=windows)
    return {
        # transformers hands on what has four dimensions as it is. Otherwise it would look for documents in the
        # positions, which waits for the device, and make a mask of S x S for them.
        "attention_mask": torch.empty(1, 1, 1, 0, device="cpu"),
        "batch_attention": BatchAttention(backend, windows, prepared),
    }


#: transformers' name of all backends. Without the word "flash", by which it knows an implementation of its own.
IMPLEMENTATION = "lightning_qlora"


def register_attention() -> None:
    """Make ``attn_implementation="lightning_qlora"`` known to transformers, attention and masks."""
    AttentionInterface.register(IMPLEMENTATION, attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    softcap: float | None = None,
    batch_attention: BatchAttention | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What an attention layer of transformers calls.

    Args:
        module: The layer. Its attribute ``attention_window`` is its window in tokens, including the current one;
            ``None``, or no such attribute, means full causal attention.
        query: [B, N, S, D], float16, bfloat16 or float32.
        key: [B, K, T, D], same dtype.
        value: [B, K, T, D], same dtype.
        attention_mask: [B or 1, N or 1, S, T], bool or added to the scores; only without ``batch_attention``.
        dropout: Probability, 0 outside of training.
        scaling: Of the scores; default D ** -0.5.
        softcap: Cap of the scaled scores, or ``None``.
        batch_attention: From :func:`attention_inputs`. Without it, the mask decides who sees whom.

    Returns:
        [B, S, N, D], and the attention weights [B, N, S, T] where plain products are computed.

    Raises:
        ValueError: For a window that was not prepared, and for a soft cap that the backend does not support.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if batch_attention is None:
        if softcap is None and not kwargs.get("output_attentions"):
            return sdpa_repeated_kv(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
        return _plain_products(module, query, key, value, attention_mask, dropout, scale, softcap, **kwargs)
    backend, windows, prepared = batch_attention
    window = getattr(module, "attention_window", None)
    if window not in windows:
        raise ValueError(
            f"A layer's attention_window is {window}, but the batch was prepared for {windows}: give attention_inputs "
            "the windows of all layers."
        )
    if softcap is not None and not backend.caps_scores:
        raise ValueError(
            f"attention={backend.name!r} cannot cap scores, but a layer asks for softcap={softcap}. Build the model "
            "with attention='flex' or 'eager', or what choose_attention('auto', AttentionRequest(softcap=True, ...)) "
            "returns."
        )
    return backend.attend(
        module, query, key, value, prepared, window=window, scale=scale, softcap=softcap, dropout=dropout, **kwargs
    )


def _plain_products(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scale: float,
    softcap: float | None,
    *,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """With transformers' mask, which is left out where SDPA's ``is_causal`` would do."""
    for name in ("position_bias", "cache"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{IMPLEMENTATION!r} does not support {name} with a soft cap or output_attentions.")
    if mask is None and query.shape[2] > 1 and causal_by_default(module, is_causal):
        mask = causal_mask(query.shape[2], key.shape[2], query.device)
    return plain_products(query, key, value, mask, scale=scale, softcap=softcap, dropout=dropout)


def _mask(
    *, mask_function: Callable[..., Any], config: PretrainedConfig, local_size: int | None = None, **options: Any
) -> Tensor | None:
    """transformers' mask for SDPA, with the window that the user gave a model (``config.attention_window``).

    Windows that a model has by itself are in ``mask_function`` already, and their size in ``local_size``.
    """
    window = getattr(config, "attention_window", None)
    if window is not None:
        mask_function = and_masks(mask_function, sliding_window_overlay(window))
        local_size = window if local_size is None else min(window, local_size)
    mask: Tensor | None = sdpa_mask(mask_function=mask_function, config=config, local_size=local_size, **options)
    return mask
