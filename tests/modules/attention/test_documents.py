"""Attention inside documents against plain products with a full mask: values, gradients, memory, graphs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_qlora.modules.attention import attention_inputs
from lightning_qlora.modules.attention.documents import DocumentKernel, Documents, _layout, document_attention
from lightning_qlora.modules.attention.transformers_interface import attention as attention_of_layers
from lightning_qlora.modules.autograd_in_operators import with_autograd
from tests.graphs import Graphs

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
LOOPS: list[DocumentKernel] = ["sdpa", "sdpa_repeated_kv"]
SCALE = 0.3


def qkv(tokens: int, heads: tuple[int, int] = (2, 1), width: int = 4, **options: Any) -> list[Tensor]:
    """Query, key and value [T, N or K, D]."""
    generator = torch.Generator().manual_seed(tokens)
    options = {"dtype": torch.float64, **options}
    shapes = [(tokens, number, width) for number in (heads[0], heads[1], heads[1])]
    return [torch.randn(shape, generator=generator).to(**options).requires_grad_() for shape in shapes]


def reference(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], window: int | None) -> Tensor:
    """All scores, and a mask for them."""
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(query.device)
    position = torch.arange(len(number), device=query.device)
    behind = position[:, None] - position
    visible = (number[:, None] == number) & (behind >= 0) & (behind < (window or len(number)))
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    scores = torch.einsum("qnd,knd->nqk", query, key) * SCALE
    return torch.einsum("nqk,knd->qnd", scores.masked_fill(~visible, -torch.inf).softmax(-1), value)


def results(attention: Callable[..., Tensor], tensors: list[Tensor], *args: Any, **kwargs: Any) -> list[Tensor]:
    """Output and gradients."""
    output = attention(*tensors, *args, **kwargs)
    gradient = torch.cos(torch.arange(output.numel(), device=output.device).view(output.shape)).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, tensors, gradient)]


def operator(
    query: Tensor, key: Tensor, value: Tensor, *, documents: Documents, window: int | None, scale: float
) -> Tensor:
    """What is in a compiled graph."""
    kernel, boundaries, places, _ = documents
    output: Tensor = torch.ops.lightning_qlora.document_attention(
        query, key, value, boundaries, places, window, scale, kernel
    )
    return output


# --- values and gradients


@pytest.mark.parametrize("attention", [document_attention, operator])
@pytest.mark.parametrize("kernel", LOOPS)
@pytest.mark.parametrize("window", [None, 1, 3, 300, 1000])
@pytest.mark.parametrize("lengths", [[[5, 1, 3], [1, 8]], [[4, 4], [4, 4]], [[620, 1], [300, 321]]], ids=str)
def test_equals_all_scores_with_a_mask(lengths, window, kernel, attention):
    flat = [length for row in lengths for length in row]
    tensors = qkv(sum(flat))
    documents = Documents.of(kernel, lengths, CPU)
    found = results(attention, tensors, documents=documents, window=window, scale=SCALE)
    torch.testing.assert_close(found, results(reference, tensors, flat, window), rtol=1e-10, atol=1e-10)


@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), window=st.none() | st.integers(1, 12))
def test_equals_all_scores_for_any_documents(lengths, window):
    tensors = qkv(sum(lengths), heads=(6, 2))
    found = results(
        document_attention, tensors, documents=Documents.of("sdpa", [lengths], CPU), window=window, scale=SCALE
    )
    torch.testing.assert_close(found, results(reference, tensors, lengths, window), rtol=1e-10, atol=1e-10)


def test_wrong_lengths_are_not_within_the_tolerance():
    tensors = qkv(9)
    for lengths in ([9], [4, 5], [5, 3, 1]):
        found = document_attention(*tensors, documents=Documents.of("sdpa", [lengths], CPU), window=None, scale=SCALE)
        assert (found - reference(*tensors, [5, 4], None)).abs().max() > 1e-2


# --- how documents are put together


@settings(deadline=None, max_examples=100)
@given(lengths=st.lists(st.integers(1, 5000), min_size=1, max_size=300))
def test_documents_of_about_one_length_go_together(lengths):
    layout = _layout(tuple(lengths))
    total, longest = sum(length * count for length, count in layout.batches), max(lengths)
    assert sum(count for _, count in layout.batches) == len(lengths)
    assert total < 1.5 * sum(lengths) or len(lengths) == 1
    assert len(layout.batches) <= 2 * 9 + max(0, longest - 512) / 128 + 1
    assert len(set(layout.places)) == sum(lengths)
    assert max(layout.places) < total
    first = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    begins = torch.tensor(layout.places)[first]
    steps = torch.tensor(layout.places) - torch.repeat_interleave(begins, torch.tensor(lengths))
    assert steps.tolist() == [i for length in lengths for i in range(length)]


def test_many_documents_take_few_calls(monkeypatch):
    calls = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def count(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(tuple(query.shape))
        return attend(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", count)
    lengths = [62 + 7 * i % 95 for i in range(40)]
    document_attention(*qkv(sum(lengths)), documents=Documents.of("sdpa", [lengths], CPU), window=None, scale=SCALE)
    assert len(calls) <= 4
    assert sum(rows for rows, *_ in calls) == 40


def test_documents_of_one_length_are_not_copied():
    layout = _layout((5, 5, 5))
    tensor = torch.zeros(15, 1)
    assert layout.pad(tensor, torch.tensor(layout.places)) is tensor
    assert not _layout((5, 5, 4)).is_identity
    assert not _layout((5, 12, 5)).is_identity


# --- operators


@pytest.mark.parametrize("window", [None, 3])
def test_operators_are_what_they_say(window):
    documents = Documents.of("sdpa", [[5, 1], [6]], CPU)
    tensors = qkv(12, dtype=torch.float32)
    settings = (documents.boundaries, documents.places, window, SCALE, "sdpa")
    torch.library.opcheck(torch.ops.lightning_qlora.document_attention.default, (*tensors, *settings))
    tensors = [each.detach() for each in tensors]
    gradient = torch.randn_like(tensors[0])
    torch.library.opcheck(
        torch.ops.lightning_qlora.document_attention_backward.default, (gradient, *tensors, *settings)
    )


@pytest.mark.usefixtures("fresh_graphs")
def test_one_graph_takes_any_documents():
    graphs = Graphs("aot_eager")
    compiled = torch.compile(document_attention, backend=graphs, fullgraph=True)
    for lengths in ([5, 1, 3], [2, 2], [40, 7], [1] * 8, [30], [3, 300], [6, 5, 4, 3, 2, 1], [100, 100]):
        tensors = qkv(sum(lengths))
        documents = Documents.of("sdpa", [lengths], CPU)
        for tensor in (*tensors, documents.boundaries, documents.places, documents.longest):
            torch._dynamo.mark_dynamic(tensor, 0)
        found = results(compiled, tensors, documents=documents, window=None, scale=SCALE)
        torch.testing.assert_close(found, results(reference, tensors, lengths, None), rtol=1e-10, atol=1e-10)
    assert graphs.count == 1


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_graphs")
def test_inductor_computes_the_same():
    def layer(query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> Tensor:
        return document_attention(query * 2, key.sin(), value, documents=documents, window=4, scale=SCALE).cos()

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for lengths in ([5, 1, 3], [20, 2]):
        tensors = qkv(sum(lengths))
        documents = Documents.of("sdpa", [lengths], CPU)
        found, expected = (results(each, tensors, documents) for each in (compiled, layer))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_autograd_records_where_it_is_off():
    weight = torch.ones(3, requires_grad=True)

    def work() -> Tensor:
        return torch.autograd.grad((weight * 2).sum(), weight)[0]

    def fail() -> Tensor:
        raise ZeroDivisionError

    with torch.no_grad():
        assert with_autograd(work, CPU).tolist() == [2, 2, 2]
    with torch._C._AutoDispatchBelowAutograd():
        assert with_autograd(work, CPU).tolist() == [2, 2, 2]
        with pytest.raises(ZeroDivisionError):
            with_autograd(fail, CPU)


# --- memory


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        made = [each.numel() for each in tree_leaves(result) if isinstance(each, Tensor)]
        self.elements = max([self.elements, *made])
        return result


@pytest.mark.parametrize("kernel", LOOPS)
@pytest.mark.parametrize("window", [None, 100])
def test_no_tensor_has_the_size_of_scores(window, kernel):
    """Not even those of one head and one document: 2 heads of 2 are the values of 1024 tokens, 1024^2 the scores."""
    length = 1024
    tensors = qkv(2 * length, heads=(2, 1), width=2)
    documents = Documents.of(kernel, [[length, length]], CPU)
    with Largest() as largest:
        results(document_attention, tensors, documents=documents, window=window, scale=SCALE)
    assert 2 * length * 2 * 2 <= largest.elements <= 256 * (256 + 100)
    with Largest() as largest:
        results(reference, tensors, [length, length], window)
    assert largest.elements >= length**2


# --- on a GPU

GPU_KERNELS = ["sdpa", "sdpa_repeated_kv", "flash", "flex", "xformers"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("window", [None, 1, 100])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("kernel", GPU_KERNELS)
def test_kernels_of_a_gpu_are_within_noise_of_float32(needs_attention, kernel, width, window, dtype):
    """Rows of 600 tokens, which no block size divides, of 8 heads of queries and 2 of keys."""
    needs_attention(kernel, dtype)
    lengths = [[300, 1, 299], [600]]
    flat, device = [length for row in lengths for length in row], torch.device("cuda", 0)
    tensors = qkv(1200, heads=(8, 2), width=width, dtype=dtype, device=device)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if kernel == "flex":
            rows = [each.unflatten(0, (2, 600)).transpose(1, 2) for each in (query, key, value)]
            inputs = attention_inputs(
                "flex", shape=(2, 600), device=device, document_lengths=lengths, windows=(None, window)
            )
            layer = torch.nn.Module()
            layer.attention_window = window
            return attention_of_layers(layer, *rows, scaling=SCALE, **inputs)[0].flatten(0, 1)
        documents = Documents.of(kernel, lengths, device)
        found = document_attention(query, key, value, documents=documents, window=window, scale=SCALE)
        if kernel != "flash":
            compiled = operator(query, key, value, documents=documents, window=window, scale=SCALE)
            torch.testing.assert_close(compiled, found, rtol=0, atol=0)
        return found

    truth = [each.detach().float().requires_grad_() for each in tensors]
    tolerance = 4 * torch.finfo(dtype).eps
    for found, expected in zip(results(attention, tensors), results(reference, truth, flat, window), strict=True):
        assert found.dtype == dtype
        # A window of one token leaves queries and keys without a gradient but rounding.
        error = (found.float() - expected).norm() / expected.norm().clamp(min=1e-2 * expected.numel() ** 0.5)
        assert error < tolerance, f"{error=}"
