"""The chunk loop of ``linear_loss`` as operators, so that a graph of an outer torch.compile can hold it.

An operator takes no Python function: a graph refers to loss and settings by number, which is found while it is traced.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_qlora.modules.autograd_in_operators import with_autograd
from lightning_qlora.modules.linear_loss_chunks import Inputs, Outcome, Wanted, run_chunks, scaled_gradient
from lightning_qlora.modules.loss_gradient import Loss, Plan, Returns, Settings, make_plan

_PLANS: list[Plan] = []


@torch._dynamo.assume_constant_result
def plan_number(loss: Loss, settings: tuple[Any, ...]) -> int:
    """The number of a plan, while an outer graph is traced.

    Args:
        loss: A function, or a partial of one.
        settings: The fields of :class:`Settings`. As a plain tuple, for Dynamo evaluates no named one.

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
        plan = make_plan(loss, Settings(*settings))
    for number, other in enumerate(_PLANS):
        if _same_plan(plan, other):
            return number
    _PLANS.append(plan)
    return len(_PLANS) - 1


def _same_plan(a: Plan, b: Plan) -> bool:
    def parts(loss: Any) -> Any:  # two partials of equal parts are not equal
        is_partial = isinstance(loss, functools.partial)
        return (loss.func, loss.args, tuple(loss.keywords.items())) if is_partial else loss

    return a.settings == b.settings and bool(parts(a.loss) == parts(b.loss))


@torch._dynamo.assume_constant_result
def returns_of(number: int) -> Returns:
    """What the loss of a plan returns."""
    return _PLANS[number].returns


# ----------------------------------------------------------------------------------------------------------- operators

torch.library.define(
    "lightning_qlora::linear_loss",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor? mask, Tensor? invalid, Tensor[] per_token, "
    "SymInt num_tokens, Tensor[] cotangents, bool[] wanted, int plan) -> (Tensor[], Tensor, Tensor, Tensor)",
)
torch.library.define("lightning_qlora::scaled_gradient", "(Tensor gradient, Tensor factor, ScalarType dtype) -> Tensor")


def run(plan: Plan | int, inputs: Inputs, cotangents: Sequence[Tensor], wanted: Wanted) -> Outcome:
    """:func:`run_chunks`, for the number of a plan as an operator."""
    if isinstance(plan, int):
        outcome = torch.ops.lightning_qlora.linear_loss(*inputs, list(cotangents), list(wanted), plan)
        return Outcome(*outcome)
    return run_chunks(plan, inputs, cotangents, wanted)


def _linear_loss(*arguments: Any) -> Outcome:
    """``arguments`` as in the schema: those of :class:`Inputs`, then cotangents, wanted and plan."""
    inputs, (cotangents, wanted, number) = Inputs(*arguments[:-3]), arguments[-3:]
    work = functools.partial(run_chunks, _PLANS[number], inputs, cotangents, Wanted(*wanted))
    return with_autograd(work, inputs.hidden.device)


def _linear_loss_fake(*arguments: Any) -> tuple[Any, ...]:
    inputs, (_, wanted, number) = Inputs(*arguments[:-3]), arguments[-3:]
    hidden, weight, wanted = inputs.hidden, inputs.weight, Wanted(*wanted)
    settings, returns = _PLANS[number].settings, _PLANS[number].returns
    shapes = [hidden.shape[:1] if kept and not settings.reduce else () for kept in returns.per_token]
    return (
        [hidden.new_empty(shape, dtype=settings.result_dtype) for shape in shapes],
        torch.empty_like(hidden) if wanted.hidden else hidden.new_empty(0),
        torch.empty_like(weight, dtype=settings.weight_grad_dtype) if wanted.weight else weight.new_empty(0),
        weight.new_empty(weight.shape[0] if wanted.bias else 0, dtype=settings.result_dtype),
    )


def _scaled_new(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return scaled_gradient(gradient, factor, dtype, in_place=False)


def _scaled_fake(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(gradient, dtype=dtype)


torch.library.impl("lightning_qlora::linear_loss", "default", _linear_loss)
torch.library.impl("lightning_qlora::scaled_gradient", "default", _scaled_new)
torch.library.register_fake("lightning_qlora::linear_loss", _linear_loss_fake)
torch.library.register_fake("lightning_qlora::scaled_gradient", _scaled_fake)
