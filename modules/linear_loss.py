"""Any loss of ``hidden @ weight.T``, token chunk by token chunk, without ever holding the logits of all tokens.

Value and gradient of a chunk are computed while its logits exist, by autograd, from the user's loss f:

    logits = x @ W.T                            [C, V]   matrix product into one buffer
    f(logits), d f / d logits                   [C, V]   one compiled kernel, the gradient replaces the logits
    dX[chunk] = dlogits @ W                     [C, H]
    dW += dlogits.T @ x                         [V, H]   only if something needs it

The scalar that the loss is multiplied with later (loss scaling, 1/tokens, a weight among several losses) is not known
at that time, but is linear: backward multiplies. Where it is not one scalar (several results with a gradient, or one
value a token with a trained weight), forward keeps no gradient and backward goes through the chunks again with the true
upstream gradient, which costs one matrix product more.

Shapes: T tokens (all leading dimensions flattened), H hidden size, V vocabulary, C tokens in a chunk.
"""

from __future__ import annotations

import functools
import math
import threading
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

Loss = Callable[..., Tensor | tuple[Tensor, ...]]
Reduction = Literal["mean", "sum", "none"]

#: Bytes that a chunk may take. Compiled, that is the logits in the compute dtype, for the gradient replaces them;
#: otherwise f's float32 intermediates too, about ``EAGER_BYTES_PER_LOGIT`` for each logit. A trained weight's gradient
#: is read and written once a chunk, so that fewer chunks are worth twice the bytes.
CHUNK_BUDGET_BYTES = 128 * 2**20
EAGER_BYTES_PER_LOGIT = 16

#: Gradients of a chunk are computed before the loss scale of mixed precision is known. In float16 they are carried
#: multiplied by this power of two (an exact factor), which keeps probabilities down to 6e-11 from vanishing.
FP16_GRADIENT_SCALE = 1024.0


def _gradient_scale(dtype: torch.dtype) -> float:
    return FP16_GRADIENT_SCALE if dtype == torch.float16 else 1.0


