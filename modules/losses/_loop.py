"""The loop over chunks of tokens: logits, loss and gradients of one chunk after the other; and that as an operator.

Shapes: T tokens (all leading dimensions flattened), H hidden size, V vocabulary, C tokens in a chunk.
"""

from __future__ import annotations

import functools
import math
import operator
import types
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..autograd_in_operators import with_autograd
from ._user_loss import Loss, Plan, Returns, Settings, loss_of_chunk, make_plan


class Inputs(NamedTuple):
    """The tensors of a call, with one dimension for the tokens."""

    hidden: Tensor  # [T, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    mask: Tensor | None  # [T] bool, the tokens that count
    invalid: Tensor | None  # [T] bool, those of them that are an error
    per_token: list[Tensor]  # each [T, *]
    num_tokens: int  # how many the mask selects, -1 if the host does not know


class Wanted(NamedTuple):
    """Which gradients to compute."""

    hidden: bool
    weight: bool
    bias: bool


class Outcome(NamedTuple):
    """Results of all tokens, and the gradients, which are empty tensors where they are not wanted."""

    results: list[Tensor]  # each [] or [T]
    hidden_grad: Tensor  # [T, H]
    weight_grad: Tensor  # [V, H]
    bias_grad: Tensor  # [V]


def run_chunks(plan: Plan, inputs: Inputs, cotangents: Sequence[Tensor], wanted: Wanted) -> Outcome:
    """Go through all tokens.

    ``cotangents`` are upstream gradients [] or [T] of the differentiable results; if empty, ``gradient_scale`` for
    each. If no gradient is ``wanted``, the loss is not differentiated.
    """
    settings = plan.settings
    hidden, dtype = inputs.hidden.detach(), settings.dtype
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        index, poison = _selected_tokens(inputs, settings.invalid_reason)
        tokens = hidden.shape[0] if index is None else index.shape[0]
        weight = inputs.weight.detach().to(dtype)
        bias = None if inputs.bias is None else inputs.bias.detach().to(dtype)
        results, hidden_grad, weight_grad, bias_grad = _initial(plan, inputs, wanted, some_rows_only=index is not None)
        chunk = max(1, min(settings.chunk_tokens, tokens))
        buffer = torch.empty(chunk if tokens else 0, settings.vocab_size, dtype=dtype, device=hidden.device)
        for start in range(0, tokens, chunk):
            rows: slice | Tensor = slice(start, min(start + chunk, tokens))
            rows = rows if index is None else index[rows]
            x = _take(hidden, rows).to(dtype)
            logits = buffer[: x.shape[0]]
            if bias is None:
                torch.mm(x, weight.t(), out=logits)
            else:
                torch.addmm(bias, x, weight.t(), out=logits)

            weights: tuple[Tensor | float, ...] | None = None
            if any(wanted):
                weights = tuple([_take(c, rows) if c.ndim else c for c in cotangents])
                weights = weights or (settings.gradient_scale,) * sum(plan.returns.differentiable)
            values = loss_of_chunk(plan, logits, [_take(tensor, rows) for tensor in inputs.per_token], weights)
            for result, value in zip(results, values, strict=True):
                if value.ndim:
                    _put(result, rows, value)
                else:
                    result += value

            # From here on, the logits are their gradient.
            if wanted.hidden and isinstance(rows, slice) and hidden.dtype == dtype:
                torch.mm(logits, weight, out=hidden_grad[rows])
            elif wanted.hidden:
                _put(hidden_grad, rows, torch.mm(logits, weight))
            if wanted.weight:
                _add_product(weight_grad, logits, x)
            if wanted.bias:
                bias_grad += logits.sum(0, dtype=bias_grad.dtype)
        if settings.check_finite and not all(bool(result.isfinite().all()) for result in results):
            _raise_not_finite(inputs)
        if settings.reduce:
            results = [result.sum() if result.ndim else result for result in results]
        if poison is not None:
            results = [result.masked_fill(poison, math.nan) for result in results]
    return Outcome(results, hidden_grad, weight_grad, bias_grad)


