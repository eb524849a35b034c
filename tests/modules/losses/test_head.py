"""The chunked cross-entropy against float64, plain torch and torch's own op; the head that FSDP gathers.

Shapes: T tokens, H hidden size, V vocabulary.
"""

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_qlora.modules.losses import LossHead, cross_entropy, focal, grpo, kl_divergence, linear_cross_entropy

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
    known=st.booleans(),
    upstream=st.sampled_from([1.0, -3.5, 65536.0]),
    seed=st.integers(0, 99),
)
def test_equals_float64_in_float32_whatever_the_chunks(t, v, chunk_tokens, reduction, known, upstream, seed):
    hidden, weight, labels = make(t, 8, v, seed=seed)
    labels[seed % t] = seed % v  # the mean of no token at all is plain torch's NaN; another test has that
    count = int((labels != -100).sum()) if known else None
    got = gradients(
        linear_cross_entropy, hidden, weight, labels, upstream, chunk_tokens=chunk_tokens, reduction=reduction,
        num_tokens=count,
    )  # fmt: skip
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


@pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"), reason="torch.nn.functional.linear_cross_entropy is new in torch 2.13"
)
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_agrees_with_torchs_own_op(dtype, chunked):
    data = make(150, 16, 70, dtype)
    bias = torch.randn(70, generator=torch.Generator().manual_seed(1)).to(dtype)
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None

    def torchs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return F.linear_cross_entropy(hidden, weight, labels, linear_bias=bias.to(hidden.dtype), options=options)

    def exact(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight, bias.double()), labels)

    truth = gradients(exact, data[0].double(), data[1].double(), data[2])
    theirs = gradients(torchs, *data)
    ours = gradients(linear_cross_entropy, *data, bias=bias, chunk_tokens=64)
    rounding = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 0}[dtype]
    for mine, other, true in zip(ours, theirs, truth, strict=True):
        # In 16 bit torch's chunks round the gradient of hidden once, ours as often as the plain path: twice.
        assert (mine - true).norm() <= 2 * (other - true).norm() + rounding * true.norm()


def test_other_shapes_and_ignore_index():
    hidden, weight, labels = make(24, 8, 30, ignored=0)
    labels[3:7] = 0
    expected = plain(hidden, weight, labels, ignore_index=0, reduction="none")
    shaped = hidden.view(2, 3, 4, 8), weight, labels.view(2, 3, 4)
    each = linear_cross_entropy(*shaped, ignore_index=0, chunk_tokens=5, reduction="none")
    torch.testing.assert_close(each, expected.view(2, 3, 4))
    mean = linear_cross_entropy(*shaped, ignore_index=0, chunk_tokens=5)
    torch.testing.assert_close(mean, expected.sum() / (labels != 0).sum())


@pytest.mark.parametrize("tokens", [0, 7])
@pytest.mark.parametrize("num_tokens", [None, 0])
def test_no_token_that_counts_means_loss_and_gradients_of_zero(tokens, num_tokens):
    hidden, weight, labels = make(tokens, 8, 30)
    loss, *grads = gradients(
        linear_cross_entropy, hidden, weight, labels.fill_(-100), chunk_tokens=4, num_tokens=num_tokens
    )
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


# --- refusals


