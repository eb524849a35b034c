"""Linear projection and cross-entropy in one step, without ever holding the logits of all tokens.

Shapes: H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .functional import cross_entropy
from .linear_loss import linear_loss


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    num_tokens: int | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    chunk_tokens: int | Literal["auto"] = "auto",
) -> Tensor:
    """Cross-entropy of ``hidden @ weight.T + bias`` against ``labels`` in chunks of tokens.

    :func:`~.linear_loss.linear_loss` of :func:`~.functional.cross_entropy` over the labels that count, which it checks.
    Tokens that are ignored are not projected.

    Args:
        hidden: [..., H], float16, bfloat16, float32 or float64.
        weight: [V, H], cast to the dtype of ``hidden`` (or autocast's) if it differs.
        labels: [...], int64 in [0, V) or ``ignore_index``.
        bias: [V].
        ignore_index: Label of tokens that do not count.
        num_tokens: How many labels count, where the host knows. Otherwise it waits for the device to tell.
        reduction: ``"mean"`` over the tokens that count (0 if there is none), ``"sum"``, or ``"none"``: values [...]
            that are 0 where the label is ``ignore_index``.
        chunk_tokens: Tokens a chunk, or ``"auto"``.

    Returns:
        The loss, float32 (float64 for float64).

    Raises:
        ValueError: As ``linear_loss``; if ``labels`` are not int64; and if one is neither in [0, V) nor
            ``ignore_index`` or ``num_tokens`` is wrong, where that is known without waiting for the device. Where it
            is not, the loss is NaN instead.
    """
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be class indices of int64, got {labels.dtype}.")
    return linear_loss(  # type: ignore[no-any-return]
        hidden,
        weight,
        labels,
        loss=cross_entropy,
        bias=bias,
        mask=labels != ignore_index,
        num_tokens=num_tokens,
        reduction=reduction,
        chunk_tokens=chunk_tokens,
        invalid=(labels < 0) | (labels >= weight.shape[0]),
        invalid_reason="have a label outside [0, V) that is not ignore_index",
    )


class LossHead(nn.Linear):
    loss: object = None
    logit_scale = 1.0
    softcap: float | None = None

    """A language-model head that returns logits, or, given labels, their loss without holding them.

    Keeping both in one ``forward`` lets FSDP gather the weight [V, H] for either through its ordinary hooks.
    """

    def forward(  # type: ignore[override]
        self, hidden: Tensor, labels: Tensor | None = None, *, ignore_index: int = -100, num_tokens: int | None = None
    ) -> Tensor:
        """Logits [..., V], or with ``labels`` [...] the float32 *sum* of the cross-entropy over its tokens.

        The other arguments are those of :func:`linear_cross_entropy`.
        """
        if labels is None:
            return F.linear(hidden, self.weight, self.bias)
        return linear_cross_entropy(
            hidden, self.weight, labels, bias=self.bias, ignore_index=ignore_index, num_tokens=num_tokens,
            reduction="sum",
        )  # fmt: skip
