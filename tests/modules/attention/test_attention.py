"""Which attention is chosen, and that all compute the same in a model: packed rows, windows, masks, generation."""

import contextlib
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lightning_qlora.modules.attention import (
    IMPLEMENTATION,
    AttentionRequest,
    attention_inputs,
    choose_attention,
    register_attention,
)
from lightning_qlora.modules.attention.sdpa import sdpa_repeated_kv
from lightning_qlora.modules.checkpoints.safetensors_files import SafetensorsCheckpoint
from lightning_qlora.modules.lora.config import default_lora
from lightning_qlora.modules.models.build import build_model, materialize
from lightning_qlora.modules.models.causal_lm import QLoRAForCausalLM
from tests.graphs import Graphs

pytestmark = pytest.mark.usefixtures("one_thread")

# ---------------------------------------------------------------------------------------------------------- the choice

T4, A100, CPU = (7, 5), (8, 0), None
HALF, FULL = torch.float16, torch.float32


def choose(name: str, capability: tuple[int, int] | None, dtype: torch.dtype = HALF, **options: Any) -> tuple[str, str]:
    backend, reason = choose_attention(name, AttentionRequest(compute_capability=capability, dtype=dtype, **options))
    return backend.name, reason


@pytest.mark.parametrize("options", [{}, {"packed": True}, {"windows": (5,)}, {"windows": (None, 5)}], ids=str)
@pytest.mark.parametrize(
    ("capability", "dtype", "plain", "masked"),
    [
        (CPU, FULL, "sdpa", "sdpa"),
        (T4, HALF, "sdpa_repeated_kv", "sdpa_repeated_kv"),
        (A100, torch.bfloat16, "sdpa", "flash"),
        (A100, FULL, "sdpa_repeated_kv", "sdpa_repeated_kv"),
        ((12, 0), HALF, "sdpa", "flash"),
    ],
)
def test_auto_takes_the_fastest_that_can(capability, dtype, plain, masked, options):
    backend, reason = choose("auto", capability, dtype, **options)
    assert backend == (masked if options else plain)
    assert ("repeated" in reason) == (backend == "sdpa_repeated_kv")


@pytest.mark.parametrize("options", [{}, {"packed": True, "windows": (5,)}], ids=str)
def test_what_is_named_is_taken_where_it_runs(monkeypatch, options):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name == "xformers" else None)
    for name in ("sdpa", "flash", "flex", "xformers"):
        assert choose(name, A100, **options) == (name, "As asked for.")
    assert choose("xformers", T4, **options)[0] == "xformers"
    backend, reason = choose("flex", T4, **options)
    assert backend == "sdpa_repeated_kv"
    assert reason.startswith(
        "In place of flex, which needs tensor cores in Triton (compute capability 8.0), but this is "
    )
    assert "a GPU of compute capability 7.5. " in reason


@pytest.mark.parametrize(
    ("name", "capability", "dtype", "options", "message"),
    [
        ("fast", A100, HALF, {}, "attention must be one of 'auto', 'sdpa', 'flex', 'flash', 'xformers', 'eager', got"),
        ("auto", A100, HALF, {"windows": (0,)}, "sliding_window must be at least 1"),
        ("flash", T4, HALF, {}, "'flash' needs compute capability 8.0 and 16 bit, but this is a GPU of .* 7.5"),
        ("flash", A100, FULL, {}, "'flash' needs .* 8.0 with float32. Use attention='sdpa', or 'auto'"),
        ("flash", CPU, HALF, {}, "'flash' needs .* the CPU with float16"),
        (
            "flex",
            CPU,
            FULL,
            {},
            "'flex' needs a GPU, because .* no backward on the CPU. Use attention='sdpa', or 'auto'",
        ),
        ("xformers", CPU, FULL, {}, "'xformers' needs a GPU"),
        ("xformers", T4, HALF, {}, r"pip install 'lightning-qlora\[xformers\]'"),
        (
            "auto",
            A100,
            HALF,
            {"packed": True, "dropout": 0.1},
            "attention_dropout=0.1 is asked for with packed rows. Set",
        ),
        (
            "sdpa",
            CPU,
            FULL,
            {"windows": (3,), "dropout": 0.1},
            "on plain rows only, but .*=0.1 .* with a sliding window",
        ),
        (
            "flash",
            A100,
            HALF,
            {"dropout": 0.1},
            "'flash' has no .* sets attention_dropout=0.1. Use attention='sdpa', or",
        ),
        (
            "sdpa",
            A100,
            HALF,
            {"softcap": True},
            "'sdpa' cannot cap scores, because .* Use attention='flex', or 'auto'",
        ),
        ("flash", A100, HALF, {"softcap": True}, "'flash' cannot cap scores"),
        ("sdpa", CPU, FULL, {"softcap": True}, "Use attention='eager', or 'auto'"),
        ("flex", CPU, FULL, {"softcap": True}, "needs a GPU, because .* Use attention='eager', or 'auto'"),
    ],
)
def test_what_cannot_be_is_refused(monkeypatch, name, capability, dtype, options, message):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=message):
        choose(name, capability, dtype, **options)


