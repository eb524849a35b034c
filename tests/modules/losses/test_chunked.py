"""The chunked loss of any function: against plain autograd, in every mode, dtype and context; refusals; memory.

Shapes: T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_qlora.modules.losses import _user_loss, linear_loss
from lightning_qlora.modules.losses import functional as losses
from lightning_qlora.modules.losses._loop import add_product_in_slices, plan_number
from lightning_qlora.modules.losses._user_loss import Settings
from lightning_qlora.modules.losses.chunked import CHUNK_BUDGET_BYTES, auto_chunk_tokens

DOUBLE = torch.float64
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def make(t: int = 20, h: int = 6, v: int = 15, dtype: torch.dtype = DOUBLE, seed: int = 0) -> tuple[Tensor, ...]:
    """hidden [T, H], weight [V, H] and bias [V], all trained, and labels [T]."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(*shape, dtype=DOUBLE, generator=generator) for shape in ((t, h), (v, h), (v,))]
    return (
        *(tensor.to(dtype).requires_grad_() for tensor in tensors), torch.randint(v, (t,), generator=generator)
    )  # fmt: skip


def two_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy [C], the sum of squared log-normalizers [], and the number of right answers []."""
    normalizer = logits.logsumexp(-1)
    right = (logits.argmax(-1) == labels).sum()
    return normalizer - logits.gather(-1, labels[:, None])[:, 0], normalizer.square().sum(), right


def total(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="sum")


def assert_same_gradients(value: Tensor, expected: Tensor, inputs: list[Tensor], **tolerance: Any) -> None:
    torch.testing.assert_close(value, expected, **tolerance)
    truth = torch.autograd.grad(expected, inputs)
    torch.testing.assert_close(torch.autograd.grad(value, inputs), truth, **tolerance)


# ------------------------------------------------------------------------------------------------ value and gradient


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss", [losses.cross_entropy, losses.focal])
def test_gradcheck(loss: Any, reduction: Any) -> None:
    hidden, weight, bias, labels = make(t=5, h=3, v=4)
    mask = torch.tensor([True, False, True, True, True])

    def function(*inputs: Tensor) -> Tensor:
        return linear_loss(  # type: ignore[no-any-return]
            inputs[0], inputs[1], labels, loss=loss, bias=inputs[2], mask=mask, reduction=reduction, chunk_tokens=3
        )

    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


def test_gradcheck_of_several_losses() -> None:
    hidden, weight, bias, labels = make(t=5, h=3, v=4)

    def function(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        first, second, _ = linear_loss(inputs[0], inputs[1], labels, loss=two_losses, bias=inputs[2], chunk_tokens=2)
        return first, second

    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


@settings(max_examples=40, deadline=None)
@given(
    t=st.integers(0, 30),
    v=st.integers(2, 40),
    chunk_tokens=st.one_of(st.just("auto"), st.integers(1, 40)),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    masked=st.sampled_from([None, 0.0, 0.5, 1.0]),
    known=st.booleans(),
    trained=st.tuples(st.booleans(), st.booleans(), st.booleans()).filter(any),
    upstream=st.sampled_from([1.0, -3.5, 65536.0]),
    seed=st.integers(0, 99),
)
def test_equals_plain_autograd(t, v, chunk_tokens, reduction, masked, known, trained, upstream, seed):  # type: ignore[no-untyped-def]
    hidden, weight, bias, labels = make(t, 6, v, seed=seed)
    inputs = [x for x, learns in zip((hidden, weight, bias), trained, strict=True) if learns]
    for x, learns in zip((hidden, weight, bias), trained, strict=True):
        x.requires_grad_(learns)
    generator = torch.Generator().manual_seed(seed)
    mask = None if masked is None else torch.rand(t, generator=generator) >= masked
    count = None if mask is None or not known else int(mask.sum())
    value = linear_loss(
        hidden, weight, labels, loss=losses.cross_entropy, bias=bias, mask=mask, num_tokens=count, reduction=reduction,
        chunk_tokens=chunk_tokens,
    )  # fmt: skip
    each = F.cross_entropy(F.linear(hidden, weight, bias), labels, reduction="none")
    each = each if mask is None else each * mask
    tokens = max(t if mask is None else int(mask.sum()), 1)
    expected = each if reduction == "none" else each.sum() / (tokens if reduction == "mean" else 1)
    rows = torch.randn(t, dtype=DOUBLE, generator=generator) * upstream if reduction == "none" else upstream
    assert_same_gradients((value * rows).sum(), (expected * rows).sum(), inputs)
    torch.testing.assert_close(value, expected)


def test_weighted_sum_of_several_results() -> None:
    hidden, weight, _, labels = make()
    ce, squares, right = linear_loss(hidden, weight, labels, loss=two_losses, reduction="sum", chunk_tokens=6)
    expected = two_losses(hidden @ weight.T, labels)
    assert right == expected[2]
    assert not right.requires_grad
    assert_same_gradients(0.7 * ce + 0.3 * squares, 0.7 * expected[0].sum() + 0.3 * expected[1], [hidden, weight])


@pytest.mark.parametrize("loss", [losses.cross_entropy, two_losses])
def test_backward_twice(loss: Any) -> None:
    hidden, weight, _, labels = make()
    value = linear_loss(hidden, weight, labels, loss=loss, chunk_tokens=6)
    value = value[0] if isinstance(value, tuple) else value
    expected = F.cross_entropy(hidden @ weight.T, labels)
    truth = torch.autograd.grad(expected, (hidden, weight))
    first = torch.autograd.grad(value, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(2 * value, (hidden, weight), retain_graph=True)
    torch.testing.assert_close(first, truth)  # still: the second did not write into it
    torch.testing.assert_close(second, tuple(2 * g for g in truth))


def test_second_derivatives_are_refused() -> None:
    hidden, weight, _, labels = make()
    value = linear_loss(hidden, weight, labels, loss=losses.cross_entropy)
    with pytest.raises(ValueError, match="linear_loss has no second derivative"):
        torch.autograd.grad(value, hidden, create_graph=True)


def test_tied_embedding_gets_both_gradients() -> None:
    _, weight, _, labels = make()
    value = linear_loss(F.embedding(labels, weight), weight, labels, loss=losses.cross_entropy, chunk_tokens=3)
    expected = F.cross_entropy(F.embedding(labels, weight) @ weight.T, labels)
    assert_same_gradients(value, expected, [weight])


def test_micro_batches_with_one_denominator_equal_the_whole_batch() -> None:
    hidden, weight, _, labels = make(t=30)
    mask = torch.arange(30) % 3 > 0
    parts = [slice(0, 4), slice(4, 30)]
    value = sum(
        linear_loss(hidden[p], weight, labels[p], loss=losses.cross_entropy, mask=mask[p], denominator=mask.sum())
        for p in parts
    )
    expected = F.cross_entropy((hidden @ weight.T)[mask], labels[mask])
    assert_same_gradients(value, expected, [hidden, weight])


@pytest.mark.parametrize("denominator", [torch.tensor(0), torch.tensor(0.0)])
@pytest.mark.parametrize("dynamic", [None, True])
def test_no_token_on_any_rank_gives_zero_not_nan(denominator: Tensor, dynamic: bool | None) -> None:
    hidden, weight, _, labels = make()
    none = torch.zeros(20, dtype=torch.bool)

    def mean(hidden: Tensor, weight: Tensor, denominator: Tensor) -> Tensor:
        return linear_loss(  # type: ignore[no-any-return]
            hidden, weight, labels, loss=losses.cross_entropy, mask=none, denominator=denominator
        )

    for function in (mean, torch.compile(mean, backend="aot_eager", fullgraph=True, dynamic=dynamic)):
        value = function(hidden, weight, denominator)
        assert value == 0
        assert all(not g.any() for g in torch.autograd.grad(value, (hidden, weight)))
    assert denominator == 0  # the caller's own


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_ignore_index_makes_the_mean_torchs(known: bool, masked: bool) -> None:
    hidden, weight, _, labels = make()
    labels[3:9] = -100
    mask = torch.arange(20) < 17 if masked else None
    value = linear_loss(
        hidden, weight, labels, loss=losses.cross_entropy, ignore_index=-100, mask=mask,
        num_tokens=(11 if masked else 14) if known else None, chunk_tokens=4,
    )  # fmt: skip
    expected = F.cross_entropy(hidden @ weight.T, labels if mask is None else labels.where(mask, -100))
    assert_same_gradients(value, expected, [hidden, weight])


def test_ignore_index_works_with_any_loss_of_labels() -> None:
    hidden, weight, _, labels = make()
    labels[5:] = 15  # torch would refuse it
    value = linear_loss(hidden.view(4, 5, 6), weight, labels.view(4, 5), loss=total, ignore_index=15, chunk_tokens=2)
    assert_same_gradients(value, F.cross_entropy(hidden[:5] @ weight.T, labels[:5]), [hidden, weight])


def test_leading_shape_and_wide_per_token_tensors() -> None:
    hidden, weight, _, _ = make(t=24)
    teacher = torch.randn(2, 3, 4, 15, dtype=DOUBLE)
    value = linear_loss(hidden.view(2, 3, 4, 6), weight, teacher, loss=losses.kl_divergence, chunk_tokens=5)
    student = (hidden @ weight.T).log_softmax(-1)
    expected = F.kl_div(student, teacher.view(24, 15).softmax(-1), reduction="batchmean")
    assert_same_gradients(value, expected, [hidden, weight])


def test_a_chunk_size_does_not_change_values_of_tokens() -> None:
    hidden, weight, _, labels = make(t=50, dtype=torch.float32)
    values = [linear_loss(hidden, weight, labels, loss=losses.cross_entropy, chunk_tokens=c) for c in (1, 7, 49, 50)]
    torch.testing.assert_close(torch.stack(values), values[-1].expand(4), rtol=1e-6, atol=0)


@pytest.mark.parametrize("mask", [None, "all ignored"])
def test_no_token_gives_zero_not_nan(mask: str | None) -> None:
    hidden, weight, _, labels = make(t=0 if mask is None else 5)
    chosen = None if mask is None else torch.zeros(5, dtype=torch.bool)
    value = linear_loss(hidden, weight, labels, loss=losses.cross_entropy, mask=chosen)
    assert value == 0
    assert all(not g.any() for g in torch.autograd.grad(value, (hidden, weight)))


def test_ignored_tokens_never_reach_the_loss() -> None:
    hidden, weight, _, labels = make(dtype=torch.float32)
    mask = torch.arange(20) < 13
    with torch.no_grad():
        hidden[~mask] = torch.nan
    seen = []

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        seen.append(len(logits))
        return losses.cross_entropy(logits, labels)

    value = linear_loss(hidden, weight, labels, loss=loss, mask=mask, chunk_tokens=5)
    assert seen[-3:] == [5, 5, 3]
    assert value.isfinite()
    (gradient,) = torch.autograd.grad(value, hidden)
    assert not gradient[~mask].any()


# ----------------------------------------------------------------------------------------- 16 bit and mixed precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_16_bit_errors_are_not_larger_than_plain_torchs(dtype: torch.dtype, reduction: Any) -> None:
    hidden, weight, _, labels = make(t=200, h=32, v=500, dtype=dtype)
    weight = (weight.detach() / 6).requires_grad_()
    rows = 1 / 200 if reduction == "none" else 1.0

    def gradients(value: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(value, inputs)

    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth = gradients(F.cross_entropy(exact[0] @ exact[1].T, labels), *exact)
    theirs = gradients(F.cross_entropy((hidden @ weight.T).float(), labels), hidden, weight)
    value = linear_loss(hidden, weight, labels, loss=losses.cross_entropy, reduction=reduction, chunk_tokens=64)
    assert value.dtype == torch.float32
    ours = gradients((value * rows).sum(), hidden, weight)
    for mine, other, true in zip(ours, theirs, truth, strict=True):
        assert mine.dtype == dtype
        assert (mine - true).norm() <= 1.5 * (other - true).norm()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_transposed_weight_learns_as_any_other(dtype: torch.dtype, compiled: bool) -> None:
    hidden, weight, _, labels = make(t=20, h=4, v=5000, dtype=dtype)  # its sum of gradients is narrowed in slices
    turned = weight.detach().t().contiguous().requires_grad_()

    def value(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_loss(hidden, weight, labels, loss=losses.cross_entropy)  # type: ignore[no-any-return]

    of_turned = torch.compile(value, backend="aot_eager", fullgraph=True) if compiled else value
    (truth,) = torch.autograd.grad(value(hidden, weight), weight)
    (gradient,) = torch.autograd.grad(of_turned(hidden, turned.t()), turned)
    assert torch.equal(gradient.t(), truth)


def test_bfloat16_sum_of_the_weight_gradient_is_less_exact_but_right() -> None:
    hidden, weight, _, labels = make(t=200, h=32, v=50, dtype=torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth = torch.autograd.grad(F.cross_entropy(exact[0] @ exact[1].T, labels), exact[1])[0]
    errors = []
    for kept in (torch.float32, torch.bfloat16):
        value = linear_loss(hidden, weight, labels, loss=losses.cross_entropy, weight_grad_dtype=kept, chunk_tokens=20)
        errors.append(float((torch.autograd.grad(value, weight)[0] - truth).norm() / truth.norm()))
    assert errors[0] < errors[1] < 0.03


@pytest.mark.parametrize("size", [1.0, 3e4])  # sums of float16 products of the larger one overflow
def test_float16_products_in_slices_are_as_exact_as_plain_ones(size: float) -> None:
    """What GPUs without a 16-bit product of float32 results (below capability 8.0) do, here on the CPU."""
    generator = torch.Generator().manual_seed(0)
    total, logits_grad, x = (torch.randn(*shape, generator=generator) for shape in ((50, 32), (200, 50), (200, 32)))
    logits_grad, x = (logits_grad.softmax(-1) * 64).half(), (x.abs() * size / x.abs().max()).half()
    true = total.double() + logits_grad.double().t() @ x.double()
    ours = total.clone()
    add_product_in_slices(ours, logits_grad, x, rows_at_a_time=16)  # 50 rows: the last slice is short
    plain = total + (logits_grad.t() @ x).float()
    assert plain.isfinite().all() == (size == 1)
    if size > 1:  # smaller by a power of two: the same bits, but no overflow
        plain = total + (logits_grad.t() @ (x / 4096)).float() * 4096
    assert (ours - true).norm() <= 1.5 * (plain - true).norm()
    assert (ours - true).norm() <= 1e-3 * true.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_grad_scaler_under_autocast(dtype: torch.dtype) -> None:
    hidden, weight, _, labels = make(t=40, dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD([hidden, weight], lr=1.0)
    with torch.autocast("cpu", dtype):
        value = linear_loss(hidden, weight, labels, loss=losses.cross_entropy, chunk_tokens=16)
    assert value.dtype == torch.float32
    scaler.scale(value).backward()
    scaler.unscale_(optimizer)
    truth = torch.autograd.grad(F.cross_entropy(hidden @ weight.T, labels), (hidden, weight))
    for mine, true in zip((hidden.grad, weight.grad), truth, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - true).norm() < 0.02 * true.norm()


def test_grad_scaler_skips_a_step_that_overflows() -> None:
    hidden, weight, _, labels = make(t=40, dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    before = weight.detach().clone()
    for spoil, scale in ((1e5, 2.0**9), (1.0, 2.0**9)):  # 1e5 is infinite in float16
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            value = linear_loss(hidden * spoil, weight, labels, loss=losses.cross_entropy, chunk_tokens=16)
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == scale
        assert torch.equal(weight, before) == (spoil > 1)
        assert bool(value.isfinite()) == (spoil == 1)


def test_loss_sees_logits_of_the_compute_dtype_and_no_autocast() -> None:
    hidden, weight, _, labels = make(dtype=torch.float32)
    seen = set()

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        seen.add((logits.dtype, torch.is_autocast_enabled("cpu")))
        return losses.cross_entropy(logits, labels)

    with torch.autocast("cpu", torch.bfloat16):
        linear_loss(hidden, weight, labels, loss=loss).backward()
    assert seen == {(torch.bfloat16, False)}


# ------------------------------------------------------------------------------------------------------ torch.compile


def step(hidden: Tensor, weight: Tensor, labels: Tensor, loss: Any) -> Tensor:
    """A part of a model that ends in the loss."""
    return linear_loss(hidden.tanh(), weight, labels, loss=loss, mask=labels != -100, chunk_tokens=8)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("loss", "dynamic", "dtype"),
    [
        (losses.cross_entropy, None, torch.float32),
        (losses.cross_entropy, True, torch.float32),
        (losses.cross_entropy, True, torch.float16),  # whose gradients are scaled
        (functools.partial(losses.cross_entropy, z_loss=0.1), None, torch.float32),  # dynamic=True: 0.1 were a variable
    ],
)
def test_inside_torch_compile_no_break_and_no_recompilation_over_lengths(
    loss: Any, dynamic: bool | None, dtype: torch.dtype
) -> None:
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=dynamic)
    inductor = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for length in (20, 33, 41, 9):
        hidden, weight, _, labels = make(t=length, dtype=dtype)
        labels[:3] = -100
        for tensor in (hidden, labels):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        for function in (compiled, inductor):
            expected = step(hidden, weight, labels, loss)
            assert_same_gradients(function(hidden, weight, labels, loss), expected, [hidden, weight])
    assert counter.frame_count == 1


def test_inside_torch_compile_a_changed_setting_is_not_stale() -> None:
    torch.compiler.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    hidden, weight, _, labels = make(dtype=torch.float32)
    for cap in (None, 2.0):
        loss = functools.partial(losses.cross_entropy, softcap=cap)
        torch.testing.assert_close(compiled(hidden, weight, labels, loss), step(hidden, weight, labels, loss))


def test_inside_torch_compile_a_closure_is_refused() -> None:
    torch.compiler.reset()
    hidden, weight, _, labels = make(dtype=torch.float32)
    scale = 2.0

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return scale * losses.cross_entropy(logits, labels)

    with pytest.raises(Exception, match="must be a function without a closure"):
        torch.compile(step, backend="eager", fullgraph=True)(hidden, weight, labels, loss)


@pytest.mark.parametrize("dynamic", [None, True])
def test_inside_torch_compile_the_size_of_chunks_may_be_an_argument(dynamic: bool | None) -> None:
    torch.compiler.reset()
    hidden, weight, _, labels = make(dtype=torch.float32)
    loss = functools.partial(linear_loss, hidden, weight, labels, loss=losses.cross_entropy)
    compiled = torch.compile(lambda size: loss(chunk_tokens=size), backend="eager", fullgraph=True, dynamic=dynamic)
    for size in (4, 5, "auto", 21):
        torch.testing.assert_close(compiled(size), loss(chunk_tokens=size))


@pytest.mark.parametrize("dynamic", [None, True])
def test_inside_torch_compile_a_partial_may_hold_tensors(dynamic: bool | None) -> None:
    torch.compiler.reset()
    counter = CompileCounter()

    def distill(hidden: Tensor, weight: Tensor, teacher: Tensor, loss: Any) -> Tensor:
        return linear_loss(hidden.tanh(), weight, teacher, loss=loss, chunk_tokens=8)  # type: ignore[no-any-return]

    compiled = torch.compile(distill, backend=counter, fullgraph=True, dynamic=dynamic)
    inductor = torch.compile(distill, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    heads = []
    for length in (20, 33, 9):
        hidden, weight, _, _ = make(t=length, dtype=torch.float32)
        teacher, head = torch.randn(length, 4), torch.randn(15, 4)  # another head in each step: none may be stale
        loss = functools.partial(losses.kl_divergence_from_hidden, teacher_weight=head)
        for tensor in (hidden, teacher):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        for function in (compiled, inductor):
            expected = distill(hidden, weight, teacher, loss)
            assert_same_gradients(function(hidden, weight, teacher, loss), expected, [hidden, weight])
        heads.append(weakref.ref(head))
    assert counter.frame_count == 1
    del head, loss, expected
    torch.compiler.reset()  # guards may refer to it
    assert [head() for head in heads] == [None, None, None]  # nothing else keeps them


def scaled_by(first: Any, logits: Tensor, labels: Tensor, *, factors: Any = (1.0,)) -> Tensor:
    return first * factors[0] * losses.cross_entropy(logits, labels)


@pytest.mark.parametrize(
    "loss",
    [functools.partial(scaled_by, torch.ones(1)), functools.partial(scaled_by, 1.0, factors=[torch.ones(1)])],
    ids=["positional", "in a list"],
)
def test_inside_torch_compile_tensors_elsewhere_in_a_partial_are_refused(loss: Any) -> None:
    torch.compiler.reset()
    hidden, weight, _, labels = make(dtype=torch.float32)
    assert step(hidden, weight, labels, loss) > 0
    with pytest.raises(Exception, match=r"must be a keyword argument of its functools\.partial"):
        torch.compile(step, backend="eager", fullgraph=True)(hidden, weight, labels, loss)


@pytest.mark.parametrize("wanted", [(True, True, True), (False, True, False), (False, False, False)])
def test_operators(wanted: tuple[bool, bool, bool]) -> None:
    hidden, weight, bias, labels = (tensor.detach() for tensor in make(dtype=torch.float32))
    settings = Settings(
        vocab_size=15, dtype=torch.float32, result_dtype=torch.float32, weight_grad_dtype=torch.float32, device="cpu",
        per_token=((torch.int64, ()),), chunk_tokens=8, gradient_scale=1.0, reduce=True, compile=False,
        check_finite=False, invalid_reason="",
    )  # fmt: skip
    number = plan_number(losses.cross_entropy, tuple(settings))
    assert plan_number(functools.partial(losses.cross_entropy, z_loss=0.1), tuple(settings)) != number
    assert plan_number(losses.cross_entropy, tuple(settings)) == number
    arguments = (hidden, weight, bias, labels > 3, labels < 0, [labels], -1, [], list(wanted), number)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.lightning_qlora.linear_loss.default, arguments, test_utils=checks)
    for factor in (torch.tensor(3.0), torch.arange(20.0)):
        scaled = (hidden, factor, torch.float16)
        torch.library.opcheck(torch.ops.lightning_qlora.scaled_gradient.default, scaled, test_utils=checks)


def test_a_loss_is_probed_once_for_all_settings() -> None:
    hidden, weight, _, labels = make()
    calls = []

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        calls.append(len(logits))
        return losses.cross_entropy(logits, labels)

    for chunk_tokens in (20, 10):
        linear_loss(hidden, weight, labels, loss=loss, chunk_tokens=chunk_tokens, check_finite=chunk_tokens == 10)
    assert calls == [2, 1, 1, 20, 10, 10]  # two tokens together, each apart, then the chunks


class Weighted:
    """Cross-entropy as an object: how it reduces, and what a schedule changes."""

    def __init__(self, reduction: str, weight: Any = 1.0, calls: list[int] | None = None) -> None:
        self.reduction, self.weight, self.calls = reduction, weight, calls

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.calls is not None:
            self.calls.append(len(logits))
        return self.weight * F.cross_entropy(logits, labels, reduction=self.reduction)


class Wrapper(torch.nn.Module):
    """A module with the loss in a module of its own."""

    def __init__(self, reduction: str) -> None:
        super().__init__()
        self.inner = torch.nn.CrossEntropyLoss(reduction=reduction)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.inner(logits, labels)  # type: ignore[no-any-return]


def closure(reduction: str) -> Callable[..., Tensor]:
    return lambda logits, labels: F.cross_entropy(logits, labels, reduction=reduction)


def closure_of_settings(reduction: str) -> Callable[..., Tensor]:
    settings: dict[str, Any] = {"options": (1, reduction)}
    return lambda logits, labels: F.cross_entropy(logits, labels, reduction=settings["options"][1])


def closure_of_object(reduction: str) -> Callable[..., Tensor]:
    loss = Weighted(reduction)
    return lambda logits, labels: loss(logits, labels)


def default_argument(reduction: str) -> Callable[..., Tensor]:
    return lambda logits, labels, how=reduction: F.cross_entropy(logits, labels, reduction=how)


MADE_WITH_A_REDUCTION = {
    "partial": lambda reduction: functools.partial(F.cross_entropy, reduction=reduction),
    "closure": closure,
    "closure of settings": closure_of_settings,
    "closure of an object": closure_of_object,
    "default argument": default_argument,
    "object": Weighted,
    "bound method": lambda reduction: Weighted(reduction).__call__,
    "module": lambda reduction: torch.nn.CrossEntropyLoss(reduction=reduction),
    "module of a module": Wrapper,
    "partial of a closure": lambda reduction: functools.partial(closure(reduction)),
}


@pytest.mark.parametrize("kind", MADE_WITH_A_REDUCTION)
def test_a_loss_is_probed_for_each_of_its_settings(kind: str) -> None:
    make_loss: Any = MADE_WITH_A_REDUCTION[kind]
    hidden, weight, _, labels = make(t=9)
    run = functools.partial(linear_loss, hidden, weight, labels, chunk_tokens=4)
    expected = F.cross_entropy(hidden @ weight.T, labels, reduction="none")
    torch.testing.assert_close(run(loss=make_loss("sum")), expected.mean())
    with pytest.raises(ValueError, match="must be the sum over tokens, not their mean"):
        run(loss=make_loss("mean"))
    torch.testing.assert_close(run(loss=make_loss("none"), reduction="none"), expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_setting_may_change_the_number_of_results(compiled: bool) -> None:
    hidden, weight, _, labels = make(t=9, dtype=torch.float32)

    def of(metrics: bool) -> Callable[..., Any]:
        def loss(logits: Tensor, labels: Tensor) -> Any:
            value = losses.cross_entropy(logits, labels)
            return (value, value.detach()) if metrics else value

        return loss

    options: dict[str, Any] = {"chunk_tokens": 4, "compile_loss": compiled}
    both = linear_loss(hidden, weight, labels, loss=of(True), **options)
    torch.testing.assert_close(linear_loss(hidden, weight, labels, loss=of(False), **options), both[0])
    assert both[0] == both[1]


def test_floats_and_tensors_of_a_schedule_do_not_probe_again() -> None:
    hidden, weight, _, labels = make()
    calls: list[int] = []

    def loss(logits: Tensor, labels: Tensor, *, factor: Any) -> Tensor:
        calls.append(len(logits))
        return factor * losses.cross_entropy(logits, labels)

    def of(factor: Any) -> Callable[..., Tensor]:
        return lambda logits, labels: loss(logits, labels, factor=factor)

    values = (0.5, 2.0), (torch.tensor(0.5), torch.tensor(2.0))
    for made in (lambda f: functools.partial(loss, factor=f), of, lambda f: Weighted("sum", f, calls)):
        for pair in values:
            found = []
            for factor in pair:
                calls.clear()
                found.append(linear_loss(hidden, weight, labels, loss=made(factor)))
            assert calls == [20]  # the first may have been probed, the second was not
            torch.testing.assert_close(found[1], 4 * found[0])


def test_what_is_remembered_of_a_loss_keeps_no_tensor() -> None:
    hidden, weight, _, _ = make()
    head = torch.randn(15, 4, dtype=DOUBLE)
    loss = functools.partial(losses.kl_divergence_from_hidden, teacher_weight=head)
    assert linear_loss(hidden, weight, torch.randn(20, 4, dtype=DOUBLE), loss=loss) > 0
    reference = weakref.ref(head)
    del head, loss
    assert reference() is None


def test_settings_that_never_stay_the_same_do_not_fill_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_user_loss, "_PROBED", {})
    monkeypatch.setattr(_user_loss, "_MOST_PROBED", 4)
    hidden, weight, _, labels = make()
    for count in range(7):
        loss = functools.partial(losses.cross_entropy, label_smoothing=count)
        assert linear_loss(hidden, weight, labels, loss=loss).isfinite()
    assert len(_user_loss._PROBED) == 4


def test_a_function_that_encloses_itself_is_no_endless_loop() -> None:
    hidden, weight, _, labels = make()

    def loss(logits: Tensor, labels: Tensor, again: bool = True) -> Tensor:
        return loss(logits, labels, again=False) if again else losses.cross_entropy(logits, labels)

    assert linear_loss(hidden, weight, labels, loss=loss) > 0


GLOBAL = {"returns": "sum"}


def by_a_global(logits: Tensor, labels: Tensor) -> Any:
    each = logits.float().square().sum(-1)
    return {"sum": each.sum(), "each": each, "both": (each.sum(), each.sum())}[GLOBAL["returns"]]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("learns", [False, True])
def test_a_changed_global_shows_where_the_results_differ_in_number_or_shape(
    compiled: bool, learns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, _, labels = make(t=9, dtype=torch.float32)
    hidden.requires_grad_(learns)
    weight.requires_grad_(False)
    run = functools.partial(
        linear_loss, hidden, weight, labels, loss=by_a_global, reduction="sum", chunk_tokens=9, compile_loss=compiled
    )
    assert run() > 0
    for returns, shapes in (("each", r"\[\(9,\)\]"), ("both", r"\[\(\), \(\)\]")):
        monkeypatch.setitem(GLOBAL, "returns", returns)
        with pytest.raises(ValueError, match=rf"loss by_a_global returned results of shape {shapes} for 9 tokens"):
            run()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_loss_equals_the_uncompiled_one(reduction: Any) -> None:
    hidden, weight, bias, labels = make(t=21, dtype=torch.float32)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for length in (21, 20, 11):  # the last chunks have 1, 0 and 1 tokens more than whole chunks
        values = [
            linear_loss(
                hidden[:length], weight, labels[:length], loss=two_losses_per_token, bias=bias, reduction=reduction,
                chunk_tokens=5, compile_loss=compiled,
            )
            for compiled in (True, False)
        ]  # fmt: skip
        for a, b in zip(*values, strict=True):
            torch.testing.assert_close(a, b)
        a, b = ((v[0] + v[1]).square().sum() for v in values)
        assert_same_gradients(a, b, [hidden, weight, bias])
    added = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs
    assert added <= (4 if reduction == "none" else 2)  # forward alone and with the gradient, one graph each


def two_losses_per_token(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    x = logits.float()
    return torch.log_softmax(x, -1).gather(-1, labels[:, None])[:, 0], x.square().mean(-1)


def test_works_where_compilation_is_disabled() -> None:
    script = (
        "import torch; from lightning_qlora.modules.losses import functional as losses, linear_loss\n"
        "h = torch.randn(9, 4, requires_grad=True)\n"
        "y = torch.zeros(9, dtype=torch.long)\n"
        "for c in (None, True):\n"
        "    linear_loss(h, torch.randn(5, 4), y, loss=losses.cross_entropy, compile_loss=c).backward()\n"
        "print(float(h.grad.norm()) > 0)"
    )
    env = {**os.environ, "TORCH_COMPILE_DISABLE": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.gpu
@needs_gpu
def test_inside_torch_compile_on_a_gpu_no_break_and_no_recompilation_over_lengths() -> None:
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True)

    def check(length: int) -> None:
        tensors = make(t=length, h=32, v=1000, dtype=torch.float16)
        hidden = tensors[0].detach().cuda().requires_grad_()
        weight = torch.nn.Parameter(tensors[1].detach().cuda())  # of static shape, also by dynamic=True
        labels = tensors[3].cuda()
        labels[: length // 3] = -100
        expected = step(hidden, weight, labels, losses.cross_entropy)
        value = compiled(hidden, weight, labels, losses.cross_entropy)
        assert_same_gradients(value, expected, [hidden, weight], rtol=5e-3, atol=2e-5)

    check(200)
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in (33, 1024, 9, 200):
            check(length)


def total_of_upcast(logits: Tensor, labels: Tensor) -> Tensor:
    return total(logits.float(), labels)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("loss", [losses.cross_entropy, two_losses_per_token, total_of_upcast])
@pytest.mark.parametrize("chunk_tokens", [300, 64, 7, "auto"])
def test_on_a_gpu_chunks_are_as_exact_as_plain_float16(loss: Any, chunk_tokens: Any) -> None:
    tensors = make(t=300, h=64, v=2000, dtype=torch.float16)
    with torch.no_grad():
        tensors[1].div_(8)
    learned = [x.detach().cuda().requires_grad_() for x in tensors[:3]]
    exact = [x.detach().double().requires_grad_() for x in learned]
    labels = tensors[3].cuda()

    def plain(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        results = loss(F.linear(hidden, weight, bias), labels)
        return (results[0] if isinstance(results, tuple) else results).sum() / 300

    expected = plain(*exact)
    truth, theirs = torch.autograd.grad(expected, exact), torch.autograd.grad(plain(*learned), learned)
    value = linear_loss(*learned[:2], labels, loss=loss, bias=learned[2], chunk_tokens=chunk_tokens)
    value = value[0] if isinstance(value, tuple) else value
    torch.testing.assert_close(value.double(), expected.double(), rtol=1e-3, atol=0)
    for mine, other, true in zip(torch.autograd.grad(value, learned), theirs, truth, strict=True):
        assert (mine - true).norm() <= 1.5 * (other - true).norm() + 1e-6 * true.norm()


# ---------------------------------------------------------------------------------------------- chunk sizes and memory


@pytest.mark.parametrize("vocab", [1, 300, 32000, 49152, 128256, 10**9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True])
def test_automatic_chunks_fit_the_budget(vocab: int, dtype: torch.dtype, compiled: bool) -> None:
    tokens = auto_chunk_tokens(vocab, dtype, compiled=compiled)
    assert tokens % (128 if tokens >= 128 else 16) == 0
    assert tokens == 16 or tokens * vocab * dtype.itemsize <= CHUNK_BUDGET_BYTES


def test_chunk_sizes_that_the_docstring_gives() -> None:
    sizes = [auto_chunk_tokens(128256, torch.bfloat16, compiled=compiled) for compiled in (True, False)]
    assert sizes == [512, 48]
    assert auto_chunk_tokens(128256, torch.float16, compiled=True, weight_learns=True) == 1024


class Shapes(TorchDispatchMode):
    """Records the shapes of what operations return, backward included: of all, and of matrix products alone."""

    def __init__(self) -> None:
        super().__init__()
        self.all: set[tuple[int, ...]] = set()
        self.products: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        found = {tuple(t.shape) for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, Tensor)}
        self.all |= found
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.products |= found
        return out


def shapes_of(function: Callable[..., Tensor], train_weight: bool = False, **options: Any) -> Shapes:
    """What a forward and, if gradients are on, backward pass makes, for 96 tokens, hidden size 6, vocabulary 64."""
    hidden, weight, _, labels = make(t=96, v=64)
    with Shapes() as shapes:
        value = function(hidden, weight.requires_grad_(train_weight), labels, **options)
        if torch.is_grad_enabled():
            value.backward()
    assert (weight.grad is not None) == train_weight
    return shapes


chunked = functools.partial(linear_loss, loss=losses.cross_entropy)


@pytest.mark.parametrize("train_weight", [False, True])
def test_the_logits_of_all_tokens_never_exist(train_weight: bool) -> None:
    shapes = shapes_of(chunked, train_weight, chunk_tokens=20).all
    assert (20, 64) in shapes
    assert max(shape.numel() for shape in map(torch.Size, shapes)) == max(20 * 64, 96 * 6)
    plain = shapes_of(lambda h, w, y: F.cross_entropy(F.linear(h, w), y), train_weight)
    assert (96, 64) in plain.all  # the recorder does see them where they exist


def test_what_nobody_asks_for_is_not_multiplied() -> None:
    logits, hidden_grad, weight_grad = (96, 64), (96, 6), (64, 6)
    assert shapes_of(chunked, True, chunk_tokens=96).products == {logits, hidden_grad, weight_grad}
    assert shapes_of(chunked, False, chunk_tokens=96).products == {logits, hidden_grad}
    with torch.no_grad():
        assert shapes_of(chunked, chunk_tokens=96).products == {logits}


@pytest.mark.gpu
@needs_gpu
def test_memory_stays_that_of_one_chunk() -> None:
    hidden = torch.randn(8192, 256, device="cuda", dtype=torch.float16, requires_grad=True)
    weight = torch.randn(32768, 256, device="cuda", dtype=torch.float16)
    labels = torch.randint(32768, (8192,), device="cuda")

    def peak(loss: Callable[[], Tensor]) -> int:
        for _ in range(2):  # the first time compiles
            hidden.grad = weight.grad = None
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            loss().backward()
        return torch.cuda.max_memory_allocated() - before

    ours = peak(lambda: linear_loss(hidden, weight, labels, loss=losses.cross_entropy))
    plain = peak(lambda: F.cross_entropy((hidden @ weight.T).float(), labels))
    assert ours <= CHUNK_BUDGET_BYTES + 2 * hidden.nbytes + 2**23
    assert ours <= 0.1 * plain
    weight.requires_grad_()
    trained = peak(lambda: linear_loss(hidden, weight, labels, loss=losses.cross_entropy))
    assert trained <= 2 * CHUNK_BUDGET_BYTES + 2 * hidden.nbytes + 3 * weight.nbytes + 2**23  # float32 sum, 16 bit


# ------------------------------------------------------------------------------------------------------------- refusals


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels)


def batch_normalized(logits: Tensor, labels: Tensor) -> Tensor:
    return losses.cross_entropy(logits - logits.mean(0), labels)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda x, y: x, r"returned \(2, 15\) as result 0 for logits \[2, 15\]"),
        (lambda x, y: 3.0, "returned float as result 0"),
        (lambda x, y: (), "returned an empty tuple"),
        (mean_loss, "loss mean_loss: result 0 of two tokens together .* must be the sum over tokens, not their mean"),
        (batch_normalized, "must not depend on other tokens"),
    ],
)
def test_losses_that_do_not_fit_are_refused(loss: Any, message: str) -> None:
    hidden, weight, _, labels = make()
    with pytest.raises(ValueError, match=message):
        linear_loss(hidden, weight, labels, loss=loss)


def test_two_closures_of_one_code_are_told_apart() -> None:
    hidden, weight, _, labels = make()

    def of(inner: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda logits, labels: inner(logits, labels)

    assert linear_loss(hidden, weight, labels, loss=of(losses.cross_entropy), reduction="none").shape == (20,)
    with pytest.raises(ValueError, match="this one returns a sum"):
        linear_loss(hidden, weight, labels, loss=of(total), reduction="none")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.zeros(15, 7)}, r"hidden \(20, 6\) does not fit weight \(15, 7\)"),
        ({"weight": torch.zeros(15, 6, dtype=torch.int8)}, "must be of floating point"),
        ({"bias": torch.zeros(14)}, r"bias \(14,\) must be \[V\] = \[15\]"),
        ({"labels": torch.zeros(19, dtype=torch.long)}, r"per-token tensor 0 \(19,\) must have .* \(20,\)"),
        ({"mask": torch.ones(20)}, r"mask must be bool .* got torch.float32 \(20,\)"),
        ({"mask": torch.ones(20, dtype=torch.bool), "num_tokens": 19}, "num_tokens is 19, but the mask selects 20"),
        ({"num_tokens": 20}, "pass mask too"),
        *(
            ({"chunk_tokens": wrong}, rf"chunk_tokens must be at least 1 or 'auto', got {wrong!r}\. Tokens are")
            for wrong in (0, 2.5, True, "auto ")
        ),
        *(({"denominator": wrong}, f"denominator must be above 0, got {wrong}") for wrong in (0, -2.0, float("nan"))),
        ({"ignore_index": -100, "labels": torch.zeros(20)}, r"must be of integers \(20,\), but it is torch.float32"),
        ({"ignore_index": -100, "labels": torch.ones(20, 2).long()}, r"but it is torch.int64 \(20, 2\)"),
        ({"weight": torch.zeros(15, 6, dtype=DOUBLE, device="meta")}, "weight is on meta, but hidden on cpu"),
        ({"bias": torch.zeros(15, dtype=DOUBLE, device="meta")}, "bias is on meta"),
        ({"labels": torch.zeros(20, device="meta").long()}, "per-token tensor 0 is on meta"),
        ({"mask": torch.ones(20, device="meta").bool()}, "mask is on meta"),
        ({"reduction": "max"}, "reduction must be 'mean', 'sum' or 'none', got 'max'"),
        ({"reduction": "sum", "denominator": 3}, "with 'sum' nothing is divided"),
        ({"weight_grad_dtype": torch.float16}, "float16 would overflow"),
        ({"invalid": torch.arange(20) == 7}, r"1 token\(s\) are invalid, the first at position 7"),
    ],
)
def test_options_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    hidden, weight, _, labels = make()
    arguments: dict[str, Any] = {"weight": weight, "labels": labels, "loss": losses.cross_entropy, **changes}
    weight, labels = arguments.pop("weight"), arguments.pop("labels")
    with pytest.raises(ValueError, match=message):
        linear_loss(hidden, weight, labels, **arguments)


def test_ignore_index_without_a_per_token_tensor_is_refused() -> None:
    hidden, weight, _, _ = make()
    with pytest.raises(ValueError, match=r"but there is none\. Pass the labels first"):
        linear_loss(hidden, weight, loss=lambda x: x.logsumexp(-1), ignore_index=-100)


@pytest.mark.usefixtures("one_process_group")
@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
def test_a_dtensor_is_refused_with_cause_and_remedy(name: str) -> None:
    hidden, weight, bias, labels = make()
    inputs = {"hidden": hidden, "weight": weight, "bias": bias}
    inputs[name] = distribute_tensor(inputs[name].detach(), init_device_mesh("cpu", (1,)), [Shard(0)])
    message = rf"{name} is a DTensor, i\.e\. FSDP has not gathered it\. Call the loss from the forward of the module"
    with pytest.raises(ValueError, match=message):
        linear_loss(inputs["hidden"], inputs["weight"], labels, loss=losses.cross_entropy, bias=inputs["bias"])


def test_a_per_token_tensor_that_requires_a_gradient_is_refused() -> None:
    hidden, weight, _, _ = make()
    teacher = torch.zeros(20, 15, dtype=DOUBLE, requires_grad=True)
    with pytest.raises(ValueError, match=r"gets none here. Pass .detach\(\)"):
        linear_loss(hidden, weight, teacher, loss=losses.kl_divergence)
    with torch.no_grad():
        assert linear_loss(hidden, weight, teacher, loss=losses.kl_divergence) > 0


class Tempered(torch.nn.Module):
    """Cross-entropy with a temperature that is meant to be trained."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = torch.nn.Parameter(torch.ones(()))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return losses.cross_entropy(logits / self.temperature, labels)