def _initial(plan: Plan, inputs: Inputs, wanted: Wanted, *, some_rows_only: bool) -> Outcome:
    """What the chunks write to (zeros where they do not fill it) and add to (zeros)."""
    hidden, weight, kind = inputs.hidden, inputs.weight, plan.settings.result_dtype
    fill = torch.zeros_like if some_rows_only or not hidden.shape[0] else torch.empty_like
    hidden_grad = fill(hidden) if wanted.hidden else hidden.new_empty(0)
    # Contiguous, even if the weight is not (a transposed parameter): scaled_gradient() relies on it.
    weight_grad = weight.new_zeros(weight.shape if wanted.weight else 0, dtype=plan.settings.weight_grad_dtype)
    bias_grad = weight.new_zeros(weight.shape[0] if wanted.bias else 0, dtype=kind)
    shapes = [hidden.shape[:1] if kept else () for kept in plan.returns.per_token]
    results = [torch.zeros(shape, dtype=kind, device=hidden.device) for shape in shapes]
    return Outcome(results, hidden_grad, weight_grad, bias_grad)


def _take(tensor: Tensor, rows: slice | Tensor) -> Tensor:
    return tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows)


def _put(tensor: Tensor, rows: slice | Tensor, values: Tensor) -> None:
    if isinstance(rows, slice):
        tensor[rows] = values
    else:
        tensor.index_copy_(0, rows, values.to(tensor.dtype))


def _selected_tokens(inputs: Inputs, invalid_reason: str) -> tuple[Tensor | None, Tensor | None]:
    """Positions of the tokens that count (None: all), and whether to make the results NaN (None: no).

    The host must know how many tokens count, because that sizes the work: from the caller, or by waiting for the
    device. An error that the host could only see by waiting for the device makes the results NaN instead.
    """
    mask, invalid, num_tokens, tokens = inputs.mask, inputs.invalid, inputs.num_tokens, inputs.hidden.shape[0]
    counted = None if invalid is None else (invalid if mask is None else invalid & mask)
    seen = mask if mask is not None else counted
    on_cpu = seen is not None and seen.device.type == "cpu"
    if mask is None and (counted is None or not on_cpu):
        return None, None if counted is None else counted.any()
    found = torch.tensor(tokens) if mask is None else mask.sum()
    bad = torch.zeros_like(found) if counted is None else counted.sum()
    if on_cpu or num_tokens < 0:
        if mask is not None and mask.is_cuda and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "The number of tokens that count cannot be read while a CUDA graph is captured. Pass num_tokens."
            )
        n, wrong = torch.stack([found, bad]).tolist()
        if wrong:
            first = int(counted.nonzero()[0])  # type: ignore[union-attr]
            raise ValueError(f"{wrong} token(s) {invalid_reason}, the first at position {first} of all tokens.")
        if num_tokens >= 0 and n != num_tokens:
            raise ValueError(f"num_tokens is {num_tokens}, but the mask selects {n} tokens.")
        poison = None
    else:
        n, poison = num_tokens, (found != num_tokens) | (bad > 0)
    if mask is None or n == tokens:
        return None, poison
    # -1 where there are fewer than n: the loss is NaN then anyway.
    return torch.nonzero_static(mask, size=n, fill_value=-1).squeeze(1).clamp(min=0), poison


def _add_product(total: Tensor, logits_grad: Tensor, x: Tensor) -> None:
    """``total += logits_grad.T @ x``, summed in the dtype of ``total``."""
    if total.dtype == x.dtype:
        total.addmm_(logits_grad.t(), x)
    elif not x.is_cuda:
        total.addmm_(logits_grad.t().to(total.dtype), x.to(total.dtype))
    elif torch.cuda.get_device_capability(x.device) >= (8, 0):
        torch.addmm(total, logits_grad.t(), x, out_dtype=total.dtype, out=total)
    else:
        add_product_in_slices(total, logits_grad, x)


def add_product_in_slices(total: Tensor, logits_grad: Tensor, x: Tensor, rows_at_a_time: int = 8192) -> None:
    """``total += logits_grad.T @ x`` by 16-bit products, for GPUs below capability 8.0, which have no others.

    Args:
        total: [V, H], float32.
        logits_grad: [C, V], 16 bit.
        x: [C, H], 16 bit. It is divided by a power of two >= C first, which keeps float16 from overflowing: a sum of C
            products is then no more than the largest of them. Float16 values below that power times 2**-14 lose low
            bits by it: with 512 tokens those below 0.03, each no more than a value of 0.06 has lost to rounding before.
        rows_at_a_time: Rows of the vocabulary whose product exists at a time.
    """
    factor = 2.0 ** math.ceil(math.log2(x.shape[0]))
    small = x / factor
    for start in range(0, total.shape[0], rows_at_a_time):
        rows = slice(start, start + rows_at_a_time)
        total[rows].add_(logits_grad[:, rows].t() @ small, alpha=factor)


