"""How well a model calls tools, before training and after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_only  # type: ignore[attr-defined]
from typing_extensions import override


class ToolCallReport(Callback):
    """Evaluates the model when training starts and when all its steps are done, prints both, and gives them to the
    report.

    The figures before training are part of every checkpoint, so that a resumed run still shows the untrained model's. A
    run that is stopped early is not evaluated.

    Args:
        evaluate: All ranks call it together with the module. It returns, of JSON types and equal on all ranks,
            ``requests`` (how many), ``figures`` (name -> share, or ``None``), ``mistakes`` (name -> how many requests)
            and ``examples``, each with ``request``, ``expected``, ``written`` (a list of turns) and ``right``.
    """

    report_key = "tool_calls"

    def __init__(self, evaluate: Callable[[Any], Mapping[str, Any]]) -> None:
        super().__init__()
        self.evaluate = evaluate
        self.before: dict[str, Any] | None = None
        self.after: dict[str, Any] | None = None

    def report_section(self) -> dict[str, Any] | None:
        """For ``RunReport``: ``before`` and ``after`` as ``evaluate`` returned them, or ``None`` if not known."""
        return None if self.before is None else {"before": self.before, "after": self.after}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before = state_dict["before"]

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.before is None:
            self.before = dict(self.evaluate(pl_module))
            _show(f"before training: {_shares(self.before)}")

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.before is None or trainer.global_step < trainer.max_steps:
            return
        self.after = dict(self.evaluate(pl_module))
        lines = [f"\n{self.after['requests']} held-out requests{'before':>18}{'after':>10}"]
        for name, share in self.after["figures"].items():
            cells = (
                f"{'-' if value is None else f'{value:.1%}':>10}" for value in (self.before["figures"][name], share)
            )
            lines.append(f"{name:35}" + "".join(cells))
        for example in self.after["examples"][:2]:
            lines.append(f"\nrequest: {example['request']}")
            lines += [f"  model: {text}" for text in example["written"]]
        _show("\n".join(lines))


def _shares(found: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {share:.1%}" for name, share in found["figures"].items() if share is not None)


@rank_zero_only
def _show(text: str) -> None:
    print(text, flush=True)
