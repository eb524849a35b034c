"""Progress as plain lines, which read as well in a notebook or a CI log as in a terminal."""

import math
from time import perf_counter
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table
from torch import Tensor
from typing_extensions import override

from .measure import GIB, Count, StepMeter, TokensFn, count_tokens, peak_memory_bytes, plus


class LossProgress(Callback):
    """Prints a line every few optimizer steps, one a validation, and a table at the end, all on global rank 0::

        step 12/40 | loss 1.8342 | lr 1.9e-04 | grad 0.43 | 312 tok/s | 1.9 GiB | eta 1m 10s
        step 20/40 | val_loss 1.7031

    ``lr`` is the one the step used; ``grad`` the norm the module logged; ``tok/s`` of all ranks since the line before,
    validation left out; ``GiB`` the peak of rank 0 since the process started (GPU memory allocated by PyTorch, on CPU
    the resident set); ``eta`` from the mean time of the steps so far. Neither that nor the table's tokens per second
    count the first step. What is not known is left out.

    Use it with ``Trainer(enable_progress_bar=False)``. Each line waits for the device once and costs one reduction of
    an integer over the ranks.

    Args:
        every_n_steps: optimizer steps between two lines; ``None``: 1 up to 100 steps in all, 10 above. The first and
            the last step are always printed.
        loss_key, grad_norm_key: metrics that ``training_step`` logs with ``on_step=True``.
        val_loss_key: the metric printed after a validation.
        tokens_fn: tokens of a micro-batch on this rank, ``None`` if it cannot tell; default :func:`count_tokens`.

    Raises:
        ValueError: if ``every_n_steps`` is less than 1.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        *,
        loss_key: str = "train_loss",
        grad_norm_key: str = "grad_norm",
        val_loss_key: str = "val_loss",
        tokens_fn: TokensFn | None = None,
    ) -> None:
        super().__init__()
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps is {every_n_steps}, but lines can be printed every 1 or more steps")
        self.every_n_steps = every_n_steps
        self.loss_key = loss_key
        self.grad_norm_key = grad_norm_key
        self.val_loss_key = val_loss_key

        self._meter = StepMeter(tokens_fn or count_tokens)
        self._began = 0.0
        self._first_step = 0
        self._total_steps: int | None = None
        self._interval = 1
        self._lr: float | None = None
        self._pending: list[tuple[int, Tensor]] = []
        self._losses: list[tuple[int, float]] = []
        self._val_losses: list[tuple[int, float]] = []
        self._step_seconds = 0.0  # without the first step
        self._line_seconds = 0.0
        self._line_tokens: Count = 0
        self._seconds = 0.0
        self._tokens: Count = 0

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        total = trainer.estimated_stepping_batches
        # Of a loader without a length and no `max_steps`, Lightning says infinity or -1.
        self._total_steps = int(total) if 0 <= total < math.inf else None
        few = self._total_steps is not None and self._total_steps <= 100
        self._interval = self.every_n_steps or (1 if few else 10)
        self._first_step = trainer.global_step
        self._pending, self._losses, self._val_losses = [], [], []
        self._step_seconds = self._line_seconds = self._seconds = 0.0
        self._line_tokens = self._tokens = 0
        self._began = perf_counter()
        self._meter.start(trainer.global_step)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        # Once the batch has ended, the scheduler has already set the next step's.
        self._lr = float(optimizer.param_groups[0]["lr"])

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        sample = self._meter.update(batch, trainer.global_step)
        if sample is None:
            return
        step = trainer.global_step
        first = step - sample.count == self._first_step
        self._step_seconds += 0.0 if first else sample.seconds
        self._line_seconds += sample.seconds
        self._line_tokens = plus(self._line_tokens, sample.tokens)
        if trainer.is_global_zero and (loss := trainer.callback_metrics.get(self.loss_key)) is not None:
            self._pending.append((step, loss.detach().clone()))
        due = step // self._interval > (step - sample.count) // self._interval
        if first or due or step == self._total_steps:
            self._print_step(trainer)
        if first:  # it compiles and warms up
            self._seconds, self._tokens = 0.0, 0

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._meter.pause()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._meter.resume()
        loss = trainer.callback_metrics.get(self.val_loss_key)
        if loss is None or trainer.sanity_checking or not trainer.is_global_zero:
            return
        self._val_losses.append((trainer.global_step, float(loss)))
        print(f"{self._position(trainer.global_step)} | {self.val_loss_key} {float(loss):.4f}", flush=True)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._line_seconds:
            self._count_tokens(trainer)  # of the steps since the last line
        if not trainer.is_global_zero:
            return
        self._drain_losses()
        Console().print(self._summary(trainer))

    def _print_step(self, trainer: pl.Trainer) -> None:
        tokens, seconds = self._count_tokens(trainer)  # a collective: before rank 0 goes on alone
        if not trainer.is_global_zero:
            return
        self._drain_losses()
        step, metrics = trainer.global_step, trainer.callback_metrics
        parts = [self._position(step)]
        if self._losses and self._losses[-1][0] == step:
            parts.append(f"loss {self._losses[-1][1]:.4f}")
        if self._lr is not None:
            parts.append(f"lr {self._lr:.1e}")
        if self.grad_norm_key in metrics:
            parts.append(f"grad {float(metrics[self.grad_norm_key]):.2f}")
        if tokens is not None and seconds > 0:
            parts.append(f"{tokens / seconds:.0f} tok/s")
        parts.append(f"{peak_memory_bytes(trainer.strategy.root_device)[0] / GIB:.1f} GiB")
        steps = step - self._first_step - 1
        if self._total_steps is not None and steps > 0:
            parts.append(f"eta {duration((self._total_steps - step) * self._step_seconds / steps)}")
        print(" | ".join(parts), flush=True)

    def _count_tokens(self, trainer: pl.Trainer) -> tuple[int | None, float]:
        """Tokens of all ranks and seconds since the last call; adds them to the totals."""
        seconds, self._line_seconds = self._line_seconds, 0.0
        local, self._line_tokens = self._line_tokens, 0
        tokens: int | None = None
        # Whether tokens can be counted depends on the kind of batch, which is the same on all ranks.
        if local is not None:
            count = torch.tensor(int(local), device=trainer.strategy.root_device)
            tokens = int(trainer.strategy.reduce(count, reduce_op="sum"))
        self._seconds += seconds
        self._tokens = plus(self._tokens, tokens)
        return tokens, seconds

    def _drain_losses(self) -> None:
        pending, self._pending = self._pending, []
        self._losses += [(step, float(loss)) for step, loss in pending]

    def _position(self, step: int) -> str:
        if self._total_steps is None:
            return f"step {step}"
        return f"step {step:>{len(str(self._total_steps))}}/{self._total_steps}"

    def _summary(self, trainer: pl.Trainer) -> Table:
        table = Table("", "value", "at step", title="Training", title_justify="left")
        for name, losses in (("loss", self._losses), (self.val_loss_key, self._val_losses)):
            finite = [pair for pair in losses if math.isfinite(pair[1])]
            rows = {"first": losses[:1], "last": losses[-1:], "best": sorted(finite, key=lambda pair: pair[1])[:1]}
            for which, pairs in rows.items():
                for step, loss in pairs:
                    table.add_row(f"{which} {name}", f"{loss:.4f}", str(step))
        if self._tokens and self._seconds > 0:
            table.add_row("tokens per second", f"{self._tokens / self._seconds:.0f}", "")
        peak, kind = peak_memory_bytes(trainer.strategy.root_device)
        what = "peak GPU memory" if kind == "cuda_max_allocated" else "peak process memory"
        table.add_row(f"{what}, rank 0", f"{peak / GIB:.2f} GiB", "")
        table.add_row("time", duration(perf_counter() - self._began), str(trainer.global_step))
        return table


def duration(seconds: float) -> str:
    """``seconds`` for people, in the two largest units: ``8s``, ``1m 10s``, ``2h 05m``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
