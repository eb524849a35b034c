"""What torch.compile did, frame by frame: the one place that reads torch's private records of it.

torch publishes no interface that says which function was compiled, on whose behalf and why tracing stopped, so these
private names are used. They are looked up when a :class:`CompileLog` starts, never at import, and each has a test:

- ``torch._dynamo.callback.callback_handler``: calls back before and after each compilation with its ``compile_id``; in
  between, the interpreter's stack says whose code it is. ``torch._dynamo.reset()`` drops the callbacks.
- ``torch._dynamo.utils.get_compilation_metrics``: a row for each compilation, in a ring of 64: time, what made it
  necessary, what made it fail, cache hits.
- ``torch._dynamo.utils.graph_break_reasons``: reason and user's stack of each graph break that tracing resumed after.
- ``torch._dynamo.eval_frame._debug_get_cache_entry_list``: whether a function has compiled code.
- ``nn.Module._compiled_call_impl``: set by ``nn.Module.compile``.

Nothing here runs between compilations, so that it costs no time where nothing is compiled.
"""

from __future__ import annotations

import inspect
import linecache
import re
import sysconfig
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any, Generic, TypeVar

import torch
from torch import nn

C = TypeVar("C")

_NAMES = {
    "handler": ("torch._dynamo.callback", "callback_handler"),
    "arguments": ("torch._dynamo.callback", "CallbackArgs"),
    "row_type": ("torch._dynamo.utils", "CompilationMetrics"),
    "rows": ("torch._dynamo.utils", "get_compilation_metrics"),
    "break_reasons": ("torch._dynamo.utils", "graph_break_reasons"),
    "cache_entries": ("torch._dynamo.eval_frame", "_debug_get_cache_entry_list"),
    "wrapper": ("torch._dynamo", "OptimizedModule"),
}
_FIELDS = {
    "handler": {"start_callbacks", "end_callbacks"},
    "arguments": {"callback_trigger", "compile_id"},
    "row_type": {
        "compile_id", "co_name", "co_filename", "co_firstlineno", "is_forward", "is_runtime", "duration_us",
        "graph_op_count", "recompile_reason", "fail_type", "fail_reason", "fail_user_frame_filename",
        "fail_user_frame_lineno", "inductor_fx_local_cache_hit_count", "inductor_fx_local_cache_miss_count",
        "inductor_fx_remote_cache_hit_count", "inductor_fx_remote_cache_miss_count",
    },
}  # fmt: skip
# Methods of a LightningModule through which other code is called: the optimizer's, the data module's.
_RELAYS = {"optimizer_step", "_apply_batch_transfer_handler", "_call_batch_hook"}
_GUARD_ID = re.compile(r"^[!\d/]+: ")  # which of the compiled versions the guard belongs to
_GUARD_LINE = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')


@dataclass(frozen=True)
class Line:
    """A line of Python: ``file``, ``line`` from 1 (0: unknown) and the ``function`` it is in."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}" if self.file else "an unknown place"

    @property
    def code(self) -> str:
        """The source text, stripped; empty if it cannot be read."""
        return linecache.getline(self.file, self.line).strip()


_UNKNOWN = Line("", 0, "")


@dataclass(frozen=True)
class Break:
    """Where and why tracing stopped.

    Attributes:
        reason: torch's text, its first line a headline.
        stack: frames from the compiled function (first) down to where tracing stopped (last); at least one.
    """

    reason: str
    stack: tuple[Line, ...]

    @property
    def place(self) -> Line:
        """The innermost line outside of torch and Python's own library, where there is one."""
        theirs = (line for line in reversed(self.stack) if not _is_library(line.file))
        return next(theirs, self.stack[-1])


