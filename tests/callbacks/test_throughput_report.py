"""Speed in exact figures of a clock that the tests move, and FLOPs of operators counted by hand."""

import inspect
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.tensor import DTensor, Replicate, init_device_mesh
from torch.utils.data import DataLoader

from lightning_qlora.callbacks import RunReport, ThroughputReport, ThroughputSection, load_report, throughput_report
from lightning_qlora.callbacks.throughput_report import _CountFlops, _matmul_rate, _Point
from tests.callbacks.conftest import Batches, Clock

Make = Callable[..., Any]
CPU = torch.device("cpu")


class SlowBatches(Batches):
    """Each batch of 10 tokens takes 0.5 s of the clock to load, the first of a run 30 s."""

    def __init__(self, clock: Clock, count: int) -> None:
        super().__init__([1.0] * count)
        self.clock = clock

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for index, batch in enumerate(super().__iter__()):
            self.clock.now += 0.5 if index else 30.0
            yield batch


def test_exact_figures(trainer: Make, module: Make, batches: Make, clock: Clock) -> None:
    """Two micro-batches of 2 s, 0.5 s of waiting and 50 FLOPs a step, on a device of 100 FLOP/s."""
    report = ThroughputReport(flops=lambda batch: 50.0, matmul_flops_per_s=100.0)
    options = {"accumulate_grad_batches": 2, "val_check_interval": 4, "max_steps": 4, "enable_checkpointing": False}
    trainer(report, **options).fit(module(), SlowBatches(clock, 8), batches([1.0]))
    assert report.report_section() == {
        "warmup_steps": 1,
        "timed_steps": 3,
        "step_time_s": {"p50": 5.0, "p95": 5.0},
        "tokens_per_s": 4.0,
        "data_wait_share": 0.2,
        "mfu": 0.2,
        "model_flops_per_s": 20.0,
        "mfu_note": "FLOPs by the function passed as flops",
        "matmul_flops_per_s": [100.0],
        "matmul_dtype": "float32",
        "matmul_size": None,
        "steps": [2, 3, 4],
        "steps_tokens_per_s": [4.0, 4.0, 4.0],
        "steps_time_s": [5.0, 5.0, 5.0],
    }


