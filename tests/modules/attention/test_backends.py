"""The table of backends: what each supports is what it does; soft caps, windows that differ by layer, families."""

import itertools
from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
)

from lightning_qlora.modules.attention import (
    BACKENDS,
    IMPLEMENTATION,
    AttentionBackend,
    AttentionName,
    AttentionRequest,
    attention_inputs,
    choose_attention,
    register_attention,
)
from lightning_qlora.modules.attention.choice import attention_matrix, find_backend
from lightning_qlora.modules.attention.eager import plain_products
from lightning_qlora.modules.attention.transformers_interface import attention
from lightning_qlora.modules.checkpoints.safetensors_files import SafetensorsCheckpoint
from lightning_qlora.modules.hardware import capabilities
from lightning_qlora.modules.lora.config import default_lora
from lightning_qlora.modules.models.build import build_model, materialize
from lightning_qlora.modules.models.options import ComputeOptions
from lightning_qlora.modules.training.causal_lm import QLoRACausalLM
from tests.graphs import Graphs

pytestmark = pytest.mark.usefixtures("one_thread")

SCALE = 0.3
PLAIN, PACKED = None, [[5, 1, 9], [8, 7]]
NO_FLEX_WARNING = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def layer(window: int | None = None) -> nn.Module:
    """An attention layer as transformers passes it."""
    module = nn.Module()
    module.attention_window, module.num_key_value_groups, module.is_causal = window, 2, True
    return module


def heads(length: int = 15, width: int = 8, **options: Any) -> list[Tensor]:
    """Query [2, 4, S, D], key and value [2, 2, S, D], whose scores are large enough for caps to matter."""
    generator = torch.Generator().manual_seed(length)
    options = {"dtype": torch.float64, **options}
    shapes = [(2, number, length, width) for number in (4, 2, 2)]
    return [(2 * torch.randn(shape, generator=generator)).to(**options).requires_grad_() for shape in shapes]


def reference(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[list[int]] | None, window: int | None, cap: float | None
) -> Tensor:
    """[B, S, N, D], row by row, head by head and document by document."""
    rows = []
    for row, documents in enumerate(lengths or [[query.shape[2]]] * 2):
        by_head = []
        for head in range(4):
            outputs, begin = [], 0
            for length in documents:
                q, k, v = query[row, head], key[row, head // 2], value[row, head // 2]
                q, k, v = (each[begin : begin + length] for each in (q, k, v))
                scores = q @ k.T * SCALE
                scores = scores if cap is None else cap * torch.tanh(scores / cap)
                hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).tril().logical_not()
                if window is not None:
                    hidden |= torch.ones_like(hidden).tril(-window)
                outputs.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v)
                begin += length
            by_head.append(torch.cat(outputs))
        rows.append(torch.stack(by_head, dim=1))
    return torch.stack(rows)