@dataclass(frozen=True)
class Compilation(Generic[C]):
    """One attempt of torch.compile at one function, or at the backward of a graph it had traced before.

    Attributes:
        where: what the log's ``where()`` said when it began.
        region: qualified name of the innermost module of the log's root whose call led to it, ``""`` for the root;
            ``None``: other code than the root's.
        function: the compiled function, at its ``def``.
        in_backward: compiled while the backward ran: a graph's backward, or what the backward recomputes.
        has_graph: a new graph of at least one operation was traced. A graph and its backward count as one.
        seconds: wall time on the compiling thread.
        breaks: breaks found, those after which the function is left to Python altogether included. A break inside a
            called function counts here, and again if torch then compiles that function by itself.
        recompile_reason: the guard that failed; ``None`` for the first compilation of a function.
        recompile_line: the line that installed this guard if torch says it, else ``function``.
        cache_hits, cache_misses: Inductor graphs found, or not found, in its caches.
    """

    where: C
    region: str | None
    function: Line
    in_backward: bool
    has_graph: bool
    seconds: float
    breaks: tuple[Break, ...]
    recompile_reason: str | None
    recompile_line: Line
    cache_hits: int
    cache_misses: int


@dataclass
class _Begun(Generic[C]):
    """What is known when a compilation begins; torch's row comes after its end."""

    where: C
    region: str | None
    in_backward: bool
    reasons_before: int
    breaks: list[Break] = field(default_factory=list)


