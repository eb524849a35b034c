"""Memory by phase: exact on an allocator that the tests write the books of, plausible on the real ones."""

import inspect
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning.pytorch as pl
import psutil  # type: ignore[import-untyped]
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from rich.console import Console
from torch import Tensor

from lightning_qlora.callbacks import (
    MemoryReport,
    MemorySection,
    RunReport,
    ThroughputReport,
    load_report,
    measure,
    memory_report,
)
from lightning_qlora.callbacks.measure import GIB, peak_memory_bytes
from tests.distributed import RankPools, groups

Make = Callable[..., Any]
CUDA = torch.device("cuda", 0)


class Allocator:
    """Books of a GPU's memory, reserved in pages of 1000 bytes and never given back."""

    def __init__(self) -> None:
        self.now = self.peak = self.reserved = 0

    def take(self, count: int) -> None:
        self.now += count
        self.peak = max(self.peak, self.now)
        self.reserved = max(self.reserved, -(-self.now // 1000) * 1000)

    def use(self, count: int) -> None:
        """Take and give back."""
        self.take(count)
        self.take(-count)

    def reset_peak(self, device: torch.device) -> None:
        self.peak = self.now

    def stats(self, device: torch.device) -> dict[str, Any]:
        return {
            "allocated_bytes": {"all": {"peak": self.peak, "current": self.now}},
            "reserved_bytes": {"all": {"peak": self.reserved}},
        }


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Allocator:
    """Stands in for the CUDA allocator; the device has 10 000 bytes, of which 700 are used by others."""
    allocator = Allocator()
    monkeypatch.setattr(measure, "_earlier_peaks", {})
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", allocator.stats)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", allocator.reset_peak)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: allocator.peak)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: allocator.reserved)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10_000 - 700 - allocator.reserved, 10_000))
    properties = type("Properties", (), {"total_memory": 10_000})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return allocator


