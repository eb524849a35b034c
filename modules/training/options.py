"""The flags of the optimization, and of the run around it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]

from ..losses import cross_entropy
from ..losses.preference import PreferenceObjective, dpo, ipo, kto, orpo, simpo
from ..options import at_least


@dataclass(frozen=True)
class OptimizationOptions:
    """Optimization.

    Args:
        max_steps: Number of optimizer steps.
        epochs: Train this many times on all of the data, instead of max_steps. May be a fraction.
        lr: Peak learning rate. It rises over the first 5 % of the steps, then decays to 0 on a cosine.
        clip_norm: Gradients are scaled down to this global norm if theirs is larger. 0 means no clipping.
        seed: Seed of adapter initialization, data order and dropout.
        label_smoothing: Share of each target that is spread evenly over the vocabulary, in training and validation.
        z_loss: Weight of the squared log-normalizer in the loss, which keeps logits from drifting (PaLM took 1e-4).

    Raises:
        ValueError: For values out of range.
    """

    EXCLUSIVE: ClassVar = (("max_steps", "epochs"),)

    max_steps: int = 30
    epochs: float | None = None
    lr: float = 3e-4
    clip_norm: float = 1.0
    seed: int = 0
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        at_least(1, max_steps=self.max_steps)
        if self.epochs is not None and not (math.isfinite(self.epochs) and self.epochs > 0):
            raise ValueError(f"--epochs must be a positive finite number, got {self.epochs}.")
        at_least(0, seed=self.seed)
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"--lr: learning_rate must be a positive finite number, got {self.lr}.")
        if not self.clip_norm >= 0:
            raise ValueError(f"--clip_norm must be 0 (no clipping) or larger, got {self.clip_norm}.")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"--label_smoothing must be at least 0 and below 1, got {self.label_smoothing}.")
        if not (math.isfinite(self.z_loss) and self.z_loss >= 0):
            raise ValueError(f"--z_loss must be a finite number of at least 0, got {self.z_loss}.")

    def in_steps(self, steps_per_epoch: int) -> OptimizationOptions:
        """These options with ``epochs`` turned into ``max_steps``, rounded up, which is said."""
        if self.epochs is None:
            return self
        steps = math.ceil(self.epochs * steps_per_epoch)
        rank_zero_info(f"{self.epochs:g} epochs of {steps_per_epoch} optimizer steps: {steps} steps.")
        return dataclasses.replace(self, epochs=None, max_steps=steps)

    @property
    def loss(self) -> Callable[..., Any]:
        """The function of logits and labels that is trained."""
        if not (self.label_smoothing or self.z_loss):
            return cross_entropy
        return functools.partial(cross_entropy, label_smoothing=self.label_smoothing, z_loss=self.z_loss)

    @property
    def warmup_steps(self) -> int:
        """Steps over which the learning rate rises."""
        return self.max_steps // 20


@dataclass(frozen=True)
class RunOptions:
    """This run.

    Args:
        output_dir: Directory for report.json, adapter/ and checkpoints/. It must not hold another run.
        resume: Continue from the latest checkpoint in output_dir.
        prompt: Question to answer before and after training. Default: a held-out question of the data.
        dry_run: Only print the predicted memory of each device; exit status 1 if a GPU has less.
    """

    output_dir: Path
    resume: bool = False
    prompt: str | None = None
    dry_run: bool = False


PreferenceLoss = Literal["dpo", "ipo", "orpo", "kto", "simpo"]

_OBJECTIVES: dict[PreferenceLoss, PreferenceObjective] = {
    "dpo": PreferenceObjective(dpo),
    "ipo": PreferenceObjective(ipo),
    "orpo": PreferenceObjective(orpo, needs_reference=False),
    "kto": PreferenceObjective(kto, paired=False),
    "simpo": PreferenceObjective(simpo, needs_reference=False),
}

#: Settings that only one of the losses has.
_OF_ONE_LOSS: dict[str, PreferenceLoss] = {
    "label_smoothing": "dpo", "gamma": "simpo", "desirable_weight": "kto", "undesirable_weight": "kto",
}  # fmt: skip


@dataclass(frozen=True)
class PreferenceOptions:
    """Preferences.

    Args:
        loss: dpo and ipo compare a chosen with a rejected answer and both with a reference, the base model without
            adapters; orpo and simpo do without the reference; kto takes answers labelled good or bad.
        beta: dpo, ipo, kto: strength of the tie to the reference. orpo: weight of the odds ratio beside the chosen
            answers' cross-entropy. simpo: scale of the rewards. Default: 2 for simpo, else 0.1.
        label_smoothing: dpo: probability that a preference is the wrong way round. Default: 0.
        gamma: simpo: by how much the chosen reward should be the larger one. Default: 1.
        desirable_weight: kto: weight of good answers in the loss. Default: 1.
        undesirable_weight: kto: weight of bad answers in the loss. Default: 1.
        precompute_reference: Compute the reference's log-probabilities once before training and keep them in
            reference.safetensors in output_dir, instead of beside each batch. Saves a third of the time from the second
            epoch on.

    Raises:
        ValueError: For an unknown loss, a value out of range, or a setting that the loss does not have.
    """

    loss: PreferenceLoss = "dpo"
    beta: float | None = None
    label_smoothing: float | None = None
    gamma: float | None = None
    desirable_weight: float | None = None
    undesirable_weight: float | None = None
    precompute_reference: bool = False

    def __post_init__(self) -> None:
        if self.loss not in get_args(PreferenceLoss):
            raise ValueError(f"--loss must be one of {', '.join(get_args(PreferenceLoss))}, got {self.loss!r}.")
        for name, value in self._settings.items():
            if (loss := _OF_ONE_LOSS.get(name, self.loss)) != self.loss:
                raise ValueError(f"--{name} is a setting of --loss {loss}; --loss {self.loss} has none. Leave it out.")
            zero_is_fine = name in ("label_smoothing", "gamma")
            if not (math.isfinite(value) and (value > 0 or (zero_is_fine and value == 0))):
                least = "0 or larger" if zero_is_fine else "above 0"
                raise ValueError(f"--{name} must be {least} and finite, got {value}.")
        if self.label_smoothing is not None and self.label_smoothing >= 0.5:
            raise ValueError(
                f"--label_smoothing must be below 0.5, got {self.label_smoothing}: from there on, the rejected answers "
                "are preferred."
            )
        if self.precompute_reference and not _OBJECTIVES[self.loss].needs_reference:
            raise ValueError(f"--loss {self.loss} has no reference model. Leave --precompute_reference out.")

    @property
    def _settings(self) -> dict[str, float]:
        """Those that are given."""
        values = {name: getattr(self, name) for name in ("beta", *_OF_ONE_LOSS)}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def objective(self) -> PreferenceObjective:
        """The loss with its settings."""
        objective = _OBJECTIVES[self.loss]
        return dataclasses.replace(objective, loss=functools.partial(objective.loss, **self._settings))
