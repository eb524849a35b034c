"""What goes wrong in training is named with its place, and before it does harm."""

import io
import math
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr
from datetime import timedelta
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_qlora.modules.fsdp2_strategy import FSDP2Strategy
from lightning_qlora.modules.llama import default_lora
from lightning_qlora.modules.qlora import QLoRALlama
from lightning_qlora.modules.strategies import build_strategy
from tests.distributed import RankPools, groups

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPools]:
    with RankPools() as pools:
        yield pools


def trainer(device: str, strategy: Any, **options: Any) -> L.Trainer:
    return L.Trainer(
        accelerator=device, devices=dist.get_world_size(), strategy=strategy, logger=False, inference_mode=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, **options,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------- a loss of NaN


class Poisoned(QLoRALlama):
    """In the second step, the first micro-batch of the last rank has a loss of NaN."""

    def _loss_sum(self, batch: dict[str, Any]) -> Tensor:
        loss = super()._loss_sum(batch)
        last = self.global_rank == self.trainer.world_size - 1
        return loss * math.nan if last and self.trainer.fit_loop.epoch_loop.batch_idx == 2 else loss


class Overflowing(QLoRALlama):
    """In the second step the gradients of the last rank overflow, though every loss is finite."""

    def on_after_backward(self) -> None:
        if self.global_rank == self.trainer.world_size - 1 and self.trainer.fit_loop.epoch_loop.batch_idx == 3:
            next(p for p in self.parameters() if p.requires_grad).grad.mul_(math.inf)


def train_poisoned(
    kind: type[QLoRALlama], model_dir: Path, device: str, name: Any, precision: str
) -> tuple[str, bool, int, list[float]]:
    """The error; whether the weights are those after the first step; steps done; losses."""
    module = kind(model_dir, default_lora(4), learning_rate=1e-2)
    ids = torch.randint(3, 300, (1, 12), generator=torch.Generator().manual_seed(dist.get_rank()))
    data = [{"input_ids": ids, "labels": ids, "num_loss_tokens": 11}] * 6
    kept: list[list[Tensor]] = []
    losses: list[float] = []

    class Keep(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            if len(losses) < trainer.global_step:
                losses.append(float(trainer.callback_metrics["train_loss"]))
                kept.append([p.detach().clone() for p in pl_module.parameters() if p.requires_grad])

    fitting = trainer(
        device, build_strategy(name, precision=precision), max_steps=3, accumulate_grad_batches=2, callbacks=[Keep()]
    )
    error = ""
    try:
        fitting.fit(module, DataLoader(data, batch_size=None))
    except FloatingPointError as caught:
        error = f"{caught} {caught.__notes__}"
    compared = [p.detach() for p in module.parameters() if p.requires_grad] if error else kept[1]
    same = [torch.equal(local(a), local(b)) for a, b in zip(kept[0], compared, strict=True)]
    return error, all(same), fitting.global_step, losses


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@pytest.mark.parametrize("name", ["fsdp2", "ddp"])
@pytest.mark.parametrize(("world_size", "device"), groups(2))
def test_a_loss_of_nan_is_named_before_it_spoils_the_weights(
    ranks: RankPools, tiny_llama_dir: Path, world_size: int, device: str, name: str
) -> None:
    results = ranks.run(world_size, device, train_poisoned, Poisoned, tiny_llama_dir, device, name, "32-true")
    for rank, (error, unharmed, steps, _) in enumerate(results):
        assert "The loss of optimizer step 2 is not finite: micro-batch 0 of rank 1." in error
        assert f"This was rank {rank} of 2, after optimizer step 1, at batch 3 of the epoch." in error
        assert unharmed
        assert steps == 1


@pytest.mark.parametrize(("world_size", "device"), groups(2))
def test_an_overflow_of_gradients_alone_is_named_too(
    ranks: RankPools, tiny_llama_dir: Path, world_size: int, device: str
) -> None:
    for error, unharmed, _, _ in ranks.run(
        world_size, device, train_poisoned, Overflowing, tiny_llama_dir, device, "fsdp2", "32-true"
    ):
        assert re.search("The gradient norm of optimizer step 2 is (inf|nan) though its loss is finite", error)
        assert unharmed


@pytest.mark.parametrize(("world_size", "device"), groups(2))
def test_with_a_loss_scaler_all_ranks_skip_the_step(
    ranks: RankPools, tiny_llama_dir: Path, world_size: int, device: str
) -> None:
    for error, unharmed, steps, losses in ranks.run(
        world_size, device, train_poisoned, Poisoned, tiny_llama_dir, device, "fsdp2", "16-mixed"
    ):
        assert error == ""
        assert unharmed
        assert steps == 3
        assert [math.isfinite(loss) for loss in losses] == [True, False, True]


# ------------------------------------------------------------------------------------------ ranks that do not keep up


class Project(L.LightningModule):
    """One trained layer; ``pause`` seconds before the third batch, on the last rank alone."""

    def __init__(self, pause: float = 0.0) -> None:
        super().__init__()
        self.pause = pause

    def configure_model(self) -> None:
        self.net = nn.Sequential(nn.Linear(4, 4))
        if isinstance(self.trainer.strategy, FSDP2Strategy):
            self.trainer.strategy.shard(self.net, [[self.net[0]]])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if batch_idx == 2 and self.global_rank == self.trainer.world_size - 1:
            sleep(self.pause)
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit_uneven(device: str, name: Any) -> str:
    data = DataLoader(torch.ones(4 + dist.get_rank(), 2, 4), batch_size=None)
    with pytest.raises(ValueError, match="The ranks' training loaders have") as refusal:
        trainer(device, build_strategy(name), max_epochs=1).fit(Project(), data)
    trainer(device, build_strategy(name), max_epochs=1, limit_train_batches=4).fit(Project(), data)
    return str(refusal.value)


@pytest.mark.parametrize("name", ["fsdp2", "ddp"])
@pytest.mark.parametrize(("world_size", "device"), groups(2))
def test_loaders_of_different_lengths_are_refused(ranks: RankPools, world_size: int, device: str, name: str) -> None:
    for message in ranks.run(world_size, device, fit_uneven, device, name):
        assert "have 4, 5 batches: rank 0 would stop first" in message
        assert "Trainer(limit_train_batches=4)" in message


def fit_slowly(device: str) -> str:
    written = io.StringIO()
    with redirect_stderr(written):
        strategy = FSDP2Strategy(timeout=timedelta(seconds=1))
        trainer(device, strategy, max_steps=4).fit(Project(2.0), DataLoader(torch.ones(4, 2, 4), batch_size=None))
    return written.getvalue()


@pytest.mark.parametrize(("world_size", "device"), groups(2))
def test_a_rank_that_waits_long_says_where(ranks: RankPools, world_size: int, device: str) -> None:
    text, _ = ranks.run(world_size, device, fit_slowly, device)
    assert (
        text.count("No batch has begun for 1 s on rank 0 of 2, after optimizer step 2, at batch 2 of the epoch.") == 1
    )


HANGING = """
import sys, time, warnings
from datetime import timedelta
import lightning.pytorch as L, torch
from lightning_qlora.modules.fsdp2_strategy import FSDP2Strategy

class Project(L.LightningModule):
    def configure_model(self):
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 4))
        self.trainer.strategy.shard(self.net, [[self.net[0]]])
    def training_step(self, batch, batch_idx):
        if batch_idx == 2 and self.global_rank == 1:
            time.sleep(120)
        return self.net(batch).square().mean()
    def on_train_batch_end(self, *_):
        print("mesh", tuple(self.trainer.strategy.mesh.shape), "step", self.trainer.global_step, flush=True)
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

L.Trainer(accelerator="cpu", devices=1, num_nodes=2, strategy=FSDP2Strategy(timeout=timedelta(seconds=4)),
          logger=False, max_steps=4, enable_checkpointing=False, enable_progress_bar=False,
          enable_model_summary=False).fit(Project(), torch.utils.data.DataLoader(torch.ones(8, 2, 4), batch_size=None))
"""


def test_two_nodes_train_and_a_collective_that_hangs_ends_with_its_place(tmp_path: Path) -> None:
    """Two processes, each with the variables that torchrun sets on a node of its own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": "0", "GROUP_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1",
            "TORCHELASTIC_RUN_ID": "tests", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", HANGING], env=environment, cwd=tmp_path, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
        )  # fmt: skip
    try:
        started = monotonic()
        text, _ = processes[0].communicate(timeout=100)
        assert monotonic() - started < 100
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert processes[0].returncode == 1, text
    assert "mesh (2,) step 2" in text
    assert "This was rank 0 of 2, after optimizer step 2, at batch 2 of the epoch." in text
