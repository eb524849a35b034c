"""The chunk loop of ``linear_loss`` as operators, so that a graph of an outer torch.compile can hold it.

An operator takes no Python function: a graph refers to loss and settings by number, which is found while it is traced.
Tensors of a functools.partial are inputs of the graph, so that they may change and nothing keeps them.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import types
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..autograd_in_operators import with_autograd
from ._chunks import Inputs, Outcome, Wanted, run_chunks, scaled_gradient
from ._gradient import Loss, Plan, Returns, Settings, make_plan


class _Traced(NamedTuple):
    plan: Plan  # whose loss lacks these keyword arguments:
    tensors: tuple[str, ...]


_PLANS: list[_Traced] = []


def without_tensors(loss: Loss) -> tuple[Loss, dict[str, Tensor]]:
    """``loss`` without the tensors among a partial's keyword arguments, and these, detached. Dynamo can trace it."""
    if not isinstance(loss, functools.partial):
        return loss, {}
    tensors = {name: value.detach() for name, value in loss.keywords.items() if isinstance(value, Tensor)}
    others = {name: value for name, value in loss.keywords.items() if not isinstance(value, Tensor)}
    if _hold_tensors(loss.args) or _hold_tensors(others):
        refuse_tensors()
    return functools.partial(loss.func, *loss.args, **others), tensors


def _hold_tensors(value: Any) -> bool:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return any(isinstance(part, Tensor) or _hold_tensors(part) for part in values)


@torch._dynamo.assume_constant_result  # an error that Dynamo traces would lose its text
def refuse_tensors() -> None:
    """Raise ValueError."""
    raise ValueError(
        "Inside torch.compile, a tensor in a loss must be a keyword argument of its functools.partial, not a "
        "positional one or inside a list, tuple or dict: a compiled graph would keep the one that is there now. Pass "
        "each as a keyword argument of its own."
    )


def kinds_of(tensors: dict[str, Tensor]) -> tuple[tuple[str, torch.dtype, str, tuple[int, ...]], ...]:
    """Name, dtype, device and shape of each, as constants for :func:`plan_number`."""
    # torch.compile(dynamic=True) makes sizes symbols
    return tuple((name, t.dtype, str(t.device), tuple(map(operator.index, t.shape))) for name, t in tensors.items())


@torch._dynamo.assume_constant_result
def plan_number(
    loss: Loss, settings: tuple[Any, ...], tensors: tuple[tuple[str, torch.dtype, str, tuple[int, ...]], ...] = ()
) -> int:
    """The number of a plan, while an outer graph is traced.

    Args:
        loss: A function, or a partial of one, that encloses no tensors.
        settings: The fields of :class:`Settings`. As a plain tuple, for Dynamo evaluates no named one.
        tensors: :func:`kinds_of` the tensors that ``loss`` gets as keyword arguments besides. The operator takes them
            behind the per-token ones.

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
        # Values are not known yet, and the loss may look at all of them: whole tensors, for as long as it is probed.
        made_up = {
            name: torch.full(shape, kind.is_floating_point or kind == torch.bool, dtype=kind, device=device)
            for name, kind, device, shape in tensors
        }
        plan = make_plan(functools.partial(loss, **made_up) if made_up else loss, Settings(*settings))
    traced = _Traced(dataclasses.replace(plan, loss=loss), tuple(made_up))
    for number, other in enumerate(_PLANS):
        if _same_plan(traced, other):
            return number
    _PLANS.append(traced)
    return len(_PLANS) - 1


def _same_plan(a: _Traced, b: _Traced) -> bool:
    def parts(loss: Any) -> Any:  # two partials of equal parts are not equal
        is_partial = isinstance(loss, functools.partial)
        return (loss.func, loss.args, tuple(loss.keywords.items())) if is_partial else loss

    same_inputs = a.plan.settings == b.plan.settings and a.tensors == b.tensors
    return same_inputs and a.plan.returns == b.plan.returns and bool(parts(a.plan.loss) == parts(b.plan.loss))


@torch._dynamo.assume_constant_result
def returns_of(number: int) -> Returns:
    """What the loss of a plan returns."""
    return _PLANS[number].plan.returns


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
    plan, names = _PLANS[number]
    if names:
        per_token, tensors = inputs.per_token[: -len(names)], inputs.per_token[-len(names) :]
        loss = functools.partial(plan.loss, **dict(zip(names, tensors, strict=True)))
        plan, inputs = dataclasses.replace(plan, loss=loss), inputs._replace(per_token=per_token)
    work = functools.partial(run_chunks, plan, inputs, cotangents, Wanted(*wanted))
    return with_autograd(work, inputs.hidden.device)


def _linear_loss_fake(*arguments: Any) -> tuple[Any, ...]:
    inputs, (_, wanted, number) = Inputs(*arguments[:-3]), arguments[-3:]
    hidden, weight, wanted = inputs.hidden, inputs.weight, Wanted(*wanted)
    settings, returns = _PLANS[number].plan.settings, _PLANS[number].plan.returns
    shapes = [hidden.shape[:1] if kept and not settings.reduce else () for kept in returns.per_token]
    return (
        [hidden.new_empty(shape, dtype=settings.result_dtype) for shape in shapes],
        torch.empty_like(hidden) if wanted.hidden else hidden.new_empty(0),
        weight.new_empty(weight.shape if wanted.weight else 0, dtype=settings.weight_grad_dtype),
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
