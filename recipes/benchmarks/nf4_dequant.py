"""Time the NF4 kernel against bitsandbytes, Unsloth's call sequence and a device copy, and the choices made in it.

    python recipes/benchmarks/nf4_dequant.py

Needs one CUDA GPU with 6 GiB free; about a minute on an H200. Every implementation is compared with bitsandbytes bit
for bit before it is timed; one that differs or does not compile is listed with the reason and leaves the others alone.
Results go to ``results/nf4_dequant.json``: the table, and under ``raw`` the percentiles of every variant.

What the variants are to decide, with a prediction for an H200 (4.8 TB/s, 132 SMs of 4 x 32 lanes at 1.755 GHz):

- The look-up. At 2.5 bytes an element, 1.7 T elements/s pass, and 17 instructions an element would fill the issue
  slots. Selects do (15, and their compares). Shuffles (1, and 1 shift) and loads of a table in L1 (1, and 3) do not.
- The tile. Each word per thread keeps 8 KiB of codes in flight per SM; at 1 TB/s of reads and 2 us of latency 15 KiB
  are wanted.
- The cache hints; and on the host the checks, the dispatcher and Triton's launcher.

What came of it on an H200 (872 M elements, bf16; a copy of as many bytes takes 520 us):

- Selects take 1885 us: arithmetic-bound, as predicted. The table in L1 takes 673 us in a simple kernel and 731 in the
  tiled one, which was not predicted: a warp's 32 look-ups fall on up to 16 addresses, and the load/store unit has the
  stores to do besides. Shuffles take 535 us and are what the library does.
- Tiles: 512 threads x 2 words 535 us, 128 x 2 538, 128 x 4 (the first choice) 554, one word a thread 583 to 603. Bytes
  in flight were not the limit that they were thought to be.
- Cache hints: 534 to 539 us, within the spread.
- Host: 14.9 us a call against 24.7 for Unsloth's sequence; of it 1.5 us checks, 3.3 us allocation. Going through the
  dispatcher costs 3.3 us more, Triton's own launcher 1.3.
- Kernels this fast end with the copy: at 4 and 17 M elements there is nothing left but the launch.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
import traceback
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from statistics import quantiles
from types import ModuleType
from typing import Any

import bitsandbytes.functional as bnb
import torch
import triton
import triton.language as tl
from record import RESULTS, ROOT, save_record
from torch import Tensor

from lightning_qlora.kernels import nf4


def load_recipe() -> ModuleType:
    """The recipe's peers and loop; by path, for this file has its name."""
    spec = importlib.util.spec_from_file_location("nf4_dequant_recipe", ROOT / "recipes" / "nf4_dequant.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


recipe = load_recipe()

# Elements, rows x columns and dtype of the weights timed. The last is more than any L2 cache holds, many times over.
CASES = {
    "4.2M bf16": (1024, 4096, torch.bfloat16),
    "16.8M fp16": (2048, 8192, torch.float16),
    "58.7M bf16": (4096, 14336, torch.bfloat16),
    "872M bf16": (60832, 14336, torch.bfloat16),
}
TILES = ((64, 4), (128, 1), (128, 2), (128, 4), (128, 8), (256, 1), (256, 2), (256, 4), (512, 1), (512, 2), (512, 4))


@triton.jit
def _simple_kernel(  # type: ignore[no-untyped-def]
    packed_ptr, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, table_ptr, out_ptr, BYTES: tl.constexpr,
    SELECT: tl.constexpr,
):  # fmt: skip
    """One fused pass in the obvious way, for whole tiles of NF4 in blocks of 64: bytes, split, interleave, store."""
    byte = tl.program_id(0) * BYTES + tl.arange(0, BYTES)
    packed = tl.load(packed_ptr + byte).to(tl.int32)
    block = byte // 32
    absmax = tl.load(code2_ptr + tl.load(absmax_ptr + block).to(tl.int32)) * tl.load(absmax2_ptr + block // 256)
    absmax += tl.load(offset_ptr)
    codes = tl.interleave(packed >> 4, packed & 15)
    if SELECT:
        values = tl.full(codes.shape, 0.0, tl.float32)
        for code in tl.static_range(16):
            values = tl.where(codes == code, tl.load(table_ptr + code), values)
    else:
        values = tl.load(table_ptr + codes)
    values *= tl.interleave(absmax, absmax)
    element = tl.program_id(0) * (2 * BYTES) + tl.arange(0, 2 * BYTES)
    tl.store(out_ptr + element, values.to(out_ptr.dtype.element_ty))


@cache
def simple_table(device: torch.device) -> Tensor:
    """The values of the NF4 codes, float32 [16]."""
    return torch.tensor(nf4.TABLES["nf4"], dtype=torch.float32, device=device)


def simple(packed: Tensor, state: bnb.QuantState, select: bool) -> Tensor:
    """Launch :func:`_simple_kernel`; sizes that are no multiple of 2048 are refused."""
    out = torch.empty(state.shape, dtype=state.dtype, device=packed.device)
    if out.numel() % 2048:
        raise ValueError(f"The simple kernel takes multiples of 2048 elements, got {out.numel()}.")
    table = simple_table(packed.device)
    _simple_kernel[(out.numel() // 2048,)](
        *(packed, state.absmax, state.state2.code, state.state2.absmax, state.offset, table, out),
        BYTES=1024,
        SELECT=select,
        enable_fp_fusion=False,
    )
    return out


def configured(packed: Tensor, state: bnb.QuantState, config: nf4.LaunchConfig) -> Tensor:
    """Launch the library's kernel with another configuration."""
    out = torch.empty(state.shape, dtype=state.dtype, device=packed.device)
    nf4._launch(nf4.Quantized4bit.from_quant_state(packed, state), out, config)
    return out


def through_dispatcher(packed: Tensor, state: bnb.QuantState) -> Tensor:
    """Call the torch op, as a compiled graph does, where an eager call goes past the dispatcher."""
    state2 = state.state2
    return torch.ops.lightning_qlora.dequantize_4bit.default(  # type: ignore[no-any-return]
        *(packed, state.absmax, state2.code, state2.absmax, state.offset, state.shape, state.dtype),
        *(state.blocksize, state2.blocksize, state.quant_type),
    )


def variants() -> dict[str, Callable[[Tensor, bnb.QuantState], Tensor]]:
    """Everything timed: peers, the library as it is, and its choices made otherwise."""
    found: dict[str, Callable[[Tensor, bnb.QuantState], Tensor]] = dict(recipe.IMPLEMENTATIONS)
    base = nf4.LaunchConfig()
    found["simple kernel, table"] = partial(simple, select=False)
    found["simple kernel, selects"] = partial(simple, select=True)
    found["plain Triton"] = partial(configured, config=base._replace(ptx=False))
    for threads, steps in TILES:
        config = base._replace(threads=threads, steps=steps)
        found[f"{threads} threads x {steps} words"] = partial(configured, config=config)
    for read in ("evict_first", ""):
        for write in ("evict_first", ""):
            config = base._replace(read_policy=read, write_policy=write)
            name = f"read {read or 'normal'}, write {write or 'normal'}"
            found[name] = partial(configured, config=config)
    return found


def weight_of(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, bnb.QuantState]:
    """Quantize a random weight; a large one is made of copies of a block of rows, to save memory and time."""
    packed, state = recipe.quantize(min(rows, 4096), columns, dtype, "cuda")
    copies = -(-rows // 4096)
    if copies > 1:
        blocks, groups = rows * columns // 64, -(-rows * columns // 64 // 256)
        packed = packed.flatten().repeat(copies)[: rows * columns // 2].contiguous().view(-1, 1)
        state.absmax = state.absmax.repeat(copies)[:blocks].contiguous()
        state.state2.absmax = state.state2.absmax.repeat(copies)[:groups].contiguous()
        state.shape = torch.Size((rows, columns))
    return packed, state


def check_formats() -> list[str]:
    """Compare dtypes, blocksizes, both formats, nested and not, with bitsandbytes; returns the differing ones."""
    wrong = []
    for dtype in nf4.DTYPES:
        integers = torch.int32 if dtype is torch.float32 else torch.int16
        for quant_type in ("nf4", "fp4"):
            for nested in (True, False):
                for blocksize in (32, 64, 4096):
                    weight = torch.randn(515, 257, dtype=dtype, device="cuda")
                    options = {"blocksize": blocksize, "compress_statistics": nested, "quant_type": quant_type}
                    packed, state = bnb.quantize_4bit(weight, **options)
                    ours, theirs = nf4.dequantize_quant_state(packed, state), bnb.dequantize_4bit(packed, state)
                    differing = int((ours.view(integers) != theirs.view(integers)).sum())
                    if differing:
                        wrong.append(f"{differing} elements differ: {dtype}, {options}")
    return wrong


def copy_milliseconds(moved: int) -> list[float]:
    """Time a device copy that reads half of ``moved`` bytes and writes as many."""
    source = torch.empty(moved // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return recipe.gpu_milliseconds(lambda: target.copy_(source))  # type: ignore[no-any-return]


def time_case(rows: int, columns: int, dtype: torch.dtype) -> dict[str, Any]:
    """Check, then time each variant on one weight: percentiles of milliseconds, or the reason why not."""
    packed, state = weight_of(rows, columns, dtype)
    moved = recipe.bytes_moved(rows * columns, dtype)
    results: dict[str, Any] = {"copy of as many bytes": copy_milliseconds(moved)}
    expected = bnb.dequantize_4bit(packed, state).view(torch.int16)
    for name, variant in variants().items():
        try:
            differing = int((variant(packed, state).view(torch.int16) != expected).sum())
            if differing:
                results[name] = f"{differing} elements differ from bitsandbytes"
            else:
                results[name] = recipe.gpu_milliseconds(partial(variant, packed, state))
        except Exception as error:  # one variant that fails must not cost the run
            results[name] = f"{type(error).__name__}: {error}"[:300]
    return results


def host_microseconds(calls: int = 2000) -> dict[str, float]:
    """Host time of a call that does next to nothing on the GPU."""
    packed, state = recipe.quantize(64, 64, torch.bfloat16, "cuda")
    ours = {
        **recipe.IMPLEMENTATIONS,
        "this kernel, through the dispatcher": through_dispatcher,
        "simple kernel, Triton's launcher": partial(simple, select=False),
        "torch.empty": lambda packed, state: torch.empty(state.shape, dtype=state.dtype, device=packed.device),
    }
    found = {}
    for name, call in ours.items():
        for measured in (calls // 10, calls):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(measured):
                call(packed, state)
            found[name] = (time.perf_counter() - start) / measured * 1e6
            torch.cuda.synchronize()
    quantized = nf4.Quantized4bit.from_quant_state(packed, state)
    start = time.perf_counter()
    for _ in range(calls):
        nf4._check(quantized, 4096, torch.bfloat16)
    found["checks of the arguments"] = (time.perf_counter() - start) / calls * 1e6
    return found


def peak_extra_bytes() -> int:
    """Bytes allocated during a call beyond the result."""
    packed, state = recipe.quantize(4096, 4096, torch.float16, "cuda")
    nf4.dequantize_quant_state(packed, state)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    weight = nf4.dequantize_quant_state(packed, state)
    return torch.cuda.max_memory_allocated() - before - weight.numel() * weight.element_size()


COLUMNS = ["weight", "Unsloth's sequence, us", "this kernel, us", "speed-up", "TB/s", "share of a copy", "best variant"]


def main() -> int:
    """Check, time, print and record. Returns 1 if the library's own result differs from bitsandbytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--commit", default=None)
    parser.add_argument("--iterations", type=int, default=600, help="of the puzzle's loop")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("This needs a CUDA GPU: recipes/nf4_dequant.py --check works without.", file=sys.stderr)
        return 2
    began = time.perf_counter()
    torch.manual_seed(0)
    raw: dict[str, Any] = {"milliseconds_p20_p50_p80": {}, "errors": []}
    rows: list[list[Any]] = []

    def part(name: str, work: Callable[[], Any]) -> Any:
        """Run one part; a failure is recorded and the next part goes on."""
        try:
            result = work()
        except Exception:  # see above: machine time is scarce, a partial record is worth having
            raw["errors"].append(f"{name}: {traceback.format_exc(limit=4)}")
            print(raw["errors"][-1], file=sys.stderr)
            return None
        print(f"[{time.perf_counter() - began:.0f} s] {name}", flush=True)
        return result

    def save() -> Path:
        notes = (
            "GPU time: median of do_bench. Loop: wall clock of the puzzle's loop for three weights, median; most of it "
            "is host time. Copy: of as many bytes as the kernel reads and writes."
        )
        return save_record(
            "nf4_dequant", COLUMNS, rows, notes=notes, directory=arguments.results, commit=arguments.commit, raw=raw
        )

    raw["differences"] = part("formats compared with bitsandbytes", check_formats)
    for shape in recipe.PUZZLE:
        name = f"loop, {shape.hidden} x {shape.intermediate} {recipe.TORCH_NAMES[shape.dtype]}"
        competitors = {**recipe.IMPLEMENTATIONS, "this kernel, through the dispatcher": through_dispatcher}
        times = part(name, partial(recipe.time_loop, competitors, shape, arguments.iterations))
        if times is None:
            continue
        micros = {who: [t * 1e6 for t in quantiles(samples, n=10)] for who, samples in times.items()}
        raw.setdefault("loop_microseconds_p20_p50_p80", {})[name] = {
            who: [deciles[1], deciles[4], deciles[7]] for who, deciles in micros.items()
        }
        theirs, ours = micros["Unsloth's sequence"][4], micros["this kernel"][4]
        rows.append([name, theirs, ours, theirs / ours, None, None, None])
    for name, case in CASES.items():
        results = part(name, partial(time_case, *case))
        if results is None:
            continue
        raw["milliseconds_p20_p50_p80"][name] = results
        timed = {who: value[1] for who, value in results.items() if isinstance(value, list)}
        for who, value in sorted(timed.items(), key=lambda item: item[1]):
            print(f"    {value * 1000:9.2f} us  {who}")
        for who, value in results.items():
            if not isinstance(value, list):
                print(f"    not timed: {who}: {value}")
        ours, theirs = timed.get("this kernel"), timed.get("Unsloth's sequence")
        if ours is None or theirs is None:
            continue
        moved = recipe.bytes_moved(case[0] * case[1], case[2])
        best = min((who for who in timed if not who.startswith("copy")), key=lambda who: timed[who])
        share = timed["copy of as many bytes"] / ours
        rows.append([name, theirs * 1000, ours * 1000, theirs / ours, moved / ours / 1e9, share, best])
        save()  # what there is, in case a later part takes the process down
    raw["host_microseconds"] = part("host time of a call", host_microseconds)
    raw["peak_extra_bytes"] = part("peak memory", peak_extra_bytes)
    raw["seconds"] = time.perf_counter() - began
    path = save()
    print(f"host, us: {raw['host_microseconds']}\npeak extra bytes: {raw['peak_extra_bytes']}")
    print(f"{path} after {raw['seconds']:.0f} s; differences from bitsandbytes: {raw['differences']}")
    return 1 if raw["differences"] or raw["differences"] is None else 0


if __name__ == "__main__":
    sys.exit(main())
