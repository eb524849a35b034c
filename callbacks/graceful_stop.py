"""Ctrl-C and SIGTERM end training after the current optimizer step, with a checkpoint to resume from."""

import os
import signal
import threading
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn  # type: ignore[attr-defined]
from typing_extensions import override

from .checkpoint import StepCheckpoint

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# GNU timeout and some job launchers deliver one Ctrl-C twice, to the process and to its group: not a second wish.
_SAME_INTERRUPT_S = 0.5


# A `Checkpoint`, not a plain `Callback`: the trainer runs those last, so that the state which the other callbacks put
# into the checkpoint already includes the step that has just ended.
class GracefulStop(Checkpoint):
    """On SIGINT or SIGTERM, finish the optimizer step, save a checkpoint, and let ``trainer.fit`` return.

    Any rank may receive the signal: after every optimizer step the ranks agree whether to stop, so that all of them
    save the same step, ``checkpoint_dir/interrupted-step=N.ckpt`` (a file, or a directory for strategies that save
    shards), to be resumed by ``trainer.fit(..., ckpt_path=...)``. If :class:`StepCheckpoint` has just saved that step,
    its checkpoint is the one. Afterwards::

        trainer.fit(module, data)
        if stop.signum is not None:
            sys.exit(stop.exit_code)

    A second Ctrl-C falls back to what Ctrl-C did before. A second SIGTERM changes nothing: supervisors repeat it, and
    their next step is SIGKILL anyhow.

    During training these handlers *replace* Lightning's SIGTERM handler, which broadcasts from inside the signal
    handler: if the signal interrupts another collective, or reaches one rank alone, the ranks then wait for each other
    forever. The handlers here set a flag and nothing else. They are installed in ``on_train_start``, after Lightning's,
    and what was there before comes back when training ends in whichever way.

    Cost: one ``strategy.reduce_boolean_decision`` an optimizer step, which in Lightning is a barrier and an all-reduce
    of one 8-byte integer that the host waits for: about 0.5 ms for two gloo processes on 2 cores; on a GPU a host
    synchronisation, which Lightning's own signal check causes once a micro-batch already. With one process: nothing.

    What it does not do:

    - A signal before training begins, or outside ``fit``, has its usual effect. A SIGTERM that Lightning put aside, to
      train a step first and throw it away, ends ``fit`` before that step instead, with the exit code of SIGTERM.
    - One that arrives during validation waits for the validation and one more step. Validation that is due at the very
      step that is interrupted is skipped.
    - Ctrl-C in a terminal also reaches DataLoader workers. Those started before training end at once, which is harmless
      unless the step still needs data from them.
    - To Lightning the stopped epoch is a finished one: what a ``ModelCheckpoint`` saves at its end resumes, in a run
      limited by ``max_epochs``, with the next epoch. Resume from :attr:`checkpoint_path`, which has no such gap.

    To the trainer it is a checkpoint callback: ``enable_checkpointing=False`` refuses it, no default
    ``ModelCheckpoint`` is added beside it, and it belongs after one that you add: ``ckpt_path="best"`` asks the first.

    Args:
        checkpoint_dir: where the checkpoint goes; created when needed, the same on all ranks.

    Attributes:
        signum: the signal that ended training, on all ranks; ``None`` if none did. The larger if ranks received
            different ones.
        checkpoint_path: the checkpoint to resume from; ``None`` if no signal ended training, or before its first step.
    """

    report_key = "graceful_stop"

    def __init__(self, checkpoint_dir: str | os.PathLike[str]) -> None:
        super().__init__()
        self.checkpoint_dir = Path(checkpoint_dir)
        self.signum: int | None = None
        self.checkpoint_path: Path | None = None
        self._received: int | None = None
        self._received_at = 0.0
        self._previous: dict[signal.Signals, Any] = {}
        self._global_step = 0
        self._local_rank = 0
        self._pid = 0
        self._limits: tuple[Any, ...] | None = None

    @property
    def exit_code(self) -> int:
        """0 if no signal ended training, else 128 + signal number on the ranks of local rank 0, and 0 on the others.

        0 on the others, because Lightning's launcher watches the processes it started and answers any other exit code
        of theirs with SIGKILL to all, the main process included.
        """
        return 0 if self.signum is None or self._local_rank != 0 else 128 + self.signum

    def report_section(self) -> dict[str, Any] | None:
        """For :class:`RunReport`: ``signal`` (its name) and ``checkpoint`` (a path), or nothing."""
        if self.checkpoint_path is None or self.signum is None:
            return None
        return {"signal": signal.Signals(self.signum).name, "checkpoint": str(self.checkpoint_path)}

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.signum = self.checkpoint_path = self._received = None
            self._local_rank = trainer.local_rank
            self._pid = os.getpid()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._global_step = trainer.global_step
        if threading.current_thread() is not threading.main_thread():
            rank_zero_warn(
                "GracefulStop handles no signals in this run: Python lets only the main thread install signal handlers,"
                " and `trainer.fit` runs in another thread. Call it in the main thread."
            )
            return
        for signum in _SIGNALS:
            # A signal that was ignored from outside (a background job of a non-interactive shell) stays ignored.
            if signal.getsignal(signum) is not signal.SIG_IGN:
                self._previous[signum] = signal.signal(signum, self._handle)
        # Before that, Lightning's handler took SIGTERM. All ranks end together: it may have reached this one alone.
        if trainer.strategy.reduce_boolean_decision(trainer.received_sigterm, all=False):
            raise SIGTERMException

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._global_step:
            return  # gradients are still accumulating
        self._global_step = trainer.global_step
        if self._save_if_signalled(trainer):
            self._stop(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # The signal may have come after the last step (validation at the end, slow `on_train_epoch_end` hooks).
        if self.signum is None and self._save_if_signalled(trainer):
            for callback in _step_checkpoints(trainer):
                callback.on_train_end(trainer, pl_module)  # again: there is one checkpoint more to count
        self._release(trainer)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, SIGTERMException):  # a SystemExit, to Lightning with status 0
            self.signum = int(signal.SIGTERM)
            exception.code = self.exit_code
        self._release(trainer)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._release(trainer)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            # A forked child (a DataLoader worker) inherited this handler. Ctrl-C is for the parent to handle, which
            # still needs the child's data; SIGTERM is how parents end their children.
            if signum == signal.SIGTERM:
                signal.signal(signum, signal.SIG_DFL)
                signal.raise_signal(signum)
            return
        now = monotonic()
        if self._received is None:
            self._received, self._received_at = signum, now
            if self._local_rank == 0:
                name = signal.Signals(signum).name
                text = f"\n{name}: stopping after this optimizer step, with a checkpoint. Ctrl-C stops at once.\n"
                # Not print() or logging, which are not reentrant: the signal may have interrupted one of them.
                os.write(2, text.encode())
        elif signum == signal.SIGINT and now - self._received_at > _SAME_INTERRUPT_S:
            self._restore_handlers()
            signal.raise_signal(signum)

    def _release(self, trainer: pl.Trainer) -> None:
        """Give back what training borrowed: the signal handlers and the trainer's limits. May be called twice."""
        self._restore_handlers()
        if self._limits is not None:
            trainer.limit_val_batches, trainer.fit_loop.min_epochs, trainer.fit_loop.epoch_loop.min_steps = self._limits
            self._limits = None

    def _restore_handlers(self) -> None:
        for signum, previous in self._previous.items():
            # None: the previous handler was not installed from Python and cannot be put back from here.
            if signal.getsignal(signum) == self._handle:
                signal.signal(signum, signal.SIG_DFL if previous is None else previous)
        self._previous = {}

    def _save_if_signalled(self, trainer: pl.Trainer) -> bool:
        strategy = trainer.strategy
        if not strategy.reduce_boolean_decision(self._received is not None, all=False):
            return False
        received = strategy.all_gather(torch.tensor([self._received or 0], device=strategy.root_device))
        self.signum = int(received.max())
        saved = [path for callback in _step_checkpoints(trainer) if (path := callback.saved(trainer)) is not None]
        if saved:
            self.checkpoint_path = saved[0]
        else:
            self.checkpoint_path = self.checkpoint_dir / f"interrupted-step={trainer.global_step}.ckpt"
            trainer.save_checkpoint(self.checkpoint_path, weights_only=False)
        rank_zero_info(
            f"Stopped by {signal.Signals(self.signum).name} after step {trainer.global_step}."
            f" Resume from {self.checkpoint_path}"
        )
        return True

    def _stop(self, trainer: pl.Trainer) -> None:
        loop = trainer.fit_loop
        self._limits = (trainer.limit_val_batches, loop.min_epochs, loop.epoch_loop.min_steps)
        # `should_stop` alone would first validate, and would be ignored until `min_steps` or `min_epochs` is reached.
        trainer.limit_val_batches, loop.min_epochs, loop.epoch_loop.min_steps = 0, None, None
        trainer.should_stop = True


def _step_checkpoints(trainer: pl.Trainer) -> list[StepCheckpoint]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it without declaring it
    return [callback for callback in callbacks if isinstance(callback, StepCheckpoint)]