def tempered(logits: Tensor, labels: Tensor, *, temperature: Any) -> Tensor:
    return losses.cross_entropy(logits / temperature, labels)


TRAINED = torch.ones((), requires_grad=True)


def tempered_by_a_global(logits: Tensor, labels: Tensor) -> Tensor:
    return tempered(logits, labels, temperature=TRAINED)


def tempered_by_a_closure(temperature: Any) -> Callable[..., Tensor]:
    return lambda logits, labels: tempered(logits, labels, temperature=temperature)


@pytest.mark.parametrize(
    ("loss", "place"),
    [
        (functools.partial(tempered, temperature=TRAINED), r"loss\.keywords\['temperature'\]"),
        (functools.partial(tempered, temperature=TRAINED.exp()), r"loss\.keywords\['temperature'\]"),
        (tempered_by_a_closure(TRAINED), "loss's closure variable temperature"),
        (Tempered(), r"loss\.temperature"),
        (Tempered().forward, r"loss\.__self__\.temperature"),
        (Weighted("sum", TRAINED), r"loss\.weight"),
        (tempered_by_a_global, "a global, a list or the like"),
    ],
)
def test_a_trained_tensor_inside_a_loss_is_refused_by_where_it_is(loss: Any, place: str) -> None:
    hidden, weight, _, labels = make(dtype=torch.float32)
    with torch.no_grad():  # evaluation wants no gradient, and is remembered
        assert linear_loss(hidden, weight, labels, loss=loss).isfinite()
    message = rf"requires a gradient, but gets none here: torch\.float32 \(\), found at {place}\. Only hidden, weight"
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            linear_loss(hidden, weight, labels, loss=loss)


