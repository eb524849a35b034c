"""Checkpoints of the trained parameters: one file or one shard per rank, written atomically, now or in the background.

A checkpoint holds the trained parameters, their optimizer state under parameter names, and the Trainer's own state;
nothing of a frozen base. Either form continues under any of this package's strategies, on any number of ranks:

- ``step=3.ckpt``, a file of full tensors, gathered to and written by rank 0;
- ``step=3.ckpt/``, a directory with each rank's shards in the format of ``torch.distributed.checkpoint`` and
  ``meta.pt``, which has the rest and the sizes of the other files. All ranks must see the same directory.
"""

from __future__ import annotations

import copy
import errno
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer
from typing_extensions import override

from ..options import at_least
from .collectives import gather_objects, is_distributed

_META = "meta.pt"

_FILES = "files"

#: What is being written or removed is named so, beside its place; only a killed process leaves it behind.
PARTIAL = ".partial"


@dataclass(frozen=True)
class CheckpointOptions:
    """Checkpoints.

    Args:
        save_every: Optimizer steps between two checkpoints, each with its adapter. The last two are kept.
        sharded_checkpoints: Each rank writes its own shards into a directory, instead of rank 0 one file with
            everything.
        async_save: Write checkpoints in the background while training goes on.

    Raises:
        ValueError: If ``save_every`` is below 1.
    """

    save_every: int = 10
    sharded_checkpoints: bool = False
    async_save: bool = False

    def __post_init__(self) -> None:
        at_least(1, save_every=self.save_every)


