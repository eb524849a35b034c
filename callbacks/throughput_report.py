"""How fast a run goes, what part of the device's arithmetic it uses, and what part of its time waits for data.

For any LightningModule::

    from lightning.pytorch import Trainer
    from lightning.pytorch.demos.boring_classes import BoringModel
    from lightning_qlora.callbacks import ThroughputReport

    throughput = ThroughputReport(flops="count", tokens_fn=lambda batch: batch.shape[0])
    trainer = Trainer(max_steps=8, callbacks=[throughput], logger=False, enable_progress_bar=False)
    trainer.fit(BoringModel())  # prints the table

    figures = throughput.report_section()
    print(figures["tokens_per_s"], figures["step_time_s"]["p95"], figures["mfu"], figures["data_wait_share"])
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple, Protocol, TypedDict, runtime_checkable

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import flop_registry
from typing_extensions import override

from .measure import (
    FETCH_BATCH,
    Count,
    Stopwatch,
    TimedSteps,
    TokensFn,
    count_tokens,
    gather,
    is_distributed,
    observe,
    plus,
    rounded,
    with_prefix,
)

FlopsFn = Callable[[Any], float]
_DTYPES = {"16": torch.float16, "bf16": torch.bfloat16, "32": torch.float32, "64": torch.float64}
_MAX_POINTS = 256


@runtime_checkable
class CountsFlops(Protocol):
    """A LightningModule that knows its own cost."""

    def flops_per_token(self, seq_len: int) -> float:
        """Model FLOPs of one token, forward and backward, in a batch of sequences of ``seq_len`` tokens.

        A multiplication and an addition are two. What is computed twice to save memory counts once. A frozen weight
        costs 4 a parameter (output, gradient of the input), a trained one 6 (gradient of the weight too).
        """


class ThroughputSection(TypedDict):
    """``report.json``'s section ``throughput``; *timed* steps are those after the warm-up, of this process.

    ===================== ================= =========================================================================
    field                 unit              meaning
    ===================== ================= =========================================================================
    warmup_steps          optimizer steps   how many first steps are not timed
    timed_steps           optimizer steps   how many were
    step_time_s           s                 ``p50`` and ``p95`` on rank 0; null without a timed step. Waiting for
                                            data and writing checkpoints is part of it, validation is not
    tokens_per_s          tokens / s        all ranks; null without a timed step or if tokens cannot be counted
    data_wait_share       --                of the timed steps' time, the part in which rank 0's host waited for the
                                            loader (0 to 1). The GPU may have had work queued meanwhile
    mfu                   --                model FLOPs of all ranks, over what their devices could have done at
                                            ``matmul_flops_per_s``; null: see ``mfu_note``
    model_flops_per_s     FLOPs / s         all ranks; null as ``mfu``
    mfu_note              --                how the FLOPs were counted, or why they are not known
    matmul_flops_per_s    FLOPs / s         measured rate of a large matrix product, one per rank; null as ``mfu``
    matmul_dtype          --                dtype of that product: the run's compute dtype; null as ``mfu``
    matmul_size           elements          rows and columns of its square matrices; null as ``mfu``, or if the rate
                                            was given
    steps                 optimizer steps   x of the following: last step of each point; at most 256 points, then
                                            each covers more steps
    steps_tokens_per_s    tokens / s        all ranks, over the steps of a point; null if not known
    steps_time_s          s                 mean time of an optimizer step of a point, rank 0
    ===================== ================= =========================================================================
    """

    warmup_steps: int
    timed_steps: int
    step_time_s: dict[str, float] | None
    tokens_per_s: float | None
    data_wait_share: float | None
    mfu: float | None
    model_flops_per_s: float | None
    mfu_note: str
    matmul_flops_per_s: list[float] | None
    matmul_dtype: str | None
    matmul_size: int | None
    steps: list[int]
    steps_tokens_per_s: list[float | None]
    steps_time_s: list[float]


@dataclass
class _Point:
    """Consecutive timed steps, the last of them ``step``."""

    step: int
    count: int
    seconds: float
    tokens: Count

    def __add__(self, later: "_Point") -> "_Point":
        tokens = plus(self.tokens, later.tokens)
        return _Point(later.step, self.count + later.count, self.seconds + later.seconds, tokens)


class _OfRank(NamedTuple):
    """What a rank counted: ``None`` where it cannot. ``rate`` is in FLOP/s; ``points`` are tokens between them."""

    tokens: int | None
    flops: float | None
    rate: float | None
    points: list[int | None]


class ThroughputReport(Callback):
    """Measures speed; prints a table when training ends, and is a section of :class:`RunReport`.

    Times are the host's and nothing waits for the device (see :class:`~lightning_qlora.callbacks.measure.StepMeter`);
    figures of the other ranks are gathered once, at the end. With one process the section is there from the start.

    **MFU** is model FLOPs per second over the rate of a matrix product, measured in ``setup`` (0.3 s, before the model
    is loaded) in the run's compute dtype, on all ranks at once, as the process is set up: TF32, clocks and number of
    threads included. Only tokens that ``tokens_fn`` counts are useful work, so padding lowers the MFU. FLOPs are, in
    this order:

    1. ``flops(batch)``, of one micro-batch on this rank, forward and backward;
    2. with ``flops="count"``, those of the first micro-batch's operators, by PyTorch's own formulas: what was executed,
       so with activation checkpointing it includes the recomputation. For other batches by the number of their tokens;
       for batches without ``input_ids``, the same for each. ``torch.compile``'s regions run eagerly for that
       micro-batch, which takes more time and memory than usual, so its step comes before the warm-up. A custom operator
       needs a formula (``torch.utils.flop_counter.register_flop_formula``), without one the result is null;
    3. the module's ``flops_per_token(seq_len)``, see :class:`CountsFlops`, times the tokens, with the width of
       ``input_ids`` as ``seq_len``; of packed rows, with the mean of their ``document_lengths``, weighted by tokens.

    Args:
        flops: a function, ``"count"``, or ``None``: ask the module.
        tokens_fn: tokens of a micro-batch on this rank, ``None`` if it cannot tell; default :func:`count_tokens`.
        warmup_steps: first optimizer steps that are not timed (compilation, autotuning, allocator growth).
        matmul_flops_per_s: a device's rate, if it is not to be measured.

    Raises:
        ValueError: if an argument is out of range.
    """

    report_key = "throughput"

    def __init__(
        self,
        *,
        flops: FlopsFn | Literal["count"] | None = None,
        tokens_fn: TokensFn | None = None,
        warmup_steps: int = 1,
        matmul_flops_per_s: float | None = None,
    ) -> None:
        super().__init__()
        if flops is not None and flops != "count" and not callable(flops):
            raise ValueError(f"flops is {flops!r}, but must be a function of a batch, 'count' or None")
        if matmul_flops_per_s is not None and not matmul_flops_per_s > 0:
            raise ValueError(f"matmul_flops_per_s is {matmul_flops_per_s}, but a device's rate is positive")
        self.flops = flops
        self.tokens_fn = tokens_fn or count_tokens
        self.matmul_flops_per_s = matmul_flops_per_s

        # The step in which FLOPs are counted compiles nothing yet: the warm-up comes after it.
        after = warmup_steps + (1 if flops == "count" and warmup_steps >= 0 else 0)
        self._steps = TimedSteps(self.tokens_fn, after)
        self._rate: MatmulRate | None = None
        self._note = ""
        self._flops_of: Callable[[Any], float | Tensor | None] | None = None
        self._flops: float | Tensor = 0.0
        self._step_flops: float | Tensor = 0.0
        self._counter: _CountFlops | None = None
        self._counting = ExitStack()
        self._fetch = Stopwatch()
        self._wait = 0.0
        self._forget: Callable[[], None] | None = None
        self._points: list[_Point] = []
        self._point_steps = 1
        self._section: ThroughputSection | None = None
        self._started = False

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != TrainerFn.FITTING:
            return
        self._flops_of = self._counter = self._rate = None
        if callable(self.flops):
            self._flops_of, self._note = self.flops, "FLOPs by the function passed as flops"
        elif self.flops == "count":
            self._counter = _CountFlops()
            self._note = "no micro-batch has ended, in which FLOPs could be counted"
        elif isinstance(pl_module, CountsFlops):
            self._flops_of = self._flops_by_module(pl_module)
            self._note = "FLOPs by the module's flops_per_token; recomputation and padding are not counted as work"
        else:
            self._note = (
                f"{type(pl_module).__name__} has no flops_per_token(seq_len): pass flops, a function or 'count'"
            )
        dtype = _DTYPES.get(str(trainer.precision).split("-")[0])
        if dtype is None:
            self._flops_of = self._counter = None
            self._note = f"precision {trainer.precision!r} does not tell the dtype of matrix products"
        elif self._flops_of is not None or self._counter is not None:
            # Now, because later its 3 matrices would add to the model's peak memory.
            self._rate = _matmul_rate(trainer.strategy.root_device, dtype, self.matmul_flops_per_s)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._points, self._point_steps, self._section = [], 1, None
        self._flops = self._step_flops = self._wait = 0.0
        self._fetch = Stopwatch()
        self._forget = observe(trainer, FETCH_BATCH, self._fetch.start, self._fetch.stop)
        self._started = True
        self._steps.start(trainer.global_step)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._counter is not None:
            # Dynamo compiles nothing under such a mode, and raises for what must be compiled in full.
            self._counting.enter_context(torch.compiler.set_stance("force_eager"))
            self._counting.enter_context(self._counter)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._counter is not None:
            self._counting.close()
            self._flops_of = self._flops_by_count(self._counter, batch)
            self._counter = None
        if self._flops_of is not None:
            flops = self._flops_of(batch)
            if flops is None:
                self._flops_of, self._note = None, "the batches do not tell their tokens and length: pass flops"
            else:
                self._step_flops = self._step_flops + flops
        step, is_timed = self._steps.update(batch, trainer.global_step)
        if step is None:
            return
        flops, self._step_flops = self._step_flops, 0.0
        waited = self._fetch.take()
        if is_timed:
            self._flops, self._wait = self._flops + flops, self._wait + waited
            self._add_point(_Point(trainer.global_step, step.count, step.seconds, step.tokens))

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._steps.pause()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._steps.resume()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._section = self._measure()
        if trainer.is_global_zero:
            Console().print(self.table())

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._section = self.report_section()
        self._stop()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._stop()

    def report_section(self) -> ThroughputSection | None:
        """What was measured so far; ``None`` while nothing is known."""
        if self._section is None and self._started and not is_distributed():
            # After a CUDA error nothing can be read from the device any more.
            with suppress(RuntimeError):
                return self._measure()
        return self._section

    def table(self) -> Table:
        """The figures for people."""
        section = self._section or self._measure()
        table = Table("", "", title="Throughput", title_justify="left", show_header=False)
        table.add_row("timed steps", f"{section['timed_steps']} (after {section['warmup_steps']} of warm-up)")
        if section["tokens_per_s"] is not None:
            table.add_row("tokens per second", rounded(section["tokens_per_s"]))
        if (times := section["step_time_s"]) is not None:
            table.add_row("step time", f"p50 {times['p50']:.3f} s, p95 {times['p95']:.3f} s")
        if section["data_wait_share"] is not None:
            table.add_row("waiting for data", f"{section['data_wait_share']:.1%}")
        if (rates := section["matmul_flops_per_s"]) is not None:
            dtype = str(section["matmul_dtype"])
            table.add_row("matrix products", f"{with_prefix(sum(rates) / len(rates))}FLOP/s a device, {dtype}")
        if section["mfu"] is not None:
            table.add_row("MFU", f"{section['mfu']:.1%} ({with_prefix(section['model_flops_per_s'] or 0)}FLOP/s)")
        elif section["mfu_note"]:
            table.add_row("MFU", f"unknown: {section['mfu_note']}")
        return table

    def _flops_by_module(self, module: CountsFlops) -> Callable[[Any], float | Tensor | None]:
        def flops(batch: Any) -> float | Tensor | None:
            tokens = self.tokens_fn(batch)
            ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
            if tokens is None or not isinstance(ids, Tensor):
                return None
            lengths = [length for row in batch.get("document_lengths") or [] for length in row]
            seq_len = sum(n * n for n in lengths) // sum(lengths) if lengths else ids.shape[-1]
            return _times(tokens, module.flops_per_token(seq_len))

        return flops

    def _flops_by_count(self, counter: "_CountFlops", batch: Any) -> Callable[[Any], float | Tensor | None] | None:
        """What batches cost, from the operators that ``counter`` saw for ``batch``."""
        if counter.unknown:
            names = ", ".join(sorted(counter.unknown))
            self._note = f"no FLOP formula for {names}: torch.utils.flop_counter.register_flop_formula adds one"
            rank_zero_warn(f"ThroughputReport finds {self._note}. The MFU will be null.")
            return None
        self._note = "FLOPs counted in the first micro-batch, with whatever it computed twice"
        counted, ids = float(counter.flops), batch.get("input_ids") if isinstance(batch, Mapping) else None
        if not isinstance(ids, Tensor):
            return lambda batch: counted
        per_token = counted / ids.numel()

        def flops(batch: Any) -> float | Tensor | None:
            tokens = self.tokens_fn(batch)
            return None if tokens is None else _times(tokens, per_token)

        return flops

    def _add_point(self, point: _Point) -> None:
        if self._points and self._points[-1].count < self._point_steps:
            self._points[-1] += point
            return
        self._points.append(point)
        if len(self._points) > _MAX_POINTS:
            self._point_steps *= 2
            pairs = range(0, len(self._points) - 1, 2)
            odd = self._points[len(self._points) & ~1 :]
            self._points = [self._points[index] + self._points[index + 1] for index in pairs] + odd

    def _measure(self) -> ThroughputSection:
        """The figures of all ranks (a collective if there are several)."""
        tokens, rate = self._steps.tokens, self._rate
        costs_known = self._flops_of is not None and rate is not None
        ranks = gather(
            _OfRank(
                tokens=None if tokens is None else int(tokens),
                flops=float(self._flops) if costs_known else None,
                rate=rate.flops_per_s if costs_known and rate else None,
                points=[None if point.tokens is None else int(point.tokens) for point in self._points],
            )
        )
        seconds = sum(self._steps.seconds)
        flops = [each.flops for each in ranks if each.flops is not None]
        rates = [each.rate for each in ranks if each.rate is not None]
        all_known = len(flops) == len(rates) == len(ranks) and seconds > 0
        points = [
            [tokens for tokens in of_ranks if tokens is not None]
            for of_ranks in zip(*(each.points for each in ranks), strict=True)
        ]
        return ThroughputSection(
            warmup_steps=self._steps.warmup_steps,
            timed_steps=len(self._steps.seconds),
            step_time_s=self._steps.step_time_s(),
            tokens_per_s=self._steps.tokens_per_s([each.tokens for each in ranks]),
            data_wait_share=self._wait / seconds if seconds > 0 else None,
            mfu=sum(flops) / seconds / sum(rates) if all_known else None,
            model_flops_per_s=sum(flops) / seconds if all_known else None,
            mfu_note=self._note,
            matmul_flops_per_s=rates if all_known else None,
            matmul_dtype=rate.dtype if all_known and rate else None,
            matmul_size=rate.size if all_known and rate else None,
            steps=[point.step for point in self._points],
            steps_tokens_per_s=[
                sum(tokens) / point.seconds if len(tokens) == len(ranks) and point.seconds > 0 else None
                for point, tokens in zip(self._points, points, strict=True)
            ],
            steps_time_s=[point.seconds / point.count for point in self._points],
        )

    def _stop(self) -> None:
        self._counting.close()
        self._counter = None
        self._started = False
        if self._forget is not None:
            self._forget()
            self._forget = None


# Operators of these move data or mark time. Words in the names of PyTorch's operators that multiply matrices.
_FREE_NAMESPACES = ("prim", "prims", "c10d", "_c10d_functional", "fsdp", "profiler")
_MATMULS = (
    "mm", "addmm", "bmm", "baddbmm", "addbmm", "conv", "convolution", "linear", "attention", "rnn", "lstm", "gru",
)  # fmt: skip


class _CountFlops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the FLOPs of PyTorch's formulas, like ``FlopCounterMode``, and notes the operators that should have one.

    ``FlopCounterMode`` takes an operator without a formula for free: those of other packages, and some of PyTorch's own
    (attention on CPU among them). It also hooks every module, of which there is no need here.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self.unknown: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        operator = getattr(func, "overloadpacket", func)
        # A tensor subclass (DTensor) has a shape of its own: what this device computes is not known from it.
        of = [kind.__name__ for kind in types if kind not in (Tensor, torch.nn.Parameter)]
        if (formula := flop_registry.get(operator)) is not None and not of:
            self.flops += formula(*args, **kwargs, out_val=result)
            return result
        namespace, _, name = str(operator).rpartition(".")
        multiplies = any(word in _MATMULS for word in name.split("_"))
        if multiplies or namespace not in ("aten", *_FREE_NAMESPACES):
            self.unknown.add(" of ".join([str(operator), *of]))
        return result


@dataclass(frozen=True)
class MatmulRate:
    """FLOPs per second of [size, size] @ [size, size] in ``dtype``; no ``size`` if the rate was given."""

    flops_per_s: float
    dtype: str
    size: int | None


def _matmul_rate(device: torch.device, dtype: torch.dtype, given: float | None) -> MatmulRate:
    name = str(dtype).removeprefix("torch.")
    if given is not None:
        return MatmulRate(given, name, None)
    # TF32 and the number of threads can be changed between two runs of a process.
    return _measure_matmul(device, dtype, torch.get_float32_matmul_precision(), torch.get_num_threads())


@cache
def _measure_matmul(device: torch.device, dtype: torch.dtype, float32_precision: str, threads: int) -> MatmulRate:
    # So large that launch and edges do not count: 4096 is 5 ms on a T4 and 0.2 ms on an H200, 1024 is 30 ms on 2 cores.
    size = 4096 if device.type == "cuda" else 1024
    left, right, out = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(3))
    names = {"mm": torch.mm, "left": left, "right": right, "out": out}
    timer = Timer("mm(left, right, out=out)", globals=names, num_threads=threads)  # it synchronises the device
    seconds = timer.blocked_autorange(min_run_time=0.3).median
    if device.type == "cuda":
        del left, right, out, names, timer
        torch.cuda.empty_cache()  # the run begins with the memory it would have had
    return MatmulRate(2 * size**3 / seconds, str(dtype).removeprefix("torch."), size)


def _times(tokens: int | Tensor, flops_per_token: float) -> float | Tensor:
    # In float32, the default for tensors, the sum of a long run would be rounded.
    return (tokens.double() if isinstance(tokens, Tensor) else tokens) * flops_per_token
