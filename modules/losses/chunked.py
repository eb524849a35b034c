"""Any loss of ``hidden @ weight.T``, chunk by chunk of tokens, without holding the logits of all tokens.

Value and gradient of a chunk are computed while its logits exist, by autograd, from the user's loss f:

    logits = x @ W.T                            [C, V]   matrix product into one buffer
    f(logits), d f / d logits                   [C, V]   one compiled kernel, the gradient replaces the logits
    dX[chunk] = dlogits @ W                     [C, H]
    dW += dlogits.T @ x                         [V, H]   only if something needs it

The scalar that the loss is multiplied with later (loss scaling, 1/tokens, its weight among several losses) is not known
yet, but enters linearly: backward multiplies. Where it is not one scalar (several results with a gradient, or one value
per token with a trained weight), forward keeps no gradient, and backward goes through the chunks again with the true
upstream gradient, which costs one more matrix product.

Here are the arguments, the sizes and autograd; ``_loop.py`` has the loop, ``_user_loss.py`` the loss of one chunk.

Shapes: T tokens (all leading dimensions flattened), H hidden size, V vocabulary, C tokens in a chunk.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ._loop import Inputs, Wanted, plan_of, run, scaled_gradient
from ._user_loss import Loss, Plan, Settings
from .functional import cross_entropy

Reduction = Literal["mean", "sum", "none"]

#: Bytes that a chunk may take. Compiled, these are the logits in the compute dtype, which the gradient replaces;
#: otherwise f's float32 intermediates too, about ``EAGER_BYTES_PER_LOGIT`` per logit. Twice as much with a trained
#: weight, because each chunk reads and writes the whole gradient of the weight.
CHUNK_BUDGET_BYTES = 128 * 2**20

EAGER_BYTES_PER_LOGIT = 16


def auto_chunk_tokens(vocab_size: int, dtype: torch.dtype, *, compiled: bool, weight_learns: bool = False) -> int:
    """Most tokens whose chunk fits ``CHUNK_BUDGET_BYTES``, in multiples of 128 (the tiles of matrix products).

    A vocabulary of 128256 in 16 bit has 128256 * 2 bytes a token: 128 MiB hold 523 of them, so 512; with a weight that
    learns, 1024. Uncompiled it is 128256 * 18 bytes: 58 tokens, in multiples of 16 below 128, so 48. At least 16.
    """
    bytes_per_token = vocab_size * (dtype.itemsize + (0 if compiled else EAGER_BYTES_PER_LOGIT))
    tokens = CHUNK_BUDGET_BYTES * (2 if weight_learns else 1) // bytes_per_token
    return max(16, tokens // 128 * 128 if tokens >= 128 else tokens // 16 * 16)


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
    """``loss(hidden @ weight.T + bias, *per_token)`` over all tokens, of which only one chunk's logits exist at a time.

        smoothed = functools.partial(cross_entropy, label_smoothing=0.1, z_loss=1e-4)
        value = linear_loss(hidden, head.weight, labels, loss=smoothed, ignore_index=-100)

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
            them inside. A result is one value per token [C], which must not depend on other tokens, or the sum [] of
            such values. Results that require no gradient (``.detach()``, an accuracy) are metrics and cost nothing. On
            CUDA the loss is compiled, again when a setting that it encloses changes. Inside torch.compile it must be a
            function without a closure, or a functools.partial of one (with dynamic=True, without numbers), whose
            tensors are keyword arguments.

            In float16 a token's derivative by a logit must stay below 64, because it is held times 1024 whatever the
            loss scale: cross-entropy's is at most 1, but a sharp temperature or a large z-loss or squared error may
            exceed it, and the gradient is then infinite in every step. Divide such a loss, and multiply the result.

            The loss is first tried on two made-up tokens: random logits, integers (labels) 0, booleans True, other
            numbers from 0 to 1. If it asserts something of its inputs, it must let those pass. It is tried again when a
            setting changes: None, bool, int, str or dtype in a partial, a closure, default arguments or an object's
            state. Floats and tensors change freely: let schedules have those, not integers. Of a changed global or list
            only another number or shape of results is noticed, **not that a sum has become a mean**.

            A loss that depends on another tensor that requires a gradient (a parameter of a loss module, a closure's)
            is refused, because the tensor would get none. That is found when the loss is tried, and when a tensor in
            one of the places above begins to require a gradient later; not when one elsewhere (in a global) does.
        bias: [V].
        mask: [...] bool, the tokens that count. The others are not projected, and cost nothing: with half of 8192
            tokens ignored (H 2048, V 128256, bfloat16, frozen weight, one H200) forward and backward take 15.5 ms
            without a mask, 8.1 with it, and 8.0 with ``num_tokens`` too.
        ignore_index: Tokens do not count either where the first per-token tensor, of integers [...], has this value.
        num_tokens: How many tokens count by ``mask`` and ``ignore_index``, where the host knows. Otherwise the number
            is read back from the device, once per call. A wrong number is refused on CPU and makes results NaN on CUDA.
        reduction: ``"sum"``; ``"mean"``, that sum divided by ``denominator``; or ``"none"``, values [...] that are 0
            for tokens that do not count. It holds for metrics too.
        denominator: Of the mean, e.g. the number of tokens of the whole accumulation on all ranks: a number above 0, or
            a tensor [], of which 0 counts as 1. Default: the number of tokens that count, or 1 if none does.
        chunk_tokens: Tokens per chunk, or ``"auto"`` (:func:`auto_chunk_tokens`). Values per token do not depend on it
            except for the rounding of matrix products.
        weight_grad_dtype: In which the weight's gradient is summed over chunks. Default: float32 (float64 for float64).
            With bfloat16 products, bfloat16 takes half the memory and rounds once per chunk. A 16-bit gradient of a
            float32 sum lies in the front of the sum's memory, which stays allocated.
        compile_loss: Whether ``loss`` and its derivative are compiled into one kernel. Default: on CUDA. Never with
            TORCH_COMPILE_DISABLE=1.
        check_finite: Wait for the device, and raise if a result is not finite, with what is to blame. Not for float16
            under a GradScaler, which expects such steps and skips them. Without it, what is not finite shows in the
            results: also a label outside [0, V) that is not ignored, which the losses of this package make NaN.
        invalid: [...] bool, counted tokens that ``loss`` must not see: an error where the host reads the number of
            tokens, else the results are NaN.
        invalid_reason: What is wrong with them, for the error.

    Returns:
        What ``loss`` returns, reduced: float32 tensors (float64 for float64).

    Raises:
        ValueError: If shapes, dtypes, devices or options do not fit; if ``loss`` returns something else, mixes tokens
            or depends on another tensor that requires a gradient; if the weight is a sharded DTensor; or as
            ``check_finite`` and ``invalid`` say.
    """
    leading = hidden.shape[:-1]
    _check_tensors(hidden, weight, bias, per_token, {"mask": mask, "invalid": invalid})
    if ignore_index is not None:
        counts = _first_integers(per_token, leading) != ignore_index
        mask = counts if mask is None else mask & counts
    device, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    result_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    weight_grad_dtype = weight_grad_dtype or result_dtype
    _check_options(mask is not None, num_tokens, reduction, denominator, chunk_tokens)
    if weight_grad_dtype != result_dtype and not weight_grad_dtype == dtype == torch.bfloat16:
        raise ValueError(
            f"weight_grad_dtype must be {result_dtype} for products in {dtype}, got {weight_grad_dtype}. Only sums of "
            "bfloat16 products may be kept in their own dtype: float16 would overflow."
        )

    compile_loss = (hidden.is_cuda if compile_loss is None else compile_loss) and not torch._dynamo.config.disable
    learns = torch.is_grad_enabled()
    wanted = Wanted(
        hidden=learns and hidden.requires_grad,
        weight=learns and weight.requires_grad,
        bias=learns and bias is not None and bias.requires_grad,
    )
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
        # Until the loss scale of mixed precision is known. A power of two is exact, and in float16 this one keeps
        # probabilities down to 6e-11 from vanishing. Literals: torch.compile(dynamic=True) makes global floats inputs.
        gradient_scale=1024.0 if dtype == torch.float16 else 1.0,
        reduce=reduction != "none",
        compile=compile_loss,
        check_finite=check_finite,
        invalid_reason=invalid_reason,
    )
    plan, returns, enclosed = plan_of(loss, settings)
    one_factor = sum(returns.differentiable) == 1 and (settings.reduce or not (wanted.weight or wanted.bias))
    flat_mask = None if mask is None else mask.reshape(-1)
    results = _LinearLoss.apply(  # type: ignore[no-untyped-call]
        _Call(plan, returns.differentiable, wanted, one_factor, settings.gradient_scale),
        -1 if num_tokens is None else num_tokens,
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        flat_mask,
        None if invalid is None else invalid.reshape(-1),
        *[tensor.detach().reshape(-1, *shape) for tensor, shape in zip(per_token, shapes, strict=True)],
        *enclosed,
    )
    if reduction == "none":
        results = tuple(result.reshape(leading) for result in results)
    elif reduction == "mean":
        if isinstance(denominator, Tensor):
            denominator = torch.where(denominator == 0, 1, denominator)
        elif denominator is None and flat_mask is not None and num_tokens is None:
            denominator = flat_mask.sum().clamp(min=1)
        elif denominator is None:
            denominator = max(leading.numel() if num_tokens is None else num_tokens, 1)
        results = tuple(result / denominator for result in results)
    return results if returns.is_tuple else results[0]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    num_tokens: int | None = None,
    reduction: Reduction = "mean",
    chunk_tokens: int | Literal["auto"] = "auto",
) -> Tensor:
    """:func:`linear_loss` of :func:`~.functional.cross_entropy`, which explains the arguments that are not listed here.

    Args:
        hidden: [..., H].
        weight: [V, H].
        labels: [...], int64 in [0, V) or ``ignore_index``: tokens that are not projected; the mean is over the others.
        bias: [V].
        ignore_index: Label of tokens that do not count.
        num_tokens: How many labels count, where the host knows. Otherwise it waits for the device.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        chunk_tokens: Tokens per chunk, or ``"auto"``.

    Raises:
        ValueError: As ``linear_loss``; if ``labels`` are not int64; and if one is neither in [0, V) nor
            ``ignore_index`` or ``num_tokens`` is wrong, where that is known without waiting for the device. Where it
            is not, the loss is NaN instead.
    """
    checks = checks_of_labels(labels, weight.shape[0], ignore_index)
    return linear_loss(  # type: ignore[no-any-return]
        hidden, weight, labels, loss=cross_entropy, bias=bias, num_tokens=num_tokens, reduction=reduction,
        chunk_tokens=chunk_tokens, **checks,
    )  # fmt: skip


def checks_of_labels(labels: Tensor, vocab_size: int, ignore_index: int) -> dict[str, Any]:
    """Arguments of :func:`linear_loss` for int64 ``labels`` [...] that are in [0, V), or ``ignore_index``: not counted.

    Raises:
        ValueError: If labels are not int64.
    """
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be class indices of int64, got {labels.dtype}.")
    return {
        "mask": labels != ignore_index,
        "invalid": (labels < 0) | (labels >= vocab_size),
        "invalid_reason": "have a label outside [0, V) that is not ignore_index",
    }


# ------------------------------------------------------------------------------------------------------------ autograd


class _Call(NamedTuple):
    """Everything about a call that is not a tensor."""

    plan: Plan | int  # while an outer graph is traced, its number
    differentiable: tuple[bool, ...]  # one entry per result
    wanted: Wanted
    gradient_in_forward: bool
    gradient_scale: float


class _LinearLoss(torch.autograd.Function):
    """Gradients are made in forward where one scalar (or one per row) will scale them, else in backward."""

    @staticmethod
    def forward(ctx: Any, call: _Call, num_tokens: int, *tensors: Any) -> tuple[Tensor, ...]:
        hidden, weight, bias, mask, invalid, *per_token = tensors
        now = call.wanted if call.gradient_in_forward else Wanted(False, False, False)
        inputs = Inputs(hidden, weight, bias, mask, invalid, per_token, num_tokens)
        results, *gradients = run(call.plan, inputs, [], now)
        ctx.call, ctx.num_tokens, ctx.num_tensors = call, num_tokens, len(tensors)
        ctx.dtypes = (hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype)
        # Saved tensors in a graph; otherwise not, because the first backward hands these buffers over, scaled in place.
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
                "create_graph=True: linear_loss has no second derivative, because the logits it would need are gone. "
                "Write the loss on the full logits where you need one."
            )
        call, in_graph = ctx.call, isinstance(ctx.call.plan, int)
        cotangents = [u for u, d in zip(upstream, call.differentiable, strict=True) if d]
        gradients, ctx.gradients = ctx.gradients, None
        if in_graph and call.gradient_in_forward:
            gradients = ctx.saved_tensors[:3]
        if gradients is None:  # forward made none, or a first backward has used them up
            hidden, weight, bias, mask, *per_token = ctx.saved_tensors[3:]
            inputs = Inputs(hidden, weight, bias, mask, None, per_token, ctx.num_tokens)
            _, *gradients = run(call.plan, inputs, cotangents, call.wanted)
            factor = None
        else:
            factor = cotangents[0] / call.gradient_scale
        finished: list[Tensor | None] = []
        for gradient, dtype, wanted in zip(gradients, ctx.dtypes, call.wanted, strict=True):
            if not wanted:
                finished.append(None)
            elif factor is None:
                finished.append(gradient.to(dtype))
            elif in_graph:
                finished.append(torch.ops.lightning_qlora.scaled_gradient(gradient, factor, dtype))
            else:
                finished.append(scaled_gradient(gradient, factor, dtype, in_place=True))
        return (None, None, *finished, *[None] * (ctx.num_tensors - 3))


# -------------------------------------------------------------------------------------------------------------- checks


def _first_integers(per_token: Sequence[Tensor], leading: torch.Size) -> Tensor:
    """The per-token tensor that ``ignore_index`` is looked for in."""
    labels = per_token[0] if per_token else None
    if labels is None or not are_integers(labels, leading):
        found = "there is none" if labels is None else f"it is {labels.dtype} {tuple(labels.shape)}"
        raise ValueError(
            f"ignore_index is looked for in the first per-token tensor, which must be of integers {tuple(leading)}, "
            f"but {found}. Pass the labels first, or say by mask= which tokens count."
        )
    return labels


def are_integers(labels: Tensor, leading: torch.Size) -> bool:
    """Whether ``labels`` are one integer per token."""
    return labels.shape == leading and not labels.is_floating_point() and labels.dtype != torch.bool


def _check_tensors(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, per_token: Sequence[Tensor], flags: dict[str, Tensor | None]
) -> None:
    for name, tensor in {"weight": weight, "hidden": hidden, "bias": bias}.items():
        if isinstance(tensor, DTensor):
            raise ValueError(
                f"{name} is a DTensor, i.e. FSDP has not gathered it. Call the loss from the forward of the module "
                "that owns the weight (see LossHead), so that FSDP's hooks gather it first."
            )
    if not hidden.is_floating_point() or not weight.is_floating_point():
        raise ValueError(f"hidden ({hidden.dtype}) and weight ({weight.dtype}) must be of floating point.")
    if weight.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} does not fit weight {tuple(weight.shape)} [V, H].")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} must be [V] = [{weight.shape[0]}].")
    leading, targets = hidden.shape[:-1], {f"per-token tensor {i}": tensor for i, tensor in enumerate(per_token)}
    for name, other in {"weight": weight, "bias": bias, **flags, **targets}.items():
        if other is not None and other.device != hidden.device:
            raise ValueError(f"{name} is on {other.device}, but hidden on {hidden.device}. Move both to one device.")
    for name, tensor in targets.items():
        if tensor.shape[: len(leading)] != leading:
            raise ValueError(f"{name} {tuple(tensor.shape)} must have hidden's leading shape {tuple(leading)}.")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires a gradient, but gets none here. Pass .detach() if that is meant.")
    for name, flag in flags.items():
        if flag is not None and (flag.dtype != torch.bool or flag.shape != leading):
            raise ValueError(
                f"{name} must be bool of hidden's leading shape {tuple(leading)}, got {flag.dtype} {tuple(flag.shape)}."
            )


def _check_options(
    has_mask: bool, num_tokens: int | None, reduction: str, denominator: float | Tensor | None, chunk_tokens: int | str
) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}.")
    if denominator is not None and reduction != "mean":
        raise ValueError(f"denominator divides the sum of reduction='mean'; with {reduction!r} nothing is divided.")
    if denominator is not None and not isinstance(denominator, Tensor) and not denominator > 0:
        raise ValueError(f"denominator must be above 0, got {denominator}: the sum is divided by it.")
    if num_tokens is not None and not has_mask:
        raise ValueError("num_tokens is how many tokens count by mask or ignore_index: pass mask too, or ignore_index.")
    if chunk_tokens != "auto" and (type(chunk_tokens) is not int or chunk_tokens < 1):
        raise ValueError(f"chunk_tokens must be at least 1 or 'auto', got {chunk_tokens!r}. Tokens are whole.")