class TrainedCheckpoints(Strategy):
    """Mixin for Lightning strategies: saves and restores checkpoints as this module describes them.

    The module must give its parameters the names and shapes that it had when saved; that is checked.

    Args:
        sharded_checkpoints: Write a directory with a shard a rank instead of one file.
        async_save: Return from saving once the state is copied, and write it in a thread while training goes on. The
            next save, and the end of training, wait for the write; that is where a failure is raised, too.
    """

    def __init__(self, *args: Any, sharded_checkpoints: bool = False, async_save: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sharded_checkpoints = sharded_checkpoints
        self.async_save = async_save
        self._thread: ThreadPoolExecutor | None = None
        self._pending: tuple[Path, Future[None]] | None = None
        self._group: dist.ProcessGroup | None = None

    # --- state -------------------------------------------------------------------------------------------------------

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        return True  # names and shards are known only then

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return False  # load_checkpoint() has done it

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Nothing is left to do: :meth:`load_checkpoint` has loaded the parameters."""

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Nothing is left to do: :meth:`load_checkpoint` has loaded the optimizers."""

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The trained parameters on CPU: full and on rank 0 only, or each rank's shards. All ranks must call it."""
        options = StateDictOptions(
            full_state_dict=not self.sharded_checkpoints, cpu_offload=True, ignore_frozen_params=True
        )
        state = get_model_state_dict(self._module, options=options)
        trained = trained_shapes(self._module)
        return {name: tensor for name, tensor in state.items() if name in trained}

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Optimizer state on CPU under parameter names, full (rank 0) or in shards. All ranks must call it."""
        optimizer = getattr(optimizer, "optimizer", optimizer)  # unwrap LightningOptimizer
        options = StateDictOptions(full_state_dict=not self.sharded_checkpoints, cpu_offload=True)
        has_stepped = bool(optimizer.state)
        state: dict[str, Any] = dict(get_optimizer_state_dict(self._module, optimizer, options=options))
        if not has_stepped:
            # The state was made by a step without gradients, which changes nothing but the number of steps, and by it
            # the bias correction of all later ones.
            optimizer.state.clear()
            for of_parameter in state.get("state", {}).values():
                if "step" in of_parameter:
                    of_parameter["step"] = 0 * of_parameter["step"]
        return state

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint of either form and of any number of ranks into the module and its optimizers.

        Raises:
            ValueError: If it is missing, damaged, partial, or made for a module with other trained parameters.
        """
        path = Path(self.broadcast(checkpoint_path))
        checkpoint = read_checkpoint(path)
        sharded = path.is_dir()
        if sharded:
            self._load_shards(path, checkpoint)
        else:
            check_state(checkpoint["state_dict"], trained_shapes(self._module), path)
        options = StateDictOptions(full_state_dict=not sharded, strict=False)
        set_model_state_dict(self._module, checkpoint["state_dict"], options=options)
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            set_optimizer_state_dict(self._module, optimizer, optim_state_dict=state, options=options)
        return checkpoint

    def _load_shards(self, path: Path, checkpoint: dict[str, Any]) -> None:
        saved = FileSystemReader(path).read_metadata().state_dict_metadata
        shapes = {
            name.removeprefix("state_dict."): torch.empty(tensor.size, device="meta")
            for name, tensor in saved.items()
            if name.startswith("state_dict.") and isinstance(tensor, TensorStorageMetadata)
        }
        check_state(shapes, trained_shapes(self._module), path)
        # Read into shards like those of this run, whatever those of the checkpoint are.
        options = StateDictOptions(cpu_offload=True, ignore_frozen_params=True)
        parameters = get_model_state_dict(self._module, options=options)
        state: dict[str, Any] = {"state_dict": {name: parameters[name] for name in shapes}}
        groups = checkpoint["optimizer_states"]
        for i, (optimizer, _) in enumerate(zip(self.optimizers, groups, strict=False)):
            own = get_optimizer_state_dict(self._module, optimizer, options=StateDictOptions(cpu_offload=True))
            state[f"optimizer_{i}"] = own["state"]
        load(state, storage_reader=FileSystemReader(path), process_group=self._checkpoint_group())
        checkpoint["state_dict"] = state["state_dict"]
        checkpoint["optimizer_states"] = [
            {"state": state.get(f"optimizer_{i}", {}), "param_groups": group} for i, group in enumerate(groups)
        ]

    @property
    def _module(self) -> torch.nn.Module:
        assert self.lightning_module is not None
        return self.lightning_module  # not self.model, which DDP wraps: names must not depend on the strategy

    # --- files -------------------------------------------------------------------------------------------------------

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a checkpoint so that a crash or a full disk leaves all earlier ones as they were.

        Raises:
            OSError: On all ranks, if one could not write this checkpoint, or with ``async_save`` the one before it.
        """
        if storage_options is not None:
            raise TypeError(f"{type(self).__name__} writes to local paths and takes no storage_options.")
        self.finish_saving()
        path = Path(self.broadcast(filepath))
        if self.async_save:
            checkpoint = copy.deepcopy(checkpoint)  # training changes the tensors, and callbacks their lists
        self._agree(path, _clear(path) if self.is_global_zero else None)
        if self.sharded_checkpoints:
            group = self._checkpoint_group()

            def write() -> None:
                _write_directory(checkpoint, path, group, publish=self.is_global_zero)
        else:

            def write() -> None:
                if self.is_global_zero:
                    _write_file(checkpoint, path)

        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending = (path, self._thread.submit(write))
        if not self.async_save:
            self.finish_saving()

    def finish_saving(self) -> None:
        """Wait until the last checkpoint is on disk. All ranks must call it.

        Raises:
            OSError: On all ranks, if one of them could not write it.
        """
        if self._pending is None:
            return
        path, future = self._pending
        self._pending = None
        self._agree(path, future.exception())

    def _agree(self, path: Path, error: BaseException | None) -> None:
        """Raise on all ranks if one has an error: a rank that went on alone would wait for the others forever."""
        for failed in gather_objects(_describe(error, self._rank)):
            if failed is not None:
                code, text = failed
                what = f"checkpoint {path} could not be written ({text}); the ones before it are intact"
                raise OSError(code, what) from error

    @override
    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove a checkpoint of either form; one that is half removed no longer looks like one."""
        if self.is_global_zero:
            _remove(Path(filepath))

    @override
    def on_train_end(self) -> None:
        super().on_train_end()
        self.finish_saving()

    @override
    def teardown(self) -> None:
        if self._pending is not None:
            # After an exception, maybe of this rank alone: wait for the own write, but for no other rank.
            path, future = self._pending
            self._pending = None
            failure = _describe(future.exception(), self._rank)
            if failure is not None:
                rank_zero_warn(f"Checkpoint {path} could not be written: {failure[1]}.")
        super().teardown()

    @property
    def _rank(self) -> int:
        return dist.get_rank() if is_distributed() else 0

    def _checkpoint_group(self) -> dist.ProcessGroup | None:
        # A group of its own, so that the writing thread's messages never mix with those of training.
        if self._group is None and is_distributed():
            self._group = dist.new_group(backend="gloo", timeout=getattr(self, "timeout", None))
        return self._group


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; of a directory only what is not sharded, after checking that all files are there.

    Raises:
        ValueError: If there is no such checkpoint, or it is truncated, lacks a file, or is no training checkpoint.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"There is no checkpoint {path}.{_others(path)}")
    source = path / _META if path.is_dir() else path
    try:
        checkpoint = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types for a damaged archive
        raise ValueError(
            f"Checkpoint {path} is damaged or incomplete ({type(error).__name__}: {error}).{_others(path)}"
        ) from error
    parts = {"optimizer_states", "loops", _FILES if path.is_dir() else "state_dict"}
    if not isinstance(checkpoint, dict) or not parts <= set(checkpoint):
        raise ValueError(f"{path} is no training checkpoint of a Lightning Trainer: parts are missing.{_others(path)}")
    for name, size in checkpoint.pop(_FILES, {}).items():
        shard = path / name
        found = shard.stat().st_size if shard.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise ValueError(f"Checkpoint {path} is damaged or incomplete ({name} {state}).{_others(path)}")
    return checkpoint