class CompileLog(Generic[C]):
    """Records what is compiled between :meth:`start` and :meth:`stop`, and which of it ``root`` caused.

    A compilation is the root's if a call of one of its modules, or one of its methods, is on the interpreter's stack; a
    backward belongs where its forward did. The method ``optimizer_step`` does not count: an optimizer that compiles
    itself, and what runs in its closure besides the model, are not the model; nor do the methods by which Lightning
    calls a data module's hooks.

    Args:
        root: the module whose compilations are told apart from others; modules may be added later.
        where: called when a compilation begins; becomes :attr:`Compilation.where`.

    Attributes:
        in_backward: to be set by the user while a backward runs: autograd's threads have no Python stack to look at.
    """

    def __init__(self, root: nn.Module, where: Callable[[], C]) -> None:
        self.in_backward = False
        self._root = root
        self._where = where
        self._root_methods = set(_methods(type(root)))
        self._torch: SimpleNamespace | None = None
        self._lock = threading.RLock()  # autograd compiles on threads of its own
        self._last_row: object = None
        self._begun: dict[str, _Begun[C]] = {}
        # By frame id: torch numbers compilations of the same function "frame id/count".
        self._frames: dict[str, tuple[str | None, Line]] = {}
        self._done: list[Compilation[C]] = []

    def start(self) -> None:
        """Begin to record.

        Raises:
            RuntimeError: if this version of torch does not have the private names listed above.
        """
        self._torch = _internals()
        rows = self._torch.rows()
        self._last_row = rows[-1] if rows else None
        self._register(self._torch.handler)

    def stop(self) -> None:
        """Stop recording; what was recorded can still be taken."""
        if self._torch is None:
            return
        self._collect(self._torch)
        handler, self._torch = self._torch.handler, None
        for callbacks, ours in ((handler.start_callbacks, self._on_start), (handler.end_callbacks, self._on_end)):
            if ours in callbacks:
                callbacks.remove(ours)

    def take(self) -> list[Compilation[C]]:
        """What was compiled since the last call, in order of completion. Costs a microsecond or two if nothing was."""
        if self._torch is not None:
            self._collect(self._torch)
            self._register(self._torch.handler)
        if not self._done:
            return []
        with self._lock:
            done, self._done = self._done, []
        return done

    def _register(self, handler: Any) -> None:
        # Not once and for all: torch._dynamo.reset() clears the lists.
        if self._on_start not in handler.start_callbacks:
            handler.start_callbacks.append(self._on_start)
        if self._on_end not in handler.end_callbacks:
            handler.end_callbacks.append(self._on_end)

    def _on_start(self, arguments: Any) -> None:
        if self._torch is None:
            return
        with self._lock:
            self._collect(self._torch)  # before the ring overwrites its rows, and before a backward reuses its id
            frame = self._frames.get(_frame_id(arguments.compile_id)) if _is_backward(arguments) else None
            self._begun[arguments.compile_id] = _Begun(
                self._where(),
                frame[0] if frame else self._region_on_stack(),
                self.in_backward,
                len(self._torch.break_reasons),
            )

    def _on_end(self, arguments: Any) -> None:
        if self._torch is None or (begun := self._begun.get(arguments.compile_id)) is None:
            return
        for reason in self._torch.break_reasons[begun.reasons_before :]:
            stack = tuple(Line(frame.filename, frame.lineno or 0, frame.name) for frame in reason.user_stack)
            found = Break(_break_reason(reason.reason), stack or (_UNKNOWN,))
            if found not in begun.breaks:  # torch may trace a function several times until it succeeds
                begun.breaks.append(found)

    def _region_on_stack(self) -> str | None:
        names = {id(module): name for name, module in self._root.named_modules()}
        frame = inspect.currentframe()
        calls_on_stack = False
        while frame is not None:
            if frame.f_code is nn.Module.__call__.__code__:
                calls_on_stack = True
                if (name := names.get(id(frame.f_locals["self"]))) is not None:
                    return _without_wrapper(name)
            elif _key(frame.f_code) in self._root_methods:
                return ""
            frame = frame.f_back
        on_autograd_thread = self.in_backward and threading.current_thread() is not threading.main_thread()
        return "" if on_autograd_thread and not calls_on_stack else None

    def _collect(self, internals: SimpleNamespace) -> None:
        """Turn torch's new rows into compilations."""
        if not (rows := internals.rows()) or rows[-1] is self._last_row:
            return
        with self._lock:
            rows = internals.rows()
            known = next((index + 1 for index, row in enumerate(rows) if row is self._last_row), 0)
            for row in rows[known:]:
                self._done.append(self._compilation(row))
                self._last_row = row

    def _compilation(self, row: Any) -> Compilation[C]:
        compile_id = row.compile_id or ""
        region, function = self._frames.get(_frame_id(compile_id), (None, _UNKNOWN))
        begun = self._begun.pop(compile_id, None)
        if begun is not None:
            region = begun.region
        if row.co_name is not None:  # a function, not a backward
            function = Line(row.co_filename, row.co_firstlineno, row.co_name)
            if region is None and (row.co_filename, row.co_firstlineno, row.co_name) in self._root_methods:
                region = ""  # the root's own method was compiled: it is not yet on the stack itself
        self._frames[_frame_id(compile_id)] = region, function

        breaks = list(begun.breaks) if begun else []
        if row.fail_type is not None:
            # The function cannot be traced even in parts, or not any more: it runs in Python, or raises (fullgraph).
            file, line = row.fail_user_frame_filename, row.fail_user_frame_lineno
            place = Line(file, line or 0, function.function) if file else function
            breaks.append(Break(_fail_reason(row), (place,)))
        recompile_line = function
        if found := list(_GUARD_LINE.finditer(row.recompile_reason or "")):
            recompile_line = Line(found[-1]["file"], int(found[-1]["line"]), found[-1]["function"])
        return Compilation(
            where=begun.where if begun else self._where(),
            region=region,
            function=function,
            in_backward=row.is_forward is False or (begun.in_backward if begun else self.in_backward),
            has_graph=bool(row.graph_op_count),
            seconds=(row.duration_us or 0) / 1e6,
            breaks=tuple(breaks),
            recompile_reason=_GUARD_ID.sub("", row.recompile_reason).strip() if row.recompile_reason else None,
            recompile_line=recompile_line,
            cache_hits=_sum(row.inductor_fx_local_cache_hit_count, row.inductor_fx_remote_cache_hit_count),
            cache_misses=_sum(row.inductor_fx_local_cache_miss_count, row.inductor_fx_remote_cache_miss_count),
        )


def compiled_modules(root: nn.Module) -> dict[str, nn.Module]:
    """Modules of ``root`` that were compiled, with ``module.compile()`` or ``torch.compile(module)``, by name."""
    wrapper = _internals().wrapper
    return {
        _without_wrapper(name): module._orig_mod if isinstance(module, wrapper) else module
        for name, module in root.named_modules()
        if isinstance(module, wrapper) or module._compiled_call_impl is not None
    }