def test_what_else_happens_between_batches_is_not_waiting_for_data(
    trainer: Make, module: Make, batches: Make, clock: Clock
) -> None:
    class Slow(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            clock.now += 1.0

        def on_train_batch_start(self, *_: Any) -> None:
            clock.now += 1.0

    report = ThroughputReport()
    fit = trainer(Slow(), report, Slow(), enable_checkpointing=False)
    fit.fit(module(), SlowBatches(clock, 4))
    section: Any = report.report_section()
    assert section["step_time_s"] == {"p50": 6.5, "p95": 6.5}
    assert section["data_wait_share"] == 0.5 / 6.5


@pytest.mark.parametrize(("documents", "length"), [(None, 32), ([[8, 24], [16, 16]], 18)])  # (64 + 576 + 512) / 64
def test_a_module_that_knows_its_flops(trainer: Make, clock: Clock, documents: Any, length: int) -> None:
    class Knowing(BoringModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            clock.now += 2.0
            return super().training_step(batch["input_ids"].float(), batch_idx)

        def flops_per_token(self, seq_len: int) -> float:
            return 10.0 + seq_len

        def train_dataloader(self) -> Any:
            return DataLoader(
                [{"input_ids": torch.ones(32)}] * 6,
                batch_size=2,
                collate_fn=lambda rows: (
                    {"input_ids": torch.stack([r["input_ids"] for r in rows]), "num_tokens": 50}
                    | ({} if documents is None else {"document_lengths": documents})
                ),
            )

    report = ThroughputReport(matmul_flops_per_s=10_000.0)
    trainer(report, enable_checkpointing=False, max_steps=3, limit_val_batches=0).fit(Knowing())
    section: Any = report.report_section()
    # 50 of the 64 positions are tokens, in 2 s.
    assert section["model_flops_per_s"] == 50 * (10 + length) / 2
    assert section["mfu"] == 50 * (10 + length) / 2 / 10_000
    assert section["mfu_note"].startswith("FLOPs by the module's flops_per_token")


@pytest.mark.parametrize(
    ("options", "precision", "note"),
    [
        ({}, "32-true", "BoringModel has no flops_per_token(seq_len): pass flops, a function or 'count'"),
        ({"flops": "count"}, "transformer-engine", "precision 'transformer-engine' does not tell"),
    ],
)
def test_an_unknown_mfu_says_why(
    trainer: Make, monkeypatch: pytest.MonkeyPatch, capsys: Any, options: dict[str, Any], precision: str, note: str
) -> None:
    monkeypatch.setattr(throughput_report, "_matmul_rate", lambda *_: pytest.fail("measured for nothing"))
    monkeypatch.setattr(pl.Trainer, "precision", precision)
    report = ThroughputReport(**options)
    trainer(report, enable_checkpointing=False, max_steps=3).fit(BoringModel())
    section: Any = report.report_section()
    assert section["mfu"] is section["matmul_flops_per_s"] is section["tokens_per_s"] is None
    assert set(section["steps_tokens_per_s"]) == {None}
    assert note in section["mfu_note"]
    assert "unknown" in capsys.readouterr().out


def test_batches_that_do_not_tell_their_length(trainer: Make) -> None:
    class Knowing(BoringModel):
        def flops_per_token(self, seq_len: int) -> float:
            raise AssertionError

    report = ThroughputReport(tokens_fn=lambda batch: 7, matmul_flops_per_s=1.0)
    trainer(report, enable_checkpointing=False, max_steps=2).fit(Knowing())
    section: Any = report.report_section()
    assert section["mfu"] is None
    assert section["mfu_note"] == "the batches do not tell their tokens and length: pass flops"
    assert section["tokens_per_s"] > 0


# -------------------------------------------------------------------------------------------------------- counted FLOPs


class Tokens(pl.LightningModule):
    """A trained and a frozen matrix of 8 x 8 for each position; micro-batches of 2 x 5, then 2 x 3 positions."""

    def __init__(self, clock: Clock, compiled: bool = False, use: Callable[[Tensor], Tensor] = torch.abs) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8).requires_grad_(False)
        self.clock, self.use, self.traced = clock, use, 0
        if compiled:
            self.head = torch.compile(self.head, fullgraph=True, backend=self.trace)  # type: ignore[method-assign]

    def trace(self, graph: Any, example: Any) -> Any:
        self.traced += 1
        return graph.forward

    def head(self, hidden: Tensor) -> Tensor:
        return self.second(self.use(self.first(hidden)))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.clock.now += 2.0
        self.log("train_loss", 0.0)
        return self.head(self.embed(batch["input_ids"])).sum()

    def train_dataloader(self) -> Any:
        batches = [{"input_ids": torch.zeros(2, length, dtype=torch.long)} for length in (5, 3, 3)]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


#: Of a position: outputs of both, gradients of the input of both and of the weight of the first.
FLOPS = 2 * 8 * 8 * (2 + 2 + 1)


def test_the_counted_step_is_not_a_warm_up(trainer: Make, clock: Clock) -> None:
    report = ThroughputReport(flops="count", warmup_steps=1, matmul_flops_per_s=1.0)
    trainer(report, enable_checkpointing=False, max_steps=3).fit(Tokens(clock))
    section: Any = report.report_section()
    assert (section["warmup_steps"], section["timed_steps"]) == (2, 1)


@pytest.mark.parametrize("compiled", [False, True])
def test_operators_are_counted_once_and_training_goes_on_as_it_was(trainer: Make, clock: Clock, compiled: bool) -> None:
    def weights_after(*callbacks: pl.Callback) -> Tensor:
        torch.manual_seed(0)
        module = Tokens(clock, compiled)
        trainer(*callbacks, enable_checkpointing=False, max_steps=3).fit(module)
        assert bool(module.traced) == compiled
        return module.first.weight.detach()

    report = ThroughputReport(flops="count", matmul_flops_per_s=FLOPS * 30.0)
    counted = weights_after(report)
    section: Any = report.report_section()
    assert section["model_flops_per_s"] == FLOPS * 6 / 2
    assert section["mfu"] == 0.1
    assert torch.equal(counted, weights_after())


@torch.library.custom_op("test_throughput::negated", mutates_args=())
def negated(x: Tensor) -> Tensor:
    return -x


negated.register_autograd(lambda ctx, gradient: -gradient)


def attend(x: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]


@pytest.mark.parametrize(("use", "name"), [(negated, "test_throughput.negated"), (attend, "flash_attention_for_cpu")])
def test_an_operator_without_a_formula_is_named_not_ignored(
    trainer: Make, clock: Clock, use: Callable[[Tensor], Tensor], name: str
) -> None:
    report = ThroughputReport(flops="count", matmul_flops_per_s=1.0)
    with pytest.warns(UserWarning, match=f"no FLOP formula for .*{name}.*The MFU will be null"):
        trainer(report, enable_checkpointing=False, max_steps=2).fit(Tokens(clock, use=use))
    section: Any = report.report_section()
    assert section["mfu"] is None
    assert name in section["mfu_note"]


def test_counting_ends_with_the_micro_batch_even_if_that_fails(trainer: Make, clock: Clock) -> None:
    def fail(x: Tensor) -> Tensor:
        raise RuntimeError("no such function")

    report = ThroughputReport(flops="count", matmul_flops_per_s=1.0)
    fit = trainer(report, enable_checkpointing=False)
    profiler = fit.profiler
    with pytest.raises(RuntimeError, match="no such function"):
        fit.fit(Tokens(clock, use=fail))
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    compiled = torch.compile(lambda x: x + 1, backend=lambda graph, example: pytest.fail("compiled"))
    with pytest.raises(BaseException, match="compiled"):  # torch.compile works again
        compiled(torch.ones(1))
    assert fit.profiler is profiler
    assert report.report_section()["mfu_note"] == "no micro-batch has ended, in which FLOPs could be counted"  # type: ignore[index]


def test_a_product_of_sharded_tensors_is_not_guessed(tmp_path: Path) -> None:
    init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        tensor = DTensor.from_local(torch.ones(8, 8), init_device_mesh("cpu", (1,)), [Replicate()])
        with _CountFlops() as counter:
            torch.add(tensor, tensor)
            assert counter.unknown == set()
            torch.mm(tensor, tensor)
    finally:
        destroy_process_group()
    assert counter.unknown == {"aten.mm of DTensor"}
    assert counter.flops == 0


# ------------------------------------------------------------------------------------------------ the device's own rate


def test_the_rate_of_this_machine_is_plausible_and_measured_once() -> None:
    settings = CPU, torch.float32, torch.get_float32_matmul_precision(), torch.get_num_threads()
    left, out = torch.randn(2, 1024, 1024)
    rates, ratios = [], []
    began = perf_counter()
    for _ in range(3):  # in turn: what else runs on the machine meanwhile slows both
        rates.append(throughput_report._measure_matmul.__wrapped__(*settings))
        timed = median(_seconds_of(lambda: torch.mm(left, left, out=out)) for _ in range(10))
        ratios.append(rates[-1].flops_per_s / (2 * 1024**3 / timed))
    assert perf_counter() - began < 60
    assert {(rate.dtype, rate.size) for rate in rates} == {("float32", 1024)}
    assert 0.6 < median(ratios) < 1.7
    assert _matmul_rate(CPU, torch.float32, None) is _matmul_rate(CPU, torch.float32, None)
    assert _matmul_rate(CPU, torch.float32, 5.0).flops_per_s == 5.0


def _seconds_of(function: Callable[[], Any]) -> float:
    began = perf_counter()
    function()
    return perf_counter() - began


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one CUDA GPU")
def test_the_rate_of_a_gpu_leaves_no_memory_behind() -> None:
    device = torch.device("cuda", 0)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    rate = throughput_report._measure_matmul.__wrapped__(device, torch.float16, "highest", 1)
    assert torch.cuda.memory_allocated(device) - before < 64 * 2**20  # cuBLAS keeps a workspace
    assert 5e12 < rate.flops_per_s < 5e15


# ------------------------------------------------------------------------------------------------------------- the rest


def test_a_long_run_has_few_points_that_add_up() -> None:
    report = ThroughputReport()
    for step in range(1, 10_001):
        report._add_point(_Point(step, 1, 0.5, 3))
    points = report._points
    assert 128 <= len(points) <= 256
    assert sum(point.count for point in points) == 10_000
    assert sum(point.seconds for point in points) == 5_000
    assert sum(int(point.tokens or 0) for point in points) == 30_000
    assert points[-1].step == 10_000
    assert len({point.count for point in points[:-1]}) == 1


def test_one_unknown_step_makes_its_point_unknown() -> None:
    assert _Point(1, 1, 0.5, 3) + _Point(2, 1, 0.5, None) == _Point(2, 2, 1.0, None)


@pytest.mark.parametrize("report_first", [True, False])
def test_it_is_part_of_the_report_of_a_run_that_fails(
    tmp_path: Path, trainer: Make, module: Make, batches: Make, report_first: bool
) -> None:
    path, throughput = tmp_path / "report.json", ThroughputReport()
    callbacks = [RunReport(path), throughput] if report_first else [throughput, RunReport(path)]
    with pytest.raises(RuntimeError, match="full of gradients"):
        trainer(*callbacks, enable_checkpointing=False).fit(module(fail_at=3), batches([1.0] * 4))
    report = load_report(path)
    assert report["sections"]["throughput"]["tokens_per_s"] == report["tokens_per_s"] == 5.0
    assert report["sections"]["throughput"]["step_time_s"] == report["step_time_s"]


def test_tokens_and_flops_on_an_accelerator_are_not_waited_for() -> None:
    """A meta tensor has no value: reading it, a synchronisation on a GPU, would raise."""

    class Knowing(pl.LightningModule):
        def flops_per_token(self, seq_len: int) -> float:
            return 1.0

    class Trainer:
        precision, global_step, profiler = "32-true", 0, None
        strategy = type("Strategy", (), {"root_device": CPU})

    trainer: Any = Trainer()
    report = ThroughputReport(warmup_steps=0, matmul_flops_per_s=1.0)
    report.setup(trainer, Knowing(), "fit")
    report.on_train_start(trainer, Knowing())
    batch = {"input_ids": torch.ones(2, 5, device="meta"), "num_tokens": torch.ones(2, dtype=torch.long, device="meta")}
    for trainer.global_step in (1, 2):
        report.on_train_batch_start(trainer, Knowing(), batch, 0)
        report.on_train_batch_end(trainer, Knowing(), None, batch, 0)
    assert isinstance(report._flops, Tensor)
    assert report._flops.dtype == torch.float64  # float32 would round the sum of a long run
    with pytest.raises(RuntimeError):
        report._measure()


def test_a_micro_batch_costs_little(trainer: Make) -> None:
    """Below 1 % of a step of 0.1 s; typically 0.01 ms. The fastest of many: other processes only slow things down."""
    report = ThroughputReport(flops=lambda batch: 1.0, matmul_flops_per_s=1.0)
    made = trainer()
    report.setup(made, BoringModel(), "fit")
    report.on_train_start(made, BoringModel())
    batch = {"input_ids": torch.ones(2, 5)}
    times = []
    for _ in range(50):
        began = perf_counter()
        report.on_train_batch_start(made, BoringModel(), batch, 0)
        report.on_train_batch_end(made, BoringModel(), None, batch, 0)
        times.append(perf_counter() - began)
    report.teardown(made, BoringModel(), "fit")
    assert min(times) < 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flops": "guess"}, "flops is 'guess'"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"matmul_flops_per_s": 0.0}, "matmul_flops_per_s is 0.0"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ThroughputReport(**options)


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)  # Lightning writes a checkpoint
    example = inspect.cleandoc((throughput_report.__doc__ or "").split("::\n")[1])
    assert len(example.splitlines()) <= 12
    exec(example, {})
    printed = capsys.readouterr().out
    assert "6 (after 2 of warm-up)" in printed
    assert re.search(r"(?m)^\d+\.\d+ \S+ \S+ 0\.\d+$", printed)


