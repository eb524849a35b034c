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

``linear_loss_chunks`` has this loop, ``loss_gradient`` the loss of a chunk and its derivative, and ``linear_loss_ops``
the loop as an operator for an outer torch.compile. Here are the sizes, autograd and the public function.

Shapes: T tokens (all leading dimensions flattened), H hidden size, V vocabulary, C tokens in a chunk.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ._chunks import Inputs, Wanted, scaled_gradient
from ._gradient import Loss, Plan, Settings, make_plan
from ._operators import kinds_of, plan_number, returns_of, run, without_tensors

Reduction = Literal["mean", "sum", "none"]

#: Bytes that a chunk may take. Compiled, that is the logits in the compute dtype, for the gradient replaces them;
#: otherwise f's float32 intermediates too, about ``EAGER_BYTES_PER_LOGIT`` for each logit. A trained weight's gradient
#: is read and written once a chunk, so that fewer chunks are worth twice the bytes.
CHUNK_BUDGET_BYTES = 128 * 2**20

EAGER_BYTES_PER_LOGIT = 16


def _gradient_scale(dtype: torch.dtype) -> float:
    """What gradients of a chunk are multiplied by until the loss scale of mixed precision is known.

    A power of two is exact, and in float16 this one keeps probabilities down to 6e-11 from vanishing.
    """
    return 1024.0 if dtype == torch.float16 else 1.0  # literals: torch.compile(dynamic=True) makes global floats inputs


def auto_chunk_tokens(vocab_size: int, dtype: torch.dtype, *, compiled: bool, weight_learns: bool = False) -> int:
    """Most tokens whose chunk fits ``CHUNK_BUDGET_BYTES``, in multiples of 128 (the tiles of matrix products).

    A vocabulary of 128256 in 16 bit has 128256 * 2 bytes a token: 128 MiB hold 523 of them, so 512; with a weight that
    learns, 1024. Uncompiled it is 128256 * 18 bytes: 58 tokens, in multiples of 16 below 128, so 48. At least 16.
    """
    bytes_per_token = vocab_size * (dtype.itemsize + (0 if compiled else EAGER_BYTES_PER_LOGIT))
    tokens = CHUNK_BUDGET_BYTES * (2 if weight_learns else 1) // bytes_per_token
    return max(16, tokens // 128 * 128 if tokens >= 128 else tokens // 16 * 16)


# ------------------------------------------------------------------------------------------------------------ autograd


class _Call(NamedTuple):
    """All of a call that is no tensor."""

    plan: Plan | int  # while an outer graph is traced, its number
    differentiable: tuple[bool, ...]  # one entry a result
    wanted: Wanted
    gradient_in_forward: bool
    gradient_scale: float


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
        call: _Call,
        *per_token: Tensor,
    ) -> tuple[Tensor, ...]:
        now = call.wanted if call.gradient_in_forward else Wanted(False, False, False)
        inputs = Inputs(hidden, weight, bias, mask, invalid, list(per_token), num_tokens)
        results, *gradients = run(call.plan, inputs, [], now)
        ctx.call = call
        ctx.num_tokens = num_tokens
        ctx.dtypes = (hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype)
        ctx.num_inputs = 7 + len(per_token)
        # Not as saved tensors, but in a graph: the first backward hands these buffers over, scaled in place.
        in_graph = isinstance(call.plan, int)
        ctx.gradients = gradients if any(now) and not in_graph else None
        saved = gradients if any(now) and in_graph else (None, None, None)
        ctx.save_for_backward(*saved, hidden, weight, bias, mask, *per_token)
        ctx.mark_non_differentiable(*[r for r, d in zip(results, call.differentiable, strict=True) if not d])
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise ValueError(
                "create_graph=True: linear_loss has no second derivative, for the logits it would need are gone. Write "
                "the loss on the full logits where you need one."
            )
        call = ctx.call
        cotangents = [u for u, d in zip(upstream, call.differentiable, strict=True) if d]
        if isinstance(call.plan, int) and call.gradient_in_forward:
            made = ctx.saved_tensors[:3]
        else:
            made, ctx.gradients = ctx.gradients, None
        gradients = _computed_now(ctx, cotangents) if made is None else _scaled(ctx, made, cotangents[0])
        return (*gradients, *[None] * (ctx.num_inputs - 3))


