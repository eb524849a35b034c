"""Losses of logits as plain functions, one value a token, for :func:`~lightning_qlora.modules.losses.linear_loss`.

To train with one, fix its settings and give it to the head (:class:`~lightning_qlora.modules.losses.LossHead`), or call
``linear_loss`` with it::

    head.loss = functools.partial(cross_entropy, label_smoothing=0.1, z_loss=1e-4)

A loss of one's own is any function of the same form, ``loss(logits [C, V], labels [C], ...) -> [C]``.

Each is written as the formula reads and differentiated by autograd. Logits are upcast to float32 inside; settings are
keyword arguments, to be fixed with ``functools.partial``. Nothing here mixes tokens, except :func:`dpo`, which takes
the log-probabilities that come out of :func:`token_log_probs`. A label outside [0, V) that is not ignored makes its
token's value NaN: to raise instead, the host would have to wait for the device.

**An ignored label makes its token's value 0, but only ``linear_loss(..., ignore_index=-100)`` (or its ``mask``) leaves
the token out of the mean**, and out of the work.

Shapes: C tokens of a chunk, V vocabulary, H a teacher's hidden size, P preference pairs, S tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """Cross-entropy of each token [C], 0 where the label is ``ignore_index``.

    Args:
        logits: [C, V].
        labels: [C], int64 in [0, V) or ``ignore_index``.
        ignore_index: Label of tokens that do not count.
        label_smoothing: Share of the target spread evenly over the vocabulary.
        z_loss: Weight of the squared log-normalizer, which keeps logits from drifting (PaLM, arXiv:2204.02311).
        softcap: Logits become ``softcap * tanh(logits / softcap)`` first (Gemma 2, arXiv:2408.00118).
    """
    x = _upcast(logits)
    if softcap is not None:
        x = _soft_capped(x, softcap)
    normalizer = _log_normalizer(x)
    loss = normalizer - _at(x, labels)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss + label_smoothing * (normalizer - x.mean(-1))
    if z_loss:
        loss = loss + z_loss * normalizer.square()
    return torch.where(labels == ignore_index, 0.0, loss)


def focal(logits: Tensor, labels: Tensor, *, gamma: float = 2.0, ignore_index: int = -100) -> Tensor:
    """Focal loss ``-(1 - p)^gamma log p`` of each token's label [C] (arXiv:1708.02002), 0 where it is ignored.

    Args:
        logits: [C, V].
        labels: [C], int64 in [0, V) or ``ignore_index``.
        gamma: How much well-predicted tokens are played down; 0 is cross-entropy.
        ignore_index: Label of tokens that do not count.
    """
    log_p = token_log_probs(logits, labels, ignore_index=ignore_index)
    # -expm1(log p) is 1 - p without cancellation; the floor keeps the power's derivative finite at p = 1.
    return -(-torch.expm1(log_p)).clamp(min=torch.finfo(log_p.dtype).tiny).pow(gamma) * log_p


def token_log_probs(logits: Tensor, labels: Tensor, *, temperature: float = 1.0, ignore_index: int = -100) -> Tensor:
    """Log-probability of each token's label [C], 0 where it is ``ignore_index``.

    Args:
        logits: [C, V], divided by ``temperature`` first.
        labels: [C], int64 in [0, V) or ``ignore_index``.
        temperature: Of the softmax.
        ignore_index: Label of tokens that do not count.
    """
    x = _upcast(logits) / temperature
    return torch.where(labels == ignore_index, 0.0, _at(x, labels) - _log_normalizer(x))


def kl_divergence(logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Knowledge distillation: ``temperature**2 * KL(teacher || student)`` of each token [C] (arXiv:1503.02531).

    Args:
        logits: [C, V], the student's.
        teacher_logits: [C, V]; they get no gradient.
        temperature: Softens both distributions; its square keeps the gradient's size.

    Raises:
        ValueError: If the teacher's vocabulary is not the student's.
    """
    if teacher_logits.shape[-1] != logits.shape[-1]:
        raise ValueError(
            f"The teacher's vocabulary has {teacher_logits.shape[-1]} tokens, the student's {logits.shape[-1]}: the "
            "divergence compares their probabilities token by token. Use a teacher of the same tokenizer, and cut a "
            "padded vocabulary to the common size."
        )
    student = F.log_softmax(_upcast(logits) / temperature, -1)
    teacher = F.log_softmax(_upcast(teacher_logits.detach()) / temperature, -1)
    return temperature**2 * (teacher.exp() * (teacher - student)).sum(-1)


def kl_divergence_from_hidden(
    logits: Tensor, teacher_hidden: Tensor, *, teacher_weight: Tensor, temperature: float = 1.0
) -> Tensor:
    """:func:`kl_divergence` against a teacher whose logits are, like the student's, made for one chunk at a time.

    Args:
        logits: [C, V], the student's.
        teacher_hidden: [C, H], the teacher's last hidden states.
        teacher_weight: [V, H], the teacher's head, in the dtype of ``teacher_hidden``.
        temperature: Softens both distributions.

    Raises:
        ValueError: If the teacher's vocabulary is not the student's, or its head not that of its hidden states.
    """
    if teacher_weight.shape[-1] != teacher_hidden.shape[-1]:
        raise ValueError(
            f"teacher_hidden {tuple(teacher_hidden.shape)} does not fit teacher_weight {tuple(teacher_weight.shape)} "
            "[V, H]: it must be what the teacher's head gets."
        )
    teacher_logits = F.linear(teacher_hidden.detach(), teacher_weight.detach())
    return kl_divergence(logits, teacher_logits, temperature=temperature)


