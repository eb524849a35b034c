"""Lightning callbacks that work with any LightningModule: reports, checkpoints, and a clean end at Ctrl-C.

All reports of a project of your own, whose module logs ``train_loss`` and compiles parts of itself::

    import lightning.pytorch as pl
    from lightning_qlora.callbacks import CompileReport, MemoryReport, RunReport, ThroughputReport


    def train(module: pl.LightningModule, data: pl.LightningDataModule) -> None:
        compiled = CompileReport(max_graphs=5)  # a graph break ends the run, and names its line
        run = RunReport("run/report.json")  # and run/report.html, with what the others found
        trainer = pl.Trainer(max_steps=100, callbacks=[compiled, MemoryReport(), ThroughputReport(), run])
        trainer.fit(module, data)  # prints their tables at the end
        print(compiled.report_section()["graphs"], "graphs")

Tokens are counted in ``batch["input_ids"]``; for other batches pass ``tokens_fn``.
"""

from .adapter import SaveAdapter
from .answers import CompareAnswers
from .checkpoint import StepCheckpoint
from .classification_report import ClassificationReport
from .compile_report import CompileReport, CompileReportError, CompileSection
from .exact_match import ExactMatch
from .graceful_stop import GracefulStop
from .memory_report import MemoryReport, MemorySection
from .preference_report import PreferenceReport
from .progress import LossProgress
from .report import ReportSource, RunReport, write_html
from .report_schema import Report, load_report
from .throughput_report import ThroughputReport, ThroughputSection
from .tool_call_report import ToolCallReport

__all__ = [
    "ClassificationReport",
    "CompareAnswers",
    "CompileReport",
    "CompileReportError",
    "CompileSection",
    "ExactMatch",
    "GracefulStop",
    "LossProgress",
    "MemoryReport",
    "MemorySection",
    "PreferenceReport",
    "Report",
    "ReportSource",
    "RunReport",
    "SaveAdapter",
    "StepCheckpoint",
    "ThroughputReport",
    "ThroughputSection",
    "ToolCallReport",
    "load_report",
    "write_html",
]