def test_registering_adds_one_name_and_changes_no_other():
    def known() -> list[dict[str, Any]]:
        return [{name: each[name] for name in each} for each in (AttentionInterface(), AttentionMaskInterface())]

    register_attention()
    first = known()
    register_attention()
    attention, masks = known()
    assert [attention, masks] == first
    assert IMPLEMENTATION in attention
    assert IMPLEMENTATION in masks
    assert attention["sdpa"] is sdpa_attention_forward


# -------------------------------------------------------------------------------------------- repeated keys and values


def heads(seed: int, queries: int, keys: int, groups: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, 2 * groups, queries, 8), (2, 2, keys, 8), (2, 2, keys, 8)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("mask", ["none", "bool", "added"])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (1, 7), (3, 7)], ids=["training", "one token", "static cache"])
def test_equals_sdpa_of_transformers(queries, keys, groups, mask):
    module = SimpleNamespace(num_key_value_groups=groups, is_causal=True)
    masks = {"none": None, "bool": torch.rand(2, 1, queries, keys) > 0.3, "added": torch.randn(2, 1, queries, keys)}
    if masks["bool"] is not None:
        masks["bool"][..., 0] = True  # each query sees something
    found, expected = [], []
    for attention, results in ((sdpa_repeated_kv, found), (sdpa_attention_forward, expected)):
        tensors = heads(3, queries, keys, groups)
        output, weights = attention(module, *tensors, masks[mask], scaling=0.4)
        assert weights is None
        assert output.shape == (2, queries, 2 * groups, 8)
        results += [output, *torch.autograd.grad(output.square().sum(), tensors)]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_is_causal_of_the_call_goes_before_that_of_the_module():
    query, key, value = heads(4, 5, 5, 2)
    module = SimpleNamespace(is_causal=True)
    causal, _ = sdpa_repeated_kv(module, query, key, value, None)
    both, _ = sdpa_repeated_kv(module, query, key, value, None, is_causal=False)
    expected = F.scaled_dot_product_attention(query, key, value, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(both, expected)
    assert not torch.allclose(causal, both)


def test_dropout_is_applied():
    query, key, value = heads(4, 64, 64, 2)
    outputs = []
    for dropout in (0.0, 0.5):
        torch.manual_seed(0)
        outputs.append(sdpa_repeated_kv(nn.Module(), query, key, value, None, dropout=dropout)[0])
    assert not torch.allclose(*outputs)


@pytest.mark.parametrize("name", ["softcap", "position_bias", "cache"])
def test_what_it_cannot_do_is_refused(name):
    with pytest.raises(ValueError, match=f"sdpa_repeated_kv does not support {name}. Build the model with"):
        sdpa_repeated_kv(nn.Module(), *heads(4, 5, 5, 2), None, **{name: object()})


# --------------------------------------------------------------------------------------------------------- in a model

BACKENDS = ["sdpa", "sdpa_repeated_kv", "flex", "eager"]


def load(directory: Path, attention: Any, device: str = "cpu", **options: Any) -> QLoRAForCausalLM:
    """``"stock"`` is transformers' own attention in plain products, to compare with."""
    checkpoint = SafetensorsCheckpoint(directory)
    model = build_model(checkpoint, default_lora(4), attention="sdpa" if attention == "stock" else attention, **options)
    if attention == "stock":
        model.config._attn_implementation, model.attention_backend = "eager", None
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    materialize(model, checkpoint, torch.device(device), seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 10)  # the same on every device
    return model


def token_ids(batch: int, length: int) -> Tensor:
    return torch.randint(3, 300, (batch, length), generator=torch.Generator().manual_seed(100 * batch + length))


def packed(*rows: list[int]) -> dict[str, Any]:
    """A batch of random documents of these lengths."""
    ids = token_ids(len(rows), sum(rows[0]))
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])
    labels = ids.masked_fill(positions == 0, -100)
    return {"input_ids": ids, "position_ids": positions, "labels": labels, "document_lengths": list(rows)}