@pytest.mark.parametrize(
    ("hidden", "weight", "labels", "options", "message"),
    [
        ((4, 8), (10, 9), (4,), {}, r"hidden \(4, 8\) does not fit weight \(10, 9\)"),
        ((4, 8), (8,), (4,), {}, "does not fit weight"),
        ((2, 4, 8), (10, 8), (8,), {}, r"per-token tensor 0 \(8,\) must have hidden's leading shape \(2, 4\)"),
        ((4, 8), (10, 8), (4,), {"chunk_tokens": 0}, "chunk_tokens must be at least 1 or 'auto', got 0"),
        ((4, 8), (10, 8), (4,), {"reduction": "max"}, "reduction must be 'mean', 'sum' or 'none', got 'max'"),
        ((4, 8), (10, 8), (4,), {"num_tokens": 3}, "num_tokens is 3, but the mask selects 4 tokens"),
    ],
)
def test_what_does_not_fit_is_refused(hidden, weight, labels, options, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(torch.zeros(hidden), torch.zeros(weight), torch.zeros(labels, dtype=torch.long), **options)


@pytest.mark.parametrize("wrong", [-1, 30, -99])
@pytest.mark.parametrize("num_tokens", [None, 3])
def test_labels_outside_the_vocabulary_are_named(wrong, num_tokens):
    hidden, weight, _ = make(4, 8, 30)
    labels = torch.tensor([3, -100, 4, wrong])
    with pytest.raises(ValueError, match=r"1 token\(s\) have a label outside \[0, V\) .*, the first at position 3"):
        linear_cross_entropy(hidden, weight, labels, num_tokens=num_tokens)


def test_labels_that_are_no_indices_are_refused():
    hidden, weight, labels = make(4, 8, 30)
    with pytest.raises(ValueError, match=r"labels must be class indices of int64, got torch\.float32"):
        linear_cross_entropy(hidden, weight, labels.float())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_with_the_number_of_tokens_known_the_host_never_waits_for_the_gpu():
    hidden, weight, labels = (x.cuda() for x in make(300, 64, 500, torch.float16))
    hidden.requires_grad_()
    count = int((labels != -100).sum())
    linear_cross_entropy(hidden, weight, labels, num_tokens=count).backward()  # compiles
    linear_cross_entropy(hidden, weight[:-400], labels, num_tokens=count)  # the first call with a vocabulary tries f
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        right = linear_cross_entropy(hidden, weight, labels, num_tokens=count)
        right.backward()
        wrong_count = linear_cross_entropy(hidden, weight, labels, num_tokens=count - 1)
        wrong_label = linear_cross_entropy(hidden, weight[:-400], labels, num_tokens=count)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    torch.testing.assert_close(right, plain(hidden, weight, labels))
    assert wrong_count.isnan()
    assert wrong_label.isnan()
    with pytest.raises(ValueError, match="have a label outside"):
        linear_cross_entropy(hidden, weight[:-400], labels)


# --- the head


@pytest.mark.parametrize("bias", [False, True])
def test_the_head_gives_logits_or_the_sum_of_their_loss(bias):
    hidden, _, labels = make(12, 8, 30)
    head = LossHead(8, 30, bias=bias)
    logits = head(hidden)
    torch.testing.assert_close(logits, F.linear(hidden, head.weight, head.bias))
    expected = F.cross_entropy(logits, labels, reduction="sum")
    loss = head(hidden.view(3, 4, 8), labels.view(3, 4), num_tokens=int((labels != -100).sum()))
    torch.testing.assert_close(loss, expected)
    parameters = list(head.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), rtol=1e-5, atol=1e-6
    )


