"""What goes wrong in training is named with its place, and before it does harm."""

import io
import math
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, suppress
from datetime import timedelta
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.utils.data import DataLoader, IterableDataset

from lightning_qlora.callbacks import StepCheckpoint
from lightning_qlora.modules.distributed.collectives import end_process_group
from lightning_qlora.modules.distributed.fsdp2 import FSDP2Strategy
from lightning_qlora.modules.distributed.strategies import ReplicatedStrategy
from lightning_qlora.modules.distributed.trained_checkpoints import read_checkpoint
from lightning_qlora.modules.lora.config import default_lora
from lightning_qlora.modules.training.causal_lm import QLoRACausalLM
from tests.distributed import RankPools, build, groups

pytestmark = pytest.mark.filterwarnings("ignore")


def trainer(device: str, strategy: Any, **options: Any) -> L.Trainer:
    saving = any(isinstance(callback, Checkpoint) for callback in options.get("callbacks", []))
    return L.Trainer(
        accelerator=device, devices=dist.get_world_size(), strategy=strategy, logger=False, inference_mode=False,
        enable_checkpointing=saving, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, **options,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------- a loss of NaN


class Poisoned(QLoRACausalLM):
    """In the second step, the first micro-batch of the last rank has a loss of NaN."""

    def loss_sum(self, batch: dict[str, Any]) -> tuple[Tensor, int]:
        loss, tokens = super().loss_sum(batch)
        last = self.global_rank == self.trainer.world_size - 1
        poisoned = last and self.trainer.fit_loop.epoch_loop.batch_idx == 2
        return loss * math.nan if poisoned else loss, tokens


class Overflowing(QLoRACausalLM):
    """In the second step the gradients of the last rank overflow, though every loss is finite."""

    def on_after_backward(self) -> None:
        if self.global_rank == self.trainer.world_size - 1 and self.trainer.fit_loop.epoch_loop.batch_idx == 3:
            next(p for p in self.parameters() if p.requires_grad).grad.mul_(math.inf)


def train_poisoned(
    kind: type[QLoRACausalLM],
    model_dir: Path,
    device: str,
    name: Any,
    precision: str,
    options: dict[str, Any],
    saves: Path,
) -> tuple[str, bool, int, list[float]]:
    """The error; whether the weights are those after the first step; steps done; losses. Saves after every step."""
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

    strategy = build(name, precision=precision, **options)
    callbacks = [Keep(), StepCheckpoint(saves, 1, 3)]
    fitting = trainer(device, strategy, max_steps=3, accumulate_grad_batches=2, callbacks=callbacks)
    error = ""
    try:
        fitting.fit(module, DataLoader(data, batch_size=None))
    except FloatingPointError as caught:
        error = f"{caught} {caught.__notes__}"
    compared = [p.detach() for p in module.parameters() if p.requires_grad] if error else kept[1]
    # An error makes Lightning take a DDP model off the GPU.
    same = [torch.equal(local(a).cpu(), local(b).cpu()) for a, b in zip(kept[0], compared, strict=True)]
    return error, all(same), fitting.global_step, losses


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


WAYS = pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fsdp2", {}),
        ("fsdp2", {"offload": True, "sharded_checkpoints": True, "async_save": True}),
        ("ddp", {"async_save": True}),
    ],
    ids=["fsdp2", "offload-sharded-async", "ddp-async"],
)


@WAYS
@pytest.mark.parametrize(("world_size", "device"), groups(2))
def test_a_loss_of_nan_is_named_before_it_spoils_the_weights(
    ranks: RankPools, tiny_llama_dir: Path, tmp_path: Path, world_size: int, device: str, name: str, options: Any
) -> None:
    results = ranks.run(
        world_size, device, train_poisoned, Poisoned, tiny_llama_dir, device, name, "32-true", options, tmp_path
    )
    for rank, (error, unharmed, steps, _) in enumerate(results):
        assert "The loss of optimizer step 2 is not finite: micro-batch 0 of rank 1." in error
        assert f"This was rank {rank} of 2, after optimizer step 1, at batch 3 of the epoch." in error
        assert unharmed
        assert steps == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step=1.ckpt"]
    assert read_checkpoint(tmp_path / "step=1.ckpt")["global_step"] == 1


