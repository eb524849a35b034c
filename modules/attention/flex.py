"""torch's flex attention: Triton code that torch.compile makes for the mask and the soft cap.

Shapes: B rows, S tokens per row, N heads of queries, K of keys and values (K divides N), D head dimension.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from .backend import AttentionBackend, AttentionRequest, document_numbers


class FlexAttention(AttentionBackend):
    """A block mask per distinct window, and soft caps as a ``score_mod``."""

    name = "flex"
    description = "torch's flex attention: block masks, compiled to Triton"
    caps_scores = True

    def supports(self, request: AttentionRequest) -> str | None:
        """See :meth:`AttentionBackend.supports`."""
        if request.compute_capability is None:
            return "needs a GPU, because torch's flex attention has no backward on the CPU"
        if not request.new_gpu:
            return f"needs tensor cores in Triton (compute capability 8.0), but this is {request.device}"
        return super().supports(request)

    def gives_way(self, request: AttentionRequest) -> bool:
        """On older GPUs, where it would run, but slower than anything else."""
        return request.compute_capability is not None and not request.new_gpu

    def prepare(
        self,
        *,
        shape: tuple[int, int],
        device: torch.device,
        document_lengths: list[list[int]] | None,
        windows: tuple[int | None, ...],
    ) -> dict[int | None, Blocks]:
        """:class:`Blocks` by window."""
        documents = document_numbers(document_lengths, shape, device)
        return {window: Blocks.of(documents, window, shape, device) for window in windows}

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prepared: dict[int | None, Blocks],
        *,
        window: int | None,
        scale: float,
        softcap: float | None,
        dropout: float,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """See :meth:`AttentionBackend.attend`."""
        assert dropout == 0, "choose_attention refuses dropout"
        # Not compiled, it would compute all scores.
        alone = query.is_cuda and not torch.compiler.is_compiling()
        flex: Any = _compiled(flex_attention) if alone else flex_attention
        mask = prepared[window].mask(query.shape[2])
        cap: dict[str, Any] = {}
        if softcap is not None:
            # Compiled by itself, with dynamic shapes, a number would become an input that flex attention does not take.
            cap["score_mod"] = _capped(query.new_full((), softcap, dtype=torch.float32) if alone else softcap)
        return flex(query, key, value, block_mask=mask, scale=scale, enable_gqa=True, **cap).transpose(1, 2), None


class Blocks(NamedTuple):
    """What a ``BlockMask`` is made of. As tensors, because in a ``BlockMask`` torch.compile takes S for a constant.

    Attributes:
        tensors: int32, in the order of ``_BLOCK_MASK``: for each row of blocks of scores which ones any query sees, and
            which need no mask; for each column likewise. 16 (S / 128)^2 bytes per row of the batch.
        documents: [B, S], int32: the number of each token's document; ``None`` if a row is one.
        window: W, or ``None``.
    """

    tensors: tuple[Tensor, ...]
    documents: Tensor | None
    window: int | None

    @classmethod
    def of(cls, documents: Tensor | None, window: int | None, shape: tuple[int, int], device: torch.device) -> Blocks:
        """Of rows [B, S] whose documents are numbered, or of any rows if ``documents`` is ``None``."""
        rows = None if documents is None else shape[0]
        make = _compiled(create_block_mask) if device.type == "cuda" else create_block_mask
        mask = make(_visible(documents, window), rows, None, shape[1], shape[1], device=device, BLOCK_SIZE=_BLOCK)
        return cls(tuple(getattr(mask, name) for name in _BLOCK_MASK), documents, window)

    def mask(self, length: int) -> BlockMask:
        """For S tokens."""
        tensors: dict[str, Any] = dict(zip(_BLOCK_MASK, self.tensors, strict=True))
        visible = _visible(self.documents, self.window)
        return BlockMask(seq_lengths=(length, length), BLOCK_SIZE=(_BLOCK, _BLOCK), mask_mod=visible, **tensors)


_BLOCK_MASK = (
    "kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices",
    "q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices",
)  # fmt: skip

#: Rows and columns of a block of scores, torch's default.
_BLOCK = 128


def _visible(documents: Tensor | None, window: int | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Whether a query sees a key, of rows whose documents are numbered in ``documents`` [B, S]."""

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = query >= key
        if window is not None:
            seen = seen & (query - key < window)
        if documents is not None:
            seen = seen & (documents[row, query] == documents[row, key])
        return seen

    return visible


def _capped(cap: float | Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    def capped(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return capped


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)
