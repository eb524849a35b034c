"""Losses over a large vocabulary, computed from hidden states in chunks of tokens without holding all logits.

A call goes from :class:`LossHead` (``head.py``) through :func:`linear_loss` (``chunked.py``: arguments, sizes,
autograd) and the loop over chunks (``_loop.py``) to the user's function of the logits of one chunk
(``_user_loss.py``); ``functional.py`` has such functions.
"""

from .chunked import linear_cross_entropy, linear_loss
from .functional import (
    cross_entropy,
    dpo,
    focal,
    grpo,
    kl_divergence,
    kl_divergence_from_hidden,
    of_scaled_logits,
    token_log_probs,
)
from .head import LossHead

__all__ = [
    "LossHead",
    "cross_entropy",
    "dpo",
    "focal",
    "grpo",
    "kl_divergence",
    "kl_divergence_from_hidden",
    "linear_cross_entropy",
    "linear_loss",
    "of_scaled_logits",
    "token_log_probs",
]