def trained_shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape, over all ranks, of each parameter that ``module`` trains: what a checkpoint of it holds."""
    return {name: tuple(p.shape) for name, p in module.named_parameters() if p.requires_grad}


def check_state(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], source: str | Path) -> None:
    """Check that ``state`` holds exactly the parameters in ``shapes``.

    Raises:
        ValueError: Naming the first parameter that is missing, unexpected, or of another shape.
    """
    remedy = "It was made for another model or LoRA configuration, or is incomplete."
    for name in sorted(shapes.keys() - state.keys()):
        raise ValueError(f"Checkpoint {source} lacks parameter {name!r}. {remedy}")
    for name in sorted(state.keys() - shapes.keys()):
        raise ValueError(f"Checkpoint {source} holds parameter {name!r}, which the model does not train. {remedy}")
    for name, shape in shapes.items():
        if tuple(state[name].shape) != shape:
            raise ValueError(
                f"Checkpoint {source}: {name!r} has shape {tuple(state[name].shape)}, the model {shape}. {remedy}"
            )


def _others(path: Path) -> str:
    if not path.exists() and _replaced(path).exists():
        return f" A run was killed while it replaced it. What was there is {_replaced(path)}: give it its name back."
    others = sorted(other.name for other in path.parent.glob("*.ckpt") if other != path)
    if not others:
        return " There is no other one beside it."
    return f" Others in {path.parent}: {', '.join(others)}. Move this one away to resume from the latest of them."


def _partial(path: Path) -> Path:
    return path.with_name(path.name + PARTIAL)


def _replaced(path: Path) -> Path:
    return path.with_name(f"{path.name}.old{PARTIAL}")


def _clear(path: Path) -> OSError | None:
    """Make room for ``path``: its directory, without what killed runs left half written. Returns what prevents it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for replaced in path.parent.glob(f"*.ckpt.old{PARTIAL}"):
            if not (place := replaced.with_name(replaced.name.removesuffix(f".old{PARTIAL}"))).exists():
                replaced.rename(place)  # killed before the new one had the name
        for left_behind in {_partial(path), *path.parent.glob(f"*.ckpt{PARTIAL}")}:
            _remove(left_behind)
    except OSError as error:
        return error
    return None


def _write_file(checkpoint: dict[str, Any], path: Path) -> None:
    partial = _partial(path)
    try:
        _dump(checkpoint, partial)
        _publish(partial, path)
    except BaseException:
        _remove(partial)
        raise


def _write_directory(checkpoint: dict[str, Any], path: Path, group: dist.ProcessGroup | None, publish: bool) -> None:
    partial = _partial(path)
    rest = dict(checkpoint)
    state = {"state_dict": rest.pop("state_dict")}
    optimizers = rest.pop("optimizer_states", [])
    state |= {f"optimizer_{i}": optimizer["state"] for i, optimizer in enumerate(optimizers)}
    rest["optimizer_states"] = [optimizer["param_groups"] for optimizer in optimizers]
    try:
        save(state, storage_writer=FileSystemWriter(partial), process_group=group)
        if publish:  # every rank's shards are on disk: save() ends with the writer's own agreement on that
            sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
            _dump({**rest, _FILES: sizes}, partial / _META)
            _publish(partial, path)
    except BaseException:
        if publish:
            _remove(partial)
        raise


def _dump(content: dict[str, Any], path: Path) -> None:
    # Through a Python file: given a path, torch.save hides what the operating system said when a write failed.
    with path.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def _publish(partial: Path, path: Path) -> None:
    """Give what is written its name, in place of what has it."""
    replaced = None
    if path.is_dir() or (partial.is_dir() and path.exists()):  # only a file replaces a file in one step
        replaced = _replaced(path)
        _remove(replaced)
        path.rename(replaced)
    partial.replace(path)
    _sync_directory(path.parent)
    if replaced is not None:
        _remove(replaced)


def _sync_directory(directory: Path) -> None:
    with suppress(OSError):  # not every file system knows this
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(path: Path) -> None:
    if not path.exists():
        return
    if path.suffix != PARTIAL:
        _remove(_partial(path))
        path = path.replace(_partial(path))
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _describe(error: BaseException | None, rank: int) -> tuple[int, str] | None:
    """What went wrong on ``rank``, in a form that travels between ranks: errno and text."""
    if error is None:
        return None
    causes: dict[int, BaseException] = {rank: error}
    if isinstance(error, CheckpointException):
        causes = {failed: wrapped[0] for failed, wrapped in error.failures.items()}
    rank, cause = min(causes.items())
    text = f"rank {rank}: {type(cause).__name__}: {cause}"
    # When a write fails, torch.save may stumble over the incomplete archive, and raises that.
    while not isinstance(cause, OSError) and cause.__context__ is not None:
        cause = cause.__context__
    if isinstance(cause, OSError):
        return cause.errno or errno.EIO, f"rank {rank}: {cause}"
    return errno.EIO, text
