"""The 4-bit linear layer against bitsandbytes' own weights, and what becomes of its bytes.

Shapes: T tokens, N out_features, K in_features.
"""

import copy
import io
from collections.abc import Callable
from itertools import product

import bitsandbytes.functional as bnb
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.flop_counter import FlopCounterMode

from lightning_qlora.kernels import Quantized4bit
from lightning_qlora.modules.dtensor import copy_local_rows, local_rows
from lightning_qlora.modules.quantization import NF4Linear, _linear_4bit

pytestmark = pytest.mark.usefixtures("one_thread")


def make_layer(n: int, k: int, bias: bool = False, seed: int = 0, **quantization: object) -> NF4Linear:
    torch.manual_seed(seed)
    return NF4Linear.from_linear(nn.Linear(k, n, bias), **quantization)


def stored_bytes(layer: NF4Linear) -> dict[str, Tensor]:
    tensors = {name: getattr(layer, name) for name in ("weight", "absmax", "code2", "absmax2", "offset")}
    return {name: t.detach().reshape(-1).view(torch.uint8).clone() for name, t in tensors.items() if t is not None}


def fill_with_random_bytes(layer: NF4Linear) -> NF4Linear:
    """Every byte pattern may occur, among them those that are signalling NaNs as floats."""
    for parameter in (layer.weight, layer.absmax):
        parameter.data.view(torch.uint8).random_(0, 256)
    return layer


def assert_same_bytes(layer: NF4Linear, expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(stored_bytes(layer), expected, rtol=0, atol=0)


def bnb_dequantize(packed: Tensor, state: bnb.QuantState) -> Tensor:
    """The weight [N, K], read as one row: the CPU kernel (0.50) takes wrong blocks where 64 does not divide K."""
    shape, state.shape = state.shape, torch.Size([1, state.shape[0] * state.shape[1]])
    return bnb.dequantize_4bit(packed, state).reshape(shape)


# --- the product


@pytest.mark.parametrize(("dtype", "quant_type"), list(product((torch.float32, torch.bfloat16), ("nf4", "fp4"))))
@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 40), eighths=st.integers(1, 30), tokens=st.integers(1, 5), nested=st.booleans())
def test_equals_a_dense_linear_of_the_weights_that_bitsandbytes_dequantizes(
    dtype, quant_type, n, eighths, tokens, nested
):
    k = 8 * eighths  # 64 rarely divides it: blocks cross rows, and the last one is short
    torch.manual_seed(n * 1000 + k)
    linear = nn.Linear(k, n, dtype=dtype)
    packed, state = bnb.quantize_4bit(linear.weight.data, compress_statistics=nested, quant_type=quant_type)
    dense = nn.Parameter(bnb_dequantize(packed, state))
    layer = NF4Linear.from_linear(linear, nested=nested, quant_type=quant_type)
    x, grad = torch.randn(2, tokens, k, dtype=dtype), torch.randn(2, tokens, n, dtype=dtype)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()

    y, expected = layer(x1), F.linear(x2, dense) + linear.bias
    y.backward(grad)
    expected.backward(grad)

    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    torch.testing.assert_close(x1.grad, x2.grad)
    assert all(p.grad is None for p in layer.parameters())


