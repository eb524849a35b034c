"""Where a run's memory goes: peaks of each phase of training, on each rank, beside what was predicted.

For any LightningModule::

    from lightning.pytorch import Trainer
    from lightning.pytorch.demos.boring_classes import BoringModel
    from lightning_qlora.callbacks import MemoryReport

    memory = MemoryReport(predicted={"weights": 264, "gradients": 264})
    trainer = Trainer(max_steps=8, callbacks=[memory], logger=False, enable_progress_bar=False)
    trainer.fit(BoringModel())  # prints the table

    for phase, peak in memory.report_section()["ranks"][0]["phases"].items():
        print(phase, peak["allocated_peak_bytes"], peak["host_rss_bytes"])
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, cast, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.table import Table
from torch import Tensor
from typing_extensions import override

from .measure import GIB, SAVE_CHECKPOINT, gather, observe, peak_rss_bytes, restart_device_peak, rss_bytes

Phase = Literal["load", "forward", "backward", "optimizer", "validation", "save", "other"]
_PHASES: tuple[Phase, ...] = get_args(Phase)


class PhaseMemory(TypedDict):
    """Memory of one phase, the largest over all its turns, in bytes; a field is ``null`` where there is no CUDA device.

    ====================== ==========================================================================================
    field                  meaning
    ====================== ==========================================================================================
    allocated_peak_bytes   most that was in tensors on the GPU
    allocated_end_bytes    most that was in tensors on the GPU when the phase ended: what it leaves to the next
    reserved_peak_bytes    most that PyTorch's allocator had taken from the GPU: tensors, caches and fragmentation
    host_rss_bytes         resident set of the process when the phase ended (sampled, so peaks inside are not seen)
    ====================== ==========================================================================================
    """

    allocated_peak_bytes: int | None
    allocated_end_bytes: int | None
    reserved_peak_bytes: int | None
    host_rss_bytes: int


class RankMemory(TypedDict):
    """Memory of one rank.

    ======================= =========================================================================================
    field                   meaning
    ======================= =========================================================================================
    phases                  phase -> :class:`PhaseMemory`; see :class:`MemoryReport` for where each begins and ends
    allocated_peak_bytes    largest of the phases, null without a CUDA device
    reserved_peak_bytes     largest of the phases, null without a CUDA device
    host_peak_bytes         largest resident set of the process since it started, as the operating system kept it
    host_peak_phase         phase in which that was last exceeded; null if it was before this run
    outside_allocator_bytes used on the GPU at the end, but not by PyTorch's allocator: CUDA context, NCCL, libraries,
                            other processes; null without a CUDA device or before the end
    device_bytes            all memory of the GPU, null without one
    ======================= =========================================================================================
    """

    phases: dict[str, PhaseMemory]
    allocated_peak_bytes: int | None
    reserved_peak_bytes: int | None
    host_peak_bytes: int
    host_peak_phase: str | None
    outside_allocator_bytes: int | None
    device_bytes: int | None


class MemorySection(TypedDict):
    """``report.json``'s section ``memory``.

    ======================= =========================================================================================
    field                   meaning
    ======================= =========================================================================================
    ranks                   :class:`RankMemory` of each rank; of rank 0 alone until training has ended
    predicted_bytes         part -> bytes a rank, as passed to :class:`MemoryReport`; null if nothing was
    measured_to_predicted   largest ``allocated_peak_bytes`` of a rank, over the sum of ``predicted_bytes``; null
                            without one of them
    ======================= =========================================================================================
    """

    ranks: list[RankMemory]
    predicted_bytes: dict[str, int] | None
    measured_to_predicted: float | None


@dataclass
class _Peaks:
    """Running maxima of one phase, in bytes."""

    allocated: int = 0
    allocated_end: int = 0
    reserved: int = 0
    rss: int = 0


class MemoryReport(Callback):
    """Measures memory by phase; prints a table when training ends or fails, and is a section of :class:`RunReport`.

    ============== ==================================================================================================
    phase          from ... to
    ============== ==================================================================================================
    ``load``       ``setup`` to the start of training: building and loading the model, restoring a checkpoint
    ``forward``    ``on_train_batch_start`` to ``on_before_backward`` (clearing the old gradients included)
    ``backward``   ``on_before_backward`` to ``on_after_backward``
    ``optimizer``  ``on_after_backward`` to ``on_train_batch_end``: unscaling, clipping, the step; in a module that
                   optimizes by hand also what it does between two backwards
    ``validation`` ``on_validation_start`` to ``on_validation_end``, the sanity check included
    ``save``       ``Trainer.save_checkpoint``
    ``other``      between these: fetching batches, other callbacks
    ============== ==================================================================================================

    On a GPU these are the figures of PyTorch's allocator, exact for every turn of a phase. On any device, the process's
    resident set is sampled where a phase ends. Nothing waits for the GPU: the allocator keeps its books on the host.

    It restarts the allocator's peak at each change of phase; :func:`~lightning_qlora.callbacks.measure.
    peak_memory_bytes`, which :class:`RunReport` and :class:`LossProgress` use, takes that into account, a direct
    ``torch.cuda.max_memory_allocated()`` sees the current phase only.

    What another callback saves in its ``on_train_end`` after this one's is not measured.

    Args:
        predicted: part of the memory (weights, optimizer, ...) -> bytes a rank on the GPU, shown beside the peak.

    Raises:
        ValueError: if ``predicted`` has a negative figure.
    """

    report_key = "memory"

    def __init__(self, predicted: Mapping[str, int] | None = None) -> None:
        super().__init__()
        for part, count in (predicted or {}).items():
            if count < 0:
                raise ValueError(f"predicted[{part!r}] is {count}, but it is a number of bytes: pass 0 or more")
        self.predicted = None if predicted is None else dict(predicted)
        self._device = torch.device("cpu")
        self._phase: Phase | None = None
        self._peaks: dict[Phase, _Peaks] = {}
        self._host_peak = 0
        self._host_peak_phase: str | None = None
        self._before_save: Phase = "other"
        self._forget: Callable[[], None] | None = None
        self._ranks: list[RankMemory] | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != TrainerFn.FITTING:
            return
        self._device = trainer.strategy.root_device
        self._peaks, self._host_peak, self._host_peak_phase = {}, peak_rss_bytes(), None
        self._ranks = None
        restart_device_peak(self._device)
        self._phase = "load"
        self._forget = observe(trainer, SAVE_CHECKPOINT, self._save_started, self._save_stopped)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._enter("other")

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._enter("forward")

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self._enter("backward")

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._enter("optimizer")

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._enter("other")

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._enter("validation")

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._enter("load" if trainer.sanity_checking else "other")

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._enter("other")
        self._ranks = gather(self._rank(at_end=True))
        if trainer.is_global_zero:
            Console().print(self.table())

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._phase is not None and self._ranks is None:
            table = self.table()
            if trainer.is_global_zero:
                print(f"Rank 0 was stopped in phase {self._phase!r} by {type(exception).__name__}.")
                Console().print(table)
        self._stop()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._stop()

    def report_section(self) -> MemorySection | None:
        """What was measured so far; ``None`` before there is a run."""
        if self._phase is None and self._ranks is None and not self._peaks:
            return None
        ranks = self._all_ranks()
        peaks = [rank["allocated_peak_bytes"] for rank in ranks if rank["allocated_peak_bytes"] is not None]
        total = sum((self.predicted or {}).values())
        return MemorySection(
            ranks=ranks,
            predicted_bytes=self.predicted,
            measured_to_predicted=max(peaks) / total if peaks and total else None,
        )

    def table(self) -> Table:
        """The figures for people: of each phase, the most that any rank needed, in GiB."""
        ranks = self._all_ranks()
        title = "Memory in GiB" + (f", most of {len(ranks)} ranks" if len(ranks) > 1 else "")
        fields = {"process": "host_rss_bytes"}
        if self._device.type == "cuda":
            fields = {"GPU allocated": "allocated_peak_bytes", "GPU reserved": "reserved_peak_bytes", **fields}
        table = Table("phase", title=title, title_justify="left")
        for heading in fields:
            table.add_column(heading, justify="right")
        for phase in ranks[0]["phases"]:
            of_ranks: list[dict[str, int]] = [cast(Any, rank["phases"].get(phase, {})) for rank in ranks]
            table.add_row(phase, *(_gib(max(memory.get(field, 0) for memory in of_ranks)) for field in fields.values()))
        table.add_section()
        whole = ["allocated_peak_bytes", "reserved_peak_bytes", "host_peak_bytes"][-len(fields) :]
        table.add_row("peak", *(_gib(max(cast(Any, rank)[field] for rank in ranks)) for field in whole))
        if self.predicted and len(fields) > 1:
            table.add_row("predicted", _gib(sum(self.predicted.values())))
            for part, count in self.predicted.items():
                table.add_row(f"  {part}", _gib(count), style="dim")
        return table

    def _all_ranks(self) -> list[RankMemory]:
        """Of all ranks once they were gathered, before that of this one, the present phase included."""
        if self._ranks is not None:
            return self._ranks
        if self._phase is not None:
            self._enter(self._phase)
        return [self._rank()]

    def _enter(self, phase: Phase) -> None:
        """End the current phase and begin ``phase``, which may be the same one."""
        if self._phase is None:
            return
        peaks = self._peaks.setdefault(self._phase, _Peaks())
        if (peak := restart_device_peak(self._device)) is not None:
            peaks.allocated = max(peaks.allocated, peak.allocated)
            peaks.allocated_end = max(peaks.allocated_end, peak.allocated_now)
            peaks.reserved = max(peaks.reserved, peak.reserved)
        rss = rss_bytes()
        peaks.rss = max(peaks.rss, rss)
        # Linux keeps the peak from counters that lag a little behind those of the resident set.
        if (host_peak := max(peak_rss_bytes(), rss)) > self._host_peak:
            self._host_peak, self._host_peak_phase = host_peak, self._phase
        self._phase = phase

    def _save_started(self) -> None:
        self._before_save = self._phase or "other"
        self._enter("save")

    def _save_stopped(self) -> None:
        self._enter(self._before_save)

    def _stop(self) -> None:
        self._phase = None
        if self._forget is not None:
            self._forget()
            self._forget = None

    def _rank(self, at_end: bool = False) -> RankMemory:
        """This rank's figures so far."""
        cuda = self._device.type == "cuda"
        phases: dict[str, PhaseMemory] = {
            phase: PhaseMemory(
                allocated_peak_bytes=peaks.allocated if cuda else None,
                allocated_end_bytes=peaks.allocated_end if cuda else None,
                reserved_peak_bytes=peaks.reserved if cuda else None,
                host_rss_bytes=peaks.rss,
            )
            for phase, peaks in sorted(self._peaks.items(), key=lambda item: _PHASES.index(item[0]))
        }
        outside = device_bytes = None
        if cuda:
            device_bytes = torch.cuda.get_device_properties(self._device).total_memory
            if at_end:
                free, total = torch.cuda.mem_get_info(self._device)
                outside = total - free - torch.cuda.memory_reserved(self._device)
        return RankMemory(
            phases=phases,
            allocated_peak_bytes=max((p.allocated for p in self._peaks.values()), default=0) if cuda else None,
            reserved_peak_bytes=max((p.reserved for p in self._peaks.values()), default=0) if cuda else None,
            host_peak_bytes=self._host_peak,
            host_peak_phase=self._host_peak_phase,
            outside_allocator_bytes=outside,
            device_bytes=device_bytes,
        )


def _gib(count: int) -> str:
    return f"{count / GIB:.2f}"
