"""Lightning callbacks that work with any LightningModule."""

from lightning_qlora.callbacks.adapter import SaveAdapter
from lightning_qlora.callbacks.answers import CompareAnswers
from lightning_qlora.callbacks.checkpoint import StepCheckpoint
from lightning_qlora.callbacks.graceful_stop import GracefulStop
from lightning_qlora.callbacks.progress import LossProgress
from lightning_qlora.callbacks.report import Report, ReportSource, RunReport, load_report

__all__ = [
    "CompareAnswers",
    "GracefulStop",
    "LossProgress",
    "Report",
    "ReportSource",
    "RunReport",
    "SaveAdapter",
    "StepCheckpoint",
    "load_report",
]
