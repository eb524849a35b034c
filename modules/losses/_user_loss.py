"""The user's loss on one chunk of logits: what it returns, its values, and its gradient by autograd.

Compiled, values and gradient are one kernel that reads the logits and writes the gradient in their place.

Shapes: C tokens in a chunk, V vocabulary.
"""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Loss = Callable[..., Tensor | tuple[Tensor, ...]]


class Settings(NamedTuple):
    """Everything about a call except its loss and its tensors."""

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
    """What a loss returns; one entry per result."""

    per_token: tuple[bool, ...]  # one value per token, or their sum
    differentiable: tuple[bool, ...]
    is_tuple: bool


class Plan(NamedTuple):
    """Everything that is decided before the first chunk."""

    loss: Loss
    settings: Settings
    returns: Returns
    program: Any  # what identifies the code of the loss: _program()


# ------------------------------------------------------------------------------------------------- value and gradient


def loss_of_chunk(
    plan: Plan, logits: Tensor, per_token: Sequence[Tensor], cotangents: Sequence[Tensor | float] | None = None
) -> tuple[Tensor, ...]:
    """Results of the loss for ``logits`` [C, V] and the chunk's ``per_token`` tensors [C, *].

    With ``cotangents`` (for each differentiable result a scalar, or for a result [C] also a tensor [C]), ``logits`` are
    overwritten with the gradient of the sum of cotangents times results.

    Compiled if the plan says so, except under a dispatch mode, which wants to see every operation, and for a single
    row, to which Dynamo would specialize the graph.

    Raises:
        ValueError: If the loss no longer returns what it returned when it was probed.
    """
    function: Any = _results if cotangents is None else _differentiate
    if plan.settings.compile and logits.shape[0] > 1 and torch._C._len_torch_dispatch_stack() == 0:
        for tensor in (logits, *per_token, *(c for c in cotangents or () if isinstance(c, Tensor) and c.ndim)):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        fusable: Any = _results if cotangents is None else _differentiate_fusable
        function = _compiled(fusable, (plan.program, logits.shape[1], logits.dtype))
    more = () if cotangents is None else (plan.returns, cotangents)
    results: tuple[Tensor, ...] = function(plan.loss, logits, tuple(per_token), *more)
    found = [tuple(result.shape) for result in results]
    expected = [tuple(logits.shape[:1]) if kept else () for kept in plan.returns.per_token]
    if found != expected:
        raise ValueError(
            f"loss {name_of(plan.loss)} returned results of shape {found} for {logits.shape[0]} tokens, but {expected} "
            "is what it returned for two tokens before, when it was probed. Its behaviour depends on a global or the "
            "like, which has changed since. Pass such a setting as a keyword argument of functools.partial."
        )
    return results


def _results(loss: Loss, logits: Tensor, per_token: Sequence[Tensor]) -> tuple[Tensor, ...]:
    results = loss(logits, *per_token)
    return results if isinstance(results, tuple) else (results,)


