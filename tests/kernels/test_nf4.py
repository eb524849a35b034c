"""kernels/nf4.py against an independent NumPy reference, against bitsandbytes, and as a torch op.

Three implementations are under test: the plain-torch reference and the CPU op in this process, and the Triton kernel,
interpreted on the CPU in a child process (``TRITON_INTERPRET`` is read when Triton decorates a kernel) and compiled on
the GPU where there is one.
"""

from __future__ import annotations

import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_qlora.kernels import nf4
from lightning_qlora.kernels.nf4 import Quantized4bit

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
needs_two_gpus = [pytest.mark.multigpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]


def make_weight(
    shape: tuple[int, ...],
    blocksize: int = 64,
    nested_blocksize: int = 256,
    quant_type: str = "nf4",
    nested: bool = True,
    seed: int = 0,
) -> Quantized4bit:
    """Return a weight of random codes: every code and every 8-bit scale occurs, unlike in a quantized normal weight."""
    generator = torch.Generator().manual_seed(seed)
    numel = math.prod(shape)
    blocks = -(-numel // blocksize)
    weight = Quantized4bit(
        packed=torch.randint(0, 256, ((numel + 1) // 2, 1), dtype=torch.uint8, generator=generator),
        absmax=torch.rand(blocks, generator=generator) + 0.01,
        code2=None,
        absmax2=None,
        offset=None,
        shape=shape,
        blocksize=blocksize,
        nested_blocksize=nested_blocksize,
        quant_type=quant_type,
    )
    if not nested:
        return weight
    return weight._replace(
        absmax=torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator),
        code2=bnb.create_dynamic_map(),
        absmax2=torch.rand(-(-blocks // nested_blocksize), generator=generator) * 0.1 + 0.01,
        offset=torch.tensor(0.0731),
    )


def numpy_dequantize(weight: Quantized4bit, dtype: torch.dtype) -> np.ndarray:
    """Dequantize in NumPy: float16 and float32 as such, bfloat16 as the float32 numbers it stands for."""
    numel = math.prod(weight.shape)
    data = weight.packed.numpy().reshape(-1)
    codes = np.empty(2 * data.size, dtype=np.int64)
    codes[0::2], codes[1::2] = data // 16, data % 16
    element = np.arange(numel)
    absmax = weight.absmax.numpy()
    if weight.code2 is not None and weight.absmax2 is not None and weight.offset is not None:
        block = np.arange(absmax.size)
        scale2 = weight.absmax2.numpy()[block // weight.nested_blocksize]
        absmax = np.add(np.multiply(weight.code2.numpy()[absmax], scale2), weight.offset.numpy())
    table = bnb.get_4bit_type(weight.quant_type, device="cpu").numpy()
    assert table.dtype == absmax.dtype == np.float32
    values: np.ndarray = (table[codes[:numel]] * absmax[element // weight.blocksize]).reshape(weight.shape)
    if dtype is torch.bfloat16:
        bits = values.view(np.uint32).astype(np.uint64)
        below, kept = bits % 0x10000, bits // 0x10000
        kept += (below > 0x8000) | ((below == 0x8000) & (kept % 2 == 1))
        values = (kept * 0x10000).astype(np.uint32).view(np.float32)
    elif dtype is torch.float16:
        values = values.astype(np.float16)
    return values


def half(weight: Quantized4bit) -> Tensor:
    return nf4.dequantize_4bit(weight, dtype=torch.float16)


def as_numpy(weight: Tensor) -> np.ndarray:
    return (weight.float() if weight.dtype is torch.bfloat16 else weight).numpy()


shapes = st.one_of(
    st.tuples(st.integers(1, 9000)),
    st.tuples(st.integers(1, 40), st.integers(1, 300)),
    st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 70)),
)
weights = st.builds(
    make_weight,
    shape=shapes,
    blocksize=st.sampled_from(nf4.BLOCKSIZES),
    nested_blocksize=st.sampled_from((1, 7, 256)),
    quant_type=st.sampled_from(("nf4", "fp4")),
    nested=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
dtypes = st.sampled_from(nf4.DTYPES)
relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


# --- the reference and the CPU op -----------------------------------------------------------------------------------


@given(weights, dtypes)
@settings(relaxed, max_examples=100)
def test_reference_equals_numpy(weight: Quantized4bit, dtype: torch.dtype) -> None:
    reference = nf4.dequantize_4bit_reference(weight, dtype=dtype)
    np.testing.assert_array_equal(as_numpy(reference), numpy_dequantize(weight, dtype))


@given(weights, dtypes)
@settings(relaxed, max_examples=100)
def test_cpu_op_equals_numpy(weight: Quantized4bit, dtype: torch.dtype) -> None:
    result = nf4.dequantize_4bit(weight, dtype=dtype)
    assert result.shape == weight.shape
    assert result.dtype is dtype
    np.testing.assert_array_equal(as_numpy(result), numpy_dequantize(weight, dtype))


@pytest.mark.parametrize("dtype", nf4.DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
def test_equals_bitsandbytes_after_its_quantization(dtype: torch.dtype, quant_type: str, nested: bool) -> None:
    weight = torch.randn(24, 128, dtype=dtype)
    for blocksize in (32, 64, 128):
        packed, state = bnb.quantize_4bit(
            weight, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type
        )
        ours = nf4.dequantize_quant_state(packed, state)
        assert torch.equal(ours, bnb.dequantize_4bit(packed, state))
        quantized = Quantized4bit.from_quant_state(packed, state)
        assert torch.equal(ours, nf4.dequantize_4bit_reference(quantized, dtype=dtype))
        again = Quantized4bit.quantize(weight, nested=nested, blocksize=blocksize, quant_type=quant_type)
        assert torch.equal(nf4.dequantize_4bit(again, dtype=dtype), ours)


@pytest.mark.parametrize("nested", [True, False])
def test_a_quant_state_is_taken_over_without_copies(nested: bool) -> None:
    packed, state = bnb.quantize_4bit(torch.randn(3, 5, 64), blocksize=64, compress_statistics=nested, quant_type="nf4")
    quantized = Quantized4bit.from_quant_state(packed, state)
    assert quantized.packed is packed
    assert quantized.absmax is state.absmax
    if nested:
        assert quantized.code2 is state.state2.code
        assert quantized.absmax2 is state.state2.absmax
        assert quantized.offset is state.offset
    else:
        assert quantized[2:5] == (None, None, None)
    assert quantized[5:] == ((3, 5, 64), 64, 256, "nf4")


def test_weights_of_any_number_of_dimensions_that_are_not_contiguous_are_quantized() -> None:
    weight = torch.randn(6, 5, 64).transpose(0, 1)
    quantized = Quantized4bit.quantize(weight)
    result = nf4.dequantize_4bit(quantized, dtype=torch.float32)
    assert result.shape == weight.shape
    assert torch.equal(result, nf4.dequantize_4bit_reference(quantized, dtype=torch.float32))
    assert (result - weight).abs().mean() < 0.1 * weight.abs().mean()  # in the order of the weight's elements


def test_error_of_the_result_is_one_rounding_of_the_exact_value() -> None:
    for dtype in nf4.DTYPES:
        weight = make_weight((64, 96))
        scales = nf4.dequantize_absmax(weight)
        table = torch.tensor(nf4.TABLES["nf4"], dtype=torch.float32).double()
        data = weight.packed.flatten().int()
        codes = torch.stack((data // 16, data % 16), 1).flatten()
        exact = (table[codes] * scales.double().repeat_interleave(64)).view(64, 96)
        # Two roundings, to float32 and to the dtype; below the normal range the spacing is constant.
        info = torch.finfo(dtype)
        bound = exact.abs() * (info.eps / 2 + 2.0**-24) + info.smallest_normal * info.eps / 2
        assert ((nf4.dequantize_4bit(weight, dtype=dtype).double() - exact).abs() <= bound).all()


def test_fused_multiply_add_would_show() -> None:
    """The weights of these tests tell two roundings of the nested scale from one, or they could not see a fused add."""
    weight = make_weight((4096, 64))
    assert weight.code2 is not None
    assert weight.absmax2 is not None
    assert weight.offset is not None
    scale2 = weight.absmax2.repeat_interleave(256)[: weight.absmax.numel()]
    fused = (weight.code2[weight.absmax.int()].double() * scale2.double() + weight.offset.double()).float()
    contracted = weight._replace(absmax=fused, code2=None, absmax2=None, offset=None)
    results = [nf4.dequantize_4bit(each, dtype=torch.float16) for each in (weight, contracted)]
    assert not torch.equal(*results)


@pytest.mark.parametrize("storage", [torch.uint8, torch.float16, torch.bfloat16, torch.float32])
def test_storage_dtype_does_not_matter(storage: torch.dtype) -> None:
    weight = make_weight((6, 128))
    viewed = weight._replace(packed=weight.packed.view(-1).view(storage).view(6, -1))
    assert torch.equal(half(viewed), half(weight))


def test_surplus_bytes_are_ignored() -> None:
    weight = make_weight((3, 33))
    longer = weight._replace(packed=torch.cat((weight.packed.flatten(), torch.full((17,), 255, dtype=torch.uint8))))
    assert torch.equal(half(longer), half(weight))


def test_empty_weight() -> None:
    empty = make_weight((0, 64), nested=False)
    assert half(empty).shape == (0, 64)


def test_out_is_filled_and_returned() -> None:
    weight = make_weight((16, 64))
    out = torch.empty(16, 64, dtype=torch.bfloat16)
    assert nf4.dequantize_4bit(weight, dtype=torch.bfloat16, out=out) is out
    assert torch.equal(out, nf4.dequantize_4bit(weight, dtype=torch.bfloat16))


def test_dtype_of_the_result_is_independent_of_the_quantized_one() -> None:
    packed, state = bnb.quantize_4bit(torch.randn(8, 64, dtype=torch.float16), quant_type="nf4", blocksize=64)
    ours = nf4.dequantize_quant_state(packed, state, dtype=torch.float32)
    assert ours.dtype is torch.float32
    assert torch.equal(ours.half(), bnb.dequantize_4bit(packed, state))


# --- the Triton kernel, interpreted ---------------------------------------------------------------------------------

# Reads pickled (weight, dtype, config, shift) and answers with the pickled result; `shift` misaligns packed and out by
# bytes.
INTERPRETER = """
import pickle, sys
import torch
from lightning_qlora.kernels import nf4
answers, sys.stdout = sys.stdout.buffer, sys.stderr
while True:
    weight, dtype, config, (shift_packed, shift_out) = pickle.load(sys.stdin.buffer)
    packed, shape = weight.packed, weight.shape
    # A buffer of known alignment, 64 bytes of 0xEE and the packed bytes after them.
    size = packed.numel() * packed.element_size()
    buffer = torch.full((size + 128,), 0xEE, dtype=torch.uint8)
    first = 64 - buffer.data_ptr() % 64 + shift_packed
    buffer[first : first + size] = packed.view(-1).view(torch.uint8)
    numel = torch.Size(shape).numel()
    canvas = torch.full((numel + 128,), 7.0, dtype=dtype)
    skip = (64 - canvas.data_ptr() % 64) // dtype.itemsize + shift_out
    out = canvas[skip : skip + numel].view(shape)
    nf4._launch(weight._replace(packed=buffer[first : first + size]), out, nf4.LaunchConfig(*config))
    untouched = bool((canvas[:skip] == 7).all() and (canvas[skip + numel :] == 7).all())
    pickle.dump((out.clone(), untouched), answers)
    answers.flush()
"""
Interpret = Callable[..., Tensor]


@pytest.fixture(scope="module")
def interpret() -> Iterator[Interpret]:
    """Run the kernel on CPU tensors in a child process with Triton's interpreter."""
    pytest.importorskip("triton")
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", INTERPRETER],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    stdin, stdout = child.stdin, child.stdout

    def run(
        weight: Quantized4bit,
        dtype: torch.dtype = torch.float16,
        config: tuple[int, int] = (32, 2),
        shift: tuple[int, int] = (0, 0),
    ) -> Tensor:
        pickle.dump((weight, dtype, config, shift), stdin)
        stdin.flush()
        out, untouched = pickle.load(stdout)
        assert untouched, "the kernel wrote outside of out"
        result: Tensor = out
        return result

    yield run
    child.kill()
    child.wait()


@given(
    weight=weights,
    dtype=dtypes,
    config=st.sampled_from(((32, 1), (32, 2), (64, 2), (128, 4))),
    shift=st.sampled_from(((0, 0), (0, 0), (1, 0), (4, 0), (0, 1), (3, 5))),
)
@settings(relaxed, max_examples=40)
def test_interpreted_kernel_equals_numpy(
    interpret: Interpret, weight: Quantized4bit, dtype: torch.dtype, config: tuple[int, int], shift: tuple[int, int]
) -> None:
    result = interpret(weight, dtype, config, shift)
    np.testing.assert_array_equal(as_numpy(result), numpy_dequantize(weight, dtype))


@pytest.mark.parametrize("numel", [511, 512, 513, 1023, 3 * 512 - 7, 3 * 512 + 77])
def test_interpreted_kernel_at_the_end_of_a_tile(interpret: Interpret, numel: int) -> None:
    weight = make_weight((numel,))
    assert torch.equal(interpret(weight), nf4.dequantize_4bit_reference(weight, dtype=torch.float16))


@pytest.mark.parametrize("nested_blocksize", [1, 4, 7, 12, 256])
def test_interpreted_kernel_across_nested_groups(interpret: Interpret, nested_blocksize: int) -> None:
    """Tiles of 512 elements that hold several groups of nested scales, begin inside one, or lie within one."""
    weight = make_weight((7 * 512 + 77,), blocksize=32, nested_blocksize=nested_blocksize)
    assert torch.equal(interpret(weight), nf4.dequantize_4bit_reference(weight, dtype=torch.float16))


def test_interpreted_kernel_rounds_ties_to_even(interpret: Interpret) -> None:
    """Code 15 is 1.0: the weight is absmax itself, here halfway between two bfloat16 numbers."""
    weight = make_weight((512,), nested=False)
    weight.packed.fill_(0xFF)
    weight = weight._replace(absmax=1 + 2.0**-8 * torch.arange(1, 16, 2))
    expected = 1 + 2.0**-7 * torch.tensor([0, 2, 2, 4, 4, 6, 6, 8])
    assert torch.equal(interpret(weight, torch.bfloat16)[::64].float(), expected)


@pytest.mark.parametrize("dtype", nf4.DTYPES)
def test_interpreted_kernel_keeps_nan_and_infinity(interpret: Interpret, dtype: torch.dtype) -> None:
    weight = make_weight((1024,), nested=False)
    weight.absmax[0], weight.absmax[1] = math.nan, math.inf
    result, expected = interpret(weight, dtype), nf4.dequantize_4bit_reference(weight, dtype=dtype)
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
    assert result[:64].isnan().all()


# --- as a torch op --------------------------------------------------------------------------------------------------


def op_arguments(weight: Quantized4bit, dtype: torch.dtype) -> tuple[Any, ...]:
    return (*weight[:6], dtype, *weight[6:])


@pytest.mark.parametrize("nested", [True, False])
def test_opcheck(nested: bool) -> None:
    arguments = op_arguments(make_weight((8, 96), nested=nested), torch.float16)
    torch.library.opcheck(torch.ops.lightning_qlora.dequantize_4bit.default, arguments)
    out = torch.empty(8, 96, dtype=torch.float16)
    torch.library.opcheck(torch.ops.lightning_qlora.dequantize_4bit.out, arguments, {"out": out})


def test_compiles_to_one_graph_with_dynamic_shapes() -> None:
    graphs = 0

    def count(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        forward: Callable[..., Any] = module.forward
        return forward

    @torch.compile(fullgraph=True, dynamic=True, backend=count)
    def linear(x: Tensor, weight: Quantized4bit, rows: int, columns: int) -> Tensor:
        return x @ nf4.dequantize_4bit(weight._replace(shape=(rows, columns)), dtype=torch.float32).t()

    # Sizes that share nothing, and more than one entry of absmax2: a size of 1 is a case of its own to the compiler.
    for rows, columns, seed in ((320, 192, 0), (448, 704, 1), (832, 576, 2)):
        weight = make_weight((rows, columns), seed=seed)
        x = torch.randn(5 + seed, columns)
        expected = x @ nf4.dequantize_4bit_reference(weight, dtype=torch.float32).t()
        torch.testing.assert_close(linear(x, weight, rows, columns), expected, rtol=0, atol=0)
    assert graphs == 1


def test_compiles_with_inductor_and_out() -> None:
    weight = make_weight((96, 128))
    out = torch.empty(96, 128)

    @torch.compile(fullgraph=True)
    def into(out: Tensor) -> Tensor:
        return nf4.dequantize_4bit(weight, dtype=torch.float32, out=out) * 2

    expected = nf4.dequantize_4bit_reference(weight, dtype=torch.float32)
    assert torch.equal(into(out), expected * 2)
    assert torch.equal(out, expected)


def test_fake_tensors_give_the_shape_without_data() -> None:
    weight = make_weight((48, 96))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = weight._replace(packed=mode.from_tensor(weight.packed))
        result = nf4.dequantize_4bit(fake, dtype=torch.bfloat16)
    assert isinstance(result, torch._subclasses.FakeTensor)
    assert (result.shape, result.dtype) == ((48, 96), torch.bfloat16)


def test_dispatcher_is_skipped_only_when_nothing_intercepts() -> None:
    plain = torch.zeros(4)
    assert nf4._nothing_intercepts(plain)
    assert nf4._nothing_intercepts(torch.nn.Parameter(plain))
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        assert not nf4._nothing_intercepts(plain)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = mode.from_tensor(plain)
    assert not nf4._nothing_intercepts(fake)


def test_the_folder_under_the_name_that_transformers_imports_defines_nothing() -> None:
    """``import kernels``, from the repository's root, after the package itself."""
    code = """
import sys
import lightning_qlora.kernels as ours
assert "bitsandbytes" not in sys.modules
sys.path.insert(0, sys.argv[1])
import kernels
assert kernels.__file__ == sys.argv[1] + "/kernels/__init__.py"
assert not hasattr(kernels, "__version__")
assert "lightning_qlora.kernels.nf4" not in sys.modules
from lightning_qlora.kernels import Quantized4bit, dequantize_4bit, dequantize_quant_state, nf4
assert dequantize_4bit is ours.dequantize_4bit is nf4.dequantize_4bit
assert "kernels.nf4" not in sys.modules
assert "bitsandbytes" not in sys.modules
"""
    root = str(Path(__file__).resolve().parents[2])
    subprocess.run([sys.executable, "-P", "-c", code, root], check=True, timeout=120)


def test_works_without_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None  # makes `import triton` raise ImportError
import torch
from lightning_qlora.kernels import nf4
packed, absmax = torch.arange(256, dtype=torch.uint8), torch.ones(8)
quantized = nf4.Quantized4bit(packed, absmax, None, None, None, shape=(512,))
weight = nf4.dequantize_4bit(quantized, dtype=torch.float32)
table = torch.tensor(nf4.TABLES["nf4"])
assert nf4.triton is None
assert torch.equal(weight.view(16, 16, 2)[..., 0], table[:, None].expand(16, 16))
assert torch.equal(weight.view(16, 16, 2)[..., 1], table[None, :].expand(16, 16))
"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=120)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_type": "int4"}, "quant_type must be one of nf4, fp4"),
        ({"blocksize": 96}, "blocksize must be one of"),
        ({"blocksize": 32}, "absmax has 24 entries, but 1536 elements in blocks of 32 need 48"),
        ({"nested_blocksize": 0}, "nested_blocksize must be positive"),
        ({"nested_blocksize": 8}, "code2, absmax2, offset have 256, 1, 1 entries.*need 256, 3, 1"),
        ({"dtype": torch.float64}, "dtype must be one of"),
        ({"shape": (16, 97)}, "packed has 768 bytes, but 1552 elements of 4 bits need 776"),
        ({"shape": (16, 92)}, "absmax has 24 entries, but 1472 elements in blocks of 64 need 23"),
        ({"packed": torch.zeros(2, 768, dtype=torch.uint8).t()}, "packed must be contiguous"),
        ({"absmax": torch.zeros(24)}, "absmax must be uint8 with code2"),
        ({"code2": None}, "go together"),
        ({"code2": None, "absmax2": None, "offset": None}, "absmax must be float32 without code2"),
        ({"code2": torch.zeros(255)}, "have 255, 1, 1 entries"),
        ({"offset": torch.zeros(2)}, "have 256, 1, 2 entries"),
        ({"absmax2": torch.zeros(1, dtype=torch.float16)}, "must be float32.*float16"),
        ({"absmax": torch.zeros(48, dtype=torch.uint8)[::2]}, "absmax, code2 and absmax2 must be contiguous"),
        ({"out": torch.zeros(16, 96)}, "out must be torch.float16"),
        ({"out": torch.zeros(96, 16, dtype=torch.float16)}, r"out must be torch.float16 \(16, 96\)"),
        ({"out": torch.zeros(96, 16, dtype=torch.float16).t()}, "out must be contiguous"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], message: str) -> None:
    weight = make_weight((16, 96))
    half(weight)  # right before the change
    fields = {name: value for name, value in change.items() if name in Quantized4bit._fields}
    options = {name: value for name, value in change.items() if name not in fields}
    with pytest.raises(ValueError, match=message):
        nf4.dequantize_4bit(weight._replace(**fields), **({"dtype": torch.float16} | options))


def test_quant_state_of_another_weight_is_refused() -> None:
    packed, state = bnb.quantize_4bit(torch.randn(16, 64), quant_type="nf4", blocksize=64)
    _, other = bnb.quantize_4bit(torch.randn(16, 128), quant_type="nf4", blocksize=64)
    with pytest.raises(ValueError, match="belong to another weight"):
        nf4.dequantize_quant_state(packed, other)
    with pytest.raises(ValueError, match="not quantized yet"):
        nf4.dequantize_quant_state(packed, None)
    assert nf4.dequantize_quant_state(packed, state).shape == (16, 64)


# --- on a GPU -------------------------------------------------------------------------------------------------------


def to_device(weight: Quantized4bit, device: str = "cuda") -> Quantized4bit:
    return Quantized4bit(*(value.to(device) if isinstance(value, Tensor) else value for value in weight))


def bnb_dequantize(weight: Quantized4bit, dtype: torch.dtype) -> Tensor:
    """Run bitsandbytes' own three kernels."""
    absmax = weight.absmax
    if weight.code2 is not None:
        absmax = bnb.dequantize_blockwise(
            absmax, absmax=weight.absmax2, code=weight.code2, blocksize=weight.nested_blocksize
        )
        absmax += weight.offset
    state = bnb.QuantState(
        absmax,
        shape=torch.Size(weight.shape),
        dtype=dtype,
        blocksize=weight.blocksize,
        quant_type=weight.quant_type,
    )
    result: Tensor = bnb.dequantize_4bit(weight.packed, state)
    return result


def assert_same_bits(left: Tensor, right: Tensor) -> None:
    integers = torch.int32 if left.dtype is torch.float32 else torch.int16
    assert torch.equal(left.view(integers), right.view(integers))


class TestGPU:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("dtype", nf4.DTYPES)
    @pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
    @pytest.mark.parametrize("nested", [True, False])
    @pytest.mark.parametrize("shape", [(2048, 4096), (4097, 64), (1000, 1001)])
    def test_same_bits_as_bitsandbytes(
        self, dtype: torch.dtype, quant_type: str, nested: bool, shape: tuple[int, ...]
    ) -> None:
        for blocksize in nf4.BLOCKSIZES:
            weight = to_device(make_weight(shape, blocksize, quant_type=quant_type, nested=nested))
            assert_same_bits(nf4.dequantize_4bit(weight, dtype=dtype), bnb_dequantize(weight, dtype))

    @given(weights, dtypes)
    @settings(relaxed, max_examples=25)  # most compile a variant of their own
    def test_equals_numpy(self, weight: Quantized4bit, dtype: torch.dtype) -> None:
        result = nf4.dequantize_4bit(to_device(weight), dtype=dtype).cpu()
        np.testing.assert_array_equal(as_numpy(result), numpy_dequantize(weight, dtype))

    @pytest.mark.parametrize("dtype", nf4.DTYPES)
    def test_assembly_and_plain_triton_give_the_same_bits(self, dtype: torch.dtype) -> None:
        weight = to_device(make_weight((1024, 1027)))
        results = []
        for ptx in (True, False):
            out = torch.empty(weight.shape, dtype=dtype, device="cuda")
            nf4._launch(weight, out, nf4.LaunchConfig(ptx=ptx))
            results.append(out)
        assert_same_bits(*results)

    def test_misaligned_buffers(self) -> None:
        weight = to_device(make_weight((128, 96)))
        expected = half(weight)
        for shift_packed, shift_out in ((1, 0), (0, 1), (4, 8), (3, 5)):
            packed = torch.cat((weight.packed.new_zeros(shift_packed), weight.packed.flatten()))[shift_packed:]
            out = torch.empty(128 * 96 + shift_out, dtype=torch.float16, device="cuda")[shift_out:].view(128, 96)
            shifted = weight._replace(packed=packed)
            assert torch.equal(nf4.dequantize_4bit(shifted, dtype=torch.float16, out=out), expected)

    def test_current_stream_is_used(self) -> None:
        weight = to_device(make_weight((4096, 4096)))
        expected = half(weight)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        packed = weight.packed.clone()
        weight = weight._replace(packed=torch.zeros_like(packed))
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # type: ignore[no-untyped-call]  # on another stream the kernel would run now, before the copy
            weight.packed.copy_(packed)
            result = half(weight)
        torch.cuda.synchronize()
        assert torch.equal(result, expected)

    def test_only_the_output_is_allocated(self) -> None:
        weight = to_device(make_weight((4096, 4096)))
        half(weight)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = half(weight)
        assert torch.cuda.max_memory_allocated() - before == result.numel() * 2

    def test_compiled_graph(self) -> None:
        weight = to_device(make_weight((512, 640)))
        x = torch.randn(3, 640, dtype=torch.float16, device="cuda")

        @torch.compile(fullgraph=True)
        def linear(x: Tensor) -> Tensor:
            return x @ half(weight).t()

        torch.testing.assert_close(linear(x), x @ nf4.dequantize_4bit_reference(weight, dtype=torch.float16).t())

    def test_cuda_graph_replays(self) -> None:
        weight = to_device(make_weight((512, 640)))
        expected = half(weight)  # compiles, which a capture cannot
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = half(weight)
        result.zero_()
        graph.replay()
        assert torch.equal(result, expected)

    def test_beyond_two_to_the_31_elements(self) -> None:
        if torch.cuda.mem_get_info()[0] < 12 * 2**30:
            pytest.skip("needs 12 GiB of free GPU memory")
        numel = 2**31 + 4096 + 6
        packed = torch.randint(0, 256, (numel // 2,), dtype=torch.uint8, device="cuda")
        absmax = torch.rand(-(-numel // 64), device="cuda")
        quantized = Quantized4bit(packed, absmax, None, None, None, (numel,))
        weight = nf4.dequantize_4bit(quantized, dtype=torch.bfloat16)
        for start in (0, 2**30, 2**31 - 64, 2**31, numel // 64 * 64):  # around every place an int32 could wrap
            stop = min(start + 128, numel)
            part = quantized._replace(
                packed=packed[start // 2 : (stop + 1) // 2],
                absmax=absmax[start // 64 : -(-stop // 64)],
                shape=(stop - start,),
            )
            expected = nf4.dequantize_4bit_reference(part, dtype=torch.bfloat16)
            assert torch.equal(weight[start:stop], expected)


class TestTwoGPUs:
    pytestmark = needs_two_gpus

    def test_device_of_the_tensors_is_used(self) -> None:
        weight = make_weight((256, 96))
        expected = half(weight)
        assert torch.cuda.current_device() == 0
        result = half(to_device(weight, "cuda:1"))
        assert result.device == torch.device("cuda:1")
        assert torch.equal(result.cpu(), expected)
        with pytest.raises(ValueError, match="must be on one device"):
            half(to_device(weight, "cuda:1")._replace(absmax=weight.absmax.to("cuda:0")))
