"""Losses over preferences against TRL's own code on the same log-probabilities: values, gradients, and edges."""

import functools
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_qlora.modules import losses
from lightning_qlora.modules.losses.preference import Completions, dpo, ipo, kto, orpo, simpo

PAIRS, LENGTH = 6, 9


def per_token(seed: int, scale: float = 2.0) -> Tensor:
    """Log-probabilities [2 P, S] of the tokens of completions, float64, the chosen ones first."""
    draw = torch.Generator().manual_seed(seed)
    return F.logsigmoid(scale * torch.randn(2 * PAIRS, LENGTH, generator=draw, dtype=torch.float64))


#: How many of a row's tokens are completion: the last ones, at least one.
COUNTS = torch.tensor([9, 1, 4, 7, 2, 5, 3, 8, 6, 1, 9, 2])

MASK = torch.arange(LENGTH).flip(0) < COUNTS[:, None]


def halves(log_p: Tensor, reference: Tensor | None) -> tuple[Completions, Completions]:
    sums, tokens = (log_p * MASK).sum(-1), COUNTS.double()
    base = None if reference is None else (reference * MASK).sum(-1)
    first, second = slice(None, PAIRS), slice(PAIRS, None)
    return tuple(  # type: ignore[return-value]
        Completions(sums[half], tokens[half], None if base is None else base[half]) for half in (first, second)
    )


class _Accelerator:
    """TRL gathers metrics with it."""

    device = torch.device("cpu")

    @staticmethod
    def gather(value: Tensor) -> Tensor:
        return value

    gather_for_metrics = gather


def trl_model(log_p: Tensor) -> Any:
    """What TRL's fused head returns, for prompts of one token that is not predicted."""
    zeros = torch.zeros_like(log_p)
    outputs = SimpleNamespace(log_probs=log_p * MASK, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    return lambda **_: outputs


def trl_inputs(**more: Any) -> dict[str, Any]:
    ids = torch.zeros(2 * PAIRS, LENGTH + 1, dtype=torch.int64)
    mask = F.pad(MASK.long(), (1, 0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask, **more}


def trainer(**settings: Any) -> Any:
    """What TRL's methods read of their trainer."""
    return SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=_Accelerator(), aux_loss_enabled=False,
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1, precompute_ref_logps=True, **settings,
    )  # fmt: skip


def trl_dpo(log_p: Tensor, reference: Tensor, kind: str, beta: float) -> Tensor:
    from trl.trainer.dpo_trainer import DPOTrainer

    sums = (reference * MASK).sum(-1).chunk(2)
    me = trainer(
        ld_alpha=None, f_divergence_type="reverse_kl", beta=beta, label_smoothing=0.0, loss_types=[kind],
        loss_weights=[1.0], use_weighting=False,
    )  # fmt: skip
    inputs = trl_inputs(ref_chosen_logps=sums[0], ref_rejected_logps=sums[1])
    return DPOTrainer._compute_loss(me, trl_model(log_p), inputs, False)


def trl_kto(log_p: Tensor, reference: Tensor, beta: float, desirable: Tensor, kl: Tensor) -> Tensor:
    from trl.trainer.kto_trainer import KTOTrainer

    me = trainer(
        beta=beta, calculate_KL=True, loss_type="kto", desirable_weight=1.5, undesirable_weight=0.5,
        _compute_kl_logps=lambda model, batch: kl.expand(2 * PAIRS),
    )  # fmt: skip
    sums, zeros = (reference * MASK).sum(-1), torch.zeros(2 * PAIRS, dtype=torch.float64)
    inputs = trl_inputs(label=desirable, ref_logps=sums, ref_KL_logps=zeros)
    return KTOTrainer._compute_loss(me, trl_model(log_p), inputs, False)


def trl_orpo(log_p: Tensor, beta: float) -> Tensor:
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    chosen, rejected = ((log_p * MASK).sum(-1) / COUNTS).chunk(2)
    me = SimpleNamespace(beta=beta, accelerator=_Accelerator())
    return -chosen.mean() - ORPOTrainer.odds_ratio_loss(me, chosen, rejected)[0].mean()


def trl_simpo(log_p: Tensor, beta: float, gamma: float) -> Tensor:
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    chosen, rejected = ((log_p * MASK).sum(-1) / COUNTS).chunk(2)
    me = SimpleNamespace(
        beta=beta, simpo_gamma=gamma, alpha=0.0, loss_type="simpo", label_smoothing=0.0, accelerator=_Accelerator()
    )
    return CPOTrainer.cpo_loss(me, chosen, rejected)[0].mean()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["dpo", "ipo", "orpo", "simpo", "kto"])