def _weighted_sum(
    loss: Loss, logits: Tensor, per_token: Sequence[Tensor], returns: Returns, cotangents: Sequence[Tensor | float]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The sum of cotangents times differentiable results; and all results, detached."""
    results = _results(loss, logits, per_token)
    if [result.ndim == 1 for result in results] == list(returns.per_token):
        wanted = [result for result, is_wanted in zip(results, returns.differentiable, strict=True) if is_wanted]
        terms = [(result * weight).sum() for result, weight in zip(wanted, cotangents, strict=True)]
        total = functools.reduce(torch.add, terms)
    else:  # not as probed: loss_of_chunk() refuses the results
        total = logits.sum()
    return total, tuple(result.detach() for result in results)


def _differentiate(
    loss: Loss, logits: Tensor, per_token: Sequence[Tensor], returns: Returns, cotangents: Sequence[Tensor | float]
) -> tuple[Tensor, ...]:
    x = logits.detach().requires_grad_()
    with torch.enable_grad():
        total, results = _weighted_sum(loss, x, per_token, returns, cotangents)
    (gradient,) = torch.autograd.grad(total, x)
    logits.copy_(gradient)
    return results


# -------------------------------------------------------------------------------------------------------- compilation


class _FusableGather(TorchFunctionMode):
    """Has Dynamo trace ``x.gather(-1, index)`` of one index per row as a masked sum.

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
    loss: Loss, logits: Tensor, per_token: Sequence[Tensor], returns: Returns, cotangents: Sequence[Tensor | float]
) -> tuple[Tensor, ...]:
    """:func:`_differentiate` in a form that Dynamo traces into one graph."""

    def weighted(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return _weighted_sum(loss, x, per_token, returns, cotangents)

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


# ----------------------------------------------------------------------------------------------- what a loss returns

# Keyed by the program, not by the object: a lambda that is made anew in each step is probed once. The second entry says
# which tensor would need a gradient, as text, so that nothing keeps the tensor.
_PROBED: dict[Any, tuple[Returns, str | None]] = {}

_MOST_PROBED = 1024


def make_plan(loss: Loss, settings: Settings) -> Plan:
    """The plan of a loss. The loss is called on two made-up tokens, once per program with its settings
    (:func:`_program`) and types of inputs.

    Raises:
        ValueError: If the loss returns what it must not, or a sum where values per token are asked for; or, where
            gradients are enabled, if it depends on a tensor that requires one, which would get none.
    """
    key = (_program(loss, settings=True), settings.vocab_size, settings.dtype, settings.device, settings.per_token)
    if key not in _PROBED:
        with torch.autocast(settings.device.partition(":")[0], enabled=False):
            _PROBED[key] = _probe(loss, settings)
        if len(_PROBED) > _MOST_PROBED:  # a setting that never stays the same
            del _PROBED[next(iter(_PROBED))]
    returns, trained = _PROBED[key]
    if trained is not None and torch.is_grad_enabled():
        raise ValueError(
            f"loss {name_of(loss)} depends on a tensor that requires a gradient, but gets none here: {trained}. Only "
            "hidden, weight and bias get gradients. If that is meant, .detach() it; to train it, compute the loss from "
            "the full logits."
        )
    if not settings.reduce and not all(returns.per_token):
        raise ValueError("reduction='none' needs a loss that returns one value a token [C]; this one returns a sum.")
    return Plan(loss, settings, returns, _program(loss))


@torch.no_grad()
def _probe(loss: Loss, settings: Settings) -> tuple[Returns, str | None]:
    """What ``loss`` returns for two made-up tokens, together and apart; and what else than logits would get a gradient.

    Raises:
        ValueError: For results of a wrong type or shape, or that differ between the two calls.
    """
    vocab_size, device, name = settings.vocab_size, settings.device, name_of(loss)
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(2, vocab_size, dtype=torch.float32, device=device, generator=generator)
    logits = logits.to(settings.dtype)
    values = [
        torch.rand((2, *shape), device=device, generator=generator).to(kind)
        if kind.is_floating_point
        else torch.ones((2, *shape), dtype=kind, device=device) * (kind == torch.bool)
        for kind, shape in settings.per_token
    ]
    with torch.enable_grad():
        raw = loss(logits.requires_grad_(), *values)
    results = raw if isinstance(raw, tuple) else (raw,)
    if not results:
        raise ValueError(f"loss {name} returned an empty tuple. It must return at least one tensor, the loss.")
    apart = [_results(loss, logits.detach()[i : i + 1], [value[i : i + 1] for value in values]) for i in (0, 1)]
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
    returns = Returns(
        tuple(result.ndim == 1 for result in results),
        tuple(result.requires_grad and result.is_floating_point() for result in results),
        isinstance(raw, tuple),
    )
    trained = next((leaf for leaf in _leaves(results) if leaf is not logits), None)
    if trained is None:
        return returns, None
    places = [name for name, part in _enclosed(loss) if part is trained or getattr(part, "grad_fn", None) is not None]
    place = places[0] if places else "a global, a list or the like"
    place = re.sub(r"\._(?:parameters|buffers|modules)\['(\w+)'\]", r".\1", place)  # as one writes it
    return returns, f"{trained.dtype} {tuple(trained.shape)}, found at {place}"


def name_of(loss: Any) -> str:
    """What error messages call a loss."""
    if isinstance(loss, functools.partial):
        return name_of(loss.keywords.get("loss", loss.func))  # of_scaled_logits() has the user's as a keyword argument
    return getattr(loss, "__name__", None) or repr(loss)


def _leaves(results: Sequence[Tensor]) -> Iterator[Tensor]:
    """The tensors that a backward from ``results`` would give a gradient."""
    nodes: list[Any] = [result.grad_fn for result in results]
    seen = {None}
    while nodes:
        node = nodes.pop()
        if node not in seen:
            seen.add(node)
            nodes += [inner for inner, _ in node.next_functions]
            if hasattr(node, "variable"):
                yield node.variable


_SETTINGS = (type(None), bool, int, str, torch.dtype)

_NOT_FOLLOWED = (*_SETTINGS, float, Tensor, list, set, type, types.ModuleType, types.BuiltinFunctionType)


def _program(loss: Loss, *, settings: bool = False) -> Any:
    """What identifies a loss's program: its code, and that of the functions which it encloses.

    With ``settings`` also by which settings it runs: each None, bool, int, string and dtype that it encloses, and which
    tensors require a gradient. Never floats and values of tensors, which schedules change.
    """

    def identity(value: Any) -> Any:
        if isinstance(value, types.FunctionType):
            return value.__code__
        if isinstance(value, types.BuiltinFunctionType):
            return (value.__name__, type(value.__self__))
        if settings and isinstance(value, _SETTINGS):
            return (type(value), value)
        if settings and isinstance(value, Tensor):
            return (type(value), value.requires_grad)
        return value if settings and isinstance(value, type) else type(value)

    return tuple([(name, identity(part)) for name, part in _enclosed(loss, settings)])


def _enclosed(
    value: Any, states: bool = True, objects: int = 2, name: str = "loss", outer: tuple[int, ...] = ()
) -> Iterator[tuple[str, Any]]:
    """``value`` (a loss) and all that it encloses, each with the expression that leads there.

    Arguments of partials, defaults and closures are followed; with ``states`` also tuples, dicts and the state of
    ``objects`` objects within one another: a module and its own modules, but of an object that a function encloses only
    its own state, because it may be a whole model. Lists are not followed, because losses log to them.
    """
    yield name, value
    inside: dict[str, Any] = {}
    if isinstance(value, _NOT_FOLLOWED) or id(value) in outer:
        return
    if isinstance(value, functools.partial | types.FunctionType | types.MethodType):
        objects = min(objects, 1)
    if isinstance(value, functools.partial):
        inside = {".func": value.func} | {f".args[{i}]": part for i, part in enumerate(value.args)}
        inside |= {f".keywords[{key!r}]": part for key, part in value.keywords.items()}
    elif isinstance(value, types.FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        inside = {f"'s closure variable {key}": cell.cell_contents for key, cell in cells}
        inside |= {".__defaults__": value.__defaults__, ".__kwdefaults__": value.__kwdefaults__}
    elif isinstance(value, types.MethodType):
        inside = {".__func__": value.__func__, ".__self__": value.__self__}
    elif states and isinstance(value, tuple):
        inside = {f"[{i}]": part for i, part in enumerate(value)}
    elif states and isinstance(value, dict):
        inside = {f"[{key!r}]": part for key, part in value.items()}
    elif states and objects:
        objects -= 1
        inside = {f".{key}": part for key, part in getattr(value, "__dict__", {}).items()}
    for suffix, part in inside.items():
        yield from _enclosed(part, states, objects, name + suffix, (*outer, id(value)))