def auto_chunk_tokens(vocab_size: int, dtype: torch.dtype, *, compiled: bool, weight_learns: bool = False) -> int:
    """Most tokens whose chunk fits ``CHUNK_BUDGET_BYTES``, in multiples of 128 (the tiles of matrix products).

    A vocabulary of 128256 in 16 bit has 128256 * 2 bytes a token: 128 MiB hold 523 of them, so 512; with a weight that
    learns, 1024. Uncompiled it is 128256 * 18 bytes: 58 tokens, in multiples of 16 below 128, so 48. At least 16.
    """
    bytes_per_token = vocab_size * (dtype.itemsize + (0 if compiled else EAGER_BYTES_PER_LOGIT))
    tokens = CHUNK_BUDGET_BYTES * (2 if weight_learns else 1) // bytes_per_token
    return max(16, tokens // 128 * 128 if tokens >= 128 else tokens // 16 * 16)


# ---------------------------------------------------------------------------------------- one chunk's loss, by autograd


class _FusableGather(TorchFunctionMode):
    """Has Dynamo trace ``x.gather(-1, index)`` of one index a row as a masked sum.

    The derivative of gather is a scatter into zeros of the size of the logits, which Inductor cannot fuse; that of a
    masked sum is a comparison inside the kernel that writes the gradient anyway.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.gather, Tensor.gather) and not kwargs and len(args) == 3:
            x, dim, index = args
            if dim in (-1, x.ndim - 1) and index.shape[-1] == 1 and index.shape[:-1] == x.shape[:-1]:
                columns = torch.arange(x.shape[-1], device=x.device)
                return torch.where(columns == index, x, 0).sum(-1, keepdim=True)
        return func(*args, **(kwargs or {}))


def _results(loss: Loss, logits: Tensor, per_token: Sequence[Tensor]) -> tuple[Tensor, ...]:
    results = loss(logits, *per_token)
    return results if isinstance(results, tuple) else (results,)


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
    differentiable: Sequence[bool],
    cotangents: Sequence[Tensor | float],
) -> tuple[Tensor, ...]:
    """Results of ``loss``; ``logits`` is overwritten with the gradient of the sum of cotangents times results."""
    x = logits.detach().requires_grad_()
    with torch.enable_grad():
        results = _results(loss, x, per_token)
        total = _weighted_sum(results, differentiable, cotangents)
    (gradient,) = torch.autograd.grad(total, x)
    logits.copy_(gradient)
    return tuple(result.detach() for result in results)


def _differentiate_fusable(
    loss: Loss,
    logits: Tensor,
    per_token: Sequence[Tensor],
    differentiable: Sequence[bool],
    cotangents: Sequence[Tensor | float],
) -> tuple[Tensor, ...]:
    """The same in a form that Dynamo traces into one graph."""

    def weighted(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        results = _results(loss, x, per_token)
        total = _weighted_sum(results, differentiable, cotangents)
        return total, tuple(result.detach() for result in results)

    results: tuple[Tensor, ...]
    with _FusableGather():
        gradient, (_, results) = torch.func.grad_and_value(weighted, has_aux=True)(logits)
    logits.copy_(gradient)
    return results


# Rows are few and long. Splitting a row's sum over blocks would cost the fusion with what reads the row again.
_COMPILE_OPTIONS: dict[str, Any] = {"split_reductions": False}


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


def _program(loss: Any) -> Any:
    """What identifies a loss's program, without the values that it encloses: those torch.compile's guards notice."""
    if isinstance(loss, functools.partial):
        return (_program(loss.func), len(loss.args), tuple(loss.keywords))
    if isinstance(loss, types.FunctionType):
        return (loss.__code__, tuple(_program(cell.cell_contents) for cell in loss.__closure__ or ()))
    return type(loss)


def _call(plan: _Plan, function: Any, logits: Tensor, per_token: Sequence[Tensor], *more: Any) -> tuple[Tensor, ...]:
    """``function(loss, logits, ...)``, compiled if the plan says so.

    Not under a dispatch mode, which wants to see operations; nor for a single row, for which Dynamo would specialize.
    """
    if not plan.compile or logits.shape[0] < 2 or torch._C._len_torch_dispatch_stack() > 0:
        return function(plan.loss, logits, per_token, *more)  # type: ignore[no-any-return]
    for tensor in (logits, *per_token, *(t for group in more for t in group if isinstance(t, Tensor) and t.ndim)):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    function = _differentiate_fusable if function is _differentiate else function
    key = (_program(plan.loss), logits.shape[1], logits.dtype)
    return _compiled(function, key)(plan.loss, logits, tuple(per_token), *more)  # type: ignore[no-any-return]


# ----------------------------------------------------------------------------------------------------- what f returns


@dataclass(frozen=True)
class _Plan:
    """All that is decided before the first chunk. ``per_token`` and ``differentiable`` have one entry a result."""

    loss: Loss
    per_token: tuple[bool, ...]
    differentiable: tuple[bool, ...]
    is_tuple: bool
    reduce: bool
    chunk_tokens: int
    dtype: torch.dtype
    weight_grad_dtype: torch.dtype
    compile: bool
    check_finite: bool
    invalid_reason: str

    @property
    def result_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32


@torch.no_grad()
def _probe(
    loss: Loss,
    vocab_size: int,
    dtype: torch.dtype,
    device: str,
    tensors: tuple[tuple[torch.dtype, tuple[int, ...]], ...],
) -> tuple[tuple[bool, ...], tuple[bool, ...], bool]:
    """Call ``loss`` on two made-up tokens, together and apart: which results are per token and which differentiable.

    Raises:
        ValueError: For results of a wrong type or shape, or that differ between the two calls.
    """
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(2, vocab_size, dtype=torch.float32, device=device, generator=generator).to(dtype)
    values = [
        torch.rand((2, *shape), device=device, generator=generator).to(kind)
        if kind.is_floating_point
        else torch.ones((2, *shape), dtype=kind, device=device) * (kind == torch.bool)
        for kind, shape in tensors
    ]
    name = getattr(loss, "__name__", None) or getattr(getattr(loss, "func", None), "__name__", None) or repr(loss)
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
    return (
        tuple(result.ndim == 1 for result in results),
        tuple(result.requires_grad and result.is_floating_point() for result in results),
        isinstance(raw, tuple),
    )


# Keyed by the program, not by the object: a lambda that is made anew in each step is probed once.
_PROBED: dict[Any, tuple[tuple[bool, ...], tuple[bool, ...], bool]] = {}
# Plans that a compiled graph refers to by number, since an operator cannot take a Python function.
_PLANS: list[_Plan] = []


def _make_plan(
    loss: Loss,
    vocab_size: int,
    dtype: torch.dtype,
    weight_grad_dtype: torch.dtype,
    device: str,
    tensors: tuple[tuple[torch.dtype, tuple[int, ...]], ...],
    chunk_tokens: int,
    reduction: Reduction,
    compile: bool,
    check_finite: bool,
    invalid_reason: str,
    weight_learns: bool,
) -> _Plan:
    key = (_program(loss), vocab_size, dtype, device, tensors)
    if key not in _PROBED:
        with torch.autocast(device.partition(":")[0], enabled=False):
            _PROBED[key] = _probe(loss, vocab_size, dtype, device, tensors)
    per_token, differentiable, is_tuple = _PROBED[key]
    if reduction == "none" and not all(per_token):
        raise ValueError("reduction='none' needs a loss that returns one value a token [C]; this one returns a sum.")
    chunk_tokens = chunk_tokens or auto_chunk_tokens(vocab_size, dtype, compiled=compile, weight_learns=weight_learns)
    return _Plan(
        loss, per_token, differentiable, is_tuple, reduction != "none", chunk_tokens, dtype, weight_grad_dtype, compile,
        check_finite, invalid_reason,
    )  # fmt: skip


@torch._dynamo.assume_constant_result
def _plan_number(loss: Loss, *args: Any) -> int:
    """The number of a plan, while an outer graph is traced.

    Raises:
        ValueError: If ``loss`` may change without the graph noticing.
    """
    function = loss.func if isinstance(loss, functools.partial) else loss
    if not isinstance(function, types.FunctionType) or function.__closure__:
        raise ValueError(
            f"Inside torch.compile, loss must be a function without a closure, or a functools.partial of one, got "
            f"{loss!r}: a compiled graph would keep the values that it encloses now. Pass them as keyword arguments."
        )
    with torch.utils._python_dispatch._disable_current_modes():  # Dynamo's fake tensors
        plan = _make_plan(loss, *args)
    for number, other in enumerate(_PLANS):
        if _same_plan(plan, other):
            return number
    _PLANS.append(plan)
    return len(_PLANS) - 1


def _same_plan(a: _Plan, b: _Plan) -> bool:
    def parts(plan: _Plan) -> tuple[Any, ...]:
        loss = plan.loss
        if isinstance(loss, functools.partial):
            loss = (loss.func, loss.args, tuple(loss.keywords.items()))  # type: ignore[assignment]
        return (loss, *(getattr(plan, name) for name in list(plan.__dataclass_fields__)[1:]))

    return parts(a) == parts(b)


@torch._dynamo.assume_constant_result
def _plan_facts(number: int) -> tuple[bool, tuple[bool, ...]]:
    """Whether the results are a tuple, and which of them are differentiable."""
    return _PLANS[number].is_tuple, _PLANS[number].differentiable


# ------------------------------------------------------------------------------------------------------ all the chunks


def _run(
    plan: _Plan,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    invalid: Tensor | None,
    per_token: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    num_tokens: int,
    wanted: tuple[bool, bool, bool],
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Results of all tokens, and the gradients of hidden [T, H], weight [V, H] and bias [V] that are ``wanted``.

    Without ``cotangents`` the differentiable results are weighted with :func:`_gradient_scale`. Gradients that are not
    wanted are empty tensors.
    """
    device = hidden.device
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        index, poison = _selected_tokens(plan, hidden.shape[0], mask, invalid, num_tokens)
        tokens = hidden.shape[0] if index is None else index.shape[0]
        vocab_size = weight.shape[0]
        matrix = weight.detach().to(plan.dtype)
        offset = None if bias is None else bias.detach().to(plan.dtype)
        fill = torch.zeros_like if index is not None or tokens == 0 else torch.empty_like
        hidden_grad = fill(hidden) if wanted[0] else hidden.new_empty(0)
        weight_grad = torch.zeros_like(weight, dtype=plan.weight_grad_dtype) if wanted[1] else weight.new_empty(0)
        bias_grad = weight.new_zeros(vocab_size if wanted[2] else 0, dtype=plan.result_dtype)
        results = [
            torch.zeros(hidden.shape[:1] if kept else (), dtype=plan.result_dtype, device=device)
            for kept in plan.per_token
        ]
        chunk = max(1, min(plan.chunk_tokens, tokens))
        buffer = torch.empty(chunk if tokens else 0, vocab_size, dtype=plan.dtype, device=device)
        scale = _gradient_scale(plan.dtype)
        for start in range(0, tokens, chunk):
            rows = slice(start, min(start + chunk, tokens))
            chosen = None if index is None else index[rows]

            def take(tensor: Tensor, rows: slice = rows, chosen: Tensor | None = chosen) -> Tensor:
                return tensor[rows] if chosen is None else tensor.index_select(0, chosen)

            x = take(hidden.detach()).to(plan.dtype)
            logits = buffer[: x.shape[0]]
            if offset is None:
                torch.mm(x, matrix.t(), out=logits)
            else:
                torch.addmm(offset, x, matrix.t(), out=logits)
            inputs = [take(tensor) for tensor in per_token]
            if any(wanted):
                weights: tuple[Tensor | float, ...] = tuple(take(c) if c.ndim else c for c in cotangents)
                weights = weights or (scale,) * sum(plan.differentiable)
                values = _call(plan, _differentiate, logits, inputs, plan.differentiable, weights)
            else:
                values = _call(plan, _results, logits, inputs)
            for total, value in zip(results, values, strict=True):
                if not value.ndim:
                    total += value
                elif chosen is None:
                    total[rows] = value
                else:
                    total.index_copy_(0, chosen, value.to(total.dtype))
            if wanted[0]:
                if chosen is not None:
                    hidden_grad.index_copy_(0, chosen, torch.mm(logits, matrix).to(hidden.dtype))
                elif hidden.dtype == plan.dtype:
                    torch.mm(logits, matrix, out=hidden_grad[rows])
                else:
                    hidden_grad[rows] = torch.mm(logits, matrix)
            if wanted[1]:
                _add_product(weight_grad, logits, x)
            if wanted[2]:
                bias_grad += logits.sum(0, dtype=bias_grad.dtype)
        if plan.check_finite and not all(bool(result.isfinite().all()) for result in results):
            _raise_not_finite(hidden, weight, bias, mask)
        if plan.reduce:
            results = [result.sum() if result.ndim else result for result in results]
        if poison is not None:
            results = [result.masked_fill(poison, math.nan) for result in results]
    return results, hidden_grad, weight_grad, bias_grad


def _selected_tokens(
    plan: _Plan, tokens: int, mask: Tensor | None, invalid: Tensor | None, num_tokens: int
) -> tuple[Tensor | None, Tensor | None]:
    """Positions of the tokens that count (None: all), and whether to make the results NaN (None: no need to ask).

    How many count sizes the work, so the host must know it: from the caller, or by reading it back. What is wrong and
    was not read back (that would stall the host) makes the loss NaN.
    """
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
            raise ValueError(f"{wrong} token(s) {plan.invalid_reason}, the first at position {first} of all tokens.")
        if num_tokens >= 0 and n != num_tokens:
            raise ValueError(f"num_tokens is {num_tokens}, but the mask selects {n} tokens.")
        poison = None
    else:
        n, poison = num_tokens, (found != num_tokens) | (bad > 0)
    if mask is None or n == tokens:
        return None, poison
    # Too few to fill: -1, where the loss is NaN anyway.
    return torch.nonzero_static(mask, size=n, fill_value=-1).squeeze(1).clamp(min=0), poison


def _add_product(total: Tensor, logits_grad: Tensor, x: Tensor) -> None:
    """``total += logits_grad.T @ x``, summed in float32 whatever the inputs."""
    if total.dtype == x.dtype:
        total.addmm_(logits_grad.t(), x)
    elif not x.is_cuda:
        total.addmm_(logits_grad.t().to(total.dtype), x.to(total.dtype))
    elif torch.cuda.get_device_capability(x.device) >= (8, 0):
        torch.addmm(total, logits_grad.t(), x, out_dtype=total.dtype, out=total)
    else:  # a 16-bit product, for a slice of the vocabulary at a time; the exact factor keeps float16 from overflowing
        factor = 2.0 ** math.ceil(math.log2(x.shape[0]))
        small = x / factor
        for start in range(0, total.shape[0], 8192):
            rows = slice(start, start + 8192)
            total[rows].add_(logits_grad[:, rows].t() @ small, alpha=factor)


def _raise_not_finite(hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None) -> None:
    bad_tokens = ~hidden.isfinite().all(-1)
    if mask is not None:
        bad_tokens &= mask
    if bad_tokens.any():
        where = f"hidden is not finite at {int(bad_tokens.sum())} token(s), the first {int(bad_tokens.nonzero()[0])}"
    elif not weight.isfinite().all():
        rows = ~weight.isfinite().all(-1)
        where = f"weight is not finite in {int(rows.sum())} row(s), the first {int(rows.nonzero()[0])}"
    elif bias is not None and not bias.isfinite().all():
        where = "bias is not finite"
    else:
        where = "hidden and weight are finite: their product overflows the dtype, or the loss function divides by zero"
    raise ValueError(f"The loss is not finite: {where}. Look upstream, e.g. for a too large learning rate.")


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype, *, in_place: bool) -> Tensor:
    """``gradient * factor`` (0-dim, or one value a row) in ``dtype``, multiplied in float32 a slice at a time.

    In place, a narrower ``dtype`` goes to the front of the same memory: a row is written where only rows that have been
    read before it lay. The memory stays whole, but float32 sum and 16-bit gradient never exist side by side.
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


# -------------------------------------------------------------------- the same as operators, for an outer torch.compile

torch.library.define(
    "lightning_qlora::linear_loss",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor? mask, Tensor? invalid, Tensor[] per_token, "
    "Tensor[] cotangents, SymInt num_tokens, bool[] wanted, int plan) -> (Tensor[], Tensor, Tensor, Tensor)",
)
torch.library.define("lightning_qlora::scaled_gradient", "(Tensor gradient, Tensor factor, ScalarType dtype) -> Tensor")


def _run_numbered(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, invalid: Tensor | None,
    per_token: list[Tensor], cotangents: list[Tensor], num_tokens: int, wanted: list[bool], plan: int,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:  # fmt: skip
    def run() -> Any:
        a, b, c = wanted
        return _run(_PLANS[plan], hidden, weight, bias, mask, invalid, per_token, cotangents, num_tokens, (a, b, c))

    with torch.enable_grad():
        autograd_is_on = (torch.zeros(1, requires_grad=True) * 1).requires_grad
    if autograd_is_on:
        return run()  # type: ignore[no-any-return]
    # AOTAutograd runs a new graph for the first time under a dispatch mode, inside which autograd is off for the whole
    # thread. Another thread has its own state.
    outcome: list[Any] = []
    stream = torch.cuda.current_stream(hidden.device) if hidden.is_cuda else None

    def run_here() -> None:
        try:
            with torch.cuda.stream(stream):
                outcome.append(run())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run_here)
    thread.start()
    thread.join()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]  # type: ignore[no-any-return]


def _run_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, invalid: Tensor | None,
    per_token: list[Tensor], cotangents: list[Tensor], num_tokens: int, wanted: list[bool], plan: int,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:  # fmt: skip
    p = _PLANS[plan]
    shapes = [hidden.shape[:1] if kept and not p.reduce else () for kept in p.per_token]
    return (
        [hidden.new_empty(shape, dtype=p.result_dtype) for shape in shapes],
        torch.empty_like(hidden) if wanted[0] else hidden.new_empty(0),
        torch.empty_like(weight, dtype=p.weight_grad_dtype) if wanted[1] else weight.new_empty(0),
        weight.new_empty(weight.shape[0] if wanted[2] else 0, dtype=p.result_dtype),
    )


def _scaled_new(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return _scaled(gradient, factor, dtype, in_place=False)


def _scaled_fake(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(gradient, dtype=dtype)


torch.library.impl("lightning_qlora::linear_loss", "default", _run_numbered)
torch.library.impl("lightning_qlora::scaled_gradient", "default", _scaled_new)
torch.library.register_fake("lightning_qlora::linear_loss", _run_fake)
torch.library.register_fake("lightning_qlora::scaled_gradient", _scaled_fake)


# ------------------------------------------------------------------------------------------------------------ autograd


class _LinearLoss(torch.autograd.Function):
    """Gradients are made in forward where one scalar (or one a row) will scale them, else in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        invalid: Tensor | None,
        num_tokens: int,
        plan: _Plan | int,
        wanted: tuple[bool, bool, bool],
        differentiable: tuple[bool, ...],
        per_row: bool,
        scale: float,
        *per_token: Tensor,
    ) -> tuple[Tensor, ...]:
        one_scalar = sum(differentiable) == 1 and not (per_row and (wanted[1] or wanted[2]))
        now = wanted if one_scalar else (False, False, False)
        results, *gradients = _execute(plan, hidden, weight, bias, mask, invalid, per_token, [], num_tokens, now)
        ctx.plan, ctx.wanted, ctx.now, ctx.differentiable, ctx.num_tokens = (
            plan,
            wanted,
            now,
            differentiable,
            num_tokens,
        )
        ctx.dtypes = (hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype)
        ctx.scale = scale
        ctx.num_inputs = 11 + len(per_token)
        ctx.gradients = None
        if isinstance(plan, int) and any(now):
            ctx.save_for_backward(*gradients, hidden, weight, bias, mask, *per_token)
        else:
            # Not as saved tensors: the first backward hands these buffers over, scaled in place.
            ctx.gradients = gradients if any(now) else None
            ctx.save_for_backward(None, None, None, hidden, weight, bias, mask, *per_token)
        ctx.mark_non_differentiable(*[r for r, d in zip(results, differentiable, strict=True) if not d])
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise ValueError(
                "create_graph=True: linear_loss has no second derivative, for the logits it would need are gone. Write "
                "the loss on the full logits where you need one."
            )
        *saved, hidden, weight, bias, mask = ctx.saved_tensors[:7]
        cotangents = [u for u, d in zip(upstream, ctx.differentiable, strict=True) if d]
        compiled = isinstance(ctx.plan, int)
        gradients, ctx.gradients = (saved if compiled and any(ctx.now) else ctx.gradients), None
        if gradients is None:
            _, *gradients = _execute(
                ctx.plan,
                hidden,
                weight,
                bias,
                mask,
                None,
                ctx.saved_tensors[7:],
                cotangents,
                ctx.num_tokens,
                ctx.wanted,
            )
            given = [g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)]
        else:
            factor = cotangents[0] / ctx.scale
            scaled = (
                torch.ops.lightning_qlora.scaled_gradient if compiled else functools.partial(_scaled, in_place=True)
            )
            given = [
                scaled(g, factor, dtype) if w else g
                for g, dtype, w in zip(gradients, ctx.dtypes, ctx.wanted, strict=True)
            ]
        grads = [g if w else None for g, w in zip(given, ctx.wanted, strict=True)]
        return (*grads, *[None] * (ctx.num_inputs - 3))


