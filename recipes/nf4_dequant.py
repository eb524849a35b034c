"""Dequantize NF4 weights in one Triton kernel: the puzzle's check and timing loop, against bitsandbytes and Unsloth.

    python recipes/nf4_dequant.py            # a CUDA GPU (T4 or newer, 6 GiB free), under a minute
    python recipes/nf4_dequant.py --check    # the check alone; without a GPU, Triton's interpreter runs the kernel

The check compares every weight bit for bit with bitsandbytes. The loop dequantizes the three weights of a Llama MLP one
after the other, with a transposition and a device synchronization after each, and counts wall-clock time: host work is
part of it. The plot shows the time of the GPU alone, as bandwidth over the number of elements, with a copy of as many
bytes as the ceiling. Expect at least 1.15 times Unsloth's speed, the puzzle's mark, in every row of the table.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

if __name__ == "__main__" and not torch.cuda.is_available():  # read where a kernel is decorated: in the import below
    os.environ.setdefault("TRITON_INTERPRET", "1")

import bitsandbytes.functional as bnb

from lightning_qlora.kernels import nf4
from lightning_qlora.modules.training.run_directory import claim_directory

Dequantize = Callable[[Tensor, bnb.QuantState], Tensor]
TORCH_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


class Shape(NamedTuple):
    """A Llama MLP: up and gate are [intermediate, hidden], down is [hidden, intermediate]."""

    hidden: int
    intermediate: int
    dtype: torch.dtype


PUZZLE = (
    Shape(2048, 8192, torch.float16),
    Shape(1024, 4096, torch.bfloat16),
    Shape(4096, 14336, torch.bfloat16),
)


def quantize(rows: int, columns: int, dtype: torch.dtype, device: str) -> tuple[Tensor, bnb.QuantState]:
    """Return a normally distributed weight [rows, columns] as ``Linear4bit`` stores it by default, in NF4."""
    weight = torch.randn(rows, columns, dtype=dtype, device=device)
    return bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")  # type: ignore[no-any-return]


def unsloth_sequence(packed: Tensor, state: bnb.QuantState) -> Tensor:
    """Call what Unsloth's ``fast_dequantize`` calls, with a float32 absmax in device memory between the two kernels."""
    from bitsandbytes.cextension import lib

    absmax = torch.empty(state.absmax.numel(), dtype=torch.float32, device=packed.device)
    weight = torch.empty(state.shape, dtype=state.dtype, device=packed.device)
    stream = torch.cuda.current_stream(packed.device).cuda_stream
    state2 = state.state2
    lib.cdequantize_blockwise_fp32(
        *(state2.code.data_ptr(), state.absmax.data_ptr(), state2.absmax.data_ptr(), absmax.data_ptr()),
        *(state2.blocksize, absmax.numel(), stream),
    )
    absmax += state.offset
    last = lib.cdequantize_blockwise_fp16_nf4 if state.dtype is torch.float16 else lib.cdequantize_blockwise_bf16_nf4
    last(None, packed.data_ptr(), absmax.data_ptr(), weight.data_ptr(), state.blocksize, weight.numel(), stream)
    return weight


def interpreted(packed: Tensor, state: bnb.QuantState) -> Tensor:
    """Run the Triton kernel on CPU tensors; in large tiles, for the interpreter takes its time per operation."""
    out = torch.empty(state.shape, dtype=state.dtype)
    nf4._launch(nf4.Quantized4bit.from_quant_state(packed, state), out, nf4.LaunchConfig(threads=8192))
    return out


IMPLEMENTATIONS: dict[str, Dequantize] = {
    "bitsandbytes": bnb.dequantize_4bit,
    "Unsloth's sequence": unsloth_sequence,
    "this kernel": nf4.dequantize_quant_state,
}