def results(output: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Output and gradients."""
    gradient = torch.cos(torch.arange(output.numel(), device=output.device).view(output.shape)).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, tensors, gradient)]


def attend(
    backend: str | AttentionBackend, tensors: list[Tensor], lengths: Any, window: int | None, cap: float | None,
    windows: tuple[int | None, ...] | None = None, dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """What a layer of a model gets."""
    inputs = attention_inputs(
        backend, shape=(2, tensors[0].shape[2]), device=tensors[0].device, document_lengths=lengths,
        windows=(window,) if windows is None else windows,
    )  # fmt: skip
    return attention(layer(window), *tensors, dropout=dropout, scaling=SCALE, softcap=cap, **inputs)[0]


# ------------------------------------------------------------------------------------------------ values and gradients

ANY_ROWS = pytest.mark.parametrize("lengths", [PLAIN, PACKED], ids=["plain", "packed"])
ANY_WINDOW = pytest.mark.parametrize("window", [None, 1, 3, 99])


@ANY_ROWS
@ANY_WINDOW
@pytest.mark.parametrize("cap", [None, 1.5, 50.0])
def test_eager_is_the_formula(lengths, window, cap):
    tensors = heads()
    found = results(attend("eager", tensors, lengths, window, cap), tensors)
    torch.testing.assert_close(
        found, results(reference(*tensors, lengths, window, cap), tensors), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_eager_is_as_precise_as_its_dtype(dtype):
    tensors = heads(dtype=dtype)
    truth = [each.detach().double().requires_grad_() for each in tensors]
    found = results(attend("eager", tensors, PACKED, 4, 2.0), tensors)
    for ours, right in zip(found, results(reference(*truth, PACKED, 4, 2.0), truth), strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - right).norm() < 4 * torch.finfo(dtype).eps * right.norm()


def test_large_scores_do_not_overflow_in_float16():
    query, key, value = (each.detach() for each in heads(dtype=torch.float16, width=256))
    query, key = 30 * query, 30 * key
    assert not (query @ key.repeat_interleave(2, 1).transpose(2, 3)).isfinite().all()
    output, _ = plain_products(query, key, value, None, scale=1 / 256, softcap=50.0)
    assert output.isfinite().all()


def test_a_cap_changes_what_comes_out():
    tensors = heads()
    free, capped = (attend("eager", tensors, PLAIN, None, cap) for cap in (None, 1.5))
    assert (free - capped).abs().max() > 1e-2


@ANY_ROWS
@pytest.mark.parametrize("backend", ["sdpa", "sdpa_repeated_kv", "eager"])
def test_a_layer_picks_its_window_of_those_prepared(backend, lengths):
    tensors = heads(dtype=torch.float32)
    for window in (None, 3, 6):
        found = results(attend(backend, tensors, lengths, window, None, windows=(6, None, 3)), tensors)
        expected = results(reference(*tensors, lengths, window, None), tensors)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@NO_FLEX_WARNING
@ANY_ROWS
@pytest.mark.parametrize("cap", [None, 1.5])
@torch.no_grad()
def test_flex_computes_what_eager_does(lengths, cap):
    """Without gradients, which torch does not have on the CPU."""
    tensors = [each.detach() for each in heads(dtype=torch.float32, width=16)]
    for window in (None, 1, 3, 6):
        outputs = [attend(name, tensors, lengths, window, cap, windows=(6, None, 3, 1)) for name in ("flex", "eager")]
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


def test_a_window_that_was_not_prepared_is_refused():
    with pytest.raises(ValueError, match=r"attention_window is 3, but the batch was prepared for \(None, 6\)"):
        attend("sdpa", heads(), PLAIN, 3, None, windows=(None, 6, None))


def test_plain_rows_call_what_transformers_does_bit_for_bit():
    """Also full layers of a model that has windows in others."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    tensors = heads(dtype=torch.float32)
    expected = sdpa_attention_forward(layer(), *tensors, None, scaling=SCALE)[0]
    for windows in ((None,), (None, 4)):
        found = attend("sdpa", tensors, PLAIN, None, None, windows=windows)
        assert torch.equal(found, expected)
        torch.testing.assert_close(results(found, tensors), results(expected, tensors), rtol=0, atol=0)
        expected = sdpa_attention_forward(layer(), *tensors, None, scaling=SCALE)[0]


# --------------------------------------------------------------------------------------- what is said is what happens


def happens(backend: AttentionBackend, device: str, dtype: torch.dtype, request: AttentionRequest) -> bool:
    """Whether forward and backward are those of the formula, in ``dtype``; an error says no."""
    lengths, cap = PACKED if request.packed else PLAIN, 1.5 if request.softcap else None
    for window in request.windows:
        tensors = heads(dtype=dtype, device=device, width=16)
        truth = [each.detach().double().requires_grad_() for each in tensors]
        try:
            found = results(
                attend(backend, tensors, lengths, window, cap, request.windows, dropout=request.dropout), tensors
            )
        except (ValueError, RuntimeError, NotImplementedError, AssertionError, ImportError):
            return False
        expected = results(reference(*truth, lengths, window, cap), truth)
        errors = [(a.double() - b).norm() / b.norm() for a, b in zip(found, expected, strict=True)]
        small = all(error < 16 * torch.finfo(dtype).eps for error in errors)
        assert small != bool(request.dropout), errors
    return True


def requests(capability: tuple[int, int] | None, dtype: torch.dtype) -> Iterator[AttentionRequest]:
    choices = itertools.product((False, True), ((None,), (4,), (None, 4)), (False, True), (0.0, 0.5))
    for packed, windows, softcap, dropout in choices:
        yield AttentionRequest(packed, windows, softcap, capability, dtype, dropout)


@NO_FLEX_WARNING
@pytest.mark.parametrize("name", BACKENDS)
def test_what_a_backend_supports_on_the_cpu_is_what_it_does(name):
    for request in requests(None, torch.float32):
        reason = BACKENDS[name].supports(request)
        backend = BACKENDS[name] if reason else choose_attention(name, request)[0]
        assert happens(backend, "cpu", torch.float32, request) == (reason is None), (request, reason)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_what_a_backend_supports_on_a_gpu_is_what_it_does(name, dtype):
    backend, capability = BACKENDS[name], capabilities().compute_capability
    for request in requests(capability, dtype):
        if missing := backend.missing(request):
            pytest.skip(missing)
        if backend.gives_way(request):  # it would run
            continue
        reason = backend.supports(request)
        form = backend if reason else choose_attention(name, request)[0]
        assert happens(form, "cuda", dtype, request) == (reason is None), (request, reason)


@pytest.mark.parametrize("name", ["sdpa", "flash", "xformers"])
def test_a_cap_is_never_left_out(name):
    with pytest.raises(ValueError, match=f"attention='{name}' cannot cap scores, but a layer asks for softcap=1.5"):
        attend(name, heads(), PLAIN, None, 1.5)


def test_dropout_of_eager():
    tensors = [torch.ones_like(each).requires_grad_() for each in heads(length=200, dtype=torch.float32)]
    output = attend("eager", tensors, PLAIN, None, None, dropout=0.25)
    assert output[:, 100:].mean().item() == pytest.approx(1, abs=0.05)
    assert output[:, 0].unique().tolist() == pytest.approx([0, 4 / 3])


# ----------------------------------------------------------------------------------------------------------- the choice

A100, H100, T4 = (8, 0), (9, 0), (7, 5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("capability", "dtype", "name"),
    [
        (H100, torch.bfloat16, "flex"), (A100, torch.float32, "flex"), (T4, torch.float16, "eager"),
        (None, torch.float32, "eager"),
    ],
)  # fmt: skip
def test_auto_for_soft_caps(packed, capability, dtype, name):
    request = AttentionRequest(packed, (None, 4096), True, capability, dtype)
    backend, reason = choose_attention("auto", request)
    assert backend is BACKENDS[name]
    if name == "eager":
        assert reason.startswith("flex needs ")
        assert reason.endswith("It computes plain products and holds S x S scores per head.")
        assert choose_attention("eager", request) == (backend, "As asked for. " + reason.partition(". ")[2])
    else:
        assert reason.startswith("It is the fastest for soft caps and ")


def test_flex_gives_way_to_eager_for_soft_caps_on_an_old_gpu():
    backend, reason = choose_attention("flex", AttentionRequest(softcap=True, compute_capability=T4))
    assert backend is BACKENDS["eager"]
    assert reason.startswith("In place of flex, which needs tensor cores in Triton")


def test_names_are_those_of_the_table():
    assert get_args(AttentionName) == ("auto", *BACKENDS)
    assert all(find_backend(name) is backend for name, backend in BACKENDS.items())
    assert find_backend("sdpa_repeated_kv").name == "sdpa_repeated_kv"


def test_the_matrix_says_what_supports_does():
    columns, rows = attention_matrix()
    table = {row[0]: dict(zip(columns, row, strict=True)) for row in rows}
    assert [*table] == [f"`{name}`" for name in BACKENDS]
    assert table["`flash`"]["CPU"] == "no (needs compute capability 8.0 and 16 bit)"
    assert table["`flex`"]["T4 (float16)"] == "`sdpa` instead, announced"
    assert {*table["`eager`"].values()} == {"`eager`", BACKENDS["eager"].description, "yes"}


@pytest.mark.parametrize("windows", [(), (0,), (None, -1)])
def test_windows_that_are_none_are_refused(windows):
    with pytest.raises(ValueError, match=r"windows must not be empty|sliding_window must be at least 1"):
        AttentionRequest(windows=windows)


# --- a backend of one's own, without touching the library


class Toy(AttentionBackend):
    """One query at a time, on the CPU."""

    name = "toy"
    description = "a loop over queries"
    calls = 0

    def supports(self, request: AttentionRequest) -> str | None:
        if request.compute_capability is not None:
            return f"runs on the CPU only, but this is {request.device}"
        return super().supports(request)

    def prepare(self, *, shape: Any, device: Any, document_lengths: Any, windows: Any) -> tuple[Tensor]:
        """The position of each token in its document."""
        lengths = document_lengths or [[shape[1]]] * shape[0]
        return (torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths]),)

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, prepared: Any, *, window: int | None,
        scale: float, softcap: float | None, dropout: float, **options: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        self.calls += 1
        (positions,) = prepared
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        rows = []
        for row in range(len(query)):
            tokens = []
            for token, position in enumerate(positions[row].tolist()):
                seen = slice(token - min(position, (window or len(positions[row])) - 1), token + 1)
                scores = torch.einsum("nd,nkd->nk", query[row, :, token], key[row, :, seen]) * scale
                tokens.append(torch.einsum("nk,nkd->nd", scores.softmax(-1), value[row, :, seen]))
            rows.append(torch.stack(tokens))
        return torch.stack(rows), None


