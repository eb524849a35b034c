"""The chunked loss against float64, against plain torch of the same dtype, and what it allocates.

Shapes: T tokens, H hidden size, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_qlora.modules.linear_cross_entropy import (
    LOGITS_BUDGET_BYTES,
    LossHead,
    auto_chunk_tokens,
    linear_cross_entropy,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """The loss as one writes it: all logits, softmax in at least float32."""
    logits = F.linear(hidden, weight).flatten(0, -2)
    logits = logits.double() if hidden.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, labels.flatten(), **options)


def make(
    t: int, h: int, v: int, dtype: torch.dtype = torch.float32, ignored: float = 0.25, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(t, h, generator=generator).to(dtype)
    weight = torch.randn(v, h, generator=generator).to(dtype) / h**0.5
    labels = torch.randint(v, (t,), generator=generator)
    labels[torch.rand(t, generator=generator) < ignored] = -100
    return hidden, weight, labels


def gradients(
    function: Any, hidden: Tensor, weight: Tensor, labels: Tensor, upstream: float = 1.0, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, and its gradients by hidden and weight after ``(upstream * loss).backward()``."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = function(hidden, weight, labels, **options)
    (upstream * loss).backward()
    return loss.detach(), hidden.grad, weight.grad


@settings(max_examples=40, deadline=None)
@given(
    t=st.integers(1, 40),
    v=st.integers(2, 60),
    chunk_tokens=st.one_of(st.just("auto"), st.integers(1, 50)),
    reduction=st.sampled_from(["sum", "mean"]),
    upstream=st.sampled_from([1.0, -3.5, 65536.0]),
    seed=st.integers(0, 99),
)
def test_equals_float64_in_float32_whatever_the_chunks(t, v, chunk_tokens, reduction, upstream, seed):
    hidden, weight, labels = make(t, 8, v, seed=seed)
    labels[seed % t] = seed % v  # the mean of no token at all is plain torch's NaN; another test has that
    got = gradients(
        linear_cross_entropy, hidden, weight, labels, upstream, chunk_tokens=chunk_tokens, reduction=reduction
    )
    truth = gradients(plain, hidden.double(), weight.double(), labels, upstream, reduction=reduction)
    for value, expected, scale in zip(got, truth, (1.0, abs(upstream), abs(upstream)), strict=True):
        assert value.dtype == torch.float32
        # A probability near 1 leaves a gradient of the size of its own rounding, 6e-8 times the inputs (about 4).
        atol = 2e-6 * float(expected.abs().max()) + 5e-7 * scale
        torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_16_bit_errors_are_not_larger_than_plain_torchs(dtype, reduction):
    data = make(200, 32, 500, dtype)
    truth = gradients(plain, data[0].double(), data[1].double(), data[2], reduction=reduction)
    theirs = gradients(plain, *data, reduction=reduction)
    ours = gradients(linear_cross_entropy, *data, reduction=reduction, chunk_tokens=64)
    assert [t.dtype for t in ours] == [torch.float32, dtype, dtype]
    for mine, other, true in zip(ours, theirs, truth, strict=True):
        assert (mine - true).norm() <= 1.5 * (other - true).norm() + 1e-7 * true.norm()


def test_other_shapes_and_ignore_index():
    hidden, weight, labels = make(24, 8, 30, ignored=0)
    labels[3:7] = 0
    expected = plain(hidden, weight, labels, ignore_index=0)
    loss = linear_cross_entropy(hidden.view(2, 3, 4, 8), weight, labels.view(2, 3, 4), ignore_index=0, chunk_tokens=5)
    torch.testing.assert_close(loss, expected)
    assert loss.shape == ()


@pytest.mark.parametrize("tokens", [0, 7])
def test_no_token_that_counts_means_loss_and_gradients_of_zero(tokens):
    hidden, weight, labels = make(tokens, 8, 30)
    loss, *grads = gradients(linear_cross_entropy, hidden, weight, labels.fill_(-100), chunk_tokens=4)
    assert loss == 0
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


def test_gradients_too_small_for_float16_survive():
    # The other token's probability, exp(-18), is below float16's smallest number, but moves hidden by 1e-5.
    hidden = torch.tensor([[1.0, 0.0]], dtype=torch.float16)
    weight = torch.tensor([[18.0, 0.0], [0.0, 700.0]], dtype=torch.float16)
    labels = torch.tensor([0])
    _, truth, _ = gradients(plain, hidden.double(), weight.double(), labels)
    assert gradients(plain, hidden, weight, labels)[1][0, 1] == 0
    for autocast, dtype in ((False, torch.float16), (True, torch.float32)):
        trained = hidden.to(dtype, copy=True).requires_grad_()
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            loss = linear_cross_entropy(trained, weight.to(dtype), labels)
        loss.backward()
        torch.testing.assert_close(trained.grad[0, 1].double(), truth[0, 1], rtol=0.02, atol=0)


def test_many_tokens_of_one_label_do_not_overflow_a_trained_float16_weight():
    hidden = torch.full((512, 4), 3.0, dtype=torch.float16)
    weight, labels = torch.zeros(10, 4, dtype=torch.float16), torch.zeros(512, dtype=torch.long)
    truth = gradients(plain, hidden.double(), weight.double(), labels)
    ours = gradients(linear_cross_entropy, hidden, weight, labels)
    for mine, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_takes_float32_in_and_gives_float32_gradients(dtype):
    data = make(50, 16, 40)
    with torch.autocast("cpu", dtype):
        ours = gradients(linear_cross_entropy, *data, chunk_tokens=16)
    truth = gradients(plain, *(x.double() if x.is_floating_point() else x for x in data))
    for mine, true in zip(ours, truth, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - true).norm() < 0.02 * true.norm()


# --- memory


class Allocations(TorchDispatchMode):
    """Records the shape of every tensor that an operation returns, backward included."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.shapes.add(tuple(tensor.shape))
        return out


