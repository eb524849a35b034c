"""Checkpoints on disk: whole or not there, in either form, written at once or on the side."""

import errno
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Checkpoint
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_qlora.callbacks import GracefulStop, StepCheckpoint
from lightning_qlora.modules.distributed import trained_checkpoints as checkpointing
from lightning_qlora.modules.distributed.fsdp2 import FSDP2Strategy
from lightning_qlora.modules.distributed.strategies import OneDeviceStrategy
from lightning_qlora.modules.distributed.trained_checkpoints import read_checkpoint
from tests.distributed import RankPools, build

pytestmark = pytest.mark.filterwarnings("ignore")
FORMS = pytest.mark.parametrize("sharded", [False, True], ids=["file", "sharded"])


class Project(L.LightningModule):
    """A frozen layer and a trained one of 301 rows, and a note of what happened."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []

    def configure_model(self) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 301))
        self.net[0].requires_grad_(False)
        if isinstance(self.trainer.strategy, FSDP2Strategy):
            self.trainer.strategy.shard(self.net, [[self.net[0]], [self.net[1]]])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean()

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps.append(self.trainer.global_step)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.1)

    def weights(self) -> Tensor:
        weight = self.net[1].weight.detach()
        return (weight.full_tensor() if isinstance(weight, DTensor) else weight).clone()

    def save_adapter(self, directory: Path) -> None:
        weight = self.weights()
        if self.global_rank == 0:
            directory.mkdir(parents=True)
            torch.save(weight, directory / "adapter.pt")


def fit(
    strategy: Any, steps: int, *callbacks: L.Callback, resume: Path | None = None, module: Project | None = None,
    first: int = 0,
) -> L.Trainer:  # fmt: skip
    """Train on random batches, from the one of number ``first`` on: a plain loader begins anew after a resume."""
    distributed = dist.is_initialized()
    saving = any(isinstance(callback, Checkpoint) for callback in callbacks)
    trainer = L.Trainer(
        accelerator="cpu", devices=dist.get_world_size() if distributed else 1, strategy=strategy, logger=False,
        max_steps=steps, max_epochs=-1, callbacks=list(callbacks), enable_checkpointing=saving,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    data = torch.randn(40, 4, 8, generator=torch.Generator().manual_seed(1))
    trainer.fit(module or Project(), DataLoader(data[first:], batch_size=None), ckpt_path=resume)
    return trainer


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# --------------------------------------------------------------------------------------------------------- retention


@FORMS
@pytest.mark.parametrize("async_save", [False, True])
def test_a_resumed_run_keeps_as_many_as_one_that_nothing_stopped(
    tmp_path: Path, sharded: bool, async_save: bool
) -> None:
    """Two runs, the second from what the first left, beside files that are not ours to remove."""

    def strategy() -> OneDeviceStrategy:
        return OneDeviceStrategy(sharded_checkpoints=sharded, async_save=async_save)

    (tmp_path / "best-step=1.ckpt").touch()
    keep, adapters = StepCheckpoint(tmp_path / "c", 2, 2, tmp_path / "a"), tmp_path / "a"
    fit(strategy(), 7, keep)
    assert names(tmp_path / "c") == ["step=4.ckpt", "step=6.ckpt"]
    assert names(adapters) == ["step=4", "step=6"]
    (tmp_path / "c" / "step=6.ckpt").rename(tmp_path / "c" / "interrupted-step=7.ckpt")
    trainer = fit(
        strategy(), 9, StepCheckpoint(tmp_path / "c", 2, 2), resume=tmp_path / "c" / "interrupted-step=7.ckpt"
    )
    assert trainer.lightning_module.steps == [7, 8, 9]
    assert names(tmp_path / "c") == ["interrupted-step=7.ckpt", "step=8.ckpt"]
    fit(strategy(), 10, StepCheckpoint(tmp_path / "c", 2, 2), resume=tmp_path / "c" / "step=8.ckpt")
    assert names(tmp_path / "c") == ["step=10.ckpt", "step=8.ckpt"]
    assert names(tmp_path) == ["a", "best-step=1.ckpt", "c"]


def test_checkpoints_of_a_course_that_was_given_up_go_first(tmp_path: Path) -> None:
    fit(OneDeviceStrategy(), 6, StepCheckpoint(tmp_path, 1, 4))
    assert names(tmp_path) == [f"step={i}.ckpt" for i in (3, 4, 5, 6)]
    fit(OneDeviceStrategy(), 4, StepCheckpoint(tmp_path, 1, 2), resume=tmp_path / "step=3.ckpt")
    assert names(tmp_path) == ["step=4.ckpt", "step=6.ckpt"]
    assert read_checkpoint(tmp_path / "step=4.ckpt")["global_step"] == 4


@pytest.mark.parametrize(("option", "message"), [({"every_n_steps": 0}, "every_n_steps"), ({"keep": 0}, "keep")])
def test_a_period_or_number_below_one_is_refused(option: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"{message} must be at least 1, got 0"):
        StepCheckpoint("somewhere", **{"every_n_steps": 1, **option})


# ---------------------------------------------------------------------------------------------------- failing writes


def full_disk(monkeypatch: pytest.MonkeyPatch, saves: set[int]) -> None:
    """Let the writes of the given saves (from 1) fail half way, as the operating system lets them fail."""
    real, count = checkpointing.torch.save, [0]

    def save(content: Any, file: Any) -> None:
        count[0] += 1
        if count[0] in saves:
            file.write(b"half")
            file = open("/dev/full", "wb")  # noqa: PTH123, SIM115  # where every write ends with ENOSPC
        real(content, file)

    monkeypatch.setattr(checkpointing.torch, "save", save)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which Linux has")
@pytest.mark.parametrize("async_save", [False, True])
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, async_save: bool
) -> None:
    full_disk(monkeypatch, {3, 4})
    with pytest.warns(
        UserWarning, match=r"The disk is full: .*step=3\.ckpt could not be written .*No space left on device"
    ):
        trainer = fit(OneDeviceStrategy(async_save=async_save), 4, StepCheckpoint(tmp_path, 1, 2))
    assert trainer.global_step == 4
    assert names(tmp_path) == ["step=2.ckpt"]  # the one before it made room
    resumed = fit(
        OneDeviceStrategy(async_save=async_save), 5, StepCheckpoint(tmp_path, 1, 2), resume=tmp_path / "step=2.ckpt"
    )
    assert resumed.lightning_module.steps == [3, 4, 5]
    assert names(tmp_path) == ["step=4.ckpt", "step=5.ckpt"]


def test_an_adapter_that_does_not_fit_leaves_no_half_of_it(tmp_path: Path) -> None:
    class Adapted(Project):
        def save_adapter(self, directory: Path) -> None:
            directory.mkdir(parents=True)
            if self.trainer.global_step == 2:
                raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    keep = StepCheckpoint(tmp_path / "c", 1, 3, tmp_path / "a")
    with pytest.warns(UserWarning, match="The disk is full: Error while serializing"):
        fit(OneDeviceStrategy(), 3, keep, module=Adapted())
    assert names(tmp_path / "a") == ["step=3"]
    assert names(tmp_path / "c") == ["step=2.ckpt", "step=3.ckpt"]
    with pytest.raises(TypeError, match=r"needs Plain\.save_adapter"):
        fit(OneDeviceStrategy(), 3, keep, module=type("Plain", (Project,), {"save_adapter": None})())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which Linux has")
def test_who_asks_for_a_checkpoint_hears_that_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = fit(OneDeviceStrategy(), 1)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    before = (tmp_path / "x.ckpt").read_bytes()
    full_disk(monkeypatch, {1})
    with pytest.raises(OSError, match=r"x\.ckpt could not be written") as failure:
        trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert failure.value.errno == errno.ENOSPC
    assert names(tmp_path) == ["x.ckpt"]
    assert (tmp_path / "x.ckpt").read_bytes() == before


WAYS = pytest.mark.parametrize(
    "way",
    [
        {"name": "fsdp2"},
        {"name": "fsdp2", "async_save": True},
        {"name": "fsdp2", "sharded_checkpoints": True},
        {"name": "fsdp2", "sharded_checkpoints": True, "async_save": True, "offload": True},
        {"name": "ddp"},
        {"name": "ddp", "sharded_checkpoints": True, "async_save": True},
    ],
    ids=lambda way: "-".join(way.values() if len(way) == 1 else [way["name"], *list(way)[1:]]),
)


def fit_with_a_failing_rank(directory: Path, way: dict[str, Any], code: int) -> tuple[Any, list[str]]:
    """The rank that writes (of several the last) cannot write the second checkpoint, and rank 0 no second adapter."""
    patch, sharded = pytest.MonkeyPatch(), way.get("sharded_checkpoints", False)
    real_write, real_save = FileSystemWriter.write_data, checkpointing.torch.save
    failing = dist.get_rank() == (dist.get_world_size() - 1 if sharded else 0)

    def check(path: Any) -> None:
        if failing and "step=2.ckpt" in str(path):
            raise OSError(code, os.strerror(code))

    def write_data(self: FileSystemWriter, *args: Any) -> Any:
        check(self.path)
        return real_write(self, *args)

    def save(content: Any, file: Any) -> None:
        check(getattr(file, "name", file))
        real_save(content, file)

    class Adapted(Project):
        def save_adapter(self, directory: Path) -> None:
            super().save_adapter(directory)
            if code == errno.ENOSPC and self.global_rank == 0 and self.trainer.global_step == 2:
                raise SafetensorError(f"I/O error: No space left on device (os error {code})")

    patch.setattr(FileSystemWriter, "write_data", write_data)
    patch.setattr(checkpointing.torch, "save", save)
    keep = StepCheckpoint(directory / "c", 1, 2, directory / "a")
    try:
        trainer = fit(build(**way), 3, keep, module=Adapted())
    except OSError as failure:
        return str(failure), names(directory / "c")
    finally:
        patch.undo()
    return trainer.lightning_module.steps, names(directory / "c")


@WAYS
def test_one_rank_that_cannot_write_makes_all_ranks_do_without(
    ranks: RankPools, tmp_path: Path, way: dict[str, Any]
) -> None:
    rank = 1 if "sharded_checkpoints" in way else 0
    for steps, kept in ranks.run(2, "cpu", fit_with_a_failing_rank, tmp_path / "full", way, errno.ENOSPC):
        assert steps == [1, 2, 3]
        assert kept == ["step=1.ckpt", "step=3.ckpt"]
    assert names(tmp_path / "full" / "a") == ["step=1", "step=3"]
    for error, kept in ranks.run(2, "cpu", fit_with_a_failing_rank, tmp_path / "broken", way, errno.EIO):
        assert f"step=2.ckpt could not be written (rank {rank}: [Errno 5] Input/output error)" in error
        assert kept == ["step=1.ckpt"]


def save_where_nothing_can_be(path: Path) -> str:
    trainer = fit(FSDP2Strategy(), 1)
    with pytest.raises(OSError, match=r"x\.ckpt could not be written") as failure:
        trainer.save_checkpoint(path)
    return str(failure.value)


def test_a_place_that_is_no_directory_is_an_error_on_all_ranks(ranks: RankPools, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for error in ranks.run(2, "cpu", save_where_nothing_can_be, tmp_path / "file" / "x.ckpt"):
        assert "rank 0: [Errno" in error


# ------------------------------------------------------------------------------------------------------------ signals


class Signal(L.Callback):
    """SIGTERM to the last rank alone, in the third step."""

    def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 2 and trainer.global_rank == trainer.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def fit_and_stop(directory: Path, way: dict[str, Any]) -> tuple[list[int], list[int], list[str], Tensor, Tensor]:
    """Steps until the signal and after resuming; what was left; weights of this run and of one without a signal."""
    stop = GracefulStop(directory)
    first = fit(build(**way), 6, Signal(), stop)
    left = names(directory)
    assert stop.signum == signal.SIGTERM
    again = fit(build(**way), 6, resume=stop.checkpoint_path, first=3)
    whole = fit(build(**way), 6)
    modules = [trainer.lightning_module for trainer in (first, again, whole)]
    return modules[0].steps, modules[1].steps, left, modules[1].weights(), modules[2].weights()


@WAYS
def test_sigterm_to_one_rank_leaves_a_checkpoint_that_continues_exactly(
    ranks: RankPools, tmp_path: Path, way: dict[str, Any]
) -> None:
    for first, again, left, resumed, whole in ranks.run(2, "cpu", fit_and_stop, tmp_path, way):
        assert (first, again) == ([1, 2, 3], [4, 5, 6])
        assert left == ["interrupted-step=3.ckpt"]
        assert torch.equal(resumed, whole)
    assert (tmp_path / left[0]).is_dir() == ("sharded_checkpoints" in way)


# -------------------------------------------------------------------------------------------------------- on the side


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The write is held up until two more steps are done, and holds what was there when it was asked for."""
    go_on, saved = threading.Event(), {}
    real = checkpointing.torch.save
    monkeypatch.setattr(checkpointing.torch, "save", lambda *args: (go_on.wait(30), real(*args)))

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            saved[trainer.global_step] = pl_module.weights()
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "a.ckpt")
            if trainer.global_step == 4:
                assert not (tmp_path / "a.ckpt").exists()
                go_on.set()
                trainer.save_checkpoint(tmp_path / "b.ckpt")  # waits for the first
                assert (tmp_path / "a.ckpt").exists()

    fit(OneDeviceStrategy(async_save=True), 5, Watch())
    assert names(tmp_path) == ["a.ckpt", "b.ckpt"]
    for step, name in ((2, "a"), (4, "b")):
        checkpoint = read_checkpoint(tmp_path / f"{name}.ckpt")
        assert torch.equal(checkpoint["state_dict"]["net.1.weight"], saved[step])
        assert checkpoint["global_step"] == step
        assert checkpoint["optimizer_states"][0]["state"]["net.1.weight"]["step"] == step


