"""Attention with repeated keys and values against transformers' own SDPA, in and out of a model."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lightning_qlora.modules.attention import (
    SDPA_REPEATED_KV,
    default_attention,
    register_attention,
    sdpa_repeated_kv,
)
from lightning_qlora.modules.llama import QLoRALlamaForCausalLM, build_llama, default_lora, materialize
from lightning_qlora.modules.weights import SafetensorsCheckpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("capability", "expected"),
    [(None, "sdpa"), ((7, 0), SDPA_REPEATED_KV), ((7, 5), SDPA_REPEATED_KV), ((8, 0), "sdpa"), ((12, 0), "sdpa")],
)
def test_only_gpus_without_flash_attention_need_another(capability, expected):
    assert default_attention(capability) == expected


def test_registering_adds_one_name_and_changes_no_other():
    def known() -> list[dict[str, Any]]:
        return [{name: each[name] for name in each} for each in (AttentionInterface(), AttentionMaskInterface())]

    register_attention()
    first = known()
    register_attention()
    attention, masks = known()
    assert [attention, masks] == first
    assert attention[SDPA_REPEATED_KV] is sdpa_repeated_kv
    assert masks[SDPA_REPEATED_KV] is masks["sdpa"]
    assert attention["sdpa"] is sdpa_attention_forward


# ------------------------------------------------------------------------------------------------------- the function


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
    with pytest.raises(ValueError, match=f"sdpa_repeated_kv knows no {name}. Build the model with"):
        sdpa_repeated_kv(nn.Module(), *heads(4, 5, 5, 2), None, **{name: object()})


# --------------------------------------------------------------------------------------------------------- in a model


def load(directory: Path, attention: str, **options: Any) -> QLoRALlamaForCausalLM:
    checkpoint = SafetensorsCheckpoint(directory)
    model = build_llama(checkpoint, default_lora(4), attention=attention, **options)
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    materialize(model, checkpoint, torch.device("cpu"), seed=0)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def pair(tiny_llama_dir: Path) -> list[QLoRALlamaForCausalLM]:
    """The same model with repeated keys and values, and with transformers' attention."""
    return [load(tiny_llama_dir, attention) for attention in (SDPA_REPEATED_KV, "sdpa")]


def token_ids(batch: int, length: int) -> Tensor:
    return torch.randint(3, 300, (batch, length), generator=torch.Generator().manual_seed(100 * batch + length))


@pytest.mark.parametrize("padded", [False, True])
def test_logits_and_gradients_of_a_model_are_the_same(pair, padded):
    ids = token_ids(3, 20)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :6] = mask[2, 15:] = 0
    results = []
    for model in pair:
        loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert len(gradients) == 2 * 2 * 7
        # Padding of its own attends to nothing that matters.
        results.append([loss.detach(), model(ids, attention_mask=mask).logits[mask == 1], *gradients])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_generation_with_a_cache_is_the_same(pair, padded):
    ids = token_ids(2, 9)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    outputs = [model.eval().generate(ids, **options) for model in pair]
    assert outputs[0].shape[1] > 9 + 1
    assert torch.equal(*outputs)
    uncached = pair[0].generate(ids, **options, use_cache=False)
    assert torch.equal(uncached, outputs[0])


@pytest.fixture
def _forget_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_forget_graphs")
def test_compiles_to_one_graph_for_all_lengths(tiny_llama_dir, pair):
    graphs = 0
    aot_eager = torch._dynamo.lookup_backend("aot_eager")

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        nonlocal graphs
        graphs += 1
        return aot_eager(graph, inputs)

    compiled = load(tiny_llama_dir, SDPA_REPEATED_KV, checkpoint_activations=True).train()
    compiled.compile_regions(backend=backend)
    for shape in [(2, 9), (3, 12), (4, 64)]:
        ids = token_ids(*shape)
        results = []
        for model in (compiled, pair[1].train()):
            loss = model(ids, labels=ids).loss
            loss.backward()
            results.append([loss.detach(), *[p.grad for p in model.parameters() if p.grad is not None]])
            model.zero_grad()
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
    assert graphs == 3  # rotary embedding, the layers, the last norm


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