@pytest.mark.parametrize("window", [None, 3])
def test_a_backend_of_ones_own_trains_a_model(tiny_llama_dir, window):
    toy = Toy()
    request = AttentionRequest(packed=True, windows=(window,))
    assert choose_attention(toy, request) == (toy, "As asked for.")
    checkpoint = SafetensorsCheckpoint(tiny_llama_dir)
    ids = torch.randint(3, 300, (2, 15), generator=torch.Generator().manual_seed(0))
    found = []
    for backend in (toy, "sdpa"):
        model = build_model(checkpoint, default_lora(4), attention=backend, sliding_window=window)
        materialize(model, checkpoint, torch.device("cpu"), seed=0)
        loss = model.train()(ids, labels=ids, document_lengths=PACKED).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
    assert toy.calls == 2
    module = QLoRACausalLM(tiny_llama_dir, compute=ComputeOptions(attention=toy), packing=True)
    assert module._attention(ids.device, torch.float32) is toy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"compute_capability": T4},
            "attention='toy' runs on the CPU only, but this is a GPU of compute capability 7.5",
        ),
        ({"softcap": True}, "attention='toy' cannot cap scores, .* Use attention='eager', or 'auto'"),
        ({"dropout": 0.1}, "attention='toy' has no attention dropout, .* or set attention_dropout to 0 in the model's"),
    ],
)
def test_a_backend_of_ones_own_is_refused_like_any_other(options, message):
    with pytest.raises(ValueError, match=message):
        choose_attention(Toy(), AttentionRequest(**options))


