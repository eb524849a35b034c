"""Dequantization of bitsandbytes 4-bit weights (NF4 and FP4) in one pass, double quantization included.

A weight of ``n`` elements is stored as 4-bit codes, two a byte with the *high* nibble first, and one scale (``absmax``)
per block of ``blocksize`` consecutive elements. With double quantization the scales are 8-bit codes themselves::

    absmax[b] = code2[absmax8[b]] * absmax2[b // nested_blocksize] + offset    # float32, rounded after * and after +
    weight[i] = TABLE[code[i]] * absmax[i // blocksize]                        # float32, then rounded to the dtype

bitsandbytes evaluates this in three kernels with a float32 ``absmax`` in device memory between them; here one Triton
kernel does it all and writes nothing but the weight. The result is bit-exact to
``bitsandbytes.functional.dequantize_4bit``, which is why the two roundings of the first line must not be contracted
into one fused multiply-add: that shifts ``absmax`` by one ulp and, in fp16, now and then a weight.

A weight is one :class:`Quantized4bit` everywhere in this file but at the boundary of ``torch.library``, whose schemas
know tensors and numbers only. The torch op is ``lightning_qlora::dequantize_4bit`` (and ``.out``), with a fake, a CUDA
and a CPU implementation. It is opaque to ``torch.compile``.

Letters in shapes: N elements of the weight, G = ceil(N / blocksize) blocks, G2 = ceil(G / nested_blocksize).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    import triton
    import triton.language as tl
    from bitsandbytes.functional import QuantState
else:
    try:
        import triton
        import triton.language as tl
    except ImportError:  # macOS, Windows: only the CPU implementation exists there
        triton = None

__all__ = ["Quantized4bit", "dequantize_4bit", "dequantize_4bit_reference", "dequantize_quant_state"]

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
# The weight
# ---------------------------------------------------------------------------------------------------------------------


# A tuple, because it is built and read on every call of `dequantize_quant_state`: a frozen dataclass costs four times
# as much to build, 1.5 us.
class Quantized4bit(NamedTuple):
    """A weight in bitsandbytes' 4-bit format.

    The tensors are checked when the weight is dequantized, not here.

    Attributes:
        packed: The codes, two per byte, high nibble first; contiguous, any dtype (uint8, or the same bytes viewed as a
            float dtype), at least ceil(N / 2) bytes.
        absmax: One scale per block: uint8 [G] with double quantization, else float32 [G].
        code2: float32 [256], the values of the 8-bit scale codes; None without double quantization.
        absmax2: float32 [G2], the scale of each group of ``nested_blocksize`` scales; None likewise.
        offset: float32 scalar tensor, added to every scale; None likewise.
        shape: Shape of the weight, of any number of dimensions; N = prod(shape).
        blocksize: Elements per scale: 32, 64, ..., 4096.
        nested_blocksize: Scales per entry of ``absmax2``.
        quant_type: "nf4" or "fp4".
    """

    packed: Tensor
    absmax: Tensor
    code2: Tensor | None
    absmax2: Tensor | None
    offset: Tensor | None
    shape: Sequence[int]
    blocksize: int = 64
    nested_blocksize: int = 256
    quant_type: str = "nf4"

    @classmethod
    def quantize(
        cls, weight: Tensor, *, nested: bool = True, blocksize: int = 64, quant_type: str = "nf4"
    ) -> Quantized4bit:
        """Quantize ``weight`` (float16, bfloat16 or float32, any shape) with bitsandbytes, on the weight's device.

        Args:
            weight: The weight; it is copied if it is not contiguous.
            nested: Quantize the scales too ("double quantization").
            blocksize: Elements per scale.
            quant_type: "nf4" or "fp4".
        """
        import bitsandbytes.functional as bnb  # slow to import, and dequantization on a GPU does without

        packed, state = bnb.quantize_4bit(
            weight.contiguous(), blocksize=blocksize, compress_statistics=nested, quant_type=quant_type
        )
        return cls.from_quant_state(packed, state)

    @classmethod
    def from_quant_state(cls, packed: Tensor, state: QuantState) -> Quantized4bit:
        """Take over the data of a bitsandbytes ``Params4bit`` and its ``quant_state``: the same tensors, no copies.

        Raises:
            ValueError: ``state`` is None: the weight was never quantized.
        """
        if state is None:
            raise ValueError(
                "quant_state is None: the weight is not quantized yet; bitsandbytes does that on .to(device)."
            )
        # Positional, and no conversions: each that has nothing to do would still cost up to a microsecond per call.
        state2 = state.state2
        if state2 is None:
            return cls(
                packed, state.absmax, None, None, None, state.shape, state.blocksize, quant_type=state.quant_type
            )
        return cls(
            packed,
            state.absmax,
            state2.code,
            state2.absmax,
            state.offset,
            state.shape,
            state.blocksize,
            state2.blocksize,
            state.quant_type,
        )


# ---------------------------------------------------------------------------------------------------------------------
# The formula in plain torch: the one reference of the tests and of the benchmark
# ---------------------------------------------------------------------------------------------------------------------


def dequantize_absmax(quantized: Quantized4bit) -> Tensor:
    """Return the float32 scale of each block, shape [G]: ``absmax`` itself, or its double quantization undone."""
    absmax, code2, absmax2, offset = quantized[1:5]
    if code2 is None or absmax2 is None or offset is None:
        return absmax
    scales = absmax2.repeat_interleave(quantized.nested_blocksize)[: absmax.numel()]
    # Two statements, two roundings: torch fuses them no more than bitsandbytes does.
    scaled = code2[absmax.flatten().int()] * scales
    return scaled + offset


def dequantize_4bit_reference(quantized: Quantized4bit, *, dtype: torch.dtype) -> Tensor:
    """Evaluate the formula of the module docstring step by step. Arguments as for :func:`dequantize_4bit`."""
    numel = math.prod(quantized.shape)
    table = torch.tensor(TABLES[quantized.quant_type], dtype=torch.float32, device=quantized.packed.device)
    packed_bytes = quantized.packed.flatten().view(torch.uint8)[: (numel + 1) // 2]
    codes = torch.stack((packed_bytes >> 4, packed_bytes & 0xF), dim=1).flatten()[:numel]
    scales = dequantize_absmax(quantized).flatten().repeat_interleave(quantized.blocksize)[:numel]
    return (table[codes.int()] * scales).to(dtype).view(tuple(quantized.shape))


# ---------------------------------------------------------------------------------------------------------------------
# The Triton kernel
# ---------------------------------------------------------------------------------------------------------------------

# Eight elements are one 32-bit word. Bytes are little-endian in it and the high nibble comes first, so that element i
# starts at bit 4, 0, 12, 8, 20, 16, 28, 24.
_SHIFTS = (4, 0, 12, 8, 20, 16, 28, 24)


def _word_ptx(pack: str) -> str:
    """Write the PTX that turns a word ($4) and its scale ($5) into four registers of two 16-bit values ($0 to $3).

    Lane l of the warp holds TABLE[l % 16] in $6, and a shuffle is the look-up: it reads bits 0 to 4 of the shifted word
    only, so a code needs one shift and no mask (bit 4, of the next code, picks the other copy of the table). Products
    flush subnormals to zero, as bitsandbytes' kernel does (it is built with fast math). ``pack`` rounds two of them.
    """
    lines = [".reg .b32 code;", ".reg .f32 value<8>;"]
    for element, shift in enumerate(_SHIFTS):
        lines += [
            f"shr.b32 code, $4, {shift};",
            f"shfl.sync.idx.b32 value{element}, $6, code, 31, 0xffffffff;",
            f"mul.rn.ftz.f32 value{element}, value{element}, $5;",
        ]
    lines += [pack.format(out=f"${i}", low=f"value{2 * i}", high=f"value{2 * i + 1}") for i in range(4)]
    return "{\n" + "\n".join(lines) + "\n}"


if triton is not None:
    # cvt to two values at once exists from sm_80 on; a T4 (sm_75) rounds one by one, and bf16 not at all in hardware.
    _PTX_FP16 = tl.constexpr(_word_ptx("cvt.rn.f16x2.f32 {out}, {high}, {low};"))
    _PTX_BF16 = tl.constexpr(_word_ptx("cvt.rn.bf16x2.f32 {out}, {high}, {low};"))
    _PTX_FP16_SM75 = tl.constexpr(
        _word_ptx(
            "{{ .reg .b16 half<2>; cvt.rn.f16.f32 half0, {low}; cvt.rn.f16.f32 half1, {high}; "
            "mov.b32 {out}, {{half0, half1}}; }}"
        )
    )

    @triton.jit
    def _multiply(x, y, PTX: tl.constexpr):  # type: ignore[no-untyped-def]
        if PTX:
            return tl.inline_asm_elementwise(
                "mul.rn.ftz.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1
            )
        else:  # noqa: RET505  Triton drops a constexpr branch only with its else
            return x * y

    @triton.jit
    def _round_to(values, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
        """Round float32 to ``dtype``, to nearest even."""
        if dtype == tl.bfloat16:
            # By hand, because Triton's interpreter truncates this cast. NaN would overflow into a number: keep it.
            bits = values.to(tl.uint32, bitcast=True)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            rounded = tl.where(values == values, rounded, 0x7FFF)
            return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
        else:  # noqa: RET505
            return values.to(dtype)

    @triton.jit
    def _load_scale(  # type: ignore[no-untyped-def]
        absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, start, element, mask,
        BLOCKSIZE: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, TILE: tl.constexpr,
        PTX: tl.constexpr,
    ):  # fmt: skip
        """Load the float32 scales of the elements ``start + element``, with ``start`` a multiple of TILE."""
        # Both are powers of two: a tile begins with a block, or lies within one.
        block = element // BLOCKSIZE
        # The statistics are 1/32 of the bytes read and each serves many threads: keep them in cache.
        absmax = tl.load(absmax_ptr + start // BLOCKSIZE + block, mask=mask, eviction_policy="evict_last")
        if NESTED:
            GROUP: tl.constexpr = BLOCKSIZE * NESTED_BLOCKSIZE
            group_ptr = absmax2_ptr + start // GROUP
            if GROUP % TILE != 0:  # else one group covers the tile, and its scale is one scalar
                group_ptr += ((start % GROUP).to(tl.int32) + element) // GROUP
                absmax2 = tl.load(group_ptr, mask=mask, eviction_policy="evict_last")
            else:
                absmax2 = tl.load(group_ptr, eviction_policy="evict_last")
            code2 = tl.load(code2_ptr + absmax.to(tl.int32), mask=mask, eviction_policy="evict_last")
            return _multiply(code2, absmax2, PTX) + tl.load(offset_ptr)
        else:  # noqa: RET505
            return absmax

    @triton.jit
    def _whole_tile(  # type: ignore[no-untyped-def]
        packed_ptr, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, table_ptr, out_ptr, start,
        BLOCKSIZE: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr,
        THREADS: tl.constexpr, STEPS: tl.constexpr, PTX: tl.constexpr, PACKED_CVT: tl.constexpr,
        READ_POLICY: tl.constexpr, WRITE_POLICY: tl.constexpr,
    ):  # fmt: skip
        """Dequantize the tile at ``start``: STEPS times a row of one word per thread.

        One word (4 bytes read, 16 bytes written) per thread and row keeps both the loads and the stores of a warp
        contiguous; wider loads would have to be transposed through shared memory first.
        """
        TILE: tl.constexpr = THREADS * STEPS * 8
        dtype: tl.constexpr = out_ptr.dtype.element_ty
        thread = tl.arange(0, THREADS)
        words_ptr = packed_ptr.to(tl.pointer_type(tl.int32)) + start // 8 + thread
        # All loads come before the first store, which the compiler could not move them across.
        words = ()
        scales = ()
        for step in tl.static_range(STEPS):
            words += (tl.load(words_ptr + step * THREADS, eviction_policy=READ_POLICY),)  # type: ignore[assignment]
        for step in tl.static_range(STEPS):
            scales += (  # type: ignore[assignment]
                _load_scale(
                    absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, start, (thread + step * THREADS) * 8, None,
                    BLOCKSIZE, NESTED_BLOCKSIZE, NESTED, TILE, PTX,
                ),
            )  # fmt: skip
        if PTX and dtype != tl.float32:
            lane = tl.inline_asm_elementwise(
                "mov.u32 $0, %laneid; // $1", "=r,r", [thread], dtype=tl.int32, is_pure=True, pack=1
            )
            table = tl.load(table_ptr + (lane & 15), eviction_policy="evict_last")
            pairs_ptr = out_ptr.to(tl.pointer_type(tl.int32)) + start // 2
            pair = thread[:, None] * 4 + tl.arange(0, 4)[None, :]
            for step in tl.static_range(STEPS):
                # Impure, for a shuffle needs the whole warp: it must not be moved into a branch.
                a, b, c, d = tl.inline_asm_elementwise(
                    _PTX_BF16 if dtype == tl.bfloat16 else (_PTX_FP16 if PACKED_CVT else _PTX_FP16_SM75),
                    "=r,=r,=r,=r,r,f,f",
                    [words[step], scales[step], table],
                    dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
                    is_pure=False,
                    pack=1,
                )
                # join adds a last dimension: [[a, b], [c, d]] takes a with c and b with d first.
                quad = tl.join(tl.join(a, c), tl.join(b, d)).reshape(THREADS, 4)
                tl.store(pairs_ptr + step * THREADS * 4 + pair, quad, eviction_policy=WRITE_POLICY)
        else:
            position = tl.arange(0, 8)
            for step in tl.static_range(STEPS):
                codes = (words[step][:, None] >> ((position ^ 1) * 4)[None, :]) & 0xF
                values = _multiply(tl.load(table_ptr + codes, eviction_policy="evict_last"), scales[step][:, None], PTX)
                element = (thread + step * THREADS)[:, None] * 8 + position[None, :]
                tl.store(out_ptr + start + element, _round_to(values, dtype), eviction_policy=WRITE_POLICY)

    @triton.jit
    def _masked_tile(  # type: ignore[no-untyped-def]
        packed_ptr, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, table_ptr, out_ptr, start, numel,
        BLOCKSIZE: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr,
        THREADS: tl.constexpr, STEPS: tl.constexpr, PTX: tl.constexpr,
    ):  # fmt: skip
        """Dequantize what there is of the tile at ``start``, element by element, whatever the alignment."""
        TILE: tl.constexpr = THREADS * STEPS * 8
        for first in range(0, TILE, THREADS * 2):  # a loop, not one wide row, to keep the registers of the kernel few
            element = first + tl.arange(0, THREADS * 2)
            mask = start + element < numel
            byte = tl.load(packed_ptr + start // 2 + element // 2, mask=mask, other=0).to(tl.int32)
            codes = (byte >> (((element & 1) ^ 1) * 4)) & 0xF
            scale = _load_scale(
                absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, start, element, mask,
                BLOCKSIZE, NESTED_BLOCKSIZE, NESTED, TILE, PTX,
            )  # fmt: skip
            values = _multiply(tl.load(table_ptr + codes), scale, PTX)
            tl.store(out_ptr + start + element, _round_to(values, out_ptr.dtype.element_ty), mask=mask)

    # The launcher below picks the compiled kernel itself, by these alignments and by the width of numel.
    @triton.jit(
        do_not_specialize=["numel"],
        do_not_specialize_on_alignment=["absmax_ptr", "code2_ptr", "absmax2_ptr", "offset_ptr", "table_ptr"],
    )
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
        THREADS: tl.constexpr,  # 32 * num_warps
        STEPS: tl.constexpr,  # words per thread
        PTX: tl.constexpr,  # inline assembly; else plain Triton with the same bits (for values of normal magnitude)
        PACKED_CVT: tl.constexpr,  # compute capability >= 8.0
        READ_POLICY: tl.constexpr,  # cache eviction hints, of the packed codes
        WRITE_POLICY: tl.constexpr,  # and of the result
    ):
        # 64-bit arithmetic on scalars only, once per program; inside the tile 32-bit offsets suffice.
        start = tl.program_id(0).to(tl.int64) * (THREADS * STEPS * 8)
        if ALIGNED and start + THREADS * STEPS * 8 <= numel:
            _whole_tile(
                packed_ptr, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, table_ptr, out_ptr, start,
                BLOCKSIZE, NESTED_BLOCKSIZE, NESTED, THREADS, STEPS, PTX, PACKED_CVT, READ_POLICY, WRITE_POLICY,
            )  # fmt: skip
        else:
            _masked_tile(
                packed_ptr, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, table_ptr, out_ptr, start, numel,
                BLOCKSIZE, NESTED_BLOCKSIZE, NESTED, THREADS, STEPS, PTX,
            )  # fmt: skip


class LaunchConfig(NamedTuple):
    """How to cut the weight into programs, ``threads * steps * 8`` elements each, and what to hint to the caches.

    Few registers (32 or less for 16-bit results on sm_75, sm_80 and sm_90) leave every SM full whatever the program's
    size. Predicted best were 128 threads x 4 words, for the bytes in flight; on an H200 512 x 2 is 0 to 4 % faster at
    every size measured (872 M elements: 535 us against 554, where a copy of as many bytes takes 520), as a program's
    loads and stores then cover longer contiguous stretches. The cache hints change less than the spread of the
    measurement. A code is read once, so it may leave the caches first; the result is read next, by a matmul, and gets
    no hint.
    Figures: ``recipes/benchmarks/results/nf4_dequant.json``.
    """

    threads: int = 512
    steps: int = 2
    ptx: bool = True
    read_policy: str = "evict_first"
    write_policy: str = ""


class _Compiled(NamedTuple):
    kernel: Any  # triton.compiler.CompiledKernel
    table: Tensor
    constants: tuple[Any, ...]  # the constexpr arguments, which a compiled kernel takes and ignores


_DEFAULT_CONFIG = LaunchConfig()
_compiled: dict[tuple[Any, ...], _Compiled] = {}


def _launch(quantized: Quantized4bit, out: Tensor, config: LaunchConfig = _DEFAULT_CONFIG) -> None:
    """Run the Triton kernel on ``out``'s device, which must be the current one, on its current stream.

    Triton's own launcher binds and specializes every argument on every call. What may vary here is known, so that from
    the second call on the compiled kernel is taken from a dictionary and gets addresses.
    """
    numel = out.numel()
    if numel == 0:
        return
    packed, absmax, code2, absmax2, offset, _, blocksize, nested_blocksize, quant_type = quantized
    packed_address, out_address = packed.data_ptr(), out.data_ptr()
    packed_aligned, out_aligned = packed_address % 16 == 0, out_address % 16 == 0
    grid = (-(-numel // (config.threads * config.steps * 8)), 1, 1)
    # One flat tuple: joining two with * takes 0.1 us longer.
    key = (
        out.get_device(),
        out.dtype,
        blocksize,
        nested_blocksize,
        quant_type,
        code2 is None,
        packed_aligned,
        out_aligned,
        numel > 0x7FFFFFFF,
        config,
    )
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled.kernel[grid](
            packed_address,
            absmax.data_ptr(),
            None if code2 is None else code2.data_ptr(),
            None if absmax2 is None else absmax2.data_ptr(),
            None if offset is None else offset.data_ptr(),
            compiled.table.data_ptr(),
            out_address,
            numel,
            *compiled.constants,
        )
        return
    # Blocks until the copy is done, so that later calls may be on any stream.
    table = torch.tensor(TABLES[quant_type], dtype=torch.float32, device=out.device)
    capability = torch.cuda.get_device_capability(out.device) if out.is_cuda and torch.version.hip is None else (0, 0)
    # In PTX only what the hardware rounds itself; the interpreter and AMD GPUs have capability (0, 0) here.
    ptx = config.ptx and capability >= ((8, 0) if out.dtype is torch.bfloat16 else (7, 0))
    constants = (
        *(blocksize, nested_blocksize, code2 is not None, packed_aligned and out_aligned),
        *(config.threads, config.steps, ptx, capability >= (8, 0), config.read_policy, config.write_policy),
    )
    kernel = _dequantize_4bit_kernel[grid](
        packed.view(-1).view(torch.uint8),
        *(absmax, code2, absmax2, offset, table, out, numel),
        *constants,
        num_warps=config.threads // 32,
        # Keeps `code2 * absmax2 + offset` two roundings in plain Triton. 3.6 fuses by default, 3.9 does not.
        enable_fp_fusion=False,
    )
    if out.is_cuda:
        _compiled[key] = _Compiled(kernel, table, constants)


# ---------------------------------------------------------------------------------------------------------------------
# The CPU implementation
# ---------------------------------------------------------------------------------------------------------------------


def _dequantize_cpu(quantized: Quantized4bit, dtype: torch.dtype) -> Tensor:
    """Dequantize with bitsandbytes' C kernel.

    Measured on 2 cores (AVX-512, 16.8 M elements, bf16): 13 ms, against 27 ms for the best of several torch forms (a
    look-up of both nibbles in a 256-entry table of value pairs, in chunks that stay in cache).
    """
    import bitsandbytes  # noqa: F401  registers torch.ops.bitsandbytes; slow to import, needed here only

    numel, blocksize = math.prod(quantized.shape), quantized.blocksize
    scales = dequantize_absmax(quantized).flatten()
    # The C kernel gets one flat row, an even number of elements and blocks below 2048, because bitsandbytes 0.50
    # mistakes the block of an element in matrices whose rows are no multiple of the blocksize, and leaves the C path
    # for odd rows and for large blocks. A large block is several smaller ones of the same scale.
    if blocksize > 1024:
        scales = scales.repeat_interleave(blocksize // 1024)
        blocksize = 1024
    even = numel + numel % 2
    packed = quantized.packed.flatten().view(torch.uint8)[: even // 2]
    flat: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
        packed.view(-1, 1), scales, blocksize, quantized.quant_type, (1, even), dtype
    )
    return flat.view(-1)[:numel].view(tuple(quantized.shape))


# ---------------------------------------------------------------------------------------------------------------------
# The torch op
# ---------------------------------------------------------------------------------------------------------------------


def _check(quantized: Quantized4bit, numel: int, dtype: torch.dtype) -> None:
    """Raise ValueError unless ``quantized`` is one weight of ``numel`` elements, its shape's product.

    Runs before every dequantization, hence spelled out: about 1.5 us where one small torch operation takes 2 us.
    """
    packed, absmax, code2, absmax2, offset, _, blocksize, nested_blocksize, quant_type = quantized
    _check_format(dtype, blocksize, nested_blocksize, quant_type)
    blocks = -(-numel // blocksize)
    if not packed.is_contiguous():
        raise ValueError("packed must be contiguous, because its bytes are read in order: call .contiguous() first.")
    if packed.nbytes * 2 < numel:
        raise ValueError(
            f"packed has {packed.nbytes} bytes, but {numel} elements of 4 bits need "
            f"{(numel + 1) // 2}: shape or quant_state belong to another weight."
        )
    if absmax.numel() != blocks:
        raise ValueError(
            f"absmax has {absmax.numel()} entries, but {numel} elements in blocks of {blocksize} need {blocks}: "
            "shape, blocksize or quant_state belong to another weight."
        )
    device = packed.get_device()
    if code2 is not None and absmax2 is not None and offset is not None:
        blocks2 = -(-blocks // nested_blocksize)
        if absmax.dtype is not torch.uint8:
            raise ValueError(
                f"absmax must be uint8 with code2, absmax2 and offset, got {absmax.dtype}: pass the three only for a "
                "double-quantized weight."
            )
        if code2.numel() != 256 or absmax2.numel() != blocks2 or offset.numel() != 1:
            raise ValueError(
                f"code2, absmax2, offset have {code2.numel()}, {absmax2.numel()}, {offset.numel()} entries, but "
                f"{blocks} blocks in groups of {nested_blocksize} need 256, {blocks2}, 1: nested_blocksize or "
                "quant_state belong to another weight."
            )
        if not code2.dtype is absmax2.dtype is offset.dtype is torch.float32:
            raise ValueError(
                f"code2, absmax2, offset must be float32, as bitsandbytes stores them, got {code2.dtype}, "
                f"{absmax2.dtype}, {offset.dtype}: convert them with .float()."
            )
        same_device = device == absmax.get_device() == code2.get_device() == absmax2.get_device() == offset.get_device()
        contiguous = absmax.is_contiguous() and code2.is_contiguous() and absmax2.is_contiguous()
    elif code2 is not None or absmax2 is not None or offset is not None:
        raise ValueError(
            "code2, absmax2 and offset go together: pass all three (double quantization) or None for each."
        )
    elif absmax.dtype is not torch.float32:
        raise ValueError(
            f"absmax must be float32 without code2, absmax2 and offset, got {absmax.dtype}: pass the three as well if "
            "the weight is double-quantized."
        )
    else:
        same_device = device == absmax.get_device()
        contiguous = absmax.is_contiguous()
    if not same_device:
        devices = [str(tensor.device) for tensor in (packed, absmax, code2, absmax2, offset) if tensor is not None]
        raise ValueError(
            f"packed, absmax, code2, absmax2, offset must be on one device, got {', '.join(devices)}: move them."
        )
    if not contiguous:
        raise ValueError("absmax, code2 and absmax2 must be contiguous: call .contiguous() first.")


def _check_format(dtype: torch.dtype, blocksize: int, nested_blocksize: int, quant_type: str) -> None:
    if quant_type not in TABLES:
        raise ValueError(f"quant_type must be one of {', '.join(TABLES)}, the formats known here, got {quant_type!r}.")
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize must be one of {BLOCKSIZES}, as in bitsandbytes, got {blocksize}.")
    if nested_blocksize < 1:
        raise ValueError(f"nested_blocksize must be positive (bitsandbytes uses 256), got {nested_blocksize}.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {DTYPES}, got {dtype}.")


def _check_out(out: Tensor, quantized: Quantized4bit, dtype: torch.dtype) -> None:
    packed, shape = quantized.packed, quantized.shape
    if tuple(out.shape) != tuple(shape) or out.dtype is not dtype or out.get_device() != packed.get_device():
        raise ValueError(
            f"out must be {dtype} {tuple(shape)} on {packed.device} to take this weight, "
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


def _fake(quantized: Quantized4bit, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    _check_format(dtype, *quantized[6:])
    return quantized.packed.new_empty(quantized.shape, dtype=dtype) if out is None else out


def _cuda(quantized: Quantized4bit, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    if out is None:
        out = torch.empty(quantized.shape, dtype=dtype, device=quantized.packed.device)
    else:
        _check_out(out, quantized, dtype)
    _check(quantized, out.numel(), dtype)
    if triton is None:
        raise RuntimeError("4-bit weights on a GPU need Triton, which is not installed: pip install triton.")
    if out.get_device() == torch.cuda.current_device():
        _launch(quantized, out)
    else:
        with torch.cuda.device(out.device):
            _launch(quantized, out)
    return out


def _cpu(quantized: Quantized4bit, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    if out is not None:
        _check_out(out, quantized, dtype)
    _check(quantized, math.prod(quantized.shape), dtype)
    weight = _dequantize_cpu(quantized, dtype)
    return weight if out is None else out.copy_(weight)


_Implementation = Callable[..., Tensor]  # of (quantized, dtype, out=None)


def _functional(implementation: _Implementation) -> Callable[..., Tensor]:
    """Give ``implementation`` the arguments of the schema."""

    def operator(
        packed: Tensor, absmax: Tensor, code2: Tensor | None, absmax2: Tensor | None, offset: Tensor | None,
        shape: Sequence[int], dtype: torch.dtype, *layout: Any,
    ) -> Tensor:  # fmt: skip
        return implementation(Quantized4bit(packed, absmax, code2, absmax2, offset, shape, *layout), dtype)

    return operator


def _out_variant(implementation: _Implementation) -> Callable[..., None]:
    """Give ``implementation`` the arguments of the schema that ends with ``out`` and returns nothing."""

    def operator(
        packed: Tensor, absmax: Tensor, code2: Tensor | None, absmax2: Tensor | None, offset: Tensor | None,
        shape: Sequence[int], dtype: torch.dtype, *layout: Any,
        out: Tensor,
    ) -> None:  # fmt: skip
        implementation(Quantized4bit(packed, absmax, code2, absmax2, offset, shape, *layout), dtype, out)

    return operator


for _name, _with_schema in (
    ("lightning_qlora::dequantize_4bit", _functional),
    ("lightning_qlora::dequantize_4bit.out", _out_variant),
):
    torch.library.register_fake(_name, _with_schema(_fake))
    torch.library.impl(_name, "CUDA", _with_schema(_cuda))
    torch.library.impl(_name, "CPU", _with_schema(_cpu))


# ---------------------------------------------------------------------------------------------------------------------
# The public functions
# ---------------------------------------------------------------------------------------------------------------------


def _nothing_intercepts(packed: Tensor) -> bool:
    """Whether an eager call may skip the torch dispatcher, which costs more than the launch (4 us for 10 arguments).

    Not while compiling, nor under a dispatch mode (fake tensors, selective checkpointing, FLOP counters...), nor with a
    tensor subclass that handles ops itself. The depth of the mode stack has no public name.
    """
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and type(packed).__torch_dispatch__ is Tensor.__torch_dispatch__
    )


def dequantize_4bit(quantized: Quantized4bit, *, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Dequantize a bitsandbytes 4-bit weight, bit-exact to bitsandbytes.

    Works in eager mode and in ``torch.compile(fullgraph=True)`` with static or dynamic shapes, on CUDA (one Triton
    kernel, on the current stream of the tensors' device) and on the CPU. No gradient flows through it.

    Args:
        quantized: The weight, all of its tensors on one device.
        dtype: dtype of the result: float16, bfloat16 or float32, whatever dtype was quantized.
        out: Contiguous tensor of the weight's shape, that dtype and the weight's device to write to; a new one if None.

    Returns:
        The weight, ``quantized.shape`` and ``dtype``; ``out`` itself if given.

    Raises:
        ValueError: A tensor has the wrong dtype, device, length or layout, or an option is not supported.
    """
    packed = quantized.packed
    if out is None and packed.is_cuda and _nothing_intercepts(packed):
        return _cuda(quantized, dtype)
    _, absmax, code2, absmax2, offset, shape, *layout = quantized
    arguments = (packed, absmax, code2, absmax2, offset, shape, dtype, *layout)
    if out is None:
        weight: Tensor = torch.ops.lightning_qlora.dequantize_4bit.default(*arguments)
        return weight
    torch.ops.lightning_qlora.dequantize_4bit.out(*arguments, out=out)
    return out


def dequantize_quant_state(
    packed: Tensor, quant_state: QuantState, *, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """Dequantize with a bitsandbytes ``QuantState``, e.g. ``layer.weight`` and ``layer.weight.quant_state``.

    Args:
        packed: The data of a ``Params4bit`` (any layout of its bytes that is contiguous).
        quant_state: Its ``bitsandbytes.functional.QuantState``, with double quantization or without.
        dtype: dtype of the result; that of the quantized weight if None.
        out: As for :func:`dequantize_4bit`.

    Returns:
        The weight, shape ``quant_state.shape``.

    Raises:
        ValueError: ``quant_state`` is None (the weight was never quantized) or does not belong to ``packed``.
    """
    quantized = Quantized4bit.from_quant_state(packed, quant_state)
    return dequantize_4bit(quantized, dtype=quant_state.dtype if dtype is None else dtype, out=out)