def has_compiled_code(module: nn.Module) -> bool:
    """Whether torch.compile holds code for the ``forward`` of ``module``, which may stem from an equal module.

    For one of torch's own modules, such as ``nn.Sequential``, which are passed over: of any module in it.
    """
    cache_entries = _internals().cache_entries
    parts = module.modules() if _is_torchs(module) else [module]
    return any(cache_entries(code) for part in parts for code in _codes(part.forward))


def forward_lines(module: nn.Module) -> set[Line]:
    """Where ``forward`` of ``module``, and what it wraps, is defined: as :attr:`Compilation.function` says it."""
    return {Line(*_key(code)) for code in _codes(module.forward)}


def why_skipped(module: nn.Module) -> str | None:
    """Why torch.compile passes over ``module`` in silence; ``None`` if there is no reason to be seen in it."""
    if "forward" in vars(module):
        return (
            "its forward was replaced on the instance, by something that torch.compile does not look into: override"
            " forward in a class instead"
        )
    if _is_torchs(module):
        return (
            "module.compile() passes over the code of torch's own modules: compile a module of yours that calls it, or"
            " use torch.compile(module)"
        )
    return None


def _is_torchs(module: nn.Module) -> bool:
    return type(module).forward.__module__.partition(".")[0] == "torch"


def _internals() -> SimpleNamespace:
    """torch's private names, checked."""
    found: dict[str, Any] = {}
    for name, (module, attribute) in _NAMES.items():
        try:
            found[name] = getattr(import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise RuntimeError(_moved(f"{module}.{attribute}")) from error
    for name, needed in _FIELDS.items():
        for missing in sorted(needed - {known.name for known in fields(found[name])}):
            raise RuntimeError(_moved(".".join([*_NAMES[name], missing])))
    if not hasattr(nn.Module, "_compiled_call_impl"):
        raise RuntimeError(_moved("torch.nn.Module._compiled_call_impl"))
    return SimpleNamespace(**found)


def _moved(name: str) -> str:
    return (
        f"torch {torch.__version__} has no {name}, which torch 2.11 to 2.13 had and from which compilations are read:"
        " leave CompileReport out, or use one of those versions"
    )


def _is_library(file: str) -> bool:
    in_python = file.startswith((sysconfig.get_path("stdlib"), "<")) and "-packages" not in file
    return in_python or Path(file).is_relative_to(Path(torch.__file__).parent)


def _is_backward(arguments: Any) -> bool:
    return bool(arguments.callback_trigger.name == "LAZY_BACKWARD")


def _frame_id(compile_id: str) -> str:
    return compile_id.rpartition("/")[0]


def _break_reason(text: str) -> str:
    # The one reason that torch gives only the name of its own function for.
    return f"Data-dependent branching ({text})" if text.startswith("generic_jump") else text


def _fail_reason(row: Any) -> str:
    reason = str(row.fail_reason or "no reason given")
    if row.fail_type.endswith("RecompileLimitHit") or "recompile limit" in reason:
        return f"{reason}\n  Guard that failed last: {row.recompile_reason}"
    return reason if row.fail_type == "Unsupported" else f"{row.fail_type}: {reason}"


def _sum(*counts: int | None) -> int:
    return sum(count or 0 for count in counts)


def _without_wrapper(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _key(code: CodeType) -> tuple[str, int, str]:
    # Not the object: compiled code is another one, of the same name and lines.
    return code.co_filename, code.co_firstlineno, code.co_name


def _methods(cls: type) -> Iterator[tuple[str, int, str]]:
    for base in cls.__mro__:
        if base in (nn.Module, object):
            continue
        for name, value in vars(base).items():
            function = inspect.unwrap(value) if callable(value) else None
            # A call of forward is seen as the call of its module, which also says of which instance.
            if name != "forward" and name not in _RELAYS and inspect.isfunction(function):
                yield _key(function.__code__)


def _codes(function: Any) -> Iterator[CodeType]:
    """Code of a function and of those it wraps."""
    while function is not None:
        if (code := getattr(function, "__code__", None)) is not None:
            yield code
        function = getattr(function, "__wrapped__", None)