# ------------------------------------------------------------------------------------------- families, by transformers

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "attention_dropout": 0.0,
}  # fmt: skip
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]

FAMILIES: dict[str, PretrainedConfig] = {
    # Scores large enough for the cap to matter.
    "gemma2": Gemma2Config(
        **SMALL, head_dim=8, layer_types=KINDS, sliding_window=4, query_pre_attn_scalar=1, attn_logit_softcapping=0.5
    ),
    "gemma3": Gemma3TextConfig(**SMALL, head_dim=8, layer_types=KINDS, sliding_window=4),
    "qwen2": Qwen2Config(**SMALL, layer_types=KINDS, sliding_window=4, use_sliding_window=True),
    "mistral": MistralConfig(**SMALL, sliding_window=4),
    "phi3": Phi3Config(**SMALL, sliding_window=4),
    "granite": GraniteConfig(**SMALL, attention_multiplier=0.3),
}


def build(name: str, implementation: str) -> Any:
    register_attention()
    torch.manual_seed(0)
    config = type(FAMILIES[name]).from_dict(FAMILIES[name].to_dict())
    config.initializer_range = 0.5
    config._attn_implementation = implementation
    model = AutoModelForCausalLM.from_config(config).eval()
    assert model.config._attn_implementation == implementation
    windows = windows_of(name)
    for each, window in zip(model.model.layers, windows, strict=True):
        each.self_attn.attention_window = window
    return model


def windows_of(name: str) -> list[int | None]:
    config = FAMILIES[name]
    kinds = getattr(config, "layer_types", None) or [None] * 3
    window = getattr(config, "sliding_window", None)
    return [None if kind == "full_attention" else window for kind in kinds]


