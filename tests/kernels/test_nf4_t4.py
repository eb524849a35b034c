"""The NF4 kernel compiled to machine code for the T4 (sm_75) and newer GPUs; no GPU takes part.

ptxas refuses an instruction the architecture lacks, so a cubin is the proof that the kernel runs there. What it does
not refuse, spilled registers, narrow stores, a contracted multiply-add, is read from its report and from the code.
"""

from __future__ import annotations

import itertools
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from lightning_qlora.kernels import nf4

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

KERNEL = getattr(nf4, "_dequantize_4bit_kernel", None)
pytestmark = pytest.mark.skipif(
    not isinstance(KERNEL, triton.JITFunction), reason="TRITON_INTERPRET is set: there is nothing to compile"
)
TRITON_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


class Code(NamedTuple):
    ptx: str
    sass: str
    registers: int
    stack_bytes: int  # where spilled registers go
    shared_bytes: int


def compile_kernel(
    capability: int,
    dtype: torch.dtype,
    nested: bool,
    blocksize: int,
    directory: Path,
    ptx: bool | None = None,
    wide_numel: bool = False,
) -> Code:
    """Compile for ``sm_<capability>`` as the launcher would; ``ptx=False`` leaves the assembly out."""
    config = nf4.LaunchConfig()
    if ptx is None:
        ptx = not (dtype is torch.bfloat16 and capability < 80)
    statistics = "*fp32" if nested else "constexpr"
    signature = {
        "packed_ptr": "*u8",
        "absmax_ptr": "*u8" if nested else "*fp32",
        "code2_ptr": statistics,
        "absmax2_ptr": statistics,
        "offset_ptr": statistics,
        "table_ptr": "*fp32",
        "out_ptr": f"*{TRITON_NAMES[dtype]}",
        "numel": "i64" if wide_numel else "i32",
    }
    constants: dict[str, Any] = {
        "BLOCKSIZE": blocksize,
        "NESTED_BLOCKSIZE": 256,
        "NESTED": nested,
        "ALIGNED": True,
        "THREADS": config.threads,
        "STEPS": config.steps,
        "PTX": ptx,
        "PACKED_CVT": capability >= 80,
        "READ_POLICY": config.read_policy,
        "WRITE_POLICY": config.write_policy,
    }
    signature |= dict.fromkeys(constants, "constexpr")
    names = list(signature)
    constants |= {name: None for name, kind in signature.items() if kind == "constexpr" and name not in constants}
    source = ASTSource(
        KERNEL,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in ("packed_ptr", "out_ptr")},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": config.threads // 32, "enable_fp_fusion": False},
    )
    cubin = directory / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = cuobjdump("-res-usage", cubin)
    report = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert report is not None, usage
    registers, stack, local = map(int, report.groups())
    return Code(compiled.asm["ptx"], cuobjdump("-sass", cubin), registers, stack + local, compiled.metadata.shared)


def cuobjdump(option: str, cubin: Path) -> str:
    tool = triton.knobs.nvidia.cuobjdump.path  # the one in Triton's wheel
    return subprocess.run([tool, option, str(cubin)], check=True, capture_output=True, text=True).stdout


VARIANTS = list(itertools.product(nf4.DTYPES, (True, False), nf4.BLOCKSIZES))
# One of each dtype with and without double quantization, and the extreme blocksizes. The rest is slow.
QUICK = [v for v in VARIANTS if v[2] == 64] + [(torch.float16, True, 32), (torch.float16, True, 4096)]


@pytest.mark.parametrize(
    ("dtype", "nested", "blocksize"),
    [*QUICK, *(pytest.param(*variant, marks=pytest.mark.slow) for variant in VARIANTS if variant not in QUICK)],
)
def test_t4(dtype: torch.dtype, nested: bool, blocksize: int, tmp_path: Path) -> None:
    code = compile_kernel(75, dtype, nested, blocksize, tmp_path)
    assert ".target sm_75" in code.ptx
    assert code.stack_bytes == 0
    assert code.registers <= 64  # the 1024 threads of an SM share 65536 registers: all of them can be resident
    assert code.shared_bytes <= 8192  # 8 programs an SM share 64 KiB
    # These begin with sm_80; bf16 is then rounded with integers, fp16 one value at a time.
    for missing in ("cp.async", "createpolicy", "cvt.rn.bf16", "cvt.rn.f16x2", "mma."):
        assert missing not in code.ptx
    assert not re.search(r"\bfma\.|\bmad\.(rn|f32)", code.ptx)
    conversions = 8 * nf4.LaunchConfig().steps + 2  # of a thread's words, and in the loop of the tail
    assert code.ptx.count("cvt.rn.f16.f32") == (conversions if dtype is torch.float16 else 0)
    assert_wide_accesses(code, dtype)


def assert_wide_accesses(code: Code, dtype: torch.dtype) -> None:
    words = nf4.LaunchConfig().steps
    assert len(re.findall(r"STG\.E\.128", code.sass)) == words * (2 if dtype is torch.float32 else 1)
    shuffles = 0 if "shfl" not in code.ptx else words * 8
    assert len(re.findall(r"SHFL\.IDX", code.sass)) == shuffles


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_newer_gpus(capability: int, dtype: torch.dtype, tmp_path: Path) -> None:
    code = compile_kernel(capability, dtype, True, 64, tmp_path)
    assert code.stack_bytes == code.shared_bytes == 0
    assert code.registers <= 32  # all 2048 threads of an SM resident
    assert "shfl.sync.idx" in code.ptx
    pairs = "cvt.rn.f16x2.f32" if dtype is torch.float16 else "cvt.rn.bf16x2.f32"
    assert code.ptx.count(pairs) >= 4 * nf4.LaunchConfig().steps
    assert "FFMA" not in code.sass
    assert "L2::evict_first" in code.ptx
    assert "L2::evict_last" in code.ptx
    assert_wide_accesses(code, dtype)


@pytest.mark.parametrize("capability", [75, 90])
def test_plain_triton_is_not_contracted_either(capability: int, tmp_path: Path) -> None:
    code = compile_kernel(capability, torch.float16, True, 64, tmp_path, ptx=False)
    assert "shfl" not in code.ptx
    assert "FFMA" not in code.sass
    assert code.stack_bytes == 0


def test_more_than_two_to_the_31_elements(tmp_path: Path) -> None:
    """A 64-bit element count costs no spill and no shared memory on a T4."""
    code = compile_kernel(75, torch.float16, True, 64, tmp_path, wide_numel=True)
    assert code.stack_bytes == code.shared_bytes == 0