def _raise_not_finite(inputs: Inputs) -> NoReturn:
    hidden, weight, bias, mask = inputs[:4]
    bad_tokens = ~hidden.isfinite().all(-1)
    if mask is not None:
        bad_tokens &= mask
    bad_rows = ~weight.isfinite().all(-1)
    if bad_tokens.any():
        where = f"hidden is not finite at {int(bad_tokens.sum())} token(s), the first {int(bad_tokens.nonzero()[0])}"
    elif bad_rows.any():
        where = f"weight is not finite in {int(bad_rows.sum())} row(s), the first {int(bad_rows.nonzero()[0])}"
    elif bias is not None and not bias.isfinite().all():
        where = "bias is not finite"
    else:
        where = (
            "hidden and weight are finite: their product overflows the dtype, or the loss function makes it so, e.g. "
            "divides by zero or gets a label outside [0, V)"
        )
    raise ValueError(f"The loss is not finite: {where}. Look upstream, e.g. for a too large learning rate.")


def scaled_gradient(gradient: Tensor, factor: Tensor, dtype: torch.dtype, *, in_place: bool) -> Tensor:
    """``gradient * factor`` (0-dim, or one value per row) in ``dtype``, multiplied in float32 a slice at a time.

    In place, a narrower ``dtype`` goes to the front of the same memory, which is contiguous: a row is written only
    where rows that have been read already lay. The memory stays allocated, but the float32 sum and the 16-bit gradient
    never exist side by side.
    """
    factor = factor if gradient.dtype == torch.float64 else factor.float()
    factor = factor.reshape(-1, *[1] * (gradient.ndim - 1)) if factor.ndim else factor
    if not in_place or gradient.dtype.itemsize < dtype.itemsize:
        out = torch.empty_like(gradient, dtype=dtype)
    else:
        out = torch.empty(0, dtype=dtype, device=gradient.device)
        out.set_(gradient.untyped_storage(), 0, gradient.shape, gradient.stride())
    for start in range(0, gradient.shape[0], 2048):
        rows = slice(start, start + 2048)
        out[rows] = (gradient[rows].to(factor.dtype) * (factor[rows] if factor.ndim else factor)).to(dtype)
    return out


# ------------------------------------------------------------------------------------- inside an outer torch.compile
#
# The graph holds the loop as an operator. An operator takes no Python function, so the graph refers to loss and
# settings by a number, which is found while it is traced. Tensors among the keyword arguments of a functools.partial
# are inputs of the graph, so that they may change and nothing keeps them alive.


class _Traced(NamedTuple):
    plan: Plan  # whose loss is the bare function, called with:
    args: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]
    tensors: tuple[str, ...]  # names of keyword arguments that the operator gets behind the per-token tensors


_TRACED: list[_Traced] = []


def plan_of(loss: Loss, settings: Settings) -> tuple[Plan | int, Returns, list[Tensor]]:
    """The plan; in a traced graph its number, and the tensors that the operator takes behind the per-token ones."""
    if not torch.compiler.is_compiling():
        plan = make_plan(loss, settings)
        return plan, plan.returns, []
    tensors: dict[str, Tensor] = {}
    if isinstance(loss, functools.partial):
        tensors = {name: value for name, value in loss.keywords.items() if isinstance(value, Tensor)}
        others = {name: value for name, value in loss.keywords.items() if not isinstance(value, Tensor)}
        if _hold_tensors(loss.args) or _hold_tensors(others):
            _refuse_tensors()
        loss = functools.partial(loss.func, *loss.args, **others)
    # Constants for plan_number(). torch.compile(dynamic=True) makes sizes symbols.
    kinds = tuple(
        (name, t.dtype, str(t.device), tuple(map(operator.index, t.shape)), t.requires_grad)
        for name, t in tensors.items()
    )
    number = plan_number(loss, tuple(settings), kinds)
    return number, _returns(number), [tensor.detach() for tensor in tensors.values()]


def _hold_tensors(value: Any) -> bool:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return any(isinstance(part, Tensor) or _hold_tensors(part) for part in values)


@torch._dynamo.assume_constant_result  # an error that Dynamo traces would lose its text
def _refuse_tensors() -> None:
    raise ValueError(
        "Inside torch.compile, a tensor in a loss must be a keyword argument of its functools.partial, not a "
        "positional one or inside a list, tuple or dict: a compiled graph would keep the one that is there now. Pass "
        "each as a keyword argument of its own."
    )