def _execute(
    plan: _Plan | int, hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None,
    invalid: Tensor | None, per_token: Sequence[Tensor], cotangents: list[Tensor], num_tokens: int,
    wanted: tuple[bool, bool, bool],
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:  # fmt: skip
    if isinstance(plan, int):
        return torch.ops.lightning_qlora.linear_loss(  # type: ignore[no-any-return]
            hidden, weight, bias, mask, invalid, list(per_token), cotangents, num_tokens, list(wanted), plan
        )
    return _run(plan, hidden, weight, bias, mask, invalid, per_token, cotangents, num_tokens, wanted)


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    *per_token: Tensor,
    loss: Loss,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    num_tokens: int | None = None,
    reduction: Reduction = "mean",
    denominator: float | Tensor | None = None,
    chunk_tokens: int | Literal["auto"] = "auto",
    weight_grad_dtype: torch.dtype | None = None,
    compile_loss: bool | None = None,
    check_finite: bool = False,
    invalid: Tensor | None = None,
    invalid_reason: str = "are invalid",
) -> Any:
    """``loss(hidden @ weight.T + bias, *per_token)`` over all tokens, of which only a chunk's logits exist at a time.

        loss_fn = functools.partial(losses.cross_entropy, label_smoothing=0.1)
        value = linear_loss(hidden, head.weight, labels, loss=loss_fn, mask=labels != -100)

    Under autocast the matrix products are in its dtype; ``loss`` itself runs with autocast off. The gradients of
    hidden, weight and bias are those of plain autograd. Derivatives of second order are refused.

    Args:
        hidden: [..., H], float16, bfloat16, float32 or float64.
        weight: [V, H], cast to the dtype of ``hidden`` (or autocast's) if it differs.
        per_token: Tensors [..., *] of hidden's leading shape, which ``loss`` gets in chunks [C, *]: labels, advantages,
            teacher logits. They get no gradient.
        loss: ``loss(logits [C, V], *chunks) -> result or tuple of results``. Logits come in the compute dtype; upcast
            them inside. A result is one value a token [C], which must not depend on other tokens, or the sum [] of such
            values. Results that require no gradient (``.detach()``, an accuracy) are metrics and cost nothing. On CUDA
            it is compiled, so that changing a setting that it encloses compiles again.
        bias: [V].
        mask: [...] bool, the tokens that count. The others are not projected, and cost nothing.
        num_tokens: How many tokens ``mask`` selects, where the host knows. Otherwise the number is read back from the
            device, once a call. A wrong number is refused on CPU and makes the results NaN on CUDA.
        reduction: ``"sum"``; ``"mean"``, that sum divided by ``denominator``; or ``"none"``, values [...] that are 0
            for tokens that do not count. It holds for metrics too.
        denominator: Of the mean: e.g. the number of tokens of the whole accumulation on all ranks. If not given, the
            number of tokens that count, or 1 if none does.
        chunk_tokens: Tokens a chunk, or ``"auto"`` (:func:`auto_chunk_tokens`). Values per token do not depend on it
            but for the rounding of matrix products.
        weight_grad_dtype: In which the weight's gradient is summed over chunks. Float32 (float64 for float64) if not
            given. With bfloat16 products, bfloat16 takes half the memory and rounds once a chunk. A 16-bit gradient
            of a float32 sum lies in the front of the sum's memory, which it keeps.
        compile_loss: Whether ``loss`` and its derivative are compiled into one kernel. If not given, on CUDA. Never
            with TORCH_COMPILE_DISABLE=1.
        check_finite: Raise if a result is not finite, and say what is to blame. The device is waited for. Not for
            float16 under a GradScaler, which expects such steps and skips them.
        invalid: [...] bool, counted tokens that ``loss`` must not see. Read together with the mask's number: an error
            where that is read, else NaN.
        invalid_reason: What is wrong with them, for the error.

    Returns:
        What ``loss`` returns, reduced: float32 tensors (float64 for float64).

    Raises:
        ValueError: If shapes, dtypes or options do not fit, ``loss`` returns something else or mixes tokens, the weight
            is a sharded DTensor, or as ``check_finite`` and ``invalid`` say.
    """
    _check(hidden, weight, bias, per_token, mask, invalid)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}.")
    if denominator is not None and reduction != "mean":
        raise ValueError(f"denominator divides the sum of reduction='mean'; with {reduction!r} nothing is divided.")
    if num_tokens is not None and mask is None:
        raise ValueError("num_tokens is the number of tokens that mask selects: pass mask too.")
    if chunk_tokens != "auto" and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1 or 'auto', got {chunk_tokens}.")
    device = hidden.device.type
    dtype = hidden.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    total_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    if weight_grad_dtype not in (None, total_dtype) and not weight_grad_dtype == dtype == torch.bfloat16:
        raise ValueError(
            f"weight_grad_dtype must be {total_dtype} for products in {dtype}, got {weight_grad_dtype}. Only sums of "
            "bfloat16 products may be kept in their own dtype: float16 would overflow."
        )
    compile_loss = (hidden.is_cuda if compile_loss is None else compile_loss) and not torch._dynamo.config.disable
    learns = torch.is_grad_enabled()
    wanted = (
        learns and hidden.requires_grad,
        learns and weight.requires_grad,
        learns and bias is not None and bias.requires_grad,
    )
    settings = (
        weight.shape[0], dtype, weight_grad_dtype or total_dtype, str(hidden.device),
        tuple((t.dtype, tuple(t.shape[hidden.ndim - 1 :])) for t in per_token),
        0 if chunk_tokens == "auto" else chunk_tokens, reduction, compile_loss, check_finite, invalid_reason,
        wanted[1],
    )  # fmt: skip
    plan: _Plan | int
    if torch.compiler.is_compiling():
        plan = _plan_number(loss, *settings)
        is_tuple, differentiable = _plan_facts(plan)
    else:
        plan = _make_plan(loss, *settings)
        is_tuple, differentiable = plan.is_tuple, plan.differentiable
    leading = hidden.shape[:-1]
    flat_mask = None if mask is None else mask.reshape(-1)
    results = _LinearLoss.apply(  # type: ignore[no-untyped-call]
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, flat_mask, None if invalid is None else invalid.reshape(-1),
        -1 if num_tokens is None else num_tokens, plan, wanted, differentiable, reduction == "none",
        _gradient_scale(dtype), *[t.detach().reshape(-1, *t.shape[hidden.ndim - 1 :]) for t in per_token],
    )  # fmt: skip
    if reduction == "none":
        results = tuple(result.reshape(leading) for result in results)
    elif reduction == "mean":
        if denominator is None:
            denominator = num_tokens if flat_mask is None or num_tokens is not None else flat_mask.sum().clamp(min=1)
            denominator = max(leading.numel(), 1) if flat_mask is None else denominator
            denominator = max(denominator, 1) if isinstance(denominator, int) else denominator
        results = tuple(result / denominator for result in results)
    return results if is_tuple else results[0]