@pytest.mark.parametrize("sharded", [False, True])
def test_a_checkpoint_before_the_first_step_changes_no_later_one(
    ranks: RankPools, tmp_path: Path, sharded: bool
) -> None:
    """Such is one of 16-mixed while the loss scaler still skips steps. Adam would count a step that was none."""
    (weights, counted), *_ = ranks.run(2, "cpu", save_before_the_first_step, tmp_path / "a.ckpt", sharded)
    plain, *_ = ranks.run(2, "cpu", train_and_return_weights, None)
    resumed, *_ = ranks.run(2, "cpu", train_and_return_weights, tmp_path / "a.ckpt")
    assert counted == 3
    assert torch.equal(weights, plain)
    assert torch.equal(resumed, plain)


def save_before_the_first_step(path: Path, sharded: bool) -> tuple[Tensor, float]:
    class Save(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.save_checkpoint(path)

    trainer = fit(FSDP2Strategy(sharded_checkpoints=sharded), 3, Save())
    (state, *_) = trainer.optimizers[0].state.values()
    return trainer.lightning_module.weights(), float(state["step"])


def train_and_return_weights(resume: Path | None) -> Tensor:
    return fit(FSDP2Strategy(), 3, resume=resume).lightning_module.weights()


def test_an_exception_in_training_does_not_lose_the_checkpoint_before_it(tmp_path: Path) -> None:
    class Fail(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "a.ckpt")
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fit(OneDeviceStrategy(async_save=True), 2, Fail())
    assert read_checkpoint(tmp_path / "a.ckpt")["global_step"] == 1


# ----------------------------------------------------------------------------------------------- the form, and damage


def save_on_ranks(path: Path, sharded: bool) -> int:
    trainer = fit(FSDP2Strategy(sharded_checkpoints=sharded), 2)
    trainer.save_checkpoint(path)
    return sum(p.to_local().numel() for p in trainer.lightning_module.parameters() if p.requires_grad)


def test_a_rank_writes_its_own_shards_and_nothing_that_is_frozen(ranks: RankPools, tmp_path: Path) -> None:
    path = tmp_path / "step=2.ckpt"
    held = ranks.run(2, "cpu", save_on_ranks, path, True)
    assert names(path) == [".metadata", "__0_0.distcp", "__1_0.distcp", "meta.pt"]
    for rank, numel in enumerate(held):  # the weights and two means of each, and the headers of a few tensors
        assert 12 * numel < (path / f"__{rank}_0.distcp").stat().st_size < 12 * numel + 20_000
    saved = FileSystemReader(path).read_metadata().state_dict_metadata
    assert {name.removeprefix("state_dict.") for name in saved if name.startswith("state_dict")} == {
        "net.1.weight", "net.1.bias"
    }  # fmt: skip
    assert "state_dict" not in read_checkpoint(path)


def test_the_same_name_may_change_its_form(ranks: RankPools, tmp_path: Path) -> None:
    path = tmp_path / "step=2.ckpt"
    for sharded in (True, False, True, True):
        ranks.run(2, "cpu", save_on_ranks, path, sharded)
        assert path.is_dir() == sharded
        assert names(tmp_path) == [path.name]
        assert fit(OneDeviceStrategy(), 3, resume=path).lightning_module.steps == [3]


def test_what_a_killed_run_left_half_written_is_cleared_away(ranks: RankPools, tmp_path: Path) -> None:
    (tmp_path / "step=9.ckpt.partial").mkdir()
    (tmp_path / "step=9.ckpt.partial" / "__0_0.distcp").touch()
    (tmp_path / "step=2.ckpt.partial").write_text("half")
    ranks.run(2, "cpu", save_on_ranks, tmp_path / "step=2.ckpt", True)
    assert names(tmp_path) == ["step=2.ckpt"]


def test_what_a_killed_run_was_replacing_comes_back(tmp_path: Path) -> None:
    """Of a directory there is a moment between giving up its name and giving the new one that name."""

    def strategy() -> OneDeviceStrategy:
        return OneDeviceStrategy(sharded_checkpoints=True)

    last = tmp_path / "last.ckpt"
    trainer = fit(strategy(), 2)
    trainer.save_checkpoint(last)
    last.rename(tmp_path / "last.ckpt.old.partial")
    (tmp_path / "last.ckpt.partial").mkdir()
    with pytest.raises(ValueError, match=r"no checkpoint .*last\.ckpt\. A run was killed while it replaced it"):
        fit(strategy(), 3, resume=last)
    trainer.save_checkpoint(tmp_path / "other.ckpt")
    assert names(tmp_path) == ["last.ckpt", "other.ckpt"]
    assert fit(strategy(), 3, resume=last).lightning_module.steps == [3]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "__1_0.distcp").unlink(), r"__1_0\.distcp is missing"),
        (lambda path: truncate(path / "__0_0.distcp"), r"__0_0\.distcp has \d+ bytes instead of \d+"),
        (lambda path: (path / ".metadata").unlink(), r"\.metadata is missing"),
        (lambda path: truncate(path / "meta.pt"), "RuntimeError"),
        (lambda path: (path / "meta.pt").unlink(), "FileNotFoundError"),
    ],
)
def test_a_damaged_directory_is_refused_and_others_are_named(
    ranks: RankPools, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    path = tmp_path / "step=2.ckpt"
    ranks.run(2, "cpu", save_on_ranks, path, True)
    (tmp_path / "step=1.ckpt").touch()
    damage(path)
    with pytest.raises(ValueError, match=rf"step=2\.ckpt is damaged or incomplete.*{message}") as refusal:
        fit(OneDeviceStrategy(), 3, resume=path)
    assert f"Others in {tmp_path}: step=1.ckpt. Move this one away to resume" in str(refusal.value)


def test_shards_of_another_model_are_refused(ranks: RankPools, tmp_path: Path) -> None:
    path = tmp_path / "step=2.ckpt"
    ranks.run(2, "cpu", save_on_ranks, path, True)

    class Other(Project):
        def configure_model(self) -> None:
            super().configure_model()
            self.net[1] = nn.Linear(64, 6)

    trainer = L.Trainer(accelerator="cpu", strategy=OneDeviceStrategy(), logger=False, max_steps=3,
                        enable_checkpointing=False, enable_progress_bar=False)  # fmt: skip
    with pytest.raises(ValueError, match=r"'net\.1\.weight' has shape \(301, 64\), the model \(6, 64\)"):
        trainer.fit(Other(), DataLoader(torch.randn(4, 4, 8), batch_size=None), ckpt_path=path)