def alone(batch: dict[str, Any]) -> list[Tensor]:
    """The token ids [1, S] of each document."""
    rows = zip(batch["input_ids"], batch["document_lengths"], strict=True)
    return [ids[None] for row, lengths in rows for ids in row.split(lengths)]


def full_mask(length: int, window: int | None) -> Tensor:
    """[1, 1, S, S], to be added to the scores."""
    behind = torch.arange(length)[:, None] - torch.arange(length)
    visible = (behind >= 0) & (behind < (window or length))
    return torch.zeros(1, 1, length, length).masked_fill(~visible, -torch.inf)


def gradients(model: nn.Module) -> list[Tensor]:
    found = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    assert len(found) == 2 * 2 * 7
    return found


PACKED = [packed([5, 1, 9], [8, 7]), packed([6, 6], [6, 6]), packed([1, 1, 18])]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 1, 3, 99])
@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_logits_of_a_document_in_a_pack_are_those_alone(tiny_llama_dir, backend, window):
    model, plain = load(tiny_llama_dir, backend, sliding_window=window), load(tiny_llama_dir, "stock")
    for batch in PACKED:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = model(**inputs).logits.flatten(0, 1)
        expected = [plain(ids, attention_mask=full_mask(ids.shape[1], window)).logits[0] for ids in alone(batch)]
        torch.testing.assert_close(logits, torch.cat(expected), rtol=0, atol=1e-5)

        inputs["document_lengths"] = [[sum(row)] for row in batch["document_lengths"]]
        if window != 1:  # which sees no document's neighbour either
            assert (model(**inputs).logits.flatten(0, 1) - torch.cat(expected)).abs().max() > 1e-2


@pytest.mark.parametrize("checkpoint_activations", [False, True])
@pytest.mark.parametrize("backend", ["sdpa", "sdpa_repeated_kv", "eager"])
def test_loss_and_gradients_of_packed_rows_are_those_of_their_documents(
    tiny_llama_dir, backend, checkpoint_activations
):
    options = {"checkpoint_activations": checkpoint_activations}
    model, plain = load(tiny_llama_dir, backend, **options).train(), load(tiny_llama_dir, "stock").train()
    for batch in PACKED:
        model(**batch, num_items_in_batch=10).loss.backward()
        found = gradients(model)
        total = sum(plain(ids, labels=ids, num_items_in_batch=10).loss for ids in alone(batch) if ids.shape[1] > 1)
        total.backward()
        torch.testing.assert_close(model(**batch, num_items_in_batch=10).loss, total, rtol=1e-6, atol=0)
        torch.testing.assert_close(found, gradients(plain), rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 1, 3, 99])
def test_loss_and_gradients_of_whole_rows_are_those_of_a_full_mask(tiny_llama_dir, backend, window):
    model, plain = load(tiny_llama_dir, backend, sliding_window=window), load(tiny_llama_dir, "stock")
    ids = token_ids(3, 20)
    results = []
    with torch.set_grad_enabled(backend != "flex"):  # torch's has no backward on the CPU
        for each, mask in ((model, None), (plain, full_mask(20, window).expand(3, -1, -1, -1))):
            loss = each.train()(ids, labels=ids, attention_mask=mask).loss
            if backend != "flex":
                loss.backward()
            results.append([loss.detach(), *(gradients(each) if backend != "flex" else ())])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ["sdpa", "flash"])
