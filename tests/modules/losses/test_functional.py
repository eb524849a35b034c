"""Each shipped loss against its textbook formula in float64, and through the chunks against plain autograd.

Shapes: T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_qlora.modules.losses import functional as losses
from lightning_qlora.modules.losses import linear_loss

T, H, V = 30, 8, 40
DOUBLE = torch.float64


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


HIDDEN, WEIGHT, TEACHER = draw(T, H), draw(V, H, seed=1), draw(V, 6, seed=2)
LABELS = torch.randint(V, (T,), generator=torch.Generator().manual_seed(3))
IGNORED = torch.where(torch.arange(T) % 4 == 0, -100, LABELS)
OLD, REFERENCE, ADVANTAGES = (-4 + 0.3 * draw(T, seed=s) for s in (4, 5, 6))
ADVANTAGES = ADVANTAGES + 4


def nll(logits: Tensor) -> Tensor:
    return -logits.log_softmax(-1)[torch.arange(T), LABELS]


def plain_grpo(logits: Tensor, clip: float = 0.2, beta: float = 0.04) -> Tensor:
    """Case by case: the gain stops growing where the ratio has left the trust region in the advantage's direction."""
    log_p = -nll(logits)
    values = []
    for t in range(T):
        ratio, advantage = torch.exp(log_p[t] - OLD[t]), ADVANTAGES[t]
        if advantage > 0 and ratio > 1 + clip:
            ratio = torch.tensor(1 + clip, dtype=DOUBLE)
        if advantage < 0 and ratio < 1 - clip:
            ratio = torch.tensor(1 - clip, dtype=DOUBLE)
        difference = REFERENCE[t] - log_p[t]
        values.append(-ratio * advantage + beta * (difference.exp() - difference - 1))
    return torch.stack(values)


def plain_kl(logits: Tensor, temperature: float) -> Tensor:
    teacher = (draw(T, 6, seed=7) @ TEACHER.T / temperature).softmax(-1)
    student = (logits / temperature).softmax(-1)
    return temperature**2 * (teacher * (teacher / student).log()).sum(-1)


#: Name: the shipped loss, its tensors, and the plain formula of logits.
CASES: dict[str, tuple[Any, tuple[Tensor, ...], Callable[[Tensor], Tensor]]] = {
    "cross-entropy": (losses.cross_entropy, (LABELS,), nll),
    "ignored": (losses.cross_entropy, (IGNORED,), lambda x: F.cross_entropy(x, IGNORED, reduction="none")),
    "label smoothing": (
        partial(losses.cross_entropy, label_smoothing=0.2), (LABELS,),
        lambda x: F.cross_entropy(x, LABELS, reduction="none", label_smoothing=0.2),
    ),
    "z-loss": (partial(losses.cross_entropy, z_loss=0.1), (LABELS,), lambda x: nll(x) + 0.1 * x.logsumexp(-1) ** 2),
    "soft-capping": (partial(losses.cross_entropy, softcap=2.0), (LABELS,), lambda x: nll(2 * torch.tanh(x / 2))),
    "focal": (losses.focal, (LABELS,), lambda x: (1 - (-nll(x)).exp()) ** 2 * nll(x)),
    "focal, gamma 0.5": (partial(losses.focal, gamma=0.5), (LABELS,), lambda x: (1 - (-nll(x)).exp()) ** 0.5 * nll(x)),
    "log-probabilities": (partial(losses.token_log_probs, temperature=0.7), (LABELS,), lambda x: -nll(x / 0.7)),
    "distillation": (
        partial(losses.kl_divergence, temperature=2.0), (draw(T, 6, seed=7) @ TEACHER.T,), lambda x: plain_kl(x, 2.0)
    ),
    "distillation from hidden states": (
        partial(losses.kl_divergence_from_hidden, teacher_weight=TEACHER), (draw(T, 6, seed=7),),
        lambda x: plain_kl(x, 1.0),
    ),
    "GRPO": (losses.grpo, (LABELS, ADVANTAGES, OLD, REFERENCE), plain_grpo),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_equal_the_formula_whatever_the_chunks(name: str) -> None:
    loss, tensors, formula = CASES[name]
    hidden, weight = HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    expected = formula(hidden @ weight.T).sum()
    truth = torch.autograd.grad(expected, (hidden, weight))
    assert all(gradient.abs().max() > 0 for gradient in truth)
    for chunk in (1, 7, T):
        result = linear_loss(hidden, weight, *tensors, loss=loss, reduction="sum", chunk_tokens=chunk)
        value = result[0] if isinstance(result, tuple) else result
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(torch.autograd.grad(value, (hidden, weight)), truth)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", [losses.cross_entropy, losses.token_log_probs])
def test_softmax_is_in_float32(loss: Any, dtype: torch.dtype) -> None:
    logits = (5 * draw(T, V)).to(dtype)
    value = loss(logits, LABELS)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), loss(logits.double(), LABELS), rtol=1e-5, atol=1e-5)


