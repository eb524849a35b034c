"""One kernel for all documents of a batch: torch's FlashAttention 2 and xformers' memory-efficient attention.

Shapes: B rows, S tokens per row, N heads of queries, K of keys and values (K divides N), D head dimension.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from .backend import AttentionBackend, AttentionRequest
from .documents import DocumentKernel, Documents, attend_documents


class _Varlen(AttentionBackend):
    name: DocumentKernel

    def prepare(
        self,
        *,
        shape: tuple[int, int],
        device: torch.device,
        document_lengths: list[list[int]] | None,
        windows: tuple[int | None, ...],
    ) -> Documents:
        """The documents, or whole rows if they pack none."""
        lengths = document_lengths or [[shape[1]]] * shape[0]
        return Documents.of(self.name, lengths, device)

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
        """See :meth:`AttentionBackend.attend`."""
        assert dropout == 0, "choose_attention refuses dropout"
        return attend_documents(query, key, value, prepared, window=window, scale=scale), None


class FlashAttention(_Varlen):
    """torch's ``varlen_attn``."""

    name: DocumentKernel = "flash"
    description = "torch's own FlashAttention 2 (`varlen_attn`, no package), one kernel for all documents"

    def supports(self, request: AttentionRequest) -> str | None:
        """See :meth:`AttentionBackend.supports`."""
        if not request.new_gpu or request.dtype.itemsize != 2:
            return f"needs compute capability 8.0 and 16 bit, but this is {request.here}"
        return super().supports(request)


class XformersAttention(_Varlen):
    """Its ``memory_efficient_attention``, block-diagonal; also below capability 8.0."""

    name: DocumentKernel = "xformers"
    description = "xformers' memory-efficient attention (extra `xformers`), one kernel for all documents"

    def supports(self, request: AttentionRequest) -> str | None:
        """See :meth:`AttentionBackend.supports`."""
        if request.compute_capability is None:
            return "needs a GPU, but this is the CPU"
        return super().supports(request)

    def missing(self, request: AttentionRequest) -> str | None:
        """The package, or one that was built for this torch."""
        if importlib.util.find_spec("xformers") is None:
            return "needs the package xformers: pip install 'lightning-qlora[xformers]'"
        if torch.cuda.is_available() and (fault := _fault_of_xformers(request.dtype)):
            return (
                f"cannot run, because the installed xformers says {fault!r}. Its wheels are built for one version of "
                "torch each (python -m xformers.info)"
            )
        return None


@functools.cache
def _fault_of_xformers(dtype: torch.dtype) -> str | None:
    """Why the installed package cannot compute on this GPU; ``None`` if it can."""
    from xformers.ops import memory_efficient_attention

    tensor = torch.zeros(1, 8, 1, 64, dtype=dtype, device="cuda")
    try:
        memory_efficient_attention(tensor, tensor, tensor)
    except NotImplementedError as error:
        return str(error).partition("\n")[0]
    return None