def test_autocast_decides_the_dtype_of_the_product():
    layer = make_layer(24, 40)
    x = torch.randn(3, 40, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.sum().backward()
    weight = layer.dequantize(torch.bfloat16)
    torch.testing.assert_close(y, F.linear(x.bfloat16(), weight), rtol=0, atol=0)
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, weight.float().sum(0).expand(3, -1), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("nested", [True, False])
def test_the_operators_keep_the_contract_of_torch_library(nested):
    layer = make_layer(12, 40, nested=nested)
    state = (layer.weight, layer.absmax, layer.code2, layer.absmax2, layer.offset)
    ops = torch.ops.lightning_qlora
    for op in (ops.linear_4bit_weight, ops.linear_4bit_weight_backward):
        torch.library.opcheck(op.default, (*state, 12, 40, torch.bfloat16, 64, 256, "nf4"))


def largest_saved(function: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Bytes of the largest storage that autograd keeps between the forward and the backward of ``function(x)``."""
    sizes = [0]

    def keep(tensor: Tensor) -> Tensor:
        sizes.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = function(x)
    y.sum().backward()
    return max(sizes)


@pytest.mark.parametrize("dynamic", [None, False, True], ids=["eager", "static", "dynamic"])
def test_autograd_keeps_packed_weights_only(dynamic):
    n, k = 160, 128
    mlp = nn.Sequential(make_layer(n, k), nn.SiLU(), make_layer(k, n))
    function: Callable[[Tensor], Tensor] = mlp
    if dynamic is not None:
        # This backend partitions the joint graph as the default one does, which is where a visible dequantization of
        # the backward would be taken for the forward's and its result kept; it needs no C++ compiler.
        torch._dynamo.reset()
        function = torch.compile(mlp, fullgraph=True, dynamic=dynamic, backend="aot_eager_decomp_partition")
    for tokens in (2, 3, 5):
        x = torch.randn(tokens, k, requires_grad=True)
        assert largest_saved(function, x) == n * k // 2  # the packed bytes
        compiled_grad, x.grad = x.grad, None
        mlp(x).sum().backward()
        torch.testing.assert_close(compiled_grad, x.grad)


def test_the_detector_of_saved_weights_sees_a_dense_one():
    layer = make_layer(160, 128)
    x = torch.randn(2, 128, requires_grad=True)
    assert largest_saved(lambda x: F.linear(x, layer.dequantize()), x) == 4 * 160 * 128


# --- with LoRA's product


def dense_lora(layer: NF4Linear, x: Tensor, a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """The sum of both products as separate ones in ``dtype``, which autograd differentiates."""
    x, a, b = (tensor.to(dtype) for tensor in (x, a, b))
    return F.linear(x, layer.dequantize(dtype)) + F.linear(F.linear(x, a) * scaling, b)


def adapter(n: int, k: int, r: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(r, k).div(k**0.5).requires_grad_(), torch.randn(n, r).requires_grad_()


LAYOUTS: dict[str, Callable[[int], Tensor]] = {
    "[B, S, K]": lambda k: torch.randn(3, 5, k),
    "[T, K]": lambda k: torch.randn(7, k),
    "[K]": lambda k: torch.randn(k),
    "one token": lambda k: torch.randn(2, 1, k),
    "no token": lambda k: torch.randn(2, 0, k),
    "transposed": lambda k: torch.randn(5, 3, k).transpose(0, 1),
    "every other": lambda k: torch.randn(3, 5, 2 * k)[..., ::2],
    "expanded": lambda k: torch.randn(3, 1, k).expand(3, 5, k),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_adds_the_product_of_lora(layout, bias):
    torch.manual_seed(0)
    n, k = 24, 40
    layer = make_layer(n, k, bias)
    x, grad = LAYOUTS[layout](k).requires_grad_(), LAYOUTS[layout](n)
    a, b = adapter(n, k)
    y = layer(x, lora=(a, b, 1.7))
    expected = dense_lora(layer, x, a, b, 1.7, torch.float32) + (layer.bias if bias else 0)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-6 * float(expected.detach().norm()))
    for upstream in (grad, grad, 65536 * grad):  # again, of a graph that is kept; and scaled, as for float16
        found, wanted = (torch.autograd.grad(out, [x, a, b], upstream, retain_graph=True) for out in (y, expected))
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 * float(theirs.detach().norm()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mixed", [False, True])
def test_in_16_bits_the_sum_is_no_less_exact_than_of_separate_products(dtype, mixed):
    """Against float64, with the same 4-bit weight in 16 bits and the same 16-bit operands."""
    torch.manual_seed(0)
    n, k, tokens = 192, 256, 64
    layer = make_layer(n, k)
    x = torch.randn(2, tokens, k).to(dtype)
    a, b = (matrix.detach().to(dtype).float().requires_grad_() for matrix in adapter(n, k, 16))
    upstream = torch.randn(2, tokens, n).to(dtype)

    def step(function: Callable[[Tensor], Tensor], leaf: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        leaf = leaf.clone().requires_grad_()
        y = function(leaf)
        return y.detach(), *torch.autograd.grad(y, [leaf, a, b], grad)

    def ours(leaf: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype, enabled=mixed):
            return layer(leaf, lora=(a, b, 2.0))

    found = step(ours, x.float() if mixed else x, upstream)
    assert [tensor.dtype for tensor in found] == [dtype, torch.float32 if mixed else dtype, *[torch.float32] * 2]
    separate = step(lambda leaf: dense_lora(layer, leaf, a, b, 2.0, dtype), x, upstream)
    weight = layer.dequantize(dtype).double()
    exact = step(
        lambda leaf: leaf @ weight.T + 2.0 * (leaf @ a.double().T) @ b.double().T, x.double(), upstream.double()
    )
    for one, other, truth in zip(found, separate, exact, strict=True):
        errors = [float((result.double() - truth).norm()) for result in (one, other)]
        assert 0 < errors[0] <= 1.001 * errors[1]


def test_autocast_in_backward_alone_is_no_error():
    layer, (a, b) = make_layer(24, 40), adapter(24, 40)
    x = torch.randn(3, 40, requires_grad=True)
    y = layer(x, lora=(a, b, 1.0))
    expected = torch.autograd.grad(y.sum(), [x, a, b], retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y.sum(), [x, a, b])
    torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("learns", product((False, True), repeat=3), ids=str)
def test_only_what_needs_a_gradient_gets_one(learns, monkeypatch):
    layer = make_layer(24, 40)
    tensors = [torch.randn(3, 40), *(matrix.detach() for matrix in adapter(24, 40))]
    for tensor, needs in zip(tensors, learns, strict=True):
        tensor.requires_grad_(needs)
    x, a, b = tensors
    y, expected = layer(x, lora=(a, b, 0.5)), dense_lora(layer, x, a, b, 0.5, torch.float32)
    assert y.requires_grad == any(learns)
    if not any(learns):
        return
    dequantized = []
    dequantize = _linear_4bit.dequantize_weight
    monkeypatch.setattr(_linear_4bit, "dequantize_weight", lambda *args: dequantized.append(1) or dequantize(*args))
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    found = torch.autograd.grad(y.square().sum(), wanted)
    assert len(dequantized) == learns[0]
    torch.testing.assert_close(found, torch.autograd.grad(expected.square().sum(), wanted), rtol=1e-5, atol=1e-4)


def test_the_sum_may_be_written_to():
    layer, (a, b) = make_layer(24, 40), adapter(24, 40)
    x = torch.randn(2, 3, 40, requires_grad=True)
    y, expected = layer(x, lora=(a, b, 1.0)), dense_lora(layer, x, a, b, 1.0, torch.float32)
    y.mul_(3)
    found, wanted = (torch.autograd.grad(out.sum(), [x, a, b]) for out in (y, 3 * expected))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_second_derivative_is_refused():
    layer, (a, b) = make_layer(24, 40), adapter(24, 40)
    y = layer(torch.randn(3, 40, requires_grad=True), lora=(a, b, 1.0))
    (da,) = torch.autograd.grad(y.square().sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        da.sum().backward()


def test_the_flops_of_all_products_are_counted():
    n, k, r, tokens = 24, 40, 4, 6
    layer, (a, b) = make_layer(n, k), adapter(n, k, r)
    x = torch.randn(2, 3, k, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x, lora=(a, b, 1.0)).sum().backward()
    assert counter.get_total_flops() == 2 * tokens * (2 * n * k + 3 * r * (n + k))


def test_the_operator_that_adds_in_place_keeps_the_contract_of_torch_library():
    for y in (torch.randn(5, 24), torch.randn(2, 5, 24)):
        left, right = torch.randn(*y.shape[:-1], 4), torch.randn(24, 4).T
        torch.library.opcheck(torch.ops.lightning_qlora.add_product_.default, (y, left, right))


@pytest.mark.parametrize("learns", ["y", "left", "right"])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_operator_that_adds_in_place_refuses_to_lose_a_gradient(learns, compiled):
    tensors = {"y": torch.zeros(5, 24), "left": torch.randn(5, 4), "right": torch.randn(4, 24)}
    tensors[learns].requires_grad_()
    operator = torch.ops.lightning_qlora.add_product_.default
    function = torch.compile(operator, backend="aot_eager", fullgraph=True) if compiled else operator
    torch._dynamo.reset()
    with pytest.raises((ValueError, RuntimeError), match="add_product_ has no gradient formula"):
        function(*tensors.values())
    assert not tensors["y"].any()
    with torch.no_grad():
        function(*tensors.values())
    torch.testing.assert_close(tensors["y"].detach(), (tensors["left"] @ tensors["right"]).detach())


def test_with_lora_autograd_keeps_packed_weights_and_small_tensors_only():
    n, k, tokens = 160, 128, 100
    layer, (a, b) = make_layer(n, k), adapter(n, k)
    x = torch.randn(tokens, k, requires_grad=True)
    assert largest_saved(lambda x: layer(x, lora=(a, b, 1.0)), x) == 4 * tokens * k  # x: no tensor of the output's size
    a.requires_grad_(False)
    assert largest_saved(lambda x: layer(x, lora=(a, b, 1.0)), x) == n * k // 2  # the packed weight


@pytest.mark.parametrize(
    ("a", "b"),
    [((4, 40), (12, 4)), ((4, 40), (25, 4)), ((4, 40), (1, 4)), ((4, 40), (24, 3)), ((4, 41), (24, 4))],
)
def test_lora_of_another_shape_is_refused(a, b):
    layer = make_layer(24, 40)
    with pytest.raises(ValueError, match=r"must be \[r, 40\] and \[24, r\]"):
        layer(torch.randn(3, 40), lora=(torch.randn(a), torch.randn(b), 1.0))


# --- its bytes


CONVERSIONS: dict[str, Callable[[NF4Linear], NF4Linear]] = {
    "to(bfloat16)": lambda layer: layer.to(torch.bfloat16),
    "half": lambda layer: layer.half(),
    "double": lambda layer: layer.double(),
    "type": lambda layer: layer.type(torch.float16),
    "inside a model": lambda layer: nn.Sequential(layer, nn.Linear(2, 2)).bfloat16()[0],
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_conversions_leave_the_bytes_alone(conversion, nested):
    layer = fill_with_random_bytes(make_layer(33, 24, bias=True, nested=nested))
    expected = stored_bytes(layer)
    assert_same_bytes(CONVERSIONS[conversion](layer), expected)


def test_a_conversion_does_convert_the_bias_and_move_the_layer():
    layer = make_layer(16, 24, bias=True)
    assert layer.bfloat16().bias.dtype == torch.bfloat16
    moved = layer.to("meta", torch.float16)
    assert {(t.device.type, t.dtype) for t in (moved.weight, moved.absmax, moved.code2)} == {("meta", torch.float32)}


@pytest.mark.parametrize("nested", [True, False])
def test_a_state_dict_on_disk_restores_the_bytes(nested):
    layer = fill_with_random_bytes(make_layer(33, 24, nested=nested))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = make_layer(33, 24, nested=nested, seed=1)
    other.load_state_dict(torch.load(file))
    assert_same_bytes(other, stored_bytes(layer))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_weight_whose_bytes_were_converted_is_refused(dtype):
    layer = make_layer(16, 24)
    layer.weight.data = layer.weight.data.to(dtype)  # as a mixed-precision policy of FSDP2 does when gathering
    with pytest.raises(ValueError, match=r"arrived as torch.*Use param_dtype=None"):
        layer(torch.randn(2, 24))


@pytest.mark.parametrize(
    ("nested", "blocksize", "quant_type"), [(True, 64, "nf4"), (False, 128, "nf4"), (True, 64, "fp4")]
)
def test_bitsandbytes_reads_the_weights_of_a_layer(nested, blocksize, quant_type):
    layer = make_layer(130, 160, nested=nested, blocksize=blocksize, quant_type=quant_type)  # 325 blocks: 2 nested ones
    quantized = layer.quantized()
    nested_state = None
    if nested:
        nested_state = bnb.QuantState(quantized.absmax2, code=quantized.code2, blocksize=256, dtype=torch.float32)
    state = bnb.QuantState(
        quantized.absmax, torch.Size(quantized.shape), bnb.get_4bit_type(quant_type, device="cpu"), blocksize,
        quant_type, torch.float32, quantized.offset, nested_state,
    )  # fmt: skip
    dense = bnb_dequantize(quantized.packed.unsqueeze(1), state)
    torch.testing.assert_close(layer.dequantize(), dense, rtol=0, atol=0)
    assert_same_bytes(NF4Linear.from_quantized(quantized), stored_bytes(layer))


# --- construction


def test_a_row_must_fill_whole_storage_elements():
    with pytest.raises(ValueError, match=r"in_features=60 is not a multiple of 8.*Leave this layer unquantized"):
        NF4Linear(60, 16)


@pytest.mark.parametrize(
    "other",
    [
        {"n": 40, "k": 24},
        {"nested": False},
        {"blocksize": 128},
        {"quant_type": "fp4"},
    ],
    ids=str,
)
def test_weights_of_another_format_are_refused(other):
    size = (other.pop("n", 24), other.pop("k", 40))
    with pytest.raises(ValueError, match="does not fit the layer"):
        make_layer(24, 40).load_quantized(Quantized4bit.quantize(torch.randn(size), **other))


def test_a_weight_that_is_no_matrix_is_refused():
    with pytest.raises(ValueError, match=r"needs a weight of shape \[out_features, in_features\], got \(2, 3, 64\)"):
        NF4Linear.from_quantized(Quantized4bit.quantize(torch.randn(2, 3, 64)))


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_a_layer_takes_the_bytes_whatever_dtype_they_are_viewed_as(storage):
    quantized = Quantized4bit.quantize(torch.randn(24, 40))
    surplus = torch.cat((quantized.packed.flatten(), torch.full((4,), 255, dtype=torch.uint8)))
    viewed = quantized._replace(packed=surplus.view(storage), offset=quantized.offset.view(1))
    layer = NF4Linear.from_quantized(viewed)
    assert_same_bytes(layer, stored_bytes(NF4Linear.from_quantized(quantized)))


def test_rows_of_a_plain_tensor_are_all_local():
    target = torch.zeros(5, 2, dtype=torch.float64)
    assert local_rows(target) == (0, 5)
    copy_local_rows(target, torch.arange(10.0).view(5, 2))
    assert torch.equal(target, torch.arange(10.0, dtype=torch.float64).view(5, 2))


@pytest.mark.parametrize("param_dtype", [torch.float16, torch.bfloat16])
def test_a_policy_that_converts_packed_bytes_is_refused(param_dtype):
    policy = MixedPrecisionPolicy(param_dtype=param_dtype)
    layer = make_layer(8, 16)
    with pytest.raises(ValueError, match=r"would convert the packed 4-bit bytes of 'mlp.0'.*param_dtype=None"):
        layer.check_mixed_precision_policy(policy, "mlp.0")
    with pytest.raises(ValueError, match=r"bytes of a layer of 16 to 8 features when"):
        layer.check_mixed_precision_policy(policy)
    for harmless in (None, torch.float32):
        layer.check_mixed_precision_policy(MixedPrecisionPolicy(param_dtype=harmless, reduce_dtype=torch.bfloat16))


# --- peft


def test_peft_adapts_the_layer_as_a_linear_and_in_float32():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = make_layer(16, 24), make_layer(4, 16, seed=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)))

    base = Model().bfloat16()
    expected = stored_bytes(base.first)
    x, target = torch.randn(32, 24), torch.randn(32, 4)
    before = base(x)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["first", "second"]))
    torch.testing.assert_close(model(x), before)  # LoRA's B starts at zero

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert len(trained) == 4
    assert all("lora_" in name for name in trained)
    optimizer = torch.optim.Adam(trained.values(), lr=0.02)
    losses = []
    for _ in range(20):
        loss = F.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert_same_bytes(base.first.base_layer, expected)