def grpo_of(logits: Tensor, labels: Tensor) -> Tensor:
    others = torch.ones_like(labels, dtype=DOUBLE)
    return losses.grpo(logits, labels, others, -others, -others)[0]


@pytest.mark.parametrize("loss", [losses.cross_entropy, losses.focal, losses.token_log_probs, grpo_of])
@pytest.mark.parametrize("wrong", [-1, V])
def test_a_label_outside_the_vocabulary_shows(loss: Any, wrong: int) -> None:
    labels = torch.tensor([1, wrong, -100, 2])
    logits = draw(4, V).requires_grad_()
    each = loss(logits, labels)
    assert each.isnan().tolist() == [False, True, False, False]
    (gradient,) = torch.autograd.grad(each.sum(), logits)
    assert gradient[[0, 2, 3]].isfinite().all()  # as if it were not there
    message = "hidden and weight are finite: .* or gets a label outside"
    with pytest.raises(ValueError, match=message):
        linear_loss(HIDDEN[:4], WEIGHT, labels, loss=loss, check_finite=True)


def test_large_logits_do_not_overflow() -> None:
    logits = torch.tensor([[60000.0, -60000.0, 0.0]], dtype=torch.float16)
    assert losses.cross_entropy(logits, torch.tensor([0])) == 0
    assert losses.cross_entropy(logits, torch.tensor([2])) == logits[0, 0].float()


