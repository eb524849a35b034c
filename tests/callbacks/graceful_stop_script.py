"""Run by test_graceful_stop.py: two gloo processes train three times, stopped by signals that the test sends.

Prints `READY <phase> <pid of rank 0> <pid of rank 1>` on rank 0 when the test shall send the phase's signal, and writes
what happened to `<directory>/rank<rank>.json`.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_qlora.callbacks import GracefulStop, LossProgress, RunReport, measure

STEPS = 10
clock = 0.0
measure.perf_counter = lambda: clock


class Batches:
    """Resumable random data, different on each rank, more than the steps need."""

    def __init__(self) -> None:
        self.start = self.position = 0

    def __len__(self) -> int:
        return 100

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        start, self.start = self.start, 0
        for index in range(start, len(self)):
            self.position = index + 1
            generator = torch.Generator().manual_seed(1000 * rank + index)
            yield {"x": torch.randn(4, 3, generator=generator), "num_tokens": torch.tensor(5 + rank)}

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["position"]


class Regression(pl.LightningModule):
    """Two micro-batches a step; waits for the test's signal from `ready_at` (an optimizer step) on."""

    def __init__(self, phase: str, ready_at: int | None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)
        with torch.no_grad():
            self.layer.weight.fill_(0.5)
            self.layer.bias.zero_()
        self.phase = phase
        self.ready_at = ready_at

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        global clock
        clock += 1.0  # a second a micro-batch
        if self.ready_at is not None and self.trainer.global_step >= self.ready_at:
            if self.trainer.global_step == self.ready_at and batch_idx % 2 == 0:
                pids: list[int] = [0, 0]
                dist.all_gather_object(pids, os.getpid())
                if self.global_rank == 0:
                    print("READY", self.phase, *pids, flush=True)
            time.sleep(0.15)
        loss = (self.layer(batch["x"]) - batch["x"].sum(1, keepdim=True)).square().mean()
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.05)


def train(directory: Path, phase: str, ready_at: int | None = None, ckpt_path: Path | None = None) -> dict[str, object]:
    stop = GracefulStop(directory / "checkpoints")
    module = Regression(phase, ready_at)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=STEPS,
        accumulate_grad_batches=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=directory,
        callbacks=[RunReport(directory / f"{phase}.json", flush_every_n_steps=3), LossProgress(), stop],
    )
    trainer.fit(module, Batches(), ckpt_path=ckpt_path)
    return {
        "signum": stop.signum,
        "exit_code": stop.exit_code,
        "checkpoint": None if stop.checkpoint_path is None else str(stop.checkpoint_path),
        "global_step": trainer.global_step,
        "weights": [*module.layer.weight.flatten().tolist(), *module.layer.bias.tolist()],
    }


def main(directory: Path) -> int:
    whole = train(directory, "whole")
    first = train(directory, "first", ready_at=3)
    second = train(directory, "second", ready_at=6, ckpt_path=Path(str(first["checkpoint"])))
    third = train(directory, "third", ckpt_path=Path(str(second["checkpoint"])))
    result = {"whole": whole, "first": first, "second": second, "third": third}
    (directory / f"rank{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.destroy_process_group()  # its threads do not outlive the interpreter
    return int(str(first["exit_code"]))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
