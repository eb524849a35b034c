"""Which attention a model trains with, behind one name, and how it reaches transformers' layers.

======== ====================================================== ===================================================
backend  computes with                                          needs
======== ====================================================== ===================================================
sdpa     torch's ``scaled_dot_product_attention``               nothing
flash    torch's FlashAttention 2 for unequal lengths           capability 8.0, 16 bit
xformers its memory-efficient attention                         a GPU, the package
flex     Triton code that torch.compile makes for the mask      capability 8.0
======== ====================================================== ===================================================

All compute the same: causal attention inside each document of a row (a row that packs none is one document), with a
sliding window if one is asked for. What they need to know of a batch is prepared once, by :func:`attention_inputs`, and
reaches the layers as keyword arguments. Calls that training does not make (a cache, a mask of the user's) go to SDPA
with transformers' masks, whatever the backend.

Shapes: B rows, S tokens a row or queries, T keys, D head dimension, N heads of queries, K of keys (K divides N).
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import and_masks, sdpa_mask, sliding_window_overlay

from .documents import Documents, document_attention

AttentionName = Literal["auto", "sdpa", "flex", "flash", "xformers"]

#: What computes: a name of :data:`AttentionName`, or ``"sdpa_repeated_kv"``, see :func:`sdpa_backend`.
Backend = Literal["sdpa", "sdpa_repeated_kv", "flex", "flash", "xformers"]

SDPA_REPEATED_KV: Backend = "sdpa_repeated_kv"

#: First compute capability with flash attention, and with tensor cores in Triton.
FLASH_CAPABILITY = (8, 0)


# --------------------------------------------------------------------------------------------------------- the choice


def sdpa_backend(compute_capability: tuple[int, int] | None, dtype: torch.dtype) -> Backend:
    """How SDPA is best used on a CUDA device of that compute capability, or on the CPU (``None``).

    Of a GPU's kernels only flash attention lets several heads of queries share one of keys (``enable_gqa``); it needs
    capability 8.0 and 16 bit. Otherwise SDPA is left with plain products in float32, which hold all S x S scores
    (https://github.com/huggingface/transformers/issues/48633). Repeating keys and values costs S x D a head instead,
    and lets the memory-efficient kernel do it.
    """
    if compute_capability is None or (compute_capability >= FLASH_CAPABILITY and dtype.itemsize == 2):
        return "sdpa"
    return SDPA_REPEATED_KV


def check_attention(name: str, sliding_window: int | None) -> None:
    """Check what needs no device.

    Raises:
        ValueError: For an unknown name or a window below 1.
    """
    known = [*get_args(AttentionName), "eager"]
    if name not in known:
        raise ValueError(f"attention must be one of {', '.join(map(repr, known))}, got {name!r}.")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(
            f"sliding_window must be at least 1 (a token that sees only itself), got {sliding_window}. For "
            "none, leave it out."
        )


def choose_attention(
    name: str,
    *,
    packed: bool,
    sliding_window: int | None,
    compute_capability: tuple[int, int] | None,
    dtype: torch.dtype,
    dropout: float = 0.0,
) -> tuple[str, str]:
    """What computes attention, and why.

    Args:
        name: An :data:`AttentionName`; or ``"eager"``, transformers' own plain products, to compare with.
        packed: Whether rows hold several documents.
        sliding_window: How many tokens one sees, itself included; ``None`` for all before it.
        compute_capability: Of the CUDA device, or ``None`` for the CPU.
        dtype: Of queries, keys and values.
        dropout: Of the attention weights.

    Returns:
        A :data:`Backend` (or ``"eager"``) and a sentence for the reader.

    Raises:
        ValueError: For what that attention cannot do here; there is never another mask than the one asked for.
    """
    check_attention(name, sliding_window)
    cpu, sixteen = compute_capability is None, dtype.itemsize == 2
    here = "the CPU" if cpu else f"a GPU of compute capability {'.'.join(map(str, compute_capability or ()))}"
    new_enough = compute_capability is not None and compute_capability >= FLASH_CAPABILITY
    masked = " and ".join([*["packed rows"] * packed, *["a sliding window"] * (sliding_window is not None)])
    if dropout and (masked or name not in ("auto", "sdpa", "eager")):
        raise ValueError(
            f"attention_dropout={dropout} cannot be had with {masked or f'attention={name!r}'}: only attention='sdpa' "
            "on rows that are not packed drops out. Set it to 0 in the model's config.json."
        )
    if name == "eager":
        if masked:
            raise ValueError(f"attention='eager' knows neither packed rows nor windows, but {masked} is asked for.")
        return name, "As asked for; it holds S x S scores a head."

    sdpa = sdpa_backend(compute_capability, dtype)
    repeats = "" if sdpa == "sdpa" else " Keys and values are repeated, for no kernel here lets queries share them."
    if name == "auto" and masked and new_enough and sixteen:
        return "flash", f"The fastest for {masked} on {here}."
    if name == "auto":
        lacks = "" if not masked else f"There is no flash attention on {here}{'' if sixteen else ' in float32'}. "
        how = f"{masked.capitalize()}: documents of about one length at a time." if masked else "No mask is needed."
        return sdpa, f"{lacks}{how}{repeats}"
    if name == "flash" and not (new_enough and sixteen):
        raise ValueError(
            f"attention='flash' needs compute capability 8.0 and 16 bit, but this is {here} with "
            f"{str(dtype).removeprefix('torch.')}. Use attention='sdpa', or 'auto'."
        )
    if name == "xformers" and cpu:
        raise ValueError("attention='xformers' needs a GPU, but this is the CPU. Use attention='sdpa', or 'auto'.")
    if name == "xformers" and importlib.util.find_spec("xformers") is None:
        raise ValueError(
            "attention='xformers' needs the package xformers: pip install 'lightning-qlora[xformers]'. Or use "
            "attention='sdpa', or 'auto'."
        )
    if name == "xformers" and torch.cuda.is_available() and (fault := _fault_of_xformers(dtype)):
        raise ValueError(
            f"attention='xformers' cannot be had: the installed xformers says {fault!r}. Its wheels are built for one "
            "version of torch each (python -m xformers.info). Use attention='sdpa', or 'auto'."
        )
    if name == "flex" and cpu:
        raise ValueError(
            "attention='flex' needs a GPU, for torch's flex attention has no backward on the CPU. Use "
            "attention='sdpa', or 'auto'."
        )
    if name == "flex" and not new_enough:
        return sdpa, f"In place of flex, for Triton has no tensor cores on {here}; the mask is the same.{repeats}"
    if name == "sdpa":
        return sdpa, f"As asked for.{repeats}"
    return name, "As asked for."


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


# ---------------------------------------------------------------------------------------------------- a batch's inputs


def attention_inputs(
    backend: str,
    *,
    shape: tuple[int, int],
    device: torch.device,
    document_lengths: list[list[int]] | None = None,
    sliding_window: int | None = None,
    windows: tuple[int | None, ...] = (None,),
) -> dict[str, Any]:
    """Keyword arguments of transformers' model that make a batch's attention causal inside its documents.

    Call it once a batch, outside of what is compiled. Nothing waits for the device.

    Args:
        backend: A :data:`Backend`.
        shape: [B, S] of the batch.
        device: Of the batch.
        document_lengths: For each row the lengths of its documents, which sum to S; ``None`` if a row is one document.
        sliding_window: How many tokens one sees, itself included.

    Raises:
        ValueError: If ``document_lengths`` do not describe the batch.
    """
    sliding_window = windows[0]
    rows, length = shape
    if document_lengths is not None:
        fits = [sum(row) == length and min(row) > 0 for row in document_lengths]
        if len(fits) != rows or not all(fits):
            raise ValueError(
                f"document_lengths must list, for each of {rows} rows, lengths of at least 1 that sum to its {length} "
                f"tokens (padding is a document too), got {document_lengths}."
            )
    # transformers hands on what has four dimensions as it is. Otherwise it would look for documents in the positions,
    # which waits for the device, and make a mask of S x S for them.
    inputs: dict[str, Any] = {"attention_mask": torch.empty(1, 1, 1, 0, device="cpu")}
    if backend == "flex":
        inputs["blocks"] = Blocks.of(document_lengths, sliding_window, shape, device)
    elif document_lengths is None and sliding_window is None and backend in ("sdpa", SDPA_REPEATED_KV):
        inputs["whole_rows"] = backend
    else:
        lengths = document_lengths or [[length]] * rows
        inputs["documents"] = Documents.of(backend, lengths, sliding_window, device)  # type: ignore[arg-type]
    return inputs


class Blocks(NamedTuple):
    """What a ``BlockMask`` is made of. As tensors, for in one of those torch.compile takes S for a constant.

    Attributes:
        tensors: int32, in the order of ``_BLOCK_MASK``: for each row of blocks of scores which ones any query sees, and
            which need no mask; for each column likewise. 16 (S / 128)^2 bytes a row of the batch.
        documents: [B, S], int32: the number of each token's document; ``None`` if a row is one.
        window: W, or ``None``.
    """

    tensors: tuple[Tensor, ...]
    documents: Tensor | None
    window: int | None

    @classmethod
    def of(
        cls, lengths: list[list[int]] | None, window: int | None, shape: tuple[int, int], device: torch.device
    ) -> Blocks:
        """Of rows [B, S] with documents of ``lengths``, or of any rows if there are none."""
        documents = rows = None
        if lengths is not None:
            flat = torch.tensor([n for row in lengths for n in row], device="cpu")
            numbers = torch.repeat_interleave(torch.arange(len(flat), dtype=torch.int32, device="cpu"), flat)
            documents, rows = numbers.view(shape).to(device, non_blocking=True), shape[0]
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


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


# ------------------------------------------------------------------------------------------------ transformers' layers

#: transformers' name of all backends. Without the word "flash", by which it knows an implementation of its own.
IMPLEMENTATION = "lightning_qlora"


def register_attention() -> None:
    """Make ``attn_implementation="lightning_qlora"`` known to transformers, attention and masks."""
    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    documents: Documents | None = None,
    blocks: Blocks | None = None,
    whole_rows: str | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [B, N, S, D], key and value [B, K, T, D] -> [B, S, N, D]; what :func:`attention_inputs` made decides."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if documents is not None or blocks is not None:
        assert dropout == 0, "choose_attention refuses dropout"
    if documents is not None:
        tokens = [each.transpose(1, 2).flatten(0, 1) for each in (query, key, value)]
        output = document_attention(*tokens, documents=documents, scale=scale)
        return output.view(query.shape[0], query.shape[2], *output.shape[1:]), None
    if blocks is not None:
        # Uncompiled, it would compute all scores.
        alone = query.is_cuda and not torch.compiler.is_compiling()
        flex: Any = _compiled(flex_attention) if alone else flex_attention
        mask = blocks.mask(query.shape[2])
        return flex(query, key, value, block_mask=mask, scale=scale, enable_gqa=True).transpose(1, 2), None
    sdpa = sdpa_attention_forward if whole_rows == "sdpa" else sdpa_repeated_kv
    attention_mask = attention_mask if whole_rows is None else None
    return sdpa(module, query, key, value, attention_mask, dropout, scaling, **kwargs)  # type: ignore[no-any-return]


def _mask(*, mask_function: Callable[..., Any], config: PretrainedConfig, **options: Any) -> Tensor | None:
    """transformers' mask for SDPA, with the model's window."""
    window = getattr(config, "attention_window", None)
    if window is not None:
        mask_function = and_masks(mask_function, sliding_window_overlay(window))
    mask: Tensor | None = sdpa_mask(mask_function=mask_function, config=config, local_size=window, **options)
    return mask


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