def test_focal_of_a_certain_prediction_has_a_finite_gradient() -> None:
    logits = torch.tensor([[200.0, 0.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(losses.focal(logits, torch.tensor([0]), gamma=0.5).sum(), logits)
    assert gradient.isfinite().all()


def test_grpo_metrics() -> None:
    logits = torch.zeros(3, 4, dtype=DOUBLE, requires_grad=True)
    log_p = torch.full((3,), 0.25, dtype=DOUBLE).log()
    old = log_p - torch.tensor([0.5, 0.5, 0.0])  # ratios e^0.5, e^0.5 and 1
    advantages = torch.tensor([1.0, -1.0, 1.0], dtype=DOUBLE)
    loss, kl, clipped = losses.grpo(logits, torch.tensor([0, 1, 2]), advantages, old, log_p - 0.1)
    torch.testing.assert_close(loss - 0.04 * kl, torch.tensor([-1.2, 0.5**-1 * 0 + torch.e**0.5, -1.0], dtype=DOUBLE))
    torch.testing.assert_close(kl, torch.full((3,), torch.e**-0.1 + 0.1 - 1, dtype=DOUBLE))
    assert clipped.tolist() == [1, 0, 0]  # a higher ratio of a worse than average token is not clipped
    assert not kl.requires_grad
    assert not clipped.requires_grad


def test_grpo_of_an_ignored_label_is_zero_whatever_else_is_given() -> None:
    logits = draw(3, 4).requires_grad_()
    old = torch.tensor([-1.0, -900.0, torch.nan], dtype=DOUBLE)  # exp(900) is infinite
    labels = torch.tensor([1, -100, -100])
    results = losses.grpo(logits, labels, torch.ones(3), old, -old)
    assert all(not result[1:].any() and result[0].isfinite() for result in results)
    alone = losses.grpo(logits[:1], labels[:1], torch.ones(1), old[:1], -old[:1])
    torch.testing.assert_close([result[:1] for result in results], list(alone))
    (gradient,) = torch.autograd.grad(results[0].sum(), logits)
    assert gradient[0].any()
    assert not gradient[1:].any()
    other = losses.grpo(logits, torch.where(labels == -100, 3, labels), torch.ones(3), old, -old, ignore_index=3)
    torch.testing.assert_close(other, results)


def test_grpo_with_the_mean_of_each_sequence_as_its_docstring_says() -> None:
    hidden, weight = HIDDEN.view(6, 5, H).clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    labels, tensors = LABELS.view(6, 5).clone(), [t.view(6, 5) for t in (ADVANTAGES, OLD, REFERENCE)]
    for i in range(6):
        labels[i, i:] = -100  # the first has none that counts
    counts = labels != -100
    weights = counts / counts.sum(-1, keepdim=True).clamp(min=1) / len(labels)
    loss, *_ = linear_loss(
        hidden, weight, labels, *tensors, loss=losses.grpo, mask=counts, reduction="none", chunk_tokens=4
    )
    value = (weights * loss).sum()
    each = plain_grpo((hidden @ weight.T).view(T, V)).view(6, 5)
    expected = torch.stack([each[i, :i].mean() for i in range(1, 6)]).sum() / 6
    torch.testing.assert_close(value, expected)
    learned = (hidden, weight)
    torch.testing.assert_close(torch.autograd.grad(value, learned), torch.autograd.grad(expected, learned))


def test_a_teacher_that_does_not_fit_is_refused() -> None:
    for teacher in (draw(T, V + 1), draw(T, 1)):  # one column would be broadcast
        with pytest.raises(ValueError, match=rf"teacher's vocabulary has {teacher.shape[1]} tokens, the student's {V}"):
            linear_loss(HIDDEN, WEIGHT, teacher, loss=losses.kl_divergence)
    loss = partial(losses.kl_divergence_from_hidden, teacher_weight=draw(V + 1, 6))
    with pytest.raises(ValueError, match=rf"teacher's vocabulary has {V + 1} tokens"):
        linear_loss(HIDDEN, WEIGHT, draw(T, 6), loss=loss)
    with pytest.raises(ValueError, match=rf"teacher_hidden \(2, 5\) does not fit teacher_weight \({V + 1}, 6\)"):
        linear_loss(HIDDEN, WEIGHT, draw(T, 5), loss=loss)


@pytest.mark.parametrize("train_weight", [False, True])
def test_dpo_through_the_chunks(train_weight: bool) -> None:
    hidden = HIDDEN.view(6, 5, H).clone().requires_grad_()
    weight = WEIGHT.clone().requires_grad_(train_weight)
    labels = IGNORED.view(6, 5)
    reference = OLD.view(6, 5) * (labels != -100)
    learned = [hidden, weight] if train_weight else [hidden]

    def pair_loss(log_p: Tensor) -> Tensor:
        scores = [0.1 * (log_p[i] - reference[i]).sum() for i in range(6)]
        return torch.stack([-F.logsigmoid(scores[i] - scores[3 + i]) for i in range(3)])

    log_p = -F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten(), reduction="none").view(6, 5)
    expected = pair_loss(log_p)
    truth = torch.autograd.grad(expected.mean(), learned)
    log_p = linear_loss(hidden, weight, labels, loss=losses.token_log_probs, reduction="none", chunk_tokens=4)
    loss, margin = losses.dpo(log_p, reference)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(-F.logsigmoid(margin), expected)
    torch.testing.assert_close(torch.autograd.grad(loss.mean(), learned), truth)


def test_dpo_with_noisy_preferences_is_the_mean_of_both_orders() -> None:
    log_p, reference = draw(4, 5), draw(4, 5, seed=1)
    there, _ = losses.dpo(log_p, reference)
    back, _ = losses.dpo(log_p.roll(2, 0), reference.roll(2, 0))
    noisy, _ = losses.dpo(log_p, reference, label_smoothing=0.25)
    torch.testing.assert_close(noisy, 0.75 * there + 0.25 * back)


def test_dpo_refuses_what_are_not_pairs() -> None:
    with pytest.raises(ValueError, match="in equal number, got 3 in all"):
        losses.dpo(torch.zeros(3, 5), torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"\(2, 5\) and reference_log_probs \(2, 4\) must be of one shape"):
        losses.dpo(torch.zeros(2, 5), torch.zeros(2, 4))