def test_losses_and_gradients_are_those_of_trl(name: str) -> None:
    pytest.importorskip("trl")
    reference, desirable, kl = per_token(1), torch.arange(2 * PAIRS) % 3 != 0, torch.tensor(0.7, dtype=torch.float64)

    def ours(log_p: Tensor) -> Tensor:
        if name == "kto":
            both = halves(log_p, reference)
            rows = Completions(*(torch.cat(parts) for parts in zip(*both, strict=True)))
            return kto(rows, desirable, kl, beta=0.3, desirable_weight=1.5, undesirable_weight=0.5).loss.mean()
        settings = {"dpo": (dpo, {}), "ipo": (ipo, {}), "orpo": (orpo, {}), "simpo": (simpo, {"gamma": 0.4})}
        loss, extra = settings[name]
        pair = halves(log_p, reference if name in ("dpo", "ipo") else None)
        return loss(*pair, beta=0.3, **extra).loss.mean()

    theirs = {
        "dpo": functools.partial(trl_dpo, reference=reference, kind="sigmoid", beta=0.3),
        "ipo": functools.partial(trl_dpo, reference=reference, kind="ipo", beta=0.3),
        "orpo": functools.partial(trl_orpo, beta=0.3),
        "simpo": functools.partial(trl_simpo, beta=0.3, gamma=0.4),
        "kto": functools.partial(trl_kto, reference=reference, beta=0.3, desirable=desirable, kl=kl),
    }[name]
    results = []
    for function in (ours, theirs):
        log_p = per_token(0).requires_grad_()
        value = function(log_p)
        (gradient,) = torch.autograd.grad(value, log_p)
        results.append((value.detach(), gradient))
    (a, da), (b, db) = results
    assert da.abs().max() > 1e-3
    print(
        f"{name}: loss {float(a):.6f}, off by {float((a - b).abs()):.1e}; "
        f"gradient off by {float((da - db).abs().max()):.1e}"
    )
    # ORPO's part is float32 in TRL.
    torch.testing.assert_close(a, b.to(a.dtype), rtol=0, atol=1e-6)
    torch.testing.assert_close(da, db, rtol=0, atol=1e-6)


def test_dpo_of_tokens_is_that_of_completions() -> None:
    log_p, reference = per_token(0) * MASK, per_token(1) * MASK
    there, margin = losses.dpo(log_p, reference, beta=0.3, label_smoothing=0.1)
    here = dpo(*halves(per_token(0), per_token(1)), beta=0.3, label_smoothing=0.1)
    torch.testing.assert_close(there, here.loss)
    torch.testing.assert_close(margin, here.chosen_rewards - here.rejected_rewards)


def test_orpo_stays_finite_where_an_answer_is_certain() -> None:
    log_p = torch.tensor([0.0, -1e-9, -0.6931472, -50.0], requires_grad=True)
    one = torch.ones(4)
    result = orpo(Completions(log_p, one), Completions(log_p.flip(0), one))
    result.loss.sum().backward()
    assert result.loss.isfinite().all()
    assert log_p.grad.isfinite().all()  # type: ignore[union-attr]


def test_a_loss_without_its_reference_says_so() -> None:
    with pytest.raises(ValueError, match="the log-probabilities of one are missing"):
        dpo(*halves(per_token(0), None))
