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
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

Loss = Callable[..., Tensor | tuple[Tensor, ...]]
Reduction = Literal["mean", "sum", "none"]

#: Bytes that a chunk may take. Compiled, that is the logits in the compute dtype, for the gradient replaces them;
#: otherwise f's float32 intermediates too, about ``EAGER_BYTES_PER_LOGIT`` each.
CHUNK_BUDGET_BYTES = 96 * 2**20
EAGER_BYTES_PER_LOGIT = 16

#: Gradients of a chunk are computed before the loss scale of mixed precision is known. In float16 they are carried
#: multiplied by this power of two (an exact factor), which keeps probabilities down to 6e-11 from vanishing.
FP16_GRADIENT_SCALE = 1024.0


def auto_chunk_tokens(vocab_size: int, dtype: torch.dtype, *, compiled: bool) -> int:
    """Most tokens whose chunk fits ``CHUNK_BUDGET_BYTES``, in multiples of 128 (the tiles of matrix products).

    A vocabulary of 128256 in 16 bit has 128256 * 2 bytes a token: 96 MiB hold 392 of them, so 384. Uncompiled it is
    128256 * 18 bytes: 43 tokens, in multiples of 16 below 128, so 32. At least 16.
    """
    bytes_per_token = vocab_size * (dtype.itemsize + (0 if compiled else EAGER_BYTES_PER_LOGIT))
    tokens = CHUNK_BUDGET_BYTES // bytes_per_token
    return max(16, tokens // 128 * 128 if tokens >= 128 else tokens // 16 * 16)


# ------------------------------------------------------------------------------------------- one chunk's loss, by autograd


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


def _differentiate(
    loss: Loss,
    logits: Tensor,
    per_token: Sequence[Tensor],
    differentiable: Sequence[bool],
    cotangents: Sequence[Tensor | float],
) -> tuple[Tensor, ...]:
    """Results of ``loss``; ``logits`` is overwritten with the gradient of the sum of cotangents times results."""

    def weighted(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        results = _results(loss, x, per_token)
        wanted = [result for result, is_wanted in zip(results, differentiable, strict=True) if is_wanted]
        total = sum((result * weight).sum() for result, weight in zip(wanted, cotangents, strict=True))
        return total, tuple(result.detach() for result in results)  # type: ignore[return-value]

    gradient, (_, results) = torch.func.grad_and_value(weighted, has_aux=True)(logits)
    logits.copy_(gradient)
    return results


def _differentiate_fusable(*args: Any) -> tuple[Tensor, ...]:
    with _FusableGather():
        return _differentiate(*args)


@functools.cache
def _compiled(function: types.FunctionType, key: Any) -> Callable[..., Any]:
    """``function`` compiled for the losses of one ``key``.

    A code object of its own gives each loss its own cache, so that many losses do not share one recompile limit.
    """
    copy = types.FunctionType(
        function.__code__.replace(co_name=f"{function.__name__}_{_compiled.cache_info().misses}"),
        function.__globals__, closure=function.__closure__,
    )  # fmt: skip
    # Rows are few and long. Splitting a row's sum over blocks would cost the fusion with what reads the row again.
    return torch.compile(copy, fullgraph=True, options={"split_reductions": False})


def _code(loss: Any) -> Any:
    """What identifies a loss's program: closures and settings may differ, which torch.compile's guards notice."""
    if isinstance(loss, functools.partial):
        return _code(loss.func)
    return getattr(loss, "__code__", None) or type(loss)


def _call(plan: _Plan, function: Any, logits: Tensor, per_token: Sequence[Tensor], *more: Any) -> tuple[Tensor, ...]:
    """``function(loss, logits, ...)``, compiled if the plan says so.

    Not under a dispatch mode (which wants to see operations, and which torch.compile itself uses while it inspects an
    outer graph's first run), and not for a single row, for which Dynamo would specialize.
    """
    if not plan.compile or logits.shape[0] < 2 or torch._C._len_torch_dispatch_stack() > 0:
        return function(plan.loss, logits, per_token, *more)  # type: ignore[no-any-return]
    for tensor in (logits, *per_token, *(t for group in more for t in group if isinstance(t, Tensor) and t.ndim)):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    function = _differentiate_fusable if function is _differentiate else function
    key = (_code(plan.loss), logits.shape[1], logits.dtype)
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
) -> _Plan:
    key = (_code(loss), vocab_size, dtype, device, tensors)
    if key not in _PROBED:
        with torch.autocast(device.partition(":")[0], enabled=False):
            _PROBED[key] = _probe(loss, vocab_size, dtype, device, tensors)
    per_token, differentiable, is_tuple = _PROBED[key]
    if reduction == "none" and not all(per_token):
        raise ValueError("reduction='none' needs a loss that returns one value a token [C]; this one returns a sum.")
    chunk_tokens = chunk_tokens or auto_chunk_tokens(vocab_size, dtype, compiled=compile)
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
def _plan_facts(number: int) -> tuple[bool, int, int, int]:
    """Whether the results are a tuple; and, as bits, which are per token, reduced and differentiable."""
    plan = _PLANS[number]
    bits = [sum(1 << i for i, is_set in enumerate(flags) if is_set) for flags in (plan.per_token, plan.differentiable)]
    return plan.is_tuple, len(plan.per_token), bits[0], bits[1]
