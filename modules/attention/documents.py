"""Attention inside each document of packed rows, causal, with or without a sliding window, and no S x S mask.

Two more kernels let all tokens of a document see each other, as patches of an image do: ``flash_full`` is ``flash``,
and ``full`` computes documents of equal length together by ``scaled_dot_product_attention``.

A query sees the keys of its own document up to its own position; with a window of W, the last W of them. The rows of a
batch are laid end to end: documents do not cross rows, so that where each begins says all.

=========== =========================================================================================================
flash       torch's FlashAttention 2 for sequences of unequal length: one kernel, all documents.
xformers    Its memory-efficient attention, block-diagonal: one kernel, all documents, also below capability 8.0.
sdpa        ``scaled_dot_product_attention``, one call for all documents of about one length, padded to the longest.
=========== =========================================================================================================

``sdpa`` puts documents together whose lengths agree when rounded up to a quarter of the next power of two, at most to
128: no more than 2 log2(S) calls for documents of up to S = 512 tokens, S / 128 more above. The padding, less than half
of what was there, comes last in a document, where no token sees it: no mask is needed.

Memory: none of them holds scores or a mask of S x S. To pad, ``sdpa`` copies queries, keys, values and results. For a
window it takes queries in chunks of C, each with the C + W - 1 keys that it may see: a mask of C (C + W - 1) values,
and copies (C + W) / C times the size of keys and values (the gradients of these, in backward), where C is W, but at
least 256 and at most 1024.

Shapes: T tokens of all rows (B x S), N heads of queries, K of keys and values (K divides N), D head dimension.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.varlen import varlen_attn

from ..autograd_in_operators import with_autograd

#: ``sdpa_repeated_kv`` is ``sdpa`` where its kernels want as many heads of keys as of queries.
DocumentKernel = Literal["sdpa", "sdpa_repeated_kv", "flash", "xformers", "full", "flash_full"]


class Documents(NamedTuple):
    """What the layers need to know of a batch's documents. A named tuple, which torch.compile takes apart.

    Attributes:
        kernel: What computes.
        boundaries: [documents + 1], int32: where documents begin among all T tokens, and T. On the device for
            ``flash``; else on the host, which counts.
        places: [T], int64, on the device: where ``sdpa`` puts each token to pad documents; for other kernels [0].
        longest: [length of the longest document, 0]: no data, but torch.compile keeps a size variable, where it would
            compile again for another number.
    """

    kernel: DocumentKernel
    boundaries: Tensor
    places: Tensor
    longest: Tensor

    @classmethod
    def of(cls, kernel: DocumentKernel, lengths: list[list[int]], device: torch.device) -> Documents:
        """Describe rows with documents of ``lengths`` tokens. Nothing waits for the device."""
        flat = [length for row in lengths for length in row]
        boundaries = torch.tensor([0, *itertools.accumulate(flat)], dtype=torch.int32, device="cpu")
        if kernel in ("flash", "flash_full"):
            boundaries = boundaries.to(device, non_blocking=True)
        padded = kernel in ("sdpa", "sdpa_repeated_kv", "full")
        layout = _layout(tuple(flat), kernel == "full").places if padded else []
        places = torch.tensor(layout, dtype=torch.int64, device="cpu")
        longest = torch.empty(max(flat), 0, dtype=torch.int32, device="cpu")
        return cls(kernel, boundaries, places.to(device, non_blocking=True), longest)


def attend_documents(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, *, window: int | None, scale: float
) -> Tensor:
    """:func:`document_attention` of rows: query [B, N, S, D], key and value [B, K, S, D] -> [B, S, N, D]."""
    tokens = [each.transpose(1, 2).flatten(0, 1) for each in (query, key, value)]
    output = document_attention(*tokens, documents=documents, window=window, scale=scale)
    return output.view(query.shape[0], query.shape[2], *output.shape[1:])


def document_attention(
    query: Tensor, key: Tensor, value: Tensor, *, documents: Documents, window: int | None, scale: float
) -> Tensor:
    """Attention of all documents, differentiable, in a graph of torch.compile as one operator.

    Args:
        query: [T, N, D], float16 or bfloat16, or float32 except for ``flash``.
        key: [T, K, D], same dtype.
        value: [T, K, D], same dtype.
        documents: Of these T tokens.
        window: How many tokens of its document one sees, itself included; ``None`` for all before it.
        scale: Of the scores.

    Returns:
        [T, N, D].
    """
    kernel, boundaries, places, longest = documents
    if kernel in ("flash", "flash_full"):
        sides = (-1, -1) if kernel == "flash_full" else (-1, 0) if window is None else (window - 1, 0)
        return _flash(query, key, value, boundaries, longest.shape[0], sides, scale)
    if torch.compiler.is_compiling():  # how often the loop runs depends on data
        return torch.ops.lightning_qlora.document_attention(  # type: ignore[no-any-return]
            query, key, value, boundaries, places, window, scale, kernel
        )
    return _LOOPS[kernel](query, key, value, _lengths(boundaries), places, window, scale)


# ------------------------------------------------------------------------------------------------------------- kernels

#: torch 2.11 takes fewer heads of keys than of queries without being told; later it wants to be.
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def _flash(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, longest: int, sides: tuple[int, int], scale: float
) -> Tensor:
    output = varlen_attn(
        query, key, value, boundaries, boundaries, longest, longest, scale=scale, window_size=sides, **_GROUPED
    )
    assert isinstance(output, Tensor)
    return output


def _xformers(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], _: Tensor, window: int | None, scale: float
) -> Tensor:
    from xformers.ops import memory_efficient_attention

    key, value = (_repeat(each, query) for each in (key, value))  # its grouped form has no backward
    bias = _xformers_bias(lengths, window, query.device)
    output: Tensor = memory_efficient_attention(query[None], key[None], value[None], attn_bias=bias, scale=scale)
    return output[0]


@functools.lru_cache(maxsize=4)  # one per window for all layers of a batch
def _xformers_bias(lengths: tuple[int, ...], window: int | None, device: torch.device) -> Any:
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    blocks = BlockDiagonalMask.from_seqlens(lengths, device=device)
    return blocks.make_causal() if window is None else blocks.make_local_attention(window)


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], places: Tensor, window: int | None,
    scale: float, *, repeat: bool, causal: bool = True,
) -> Tensor:  # fmt: skip
    # With a mask, which a window needs, no kernel on a GPU groups queries but the one that holds all scores.
    if repeat or (window is not None and query.is_cuda):
        key, value = (_repeat(each, query) for each in (key, value))
    layout = _layout(lengths, not causal)
    sizes = [length * count for length, count in layout.batches]
    padded = [layout.pad(each, places) for each in (query, key, value)]
    outputs = []
    for (length, _), *tensors in zip(layout.batches, *(torch.split(each, sizes) for each in padded), strict=True):
        q, k, v = (each.view(-1, length, *each.shape[1:]).transpose(1, 2) for each in tensors)
        attended = _causal(q, k, v, window, scale) if causal else F.scaled_dot_product_attention(q, k, v, scale=scale)
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    output = torch.cat(outputs)
    return output if layout.is_identity else _Unpad.apply(output, places)  # type: ignore[no-any-return,no-untyped-call]


class _Layout(NamedTuple):
    """How documents of unequal length are put together.

    Attributes:
        batches: (tokens of a document, documents), one after another.
        places: Where each token goes, of the sum of all these tokens.
    """

    batches: list[tuple[int, int]]
    places: list[int]

    @property
    def is_identity(self) -> bool:
        """Whether everything stays where it is."""
        return len(self.batches) == 1 and len(self.places) == math.prod(self.batches[0])

    def pad(self, tensor: Tensor, places: Tensor) -> Tensor:
        """[T, ...] to what it is laid out as, with zeros for padding; ``places`` as a tensor on its device."""
        if self.is_identity:
            return tensor
        size = sum(length * count for length, count in self.batches)
        return tensor.new_zeros(size, *tensor.shape[1:]).index_copy_(0, places, tensor)


@functools.lru_cache(maxsize=4)  # one for all layers of a batch
def _layout(lengths: tuple[int, ...], exact: bool = False) -> _Layout:
    """``exact``: only equal lengths go together, because tokens would see the padding."""
    alike: dict[int, list[int]] = {}
    for number, length in enumerate(lengths):
        step = 1 if exact else min(128, max(1, 2 ** (length - 1).bit_length() // 4))
        alike.setdefault(-(-length // step) * step, []).append(number)
    begins, end, batches = [0] * len(lengths), 0, []
    for numbers in alike.values():
        longest = max(lengths[number] for number in numbers)
        for number in numbers:
            begins[number], end = end, end + longest
        batches.append((longest, len(numbers)))
    places = [begin + i for begin, length in zip(begins, lengths, strict=True) for i in range(length)]
    return _Layout(batches, places)


class _Unpad(torch.autograd.Function):
    """Rows ``places`` of a tensor. torch's own indexing adds gradients up, atomically, which is slower."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.size = len(padded)
        return padded.index_select(0, places)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.size, *gradient.shape[1:]).index_copy_(0, places, gradient), None


