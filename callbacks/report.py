"""`report.json` and `report.html`: what a run was, its losses, how fast it went and how much memory it took."""

import functools
import json
import math
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from torch import Tensor
from typing_extensions import override

from .graceful_stop import GracefulStop
from .html_report import render_html
from .measure import GIB, TimedSteps, TokensFn, count_tokens, gather, peak_memory_bytes
from .report_schema import SCHEMA_VERSION, Report, Status, load_report

_DISTRIBUTIONS = ("torch", "lightning", "transformers", "peft", "bitsandbytes", "triton", "lightning-qlora")


@runtime_checkable
class ReportSource(Protocol):
    """A callback or LightningModule that adds a section to the report; :class:`RunReport` knows it by its shape."""

    report_key: str

    def report_section(self) -> Mapping[str, Any] | None:
        """The section, of JSON types; ``None`` for none.

        Called on global rank 0 alone, each time the report is written, so it must not talk to other ranks. The last
        call comes after every callback's ``on_train_end``: gather there.
        """


class RunReport(Callback):
    """Writes :class:`Report` to ``path`` when training starts, every few steps, at the end and on an exception.

    At the end and on an exception also as a page to read, ``path`` with the suffix ``.html``. Of a run that was killed,
    or at any time, ``write_html(load_report("report.json"), "report.html")`` makes it.

    Global rank 0 writes, into a temporary file that then replaces the old one: a reader never sees half a report. The
    losses so far are part of every checkpoint, so a resumed run's report covers the whole run; what the checkpoint
    does not know (steps after it, that are done again) is dropped. Speed and memory are of this process alone. If the
    checkpoint is of the last step, and the process that wrote it was stopped before it had ended, the report of that
    process becomes ``completed``.

    Losses are read from ``trainer.callback_metrics`` after each optimizer step and stay on the device until the report
    is written. With gradient accumulation this is what the module logged for the last micro-batch of the step, unless
    it logs the step's own loss. Writing costs one gather of two integers over the ranks and a transfer from the device.

    Args:
        path: the file; its directory is created.
        loss_key: the metric to record, logged by ``training_step`` with ``on_step=True``.
        val_loss_key: the metric to record after each validation; without it ``val_losses`` stays empty.
        tokens_fn: tokens of a micro-batch on this rank, ``None`` if it cannot tell; default :func:`count_tokens`.
        metadata: facts of the recipe, of JSON types; ``metadata["model"]`` becomes the field ``model``.
        flush_every_n_steps: optimizer steps between two writes, or more: writing, which takes the longer the more
            losses there are, is put off where it would take more than 0.5 % of the time.
        warmup_steps: first optimizer steps that are not timed (compilation, autotuning, allocator growth).
        html: whether to write the page too.

    Raises:
        ValueError: if an argument is out of range or ``metadata`` is not JSON; in training, if ``loss_key`` was not
            logged by the time of the first optimizer step.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        loss_key: str = "train_loss",
        val_loss_key: str = "val_loss",
        tokens_fn: TokensFn | None = None,
        metadata: Mapping[str, Any] | None = None,
        flush_every_n_steps: int = 20,
        warmup_steps: int = 1,
        html: bool = True,
    ) -> None:
        super().__init__()
        if html and Path(path).suffix == ".html":
            raise ValueError(f"path is {path}, but the page takes that name and the report is JSON: pass report.json")
        if flush_every_n_steps < 1:
            raise ValueError(
                f"flush_every_n_steps is {flush_every_n_steps}, but the report can be written every 1 or more"
            )
        try:
            json.dumps(metadata)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"metadata cannot be written as JSON ({error}): pass only str, int, float, bool, None, lists and dicts"
            ) from error
        model = (metadata or {}).get("model")
        if not isinstance(model, str | None):
            raise ValueError(f"metadata['model'] is {model!r}, but it names the model: pass a str")
        self.path = Path(path)
        self.html = html
        self.loss_key = loss_key
        self.val_loss_key = val_loss_key
        self.metadata = dict(metadata or {})
        self.flush_every_n_steps = flush_every_n_steps

        self._losses: list[float] = []  # NaN where unknown; null only in the file
        self._pending: list[Tensor] = []
        self._val_losses: list[tuple[int, float]] = []
        self._start_time: str | None = None
        self._started = False
        self._next_write = -math.inf  # by perf_counter
        self._resumed_from_step = 0

        self._steps = TimedSteps(tokens_fn or count_tokens, warmup_steps)
        self._tokens_per_s: float | None = None
        self._peak_memory_gib: list[float] = []
        self._devices: list[str] = []

    @override
    def state_dict(self) -> dict[str, Any]:
        self._drain_losses()
        return {
            "losses": list(self._losses),
            "val_losses": [list(pair) for pair in self._val_losses],
            "start_time": self._start_time,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._pending = []
        self._losses = list(state_dict["losses"])
        self._val_losses = [(step, loss) for step, loss in state_dict["val_losses"]]
        self._start_time = state_dict["start_time"]

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        done = self._resumed_from_step = trainer.global_step
        self._forget_what_follows(done)
        self._start_time = (self._start_time if done else None) or _now()
        self._started = True
        self._next_write = -math.inf
        self._steps.start(done)
        self._devices = gather(_device_name(trainer.strategy.root_device))
        self._measure(trainer)
        self._write_on_the_way(trainer)
        self._steps.start(done)  # again: the first step does not wait for the file

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, _ = self._steps.update(batch, trainer.global_step)
        if step is None:
            return
        metrics = trainer.callback_metrics
        if self.loss_key not in metrics:
            raise ValueError(
                f"RunReport finds no metric {self.loss_key!r} after optimizer step {trainer.global_step}; logged were"
                f" {sorted(metrics)}. Call self.log({self.loss_key!r}, loss, on_step=True) in training_step, or pass"
                " loss_key."
            )
        if trainer.is_global_zero:
            self._pending += [metrics[self.loss_key].detach().clone()] * step.count

        done_here = trainer.global_step - self._resumed_from_step
        if done_here == step.count and step.tokens is None:
            rank_zero_warn(
                f"RunReport cannot tell the tokens of a batch of type {type(batch).__name__} (no 'num_tokens', no"
                " 'input_ids' tensor), so tokens_per_s will be null. Pass tokens_fn to count them."
            )
        if done_here // self.flush_every_n_steps > (done_here - step.count) // self.flush_every_n_steps:
            self._measure(trainer)
            self._drain_losses()  # waits for the device, which is not the time that writing takes
            if (began := perf_counter()) >= self._next_write:
                self._write_on_the_way(trainer)
                self._next_write = perf_counter() + 199 * (perf_counter() - began)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._steps.pause()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._steps.resume()
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        if (loss := trainer.callback_metrics.get(self.val_loss_key)) is not None:
            # Lightning may validate again after resuming from a checkpoint that was saved in validation.
            earlier = [pair for pair in self._val_losses if pair[0] != trainer.global_step]
            self._val_losses = [*earlier, (trainer.global_step, float(loss))]

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._measure(trainer)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Here, not in `on_train_end`: by now every other callback has ended too and knows what it has to report.
        if not self._started:
            if trainer.global_step > 0 and trainer.is_global_zero:
                self._complete(trainer)
            return
        stopped = any(isinstance(callback, GracefulStop) and callback.signum for callback in _callbacks(trainer))
        self._write(trainer, "interrupted" if stopped else "completed")
        self._started = False

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if not self._started and self.path.exists():
            return  # training has not begun: this is the report of the run that was to be resumed
        # Other ranks may be gone: figures that need them stay as of the last write.
        if trainer.world_size == 1:
            with suppress(RuntimeError):  # after a CUDA error nothing can be read from the device any more
                self._measure(trainer)
        # SystemExit: Lightning's SIGTERMException is one.
        status: Status = "interrupted" if isinstance(exception, KeyboardInterrupt | SystemExit) else "failed"
        try:
            self._write(trainer, status, f"{type(exception).__name__}: {exception}")
        except OSError as error:
            rank_zero_warn(f"RunReport could not write {self.path} ({error}); the run's own error follows.")
        self._started = False

    def _complete(self, trainer: pl.Trainer) -> None:
        """Resumed at its end, nothing was trained: the figures are those of the process that did, if it left some."""
        self._forget_what_follows(trainer.global_step)
        try:
            report = load_report(self.path)
        except (OSError, ValueError):
            self._write(trainer, "completed")
            return
        if report["status"] == "completed":
            return
        # The file may know the validation that came after the checkpoint.
        val_losses = {step: loss for step, loss in report["val_losses"] if step <= trainer.global_step}
        report["val_losses"] = sorted((val_losses | dict(self._val_losses)).items())
        report["losses"] = list(self._losses)
        report["status"], report["error"], report["end_time"] = "completed", None, _now()
        report["global_step"] = trainer.global_step
        report["sections"].pop(GracefulStop.report_key, None)
        self._write_files(report)

    def _forget_what_follows(self, step: int) -> None:
        # A checkpoint that was written without this callback knows no losses: the index must still be the step.
        self._losses = self._losses[:step] + [math.nan] * (step - len(self._losses))
        self._val_losses = [pair for pair in self._val_losses if pair[0] <= step]

    def _drain_losses(self) -> None:
        pending, self._pending = self._pending, []
        try:
            self._losses += [float(loss) for loss in pending]
        except RuntimeError:
            # After a CUDA error nothing can be read from the device any more; the report is still wanted.
            self._losses += [math.nan] * len(pending)

    def _measure(self, trainer: pl.Trainer) -> None:
        """Gather tokens and memory from all ranks (a collective: all ranks call it at the same step)."""
        peak, _ = peak_memory_bytes(trainer.strategy.root_device)
        tokens = self._steps.tokens
        ranks = gather((None if tokens is None else int(tokens), peak))
        self._peak_memory_gib = [peak / GIB for _, peak in ranks]
        self._tokens_per_s = self._steps.tokens_per_s([count for count, _ in ranks])

    def _write_on_the_way(self, trainer: pl.Trainer) -> None:
        try:
            self._write(trainer, "running")
        except OSError as error:  # a full disk, say, which may have room again by the end
            rank_zero_warn(f"RunReport could not write {self.path} ({error}). Training goes on.")

    def _write(self, trainer: pl.Trainer, status: Status, error: str | None = None) -> None:
        if not trainer.is_global_zero:
            return
        self._drain_losses()
        report = Report(
            schema_version=SCHEMA_VERSION,
            status=status,
            error=error,
            start_time=self._start_time or _now(),
            end_time=None if status == "running" else _now(),
            global_step=trainer.global_step,
            resumed_from_step=self._resumed_from_step,
            losses=list(self._losses),
            val_losses=list(self._val_losses),
            tokens_per_s=self._tokens_per_s,
            step_time_s=self._steps.step_time_s(),
            warmup_steps=self._steps.warmup_steps,
            peak_memory_gib=self._peak_memory_gib,
            memory_kind=peak_memory_bytes(trainer.strategy.root_device)[1],
            world_size=trainer.world_size,
            devices=self._devices,
            strategy=type(trainer.strategy).__name__,
            precision=str(trainer.precision),
            model=self.metadata.get("model"),
            metadata={key: value for key, value in self.metadata.items() if key != "model"},
            versions=_versions(),
            sections=_sections(trainer),
        )
        self._write_files(report)

    def _write_files(self, report: Report) -> None:
        write_json(self.path, report)
        if self.html and report["status"] != "running":
            # As a reader of the file would see it: JSON knows neither NaN nor tuples.
            write_html(load_report(self.path), self.path.with_suffix(".html"))


def write_html(report: Report, path: str | os.PathLike[str]) -> None:
    """Write ``report`` (from :func:`load_report`) as a page that needs no other file, no script and no network."""
    write_text(Path(path), render_html(report))


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, non-finite floats as ``null``, as :func:`write_text` does."""
    write_text(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write ``text``; ``path``, whose directory is created, is the old or the new file at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _callbacks(trainer: pl.Trainer) -> list[Callback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it without declaring it
    return callbacks


def _sections(trainer: pl.Trainer) -> dict[str, dict[str, Any]]:
    sections: dict[str, dict[str, Any]] = {}
    for source in [*_callbacks(trainer), trainer.lightning_module, getattr(trainer, "datamodule", None)]:
        if isinstance(source, ReportSource) and (section := source.report_section()) is not None:
            sections[source.report_key] = dict(section)
    return sections


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {os.cpu_count()} cores)"


@functools.cache  # reading the packages' metadata was half of a report's writing
def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