def test_by_default_the_head_is_linear_cross_entropy_to_the_last_bit():
    hidden, weight, labels = make(40, 8, 30, torch.bfloat16)
    head = LossHead(8, 30, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        head.weight.copy_(weight)
    ours = gradients(lambda h, _, y: head(h, y), hidden, weight, labels)[:2]
    theirs = gradients(linear_cross_entropy, hidden, weight, labels, reduction="sum")
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    assert torch.equal(head.weight.grad, theirs[2])


smoothed = functools.partial(cross_entropy, label_smoothing=0.1, z_loss=1e-4)


def summed(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum, by torch, which refuses labels outside the vocabulary."""
    return F.cross_entropy(logits, labels, reduction="sum")


@pytest.mark.parametrize("loss", [cross_entropy, smoothed, focal, summed])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.125, None), (1.0, 2.0), (3.0, 2.0)])
def test_any_loss_of_scaled_and_capped_logits(loss, scale, softcap):
    hidden, _, labels = make(12, 8, 30)
    head = LossHead(8, 30, loss=loss, logit_scale=scale, softcap=softcap)
    logits = head(hidden)
    assert torch.equal(logits, F.linear(hidden, head.weight, head.bias))  # as they are
    final = scale * logits
    final = final if softcap is None else softcap * torch.tanh(final / softcap)
    counts = labels != -100
    expected = loss(final[counts], labels[counts]).sum()
    value = head(hidden.view(3, 4, 8), labels.view(3, 4), num_tokens=int(counts.sum()))
    torch.testing.assert_close(value, expected)
    parameters = list(head.parameters())
    truth = torch.autograd.grad(expected, parameters)
    torch.testing.assert_close(torch.autograd.grad(value, parameters), truth, rtol=1e-5, atol=1e-6)


def test_scale_and_cap_are_applied_in_float32():
    hidden, _, labels = make(50, 16, 40, torch.bfloat16)
    head = LossHead(16, 40, bias=False, dtype=torch.bfloat16, logit_scale=8.0, softcap=3.0)
    logits = 8.0 * F.linear(hidden, head.weight).float()
    torch.testing.assert_close(head(hidden, labels), summed(3.0 * torch.tanh(logits / 3.0), labels), rtol=1e-6, atol=0)


def test_a_head_with_a_scale_probes_its_loss_once():
    hidden, _, labels = make(12, 8, 30)
    calls = []

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        calls.append(len(logits))
        return cross_entropy(logits, labels)

    head = LossHead(8, 30, loss=loss, logit_scale=0.5)
    for scale in (0.5, 0.25):  # of a schedule
        head.logit_scale = scale
        head(hidden, labels)
    counted = int((labels != -100).sum())
    assert calls == [2, 1, 1, counted, counted]


def test_the_head_passes_more_tensors_on_and_losses_without_labels_count_every_token():
    hidden, _, labels = make(12, 8, 30)
    weights = torch.rand(12)
    head = LossHead(8, 30, loss=lambda logits, labels, weights: weights * cross_entropy(logits, labels))
    counts = labels != -100
    expected = (weights[counts] * cross_entropy(head(hidden)[counts], labels[counts])).sum()
    torch.testing.assert_close(head(hidden, labels, weights), expected)
    head.loss = kl_divergence
    teacher = torch.randn(12, 30)
    torch.testing.assert_close(head(hidden, teacher), kl_divergence(head(hidden), teacher).sum())
    with pytest.raises(ValueError, match="num_tokens is how many tokens count"):
        head(hidden, teacher, num_tokens=12)


@pytest.mark.parametrize("loss", [cross_entropy, smoothed, focal])
def test_the_head_names_labels_outside_the_vocabulary_for_every_loss(loss):
    head = LossHead(8, 30, loss=loss)
    with pytest.raises(ValueError, match=r"1 token\(s\) have a label outside \[0, V\) .*, the first at position 1"):
        head(torch.zeros(3, 8), torch.tensor([-100, 30, 4]))
    with pytest.raises(ValueError, match=r"labels must be class indices of int64, got torch\.int32"):
        head(torch.zeros(3, 8), torch.zeros(3, dtype=torch.int32))


@pytest.mark.parametrize("loss", [cross_entropy, smoothed])
def test_the_head_wants_class_indices_for_cross_entropy(loss):
    with pytest.raises(ValueError, match=r"labels must be class indices of int64, got torch\.float32"):
        LossHead(8, 30, loss=loss)(torch.zeros(3, 8), torch.zeros(3))


def test_a_head_trains_on_one_result():
    hidden, _, labels = make(12, 8, 30)
    more = [torch.rand(12) for _ in range(3)]
    with pytest.raises(ValueError, match=r"loss grpo returned a tuple, but a LossHead trains on one result"):
        LossHead(8, 30, loss=grpo)(hidden, labels, *more)
    assert LossHead(8, 30, loss=lambda *inputs: grpo(*inputs)[0])(hidden, labels, *more).isfinite()


@pytest.mark.parametrize("wrong", [{"logit_scale": 0.0}, {"softcap": 0.0}, {"softcap": -1.0}, {"logit_scale": -1.0}])
def test_scales_and_caps_that_make_no_sense_are_refused(wrong):
    hidden, _, labels = make(12, 8, 30)
    with pytest.raises(ValueError, match=r"logit_scale \(.*\) and softcap \(.*\) of a LossHead must be above 0"):
        LossHead(8, 30, **wrong)(hidden, labels)


@pytest.mark.usefixtures("one_process_group")
def test_fsdp_gathers_the_heads_weight_for_its_loss_and_nowhere_else():
    hidden, weight, labels = make(12, 8, 30)
    head = LossHead(8, 30, bias=False)
    with torch.no_grad():
        head.weight.copy_(weight)
    fully_shard(head, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match=r"weight is a DTensor, i\.e\. FSDP has not gathered it"):
        linear_cross_entropy(hidden, head.weight, labels)
    loss = head(hidden, labels)
    loss.backward()
    expected, _, truth = gradients(plain, hidden, weight, labels, reduction="sum")
    torch.testing.assert_close(loss.detach(), expected)
    assert isinstance(head.weight.grad, DTensor)
    torch.testing.assert_close(head.weight.grad.full_tensor(), truth)


@pytest.mark.parametrize(
    ("dynamic", "graphs", "options"),
    [(True, 1, {}), (None, 2, {}), (None, 2, {"loss": smoothed, "logit_scale": 0.5, "softcap": 4.0})],
)  # None: the second count makes it a variable
def test_a_compiled_head_is_one_graph_over_all_lengths(dynamic, graphs, options):
    torch.compiler.reset()
    counter, heads = CompileCounter(), [LossHead(8, 30, **options) for _ in range(3)]
    for head, backend in zip(heads[1:], (counter, "aot_eager"), strict=True):
        head.load_state_dict(heads[0].state_dict())
        head.compile(fullgraph=True, backend=backend, dynamic=dynamic)
    for length in (20, 33, 9, 40):
        hidden, _, labels = make(length, 8, 30)
        hidden.requires_grad_()
        for tensor in (hidden, labels):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        values = [head(hidden, labels, num_tokens=int((labels != -100).sum())) for head in heads]
        found = [(value, *torch.autograd.grad(value, hidden)) for value in values]
        torch.testing.assert_close(found[1:], found[:1] * 2)
    assert counter.frame_count == graphs
