"""A language-model head that computes the loss itself, without holding the logits of all tokens."""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ._user_loss import Loss, name_of
from .chunked import are_integers, checks_of_labels, linear_loss
from .functional import cross_entropy, of_scaled_logits


class LossHead(nn.Linear):
    """A linear layer H -> V that returns logits, or, given labels, their loss, computed in chunks of tokens.

    Keeping both in one ``forward`` lets FSDP gather the weight [V, H] for either through its ordinary hooks.

    Attributes, used only where labels are given, which may be set at any time:
        loss: ``loss(logits [C, V], labels [C], *per_token [C, *])`` -> one value per token [C], or their sum []; see
            :func:`~.chunked.linear_loss`. E.g. ``functools.partial(cross_entropy, label_smoothing=0.1, z_loss=1e-4)``.
        logit_scale: Logits are multiplied by it, in float32 (Granite: ``1 / logits_scaling``).
        reduction: ``"sum"`` over the tokens that count; or ``"none"``, for losses that go on from values per token.
        softcap: Scaled logits become ``softcap * tanh(logits / softcap)``, in float32 (Gemma 2), if not ``None``.
    """

    def __init__(
        self,
        *args: Any,
        loss: Loss = cross_entropy,
        reduction: Literal["sum", "none"] = "sum",
        logit_scale: float = 1.0,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.loss, self.reduction, self.logit_scale, self.softcap = loss, reduction, logit_scale, softcap

    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        *per_token: Tensor,
        ignore_index: int = -100,
        num_tokens: int | None = None,
    ) -> Tensor:
        """Logits [..., V], neither scaled nor capped; or with ``labels`` the float32 *sum* of the loss.

        With ``reduction="none"`` it is the loss of each token [...], 0 for tokens that do not count.

        Args:
            hidden: [..., H].
            labels: [...], int64 in [0, V) or ``ignore_index``: those tokens do not count and are not projected. If the
                loss takes something else (a teacher's logits [..., V]), all tokens count.
            per_token: [..., *], what else the loss gets.
            ignore_index: Label of tokens that do not count.
            num_tokens: How many tokens count, where the host knows. Otherwise it waits for the device.

        Raises:
            ValueError: As :func:`~.chunked.linear_loss`, and :func:`~.chunked.linear_cross_entropy` for labels; if
                ``logit_scale`` or ``softcap`` is not above 0; or if ``loss`` returns a tuple.
        """
        if labels is None:
            return F.linear(hidden, self.weight, self.bias)
        loss, options = self.loss, {}
        if are_integers(labels, hidden.shape[:-1]) or cross_entropy in (loss, getattr(loss, "func", None)):
            options = checks_of_labels(labels, self.weight.shape[0], ignore_index)
        if self.logit_scale != 1.0 or self.softcap is not None:
            if not self.logit_scale > 0 or (self.softcap is not None and not self.softcap > 0):
                raise ValueError(
                    f"logit_scale ({self.logit_scale}) and softcap ({self.softcap}) of a LossHead must be above 0; "
                    "softcap=None caps nothing."
                )
            loss = functools.partial(of_scaled_logits, loss=loss, scale=self.logit_scale, softcap=self.softcap)
        value = linear_loss(
            hidden, self.weight, labels, *per_token, loss=loss, bias=self.bias, num_tokens=num_tokens,
            reduction=self.reduction, **options,
        )  # fmt: skip
        if isinstance(value, tuple):
            raise ValueError(
                f"loss {name_of(self.loss)} returned a tuple, but a LossHead trains on one result. Return the loss "
                "alone (lambda *inputs: loss(*inputs)[0]), or call linear_loss, which returns all results."
            )
        return value  # type: ignore[no-any-return]
