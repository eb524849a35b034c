"""Linear projection and cross-entropy in one step, without ever holding the logits of all tokens.

Shapes: T tokens that predict (all leading dimensions flattened), H hidden size, V vocabulary, C tokens in a chunk.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

#: Bytes that one chunk's float32 logits [C, V] may take; about three such buffers live at a time.
LOGITS_BUDGET_BYTES = 128 * 2**20

#: Gradients of a chunk are computed before the loss scale of mixed precision is known. In float16 they are carried
#: multiplied by this power of two (an exact factor), which keeps probabilities down to 6e-11 from vanishing. A trained
#: weight's gradient sums over the chunk's tokens and would overflow: the factor is then divided by their number.
FP16_GRADIENT_SCALE = 1024.0


def auto_chunk_tokens(vocab_size: int) -> int:
    """Largest power of two of tokens whose float32 logits fit ``LOGITS_BUDGET_BYTES`` (at least 16).

    A vocabulary of 49152 gives 512 tokens, one of 128256 gives 256.
    """
    return int(max(16, 2 ** math.floor(math.log2(max(1, LOGITS_BUDGET_BYTES // (4 * vocab_size))))))


class _LinearCrossEntropy(torch.autograd.Function):
    """Each chunk's loss is differentiated by autograd while its logits exist; backward only rescales the result."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, chunk_tokens: int
    ) -> Tensor:
        hidden_needs_grad, weight_needs_grad = ctx.needs_input_grad[:2]
        scale = _gradient_scale(hidden, chunk_tokens if weight_needs_grad else 1)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_grad = torch.empty_like(hidden) if hidden_needs_grad else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if weight_needs_grad else None
        weight = weight.detach().requires_grad_(weight_needs_grad)
        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            chunk = hidden[rows].detach().requires_grad_(hidden_needs_grad)
            with torch.set_grad_enabled(hidden_needs_grad or weight_needs_grad):
                logits = F.linear(chunk, weight)
                loss = F.cross_entropy(logits.float(), labels[rows], ignore_index=ignore_index, reduction="sum")
                scaled = loss * scale
            total += loss.detach()
            wanted = [t for t, needed in ((chunk, hidden_needs_grad), (weight, weight_needs_grad)) if needed]
            if not wanted:
                continue
            grads = iter(torch.autograd.grad(scaled, wanted))
            if hidden_grad is not None:
                hidden_grad[rows] = next(grads)
            if weight_grad is not None:
                weight_grad += next(grads)
        ctx.scale, ctx.weight_dtype = scale, weight.dtype
        ctx.save_for_backward(hidden_grad, weight_grad)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.saved_tensors
        factor = grad_output.float() / ctx.scale
        if hidden_grad is not None:
            hidden_grad = (hidden_grad.float() * factor).to(hidden_grad.dtype)
        if weight_grad is not None:
            weight_grad = (weight_grad * factor).to(ctx.weight_dtype)
        return hidden_grad, weight_grad, None, None, None


def _gradient_scale(hidden: Tensor, summed_tokens: int) -> float:
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    if dtype != torch.float16:
        return 1.0
    return float(FP16_GRADIENT_SCALE / 2 ** math.ceil(math.log2(summed_tokens)))


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Literal["sum", "mean"] = "mean",
    chunk_tokens: int | Literal["auto"] = "auto",
) -> Tensor:
    """Cross-entropy of ``hidden @ weight.T`` against ``labels`` in chunks of tokens.

    The softmax is computed in float32 whatever the dtype of ``hidden``. Peak memory beyond the inputs is one gradient
    of ``hidden`` and the logits of one chunk. Nothing is computed for the weight when it does not require a gradient.

    Args:
        hidden: [..., H], float16, bfloat16 or float32.
        weight: [V, H], cast to the dtype of ``hidden`` if it differs.
        labels: [...], int64 in [0, V) or ``ignore_index``.
        ignore_index: Label of tokens that do not count.
        reduction: ``"mean"`` over the tokens that count (0 if there is none), or ``"sum"``.
        chunk_tokens: Tokens a chunk, or ``"auto"`` (:func:`auto_chunk_tokens`).

    Returns:
        The loss, float32, 0-dim.

    Raises:
        ValueError: If shapes, the chunk size or the reduction do not fit, or the weight is a sharded DTensor.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}.")
    if isinstance(weight, DTensor):
        raise ValueError(
            "weight is a DTensor, i.e. FSDP has not gathered it. Call the loss from the forward of the module that "
            "owns the weight (see LossHead), so that FSDP's hooks gather it first."
        )
    if weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} does not fit weight {tuple(weight.shape)} [V, H].")
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(f"labels {tuple(labels.shape)} must have hidden's leading shape {tuple(hidden.shape[:-1])}.")
    chunk = auto_chunk_tokens(weight.shape[0]) if chunk_tokens == "auto" else chunk_tokens
    if chunk < 1:
        raise ValueError(f"chunk_tokens must be at least 1 or 'auto', got {chunk_tokens}.")
    flat_labels = labels.reshape(-1)
    total: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden.reshape(-1, hidden.shape[-1]), weight.to(hidden.dtype), flat_labels, ignore_index, chunk
    )
    if reduction == "sum":
        return total
    return total / (flat_labels != ignore_index).sum().clamp(min=1)


class LossHead(torch.nn.Linear):
    """A language-model head that returns logits, or, given labels, their loss without holding them.

    Keeping both in one ``forward`` lets FSDP gather the weight [V, H] for either through its ordinary hooks.
    """

    def forward(self, hidden: Tensor, labels: Tensor | None = None, ignore_index: int = -100) -> Tensor:  # type: ignore[override]
        """Logits [..., V], or with ``labels`` [...] the float32 *sum* of the cross-entropy over its tokens.

        Raises:
            ValueError: With ``labels``, if the head has a bias, which the chunked loss does not add.
        """
        if labels is None:
            return F.linear(hidden, self.weight, self.bias)
        if self.bias is not None:
            raise ValueError("The chunked loss has no bias term. Make the head with LossHead(..., bias=False).")
        return linear_cross_entropy(hidden, self.weight, labels, ignore_index=ignore_index, reduction="sum")
