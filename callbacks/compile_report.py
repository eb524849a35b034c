"""What torch.compile did to a model in training: graphs, graph breaks, recompilations, and the lines that caused them.

In any Lightning project::

    import lightning.pytorch as pl
    from lightning_qlora.callbacks import CompileReport


    def train(module: pl.LightningModule, data: pl.LightningDataModule) -> None:
        report = CompileReport(max_graphs=5)  # stops at the first graph break, and at the sixth graph
        trainer = pl.Trainer(max_steps=100, callbacks=[report])
        trainer.fit(module, data)  # prints a table at the end
        print(report.report_section()["compile_s"], "s spent compiling")
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from typing_extensions import override

from .dynamo import Compilation, CompileLog, Line, compiled_modules, forward_lines, has_compiled_code, why_skipped
from .measure import gather

K = TypeVar("K")
_BROKEN = "a graph break left its code to Python"
_NOT_CALLED = "it was not called, or its code holds nothing that could be compiled"


class CompileReportError(RuntimeError):
    """The model compiled otherwise than :class:`CompileReport` was told to allow; the text names lines and reasons."""


class CompileCounts(TypedDict):
    """Figures of some compilations.

    ============ ==== ======================================================================================
    field        unit meaning
    ============ ==== ======================================================================================
    graphs       --   graphs traced; a graph and its backward count as one
    graph_breaks --   times that tracing stopped, also those that left a function to Python altogether; one inside a
                      called function counts again if torch then compiles that function by itself
    recompiles   --   compilations of a function that had been compiled before, because a guard failed
    compile_s    s    wall time spent compiling, forward and backward, autotuning included
    cache_hits   --   Inductor graphs taken from its cache; stays 0 with backends that have none
    cache_misses --   Inductor graphs that were not in it
    ============ ==== ======================================================================================
    """

    graphs: int
    graph_breaks: int
    recompiles: int
    compile_s: float
    cache_hits: int
    cache_misses: int


class CompileStep(CompileCounts):
    """What one step compiled.

    ``stage``: ``train``, ``sanity_check``, ``validate``, ``test`` or ``predict``. ``step``: in training the optimizer
    step being done, the first being 1; otherwise how many have been done.
    """

    stage: str
    step: int


class CompileRegion(CompileCounts):
    """``region``: qualified name of a module; the innermost one whose call led to the compilation."""

    region: str


class CompileSource(CompileCounts):
    """``source``: the compiled function, as ``file:line in function``."""

    source: str


class CompileRank(CompileCounts):
    """``rank``: global rank."""

    rank: int


class CompileIncident(TypedDict):
    """A graph break or a recompilation.

    ======== ===================================================================================================
    field    meaning
    ======== ===================================================================================================
    region   as in :class:`CompileRegion`
    stage    as in :class:`CompileStep`
    step     as in :class:`CompileStep`
    phase    ``forward`` or ``backward``: what ran when it happened
    reason   torch's text; its first line is a headline
    file     of a break: the innermost line outside of torch and Python's own library. Of a recompilation: the line
             whose guard failed if torch says it, else the ``def`` of the function
    line     from 1; 0 if not known
    function that contains the line
    code     text of the line, empty if it cannot be read
    stack    of a break, the frames from the compiled function down to where tracing stopped, as
             ``file:line in function``; of a recompilation, empty
    ======== ===================================================================================================
    """

    region: str
    stage: str
    step: int
    phase: str
    reason: str
    file: str
    line: int
    function: str
    code: str
    stack: list[str]


class UncompiledModule(TypedDict):
    """A module that was compiled without any graph coming of it: its qualified name ``region``, and the ``reason``."""

    region: str
    reason: str


class CompileSection(CompileCounts):
    """The section ``compile`` of a report: what one process compiled since training began in it.

    A resumed run compiles anew; figures of earlier processes are not in it. All of it is about the rank that has most
    breaks, then recompilations, graphs and seconds; only ``ranks`` is about all.

    ================ ==============================================================================================
    field            meaning
    ================ ==============================================================================================
    (counts)         of the model: see :class:`CompileCounts`
    rank             whose figures these are
    compiled_modules how many modules ``module.compile()`` or ``torch.compile(module)`` was called on
    limits           the arguments ``fail_on_graph_break``, ``max_graphs`` and ``max_recompiles``
    steps            the steps in which the model compiled something, in order
    regions          modules that compiled something, in order; equal modules share the graph of the first
    breaks           every graph break of the model
    recompilations   every recompilation of the model
    uncompiled       compiled modules that never got a graph
    elsewhere        what other code compiled, by function: callbacks, data loading, optimizers. In no other field
    ranks            the counts of each rank, in order
    ================ ==============================================================================================
    """

    rank: int
    compiled_modules: int
    limits: dict[str, bool | int | None]
    steps: list[CompileStep]
    regions: list[CompileRegion]
    breaks: list[CompileIncident]
    recompilations: list[CompileIncident]
    uncompiled: list[UncompiledModule]
    elsewhere: list[CompileSource]
    ranks: list[CompileRank]


class _Moment(NamedTuple):
    stage: str
    step: int


class CompileReport(Callback):
    """Counts what torch.compile does for the model, and stops the run when it is not what was asked for.

    Works with any way of compiling: ``module.compile()``, ``torch.compile(module)``, compiled functions, in forward,
    backward, validation, and after a change of shape. Compilations by other code are listed apart and never stop a
    run. After each forward and backward it looks whether torch compiled anything, a microsecond or two if not.

    Each rank judges itself: a break on one rank alone ends that rank, as any exception would.

    Args:
        fail_on_graph_break: raise at the first graph break of the model, and after the first batch if a compiled module
            is one that torch.compile passes over in silence. Otherwise both are only reported.
        max_graphs: graphs that the model may have, validation included; ``None``: any number.
        max_recompiles: how often its functions may be compiled again; ``None``: any number.

    Raises:
        ValueError: if a limit is out of range.
        RuntimeError: at setup, if this version of torch does not tell what it compiles.
        CompileReportError: in training, as said above.
    """

    report_key = "compile"

    def __init__(
        self, fail_on_graph_break: bool = True, max_graphs: int | None = None, max_recompiles: int | None = None
    ) -> None:
        super().__init__()
        if max_graphs is not None and max_graphs < 1:
            raise ValueError(f"max_graphs is {max_graphs}, but a compiled model has 1 or more: pass that, or None")
        if max_recompiles is not None and max_recompiles < 0:
            raise ValueError(f"max_recompiles is {max_recompiles}, but it counts: pass 0 or more, or None")
        self.fail_on_graph_break = fail_on_graph_break
        self.max_graphs = max_graphs
        self.max_recompiles = max_recompiles

        self._log: CompileLog[_Moment] | None = None
        self._module: pl.LightningModule | None = None
        self._compilations: list[Compilation[_Moment]] = []
        self._others: list[Compilation[_Moment]] = []
        self._rank = 0
        self._checked_modules = False
        self._section: CompileSection | None = None

    def report_section(self) -> CompileSection | None:
        """What was compiled so far, during a run by this rank alone; ``None`` before the first run."""
        if self._section is not None:
            return self._section
        if self._module is None:
            return None
        self._take()
        return self._local_section(self._module)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._stop()
        self._compilations, self._others, self._section = [], [], None
        self._checked_modules = False
        self._rank = trainer.global_rank
        self._module = pl_module
        self._log = CompileLog(pl_module, lambda: _moment(trainer))
        self._log.start()

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self._check(pl_module)
        if self._log is not None:
            self._log.in_backward = True

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._log is not None:
            self._log.in_backward = False
        self._check(pl_module)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._check(pl_module)
        if not self._checked_modules:
            self._checked_modules = True
            self._check_modules(pl_module)

    @override
    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any) -> None:
        self._check(pl_module)

    @override
    def on_test_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any) -> None:
        self._check(pl_module)

    @override
    def on_predict_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any) -> None:
        self._check(pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._finish(trainer, pl_module)

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish(trainer, pl_module)

    @override
    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish(trainer, pl_module)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._log is not None:
            self._log.stop()
            self._take()
            self._log = None

    def _take(self) -> bool:
        """Sort what was compiled since the last call; says whether there was anything of the model's."""
        if self._log is None or not (compilations := self._log.take()):
            return False
        ours = [compilation for compilation in compilations if compilation.region is not None]
        self._compilations += ours
        self._others += [compilation for compilation in compilations if compilation.region is None]
        return bool(ours)

    def _check(self, root: pl.LightningModule) -> None:
        if not self._take():
            return
        counts = _counts(self._compilations)
        if self.fail_on_graph_break and counts["graph_breaks"]:
            raise CompileReportError(
                f"torch.compile broke the model's graph:\n{_listing(_breaks(root, self._compilations))}\nChange those"
                " lines, or pass CompileReport(fail_on_graph_break=False) to have breaks only reported."
            )
        for limit, name, found in (
            (self.max_graphs, "max_graphs", counts["graphs"]),
            (self.max_recompiles, "max_recompiles", counts["recompiles"]),
        ):
            if limit is not None and found > limit:
                raise CompileReportError(
                    f"torch.compile made {counts['graphs']} graphs of the model and recompiled {counts['recompiles']}"
                    f" times, but {name} is {limit}. What was recompiled, and why:\n"
                    f"{_listing(_recompilations(root, self._compilations)) or '  nothing'}\nMark as dynamic what"
                    f" varies between calls, or raise {name}."
                )

    def _check_modules(self, root: pl.LightningModule) -> None:
        skipped = {name: why for name, module in self._without_graph(root) if (why := why_skipped(module))}
        if self.fail_on_graph_break and skipped:
            lines = "\n".join(f"  {_display(root, name)}: {why}" for name, why in skipped.items())
            raise CompileReportError(
                f"torch.compile did not compile these modules, though it was called on them:\n{lines}\nPass"
                " CompileReport(fail_on_graph_break=False) to have this only reported."
            )

    def _without_graph(self, root: pl.LightningModule) -> Iterator[tuple[str, nn.Module]]:
        """Compiled modules that no graph came of, with their names."""
        compiled = compiled_modules(root)
        regions = {item.region for item in self._compilations if item.has_graph and item.region is not None}
        for name, module in compiled.items():
            if any(_is_in(region, name) for region in regions):
                continue
            if any(name != other and _is_in(name, other) for other in compiled):
                continue  # traced as a part of the module around it, if that is
            if not has_compiled_code(module):  # perhaps of an earlier fit
                yield name, module

    def _why_no_graph(self, module: nn.Module) -> str:
        broken = {item.function for item in self._compilations if item.breaks}
        return why_skipped(module) or (_NOT_CALLED if broken.isdisjoint(forward_lines(module)) else _BROKEN)

    def _local_section(self, root: pl.LightningModule) -> CompileSection:
        counts = _counts(self._compilations)
        return CompileSection(
            **counts,
            rank=self._rank,
            # Of a LightningModule, torch.compile's wrapper is taken off by Lightning, which leaves this mark.
            compiled_modules=len(compiled_modules(root)) + (getattr(root, "_compiler_ctx", None) is not None),
            limits={
                "fail_on_graph_break": self.fail_on_graph_break,
                "max_graphs": self.max_graphs,
                "max_recompiles": self.max_recompiles,
            },
            steps=[
                CompileStep(stage=moment.stage, step=moment.step, **_counts(items))
                for moment, items in _grouped(self._compilations, lambda item: item.where)
            ],
            regions=[
                CompileRegion(region=_display(root, region), **_counts(items))
                for region, items in _grouped(self._compilations, lambda item: item.region)
            ],
            breaks=_breaks(root, self._compilations),
            recompilations=_recompilations(root, self._compilations),
            uncompiled=[
                UncompiledModule(region=_display(root, name), reason=self._why_no_graph(module))
                for name, module in self._without_graph(root)
            ],
            elsewhere=[
                CompileSource(source=source, **_counts(items))
                for source, items in _grouped(self._others, lambda item: str(item.function))
            ],
            ranks=[CompileRank(rank=self._rank, **counts)],
        )

    def _finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._log is None:
            return
        self._check(pl_module)
        self._stop()
        sections = gather(self._local_section(pl_module))
        worst = max(sections, key=lambda it: (it["graph_breaks"], it["recompiles"], it["graphs"], it["compile_s"]))
        self._section = {**worst, "ranks": [rank for section in sections for rank in section["ranks"]]}
        if worst["uncompiled"]:
            names = "; ".join(f"{item['region']}: {item['reason']}" for item in worst["uncompiled"])
            rank_zero_warn(f"torch.compile was called on modules of which it made no graph. {names}.")
        if trainer.is_global_zero:
            console = Console()
            for table in _tables(self._section):
                console.print(table)