def test_a_tensor_inside_a_loss_that_begins_to_be_trained_is_seen() -> None:
    hidden, weight, _, labels = make(dtype=torch.float32)
    loss = Tempered().requires_grad_(False)
    assert linear_loss(hidden, weight, labels, loss=loss).isfinite()
    loss.requires_grad_()
    with pytest.raises(ValueError, match=r"found at loss\.temperature"):
        linear_loss(hidden, weight, labels, loss=loss)


def test_a_trained_tensor_that_a_loss_detaches_or_does_not_use_is_none_of_its_business() -> None:
    hidden, weight, _, labels = make(dtype=torch.float32)
    head, teacher = torch.randn(15, 4, requires_grad=True), torch.randn(20, 4)
    detached = functools.partial(losses.kl_divergence_from_hidden, teacher_weight=head)
    assert linear_loss(hidden, weight, teacher, loss=detached).isfinite()
    unused = Weighted("sum")
    unused.other = head  # type: ignore[attr-defined]
    assert linear_loss(hidden, weight, labels, loss=unused).isfinite()


def test_inside_torch_compile_a_trained_tensor_inside_a_loss_is_refused() -> None:
    torch.compiler.reset()
    hidden, weight, _, labels = make(dtype=torch.float32)
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    for temperature in (TRAINED.detach(), TRAINED):
        loss = functools.partial(tempered, temperature=temperature)
        if temperature.requires_grad:
            with pytest.raises(Exception, match=r"found at loss\.keywords\['temperature'\]"):
                compiled(hidden, weight, labels, loss)
        else:
            torch.testing.assert_close(compiled(hidden, weight, labels, loss), step(hidden, weight, labels, loss))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda h, w: h[4].fill_(torch.inf), r"hidden is not finite at 1 token\(s\), the first 4"),
        (lambda h, w: w[3].fill_(torch.nan), r"weight is not finite in 1 row\(s\), the first 3"),
        (lambda h, w: (h.fill_(200), w.fill_(200)), "their product overflows the dtype"),
    ],
)
def test_what_is_not_finite_is_named_on_request_and_else_seen(spoil: Callable[..., Any], message: str) -> None:
    hidden, weight, _, labels = make(dtype=torch.float16)
    with torch.no_grad():
        spoil(hidden, weight)
    assert not linear_loss(hidden, weight, labels, loss=losses.cross_entropy).isfinite()
    with pytest.raises(ValueError, match=message):
        linear_loss(hidden, weight, labels, loss=losses.cross_entropy, check_finite=True)
