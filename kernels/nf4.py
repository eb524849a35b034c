"""Dequantization of bitsandbytes 4-bit weights (NF4 and FP4) in one pass, double quantization included.

A weight of ``n`` elements is stored as 4-bit codes, two a byte with the *high* nibble first, and one scale (``absmax``)
per block of ``blocksize`` consecutive elements. With double quantization the scales are 8-bit codes themselves::

    absmax[b] = code2[absmax8[b]] * absmax2[b // nested_blocksize] + offset    # float32, rounded after * and after +
    weight[i] = TABLE[code[i]] * absmax[i // blocksize]                        # float32, then rounded to the dtype

bitsandbytes evaluates this in three kernels with a float32 ``absmax`` in device memory between them; here one Triton
kernel does it all and writes nothing but the weight. The result is bit-exact to
``bitsandbytes.functional.dequantize_4bit``, which is why the two roundings of the first line must not be contracted
into one fused multiply-add: that shifts ``absmax`` by one ulp and, in fp16, now and then a weight.

The torch op is ``lightning_qlora::dequantize_4bit`` (and ``.out``), with a fake, a CUDA and a CPU implementation. It is
opaque to ``torch.compile``.

Letters in shapes: N elements of the weight, G = ceil(N / blocksize) blocks, G2 = ceil(G / nested_blocksize).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import triton
    import triton.language as tl
else:
    try:
        import triton
        import triton.language as tl
    except ImportError:  # macOS, Windows: only the CPU implementation exists there
        triton = None

__all__ = ["dequantize_4bit", "dequantize_4bit_reference", "dequantize_quant_state"]

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# The value of each 4-bit code, as float32. bitsandbytes' GPU kernel multiplies FP4 magnitudes by a sign, hence -0.0.
TABLES: dict[str, tuple[float, ...]] = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": (
        *(0.0, 0.0625 / 12, 8 / 12, 12 / 12, 4 / 12, 6 / 12, 2 / 12, 3 / 12),
        *(-0.0, -0.0625 / 12, -8 / 12, -12 / 12, -4 / 12, -6 / 12, -2 / 12, -3 / 12),
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# The formula in plain torch: the one reference of the tests and of the benchmark
# ---------------------------------------------------------------------------------------------------------------------


def dequantize_absmax(
    absmax: Tensor, code2: Tensor | None, absmax2: Tensor | None, offset: Tensor | None, nested_blocksize: int = 256
) -> Tensor:
    """Return the float32 scale of each block, shape [G]: ``absmax`` itself, or its double quantization undone."""
    if code2 is None or absmax2 is None or offset is None:
        return absmax
    scales = absmax2.repeat_interleave(nested_blocksize)[: absmax.numel()]
    # Two statements, two roundings: torch fuses them no more than bitsandbytes does.
    scaled = code2[absmax.flatten().int()] * scales
    return scaled + offset


def dequantize_4bit_reference(
    packed: Tensor,
    absmax: Tensor,
    code2: Tensor | None,
    absmax2: Tensor | None,
    offset: Tensor | None,
    *,
    shape: Sequence[int],
    dtype: torch.dtype,
    blocksize: int = 64,
    nested_blocksize: int = 256,
    quant_type: str = "nf4",
) -> Tensor:
    """Evaluate the formula of the module docstring step by step. Arguments as for :func:`dequantize_4bit`."""
    numel = math.prod(shape)
    table = torch.tensor(TABLES[quant_type], dtype=torch.float32, device=packed.device)
    packed_bytes = packed.flatten().view(torch.uint8)[: (numel + 1) // 2]
    codes = torch.stack((packed_bytes >> 4, packed_bytes & 0xF), dim=1).flatten()[:numel]
    scales = dequantize_absmax(absmax, code2, absmax2, offset, nested_blocksize)
    scales = scales.flatten().repeat_interleave(blocksize)[:numel]
    return (table[codes.int()] * scales).to(dtype).view(tuple(shape))


# ---------------------------------------------------------------------------------------------------------------------
# The Triton kernel
# ---------------------------------------------------------------------------------------------------------------------

TILE = 4096  # elements a program: 32 per thread at 4 warps

if triton is not None:

    @triton.jit
    def _block_absmax(  # type: ignore[no-untyped-def]
        absmax_ptr,
        code2_ptr,
        absmax2_ptr,
        offset_ptr,
        first_block,  # int64 scalar: block of the tile's first element
        block,  # int32 tensor: blocks after that
        mask,
        NESTED: tl.constexpr,
        NESTED_BLOCKSIZE: tl.constexpr,
    ):
        """Load the float32 scale of each of the blocks ``first_block + block``."""
        # The statistics are 1/32 of the bytes read and each serves many threads: keep them in cache.
        quantized = tl.load(absmax_ptr + first_block + block, mask=mask, eviction_policy="evict_last")
        if NESTED:
            group = ((first_block % NESTED_BLOCKSIZE).to(tl.int32) + block) // NESTED_BLOCKSIZE
            scale = tl.load(
                absmax2_ptr + first_block // NESTED_BLOCKSIZE + group, mask=mask, eviction_policy="evict_last"
            )
            code = tl.load(code2_ptr + quantized.to(tl.int32), mask=mask, eviction_policy="evict_last")
            return code * scale + tl.load(offset_ptr)
        else:  # noqa: RET505  both returns must be in one constexpr branch, for their types differ
            return quantized

    @triton.jit
    def _round_to(values, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
        """Round float32 to ``dtype``, to nearest even."""
        if dtype == tl.bfloat16:
            # By hand, because Triton's interpreter truncates this cast. NaN would overflow into a number: keep it.
            bits = values.to(tl.uint32, bitcast=True)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            rounded = tl.where(values == values, rounded, 0x7FFF)
            return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
        return values.to(dtype)

    @triton.jit
    def _whole_tile(  # type: ignore[no-untyped-def]
        packed_ptr, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, table_ptr, out_ptr, start,
        BLOCKSIZE: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, TILE: tl.constexpr,
    ):  # fmt: skip
        """Dequantize TILE elements from ``start`` on, a 32-bit word (8 elements) at a time."""
        word = tl.arange(0, TILE // 8)
        position = tl.arange(0, 8)
        codes = tl.load(packed_ptr.to(tl.pointer_type(tl.int32)) + start // 8 + word, eviction_policy="evict_first")
        # Bytes are little-endian in the word and the high nibble comes first: nibble order 1, 0, 3, 2, 5, 4, 7, 6.
        codes = (codes[:, None] >> ((position ^ 1) * 4)[None, :]) & 0xF
        block = ((start % BLOCKSIZE).to(tl.int32) + word * 8) // BLOCKSIZE
        scale = _block_absmax(
            absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, start // BLOCKSIZE, block, None, NESTED, NESTED_BLOCKSIZE
        )
        values = _round_to(
            tl.load(table_ptr + codes, eviction_policy="evict_last") * scale[:, None], out_ptr.dtype.element_ty
        )
        tl.store(out_ptr + start + word[:, None] * 8 + position[None, :], values, eviction_policy="evict_first")

    @triton.jit
    def _masked_tile(  # type: ignore[no-untyped-def]
        packed_ptr, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, table_ptr, out_ptr, start, numel,
        BLOCKSIZE: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, TILE: tl.constexpr,
    ):  # fmt: skip
        """Dequantize up to TILE elements from ``start`` on, each masked and of any alignment."""
        element = tl.arange(0, TILE)
        mask = start + element < numel
        byte = tl.load(packed_ptr + start // 2 + element // 2, mask=mask).to(tl.int32)
        codes = (byte >> (((element & 1) ^ 1) * 4)) & 0xF
        block = ((start % BLOCKSIZE).to(tl.int32) + element) // BLOCKSIZE
        scale = _block_absmax(
            absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, start // BLOCKSIZE, block, mask, NESTED, NESTED_BLOCKSIZE
        )
        values = _round_to(tl.load(table_ptr + codes) * scale, out_ptr.dtype.element_ty)
        tl.store(out_ptr + start + element, values, mask=mask)

    @triton.jit(do_not_specialize=["numel"])
    def _dequantize_4bit_kernel(  # type: ignore[no-untyped-def]
        packed_ptr,  # uint8 [ceil(N / 2)], 16-byte aligned if ALIGNED
        absmax_ptr,  # uint8 [G] if NESTED else float32 [G]
        code2_ptr,  # float32 [256], NESTED only
        absmax2_ptr,  # float32 [G2], NESTED only
        offset_ptr,  # float32 [1], NESTED only
        table_ptr,  # float32 [16]
        out_ptr,  # [N], 16-byte aligned if ALIGNED
        numel,
        BLOCKSIZE: tl.constexpr,
        NESTED_BLOCKSIZE: tl.constexpr,
        NESTED: tl.constexpr,
        ALIGNED: tl.constexpr,
        TILE: tl.constexpr,
    ):
        # 64-bit arithmetic on scalars only, once per program; inside the tile 32-bit offsets suffice.
        start = tl.program_id(0).to(tl.int64) * TILE
        if ALIGNED and start + TILE <= numel:
            _whole_tile(
                packed_ptr, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, table_ptr, out_ptr, start,
                BLOCKSIZE, NESTED_BLOCKSIZE, NESTED, TILE,
            )  # fmt: skip
        else:
            _masked_tile(
                packed_ptr, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, table_ptr, out_ptr, start, numel,
                BLOCKSIZE, NESTED_BLOCKSIZE, NESTED, TILE,
            )  # fmt: skip


_device_tables: dict[tuple[str, torch.device], Tensor] = {}


def _device_table(quant_type: str, device: torch.device) -> Tensor:
    key = (quant_type, device)
    table = _device_tables.get(key)
    if table is None:
        table = torch.tensor(TABLES[quant_type], dtype=torch.float32, device=device)
        if device.type == "cuda":  # the cached copy may be read from another stream next time
            torch.cuda.current_stream(device).synchronize()
        _device_tables[key] = table
    return table


def _launch(
    packed: Tensor,
    absmax: Tensor,
    code2: Tensor | None,
    absmax2: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    nested_blocksize: int,
    quant_type: str,
    out: Tensor,
) -> None:
    """Run the Triton kernel on the current stream of ``out``'s device."""
    numel = out.numel()
    if numel == 0:
        return
    _dequantize_4bit_kernel[(triton.cdiv(numel, TILE),)](
        packed.view(torch.uint8) if packed.dtype is not torch.uint8 else packed,
        absmax,
        code2,
        absmax2,
        offset,
        _device_table(quant_type, out.device),
        out,
        numel,
        BLOCKSIZE=blocksize,
        NESTED_BLOCKSIZE=nested_blocksize,
        NESTED=code2 is not None,
        ALIGNED=(packed.data_ptr() | out.data_ptr()) % 16 == 0,
        TILE=TILE,
        num_warps=4,
        # Keeps `code2 * absmax2 + offset` two roundings. Triton 3.6 fuses by default, 3.9 does not.
        enable_fp_fusion=False,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The CPU implementation
# ---------------------------------------------------------------------------------------------------------------------


def _dequantize_cpu(
    packed: Tensor,
    absmax: Tensor,
    code2: Tensor | None,
    absmax2: Tensor | None,
    offset: Tensor | None,
    numel: int,
    dtype: torch.dtype,
    blocksize: int,
    nested_blocksize: int,
    quant_type: str,
) -> Tensor:
    """Dequantize to a flat tensor [N] with bitsandbytes' C kernel.

    Measured on 2 cores (AVX-512, 16.8 M elements, bf16): 13 ms, against 27 ms for the best of several torch forms (a
    look-up of both nibbles in a 256-entry table of value pairs, in chunks that stay in cache).
    """
    import bitsandbytes  # noqa: F401  registers torch.ops.bitsandbytes; slow to import, needed here only

    scales = dequantize_absmax(absmax, code2, absmax2, offset, nested_blocksize).flatten()
    # The C kernel gets one flat row, an even number of elements and blocks below 2048, because bitsandbytes 0.50
    # mistakes the block of an element in matrices whose rows are no multiple of the blocksize, and leaves the C path
    # for odd rows and for large blocks. A large block is several smaller ones of the same scale.
    if blocksize > 1024:
        scales = scales.repeat_interleave(blocksize // 1024)
        blocksize = 1024
    even = numel + numel % 2
    packed = packed.flatten().view(torch.uint8)[: even // 2]
    flat: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
        packed.view(-1, 1), scales, blocksize, quant_type, (1, even), dtype
    )
    return flat.view(-1)[:numel]


# ---------------------------------------------------------------------------------------------------------------------
# The torch op
# ---------------------------------------------------------------------------------------------------------------------


def _check(
    packed: Tensor,
    absmax: Tensor,
    code2: Tensor | None,
    absmax2: Tensor | None,
    offset: Tensor | None,
    numel: int,
    blocksize: int,
    nested_blocksize: int,
) -> None:
    """Raise ValueError unless the tensors describe one weight of ``numel`` elements."""
    blocks = -(-numel // blocksize)
    if not packed.is_contiguous():
        raise ValueError("packed must be contiguous, because its bytes are read in order: call .contiguous() first.")
    if packed.numel() * packed.element_size() < (numel + 1) // 2:
        raise ValueError(
            f"packed has {packed.numel() * packed.element_size()} bytes, but {numel} elements of 4 bits need "
            f"{(numel + 1) // 2}: shape or quant_state belong to another weight."
        )
    if absmax.numel() != blocks:
        raise ValueError(
            f"absmax has {absmax.numel()} entries, but {numel} elements in blocks of {blocksize} need {blocks}: "
            "shape, blocksize or quant_state belong to another weight."
        )
    tensors: tuple[tuple[str, Tensor], ...] = (("absmax", absmax),)
    if code2 is not None and absmax2 is not None and offset is not None:
        blocks2 = -(-blocks // nested_blocksize)
        if absmax.dtype != torch.uint8:
            raise ValueError(f"absmax must be uint8 with nested statistics, got {absmax.dtype}.")
        if code2.numel() != 256 or absmax2.numel() != blocks2 or offset.numel() != 1:
            raise ValueError(
                f"code2, absmax2, offset have {code2.numel()}, {absmax2.numel()}, {offset.numel()} entries, but "
                f"{blocks} blocks in groups of {nested_blocksize} need 256, {blocks2}, 1."
            )
        for name, tensor in (("code2", code2), ("absmax2", absmax2), ("offset", offset)):
            if tensor.dtype != torch.float32:
                raise ValueError(f"{name} must be float32, as bitsandbytes stores it, got {tensor.dtype}.")
        tensors += (("code2", code2), ("absmax2", absmax2), ("offset", offset))
    elif code2 is not None or absmax2 is not None or offset is not None:
        raise ValueError("code2, absmax2 and offset go together: pass all three (nested statistics) or None for each.")
    elif absmax.dtype != torch.float32:
        raise ValueError(
            f"absmax must be float32 without nested statistics, got {absmax.dtype}: 8-bit absmax needs "
            "code2, absmax2 and offset."
        )
    for name, tensor in tensors:
        if tensor.device != packed.device:
            raise ValueError(f"{name} is on {tensor.device}, packed on {packed.device}: move them to one device.")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous: call .contiguous() first.")


def _check_format(dtype: torch.dtype, blocksize: int, nested_blocksize: int, quant_type: str) -> None:
    if quant_type not in TABLES:
        raise ValueError(f"quant_type must be one of {sorted(TABLES)}, got {quant_type!r}.")
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize must be one of {BLOCKSIZES}, as in bitsandbytes, got {blocksize}.")
    if nested_blocksize < 1:
        raise ValueError(f"nested_blocksize must be positive (bitsandbytes uses 256), got {nested_blocksize}.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {DTYPES}, got {dtype}.")


def _check_out(out: Tensor, packed: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    if tuple(out.shape) != tuple(shape) or out.dtype != dtype or out.device != packed.device:
        raise ValueError(
            f"out must be {dtype} {tuple(shape)} on {packed.device}, "
            f"got {out.dtype} {tuple(out.shape)} on {out.device}."
        )
    if not out.is_contiguous():
        raise ValueError("out must be contiguous: pass a contiguous buffer, or copy the result into this one.")


_SIGNATURE = (
    "(Tensor packed, Tensor absmax, Tensor? code2, Tensor? absmax2, Tensor? offset, SymInt[] shape, ScalarType dtype, "
    "int blocksize, int nested_blocksize, str quant_type"
)
torch.library.define(
    "lightning_qlora::dequantize_4bit", _SIGNATURE + ") -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)
torch.library.define(
    "lightning_qlora::dequantize_4bit.out",
    _SIGNATURE + ", *, Tensor(a!) out) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake("lightning_qlora::dequantize_4bit")
def _fake(
    packed: Tensor,
    absmax: Tensor,
    code2: Tensor | None,
    absmax2: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    blocksize: int,
    nested_blocksize: int,
    quant_type: str,
) -> Tensor:
    _check_format(dtype, blocksize, nested_blocksize, quant_type)
    return packed.new_empty(shape, dtype=dtype)


@torch.library.register_fake("lightning_qlora::dequantize_4bit.out")
def _fake_out(
    packed: Tensor,
    absmax: Tensor,
    code2: Tensor | None,
    absmax2: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    blocksize: int,
    nested_blocksize: int,
    quant_type: str,
    *,
    out: Tensor,
) -> None:
    _check_format(dtype, blocksize, nested_blocksize, quant_type)


def _cuda(
    packed: Tensor,
    absmax: Tensor,
    code2: Tensor | None,
    absmax2: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    blocksize: int,
    nested_blocksize: int,
    quant_type: str,
) -> Tensor:
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    _cuda_out(packed, absmax, code2, absmax2, offset, shape, dtype, blocksize, nested_blocksize, quant_type, out=out)
    return out


def _cuda_out(
    packed: Tensor,
    absmax: Tensor,
    code2: Tensor | None,
    absmax2: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    blocksize: int,
    nested_blocksize: int,
    quant_type: str,
    *,
    out: Tensor,
) -> None:
    _check_format(dtype, blocksize, nested_blocksize, quant_type)
    _check(packed, absmax, code2, absmax2, offset, out.numel(), blocksize, nested_blocksize)
    _check_out(out, packed, shape, dtype)
    if triton is None:
        raise RuntimeError("4-bit weights on a GPU need Triton, which is not installed: pip install triton.")
    with torch.cuda.device(packed.device):
        _launch(packed, absmax, code2, absmax2, offset, blocksize, nested_blocksize, quant_type, out)


def _cpu(
    packed: Tensor,
    absmax: Tensor,
    code2: Tensor | None,
    absmax2: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    blocksize: int,
    nested_blocksize: int,
    quant_type: str,
) -> Tensor:
    numel = math.prod(shape)
    _check_format(dtype, blocksize, nested_blocksize, quant_type)
    _check(packed, absmax, code2, absmax2, offset, numel, blocksize, nested_blocksize)
    flat = _dequantize_cpu(
        packed, absmax, code2, absmax2, offset, numel, dtype, blocksize, nested_blocksize, quant_type
    )
    return flat.view(tuple(shape))


def _cpu_out(
    packed: Tensor,
    absmax: Tensor,
    code2: Tensor | None,
    absmax2: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    blocksize: int,
    nested_blocksize: int,
    quant_type: str,
    *,
    out: Tensor,
) -> None:
    _check_out(out, packed, shape, dtype)
    out.copy_(_cpu(packed, absmax, code2, absmax2, offset, shape, dtype, blocksize, nested_blocksize, quant_type))


torch.library.impl("lightning_qlora::dequantize_4bit", "CUDA", _cuda)
torch.library.impl("lightning_qlora::dequantize_4bit.out", "CUDA", _cuda_out)
torch.library.impl("lightning_qlora::dequantize_4bit", "CPU", _cpu)
torch.library.impl("lightning_qlora::dequantize_4bit.out", "CPU", _cpu_out)


# ---------------------------------------------------------------------------------------------------------------------
# The public functions
# ---------------------------------------------------------------------------------------------------------------------


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    code2: Tensor | None,
    absmax2: Tensor | None,
    offset: Tensor | None,
    *,
    shape: Sequence[int],
    dtype: torch.dtype,
    blocksize: int = 64,
    nested_blocksize: int = 256,
    quant_type: str = "nf4",
    out: Tensor | None = None,
) -> Tensor:
    """Dequantize a bitsandbytes 4-bit weight of N elements, bit-exact to bitsandbytes.

    Works in eager mode and in ``torch.compile(fullgraph=True)`` with static or dynamic shapes, on CUDA (one Triton
    kernel, on the current stream of the tensors' device) and on the CPU. No gradient flows through it.

    Args:
        packed: the codes, two a byte, high nibble first; contiguous, any dtype (uint8, or the same bytes viewed as a
            float dtype), at least ceil(N / 2) bytes.
        absmax: one scale per block, uint8 [G] with double quantization, else float32 [G].
        code2: float32 [256], the values of the 8-bit scale codes; None without double quantization.
        absmax2: float32 [G2], the scale of each group of ``nested_blocksize`` scales; None likewise.
        offset: float32 scalar tensor, added to every scale; None likewise.
        shape: shape of the weight, N = prod(shape).
        dtype: dtype of the result: float16, bfloat16 or float32, whatever dtype was quantized.
        blocksize: elements per scale: 32, 64, ..., 4096.
        nested_blocksize: scales per entry of ``absmax2``.
        quant_type: "nf4" or "fp4".
        out: contiguous tensor of that shape, dtype and device to write to; a new one if None.

    Returns:
        The weight, ``shape`` and ``dtype``; ``out`` itself if given.

    Raises:
        ValueError: a tensor has the wrong dtype, device, length or layout, or an option is not supported.
    """
    if out is None:
        weight: Tensor = torch.ops.lightning_qlora.dequantize_4bit.default(
            packed, absmax, code2, absmax2, offset, shape, dtype, blocksize, nested_blocksize, quant_type
        )
        return weight
    torch.ops.lightning_qlora.dequantize_4bit.out(
        packed, absmax, code2, absmax2, offset, shape, dtype, blocksize, nested_blocksize, quant_type, out=out
    )
    return out


def dequantize_quant_state(
    packed: Tensor, quant_state: Any, *, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """Dequantize with a bitsandbytes ``QuantState``, e.g. ``layer.weight`` and ``layer.weight.quant_state``.

    Args:
        packed: the data of a ``Params4bit`` (any layout of its bytes that is contiguous).
        quant_state: its ``bitsandbytes.functional.QuantState``, nested or not.
        dtype: dtype of the result; that of the quantized weight if None.
        out: as for :func:`dequantize_4bit`.

    Returns:
        The weight, shape ``quant_state.shape``.

    Raises:
        ValueError: ``quant_state`` is None (the weight was never quantized) or does not belong to ``packed``.
    """
    if quant_state is None:
        raise ValueError("quant_state is None: the weight is not quantized yet; bitsandbytes does that on .to(device).")
    state2 = quant_state.state2
    return dequantize_4bit(
        packed,
        quant_state.absmax,
        None if state2 is None else state2.code,
        None if state2 is None else state2.absmax,
        None if state2 is None else quant_state.offset,
        shape=quant_state.shape,
        dtype=quant_state.dtype if dtype is None else dtype,
        blocksize=quant_state.blocksize,
        nested_blocksize=256 if state2 is None else state2.blocksize,
        quant_type=quant_state.quant_type,
        out=out,
    )