def shapes_of(function: Any, train_weight: bool, **options: Any) -> set[tuple[int, ...]]:
    hidden, weight, labels = make(96, 8, 64)
    hidden.requires_grad_()
    weight.requires_grad_(train_weight)
    with Allocations() as seen:
        function(hidden, weight, labels, **options).backward()
    assert (weight.grad is not None) == train_weight
    return seen.shapes


@pytest.mark.parametrize("train_weight", [False, True])
def test_the_logits_of_all_tokens_never_exist(train_weight):
    shapes = shapes_of(linear_cross_entropy, train_weight, chunk_tokens=20)
    assert (20, 64) in shapes
    assert max(rows * columns for rows, columns in (s for s in shapes if len(s) == 2)) == 20 * 64
    assert (96, 64) in shapes_of(plain, train_weight)  # the recorder does see them where they exist


def test_a_frozen_weight_costs_no_gradient():
    assert (64, 8) in shapes_of(linear_cross_entropy, True, chunk_tokens=20)
    # weight.detach() and the like are views; a gradient would be a new [V, H], or its transpose, from a product.
    hidden, weight, labels = make(96, 8, 64)
    hidden.requires_grad_()
    with Products() as products:
        linear_cross_entropy(hidden, weight, labels, chunk_tokens=96).backward()
    assert products.shapes == {(96, 64), (96, 8)}


class Products(Allocations):
    """Records the results of matrix products only."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = set(self.shapes)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func.overloadpacket not in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.linear):
            self.shapes = before
        return out


def test_nothing_is_differentiated_without_grad():
    data = make(96, 8, 64)
    with torch.no_grad(), Products() as products:
        loss = linear_cross_entropy(*data, chunk_tokens=96)
    assert not loss.requires_grad
    assert products.shapes == {(96, 64)}


@pytest.mark.parametrize("vocab", [1, 300, 49152, 128256, 10**9])
def test_automatic_chunks_fit_the_budget(vocab):
    tokens = auto_chunk_tokens(vocab)
    assert tokens >= 16
    assert tokens & (tokens - 1) == 0
    assert 4 * vocab * tokens <= LOGITS_BUDGET_BYTES < 8 * vocab * tokens or tokens == 16


def test_chunk_sizes_that_the_docstring_gives():
    assert (auto_chunk_tokens(49152), auto_chunk_tokens(128256)) == (512, 256)


# --- refusals and the module


@pytest.mark.parametrize(
    ("hidden", "weight", "labels", "options", "message"),
    [
        ((4, 8), (10, 9), (4,), {}, r"hidden \(4, 8\) does not fit weight \(10, 9\)"),
        ((4, 8), (8,), (4,), {}, "does not fit weight"),
        ((2, 4, 8), (10, 8), (8,), {}, r"labels \(8,\) must have hidden's leading shape \(2, 4\)"),
        ((4, 8), (10, 8), (4,), {"chunk_tokens": 0}, "chunk_tokens must be at least 1 or 'auto', got 0"),
        ((4, 8), (10, 8), (4,), {"reduction": "none"}, "reduction must be 'mean' or 'sum', got 'none'"),
    ],
)
def test_what_does_not_fit_is_refused(hidden, weight, labels, options, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(torch.zeros(hidden), torch.zeros(weight), torch.zeros(labels, dtype=torch.long), **options)


@pytest.fixture
def one_process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process_group")
def test_a_weight_that_fsdp_has_not_gathered_is_refused():
    hidden, weight, labels = make(4, 8, 10)
    sharded = distribute_tensor(weight, init_device_mesh("cpu", (1,)), [Shard(0)])
    with pytest.raises(ValueError, match=r"weight is a DTensor, i\.e\. FSDP has not gathered it"):
        linear_cross_entropy(hidden, sharded, labels)


def test_a_head_with_a_bias_gives_no_loss():
    hidden, _, labels = make(4, 8, 30)
    with pytest.raises(ValueError, match=r"no bias term. Make the head with LossHead\(..., bias=False\)"):
        LossHead(8, 30)(hidden, labels)


def test_the_head_gives_logits_or_the_sum_of_their_loss():
    hidden, _, labels = make(12, 8, 30)
    head = LossHead(8, 30, bias=False)
    logits = head(hidden)
    torch.testing.assert_close(logits, hidden @ head.weight.T)
    torch.testing.assert_close(
        head(hidden.view(3, 4, 8), labels.view(3, 4)), F.cross_entropy(logits, labels, reduction="sum")
    )
