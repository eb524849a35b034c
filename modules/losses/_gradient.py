"""A user's loss on one chunk of logits: its value and its gradient, by autograd, and what it returns.

Compiled, value and gradient are one kernel that reads the logits and writes the gradient in their place.

Shapes: C tokens in a chunk, V vocabulary.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Loss = Callable[..., Tensor | tuple[Tensor, ...]]


class Settings(NamedTuple):
    """All of a call but its loss and its tensors."""

    vocab_size: int
    dtype: torch.dtype  # of the matrix products, and so of the logits
    result_dtype: torch.dtype
    weight_grad_dtype: torch.dtype
    device: str
    per_token: tuple[tuple[torch.dtype, tuple[int, ...]], ...]  # dtype and shape behind the tokens of each tensor
    chunk_tokens: int
    gradient_scale: float
    reduce: bool  # whether results are summed over the tokens
    compile: bool
    check_finite: bool
    invalid_reason: str


class Returns(NamedTuple):
    """What a loss returns; one entry a result."""

    per_token: tuple[bool, ...]  # one value a token, or their sum
    differentiable: tuple[bool, ...]
    is_tuple: bool


@dataclass(frozen=True)
class Plan:
    """All that is decided before the first chunk."""

    loss: Loss
    settings: Settings
    returns: Returns
    program: Any  # what identifies that of the loss


# ------------------------------------------------------------------------------------------------- value and gradient


def loss_values(plan: Plan, logits: Tensor, per_token: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Results of the loss for ``logits`` [C, V]."""
    return _call(plan, _results, _results, logits, per_token)


def loss_values_and_gradient(
    plan: Plan, logits: Tensor, per_token: Sequence[Tensor], cotangents: Sequence[Tensor | float]
) -> tuple[Tensor, ...]:
    """Results of the loss; ``logits`` [C, V] is overwritten with the gradient of the sum of cotangents times results.

    Args:
        plan: With the loss.
        logits: In the dtype of the matrix products.
        per_token: What the loss gets besides, each [C, *].
        cotangents: For each differentiable result a scalar, or for a result [C] also a tensor [C].
    """
    return _call(plan, _differentiate, _differentiate_fusable, logits, per_token, plan.returns, cotangents)


def _results(loss: Loss, logits: Tensor, per_token: Sequence[Tensor]) -> tuple[Tensor, ...]:
    results = loss(logits, *per_token)
    return results if isinstance(results, tuple) else (results,)


def _as_probed(results: Sequence[Tensor], returns: Returns) -> bool:
    """Whether the loss returns as many results, per token or not, as when it was probed. If not, _call refuses it."""
    return [result.ndim == 1 for result in results] == list(returns.per_token)


def _weighted_sum(
    results: Sequence[Tensor], differentiable: Sequence[bool], cotangents: Sequence[Tensor | float]
) -> Tensor:
    wanted = [result for result, is_wanted in zip(results, differentiable, strict=True) if is_wanted]
    terms = [(result * weight).sum() for result, weight in zip(wanted, cotangents, strict=True)]
    return functools.reduce(torch.add, terms)


def _differentiate(
    loss: Loss,
    logits: Tensor,
    per_token: Sequence[Tensor],
    returns: Returns,
    cotangents: Sequence[Tensor | float],
) -> tuple[Tensor, ...]:
    x = logits.detach().requires_grad_()
    with torch.enable_grad():
        results = _results(loss, x, per_token)
        if not _as_probed(results, returns):
            return results
        total = _weighted_sum(results, returns.differentiable, cotangents)
    (gradient,) = torch.autograd.grad(total, x)
    logits.copy_(gradient)
    return tuple(result.detach() for result in results)


# -------------------------------------------------------------------------------------------------------- compilation