def _moment(trainer: pl.Trainer) -> _Moment:
    stage = trainer.state.stage or RunningStage.TRAINING
    return _Moment(stage.value, trainer.global_step + (stage == RunningStage.TRAINING))


def _counts(compilations: Iterable[Compilation[_Moment]]) -> CompileCounts:
    items = list(compilations)
    return CompileCounts(
        graphs=sum(item.has_graph for item in items),
        graph_breaks=sum(len(item.breaks) for item in items),
        recompiles=sum(item.recompile_reason is not None for item in items),
        compile_s=sum(item.seconds for item in items),
        cache_hits=sum(item.cache_hits for item in items),
        cache_misses=sum(item.cache_misses for item in items),
    )


def _breaks(root: nn.Module, compilations: Iterable[Compilation[_Moment]]) -> list[CompileIncident]:
    return [
        _incident(root, item, found.reason, found.place, found.stack) for item in compilations for found in item.breaks
    ]


def _recompilations(root: nn.Module, compilations: Iterable[Compilation[_Moment]]) -> list[CompileIncident]:
    return [
        _incident(root, item, item.recompile_reason, item.recompile_line, ())
        for item in compilations
        if item.recompile_reason is not None
    ]


def _incident(
    root: nn.Module, item: Compilation[_Moment], reason: str, place: Line, stack: tuple[Line, ...]
) -> CompileIncident:
    return CompileIncident(
        region=_display(root, item.region),
        stage=item.where.stage,
        step=item.where.step,
        phase="backward" if item.in_backward else "forward",
        reason=reason,
        file=place.file,
        line=place.line,
        function=place.function,
        code=place.code,
        stack=[str(line) for line in stack],
    )


