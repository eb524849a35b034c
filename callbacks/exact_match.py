"""How many held-out answers a model gives exactly, before and after training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_only  # type: ignore[attr-defined]
from torch import Tensor
from typing_extensions import override

#: What of a batch is not an input of the model.
_NOT_INPUTS = ("labels", "num_tokens", "num_loss_tokens")


class ExactMatch(Callback):
    """Counts the validation samples whose answers greedy decoding would give token by token, their ends included.

    Greedy decoding gives the labelled tokens exactly if and only if each of them is the likeliest one after the tokens
    before it; so one forward per batch tells what generating would. The counts before training are part of every
    checkpoint.

    The module's ``forward(input_ids, **inputs, logits_to_keep=positions)`` returns logits [B, P, V]. Where the strategy
    shards the model, all ranks must go through the same modules: a batch in which some ranks have images and others
    have none is left out, and not counted.
    """

    report_key = "exact_match"

    def __init__(self) -> None:
        super().__init__()
        self.before: dict[str, int] | None = None
        self.after: dict[str, int] | None = None

    def report_section(self) -> dict[str, Any] | None:
        """For ``RunReport``: samples and exact matches, before and after."""
        return None if self.before is None else {"before training": self.before, "after training": self.after}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before = state_dict["before"]

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.before is None:
            self.before = self._count(trainer, pl_module)
            self._show("before training", self.before)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.after = self._count(trainer, pl_module)
        self._show("after training", self.after)

    @torch.no_grad()
    def _count(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, int]:
        loader = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
        training = pl_module.training
        pl_module.eval()
        found = torch.zeros(2, dtype=torch.float64, device=pl_module.device)
        with trainer.precision_plugin.forward_context():
            for batch in loader:
                has_images = torch.tensor(float("pixel_values" in batch), device=pl_module.device)
                with_images = int(trainer.strategy.reduce(has_images, reduce_op="sum"))
                if with_images in (0, trainer.world_size):
                    found += exact_matches(pl_module, trainer.strategy.batch_to_device(batch))
        pl_module.train(training)
        # Sums of whole numbers: exact in float64 on any number of ranks.
        samples, exact = (int(trainer.strategy.reduce(each, reduce_op="sum")) for each in found.unbind())
        return {"samples": samples, "exact": exact}

    @rank_zero_only
    def _show(self, when: str, counts: Mapping[str, int]) -> None:
        share = f" ({counts['exact'] / counts['samples']:.1%})" if counts["samples"] else ""
        print(f"Exact match {when}: {counts['exact']} of {counts['samples']} held-out samples{share}", flush=True)


def exact_matches(module: Any, batch: Mapping[str, Any]) -> Tensor:
    """How many samples of a batch have labels, and how many of these the module predicts entirely: float64 [2]."""
    labels: Tensor = batch["labels"]
    wanted = labels[:, 1:]
    positions = (wanted != -100).any(0).nonzero().flatten()
    if not len(positions):
        positions = torch.zeros(1, dtype=torch.int64, device=labels.device)  # a blank batch: go through the model too
    inputs = {name: value for name, value in batch.items() if name not in _NOT_INPUTS}
    logits = module(**inputs, logits_to_keep=positions)
    wanted = wanted[:, positions]
    counts = wanted != -100
    right = ((logits.argmax(-1) == wanted) | ~counts).all(1)
    labelled = counts.any(1)
    return torch.stack([labelled.sum(), (right & labelled).sum()]).double()