def _causal(query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float) -> Tensor:
    """[R, N, L, D], and R x K x L x D for keys and values, to [R, N, L, D]: R documents of L tokens."""
    grouped = query.shape[1] != key.shape[1]
    attend = functools.partial(F.scaled_dot_product_attention, scale=scale, enable_gqa=grouped)
    length = query.shape[2]
    if window is None or window >= length:
        return attend(query, key, value, is_causal=True)
    # The first W queries see all keys before them; of the others, each chunk has windows of one form.
    first = attend(query[:, :, :window], key[:, :, :window], value[:, :, :window], is_causal=True)
    chunk = min(max(window, 256), 1024)
    count = -(-(length - window) // chunk)
    padding = (0, 0, 0, window + count * chunk - length)
    queries = F.pad(query[:, :, window:], padding).unfold(2, chunk, chunk)
    keys, values = (F.pad(each[:, :, 1:], padding).unfold(2, chunk + window - 1, chunk) for each in (key, value))
    queries, keys, values = (each.permute(0, 2, 1, 4, 3).flatten(0, 1) for each in (queries, keys, values))
    behind = torch.arange(chunk + window - 1, device=query.device) - torch.arange(chunk, device=query.device)[:, None]
    rest = attend(queries, keys, values, attn_mask=(behind >= 0) & (behind < window))
    rest = rest.view(-1, count, *rest.shape[1:]).transpose(1, 2).flatten(2, 3)
    return torch.cat([first, rest[:, :, : length - window]], dim=2)


def _repeat(tensor: Tensor, query: Tensor) -> Tensor:
    """[T, K, D] -> [T, N, D]."""
    groups = query.shape[1] // tensor.shape[1]
    return tensor if groups == 1 else tensor.repeat_interleave(groups, dim=1)


_LOOPS: dict[str, Callable[..., Tensor]] = {
    "sdpa": functools.partial(_sdpa, repeat=False),
    "sdpa_repeated_kv": functools.partial(_sdpa, repeat=True),
    "full": functools.partial(_sdpa, repeat=False, causal=False),
    "xformers": _xformers,
}


def _lengths(boundaries: Tensor) -> tuple[int, ...]:
    return tuple(boundaries.diff().tolist())


# ----------------------------------------------------------------------------------------------------------- operators

torch.library.define(
    "lightning_qlora::document_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor boundaries, Tensor places, int? window, float scale, str kernel) "
    "-> Tensor",
)

torch.library.define(
    "lightning_qlora::document_attention_backward",
    "(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor boundaries, Tensor places, int? window, "
    "float scale, str kernel) -> (Tensor, Tensor, Tensor)",
)


def _forward(query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, *settings: Any) -> Tensor:
    *others, kernel = settings
    return _LOOPS[kernel](query, key, value, _lengths(boundaries), *others)


def _forward_fake(query: Tensor, *_: Any) -> Tensor:
    return query.new_empty(query.shape)


def _backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, *settings: Any
) -> tuple[Tensor, ...]:
    """The gradients of query, key and value. The forward runs again, for its kernels keep what only they can read."""
    *others, kernel = settings

    def gradients() -> tuple[Tensor, ...]:
        inputs = [each.detach().requires_grad_() for each in (query, key, value)]
        output = _LOOPS[kernel](*inputs, _lengths(boundaries), *others)
        return tuple(each.contiguous() for each in torch.autograd.grad(output, inputs, gradient))

    return with_autograd(gradients, query.device)


def _backward_fake(gradient: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
    return tuple(each.new_empty(each.shape) for each in tensors[:3])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.settings = inputs[5:]


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.lightning_qlora.document_attention_backward(gradient, *ctx.saved_tensors, *ctx.settings)
    return *gradients, None, None, None, None, None


torch.library.impl("lightning_qlora::document_attention", "default", _forward)

torch.library.impl("lightning_qlora::document_attention_backward", "default", _backward)

torch.library.register_fake("lightning_qlora::document_attention", _forward_fake)

torch.library.register_fake("lightning_qlora::document_attention_backward", _backward_fake)

torch.library.register_autograd("lightning_qlora::document_attention", _differentiate, setup_context=_keep)