def _display(root: nn.Module, region: str | None) -> str:
    return region or type(root).__name__


def _is_in(name: str, outer: str) -> bool:
    """Whether the module ``name`` is ``outer`` or a part of it; the root is called ``""``."""
    return name == outer or not outer or name.startswith(f"{outer}.")


def _grouped(
    compilations: Iterable[Compilation[_Moment]], key: Callable[[Compilation[_Moment]], K]
) -> Iterable[tuple[K, list[Compilation[_Moment]]]]:
    groups: dict[K, list[Compilation[_Moment]]] = {}
    for item in compilations:
        groups.setdefault(key(item), []).append(item)
    return groups.items()


def _headline(incident: CompileIncident) -> str:
    return incident["reason"].partition("\n")[0].partition("  #")[0].strip()


def _listing(incidents: Iterable[CompileIncident]) -> str:
    lines: list[str] = []
    for item in incidents:
        place = Line(item["file"], item["line"], item["function"])
        reason = item["reason"].strip().replace("\n", "\n      ")
        lines.append(
            f"  {item['region']}, {item['phase']} of {item['stage']} step {item['step']}, {place}"
            f"\n    {item['code']}\n      {reason}"
        )
        if len(item["stack"]) > 1:
            lines.append("\n        ".join(["      Reached through, outermost first:", *item["stack"]]))
    return "\n".join(lines)


