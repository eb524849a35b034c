"""How well a classifier does: figures, classes and confusions of its last validation, beside those of a yardstick."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_only  # type: ignore[attr-defined]
from typing_extensions import override


class ClassificationReport(Callback):
    """Prints ``pl_module.metrics`` when training ends, and gives them to the report.

    The module sets ``metrics`` at the end of each validation to a dataclass with ``texts`` (how many), ``figures``
    (name -> number), ``per_class`` (class -> name -> number or ``None``) and ``confusion`` (for each true class a list
    of counts by predicted class; for several labels a 2 x 2 table each). On all ranks they must be those of all.

    Args:
        yardsticks: Figures of other methods on the same texts, by the methods' names.
    """

    report_key = "classification"

    def __init__(self, yardsticks: Mapping[str, Mapping[str, float]] | None = None) -> None:
        super().__init__()
        self.yardsticks = {name: dict(figures) for name, figures in (yardsticks or {}).items()}
        self._metrics: dict[str, Any] | None = None

    def report_section(self) -> dict[str, Any] | None:
        """For ``RunReport``: the last validation's figures."""
        return None if self._metrics is None else {**self._metrics, "yardsticks": self.yardsticks}

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = getattr(pl_module, "metrics", None)
        self._metrics = None if metrics is None else asdict(metrics)

    @override
    @rank_zero_only
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._metrics is None:
            return
        rows = {f"this model, {self._metrics['texts']} texts": self._metrics["figures"], **self.yardsticks}
        names = list(dict.fromkeys(name for figures in rows.values() for name in figures))
        width = max(map(len, rows)) + 2
        print("\n" + " " * width + "".join(f"{name:>12}" for name in names))
        for method, figures in rows.items():
            cells = (f"{figures[name]:12.4f}" if name in figures else f"{'-':>12}" for name in names)
            print(f"{method:{width}}" + "".join(cells), flush=True)