def _call(
    plan: Plan, plain: Any, fusable: Any, logits: Tensor, per_token: Sequence[Tensor], *more: Any
) -> tuple[Tensor, ...]:
    """``plain(loss, logits, per_token, *more)``, or if the plan says so ``fusable``, which is equal, compiled.

    Not under a dispatch mode, which wants to see operations; nor for a single row, for which Dynamo would specialize.

    Raises:
        ValueError: If the loss no longer returns what it returned when it was probed.
    """
    results: tuple[Tensor, ...]
    if not plan.settings.compile or logits.shape[0] < 2 or torch._C._len_torch_dispatch_stack() > 0:
        results = plain(plan.loss, logits, per_token, *more)
    else:
        for tensor in (logits, *per_token, *(t for group in more for t in group if isinstance(t, Tensor) and t.ndim)):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        key = (plan.program, logits.shape[1], logits.dtype)
        results = _compiled(fusable, key)(plan.loss, logits, tuple(per_token), *more)
    found = [tuple(result.shape) for result in results]
    expected = [tuple(logits.shape[:1]) if kept else () for kept in plan.returns.per_token]
    if found != expected:
        raise ValueError(
            f"loss {_name(plan.loss)} returned results of shape {found} for {logits.shape[0]} tokens, but {expected} "
            "is what it returned of two tokens before, when it was probed. It behaves as a global or the like says, "
            "which has changed since. Pass such a setting as a keyword argument of functools.partial."
        )
    return results


