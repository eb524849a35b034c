"""How preference tuning goes: rewards, margin, accuracy and log-probabilities by step, printed and in the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_only  # type: ignore[attr-defined]
from torch import Tensor
from typing_extensions import override

#: What a module may log, with ``train_`` or ``val_`` in front: README and the report's plots go by these names.
FIGURES = (
    "margin", "accuracy", "rewards_chosen", "rewards_rejected", "log_probs_chosen", "log_probs_rejected", "kl",
)  # fmt: skip


class PreferenceReport(Callback):
    """Prints the first and last of the figures that the module logs when training ends, and gives all to the report.

    The module logs them as ``train_margin`` and so on at each optimizer step, and as ``val_margin`` and so on after
    each validation: those of :data:`FIGURES`, or some of them. They are part of every checkpoint.
    """

    report_key = "preference"

    def __init__(self) -> None:
        super().__init__()
        self._series: dict[str, dict[str, dict[int, float]]] = {"train": {}, "val": {}}
        self._pending: list[tuple[str, int, dict[str, Tensor]]] = []
        self._last_step = 0

    def report_section(self) -> dict[str, Any] | None:
        """For ``RunReport``: ``train`` and ``val``, each figure's name -> list of [step, value]."""
        self._drain()
        section = {
            phase: {name: [[step, value] for step, value in sorted(points.items())] for name, points in figures.items()}
            for phase, figures in self._series.items()
        }
        return section if any(section.values()) else None

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.report_section() or {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for phase, figures in state_dict.items():
            self._series[phase] = {name: dict(map(tuple, points)) for name, points in figures.items()}

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last_step = trainer.global_step

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step > self._last_step:
            self._last_step = trainer.global_step
            self._note("train", trainer)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._note("val", trainer)

    @override
    @rank_zero_only
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        section = self.report_section() or {}
        train, val = section.get("train", {}), section.get("val", {})
        if not train:
            return
        print(f"\n{'':20}{'first step':>12}{'last step':>12}{'validation':>12}")
        for name in FIGURES:
            if points := train.get(name):
                last = f"{val[name][-1][1]:12.4f}" if val.get(name) else f"{'-':>12}"
                print(f"{name.replace('_', ' '):20}{points[0][1]:12.4f}{points[-1][1]:12.4f}{last}")
        print(flush=True)

    def _note(self, phase: str, trainer: pl.Trainer) -> None:
        metrics: Mapping[str, Tensor] = trainer.callback_metrics
        found = {name: metrics[f"{phase}_{name}"].detach().clone() for name in FIGURES if f"{phase}_{name}" in metrics}
        if found:
            self._pending.append((phase, trainer.global_step, found))

    def _drain(self) -> None:
        """Read what waits on the device: once, and not in every step."""
        pending, self._pending = self._pending, []
        for phase, step, found in pending:
            for name, value in zip(found, torch.stack([*found.values()]).tolist(), strict=True):
                self._series[phase].setdefault(name, {})[step] = value