class OnGpu(MemoryReport):
    """Takes the CPU for a GPU."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        root = type(trainer.strategy).root_device
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(trainer.strategy), "root_device", CUDA)
            super().setup(trainer, pl_module, stage)
        assert type(trainer.strategy).root_device is root


class Module(pl.LightningModule):
    """Weights of 1000 bytes; each phase takes another amount."""

    def __init__(self, gpu: Allocator, fail_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.gpu, self.fail_at = gpu, fail_at

    def configure_model(self) -> None:
        self.gpu.use(1500)
        self.gpu.take(1000)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.gpu.take(200 + batch_idx)
        if batch_idx == self.fail_at:
            self.gpu.take(4000)
            raise torch.OutOfMemoryError("no 4001st byte")
        self.log("train_loss", torch.tensor(1.0))
        return self.weight * 0.5

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self.gpu.use(300)
        self.gpu.take(1000 + 50 - self.gpu.now)  # activations are freed, 50 of gradients remain
        super().backward(loss, *args, **kwargs)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.gpu.use(80)

    def on_train_batch_end(self, *_: Any) -> None:
        self.gpu.take(-50)
        self.gpu.use(7)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.gpu.use(600)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.gpu.use(2500)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def allocated(section: Any) -> dict[str, tuple[int, int, int]]:
    fields = ("allocated_peak_bytes", "allocated_end_bytes", "reserved_peak_bytes")
    return {phase: tuple(memory[field] for field in fields) for phase, memory in section["ranks"][0]["phases"].items()}


def test_each_phase_has_its_peak_and_the_run_has_the_largest(
    gpu: Allocator, trainer: Make, batches: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = OnGpu(predicted={"weights": 1000, "activations": 1500})
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=2)
    fit = trainer(report, saving, accumulate_grad_batches=1, val_check_interval=2)
    fit.fit(Module(gpu), batches([1.0] * 4), batches([1.0]))
    section: Any = report.report_section()
    assert allocated(section) == {
        # peak, at the end, reserved
        "load": (1500, 1000, 2000),
        "forward": (1203, 1203, 4000),  # the 4th micro-batch, of 200 + 3
        "backward": (1503, 1050, 4000),
        "optimizer": (1130, 1050, 4000),
        "validation": (1600, 1000, 4000),
        "save": (3550, 1050, 4000),
        "other": (1050, 1050, 4000),
    }
    rank = section["ranks"][0]
    assert (rank["allocated_peak_bytes"], rank["reserved_peak_bytes"]) == (3550, 4000)
    assert (rank["outside_allocator_bytes"], rank["device_bytes"]) == (700, 10_000)
    assert section["predicted_bytes"] == {"weights": 1000, "activations": 1500}
    assert section["measured_to_predicted"] == 3550 / 2500
    assert peak_memory_bytes(CUDA) == (3550, "cuda_max_allocated")  # of the whole process, although phases restart it
    printed = capsys.readouterr().out
    assert printed.count("Memory in GiB") == 1
    assert re.search(r"phase +┃ GPU allocated ┃ GPU reserved ┃ process", printed)


def test_the_table_is_in_gib_of_the_worst_rank() -> None:
    def rank(of: int) -> Any:
        memory = {"allocated_peak_bytes": of * GIB, "allocated_end_bytes": 0, "reserved_peak_bytes": 5 * GIB}
        return {
            "phases": {"forward": {**memory, "host_rss_bytes": 3 * GIB // of}},
            **memory, "host_peak_bytes": 4 * GIB, "host_peak_phase": None, "outside_allocator_bytes": 0,
            "device_bytes": 0,
        }  # fmt: skip

    report = MemoryReport(predicted={"weights": GIB, "rest": GIB // 2})
    report._device, report._ranks = CUDA, [rank(1), rank(2)]
    console = Console(width=100)
    with console.capture() as capture:
        console.print(report.table())
    rows = [re.findall(r"[\w.]+", line) for line in capture.get().splitlines()]
    assert rows[0] == ["Memory", "in", "GiB", "most", "of", "2", "ranks"]
    assert ["forward", "2.00", "5.00", "3.00"] in rows
    assert ["peak", "2.00", "5.00", "4.00"] in rows
    assert ["predicted", "1.50"] in rows
    assert ["rest", "0.50"] in rows
    assert report.report_section() == {
        "ranks": report._ranks, "predicted_bytes": report.predicted, "measured_to_predicted": 2 / 1.5,
    }  # fmt: skip


@pytest.mark.parametrize("report_first", [True, False])
def test_a_run_out_of_memory_says_in_which_phase(
    gpu: Allocator, trainer: Make, batches: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], report_first: bool
) -> None:
    path, memory = tmp_path / "report.json", OnGpu()
    callbacks = [RunReport(path), memory] if report_first else [memory, RunReport(path)]
    fit = trainer(*callbacks, enable_checkpointing=False)
    with pytest.raises(torch.OutOfMemoryError):
        fit.fit(Module(gpu, fail_at=2), batches([1.0] * 4))
    section = load_report(path)["sections"]["memory"]
    assert allocated(section)["forward"] == (5202, 5202, 6000)
    assert section["ranks"][0]["outside_allocator_bytes"] is None
    assert "Rank 0 was stopped in phase 'forward' by OutOfMemoryError." in capsys.readouterr().out


def test_a_second_run_begins_anew_and_the_profiler_is_the_trainers_again(
    gpu: Allocator, trainer: Make, batches: Make
) -> None:
    report = OnGpu()
    for _ in range(2):
        fit = trainer(report, enable_checkpointing=False, max_steps=1)
        profiler = fit.profiler
        fit.fit(Module(gpu), batches([1.0]))
        assert fit.profiler is profiler
        gpu.take(-1000)  # the module is gone
    assert allocated(report.report_section())["load"][0] == 1500
    assert "validation" not in allocated(report.report_section())


def test_nothing_is_measured_outside_fit(trainer: Make, module: Make, batches: Make) -> None:
    report = MemoryReport()
    assert report.report_section() is None
    trainer(report, enable_checkpointing=False).validate(module(), batches([1.0]), verbose=False)
    assert report.report_section() is None


def test_host_memory_is_the_processes(trainer: Make) -> None:
    """A block that lives in the forward pass alone is seen in the peak; a smaller one that stays, from then on."""

    class Hungry(BoringModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 1:
                target = peak_memory_bytes(torch.device("cpu"))[0] + 250 * 2**20
                torch.ones(max(0, target - psutil.Process().memory_info().rss), dtype=torch.uint8)
            return super().training_step(batch, batch_idx)

        def on_validation_epoch_end(self) -> None:
            if not self.trainer.sanity_checking:
                self.kept = torch.ones(100 * 2**20, dtype=torch.uint8)

    report = MemoryReport()
    trainer(report, enable_checkpointing=False, max_steps=2, val_check_interval=2).fit(Hungry())
    rank: Any = report.report_section()["ranks"][0]  # type: ignore[index]
    phases = rank["phases"]
    assert rank["host_peak_phase"] == "forward"
    assert rank["host_peak_bytes"] >= max(memory["host_rss_bytes"] for memory in phases.values())
    assert phases["validation"]["host_rss_bytes"] >= phases["forward"]["host_rss_bytes"] + 80 * 2**20
    assert phases["other"]["host_rss_bytes"] >= phases["forward"]["host_rss_bytes"] + 80 * 2**20
    assert rank["allocated_peak_bytes"] is rank["device_bytes"] is phases["forward"]["allocated_peak_bytes"] is None


def test_bad_predictions() -> None:
    with pytest.raises(ValueError, match=r"predicted\['loss'\] is -1, but it is a number of bytes"):
        MemoryReport(predicted={"weights": 0, "loss": -1})


def test_a_micro_batch_costs_little(gpu: Allocator) -> None:
    """Below 1 % of a step of 0.1 s; typically 0.1 ms. The fastest of many, as other processes only slow things down."""
    report = OnGpu()
    report._phase, report._device = "other", CUDA
    nothing: Any = None
    times = []
    for _ in range(50):
        began = perf_counter()
        report.on_train_batch_start(nothing, nothing, nothing, 0)
        report.on_before_backward(nothing, nothing, nothing)
        report.on_after_backward(nothing, nothing)
        report.on_train_batch_end(nothing, nothing, nothing, nothing, 0)
        times.append(perf_counter() - began)
    assert min(times) < 1e-3


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)  # Lightning writes a checkpoint
    example = inspect.cleandoc((memory_report.__doc__ or "").split("::\n")[1])
    assert len(example.splitlines()) <= 12
    exec(example, {})
    printed = capsys.readouterr().out
    assert "Memory in GiB" in printed
    assert re.search(r"^backward None \d{8,}$", printed, re.MULTILINE)


def test_every_field_is_documented_and_json(trainer: Make) -> None:
    report = MemoryReport()
    trainer(report, enable_checkpointing=False, max_steps=1).fit(BoringModel())
    section: Any = report.report_section()
    rank = section["ranks"][0]
    kinds = (MemorySection, section), (memory_report.RankMemory, rank)
    for kind, value in (*kinds, (memory_report.PhaseMemory, rank["phases"]["forward"])):
        assert value.keys() == kind.__annotations__.keys()
        assert all(re.search(rf"(?m)^ +{field} ", kind.__doc__ or "") for field in value)
    assert json.loads(json.dumps(section)) == section
    assert all(f"``{phase}``" in (MemoryReport.__doc__ or "") for phase in memory_report._PHASES)


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPools]:
    """Of this module alone: what others leave in memory differs between ranks."""
    with RankPools() as pools:
        yield pools


def fit_on_rank(device: str) -> Any:
    class Hungry(BoringModel):
        def on_train_start(self) -> None:
            if self.global_rank == 1:
                self.kept = torch.ones(100 * 2**20, dtype=torch.uint8, device=self.device)

    report, speed = MemoryReport(), ThroughputReport(tokens_fn=len)
    trainer = pl.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu", devices=2, strategy="ddp", max_steps=2,
        callbacks=[speed, report],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Hungry())
    return report.report_section(), speed.report_section()


@pytest.mark.parametrize(("world_size", "device"), groups(2))
def test_every_rank_reports(ranks: RankPools, world_size: int, device: str) -> None:
    """Here with :class:`ThroughputReport`, which gathers at the end too, to start the ranks once only."""
    (first, speed), (second, _) = ranks.run(world_size, device, fit_on_rank, device)
    assert speed["tokens_per_s"] == pytest.approx(2 / speed["step_time_s"]["p50"])
    assert first == second
    field = "allocated_peak_bytes" if device == "cuda" else "host_rss_bytes"
    rank0, rank1 = (rank["phases"]["forward"][field] for rank in first["ranks"])
    assert rank1 - rank0 > 60 * 2**20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one CUDA GPU")
def test_phases_on_a_gpu(trainer: Make, tmp_path: Path) -> None:
    mib = 2**20

    class Hungry(BoringModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            torch.empty(256 * mib, dtype=torch.uint8, device=self.device)
            return super().training_step(batch, batch_idx)

        def on_after_backward(self) -> None:
            torch.empty(512 * mib, dtype=torch.uint8, device=self.device)

    path, report = tmp_path / "report.json", MemoryReport()
    run = RunReport(path, loss_key="loss")
    fit = trainer(report, run, accelerator="gpu", devices=1, enable_checkpointing=False)

    class Logging(Hungry):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            result = super().training_step(batch, batch_idx)
            self.log("loss", result["loss"])
            return result

    fit.fit(Logging())
    rank: Any = load_report(path)["sections"]["memory"]["ranks"][0]
    phases = rank["phases"]
    rest = 80 * mib  # a workspace of cuBLAS for the thread of the forward and one for autograd's, 32 MiB each on Hopper
    before = phases["load"]["allocated_end_bytes"]
    assert 256 * mib <= phases["forward"]["allocated_peak_bytes"] - before < 256 * mib + rest
    assert 512 * mib <= phases["optimizer"]["allocated_peak_bytes"] - before < 512 * mib + rest
    assert phases["backward"]["allocated_peak_bytes"] < phases["forward"]["allocated_peak_bytes"]
    assert rank["allocated_peak_bytes"] == phases["optimizer"]["allocated_peak_bytes"]
    assert load_report(path)["peak_memory_gib"][0] * GIB >= rank["allocated_peak_bytes"]
    assert rank["outside_allocator_bytes"] > 0
    assert rank["device_bytes"] == torch.cuda.get_device_properties(0).total_memory