class _FusableGather(TorchFunctionMode):
    """Has Dynamo trace ``x.gather(-1, index)`` of one index a row as a masked sum.

    The derivative of gather is a scatter into zeros of the size of the logits, which Inductor cannot fuse; that of a
    masked sum is a comparison inside the kernel that writes the gradient anyway.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.gather, Tensor.gather) and not kwargs and len(args) == 3:
            x, dim, index = args
            if dim in (-1, x.ndim - 1) and index.shape[-1] == 1 and index.shape[:-1] == x.shape[:-1]:
                # int32 is enough, and half the registers of the labels' int64.
                columns = torch.arange(x.shape[-1], dtype=torch.int32, device=x.device)
                return torch.where(columns == index.to(torch.int32), x, 0).sum(-1, keepdim=True)
        return func(*args, **(kwargs or {}))


def _differentiate_fusable(
    loss: Loss,
    logits: Tensor,
    per_token: Sequence[Tensor],
    returns: Returns,
    cotangents: Sequence[Tensor | float],
) -> tuple[Tensor, ...]:
    """:func:`_differentiate` in a form that Dynamo traces into one graph."""

    def weighted(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        results = _results(loss, x, per_token)
        fits = _as_probed(results, returns)
        total = _weighted_sum(results, returns.differentiable, cotangents) if fits else x.sum()
        return total, tuple(result.detach() for result in results)

    results: tuple[Tensor, ...]
    with _FusableGather():
        gradient, (_, results) = torch.func.grad_and_value(weighted, has_aux=True)(logits)
    logits.copy_(gradient)
    return results


# Rows are few and long. Splitting a row's sum over blocks would cost the fusion with what reads the row again. The
# kernel is bound by its instructions, exp above all: the fast one (ex2.approx) errs by 2 ulp of float32, far below the
# rounding of 16-bit logits, and takes an eighth off the kernel's time.
_COMPILE_OPTIONS: dict[str, Any] = {"split_reductions": False, "use_fast_math": True}


@functools.cache
def _compiled(function: types.FunctionType, key: Any) -> Callable[..., Any]:
    """``function`` compiled for the losses of one ``key``.

    A code object of its own gives each loss its own cache, so that many losses do not share one recompile limit.
    """
    copy = types.FunctionType(
        function.__code__.replace(co_name=f"{function.__name__}_{_compiled.cache_info().misses}"),
        function.__globals__, closure=function.__closure__,
    )  # fmt: skip
    return torch.compile(copy, fullgraph=True, options=_COMPILE_OPTIONS)


_SETTINGS = (type(None), bool, int, str, torch.dtype)

_NO_SETTINGS = (Tensor, float, list, set)


def _program(value: Any, *, settings: bool = False, objects: int = 2, path: tuple[int, ...] = ()) -> Any:
    """What identifies a loss's program: its code, and that of the functions which it encloses.

    Args:
        value: A loss, or something that it encloses.
        settings: Also by which settings it runs: each None, bool, int, string and dtype among the arguments of a
            partial, defaults, closures, the state of objects, and in tuples and dicts of these. Never floats and
            tensors, which schedules change, nor lists, to which losses log.
        objects: How many objects within one another are looked into: a module and its own modules, but of one that a
            function encloses only its own state, for that may be a whole model.
        path: Of the values that enclose this one, by id.
    """
    if isinstance(value, _SETTINGS):
        return (type(value), value) if settings else type(value)
    if isinstance(value, _NO_SETTINGS) or id(value) in path:
        return type(value)

    def parts(values: Iterable[Any], objects: int) -> tuple[Any, ...]:
        inner = (*path, id(value))
        return tuple([_program(part, settings=settings, objects=objects, path=inner) for part in values])

    within_functions = min(objects, 1)
    if isinstance(value, functools.partial):
        return (tuple(value.keywords), parts((value.func, *value.args, *value.keywords.values()), within_functions))
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return (value.__code__, parts((value.__defaults__, value.__kwdefaults__, *cells), within_functions))
    if isinstance(value, types.MethodType):
        return parts((value.__func__, value.__self__), within_functions)
    if isinstance(value, types.BuiltinFunctionType):
        return (value.__name__, type(value.__self__))
    if not settings or isinstance(value, types.ModuleType):
        return type(value)
    if isinstance(value, type):
        return value
    if isinstance(value, tuple):
        return (type(value), parts(value, objects))
    if isinstance(value, dict):
        return (type(value), tuple(value), parts(value.values(), objects))
    state = getattr(value, "__dict__", None) if objects else None
    return (type(value), parts((state,), objects - 1) if state else None)


# ----------------------------------------------------------------------------------------------- what a loss returns


@torch.no_grad()
def _probe(loss: Loss, settings: Settings) -> Returns:
    """Call ``loss`` on two made-up tokens, together and apart: which results are per token and which differentiable.

    Raises:
        ValueError: For results of a wrong type or shape, or that differ between the two calls.
    """
    vocab_size, device = settings.vocab_size, settings.device
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(2, vocab_size, dtype=torch.float32, device=device, generator=generator)
    logits = logits.to(settings.dtype)
    values = [
        torch.rand((2, *shape), device=device, generator=generator).to(kind)
        if kind.is_floating_point
        else torch.ones((2, *shape), dtype=kind, device=device) * (kind == torch.bool)
        for kind, shape in settings.per_token
    ]
    name = _name(loss)
    with torch.enable_grad():
        raw = loss(logits.requires_grad_(), *values)
    results = raw if isinstance(raw, tuple) else (raw,)
    logits = logits.detach()
    apart = [_results(loss, logits[i : i + 1], [value[i : i + 1] for value in values]) for i in (0, 1)]
    if not results:
        raise ValueError(f"loss {name} returned an empty tuple. It must return at least one tensor, the loss.")
    for i, result in enumerate(results):
        if not isinstance(result, Tensor) or result.shape not in ((2,), ()):
            what = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(
                f"loss {name} returned {what} as result {i} for logits [2, {vocab_size}]. It must return tensors, each "
                "with one value a token [C], or their sum [] over the chunk's tokens."
            )
        first, second = (part[i].detach().double() for part in apart)
        expected = torch.cat([first, second]) if result.ndim else first + second
        if not torch.allclose(result.detach().double(), expected, rtol=0.02, atol=1e-3, equal_nan=True):
            raise ValueError(
                f"loss {name}: result {i} of two tokens together is {result.tolist()}, but {first.tolist()} and "
                f"{second.tolist()} of each alone. Chunks are independent: a token's value must not depend on other "
                "tokens, and a 0-dim result must be the sum over tokens, not their mean (choose that by reduction=)."
            )
    return Returns(
        tuple(result.ndim == 1 for result in results),
        tuple(result.requires_grad and result.is_floating_point() for result in results),
        isinstance(raw, tuple),
    )


def _name(loss: Any) -> str:
    return getattr(loss, "__name__", None) or getattr(getattr(loss, "func", None), "__name__", None) or repr(loss)


# Keyed by the program, not by the object: a lambda that is made anew in each step is probed once.
_PROBED: dict[Any, Returns] = {}

_MOST_PROBED = 1024


def make_plan(loss: Loss, settings: Settings) -> Plan:
    """The plan of a loss, which is called for that on two made-up tokens, once for its program (:func:`_program`) with
    its settings and its inputs' types.

    Raises:
        ValueError: If the loss returns what it must not, or a sum where values per token are asked for.
    """
    key = (_program(loss, settings=True), settings.vocab_size, settings.dtype, settings.device, settings.per_token)
    if key not in _PROBED:
        with torch.autocast(settings.device.partition(":")[0], enabled=False):
            _PROBED[key] = _probe(loss, settings)
        if len(_PROBED) > _MOST_PROBED:  # of a setting that never stays the same
            del _PROBED[next(iter(_PROBED))]
    returns = _PROBED[key]
    if not settings.reduce and not all(returns.per_token):
        raise ValueError("reduction='none' needs a loss that returns one value a token [C]; this one returns a sum.")
    return Plan(loss, settings, returns, _program(loss))