def batch_of(length: int) -> Tensor:
    return torch.randint(3, 64, (2, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_calls_that_training_does_not_make_are_those_of_transformers(name):
    """Padding on either side, positions of packed rows, and a cache: the masks and caps are the stock model's."""
    ours, stock = build(name, IMPLEMENTATION), build(name, "eager")
    ids = batch_of(12)
    for pad in (slice(0, 5), slice(9, 12)):
        mask = torch.ones_like(ids)
        mask[0, pad] = 0
        found, expected = (model(ids, attention_mask=mask).logits[mask == 1] for model in (ours, stock))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    positions = torch.tensor([[*range(5), *range(7)], [*range(9), *range(3)]])
    found, expected = (model(ids, position_ids=positions, use_cache=False).logits for model in (ours, stock))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    tokens = stock.generate(ids, **options)
    assert torch.equal(ours.generate(ids, **options), tokens)
    assert torch.equal(ours.generate(ids, **options, use_cache=False), tokens)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_documents_in_a_pack_are_those_alone(name, backend):
    """Against the stock model, with windows by layer and soft caps."""
    ours, stock = build(name, IMPLEMENTATION), build(name, "eager")
    ids, lengths = batch_of(15), PACKED
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    inputs = attention_inputs(
        backend, shape=(2, 15), device=ids.device, document_lengths=lengths, windows=tuple(windows_of(name))
    )
    if name == "gemma2" and backend == "sdpa":
        with pytest.raises(ValueError, match=r"attention='sdpa' cannot cap scores, but a layer asks for softcap=0\.5"):
            ours(ids, position_ids=positions, use_cache=False, **inputs)
        return
    logits = ours(ids, position_ids=positions, use_cache=False, **inputs).logits.flatten(0, 1)
    alone = [stock(part[None]).logits[0] for row, n in zip(ids, lengths, strict=True) for part in row.split(n)]
    torch.testing.assert_close(logits, torch.cat(alone), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_cap_and_the_windows_of_these_models_matter():
    """Else the tests above would show nothing."""
    ids = batch_of(12)
    stock = build("gemma2", "eager")
    expected = stock(ids).logits
    for each in stock.model.layers:
        each.self_attn.attn_logit_softcapping = None
    assert (stock(ids).logits - expected).abs().max() > 1e-2
    ours = build("gemma3", IMPLEMENTATION)
    results = []
    for windows in ([None] * 3, windows_of("gemma3")):
        for each, window in zip(ours.model.layers, windows, strict=True):
            each.self_attn.attention_window = window
        inputs = attention_inputs("sdpa", shape=(2, 12), device=ids.device, windows=(None, 4))
        results.append(ours(ids, use_cache=False, **inputs).logits)
    assert (results[0] - results[1]).abs().max() > 1e-2


@pytest.mark.parametrize("given", [2, 9])
@torch.no_grad()
def test_a_users_window_and_the_models_own_both_hold_in_masks(given):
    ours = build("mistral", IMPLEMENTATION)
    ours.config.attention_window = given
    ids, mask = batch_of(12), torch.ones(2, 12, dtype=torch.long)
    stock = build("mistral", "eager")
    stock.config.sliding_window = min(given, 4)
    torch.testing.assert_close(ours(ids, attention_mask=mask).logits, stock(ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_weights_are_there_when_asked_for():
    ours, stock, ids = build("gemma2", IMPLEMENTATION), build("gemma2", "eager"), batch_of(12)
    options = {"output_attentions": True, "use_cache": False}
    expected = stock(ids, **options).attentions
    torch.testing.assert_close(ours(ids, **options).attentions, expected, rtol=1e-4, atol=1e-5)
    inputs = attention_inputs("eager", shape=(2, 12), device=ids.device, windows=(4, None))
    torch.testing.assert_close(ours(ids, **options, **inputs).attentions, expected, rtol=1e-4, atol=1e-5)
    plain, stock = build("qwen2", IMPLEMENTATION), build("qwen2", "eager")
    torch.testing.assert_close(plain(ids, **options).attentions, stock(ids, **options).attentions, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["position_bias", "cache"])
def test_what_plain_products_with_a_mask_cannot_do_is_refused(name):
    with pytest.raises(ValueError, match=f"does not support {name} with a soft cap"):
        attention(layer(), *heads(), None, softcap=1.5, **{name: object()})


# --------------------------------------------------------------------------------------------------------------- graphs


SHAPES = [[[5, 1, 129], [65, 70]], [[64, 64, 64], [192], [100, 92]], [[7] * 20, [140]], [[64, 66], [129, 1]]]


def train_shapes(
    tiny_llama_dir: Any, backend: str, windows: list[int | None], compile_backend: str, **options: Any
) -> int:
    """Compares a compiled model with an uncompiled one over packed and plain rows, and returns the number of graphs."""
    device, graphs, dtype = options.pop("device", "cpu"), Graphs(compile_backend), options.get("dtype", torch.float32)
    checkpoint = SafetensorsCheckpoint(tiny_llama_dir)
    models = []
    for _ in range(2):
        model = build_model(checkpoint, default_lora(4), attention=backend, checkpoint_activations=True, **options)
        materialize(model, checkpoint, torch.device(device), seed=0)
        for each, window in zip(model.model.layers, windows, strict=True):
            each.self_attn.attention_window = window
        models.append(model.train())
    models[0].compile_regions(backend=graphs)
    for lengths, packs in itertools.product(SHAPES, (True, False)):
        shape = (len(lengths), sum(lengths[0]))
        ids = torch.randint(3, 300, shape, generator=torch.Generator().manual_seed(sum(shape))).to(device)
        inputs = attention_inputs(
            backend, shape=shape, device=ids.device, document_lengths=lengths if packs else None, windows=tuple(windows)
        )
        found = []
        for model in models:
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                hidden = model.model(ids, use_cache=False, **inputs).last_hidden_state
            hidden.float().square().mean().backward()
            found.append([hidden.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
            model.zero_grad()
        if dtype == torch.float32:
            torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
    return graphs.count


@pytest.mark.usefixtures("fresh_graphs")
@pytest.mark.parametrize(
    ("backend", "windows", "compile_backend"),
    [("sdpa", [None, 30], "aot_eager"), ("eager", [None, 30], "eager"), ("eager", [30, 30], "aot_eager")],
)
def test_a_graph_per_window_and_none_more(tiny_llama_dir, backend, windows, compile_backend):
    """Rotary embedding, norm, and for the layers one per window; as many again for plain rows, whose inputs differ."""
    kinds = len(set(windows))
    # SDPA takes whole rows for documents where there is a window; the mask of plain rows has no batch dimension.
    plain = kinds if backend == "eager" else sum(window is None for window in set(windows))
    assert train_shapes(tiny_llama_dir, backend, windows, compile_backend) == 2 + kinds + plain


# ------------------------------------------------------------------------------------------------------------ on a GPU


@needs_gpu
@pytest.mark.gpu
@pytest.mark.usefixtures("fresh_graphs")
@pytest.mark.parametrize(
    ("width", "dtype", "compiled"),
    [
        (64, torch.float16, False), (256, torch.float16, True), (256, torch.bfloat16, False),
        (64, torch.bfloat16, True), (64, torch.float32, False), (64, torch.float32, True),
    ],
)  # fmt: skip
def test_soft_caps_of_flex_on_a_gpu(needs_attention, dtype, compiled, width):
    """Rows of 600 tokens, which no block size divides, with two windows."""
    needs_attention("flex", dtype)
    lengths = [[300, 1, 299], [600]]
    tensors = heads(length=600, width=width, dtype=dtype, device="cuda")
    truth = [each.detach().double().requires_grad_() for each in tensors]

    def step(window: int | None, inputs: dict[str, Any]) -> Tensor:
        return attention(layer(window), *tensors, scaling=SCALE, softcap=5.0, **inputs)[0]

    for packed in (lengths, None):
        inputs = attention_inputs(
            "flex", shape=(2, 600), device=torch.device("cuda", 0), document_lengths=packed, windows=(None, 100)
        )
        for window in (None, 100):
            call = torch.compile(step, fullgraph=True, dynamic=True) if compiled else step
            found = results(call(window, inputs), tensors)
            for ours, right in zip(found, results(reference(*truth, packed, window, 5.0), truth), strict=True):
                tolerance = 4e-3 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps  # TF32 in Triton
                assert (ours.double() - right).norm() < tolerance * right.norm()


@needs_gpu
@pytest.mark.gpu
@pytest.mark.usefixtures("fresh_graphs")
@pytest.mark.parametrize("backend", ["sdpa", "flash", "flex", "eager"])
def test_a_graph_per_window_on_a_gpu(tiny_llama_dir, needs_attention, backend):
    needs_attention(backend, torch.float16)
    options = {"device": "cuda", "dtype": torch.float16}
    assert train_shapes(tiny_llama_dir, backend, [None, 30], "inductor", **options) <= 2 + 2 * 2