def test_every_field_is_documented_and_json(trainer: Make, module: Make, batches: Make) -> None:
    report = ThroughputReport()
    assert report.report_section() is None
    trainer(report, enable_checkpointing=False, max_steps=2).fit(module(), batches([1.0] * 2))
    section: Any = report.report_section()
    assert section.keys() == ThroughputSection.__annotations__.keys()
    assert all(re.search(rf"(?m)^ +{field} ", ThroughputSection.__doc__ or "") for field in section)
    assert json.loads(json.dumps(section)) == section


def test_figures_are_those_of_all_ranks(
    trainer: Make, module: Make, batches: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a rank of three times the tokens and FLOPs, on a device five times as fast."""
    gathered: list[Any] = []

    def gather(mine: Any) -> list[Any]:
        tokens, flops, rate, points = mine
        gathered.append((mine, type(mine)(3 * tokens, 3 * flops, 5 * rate, [3 * point for point in points])))
        return list(gathered[-1])

    monkeypatch.setattr(throughput_report, "gather", gather)
    report = ThroughputReport(flops=lambda batch: 100.0, matmul_flops_per_s=50.0)
    trainer(report, enable_checkpointing=False, max_steps=3).fit(module(), batches([1.0] * 3))
    section: Any = report.report_section()
    assert len(gathered) == 1  # a collective, and so the same number of times on each rank
    assert section["tokens_per_s"] == 4 * 20 / 4
    assert section["steps_tokens_per_s"] == [20.0, 20.0]
    assert section["matmul_flops_per_s"] == [50.0, 250.0]
    assert section["model_flops_per_s"] == 4 * 200 / 4
    assert section["mfu"] == 200 / 300
