"""The LightningModule of preference tuning: DPO, IPO, KTO, ORPO, SimPO, or a loss of one's own.

Shapes: B rows, S tokens per row, D documents (a prompt with an answer), P pairs or labelled answers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig
from torch import Tensor
from torch.optim import Optimizer

from ..distributed.collectives import all_reduce_sum
from ..lora.linear import adapters_off
from ..losses.functional import token_log_probs
from ..losses.preference import Completions, PreferenceObjective, dpo
from ..models.causal_lm import QLoRAForCausalLM
from ..models.options import ComputeOptions
from .causal_lm import QLoRACausalLM
from .reference import ReferenceLogProbs

#: What is logged, each as its mean, with ``train_`` or ``val_`` in front.
FIGURES = ("rewards_chosen", "rewards_rejected", "log_probs_chosen", "log_probs_rejected", "accuracy", "kl")

#: The model's inputs that a batch of documents may hold.
_INPUTS = ("input_ids", "labels", "position_ids", "document_lengths", "num_loss_tokens")


class QLoRAPreference(QLoRACausalLM):
    """Finetunes adapters by preferences, on a language model that is frozen in 4 bits.

    The reference model is the same 4-bit base with its adapters off: there is one copy of it, sharded or not. Its
    log-probabilities are computed beside each batch without a gradient, or once before training
    (``reference_file``). Log-probabilities of tokens come from the chunked loss, so the logits of a batch never exist.

    A batch is what :class:`~lightning_qlora.modules.data.preference_collator.PreferenceCollator` makes.

    The loss of a step is the mean over all its pairs (or labelled answers): those of every micro-batch and rank,
    however unequal, as :class:`QLoRAModule` does it for tokens. One term of KTO, its estimate of the KL divergence, is
    a property of a batch. It is estimated from each micro-batch of *all* ranks together, so it does not depend on their
    number, but with gradient accumulation it comes from fewer answers than a step has.

    Logged beside ``train_loss`` and ``val_loss``, as exact means over the step and all ranks, each with ``train_`` or
    ``val_`` in front: ``rewards_chosen``, ``rewards_rejected``, their difference ``margin``, ``log_probs_chosen`` and
    ``log_probs_rejected`` (sums over an answer's tokens), ``accuracy`` (the share of pairs whose chosen answer has the
    larger reward; of labelled answers, the share whose reward is on its label's side of the KL term) and, for labelled
    answers, ``kl``.

    Args (all others are those of :class:`QLoRAModule`):
        objective: The loss, and what it must be given.
        reference_file: Where the reference's log-probabilities are kept that are computed before training. With
            ``init_adapter`` they are those of the base with that adapter. The data module must have
            ``reference_batch``, as :class:`~lightning_qlora.modules.data.preference.PreferenceDataModule`. ``None``
            computes them beside each batch.

    Raises:
        ValueError: As :class:`QLoRAModule`; for a ``reference_file`` without a reference; or for ``init_adapter`` with
            a reference that is computed beside each batch.
    """

    def __init__(
        self,
        model_dir: str | Path,
        lora: LoraConfig | dict[str, Any] | None = None,
        *,
        objective: PreferenceObjective = PreferenceObjective(dpo),  # noqa: B008  frozen
        reference_file: str | Path | None = None,
        learning_rate: float = 5e-5,
        warmup_steps: int = 0,
        schedule: Literal["cosine", "linear", "constant"] = "cosine",
        weight_decay: float = 0.0,
        compute: ComputeOptions | dict[str, Any] = ComputeOptions(),  # noqa: B008  frozen
        packing: bool = False,
        compile_backend: str | Callable[..., Any] = "inductor",
        init_adapter: str | Path | None = None,
        model_name: str | None = None,
        seed: int = 0,
    ) -> None:
        if isinstance(objective, str):
            raise ValueError(
                f"The checkpoint was trained with {objective}, which holds a function that no checkpoint can keep. "
                "Pass that to load_from_checkpoint(..., objective=...)."
            )
        super().__init__(
            model_dir, lora, loss=token_log_probs, learning_rate=learning_rate, warmup_steps=warmup_steps,
            schedule=schedule, weight_decay=weight_decay, compute=compute, packing=packing,
            compile_backend=compile_backend, init_adapter=init_adapter, model_name=model_name, seed=seed,
        )  # fmt: skip
        self.objective = objective
        if objective != PreferenceObjective(dpo):
            self.save_hyperparameters({"objective": repr(objective)})
        if reference_file is not None and not objective.needs_reference:
            raise ValueError("This loss has no reference model: leave --precompute_reference out.")
        if init_adapter is not None and objective.needs_reference and reference_file is None:
            raise ValueError(
                f"--init_adapter {init_adapter}: the reference would be the base without this adapter, because it is "
                "the base with adapters off. Add --precompute_reference, which computes the reference with the "
                "adapter before training changes it; or merge the adapter first (recipes/merge_adapter.py)."
            )
        self.reference = None if reference_file is None else ReferenceLogProbs(Path(reference_file))
        """The log-probabilities that are computed before training."""
        self._figures: dict[str, list[Tensor]] = {"train": [], "val": []}

    def adapt(self, model: QLoRAForCausalLM) -> None:
        """Make the head return the log-probability of each token."""
        super().adapt(model)
        model.lm_head.reduction = "none"

    # --- log-probabilities -------------------------------------------------------------------------------------------

    def log_probs(self, batch: Mapping[str, Any]) -> Tensor:
        """Log-probability of each document's answer, float32 [D], with a gradient where those are enabled."""
        inputs = {name: batch[name] for name in _INPUTS if name in batch}
        # Computed inside the forward of the module that FSDP2 took as its root, where weights are gathered.
        of_tokens: Tensor = self._model(**inputs).loss
        if (lengths := batch.get("document_lengths")) is None:
            return of_tokens.sum(-1)[batch["documents"]]
        # One sum for each document, and no scatter: its additions have no fixed order on a GPU.
        parts = torch.split(of_tokens.flatten(), [length for row in lengths for length in row])
        return torch.stack([part.sum() for part in parts])[batch["documents"]]

    @torch.no_grad()
    def fixed_log_probs(self, batch: Mapping[str, Any], *, adapters: bool) -> Tensor:
        """:meth:`log_probs` without gradient and dropout, with adapters on or off."""
        training = self._model.training
        self._model.eval()
        try:
            with contextlib.nullcontext() if adapters else adapters_off(self._model):
                return self.log_probs(batch)
        finally:
            self._model.train(training)

    def _reference_of(self, batch: Mapping[str, Any], *, other: bool = False) -> Tensor | None:
        """The reference's log-probabilities of a batch's documents, or of those with answers to other prompts."""
        if not self.objective.needs_reference:
            return None
        if self.reference is None:
            return self.fixed_log_probs(batch["other"] if other else batch, adapters=False)
        known = self.reference.of(batch["index"], self.device)
        return known.flatten() if self.objective.paired else known[:, int(other)]

    # --- training ----------------------------------------------------------------------------------------------------

    def loss_sum(self, batch: dict[str, Any]) -> tuple[Tensor, int]:
        """The loss of a batch, summed over its pairs or labelled answers (float32, 0-dim), and how many these are.

        Raises:
            ValueError: If the batch is not one of preferences, or is one for another kind of loss.
        """
        if missing := [name for name in ("documents", "completion_tokens", "num_pairs") if name not in batch]:
            raise ValueError(
                f"The batch lacks {', '.join(missing)}; it holds {', '.join(sorted(batch))}. PreferenceDataModule "
                "makes batches of preferences."
            )
        if ("desirable" in batch) == self.objective.paired:
            raise ValueError(
                "The loss compares pairs, but the batch holds labelled answers, or the reverse: see paired."
            )
        reference = self._reference_of(batch)
        loss, figures = (self._of_pairs if self.objective.paired else self._of_answers)(batch, reference)
        self._figures["train" if self.training else "val"].append(figures)
        return loss, batch["num_pairs"]

    def _of_pairs(self, batch: dict[str, Any], reference: Tensor | None) -> tuple[Tensor, Tensor]:
        log_probs, tokens = self.log_probs(batch), batch["completion_tokens"]
        chosen, rejected = (
            Completions(log_probs[i::2], tokens[i::2], None if reference is None else reference[i::2]) for i in (0, 1)
        )
        loss, good, bad = self.objective.loss(chosen, rejected)
        values = [good, bad, chosen.log_probs, rejected.log_probs, (good > bad).float()]
        sums = torch.stack([value.detach().sum() for value in values])
        counts = torch.full_like(sums, batch["num_pairs"])
        return loss.sum(), torch.stack([sums, counts])

    def _of_answers(self, batch: dict[str, Any], reference: Tensor | None) -> tuple[Tensor, Tensor]:
        kl, desirable = self._kl(batch), batch["desirable"]
        completions = Completions(self.log_probs(batch), batch["completion_tokens"], reference)
        loss, rewards, neutral = self.objective.loss(completions, desirable, kl)
        log_probs, right = completions.log_probs.detach(), ((rewards > neutral) == desirable).float()
        good, bad, every = desirable.float(), (~desirable).float(), torch.ones_like(right)
        of = ((rewards, good), (rewards, bad), (log_probs, good), (log_probs, bad), (right, every), (kl * every, every))
        sums = torch.stack([(value * which).sum() for value, which in of])
        return loss.sum(), torch.stack([sums, torch.stack([which.sum() for _, which in of])])

    def _kl(self, batch: dict[str, Any]) -> Tensor:
        """KTO's estimate over the micro-batch of all ranks, not below 0; 0-dim, float32. 0 without a reference."""
        reference = self._reference_of(batch, other=True)
        if reference is None:
            return torch.zeros((), device=self.device)
        moved = self.fixed_log_probs(batch["other"], adapters=True) - reference
        total, count = all_reduce_sum([float(moved.double().sum()), batch["num_pairs"]], self.device)
        return torch.tensor(max(0.0, total / max(count, 1)), device=self.device)

    def on_train_start(self) -> None:
        """As :meth:`QLoRAModule.on_train_start`, and compute the reference if it is to be known beforehand."""
        super().on_train_start()
        self._figures["train"].clear()
        self._know_reference()

    def on_validation_start(self) -> None:
        """Compute the reference if it is to be known beforehand and is not: without training, or before it."""
        self._know_reference()

    def _know_reference(self) -> None:
        if self.reference is not None and not self.reference.is_known:
            self.reference.find(self)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """As :meth:`QLoRAModule.on_before_optimizer_step`, and log rewards, margin, accuracy and log-probabilities."""
        super().on_before_optimizer_step(optimizer)
        self._log_figures("train")

    def on_validation_epoch_start(self) -> None:
        """Forget batches of a validation that was interrupted."""
        super().on_validation_epoch_start()
        self._figures["val"].clear()

    def on_validation_epoch_end(self) -> None:
        """Log the means over all pairs of all ranks."""
        super().on_validation_epoch_end()
        self._log_figures("val")

    def _log_figures(self, phase: str) -> None:
        names = FIGURES[: 5 if self.objective.paired else 6]
        parts = self._figures[phase]
        mine = torch.stack(parts).double().sum(0).flatten().tolist() if parts else [0.0] * (2 * len(names))
        parts.clear()
        totals = all_reduce_sum(mine, self.device)
        sums, counts = totals[: len(names)], totals[len(names) :]
        means = {name: total / count for name, total, count in zip(names, sums, counts, strict=True) if count}
        if "rewards_chosen" in means and "rewards_rejected" in means:
            means["margin"] = means["rewards_chosen"] - means["rewards_rejected"]
        for name, value in means.items():
            self.log(f"{phase}_{name}", value, sync_dist=phase == "val")  # equal on all ranks already

    def flops_per_token(self, seq_len: int) -> float:
        """As :meth:`QLoRAModule.flops_per_token`, with the passes without gradient, each half of the others' two."""
        passes = float(self.objective.needs_reference and self.reference is None)
        if not self.objective.paired:
            passes += 1 + passes  # the other answers, under the model and its reference
        return super().flops_per_token(seq_len) * (1 + passes / 2)