def grpo(
    logits: Tensor,
    labels: Tensor,
    advantages: Tensor,
    old_log_probs: Tensor,
    reference_log_probs: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    beta: float = 0.04,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    """Group-relative policy optimization (arXiv:2402.03300): clipped policy gradient and a KL penalty, each token.

    ``reduction="mean"`` of ``linear_loss`` weighs all counted tokens alike: with l[i, t] the loss of token t of
    sequence i, and n[i] the number of its counted tokens, it is the sum of all l[i, t] over the sum of all n[i]. The
    paper weighs sequences alike, by the mean over i of (sum over t of l[i, t]) / n[i]. Of B sequences of S tokens::

        counts = labels != -100                                                        # [B, S]
        weights = counts / counts.sum(-1, keepdim=True).clamp(min=1) / len(labels)     # 1 / (n[i] B)
        loss, kl, clipped = linear_loss(
            hidden, weight, labels, advantages, old, reference, loss=grpo, mask=counts, reduction="none"
        )
        value = (weights * loss).sum()

    Args:
        logits: [C, V], the policy's.
        labels: [C], int64 in [0, V), the tokens that were sampled, or ``ignore_index`` (prompts, padding).
        advantages: [C], float32: each token's sequence's advantage within its group.
        old_log_probs: [C], float32: of the labels under the policy that sampled them.
        reference_log_probs: [C], float32: of the labels under the reference model.
        clip_low: The probability ratio is clipped below ``1 - clip_low``.
        clip_high: ... and above ``1 + clip_high``.
        beta: Weight of the KL penalty, ``exp(r) - r - 1`` with r the log-ratio of reference to policy.
        temperature: Of the softmax, that of sampling.
        ignore_index: Label of tokens that do not count.

    Returns:
        The loss [C]; and as metrics without gradient the KL estimate [C] and whether the ratio was clipped [C]. All are
        0 where the label is ``ignore_index``, whatever else is given for that token.
    """
    log_p = token_log_probs(logits, labels, temperature=temperature, ignore_index=ignore_index)
    ratio = (log_p - old_log_probs).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    gain = torch.minimum(ratio * advantages, clipped * advantages)
    reference = reference_log_probs - log_p
    kl = reference.exp() - reference - 1
    was_clipped = (clipped * advantages < ratio * advantages).to(kl.dtype)
    ignored = labels == ignore_index
    loss, kl, was_clipped = (torch.where(ignored, 0.0, each) for each in (beta * kl - gain, kl, was_clipped))
    return loss, kl.detach(), was_clipped.detach()


def dpo(
    log_probs: Tensor, reference_log_probs: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Direct preference optimization (arXiv:2305.18290) from per-token log-probabilities, the chosen sequences first.

    Args:
        log_probs: [2 P, S] of :func:`token_log_probs`, 0 for tokens that do not count; pair i is rows i and P + i.
        reference_log_probs: [2 P, S] of the reference model.
        beta: Strength of the tie to the reference model.
        label_smoothing: Probability that a preference is the wrong way round.

    Returns:
        The loss of each pair [P]; and as a metric without gradient the reward margin of each pair [P].

    Raises:
        ValueError: If the number of sequences is odd, or the shapes differ.
    """
    if log_probs.shape != reference_log_probs.shape:
        raise ValueError(
            f"log_probs {tuple(log_probs.shape)} and reference_log_probs {tuple(reference_log_probs.shape)} must be "
            "of one shape: the same tokens under both models."
        )
    if log_probs.shape[0] % 2:
        raise ValueError(f"dpo needs chosen and rejected sequences in equal number, got {log_probs.shape[0]} in all.")
    chosen, rejected = (log_probs - reference_log_probs).sum(-1).chunk(2)
    margin = beta * (chosen - rejected)
    return logistic(margin, label_smoothing), margin.detach()


def logistic(margin: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """``-log sigmoid(margin)``, any shape; with ``label_smoothing``, the probability that the sign is wrong."""
    loss = -F.logsigmoid(margin)
    return (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-margin) if label_smoothing else loss


def of_scaled_logits(
    logits: Tensor,
    *targets: Tensor,
    loss: Callable[..., Tensor | tuple[Tensor, ...]],
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """``loss`` of logits that are scaled, then capped, in float32, as some models do behind their head.

    Args:
        logits: [C, V].
        targets: What ``loss`` gets besides.
        loss: Any of the losses here, or one's own.
        scale: Logits are multiplied by it (Granite: ``1 / logits_scaling``, Cohere: ``logit_scale``).
        softcap: Logits become ``softcap * tanh(logits / softcap)`` (Gemma 2: ``final_logit_softcapping``).
    """
    x = _upcast(logits) * scale
    return loss(x if softcap is None else _soft_capped(x, softcap), *targets)


def _soft_capped(x: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(x / cap)


def _upcast(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _log_normalizer(x: Tensor) -> Tensor:
    """``logsumexp(x, -1)``, in the form of which Inductor computes maximum and sum in one pass over ``x``."""
    maximum = x.amax(-1, keepdim=True).detach()
    return ((x - maximum).exp().sum(-1, keepdim=True).log() + maximum).squeeze(-1)


def _at(x: Tensor, labels: Tensor) -> Tensor:
    """``x[i, labels[i]]``, NaN for labels outside [0, V)."""
    nearest = labels.clamp(0, x.shape[-1] - 1)
    return torch.where(labels == nearest, x.gather(-1, nearest.unsqueeze(-1)).squeeze(-1), torch.nan)
