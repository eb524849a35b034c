"""`report.html` of reports with everything, with nothing, and with what it does not know."""

import copy
import json
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_qlora.callbacks import (
    CompileReport,
    MemoryReport,
    Report,
    RunReport,
    ThroughputReport,
    load_report,
    write_html,
)
from lightning_qlora.callbacks.html_report import _Line, _line_plot, _thin, _tick, _ticks, render_html
from lightning_qlora.callbacks.measure import GIB

Make = Callable[..., Any]


class Page(HTMLParser):
    """Checks that every element is closed in order; keeps the text and the addresses."""

    VOID = ("meta", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.addresses: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("href", "src", "action", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data

    @property
    def headings(self) -> list[str]:
        return re.findall(r"(?m)^(Loss|Speed|Memory|Compilation|Settings|Versions|Graceful stop|Other)$", self.text)


def phase(allocated: float, reserved: float, resident: float) -> dict[str, int]:
    return {
        "allocated_peak_bytes": int(allocated * GIB),
        "allocated_end_bytes": 0,
        "reserved_peak_bytes": int(reserved * GIB),
        "host_rss_bytes": int(resident * GIB),
    }


def rank_memory(more: float) -> dict[str, Any]:
    return {
        "phases": {"forward": phase(7 + more, 8, 4.3), "backward": phase(9 + more, 10.5, 4.25)},
        "allocated_peak_bytes": int((9 + more) * GIB),
        "reserved_peak_bytes": int(10.5 * GIB),
        "host_peak_bytes": int(5.125 * GIB),
        "host_peak_phase": None,
        "outside_allocator_bytes": int(0.375 * GIB),
        "device_bytes": int(14.5 * GIB),
    }


COUNTS = {"graphs": 3, "graph_breaks": 1, "recompiles": 1, "compile_s": 12.5, "cache_hits": 2, "cache_misses": 4}


def event(reason: str, line: int) -> dict[str, Any]:
    return {
        "region": "model.layers.3", "stage": "train", "step": 2, "phase": "backward", "reason": reason,
        "file": "/home/me/attention.py", "line": line, "function": "forward", "code": "  scores.item()",
        "stack": ["main.py:12 in main"],
    }  # fmt: skip


@pytest.fixture
def report() -> Report:
    value: Any = {
        "schema_version": 1, "status": "completed", "error": None, "start_time": "2026-01-02T03:04:05.678+00:00",
        "end_time": "2026-01-02T04:04:05.678+00:00", "global_step": 4, "resumed_from_step": 0,
        "losses": [4.0, 3.0, None, 1.5], "val_losses": [(2, 3.5), (4, 2.25)], "tokens_per_s": 3211.4,
        "step_time_s": {"p50": 1.25, "p95": 1.5}, "warmup_steps": 1, "peak_memory_gib": [9.0, 9.5],
        "memory_kind": "cuda_max_allocated", "world_size": 2, "devices": ["Tesla T4", "Tesla T4"],
        "strategy": "FSDP2Strategy", "precision": "16-mixed", "model": "tiny",
        "metadata": {"lora_r": 64, "nested": {"list": [1, None], "flag": False}}, "versions": {"torch": "2.13.0"},
        "sections": {
            "memory": {
                "ranks": [rank_memory(0), rank_memory(0.5)], "predicted_bytes": {"base": 5 * GIB, "loss": 3 * GIB},
                "measured_to_predicted": 1.1875,
            },
            "throughput": {
                "warmup_steps": 1, "timed_steps": 3, "step_time_s": {"p50": 1.25, "p95": 1.5},
                "tokens_per_s": 3211.4, "data_wait_share": 0.0125, "mfu": 0.3125, "model_flops_per_s": 15.25e12,
                "mfu_note": "FLOPs by hand", "matmul_flops_per_s": [24e12, 25e12], "matmul_dtype": "float16",
                "matmul_size": 4096, "steps": [2, 3, 4], "steps_tokens_per_s": [3000.0, None, 3400.0],
                "steps_time_s": [1.25, 1.25, 1.5],
            },
            "compile": {
                "rank": 1, "compiled_modules": 33, **COUNTS,
                "limits": {"fail_on_graph_break": False, "max_graphs": 30, "max_recompiles": None},
                "steps": [{"stage": "train", "step": 1, **COUNTS}], "regions": [{"region": "model.layers.0", **COUNTS}],
                "breaks": [event("Tensor.item()\n  Explanation: it depends on data", 42)],
                "recompilations": [event("size mismatch", 11)],
                "uncompiled": [{"region": "model.norm", "reason": "a built-in module"}],
                "elsewhere": [{"source": "optim.py:12 step", **COUNTS}],
                "ranks": [{"rank": 0, **COUNTS}, {"rank": 1, **COUNTS}],
            },
            "graceful_stop": {"signal": "SIGINT", "checkpoint": "step=4.ckpt"},
        },
    }  # fmt: skip
    return value


def test_everything_is_shown_and_nothing_is_fetched(report: Report) -> None:
    html = render_html(report)
    page = Page(html)
    assert page.headings == ["Loss", "Speed", "Memory", "Compilation", "Graceful stop", "Settings", "Versions"]
    assert page.addresses == []
    assert "script" not in page.tags
    assert "url(" not in html
    assert "@import" not in html
    assert "http" not in html.replace("http-equiv", "")
    for figure in (
        "1.5", "from 4", "best 2.25", "3,211", "1.25 s", "9.50 GiB", "31.2%", "1.2%", "graph breaks: 1, recompiles: 1",
        "24.5 TFLOP/s a device, float16 of two 4096 x 4096 matrices", "15.2 TFLOP/s", "FLOPs by hand",
        "9.50 / 10.50", "0.38 GiB", "14.50 GiB", "8.00 GiB a rank. The largest peak is 118.8% of it.", "5.12 GiB",
        "3 (at most 30 allowed)", "model.layers.3", "train 2, backward", "/home/me/attention.py:42 in forward",
        "Tensor.item()", "it depends on data", "scores.item()", "main.py:12 in main", "size mismatch",
        "/home/me/attention.py:11", "model.norm", "a built-in module", "optim.py:12 step", "1, the worst of 2",
        "SIGINT", "Tesla T4, Tesla T4", "FSDP2Strategy", "2.13.0", "2026-01-02 03:04:05 UTC to 2026-01-02 04:04:05",
        "lora_r", "False",
    ):  # fmt: skip
        assert figure in page.text, figure


def test_every_plot_is_well_formed_and_inside_its_frame(report: Report) -> None:
    plots = [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", render_html(report), re.DOTALL)]
    assert len(plots) == 6  # loss; tokens/s and step time; GPU and process; compilation
    for plot in plots:
        _, _, width, height = map(float, plot.attrib["viewBox"].split())
        for element in plot.iter():
            x, y = (float(element.attrib.get(a) or element.attrib.get("c" + a, "0")) for a in ("x", "y"))
            assert 0 <= x + float(element.attrib.get("width", "0")) <= width
            assert 0 <= y <= height
            for point in element.attrib.get("points", "").split():
                assert all(
                    0 <= p <= limit for p, limit in zip(map(float, point.split(",")), (width, height), strict=True)
                )


def test_a_gap_interrupts_a_curve_and_figures_can_be_read_off() -> None:
    plot = ET.fromstring(_line_plot([_Line("loss", [(1, 4.0), (2, 3.0), (3, None), (4, 2.0)])], "step", "loss"))
    assert [line.attrib["points"].split() for line in plot.findall("polyline")] == [["52.0,30.0", "188.0,125.0"]]
    circles = plot.findall("circle")
    assert [c.findtext("title") for c in circles] == ["1: 4", "2: 3", "4: 2"]
    assert (circles[2].attrib["cx"], circles[2].attrib["cy"]) == ("460.0", "220.0")
    labels = [text.text for text in plot.findall("text")]
    assert labels == ["loss", "2.0", "2.5", "3.0", "3.5", "4.0", "1", "2", "3", "4", "step"]


def test_text_from_outside_is_text(report: Report) -> None:
    evil = "</td><script>alert(1)</script>&amp;\"'"
    report["model"] = report["error"] = report["strategy"] = evil
    report["metadata"] = {evil: evil}
    report["sections"]["compile"]["breaks"] = [event(f"{evil}\n{evil}", 1) | {"code": evil, "region": evil}]
    report["sections"][evil] = {"a": [evil]}
    report["sections"]["memory"]["predicted_bytes"] = {evil: GIB}
    page = Page(render_html(report))
    assert "script" not in page.tags
    # title and heading, error, strategy, setting and its value, section and its value, part and its bar, and of the
    # break: region, headline, explanation, code
    assert page.text.count(evil) == 14


def test_samples_show_what_is_trained(report: Report) -> None:
    sample = {"tokens": 9, "trained": 4, "runs": [["<|user|>q\n", False], ["a</s>", True], ["\n", False]]}
    report["sections"]["data"] = {"train_samples": 25, "samples": [sample]}
    html = render_html(report)
    assert "<pre>&lt;|user|&gt;q\n<mark>a&lt;/s&gt;</mark>\n</pre>" in html
    assert re.search(r"train_samples\s*25", Page(html).text)
    assert "4 of 9 tokens are trained" in Page(html).text


def test_a_report_of_nothing(report: Report) -> None:
    report.update(
        {
            "status": "failed", "error": "ValueError: no such model", "end_time": None, "losses": [], "val_losses": [],
            "tokens_per_s": None, "step_time_s": None, "peak_memory_gib": [], "model": None, "metadata": {},
            "versions": {}, "sections": {}, "global_step": 0,
        }
    )  # fmt: skip
    page = Page(render_html(report))
    assert page.headings == ["Settings"]
    assert "Training run" in page.text
    assert "ValueError: no such model" in page.text
    assert "svg" not in page.tags
    assert "None" not in page.text


@pytest.mark.parametrize("losses", [[None, None], [2.5], [2.0, 2.0], [math.pi * 1e-9, 7e12], [0.0]])
def test_odd_losses(report: Report, losses: list[float | None]) -> None:
    report["losses"], report["val_losses"], report["sections"] = losses, [], {}
    page = Page(render_html(report))
    assert page.tags.count("svg") == (losses != [None, None])


@pytest.mark.parametrize("key", ["memory", "throughput", "compile"])
@pytest.mark.parametrize("change", ["lacks a field", "is of another form", "is a list"])
def test_a_known_section_of_another_version_is_shown_as_it_is(report: Report, key: str, change: str) -> None:
    section: Any = report["sections"][key]
    if change == "lacks a field":
        section.pop({"memory": "ranks", "throughput": "steps", "compile": "limits"}[key])
        section["novel"] = "figure"
    elif change == "is a list":
        report["sections"][key] = [{"novel": "figure"}]  # type: ignore[assignment]
    else:
        report["sections"][key] = {"ranks": 7, "steps": "many", "limits": None, "novel": "figure"}
    page = Page(render_html(report))
    assert re.search(r"novel\s*figure", page.text)


def test_no_gpu_no_prediction_no_rate(report: Report) -> None:
    memory, throughput = report["sections"]["memory"], report["sections"]["throughput"]
    for rank in memory["ranks"]:
        rank.update({key: None for key in rank if key.endswith("_bytes") and "host" not in key})
        for of_phase in rank["phases"].values():
            of_phase.update({key: None for key in of_phase if "host" not in key})
    throughput.update(mfu=None, model_flops_per_s=None, matmul_flops_per_s=None, mfu_note="no flops_per_token")
    throughput.update(data_wait_share=None, steps_tokens_per_s=[None] * 3)
    page = Page(render_html(report))
    assert "Predicted" not in page.text
    assert "GPU memory" not in page.text
    assert re.search(r"MFU\s*no flops_per_token", page.text)
    assert page.tags.count("svg") == 4  # loss, step time, process, compilation


def test_a_long_run_stays_small(report: Report) -> None:
    report["losses"] = [1 / (1 + step) for step in range(100_000)]
    assert len(render_html(report)) < 200_000
    assert _thin([(1, 2.0), (2, None), (3, 4.0), (4, None), (5, None)], 2) == [(2, 2.0), (4, 4.0), (5, None)]


def test_axes_have_round_numbers() -> None:
    assert _ticks(0.0, 3400.0) == [0, 1000, 2000, 3000]
    assert _ticks(1, 1200, whole=True) == [500, 1000]
    assert _ticks(1, 4, whole=True) == [1, 2, 3, 4]
    assert _ticks(7, 7, whole=True) == [7]
    assert [_tick(tick, [0.0, 0.05, 0.1]) for tick in (0.0, 0.05)] == ["0.00", "0.05"]
    assert _tick(20_000, [0, 20_000]) == "20k"
    assert _tick(2_500_000, [2_000_000, 2_500_000]) == "2.5M"


def test_a_real_run_has_a_page_beside_its_report(tmp_path: Path, trainer: Make, module: Make, batches: Make) -> None:
    path = tmp_path / "run" / "report.json"
    callbacks = RunReport(path), MemoryReport(), ThroughputReport()
    fit = trainer(*callbacks, enable_checkpointing=False, val_check_interval=2)
    fit.fit(module(), batches([4.0, math.nan, 2.0, 1.0]), batches([3.0]))
    html = path.with_suffix(".html").read_text()
    assert Page(html).headings == ["Loss", "Speed", "Memory", "Settings", "Versions"]
    again = tmp_path / "again" / "page.html"
    write_html(load_report(path), again)
    assert again.read_text() == html


def test_a_graph_break_of_a_real_run_is_on_the_page(tmp_path: Path, trainer: Make) -> None:
    class Layer(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch._dynamo.graph_break()
            return super().forward(x)

    class Module(BoringModel):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Layer(32, 2)
            self.layer.compile(backend="eager")

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("train_loss", 0.0)
            return super().training_step(batch, batch_idx)

    path = tmp_path / "report.json"
    callbacks = CompileReport(fail_on_graph_break=False), RunReport(path)
    trainer(*callbacks, enable_checkpointing=False, max_steps=2, limit_val_batches=0).fit(Module())
    page = Page(path.with_suffix(".html").read_text())
    place = next(event for event in load_report(path)["sections"]["compile"]["breaks"])
    assert re.search(r"When, and how many seconds\s+train 1\s", page.text)
    assert f"{place['file']}:{place['line']} in forward" in page.text
    assert Path(place["file"]).name == "test_html_report.py"


def test_a_run_that_fails_has_a_page_too(tmp_path: Path, trainer: Make, module: Make, batches: Make) -> None:
    path = tmp_path / "report.json"
    with pytest.raises(RuntimeError):
        trainer(RunReport(path), enable_checkpointing=False).fit(module(fail_at=2), batches([3.0, 2.0, 1.0]))
    assert "the disk is full of gradients" in Page(path.with_suffix(".html").read_text()).text


def test_the_page_is_optional_and_has_its_own_name(tmp_path: Path, trainer: Make, module: Make, batches: Make) -> None:
    path = tmp_path / "report.json"
    trainer(RunReport(path, html=False), enable_checkpointing=False).fit(module(), batches([1.0]))
    assert path.exists()
    assert not path.with_suffix(".html").exists()
    with pytest.raises(ValueError, match=r"report\.html, but the page takes that name"):
        RunReport(tmp_path / "report.html")


def test_rendering_changes_nothing(report: Report) -> None:
    before = copy.deepcopy(report)
    render_html(report)
    assert json.dumps(report) == json.dumps(before)
