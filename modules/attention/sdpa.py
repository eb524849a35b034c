"""torch's ``scaled_dot_product_attention``, in the two forms that its kernels need.

Shapes: B rows, S tokens per row or queries, T keys, N heads of queries, K of keys and values (K divides N), D head
dimension.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .backend import FLASH_CAPABILITY, AttentionBackend, AttentionRequest
from .documents import DocumentKernel, Documents, attend_documents


class Sdpa(AttentionBackend):
    """Whole rows by transformers' own call of it; documents of about equal length together, windows in chunks."""

    name: DocumentKernel = "sdpa"
    description = "torch's `scaled_dot_product_attention`; documents of about equal length together, windows in chunks"
    drops_out = True

    def supports(self, request: AttentionRequest) -> str | None:
        """See :meth:`AttentionBackend.supports`."""
        if request.dropout and request.masked:
            return (
                "drops attention weights on plain rows only, but attention_dropout="
                f"{request.dropout} is asked for with {request.masked}"
            )
        return super().supports(request)

    def form(self, request: AttentionRequest) -> tuple[AttentionBackend, str]:
        """Itself, or with keys and values repeated: see :func:`sdpa_backend`."""
        form = sdpa_backend(request.compute_capability, request.dtype)
        if form is SDPA:
            return self, ""
        return form, "Keys and values are repeated, because no kernel here lets queries share them."

    def prepare(
        self,
        *,
        shape: tuple[int, int],
        device: torch.device,
        document_lengths: list[list[int]] | None,
        windows: tuple[int | None, ...],
    ) -> PackedOrWindowed | None:
        """``None`` for whole rows that need no mask."""
        if document_lengths is None and windows == (None,):
            return None
        lengths = document_lengths or [[shape[1]]] * shape[0]
        documents = Documents.of(self.name, lengths, device)
        return PackedOrWindowed(documents, document_lengths is not None)

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prepared: PackedOrWindowed | None,
        *,
        window: int | None,
        scale: float,
        softcap: float | None,
        dropout: float,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """See :meth:`AttentionBackend.attend`."""
        if prepared is None or (window is None and not prepared.packed):
            return self.whole_rows(module, query, key, value, dropout, scale, **options), None
        assert dropout == 0, "choose_attention refuses dropout"
        return attend_documents(query, key, value, prepared.documents, window=window, scale=scale), None

    def whole_rows(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, dropout: float, scale: float, **options: Any
    ) -> Tensor:
        """Causal attention without a mask: [B, S, N, D]."""
        output: Tensor = sdpa_attention_forward(module, query, key, value, None, dropout, scale, **options)[0]
        return output


class SdpaRepeatedKV(Sdpa):
    """Keys and values are repeated, so that each query has its own: a kernel that holds no scores takes them."""

    name: DocumentKernel = "sdpa_repeated_kv"

    def whole_rows(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, dropout: float, scale: float, **options: Any
    ) -> Tensor:
        """Causal attention without a mask: [B, S, N, D]."""
        return sdpa_repeated_kv(module, query, key, value, None, dropout, scale, **options)[0]


class PackedOrWindowed(NamedTuple):
    """What SDPA needs to know of rows that are not plain.

    Attributes:
        documents: The documents, or whole rows if they pack none.
        packed: Whether rows hold several documents.
    """

    documents: Documents
    packed: bool


SDPA, SDPA_REPEATED_KV = Sdpa(), SdpaRepeatedKV()


def sdpa_backend(compute_capability: tuple[int, int] | None, dtype: torch.dtype) -> Sdpa:
    """How SDPA is best used on a CUDA device of that compute capability, or on the CPU (``None``).

    Of a GPU's kernels only flash attention lets several heads of queries share one of keys (``enable_gqa``); it needs
    capability 8.0 and 16 bit. Otherwise SDPA is left with plain products in float32, which hold all S x S scores
    (https://github.com/huggingface/transformers/issues/48633). Repeating keys and values costs S x D per head instead,
    and lets the memory-efficient kernel do it.
    """
    if compute_capability is None or (compute_capability >= FLASH_CAPABILITY and dtype.itemsize == 2):
        return SDPA
    return SDPA_REPEATED_KV


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
        ValueError: For a soft cap, a position bias or a paged cache.
    """
    for name, instead in (("softcap", "eager' or 'flex"), ("position_bias", "sdpa"), ("cache", "sdpa")):
        if kwargs.get(name) is not None:
            raise ValueError(f"sdpa_repeated_kv does not support {name}. Build the model with attention='{instead}'.")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    # In this order: of symbols, under torch.compile, `and` must not return one.
    is_causal = query.shape[2] > 1 and attention_mask is None and causal_by_default(module, is_causal)
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling, is_causal=is_causal
    )
    return output.transpose(1, 2).contiguous(), None


def causal_by_default(module: nn.Module, is_causal: bool | None) -> bool:
    """Whether queries without a mask are causal: what the call says, else what the layer says."""
    return bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
