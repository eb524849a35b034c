"""`report.html`: a run's report as one page to read, with nothing to load from elsewhere and no script."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from .measure import GIB, rounded, with_prefix
from .report_schema import Report

# Units of an SVG. On a phone a figure is about as wide as this in pixels, so its text keeps its size there.
_WIDTH = 480
_MAX_POINTS = 400
_MAX_ROWS = 40
_COLORS = 8


def render_html(report: Report) -> str:
    """``report`` as a page.

    What it does not have (validation losses, sections of other callbacks) is left out; a section that is not known
    here, or has other fields than expected, is shown as it is.
    """
    parts = [
        _Part("Loss", _plots(_losses(report))),
        *(_Part(_title(key), _section(key, section)) for key, section in _in_order(report["sections"])),
        _Part("Settings", _details(report["metadata"]) + _details(_setup(report))),
        _Part("Versions", _details(report["versions"])),
    ]
    return _PAGE.render(
        title=report["model"] or "Training run",
        report=report,
        when=_when(report),
        tiles=list(_tiles(report)),
        parts=[part for part in parts if part.body],
    )


@dataclass(frozen=True)
class _Part:
    title: str
    body: Markup


# ------------------------------------------------------------------------------------------------------ parts of a page


def _tiles(report: Report) -> Iterator[tuple[str, str, str]]:
    """Label, figure and remark of what matters first."""
    losses = [loss for loss in report["losses"] if loss is not None]
    if losses:
        yield "loss", _number(losses[-1]), f"from {_number(losses[0])}" if len(losses) > 1 else ""
    val_losses = [loss for _, loss in report["val_losses"] if loss is not None]
    if val_losses:
        yield "validation loss", _number(val_losses[-1]), f"best {_number(min(val_losses))}"
    if report["tokens_per_s"] is not None:
        ranks = report["world_size"]
        yield "tokens per second", rounded(report["tokens_per_s"]), f"all {ranks} ranks" if ranks > 1 else ""
    if (times := report["step_time_s"]) is not None:
        yield "step time", _seconds(times["p50"]), f"median; 95 % below {_seconds(times['p95'])}"
    if report["peak_memory_gib"]:
        kind = "on the GPU" if report["memory_kind"] == "cuda_max_allocated" else "of the process"
        most = " of the largest rank" if report["world_size"] > 1 else ""
        yield "peak memory", f"{max(report['peak_memory_gib']):.2f} GiB", kind + most
    throughput, compiled = (
        section if isinstance(section := report["sections"].get(key), Mapping) else {}
        for key in ("throughput", "compile")
    )
    for field, label, remark in (
        ("mfu", "MFU", "of the measured matrix rate"),
        ("data_wait_share", "waiting for data", "of the step time"),
    ):
        if isinstance(share := throughput.get(field), int | float):
            yield label, f"{share:.1%}", remark
    if isinstance(compiled.get("graphs"), int) and compiled["graphs"]:
        breaks, again = compiled.get("graph_breaks"), compiled.get("recompiles")
        yield "compiled graphs", str(compiled["graphs"]), f"graph breaks: {breaks}, recompiles: {again}"


def _losses(report: Report) -> Markup:
    steps = range(1, len(report["losses"]) + 1)
    lines = [
        _Line("training", list(zip(steps, report["losses"], strict=True))),
        _Line("validation", list(report["val_losses"]), dots=True),
    ]
    return _line_plot(lines, "optimizer step", "loss")


def _throughput(section: Mapping[str, Any]) -> Markup:
    steps = section["steps"]
    tokens = _Line("tokens / s", list(zip(steps, section["steps_tokens_per_s"], strict=True)))
    times = _Line("step time", list(zip(steps, section["steps_time_s"], strict=True)))
    figures: dict[str, Any] = {
        "timed steps": f"{section['timed_steps']}, after {section['warmup_steps']} of warm-up that count nowhere",
    }
    if (rates := section["matmul_flops_per_s"]) is not None:
        size = section["matmul_size"]
        how = f" of two {size} x {size} matrices" if size else ", as given"
        figures["matrix product"] = (
            f"{with_prefix(sum(rates) / len(rates))}FLOP/s a device, {section['matmul_dtype']}{how}"
        )
    if section["mfu"] is not None:
        figures["MFU"] = f"{section['mfu']:.1%}, {with_prefix(section['model_flops_per_s'])}FLOP/s of all devices"
    figures["MFU" if section["mfu"] is None else "counted"] = section["mfu_note"]
    if section["data_wait_share"] is not None:
        figures["waiting for data"] = f"{section['data_wait_share']:.1%} of the step time, on the host of rank 0"
    plots = _line_plot([tokens], "optimizer step", "tokens / s", from_zero=True)
    plots += _line_plot([times], "optimizer step", "s / step", from_zero=True)
    return _plots(plots) + _details(figures)


def _memory(section: Mapping[str, Any]) -> Markup:
    ranks, predicted = section["ranks"], section["predicted_bytes"]
    on_gpu = ranks[0]["allocated_peak_bytes"] is not None
    phases = list(ranks[0]["phases"])
    most = f", most of {len(ranks)} ranks" if len(ranks) > 1 else ""

    def largest(phase: str, field: str) -> float:
        return max(rank["phases"].get(phase, {}).get(field) or 0 for rank in ranks) / GIB

    plots = Markup()
    if on_gpu:
        rows = []
        for phase in phases:
            allocated, reserved = largest(phase, "allocated_peak_bytes"), largest(phase, "reserved_peak_bytes")
            bars = [_Bar(allocated, 0, "allocated"), _Bar(reserved - allocated, 3, "reserved beyond that")]
            rows.append(_Row(phase, bars, f"{allocated:.2f} / {reserved:.2f}"))
        if predicted:
            parts = [_Bar(count / GIB, index, part) for index, (part, count) in enumerate(predicted.items())]
            rows.append(_Row("predicted", parts, f"{sum(bar.value for bar in parts):.2f}"))
        plots += _bar_plot(rows, f"GPU memory, GiB allocated / reserved{most}")
    rows = [
        _Row(phase, [_Bar(rss := largest(phase, "host_rss_bytes"), 0, "resident")], f"{rss:.2f}") for phase in phases
    ]
    plots += _bar_plot(rows, f"Process, GiB resident{most}")

    columns: dict[str, Callable[[Mapping[str, Any]], Any]] = {"rank": lambda rank: ranks.index(rank)}
    if on_gpu:
        columns["allocated"] = lambda rank: _gib(rank["allocated_peak_bytes"])
        columns["reserved"] = lambda rank: _gib(rank["reserved_peak_bytes"])
        columns["outside PyTorch"] = lambda rank: _gib(rank["outside_allocator_bytes"])
        columns["GPU"] = lambda rank: _gib(rank["device_bytes"])
    columns["process peak"] = lambda rank: _gib(rank["host_peak_bytes"])
    columns["reached in"] = lambda rank: rank["host_peak_phase"] or "before"
    body = _plots(plots) + _table(list(columns), [[cell(rank) for cell in columns.values()] for rank in ranks])
    if predicted and on_gpu:
        ratio = section["measured_to_predicted"]
        share = "" if ratio is None else f" The largest peak is {ratio:.1%} of it."
        swatch = Markup('<i class=swatch style="background: var(--c{})"></i>{}')
        rows_of_parts = [
            [swatch.format(index % _COLORS, part), _gib(count)] for index, (part, count) in enumerate(predicted.items())
        ]
        body += Markup("<h3>Predicted</h3><p>{:.2f} GiB a rank.{}</p>").format(sum(predicted.values()) / GIB, share)
        body += _table(["part", "bytes"], rows_of_parts)
    return body


def _compile(section: Mapping[str, Any]) -> Markup:
    limits = section["limits"]
    figures = {
        "compiled modules": section["compiled_modules"],
        "graphs": _of_limit(section["graphs"], limits["max_graphs"]),
        "graph breaks": _of_limit(section["graph_breaks"], 0 if limits["fail_on_graph_break"] else None),
        "recompiles": _of_limit(section["recompiles"], limits["max_recompiles"]),
        "time": _seconds(section["compile_s"]),
        "cache": f"{section['cache_hits']} hits, {section['cache_misses']} misses",
    }
    if len(section["ranks"]) > 1:
        figures["rank"] = f"{section['rank']}, the worst of {len(section['ranks'])}"
    body = Markup()
    if section["steps"]:
        rows = [
            _Row(f"{at['stage']} {at['step']}", [_Bar(at["compile_s"], 0, "compiling")], _counts(at))
            for at in section["steps"]
        ]
        body += _plots(_bar_plot(rows, "When, and how many seconds"))
    body += _details(figures)
    for title, events in (("Graph breaks", section["breaks"]), ("Recompiles", section["recompilations"])):
        if events:
            rows_of_events = [[_place(event), _why(event)] for event in events]
            body += Markup("<h3>{}</h3>").format(title) + _table(["where", "why"], rows_of_events)
    if section["uncompiled"]:
        body += Markup("<h3>Not compiled</h3>")
        body += _table(["region", "why"], [[_code(at["region"]), at["reason"]] for at in section["uncompiled"]])
    for title, key, name in (("Regions", "regions", "region"), ("Compiled by other code", "elsewhere", "source")):
        if section[key]:
            columns = ["graphs", "graph_breaks", "recompiles", "compile_s", "cache_hits", "cache_misses"]
            cells = [[_code(at[name]), *(_number(at[column]) for column in columns)] for at in section[key]]
            headings = [name, *(column.replace("_s", " s").replace("_", " ") for column in columns)]
            body += Markup("<h3>{}</h3>").format(title) + _table(headings, cells)
    return body


def _counts(at: Mapping[str, Any]) -> str:
    names = {"graphs": "graphs", "graph_breaks": "breaks", "recompiles": "recompiles"}
    return ", ".join(
        [_seconds(at["compile_s"]), *(f"{name}: {at[field]}" for field, name in names.items() if at[field])]
    )


def _place(event: Mapping[str, Any]) -> Markup:
    return Markup("<div class=place>{}<br>{} {}, {}<br><code class=muted>{}:{} in {}</code></div>").format(
        _code(event["region"]),
        event["stage"],
        event["step"],
        event["phase"],
        event["file"],
        event["line"],
        event["function"],
    )


def _why(event: Mapping[str, Any]) -> Markup:
    headline, _, rest = event["reason"].partition("\n")
    rest = "\n".join(filter(None, [rest.strip("\n"), *event["stack"]]))
    why = Markup("{}").format(headline)
    if rest:
        why = Markup("<details><summary>{}</summary><pre>{}</pre></details>").format(headline, rest)
    return why + (Markup("<pre>{}</pre>").format(event["code"].strip()) if event["code"] else Markup())


def _of_limit(count: int, limit: int | None) -> str:
    return str(count) if limit is None else f"{count} (at most {limit} allowed)"


def _setup(report: Report) -> dict[str, Any]:
    return {
        "strategy": report["strategy"],
        "precision": report["precision"],
        "devices": ", ".join(report["devices"]),
        "processes": report["world_size"],
    }


def _when(report: Report) -> str:
    text = f"{report['start_time'][:19].replace('T', ' ')} UTC"
    if report["end_time"] is not None:
        text += f" to {report['end_time'][:19].replace('T', ' ')}"
    text += f", {report['global_step']} optimizer steps"
    return text + (f", resumed from step {report['resumed_from_step']}" if report["resumed_from_step"] else "")


def _data(section: Mapping[str, Any]) -> Markup:
    body = _details({key: value for key, value in section.items() if key != "samples"})
    for number, sample in enumerate(section.get("samples", []), start=1):
        body += Markup("<h3>Sample {}</h3><p>{} of {} tokens are trained, shown in colour.</p>").format(
            number, sample["trained"], sample["tokens"]
        )
        runs = [
            (Markup("<mark>{}</mark>") if trained else Markup("{}")).format(text) for text, trained in sample["runs"]
        ]
        body += Markup("<pre>{}</pre>").format(Markup("").join(runs))
    return body


def _classification(section: Mapping[str, Any]) -> Markup:
    methods = {f"this model, {section['texts']} texts": section["figures"], **section["yardsticks"]}
    names = list(dict.fromkeys(name for figures in methods.values() for name in figures))
    body = _table(
        ["", *(name.replace("_", " ") for name in names)],
        [
            [method, *(_number(figures[name]) if name in figures else "" for name in names)]
            for method, figures in methods.items()
        ],
    )
    if not section["per_class"]:
        return body
    columns = ["precision", "recall", "f1", "auroc", "support"]
    cells = [
        [name, *("" if (value := figures[column]) is None else _number(value) for column in columns)]
        for name, figures in section["per_class"].items()
    ]
    body += Markup("<h3>Classes</h3>") + _table(["class", *columns], cells)
    body += Markup("<h3>Confusion</h3><p>A row per true class, a column per predicted one.</p>")
    classes, confusion = list(section["per_class"]), section["confusion"]
    if confusion and isinstance(confusion[0][0], list):  # several labels: a table for each
        for name, table in zip(classes, confusion, strict=True):
            body += Markup("<h4>{}</h4>").format(name) + _confusion(["no", "yes"], table)
        return body
    return body + _confusion(classes, confusion)


def _confusion(classes: Sequence[str], counts: Sequence[Sequence[int]]) -> Markup:
    """Counts on shades of their share of the row."""
    shade = Markup('<span class=shade style="--share: {:.0f}%">{}</span>')
    rows = []
    for name, row in zip(classes, counts, strict=True):
        total = max(sum(row), 1)
        rows.append([name, *(shade.format(100 * count / total, count) for count in row)])
    return _table(["true / predicted", *classes], rows)


def _tool_calls(section: Mapping[str, Any]) -> Markup:
    stages = {name: section[name] for name in ("before", "after") if section[name] is not None}
    shares = [
        [name, *("" if (share := stage["figures"][name]) is None else f"{share:.1%}" for stage in stages.values())]
        for name in section["before"]["figures"]
    ]
    count = section["before"]["requests"]
    body = Markup("<p>Shares of {} held-out requests.</p>").format(count) + _table(["", *stages], shares)
    mistakes = [
        [name, *(stage["mistakes"][name] for stage in stages.values())] for name in section["before"]["mistakes"]
    ]
    body += Markup("<h3>Requests by their first mistake</h3>") + _table(["", *stages], mistakes)
    body += Markup("<h3>Examples</h3>")
    examples = zip(*(stage["examples"] for stage in stages.values()), strict=True)
    for both in examples:
        body += Markup("<p>{}</p>").format(both[0]["request"])
        rows = [["the data", _code(both[0]["expected"])]]
        rows += [
            [f"{name}, {'right' if example['right'] else 'wrong'}", Markup("<br>").join(map(_code, example["written"]))]
            for name, example in zip(stages, both, strict=True)
        ]
        body += _table(["", "turns"], rows)
    return body


def _preference(section: Mapping[str, Any]) -> Markup:
    plots = Markup()
    for label, names in _PREFERENCE_PLOTS.items():
        lines = [
            _Line(f"{which} {phase}".strip(), section[key][name], dots=key == "val")
            for key, phase in (("train", "training"), ("val", "validation"))
            for name, which in names.items()
            if name in section[key]
        ]
        plots += _line_plot(lines, "optimizer step", label)
    return _plots(plots)


#: Title of a plot -> what is logged -> the line's name.
_PREFERENCE_PLOTS = {
    "margin": {"margin": ""},
    "accuracy": {"accuracy": ""},
    "rewards": {"rewards_chosen": "chosen", "rewards_rejected": "rejected"},
    "log-probabilities": {"log_probs_chosen": "chosen", "log_probs_rejected": "rejected"},
    "KL": {"kl": ""},
}


_RENDERERS: dict[str, Callable[[Mapping[str, Any]], Markup]] = {
    "throughput": _throughput,
    "memory": _memory,
    "compile": _compile,
    "data": _data,
    "classification": _classification,
    "tool_calls": _tool_calls,
    "preference": _preference,
}


def _in_order(sections: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Those known here first, in their order."""
    return [(key, sections[key]) for key in _RENDERERS if key in sections] + [
        (key, section) for key, section in sections.items() if key not in _RENDERERS
    ]