def compare(shape: Shape, device: str) -> str:
    """Compare the three weights of a shape with bitsandbytes, bit for bit; a sixteenth of the rows on a CPU.

    Raises:
        ValueError: They differ.
    """
    ours = nf4.dequantize_quant_state if device == "cuda" else interpreted
    part = 1 if device == "cuda" else 16
    for rows, columns in mlp(shape):
        packed, state = quantize(rows // part, columns, shape.dtype, device)
        wrong = (ours(packed, state).view(torch.int16) != bnb.dequantize_4bit(packed, state).view(torch.int16)).sum()
        if wrong:
            raise ValueError(
                f"{wrong} of {rows // part * columns} elements of a {rows // part} x {columns} "
                f"{TORCH_NAMES[shape.dtype]} weight differ from bitsandbytes: "
                "this build of Triton rounds differently. Please report the versions."
            )
    extent = "all rows" if part == 1 else f"1/{part} of the rows"
    return f"hidden {shape.hidden}, intermediate {shape.intermediate}, {TORCH_NAMES[shape.dtype]}: exact ({extent})"


def mlp(shape: Shape) -> list[tuple[int, int]]:
    """Rows and columns of up, gate and down."""
    return [(shape.intermediate, shape.hidden)] * 2 + [(shape.hidden, shape.intermediate)]


def time_loop(
    implementations: dict[str, Dequantize], shape: Shape, iterations: int, rounds: int = 4
) -> dict[str, list[float]]:
    """Time the puzzle's loop: seconds of each iteration (three weights), the implementations by turns."""
    weights = [quantize(rows, columns, shape.dtype, "cuda") for rows, columns in mlp(shape)]
    times: dict[str, list[float]] = {name: [] for name in implementations}
    for _ in range(rounds):
        for name, dequantize in implementations.items():
            for iteration in range(iterations // rounds + 2):
                start = perf_counter()
                for packed, state in weights:
                    dequantize(packed, state).t()
                    torch.cuda.synchronize()
                if iteration >= 2:  # two warm-ups, as in the puzzle
                    times[name].append(perf_counter() - start)
    return times


def bytes_moved(numel: int, dtype: torch.dtype) -> int:
    """Bytes read and written by a single pass: codes, 8-bit absmax of blocks of 64, and the weight."""
    return numel // 2 + numel // 64 + numel * dtype.itemsize


def gpu_milliseconds(function: Callable[[], Any]) -> list[float]:
    """20th, 50th and 80th percentile of the GPU's time, caches flushed before each call."""
    from triton.testing import do_bench

    return do_bench(function, warmup=10, rep=60, quantiles=[0.2, 0.5, 0.8])  # type: ignore[no-any-return]


def bandwidths(numel: int, dtype: torch.dtype) -> dict[str, float]:
    """GB/s of every implementation and of a copy that moves as many bytes, for a weight of ``numel`` elements."""
    packed, state = quantize(numel // 1024, 1024, dtype, "cuda")
    moved = bytes_moved(numel, dtype)
    source = torch.empty(moved // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    found = {"copy of as many bytes": moved / gpu_milliseconds(lambda: target.copy_(source))[1] / 1e6}
    for name, dequantize in IMPLEMENTATIONS.items():
        found[name] = moved / gpu_milliseconds(lambda call=dequantize: call(packed, state))[1] / 1e6  # type: ignore[misc]
    return found


def save_plot(path: Path, sizes: Sequence[int], series: dict[str, list[float]], title: str) -> None:
    """Draw GB/s over the number of elements."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, values in series.items():
        is_ceiling = name.startswith("copy")
        axes.plot(sizes, values, label=name, marker="o", color="grey" if is_ceiling else None)
    axes.set(title=title, xlabel="elements", ylabel="GB/s, read and written", ylim=(0, None))
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def main(check: bool = False, iterations: int = 1000, output_dir: Path = Path("runs/nf4_dequant")) -> None:
    """Check, time and plot.

    Args:
        check: Stop after the check, which needs no GPU.
        iterations: Iterations of the timing loop for each shape and implementation, at least 4.
        output_dir: Directory for ``report.json`` and ``bandwidth.svg``.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if iterations < 4:
        raise ValueError(f"--iterations must be at least 4, one for each round, got {iterations}.")
    if device == "cpu" and not check:
        raise ValueError("There is no CUDA GPU to time: run with --check, which interprets the kernel on the CPU.")
    if not check:
        _claim = claim_directory(output_dir)  # while this runs, no other may use it
    torch.manual_seed(0)
    for shape in PUZZLE:
        print(compare(shape, device), flush=True)
    if check:
        return
    rows = []
    print(f"\n{'three weights of':28}" + "".join(f"{name:>24}" for name in IMPLEMENTATIONS))
    for shape in PUZZLE:
        micros = {name: median(t) * 1e6 for name, t in time_loop(IMPLEMENTATIONS, shape, iterations).items()}
        name = f"{shape.hidden} x {shape.intermediate} {TORCH_NAMES[shape.dtype]}"
        rows.append({"shape": name, **micros, "speedup": micros["Unsloth's sequence"] / micros["this kernel"]})
        print(f"{name:28}" + "".join(f"{t:>21.1f} us" for t in micros.values()) + f"  {rows[-1]['speedup']:.2f} x")
    sizes = [2**power for power in range(20, 30, 2)]
    measured = [bandwidths(size, torch.bfloat16) for size in sizes]
    series = {name: [point[name] for point in measured] for name in measured[0]}
    output_dir.mkdir(parents=True, exist_ok=True)
    report = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "loop_microseconds": rows,
        "elements": sizes,
        "gigabytes_per_second": series,
    }
    (output_dir / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    title = f"NF4 to bf16, {torch.cuda.get_device_name()}"
    save_plot(output_dir / "bandwidth.svg", sizes, series, title)
    print(f"\nWrote {output_dir / 'report.json'} and {output_dir / 'bandwidth.svg'}.")


if __name__ == "__main__":
    from lightning_qlora.modules.cli import run_recipe

    sys.exit(run_recipe(main))
