"""Losses over preferences: plain functions of the log-probabilities of whole completions, one value a pair or a row.

To train with one, give it to :class:`~lightning_qlora.modules.training.preference.QLoRAPreference` as a
:class:`PreferenceObjective`, its settings fixed by ``functools.partial``. A loss of one's own is any function of the
same form: of pairs ``loss(chosen, rejected) -> PairLoss``.

The log-probabilities come from :func:`~.functional.token_log_probs`, summed over the tokens of each completion, so
everything here is differentiated by autograd. Rewards are metrics and carry no gradient.

Shapes: P pairs, N rows that are labelled by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .functional import logistic


class Completions(NamedTuple):
    """Completions of prompts, under the model that is trained and under the reference model."""

    log_probs: Tensor
    """[P] or [N], float32: sum over a completion's tokens."""
    tokens: Tensor
    """[P] or [N], float32: how many tokens that are."""
    reference: Tensor | None = None
    """[P] or [N], float32: ``log_probs`` under the reference model, where the loss has one."""

    @property
    def mean_log_probs(self) -> Tensor:
        """``log_probs`` per token."""
        return self.log_probs / self.tokens

    @property
    def log_ratios(self) -> Tensor:
        """``log_probs`` less those of the reference model.

        Raises:
            ValueError: If there are none.
        """
        if self.reference is None:
            raise ValueError(
                "This loss compares with a reference model, but the log-probabilities of one are missing. Say "
                "needs_reference=True in the PreferenceObjective."
            )
        return self.log_probs - self.reference


class PairLoss(NamedTuple):
    """What a loss says of P pairs."""

    loss: Tensor  # [P]
    chosen_rewards: Tensor  # [P]
    rejected_rewards: Tensor  # [P]


class RowLoss(NamedTuple):
    """What a loss says of N rows."""

    loss: Tensor  # [N]
    rewards: Tensor  # [N]
    neutral_reward: Tensor  # [], above which an answer is taken for a good one


@dataclass(frozen=True)
class PreferenceObjective:
    """A loss over preferences, and what it has to be given.

    Attributes:
        loss: With pairs ``loss(chosen, rejected) -> PairLoss``, each of :class:`Completions` [P]; without, like
            :func:`kto`, ``loss(completions, desirable, kl) -> RowLoss``.
        paired: Whether it compares a chosen with a rejected completion of the same prompt.
        needs_reference: Whether it needs the log-probabilities of a reference model.
    """

    loss: Callable[..., Any]
    paired: bool = True
    needs_reference: bool = True


def dpo(chosen: Completions, rejected: Completions, *, beta: float = 0.1, label_smoothing: float = 0.0) -> PairLoss:
    """Direct preference optimization (arXiv:2305.18290): ``-log sigmoid(beta * (log-ratio chosen - rejected))``.

    Args:
        chosen: [P], with a reference.
        rejected: [P], with a reference.
        beta: Strength of the tie to the reference model.
        label_smoothing: Probability that a preference is the wrong way round (conservative DPO).
    """
    rewards = beta * chosen.log_ratios, beta * rejected.log_ratios
    return PairLoss(logistic(rewards[0] - rewards[1], label_smoothing), rewards[0].detach(), rewards[1].detach())


def ipo(chosen: Completions, rejected: Completions, *, beta: float = 0.1) -> PairLoss:
    """Identity preference optimization (arXiv:2310.12036): ``(difference of log-ratios - 1 / (2 beta))**2``.

    Log-ratios are per token, as in the experiments of its authors: the difference of sums would grow with length, but
    its target does not.

    Args:
        chosen: [P], with a reference.
        rejected: [P], with a reference.
        beta: Strength of the tie to the reference model (tau of the paper).
    """
    difference = chosen.log_ratios / chosen.tokens - rejected.log_ratios / rejected.tokens
    loss = (difference - 1 / (2 * beta)).square()
    return PairLoss(loss, beta * chosen.log_ratios.detach(), beta * rejected.log_ratios.detach())


def orpo(chosen: Completions, rejected: Completions, *, beta: float = 0.1) -> PairLoss:
    """Odds ratio preference optimization (arXiv:2403.07691), without a reference model.

    ``NLL(chosen) - beta * log sigmoid(log odds chosen - log odds rejected)``. Probabilities are the geometric mean over
    tokens, and the negative log-likelihood is the mean over the chosen completion's tokens, as in the paper. TRL takes
    the latter over prompts too and over all tokens of a batch; the odds ratio term is the same.

    Args:
        chosen: [P].
        rejected: [P].
        beta: Weight of the odds ratio (lambda of the paper).
    """
    ratio = _log_odds(chosen.mean_log_probs) - _log_odds(rejected.mean_log_probs)
    loss = -chosen.mean_log_probs + beta * logistic(ratio)
    return PairLoss(loss, beta * chosen.mean_log_probs.detach(), beta * rejected.mean_log_probs.detach())


def simpo(chosen: Completions, rejected: Completions, *, beta: float = 2.0, gamma: float = 1.0) -> PairLoss:
    """Simple preference optimization (arXiv:2405.14734): rewards are ``beta`` times the mean log-probability of tokens.

    ``-log sigmoid(reward chosen - reward rejected - gamma)``, without a reference model.

    Args:
        chosen: [P].
        rejected: [P].
        beta: Scale of the rewards.
        gamma: By how much the chosen reward should be the larger one.
    """
    rewards = beta * chosen.mean_log_probs, beta * rejected.mean_log_probs
    return PairLoss(logistic(rewards[0] - rewards[1] - gamma), rewards[0].detach(), rewards[1].detach())


def kto(
    completions: Completions,
    desirable: Tensor,
    kl: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> RowLoss:
    """Kahneman-Tversky optimization (arXiv:2402.01306): rows that are desirable or not, each for itself.

    ``w * (1 - sigmoid(s * beta * (log-ratio - kl)))`` with s = 1 for desirable rows and -1 for others.

    Args:
        completions: [N], with a reference.
        desirable: [N], bool.
        kl: [], float32, no gradient: how far the model is from its reference, estimated from completions of other
            prompts.
        beta: Strength of the tie to the reference model.
        desirable_weight: Of the loss of desirable rows.
        undesirable_weight: Of the loss of the others.
    """
    rewards = beta * completions.log_ratios
    gain = torch.where(desirable, 1.0, -1.0) * (rewards - beta * kl)
    weights = torch.where(desirable, desirable_weight, undesirable_weight)
    return RowLoss(weights * torch.sigmoid(-gain), rewards.detach(), beta * kl)


def _log_odds(log_p: Tensor) -> Tensor:
    """``log(p / (1 - p))``. Beyond 1 - eps, where it is not finite, it is that of 1 - eps."""
    x = log_p.clamp(max=-torch.finfo(log_p.dtype).eps)
    # log(1 - e^x), by the one of two forms that does not cancel; the other one gets a harmless argument.
    near = x > -0.6931
    log_rest = torch.where(
        near, (-torch.expm1(x.where(near, -1.0))).log(), torch.log1p(-x.where(~near, -1.0).exp())
    )  # fmt: skip
    return x - log_rest