def _title(key: str) -> str:
    return {"throughput": "Speed", "compile": "Compilation"}.get(key, key.replace("_", " ").capitalize())


def _section(key: str, section: Any) -> Markup:
    try:
        return _RENDERERS[key](section)
    except (LookupError, TypeError, ValueError, AttributeError):
        return _details(section)  # of another callback, or another version of a known one: as it is


# ------------------------------------------------------------------------------------------------------------- elements


def _table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> Markup:
    return Markup(_TABLE.render(headings=headings, rows=rows))


def _details(value: Any) -> Markup:
    """Any JSON value, nested as it is."""
    return Markup(_VALUE.render(value=value)) if value or value == 0 else Markup()


def _plots(plots: Markup) -> Markup:
    return Markup("<div class=plots>{}</div>").format(plots) if plots else Markup()


def _code(text: str) -> Markup:
    return Markup("<code>{}</code>").format(text)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _gib(count: int | None) -> str:
    return "" if count is None else f"{count / GIB:.2f} GiB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"


# ---------------------------------------------------------------------------------------------------------------- plots


@dataclass(frozen=True)
class _Line:
    """A curve through ``points`` (x, y); it is interrupted where y is ``None``."""

    name: str
    points: list[tuple[float, float | None]]
    dots: bool = False