@pytest.mark.parametrize(("world_size", "device"), groups(2))
def test_an_overflow_of_gradients_alone_is_named_too(
    ranks: RankPools, tiny_llama_dir: Path, tmp_path: Path, world_size: int, device: str
) -> None:
    for error, unharmed, _, _ in ranks.run(
        world_size, device, train_poisoned, Overflowing, tiny_llama_dir, device, "fsdp2", "32-true", {}, tmp_path
    ):
        assert re.search("The gradient norm of optimizer step 2 is (inf|nan) though its loss is finite", error)
        assert unharmed


@WAYS
@pytest.mark.parametrize(("world_size", "device"), groups(2))
def test_with_a_loss_scaler_all_ranks_skip_the_step(
    ranks: RankPools, tiny_llama_dir: Path, tmp_path: Path, world_size: int, device: str, name: str, options: Any
) -> None:
    for error, unharmed, steps, losses in ranks.run(
        world_size, device, train_poisoned, Poisoned, tiny_llama_dir, device, name, "16-mixed", options, tmp_path
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

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.net(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Stream(IterableDataset[Tensor]):
    """So many batches, and nobody knows before they are read."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.ones(self.batches, 2, 4))


def fit_uneven(device: str, name: Any, streamed: bool, validating: bool) -> tuple[str, int]:
    """With a batch more on each further rank, of training or of validation; then with a limit that all can keep."""

    def loader(batches: int) -> DataLoader[Tensor]:
        return DataLoader(Stream(batches) if streamed else torch.ones(batches, 2, 4), batch_size=None)

    even, uneven = loader(4), loader(4 + dist.get_rank())
    loaders = [even, uneven] if validating else [uneven, even]
    fitting = trainer(device, build(name), max_epochs=1, num_sanity_val_steps=0)
    with pytest.raises(ValueError, match="loaders") as refusal:
        fitting.fit(Project(), *loaders)
    limited = trainer(device, build(name), max_epochs=1, limit_train_batches=4, limit_val_batches=4)
    limited.fit(Project(), *loaders)
    trainer(device, build(name), max_epochs=1).fit(Project(), even, even)
    assert limited.global_step == 4
    return str(refusal.value), fitting.global_step


@pytest.mark.parametrize("loaders", ["training", "validation"])
@pytest.mark.parametrize("name", ["fsdp2", "ddp"])
@pytest.mark.parametrize(("world_size", "device"), groups(2))
def test_loaders_of_different_lengths_are_refused(
    ranks: RankPools, world_size: int, device: str, name: str, loaders: str
) -> None:
    validating = loaders == "validation"
    for message, steps in ranks.run(world_size, device, fit_uneven, device, name, False, validating):
        assert f"The ranks' {loaders} loaders have 4, 5 batches: rank 0 would stop first" in message
        assert f"Trainer(limit_{'val' if validating else 'train'}_batches=4)" in message
        assert steps == (4 if validating else 0)


@pytest.mark.parametrize("loaders", ["training", "validation"])
@pytest.mark.parametrize("name", ["fsdp2", "ddp"])
@pytest.mark.parametrize(("world_size", "device"), groups(2))
def test_a_stream_that_ends_early_on_one_rank_ends_all(
    ranks: RankPools, world_size: int, device: str, name: str, loaders: str
) -> None:
    for message, steps in ranks.run(world_size, device, fit_uneven, device, name, True, loaders == "validation"):
        assert "The loaders of the ranks [0] ended after 4 batches, those of the others go on" in message
        assert 3 <= steps <= 4  # Lightning reads a batch ahead


def fit_slowly(device: str) -> str:
    written = io.StringIO()
    with redirect_stderr(written):
        strategy = FSDP2Strategy(timeout=timedelta(seconds=1))
        trainer(device, strategy, max_steps=4).fit(Project(2.0), DataLoader(torch.ones(4, 2, 4), batch_size=None))
    return written.getvalue()


@pytest.mark.parametrize(("world_size", "device"), groups(2))
def test_a_rank_that_waits_long_says_where(ranks: RankPools, world_size: int, device: str) -> None:
    text, _ = ranks.run(world_size, device, fit_slowly, device)
    step = "2" if device == "cpu" else "[23]"  # the host is ahead of a GPU
    message = f"No batch has begun for [12] s on rank 0 of 2, after optimizer step {step}, at batch 2 of the epoch"
    assert len(re.findall(message, text)) == 1


def save_slowly(directory: Path, async_save: bool) -> tuple[str, list[str]]:
    """Rank 1 writes its shards of the second checkpoint for longer than collectives may take."""
    patch, real = pytest.MonkeyPatch(), FileSystemWriter.write_data

    def write_data(self: FileSystemWriter, *args: Any) -> Any:
        if dist.get_rank() == 1 and "step=2" in str(self.path):
            sleep(6)
        return real(self, *args)

    patch.setattr(FileSystemWriter, "write_data", write_data)
    strategy = FSDP2Strategy(sharded_checkpoints=True, async_save=async_save, timeout=timedelta(seconds=3))
    try:
        data = DataLoader(torch.ones(4, 2, 4), batch_size=None)
        with pytest.raises(OSError, match="could not be written") as failure:
            trainer("cpu", strategy, max_steps=4, callbacks=[StepCheckpoint(directory, 1)]).fit(Project(), data)
    finally:
        patch.undo()
    return f"{failure.value} {failure.value.__notes__}", sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("async_save", [False, True])
def test_a_writer_that_hangs_ends_training_and_hurts_no_checkpoint(
    ranks: RankPools, tmp_path: Path, async_save: bool
) -> None:
    for error, left in ranks.run(2, "cpu", save_slowly, tmp_path, async_save):
        assert "step=2.ckpt could not be written (rank 0:" in error
        assert "Timed out waiting" in error
        assert "after optimizer step" in error
        assert "step=1.ckpt" in left
        assert "step=2.ckpt" not in left


@pytest.mark.parametrize("strategy", [FSDP2Strategy, ReplicatedStrategy])
def test_a_timeout_that_is_none_is_refused(strategy: Any) -> None:
    with pytest.raises(ValueError, match="timeout must be more than 0, got 0 s"):
        strategy(timeout=timedelta(0))


HANGING = """
import os, time
from datetime import timedelta
from pathlib import Path
import lightning.pytorch as L, torch
from lightning_qlora.modules.distributed.fsdp2 import FSDP2Strategy

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

Path("ready" + os.environ["RANK"]).touch()
while len(list(Path().glob("ready*"))) < 2:  # the timeout is too short for a difference in starting
    time.sleep(0.02)
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


LAUNCHED = """
import os, signal, sys, time
import lightning.pytorch as L, torch
from lightning_qlora.modules.distributed.fsdp2 import FSDP2Strategy

if sys.argv[1] == "main while the other starts" and "LOCAL_RANK" in os.environ:
    os.kill(os.getppid(), signal.SIGKILL)

class Project(L.LightningModule):
    def configure_model(self):
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 4))
        self.trainer.strategy.shard(self.net, [[self.net[0]]])
    def training_step(self, batch, batch_idx):
        if self.global_rank == 1:
            os.kill(os.getppid() if sys.argv[1] == "main" else os.getpid(), signal.SIGKILL)
        time.sleep(120)  # as if in a collective whose backend does not notice, which NCCL's does not
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

L.Trainer(accelerator="cpu", devices=2, strategy=FSDP2Strategy(), logger=False, max_steps=4, enable_progress_bar=False,
          enable_checkpointing=False).fit(Project(), torch.utils.data.DataLoader(torch.ones(8, 2, 4), batch_size=None))
"""


@pytest.mark.parametrize(
    ("killed", "said"),
    [
        ("launched", r"Rank 1 \(process \d+\) was killed by SIGKILL, as the kernel does .* This is rank 0 of 2, after"),
        ("main", r"Rank 1: the main process \(\d+\) is gone; exiting"),
        ("main while the other starts", r"Rank 1: the main process \(\d+\) is gone; exiting"),
    ],
)
def test_a_rank_that_no_collective_tells_of_a_death_ends_too(tmp_path: Path, killed: str, said: str) -> None:
    (tmp_path / "script.py").write_text(LAUNCHED)
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in ours}
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py"), killed], cwd=tmp_path, text=True, start_new_session=True,
        env=environment | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        text, _ = process.communicate(timeout=120)  # until both have ended: they share the pipe
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, text
    assert re.search(said, text), text


# ------------------------------------------------------------------------------------------------- the process's end


def gloo_threads() -> int:
    names = []
    for name in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # of a thread that has just ended
            names.append(name.read_text())
    return sum(name.startswith("pt_gloo_runloop") for name in names)


def test_no_thread_of_gloo_lives_on_to_abort_the_ending_process() -> None:
    others = gloo_threads()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    deadline = monotonic() + 60
    while gloo_threads() == others and monotonic() < deadline:  # a thread names itself
        sleep(0.01)
    assert gloo_threads() > others
    end_process_group()
    assert gloo_threads() == others
    end_process_group()  # nothing to end