def _scaled(ctx: Any, made: Sequence[Tensor], upstream: Tensor) -> list[Tensor | None]:
    """The gradients that forward made, times ``upstream`` [] or [T]."""
    factor = upstream / ctx.call.gradient_scale
    if isinstance(ctx.call.plan, int):
        scaled: Any = torch.ops.lightning_qlora.scaled_gradient
    else:
        scaled = functools.partial(scaled_gradient, in_place=True)
    triples = zip(made, ctx.dtypes, ctx.call.wanted, strict=True)
    return [scaled(gradient, factor, dtype) if wanted else None for gradient, dtype, wanted in triples]


def _computed_now(ctx: Any, cotangents: list[Tensor]) -> list[Tensor | None]:
    """The gradients from another pass over the chunks: forward made none, or a first backward has used them up."""
    hidden, weight, bias, mask, *per_token = ctx.saved_tensors[3:]
    inputs = Inputs(hidden, weight, bias, mask, None, per_token, ctx.num_tokens)
    _, *gradients = run(ctx.call.plan, inputs, cotangents, ctx.call.wanted)
    triples = zip(gradients, ctx.dtypes, ctx.call.wanted, strict=True)
    return [gradient.to(dtype) if wanted else None for gradient, dtype, wanted in triples]


# ------------------------------------------------------------------------------------------------------ the public call


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    *per_token: Tensor,
    loss: Loss,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    ignore_index: int | None = None,
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
        value = linear_loss(hidden, head.weight, labels, loss=loss_fn, ignore_index=-100)

    **The mean is over all tokens, unless ``ignore_index`` or ``mask`` says which count**, whatever the loss makes of
    ignored labels: with neither, a cross-entropy that is 0 for half of the tokens gives half the mean that is meant.

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
            it is compiled, so that changing a setting that it encloses compiles again. Inside torch.compile it must be
            a function without a closure, or a functools.partial of one (with dynamic=True, of no numbers), whose
            tensors are keyword arguments. Tensors that it encloses get no gradient.

            In float16 a token's derivative by a logit must stay below 64, for it is held times 1024 whatever the loss
            scale: cross-entropy's is at most 1, but a sharp temperature or a large z-loss or squared error may exceed
            it, and the gradient is then infinite in every step. Divide such a loss, and multiply the result.

            It is tried first on two made-up tokens: random logits, integers (labels) 0, booleans True, other numbers
            from 0 to 1. A loss that asserts something of its inputs must let those pass. It is tried again when a
            setting changes: None, bool, int, str or dtype in a partial, a closure, default arguments or an object's
            state. Floats and tensors change freely: let schedules have those, not integers. Of a changed global, or of
            a list, only another number or shape of results is noticed, **not that a sum has become a mean**.
        bias: [V].
        mask: [...] bool, the tokens that count. The others are not projected, and cost nothing: with half of 8192
            tokens ignored (H 2048, V 128256, bfloat16, frozen weight, one H200) forward and backward take 15.5 ms
            without a mask, 8.1 with it, and 8.0 with ``num_tokens`` too.
        ignore_index: Tokens do not count either where the first per-token tensor, of integers [...], is this.
        num_tokens: How many tokens count by ``mask`` and ``ignore_index``, where the host knows. Otherwise the number
            is read back from the device, once a call. A wrong number is refused on CPU, and makes results NaN on CUDA.
        reduction: ``"sum"``; ``"mean"``, that sum divided by ``denominator``; or ``"none"``, values [...] that are 0
            for tokens that do not count. It holds for metrics too.
        denominator: Of the mean: e.g. the number of tokens of the whole accumulation on all ranks; a number above 0, or
            a tensor [], of which 0 counts as 1: no token at all is a loss of 0. If not given, the number of tokens that
            count, or 1 if none does.
        chunk_tokens: Tokens a chunk, or ``"auto"`` (:func:`auto_chunk_tokens`). Values per token do not depend on it
            but for the rounding of matrix products.
        weight_grad_dtype: In which the weight's gradient is summed over chunks. Float32 (float64 for float64) if not
            given. With bfloat16 products, bfloat16 takes half the memory and rounds once a chunk. A 16-bit gradient
            of a float32 sum lies in the front of the sum's memory, which it keeps.
        compile_loss: Whether ``loss`` and its derivative are compiled into one kernel. If not given, on CUDA. Never
            with TORCH_COMPILE_DISABLE=1.
        check_finite: Raise if a result is not finite, and say what is to blame. The device is waited for. Not for
            float16 under a GradScaler, which expects such steps and skips them. Without it, what is not finite shows in
            the results: also a label outside [0, V) that is not ignored, which the shipped losses make NaN.
        invalid: [...] bool, counted tokens that ``loss`` must not see. Read together with the mask's number: an error
            where that is read, else NaN.
        invalid_reason: What is wrong with them, for the error.

    Returns:
        What ``loss`` returns, reduced: float32 tensors (float64 for float64).

    Raises:
        ValueError: If shapes, dtypes, devices or options do not fit, ``loss`` returns something else or mixes tokens,
            the weight is a sharded DTensor, or as ``check_finite`` and ``invalid`` say.
    """
    _check_tensors(hidden, weight, bias, per_token, mask, invalid)
    if ignore_index is not None:
        counts = _first_integers(per_token, hidden.shape[:-1]) != ignore_index
        mask = counts if mask is None else mask & counts
    device, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    result_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    weight_grad_dtype = weight_grad_dtype or result_dtype
    _check_options(mask, num_tokens, reduction, denominator, chunk_tokens)
    _check_weight_grad_dtype(weight_grad_dtype, result_dtype, dtype)

    compile_loss = (hidden.is_cuda if compile_loss is None else compile_loss) and not torch._dynamo.config.disable
    learns = torch.is_grad_enabled()
    wanted = Wanted(
        hidden=learns and hidden.requires_grad,
        weight=learns and weight.requires_grad,
        bias=learns and bias is not None and bias.requires_grad,
    )
    leading = hidden.shape[:-1]
    vocab_size = operator.index(weight.shape[0])  # torch.compile(dynamic=True) makes sizes symbols; only T may be one
    shapes = [tuple(map(operator.index, tensor.shape[len(leading) :])) for tensor in per_token]
    if chunk_tokens != "auto":
        chunk_tokens = operator.index(chunk_tokens)
    else:
        chunk_tokens = auto_chunk_tokens(vocab_size, dtype, compiled=compile_loss, weight_learns=wanted.weight)
    settings = Settings(
        vocab_size=vocab_size,
        dtype=dtype,
        result_dtype=result_dtype,
        weight_grad_dtype=weight_grad_dtype,
        device=str(hidden.device),
        per_token=tuple((tensor.dtype, shape) for tensor, shape in zip(per_token, shapes, strict=True)),
        chunk_tokens=chunk_tokens,
        gradient_scale=_gradient_scale(dtype),
        reduce=reduction != "none",
        compile=compile_loss,
        check_finite=check_finite,
        invalid_reason=invalid_reason,
    )
    plan: Plan | int
    enclosed: dict[str, Tensor] = {}
    if torch.compiler.is_compiling():
        loss, enclosed = without_tensors(loss)
        plan = plan_number(loss, tuple(settings), kinds_of(enclosed))
        returns = returns_of(plan)
    else:
        plan = make_plan(loss, settings)
        returns = plan.returns
    one_factor = sum(returns.differentiable) == 1 and (settings.reduce or not (wanted.weight or wanted.bias))
    call = _Call(plan, returns.differentiable, wanted, one_factor, settings.gradient_scale)

    flat_mask = None if mask is None else mask.reshape(-1)
    results = _LinearLoss.apply(  # type: ignore[no-untyped-call]
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        flat_mask,
        None if invalid is None else invalid.reshape(-1),
        -1 if num_tokens is None else num_tokens,
        call,
        *[tensor.detach().reshape(-1, *shape) for tensor, shape in zip(per_token, shapes, strict=True)],
        *enclosed.values(),
    )
    if reduction == "none":
        results = tuple(result.reshape(leading) for result in results)
    elif reduction == "mean":
        if denominator is None:
            denominator = _number_that_counts(leading.numel(), flat_mask, num_tokens)
        elif isinstance(denominator, Tensor):
            denominator = torch.where(denominator == 0, 1, denominator)
        results = tuple(result / denominator for result in results)
    return results if returns.is_tuple else results[0]


def _number_that_counts(tokens: int, mask: Tensor | None, num_tokens: int | None) -> int | Tensor:
    """How many tokens the mean is over, at least 1."""
    if mask is None:
        return max(tokens, 1)
    return mask.sum().clamp(min=1) if num_tokens is None else max(num_tokens, 1)


def _first_integers(per_token: Sequence[Tensor], leading: torch.Size) -> Tensor:
    """The per-token tensor that ``ignore_index`` is looked for in."""
    labels = per_token[0] if per_token else None
    if labels is None or labels.is_floating_point() or labels.dtype == torch.bool or labels.shape != leading:
        found = "there is none" if labels is None else f"it is {labels.dtype} {tuple(labels.shape)}"
        raise ValueError(
            f"ignore_index is looked for in the first per-token tensor, which must be of integers {tuple(leading)}, "
            f"but {found}. Pass the labels first, or say by mask= which tokens count."
        )
    return labels


def _check_tensors(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    per_token: Sequence[Tensor],
    mask: Tensor | None,
    invalid: Tensor | None,
) -> None:
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
    others = {"weight": weight, "bias": bias, "mask": mask, "invalid": invalid}
    others |= {f"per-token tensor {i}": tensor for i, tensor in enumerate(per_token)}
    for name, other in others.items():
        if other is not None and other.device != hidden.device:
            raise ValueError(f"{name} is on {other.device}, but hidden on {hidden.device}. Move both to one device.")
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


def _check_options(
    mask: Tensor | None,
    num_tokens: int | None,
    reduction: Reduction,
    denominator: float | Tensor | None,
    chunk_tokens: int | Literal["auto"],
) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}.")
    if denominator is not None and reduction != "mean":
        raise ValueError(f"denominator divides the sum of reduction='mean'; with {reduction!r} nothing is divided.")
    if denominator is not None and not isinstance(denominator, Tensor) and not denominator > 0:
        raise ValueError(f"denominator must be above 0, got {denominator}: the sum is divided by it.")
    if num_tokens is not None and mask is None:
        raise ValueError("num_tokens is how many tokens count by mask or ignore_index: pass mask too, or ignore_index.")
    if chunk_tokens != "auto" and (type(chunk_tokens) is not int or chunk_tokens < 1):
        raise ValueError(f"chunk_tokens must be at least 1 or 'auto', got {chunk_tokens!r}. Tokens are whole.")


def _check_weight_grad_dtype(wanted: torch.dtype, result_dtype: torch.dtype, dtype: torch.dtype) -> None:
    if wanted != result_dtype and not wanted == dtype == torch.bfloat16:
        raise ValueError(
            f"weight_grad_dtype must be {result_dtype} for products in {dtype}, got {wanted}. Only sums of "
            "bfloat16 products may be kept in their own dtype: float16 would overflow."
        )
