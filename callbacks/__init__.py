"""Lightning callbacks that work with any LightningModule."""

from lightning_qlora.callbacks.graceful_stop import GracefulStop
from lightning_qlora.callbacks.progress import LossProgress
from lightning_qlora.callbacks.report import Report, ReportSource, RunReport, load_report

__all__ = ["GracefulStop", "LossProgress", "Report", "ReportSource", "RunReport", "load_report"]