def _check(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, per_token: Sequence[Tensor], mask: Tensor | None,
    invalid: Tensor | None,
) -> None:  # fmt: skip
    if isinstance(weight, DTensor) or isinstance(hidden, DTensor) or isinstance(bias, DTensor):
        name = "weight" if isinstance(weight, DTensor) else "hidden" if isinstance(hidden, DTensor) else "bias"
        raise ValueError(
            f"{name} is a DTensor, i.e. FSDP has not gathered it. Call the loss from the forward of the module that "
            "owns the weight (see LossHead), so that FSDP's hooks gather it first."
        )
    if not hidden.is_floating_point() or not weight.is_floating_point():
        raise ValueError(f"hidden ({hidden.dtype}) and weight ({weight.dtype}) must be of floating point.")
    if weight.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} does not fit weight {tuple(weight.shape)} [V, H].")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} must be [V] = [{weight.shape[0]}].")
    for i, tensor in enumerate(per_token):
        if tensor.shape[: hidden.ndim - 1] != hidden.shape[:-1]:
            raise ValueError(
                f"per-token tensor {i} {tuple(tensor.shape)} must have hidden's leading shape "
                f"{tuple(hidden.shape[:-1])}."
            )
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"per-token tensor {i} requires a gradient, but gets none here. Pass .detach() if that is meant."
            )
    for name, flags in (("mask", mask), ("invalid", invalid)):
        if flags is not None and (flags.dtype != torch.bool or flags.shape != hidden.shape[:-1]):
            raise ValueError(
                f"{name} must be bool of hidden's leading shape {tuple(hidden.shape[:-1])}, got {flags.dtype} "
                f"{tuple(flags.shape)}."
            )