@pytest.mark.parametrize("window", [None, 4])
def test_a_padding_mask_is_honoured(tiny_llama_dir, backend, window):
    """By SDPA, whatever the backend; so flash does it on a CPU."""
    model, plain = load(tiny_llama_dir, backend, sliding_window=window), load(tiny_llama_dir, "stock")
    ids, mask = token_ids(3, 20), torch.ones(3, 20, dtype=torch.long)
    mask[0, :6] = mask[2, 15:] = 0
    full = full_mask(20, window).expand(3, -1, -1, -1).masked_fill(mask[:, None, None] == 0, -torch.inf)
    full = full.masked_fill((full == -torch.inf).all(-1, keepdim=True), 0)  # as for padding, which matters to nobody
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 6] = -100  # padding's prediction
    results = []
    for each, given in ((model, mask), (plain, full)):
        loss = each(ids, attention_mask=given, labels=labels).loss
        loss.backward()
        results.append([loss.detach(), each(ids, attention_mask=given).logits[mask == 1], *gradients(each)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["sdpa", "flash"])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_generation_sees_what_training_did(tiny_llama_dir, backend, window, padded):
    model = load(tiny_llama_dir, backend, sliding_window=window).eval()
    plain = load(tiny_llama_dir, "stock").eval()
    ids, mask = token_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    if padded:
        mask[0, :4] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(model.generate(ids, attention_mask=mask, **options, use_cache=False), cached)
    for row, padding in zip(cached, (mask == 0).sum(1), strict=True):
        tokens = row[None, padding:]
        for step in range(9 - int(padding), tokens.shape[1]):
            if tokens[0, step] == 0:  # the end was reached
                break
            logits = plain(tokens[:, :step], attention_mask=full_mask(step, window)).logits
            assert logits[0, -1].argmax() == tokens[0, step]


def test_positions_without_lengths_are_packed_rows_too(tiny_llama_dir):
    """As transformers takes them: right, if with a mask of S x S."""
    model = load(tiny_llama_dir, "flash")
    batch = packed([5, 1, 9], [8, 7])
    del batch["document_lengths"]
    expected = load(tiny_llama_dir, "sdpa")(**packed([5, 1, 9], [8, 7])).loss
    torch.testing.assert_close(model(**batch).loss, expected)


class Shapes(TorchDispatchMode):
    """The most elements of any tensor that an operation made."""

    elements = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(t.numel() for t in tree_leaves(result) if isinstance(t, Tensor))])
        return result


@pytest.mark.parametrize("window", [None, 40])
def test_a_step_makes_no_tensor_of_the_size_of_a_mask(tiny_llama_dir, window):
    length = 500
    model = load(tiny_llama_dir, "sdpa", sliding_window=window).train()
    for batch in (packed([200, 300]), {"input_ids": token_ids(1, length), "labels": token_ids(1, length)}):
        with Shapes() as shapes:
            model(**batch).loss.backward()
        assert 498 * 300 <= shapes.elements < length**2  # the logits of all tokens that count


# --- graphs


SHAPES = [
    packed([5, 1, 129], [65, 70]), packed([130, 20], [150]), packed([64, 64, 64], [192], [100, 92]),
    packed([200], [150, 50]), packed([7] * 20, [140]), packed([128, 128], [256]), packed([1, 299], [300]),
    packed([64, 66], [129, 1]),
]  # fmt: skip


@pytest.mark.usefixtures("fresh_graphs")
@pytest.mark.parametrize("window", [None, 30])
def test_one_graph_for_all_documents(tiny_llama_dir, window):
    graphs = Graphs("aot_eager")
    options = {"checkpoint_activations": True, "sliding_window": window}
    compiled, eager = (load(tiny_llama_dir, "sdpa", **options).train() for _ in range(2))
    compiled.compile_regions(backend=graphs)
    for batch in SHAPES:
        results = []
        for model in (compiled, eager):
            loss = model(**batch).loss
            loss.backward()
            results.append([loss.detach(), *gradients(model)])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
    assert graphs.count == 3  # rotary embedding, the layers, the last norm