def _line_plot(lines: Sequence[_Line], x_label: str, y_label: str, *, from_zero: bool = False) -> Markup:
    """An SVG of ``lines`` on common axes; nothing where no line has a point."""
    lines = [line for line in lines if any(y is not None for _, y in line.points)]
    if not lines:
        return Markup()
    averaged = [-(-len(line.points) // _MAX_POINTS) for line in lines]
    lines = [
        _Line(line.name, _thin(line.points, count), line.dots) for line, count in zip(lines, averaged, strict=True)
    ]
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points if y is not None]
    x_ticks = _ticks(min(xs), max(xs), whole=True)
    y_ticks = _ticks(0.0 if from_zero else min(ys), max(ys))
    left, right, top, bottom = 52, 20, 30, 40
    width, height = _WIDTH - left - right, 190
    x_low, x_high = (min(xs), max(xs)) if max(xs) > min(xs) else (min(xs) - 1, max(xs) + 1)
    y_low, y_high = min(y_ticks[0], 0.0 if from_zero else min(ys)), max(y_ticks[-1], max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            round(left + width * (x - x_low) / (x_high - x_low), 1),
            round(top + height * (1 - (y - y_low) / (y_high - y_low)), 1),
        )

    return Markup(
        _LINE_PLOT.render(
            width=_WIDTH,
            height=top + height + bottom,
            left=left,
            right=_WIDTH - right,
            top=top,
            bottom=top + height,
            label=f"{y_label} by {x_label}",
            x_label=x_label,
            y_label=y_label,
            x_ticks=[(place(x, y_low)[0], _tick(x, x_ticks)) for x in x_ticks],
            y_ticks=[(place(x_low, y)[1], _tick(y, y_ticks)) for y in y_ticks],
            lines=[
                {
                    "name": line.name + (f" (means of {count})" if count > 1 else ""),
                    "runs": [[place(x, y) for x, y in run] for run in _runs(line.points)],
                    "points": [(*place(x, y), f"{x:g}: {_number(y)}") for run in _runs(line.points) for x, y in run],
                    "radius": 3 if line.dots or len(line.points) <= 40 else 1,
                }
                for line, count in zip(lines, averaged, strict=True)
            ],
        )
    )


def _thin(points: list[tuple[float, float | None]], count: int) -> list[tuple[float, float | None]]:
    """Means of each ``count`` neighbours, at the last one's x."""
    if count == 1:
        return points
    groups = [points[index : index + count] for index in range(0, len(points), count)]
    known = [[y for _, y in group if y is not None] for group in groups]
    return [(group[-1][0], sum(ys) / len(ys) if ys else None) for group, ys in zip(groups, known, strict=True)]


def _runs(points: list[tuple[float, float | None]]) -> list[list[tuple[float, float]]]:
    """The pieces of a line between its gaps."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is None:
            runs.append([])
        else:
            runs[-1].append((x, y))
    return [run for run in runs if run]


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """About four round numbers, the first at or below ``low``, the last at or below ``high``.

    With ``whole``, whole numbers, all of them inside.
    """
    if high <= low:
        if whole:
            return [low]
        pad = abs(high) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    if whole:
        step = max(1.0, round(step))
    first = math.ceil(low / step) if whole else math.floor(low / step)
    return [step * index for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _tick(value: float, ticks: Sequence[float]) -> str:
    """``value`` with as many digits as tell it from its neighbours."""
    gap = abs(ticks[1] - ticks[0]) if len(ticks) > 1 else abs(value) or 1.0
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if max(map(abs, ticks)) >= size:
            size = 1e3 if suffix == "k" else size
            return f"{value / size:.{max(0, -math.floor(math.log10(gap / size) + 1e-9))}f}{suffix}"
    return f"{value:.{max(0, -math.floor(math.log10(gap) + 1e-9))}f}"


@dataclass(frozen=True)
class _Bar:
    """A piece of a bar, in the colour number ``color``."""

    value: float
    color: int
    name: str


@dataclass(frozen=True)
class _Row:
    label: str
    bars: list[_Bar]
    text: str


def _bar_plot(rows: Sequence[_Row], title: str) -> Markup:
    """An SVG of horizontal bars, one a row, each of pieces end to end."""
    longest = max((sum(bar.value for bar in row.bars) for row in rows), default=0.0)
    if longest <= 0:
        return Markup()
    shown = rows[:_MAX_ROWS]
    left, width, pitch, top = 96, _WIDTH - 96 - 8, 38, 30
    drawn = []
    for index, row in enumerate(shown):
        x, pieces = float(left), []
        for bar in row.bars:
            length = width * bar.value / longest
            pieces.append((round(x, 1), round(length, 1), bar.color % _COLORS, f"{bar.name}: {bar.value:.3g}"))
            x += length
        drawn.append({"y": top + index * pitch, "label": row.label, "text": row.text, "pieces": pieces})
    more = f"{len(rows) - len(shown)} more rows are in report.json" if len(rows) > len(shown) else ""
    return Markup(
        _BAR_PLOT.render(
            width=_WIDTH,
            height=top + len(shown) * pitch + (16 if more else 0),
            left=left,
            rows=drawn,
            title=title,
            more=more,
        )
    )


# ------------------------------------------------------------------------------------------------------------ templates

_ENVIRONMENT = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)

_TABLE = _ENVIRONMENT.from_string("""
<div class=wide><table class=stack>
<thead><tr>{% for heading in headings %}<th>{{ heading }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
<tr>{% for cell in row %}<td data-label="{{ headings[loop.index0] }}">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
""")

_VALUE = _ENVIRONMENT.from_string("""
{% macro show(value) %}
{% if value is mapping %}
<table class=pairs>
{% for key, item in value.items() %}
<tr><th>{{ key }}</th><td>{{ show(item) }}</td></tr>
{% endfor %}
</table>
{% elif value is iterable and value is not string %}
{% if value %}<ul>{% for item in value %}<li>{{ show(item) }}</li>{% endfor %}</ul>{% endif %}
{% elif value is none %}
<span class=muted>null</span>
{% else %}
{{ "%.4g" | format(value) if value is float else value }}
{% endif %}
{% endmacro %}
{{ show(value) }}
""")

_LINE_PLOT = _ENVIRONMENT.from_string("""
<svg viewBox="0 0 {{ width }} {{ height }}" role="img" aria-label="{{ label }}">
<text x="4" y="14" class="name">{{ y_label }}</text>
{% for y, text in y_ticks %}
<line x1="{{ left }}" x2="{{ right }}" y1="{{ y }}" y2="{{ y }}" class="grid"/>
<text x="{{ left - 6 }}" y="{{ y + 4 }}" class="end">{{ text }}</text>
{% endfor %}
{% for x, text in x_ticks %}
<text x="{{ x }}" y="{{ bottom + 17 }}" class="middle">{{ text }}</text>
{% endfor %}
<text x="{{ right }}" y="{{ bottom + 34 }}" class="end name">{{ x_label }}</text>
{% for line in lines %}
{% set color = loop.index0 %}
{% if lines|length > 1 %}
<text x="{{ right - 130 * loop.revindex0 }}" y="14" class="end fill{{ color }}">{{ line.name }}</text>
{% elif line.name != y_label %}
<text x="{{ right }}" y="14" class="end name">{{ line.name }}</text>
{% endif %}
{% for run in line.runs if run|length > 1 %}
<polyline class="stroke{{ color }}" points="{% for x, y in run %}{{ x }},{{ y }} {% endfor %}"/>
{% endfor %}
{% for x, y, text in line.points %}
<circle cx="{{ x }}" cy="{{ y }}" r="{{ line.radius }}" class="fill{{ color }}"><title>{{ text }}</title></circle>
{% endfor %}
{% endfor %}
</svg>
""")

_BAR_PLOT = _ENVIRONMENT.from_string("""
<svg viewBox="0 0 {{ width }} {{ height }}" role="img" aria-label="{{ title }}">
<text x="4" y="14" class="name">{{ title }}</text>
{% for row in rows %}
<text x="{{ left - 8 }}" y="{{ row.y + 11 }}" class="end">{{ row.label }}</text>
{% for x, length, color, text in row.pieces if length > 0 %}
<rect x="{{ x }}" y="{{ row.y }}" width="{{ length }}" height="14" class="fill{{ color }}">
<title>{{ text }}</title></rect>
{% endfor %}
<text x="{{ left }}" y="{{ row.y + 27 }}" class="small">{{ row.text }}</text>
{% endfor %}
{% if more %}<text x="{{ left }}" y="{{ height - 4 }}" class="small">{{ more }}</text>{% endif %}
</svg>
""")

_PAGE = _ENVIRONMENT.from_string("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}: {{ report.status }}</title>
<style>
:root {
  --page: #fff; --card: #f5f7f9; --text: #1c2127; --muted: #5c6670; --rule: #d9dee3;
  --good: #1a7f37; --bad: #c62828; --busy: #9a6700;
  --c0: #2166c2; --c1: #c2571a; --c2: #1f8a5f; --c3: #a9c4e8;
  --c4: #8a4fbf; --c5: #b58900; --c6: #5f7f95; --c7: #c04a86;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14181d; --card: #1d232a; --text: #e3e7eb; --muted: #9aa5b0; --rule: #333c46;
    --good: #57c773; --bad: #ff8a80; --busy: #e0b050;
    --c0: #6ba7f5; --c1: #f09a5b; --c2: #5cc79a; --c3: #3b5a80;
    --c4: #b98ae6; --c5: #dcb845; --c6: #8fb0c7; --c7: #e887b8;
  }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1040px; padding: 1rem; background: var(--page); color: var(--text);
       font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.2rem; margin: 2rem 0 .75rem; padding-top: 1rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.25rem 0 .5rem; }
p { margin: .25rem 0; }
code, pre { font: .85em/1.45 ui-monospace, monospace; }
code, pre, .pairs td { overflow-wrap: anywhere; }
pre { margin: .35rem 0 0; padding: .5rem; background: var(--card); border-radius: 4px; white-space: pre-wrap; }
mark { background: none; color: var(--good); }
summary { cursor: pointer; }
.muted, .small { color: var(--muted); fill: var(--muted); }
.status { font-weight: 600; }
.completed { color: var(--good); } .failed { color: var(--bad); } .running, .interrupted { color: var(--busy); }
.error { border-left: 3px solid var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: .6rem; margin: 1rem 0; }
.tile { background: var(--card); border-radius: 6px; padding: .6rem .75rem; }
.tile b { display: block; font-size: 1.3rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tile span { display: block; font-size: .82rem; line-height: 1.35; color: var(--muted); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 1rem;
         align-items: start; }
svg { width: 100%; max-width: 640px; height: auto; font: 12px system-ui, sans-serif; }
svg text { fill: var(--text); } svg text.name, svg text.small { fill: var(--muted); } svg .small { font-size: 11px; }
.end { text-anchor: end; } .middle { text-anchor: middle; }
.grid { stroke: var(--rule); }
polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
{% for color in range(8) %}
.stroke{{ color }} { stroke: var(--c{{ color }}); } svg .fill{{ color }} { fill: var(--c{{ color }}); }
{% endfor %}
.shade { display: block; padding: 0 .4rem;
         background: color-mix(in srgb, var(--c3) var(--share), transparent); }
.swatch { display: inline-block; width: .8em; height: .8em; margin-right: .5em; }
.place { width: 21rem; max-width: 100%; } /* paths break anywhere, so their column would be as narrow as it can */
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--rule); }
th { font-weight: 600; font-size: .9rem; } .pairs th { font-weight: 400; color: var(--muted); min-width: 8rem; }
.pairs .pairs th { min-width: 0; } td > .pairs tr:last-child > * { border-bottom: 0; }
ul { margin: 0; padding-left: 1.1rem; }
@media (max-width: 640px) {
  .stack, .stack tbody, .stack tr, .stack td { display: block; }
  .stack thead { display: none; }
  .stack tr { padding: .4rem 0; border-bottom: 1px solid var(--rule); }
  .stack td { border: 0; padding: .1rem 0; }
  .stack td::before { content: attr(data-label) " "; color: var(--muted); font-size: .85rem; }
}
</style>
</head>
<body>
<header>
<h1>{{ title }}</h1>
<p><span class="status {{ report.status }}">{{ report.status }}</span> <span class=muted>{{ when }}</span></p>
{% if report.error %}<pre class=error>{{ report.error }}</pre>{% endif %}
</header>
<main>
{% if tiles %}
<div class=tiles>
{% for label, figure, remark in tiles %}
<div class=tile><span>{{ label }}</span><b>{{ figure }}</b>{% if remark %}<span>{{ remark }}</span>{% endif %}</div>
{% endfor %}
</div>
{% endif %}
{% for part in parts %}
<section>
<h2>{{ part.title }}</h2>
{{ part.body }}
</section>
{% endfor %}
</main>
</body>
</html>
""")