@torch._dynamo.assume_constant_result
def plan_number(
    loss: Loss, settings: tuple[Any, ...], tensors: tuple[tuple[str, torch.dtype, str, tuple[int, ...], bool], ...] = ()
) -> int:
    """The number of the plan of a loss that encloses no tensors, while an outer graph is traced.

    ``settings`` are the fields of :class:`Settings`, as a plain tuple, because Dynamo evaluates no named one.
    ``tensors`` are name, dtype, device, shape and ``requires_grad`` of those that the loss gets as keyword arguments.

    Raises:
        ValueError: As ``make_plan``; and if ``loss`` may change without the graph noticing.
    """
    parts: Any = loss if isinstance(loss, functools.partial) else functools.partial(loss)
    function = parts.func
    if not isinstance(function, types.FunctionType) or function.__closure__:
        raise ValueError(
            f"Inside torch.compile, loss must be a function without a closure, or a functools.partial of one, got "
            f"{loss!r}: a compiled graph would keep the values that it encloses now. Pass them as keyword arguments."
        )
    with torch.utils._python_dispatch._disable_current_modes():  # Dynamo's fake tensors
        # Values are not known yet, and the loss may look at all of them: whole tensors, while it is probed.
        made_up = {
            name: torch.full(shape, kind.is_floating_point or kind == torch.bool, dtype=kind, device=device)
            .requires_grad_(learns)
            for name, kind, device, shape, learns in tensors
        }  # fmt: skip
        plan = make_plan(functools.partial(loss, **made_up) if made_up else loss, Settings(*settings))
    traced = _Traced(plan._replace(loss=function), parts.args, tuple(parts.keywords.items()), tuple(made_up))
    if traced not in _TRACED:
        _TRACED.append(traced)
    return _TRACED.index(traced)


@torch._dynamo.assume_constant_result
def _returns(number: int) -> Returns:
    return _TRACED[number].plan.returns


torch.library.define(
    "lightning_qlora::linear_loss",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor? mask, Tensor? invalid, Tensor[] per_token, "
    "SymInt num_tokens, Tensor[] cotangents, bool[] wanted, int plan) -> (Tensor[], Tensor, Tensor, Tensor)",
)

torch.library.define("lightning_qlora::scaled_gradient", "(Tensor gradient, Tensor factor, ScalarType dtype) -> Tensor")


def run(plan: Plan | int, inputs: Inputs, cotangents: Sequence[Tensor], wanted: Wanted) -> Outcome:
    """:func:`run_chunks`, for the number of a plan as an operator."""
    if isinstance(plan, int):
        return Outcome(*torch.ops.lightning_qlora.linear_loss(*inputs, list(cotangents), list(wanted), plan))
    return run_chunks(plan, inputs, cotangents, wanted)


@torch.library.impl("lightning_qlora::linear_loss", "default")
def _linear_loss(*arguments: Any) -> Outcome:
    """``arguments`` as in the schema: those of :class:`Inputs`, then cotangents, wanted and plan."""
    inputs, (cotangents, wanted, number) = Inputs(*arguments[:-3]), arguments[-3:]
    plan, args, keywords, names = _TRACED[number]
    if args or keywords or names:
        split = len(inputs.per_token) - len(names)
        tensors = zip(names, inputs.per_token[split:], strict=True)
        plan = plan._replace(loss=functools.partial(plan.loss, *args, **dict(keywords), **dict(tensors)))
        inputs = inputs._replace(per_token=inputs.per_token[:split])
    work = functools.partial(run_chunks, plan, inputs, cotangents, Wanted(*wanted))
    return with_autograd(work, inputs.hidden.device)


@torch.library.register_fake("lightning_qlora::linear_loss")
def _linear_loss_fake(*arguments: Any) -> tuple[Any, ...]:
    inputs, (_, wanted, number) = Inputs(*arguments[:-3]), arguments[-3:]
    hidden, weight, wanted = inputs.hidden, inputs.weight, Wanted(*wanted)
    settings, returns = _TRACED[number].plan.settings, _TRACED[number].plan.returns
    shapes = [hidden.shape[:1] if kept and not settings.reduce else () for kept in returns.per_token]
    return (
        [hidden.new_empty(shape, dtype=settings.result_dtype) for shape in shapes],
        torch.empty_like(hidden) if wanted.hidden else hidden.new_empty(0),
        weight.new_empty(weight.shape if wanted.weight else 0, dtype=settings.weight_grad_dtype),
        weight.new_empty(weight.shape[0] if wanted.bias else 0, dtype=settings.result_dtype),
    )


@torch.library.impl("lightning_qlora::scaled_gradient", "default")
def _scaled_new(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return scaled_gradient(gradient, factor, dtype, in_place=False)


@torch.library.register_fake("lightning_qlora::scaled_gradient")
def _scaled_fake(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(gradient, dtype=dtype)