@pytest.mark.usefixtures("fresh_graphs")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_flex_is_one_graph_for_all_documents(tiny_llama_dir):
    """Without gradients, of which torch has none on the CPU; and one more where a row is a single block of 128."""
    graphs = Graphs("aot_eager")
    compiled, eager = load(tiny_llama_dir, "flex", sliding_window=70), load(tiny_llama_dir, "sdpa", sliding_window=70)
    compiled.compile_regions(backend=graphs)
    for batch in SHAPES:
        torch.testing.assert_close(compiled(**batch).loss, eager(**batch).loss, rtol=1e-6, atol=0)
    assert graphs.count == 2  # rotary embedding, the layers
    for batch in (packed([60, 4], [64]), packed([100, 10], [110])):
        torch.testing.assert_close(compiled(**batch).loss, eager(**batch).loss, rtol=1e-6, atol=0)
    assert graphs.count == 3


# --- refusals


@pytest.mark.parametrize("lengths", [[[5, 9], [8, 7]], [[15]], [[15, 0], [8, 7]], [[5, 10], [8, 8]], []], ids=str)
def test_lengths_that_are_not_the_batch_are_refused(lengths):
    message = f"of 2 rows, lengths of at least 1 that sum to its 15 tokens .* got {re.escape(str(lengths))}"
    with pytest.raises(ValueError, match=message):
        attention_inputs("sdpa", shape=(2, 15), device=torch.device("cpu"), document_lengths=lengths)


def test_documents_go_with_no_mask_and_no_attention_of_transformers(tiny_llama_dir):
    batch = packed([5, 4])
    with pytest.raises(ValueError, match="do not pass attention_mask or a KV cache"):
        load(tiny_llama_dir, "sdpa")(**batch, attention_mask=torch.ones(1, 9))
    with pytest.raises(ValueError, match="built with transformers' own attention"):
        load(tiny_llama_dir, "stock")(**batch)


# ----------------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_memory_efficient_kernel_takes_it_and_holds_no_scores():
    batch, queries, keys, length, width = 1, 16, 4, 4096, 64
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.float16, "requires_grad": True}
    query = torch.randn(batch, queries, length, width, **options)
    key, value = (torch.randn(batch, keys, length, width, **options) for _ in range(2))
    module = SimpleNamespace(is_causal=True)

    def peak(attention: Any, kernels: Any) -> tuple[int, Tensor]:
        for tensor in (query, key, value):
            tensor.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with kernels:
            output, _ = attention(module, query, key, value, None)
            output.float().square().mean().backward()
        return torch.cuda.max_memory_allocated() - before, output.detach()

    scores = batch * queries * length * length * 2
    taken, output = peak(sdpa_repeated_kv, sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION))
    assert taken < scores / 2
    _, expected = peak(sdpa_repeated_kv, contextlib.nullcontext())
    torch.testing.assert_close(output, expected, rtol=2e-3, atol=2e-3)
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION), pytest.raises(RuntimeError, match="No available kernel"):
        F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.usefixtures("fresh_graphs")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("backend", ["sdpa", "sdpa_repeated_kv", "flash", "flex", "xformers"])
def test_a_gpu_trains_on_packed_rows_within_noise_of_float32(tiny_llama_dir, needs_attention, backend, compiled, dtype):
    """Eight lengths, of rows of one to twenty documents: at most two graphs of a layer."""
    needs_attention(backend, dtype)
    options: dict[str, Any] = {"checkpoint_activations": True, "sliding_window": 70}
    model = load(tiny_llama_dir, backend, "cuda", dtype=dtype, **options).train()
    truth = load(tiny_llama_dir, "sdpa", **options).train()
    graphs = Graphs("inductor")
    if compiled:
        model.compile_regions(backend=graphs)
    for batch in SHAPES:
        expected = truth(**batch, num_items_in_batch=1).loss
        expected.backward()
        moved = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in batch.items()}
        with torch.autocast("cuda", dtype):
            loss = model(**moved, num_items_in_batch=1).loss
        loss.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
        for found, right in zip(gradients(model), gradients(truth), strict=True):
            assert F.cosine_similarity(found.flatten().cpu(), right.flatten(), dim=0) > 0.99
    assert graphs.count <= (4 if compiled else 0)  # rotary embedding, last norm, and a layer at most twice
