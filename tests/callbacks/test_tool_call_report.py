"""Tool calls before and after training: when the model is asked, what is kept, printed and shown on the page."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_qlora.callbacks import RunReport, StepCheckpoint, ToolCallReport, load_report

Make = Callable[..., Any]


class Evaluation:
    """Stands in for the recipe's: the share of exact calls grows from one evaluation to the next."""

    def __init__(self, first: float) -> None:
        self.share, self.modules = first, list[Any]()

    def __call__(self, module: Any) -> dict[str, Any]:
        self.modules.append(module)
        found = {
            "requests": 4,
            "figures": {"exact calls": self.share, "final answers right": None},
            "mistakes": {"function": 4 - int(4 * self.share)},
            "examples": [
                {"request": "<q>", "expected": "f(1)", "written": [f"f({self.share})", "It is."], "right": False}
            ],
        }
        self.share += 0.5
        return found


def test_both_evaluations_are_printed_and_part_of_the_report(
    trainer: Make, module: Make, batches: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation, model = Evaluation(0.25), module()
    trainer(ToolCallReport(evaluation), RunReport(tmp_path / "report.json")).fit(model, batches([1.0] * 4))
    assert evaluation.modules == [model, model]
    section = load_report(tmp_path / "report.json")["sections"]["tool_calls"]
    assert [section[stage]["figures"]["exact calls"] for stage in ("before", "after")] == [0.25, 0.75]
    printed = capsys.readouterr().out
    assert "before training: exact calls 25.0%" in printed
    assert [line.split() for line in printed.splitlines() if line.startswith(("exact calls", "final"))] == [
        ["exact", "calls", "25.0%", "75.0%"],
        ["final", "answers", "right", "-", "-"],
    ]
    page = (tmp_path / "report.html").read_text()
    assert "25.0%" in page
    assert "&lt;q&gt;" in page
    assert "after, wrong" in page


def test_a_resumed_run_keeps_the_figures_before_and_a_stopped_one_is_not_evaluated(
    trainer: Make, module: Make, batches: Make, tmp_path: Path
) -> None:
    stopped = Evaluation(0.0)
    first = ToolCallReport(stopped)
    with pytest.raises(RuntimeError):
        trainer(first, StepCheckpoint(tmp_path, 2)).fit(module(fail_at=3), batches([1.0] * 4))
    assert (len(stopped.modules), first.after) == (1, None)
    report = ToolCallReport(Evaluation(0.5))
    trainer(report, enable_checkpointing=False).fit(module(), batches([1.0] * 4), ckpt_path=tmp_path / "step=2.ckpt")
    section = report.report_section()
    assert section is not None
    assert section["before"]["figures"]["exact calls"] == 0.0
    assert section["after"]["figures"]["exact calls"] == 0.5
    early = Evaluation(0.5)
    fit = trainer(ToolCallReport(early))
    fit.fit(module(on_batch=lambda index: setattr(fit, "should_stop", True)), batches([1.0] * 4))
    assert fit.global_step == 1
    assert len(early.modules) == 1
