"""Timing one layer's attention by itself: causal over whole rows, and inside the documents of packed rows.

Shapes: B rows, S tokens a row, N heads of queries, K of keys and values, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils.benchmark import Timer
from transformers import AttentionInterface, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention

from ..hardware import capabilities, peak_mib
from .backend import AttentionBackend, AttentionRequest
from .choice import BACKENDS, choose_attention
from .transformers_interface import IMPLEMENTATION, attention_inputs, register_attention


def attentions_here(
    names: Iterable[str] | None, dtype: torch.dtype
) -> tuple[dict[str, AttentionBackend], dict[str, str]]:
    """Which can compute packed rows of ``dtype`` here: the backend of those that can, the reason of the others.

    Args:
        names: Of ``BACKENDS``, or ``"auto"``; ``None`` for all that hold no S x S scores.
        dtype: Of queries, keys and values.
    """
    if names is None:
        names = [name for name, backend in BACKENDS.items() if not backend.holds_scores]
    usable, refused = {}, {}
    request = AttentionRequest(packed=True, compute_capability=capabilities().compute_capability, dtype=dtype)
    for name in names:
        try:
            backend, reason = choose_attention(name, request)
        except ValueError as error:
            refused[name] = str(error)
            continue
        if name in ("auto", backend.name) or backend is BACKENDS[name].form(request)[0]:
            usable[name] = backend
        else:
            refused[name] = reason
    return usable, refused


def measure_attention(
    config: LlamaConfig,
    document_lengths: list[list[int]],
    backends: dict[str, AttentionBackend],
    dtype: torch.dtype,
    *,
    seconds: float = 0.5,
) -> list[dict[str, Any]]:
    """Time attention forward and backward on random inputs, without projections and without rotary embedding.

    Args:
        config: Its numbers of heads and head dimension count.
        document_lengths: For each of B rows the lengths of its documents, which sum to S.
        backends: What to measure on these documents: by the name in the result.
        dtype: Of queries, keys and values.
        seconds: How long to measure each.

    Returns:
        For whole rows with SDPA, and for each backend: ``attention``, its name; ``ms``, the median time, on a GPU the
        device's (training launches ahead of it); ``to causal``, that over the whole rows' time; ``mask MiB``, the most
        memory that preparing its inputs for a batch takes, once for all layers.
    """
    register_attention()
    attend = AttentionInterface()[IMPLEMENTATION]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows, length = len(document_lengths), sum(document_lengths[0])
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    # As in a layer: heads are the projections' inner dimension.
    query, key, value = (
        torch.randn(rows, length, n, config.head_dim, device=device, dtype=dtype).transpose(1, 2).requires_grad_()
        for n in heads
    )
    gradient = torch.randn(rows, length, heads[0], config.head_dim, device=device, dtype=dtype)
    with torch.device("meta"):
        module = LlamaAttention(config, layer_idx=0)  # only asked for its attributes
    found: list[dict[str, Any]] = []
    causal, _ = choose_attention(
        "sdpa", AttentionRequest(compute_capability=capabilities().compute_capability, dtype=dtype)
    )
    cases: list[tuple[str, AttentionBackend, list[list[int]] | None]] = [("causal", causal, None)]
    cases += [(name, backend, document_lengths) for name, backend in backends.items()]
    for name, backend, lengths in cases:

        def prepare(backend: AttentionBackend = backend, lengths: list[list[int]] | None = lengths) -> dict[str, Any]:
            return attention_inputs(backend, shape=(rows, length), device=device, document_lengths=lengths)

        inputs = prepare()  # compiles what there is to compile

        def step(inputs: dict[str, Any] = inputs) -> None:
            output = attend(module, query, key, value, **inputs)[0]
            torch.autograd.grad(output, (query, key, value), gradient)

        step()
        ms = _median_ms(step, device, seconds)
        ratio = ms / found[0]["ms"] if found else 1.0
        found.append({"attention": name, "ms": ms, "to causal": ratio, "mask MiB": peak_mib(prepare, device.type)})
    return found


def _median_ms(step: Callable[[], None], device: torch.device, seconds: float) -> float:
    if device.type == "cpu":
        return float(1000 * Timer("step()", globals={"step": step}).blocked_autorange(min_run_time=seconds).median)
    from triton.testing import do_bench_cudagraph

    return float(do_bench_cudagraph(step, rep=int(100 * seconds), return_mode="median"))  # measures ten times as long
