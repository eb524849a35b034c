"""The table of attention backends, and which of them a model trains with."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

import torch

from .backend import AttentionBackend, AttentionRequest, check_window
from .eager import EagerAttention
from .flex import FlexAttention
from .sdpa import SDPA, SDPA_REPEATED_KV
from .varlen import FlashAttention, XformersAttention

#: All backends by name. Flags, help texts, messages, the table of recipes/README.md and the benchmarks follow from it.
BACKENDS: dict[str, AttentionBackend] = {
    backend.name: backend
    for backend in (SDPA, FlexAttention(), FlashAttention(), XformersAttention(), EagerAttention())
}

#: What ``"auto"`` tries in turn: for plain rows, for packed rows or windows, and, whatever the rows, for soft caps.
_AUTO = {"plain": ("sdpa",), "masked": ("flash", "sdpa"), "softcap": ("flex", "eager")}

if TYPE_CHECKING:
    AttentionName = str
else:
    #: Values of ``--attention``.
    AttentionName = Literal[("auto", *BACKENDS)]


def find_backend(attention: str | AttentionBackend) -> AttentionBackend:
    """The backend of that name (also ``"sdpa_repeated_kv"``, a form of ``"sdpa"``), or ``attention`` if it is one.

    Raises:
        ValueError: For an unknown name.
    """
    if isinstance(attention, AttentionBackend):
        return attention
    known = {**BACKENDS, SDPA_REPEATED_KV.name: SDPA_REPEATED_KV}
    if attention not in known:
        raise ValueError(f"attention must be one of {', '.join(map(repr, ['auto', *BACKENDS]))}, got {attention!r}.")
    return known[attention]


def check_attention(attention: str | AttentionBackend, sliding_window: int | None) -> None:
    """Check what needs no device.

    Raises:
        ValueError: For an unknown name or a window below 1.
    """
    if attention != "auto":
        find_backend(attention)
    check_window(sliding_window)


def choose_attention(attention: str | AttentionBackend, request: AttentionRequest) -> tuple[AttentionBackend, str]:
    """What computes attention, and why.

    Args:
        attention: ``"auto"``, a name of :data:`BACKENDS`, or a backend.
        request: What it must support.

    Returns:
        The backend and a sentence for the reader.

    Raises:
        ValueError: For what that attention cannot do here; the mask, the cap and the dropout are always as asked for.
    """
    if attention == "auto":
        return _auto(request)
    backend = find_backend(attention)
    reason = _obstacle(backend, request)
    if reason is None:
        form, note = backend.form(request)
        if backend.holds_scores:
            note = _HOLDS_SCORES
        return form, f"As asked for. {note}".rstrip()
    if backend.gives_way(request):
        chosen, why = _auto(request)
        return chosen, f"In place of {backend.name}, which {reason}. {why}"
    raise ValueError(f"attention={backend.name!r} {reason}. {_remedy(request)}")


_HOLDS_SCORES = "It computes plain products and holds S x S scores per head."


def _obstacle(backend: AttentionBackend, request: AttentionRequest) -> str | None:
    return backend.supports(request) or backend.missing(request)


def _candidates(request: AttentionRequest) -> list[AttentionBackend]:
    names = _AUTO["softcap" if request.softcap else "masked" if request.masked else "plain"]
    return [BACKENDS[name] for name in names]


def _auto(request: AttentionRequest) -> tuple[AttentionBackend, str]:
    refusals: list[str] = []
    for backend in _candidates(request):
        reason = _obstacle(backend, request)
        if reason is None:
            form, note = backend.form(request)
            return form, " ".join([*refusals, _why(backend, request), note]).rstrip()
        refusals.append(f"{backend.name} {reason}.")
    raise ValueError(f"No attention does what is asked for: {' '.join(refusals)} {_remedy(request)}")


def _why(backend: AttentionBackend, request: AttentionRequest) -> str:
    """Why ``"auto"`` takes this candidate, the first that is supported."""
    if backend.holds_scores:
        return _HOLDS_SCORES
    if backend is not SDPA:
        asked = " and ".join([*["soft caps"] * request.softcap, *[request.masked] * bool(request.masked)])
        return f"It is the fastest for {asked} on {request.device}."
    if not request.masked:
        return "Plain rows need no mask."
    return "It computes documents of about equal length together, and windows in chunks."


def _remedy(request: AttentionRequest) -> str:
    """What to do instead of an attention that cannot do what is asked for."""
    usable = [backend for backend in _candidates(request) if _obstacle(backend, request) is None]
    dropout = "set attention_dropout to 0 in the model's config.json"
    if usable:
        return f"Use attention={usable[0].name!r}, or 'auto'{f'; or {dropout}' if request.dropout else ''}."
    others = [backend for backend in BACKENDS.values() if _obstacle(backend, request) is None]
    ways = [f"use attention={backend.name!r}, which computes with {backend.description}" for backend in others]
    text = ", or ".join([*[dropout] * bool(request.dropout), *ways])
    return f"{text[:1].upper()}{text[1:]}."


# ------------------------------------------------------------------------------------- the table of recipes/README.md


def attention_matrix() -> tuple[list[str], list[list[str]]]:
    """What each backend supports, asked of :meth:`AttentionBackend.supports`: headings, and a row per backend."""
    gpu = AttentionRequest(compute_capability=(8, 0), dtype=torch.bfloat16)
    requests = {
        "packed rows": dataclasses.replace(gpu, packed=True),
        "sliding window": dataclasses.replace(gpu, windows=(None, 4096)),
        "soft caps": dataclasses.replace(gpu, softcap=True),
        "dropout on plain rows": dataclasses.replace(gpu, dropout=0.1),
        "T4 (float16)": AttentionRequest(compute_capability=(7, 5), dtype=torch.float16),
        "float32": dataclasses.replace(gpu, dtype=torch.float32),
        "CPU": AttentionRequest(),
    }
    rows = [
        [f"`{name}`", backend.description, *(_cell(backend, request) for request in requests.values())]
        for name, backend in BACKENDS.items()
    ]
    return ["`--attention`", "computes with", *requests], rows


def _cell(backend: AttentionBackend, request: AttentionRequest) -> str:
    reason = backend.supports(request)
    if reason is None:
        return "yes"
    if backend.gives_way(request):
        return f"`{_candidates(request)[0].name}` instead, announced"
    return f"no ({reason.partition(', but ')[0]})"