def _tables(section: CompileSection) -> list[Table]:
    summary = Table("", "value", title="torch.compile", title_justify="left")
    summary.add_row("compiled modules", str(section["compiled_modules"]))
    for name in ("graphs", "recompiles"):
        limit = section["limits"][f"max_{name}"]
        summary.add_row(name, f"{section[name]}" + ("" if limit is None else f" (at most {limit})"))
    summary.add_row("graph breaks", str(section["graph_breaks"]))
    summary.add_row("time compiling", f"{section['compile_s']:.1f} s")
    summary.add_row("graphs from Inductor's cache", f"{section['cache_hits']} ({section['cache_misses']} not in it)")
    if section["steps"]:
        last = section["steps"][-1]
        summary.add_row("last compiled in", f"{last['stage']} step {last['step']}")
    if len(section["ranks"]) > 1:
        summary.add_row("worst rank, shown here", str(section["rank"]))
    if section["elsewhere"]:
        graphs = sum(source["graphs"] for source in section["elsewhere"])
        summary.add_row("graphs of other code, not counted", str(graphs))
    tables = [summary]
    for title, incidents in (("Graph breaks", section["breaks"]), ("Recompilations", section["recompilations"])):
        if incidents:
            table = Table("step", "module", "line", "reason", title=title, title_justify="left")
            for item in incidents:
                place = f"{Path(item['file']).name}:{item['line']}"
                table.add_row(f"{item['stage']} {item['step']}", *map(escape, (item["region"], place, _headline(item))))
            tables.append(table)
    return tables
