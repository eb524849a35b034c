"""Lightning callbacks that work with any LightningModule."""

from lightning_qlora.callbacks.adapter import SaveAdapter
from lightning_qlora.callbacks.answers import CompareAnswers
from lightning_qlora.callbacks.checkpoint import StepCheckpoint
from lightning_qlora.callbacks.compile_report import CompileReport, CompileReportError, CompileSection
from lightning_qlora.callbacks.graceful_stop import GracefulStop
from lightning_qlora.callbacks.memory_report import MemoryReport, MemorySection
from lightning_qlora.callbacks.progress import LossProgress
from lightning_qlora.callbacks.report import Report, ReportSource, RunReport, load_report, write_html
from lightning_qlora.callbacks.throughput_report import ThroughputReport, ThroughputSection

__all__ = [
    "CompareAnswers",
    "CompileReport",
    "CompileReportError",
    "CompileSection",
    "GracefulStop",
    "LossProgress",
    "MemoryReport",
    "MemorySection",
    "Report",
    "ReportSource",
    "RunReport",
    "SaveAdapter",
    "StepCheckpoint",
    "ThroughputReport",
    "ThroughputSection",
    "load_report",
    "write_html",
]
