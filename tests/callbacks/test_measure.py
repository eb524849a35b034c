"""Tokens, step times and memory as the callbacks measure them."""

import os
from collections import UserDict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import psutil  # type: ignore[import-untyped]
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.profilers import Profiler

from lightning_qlora.callbacks import measure
from lightning_qlora.callbacks.measure import (
    FETCH_BATCH,
    GIB,
    SAVE_CHECKPOINT,
    DevicePeak,
    StepMeter,
    Stopwatch,
    TimedSteps,
    count_tokens,
    observe,
    peak_memory_bytes,
    percentile,
    restart_device_peak,
    rounded,
    rss_bytes,
    with_prefix,
)


@pytest.mark.parametrize(
    ("batch", "tokens"),
    [
        ({"input_ids": torch.zeros(3, 7)}, 21),
        ({"input_ids": torch.zeros(3, 7), "num_tokens": 5}, 5),
        ({"num_tokens": torch.tensor([2, 4])}, 6),
        (UserDict(input_ids=torch.zeros(2, 2)), 4),  # transformers' BatchEncoding is a UserDict
        ({"input_ids": [1, 2, 3]}, None),
        (torch.zeros(3, 7), None),
    ],
)
def test_tokens_of_a_batch(batch: Any, tokens: int | None) -> None:
    assert count_tokens(batch) == tokens


def test_tokens_on_an_accelerator_are_not_waited_for() -> None:
    # A meta tensor has no value: int() of it, a synchronisation on a GPU, would raise.
    count = count_tokens({"num_tokens": torch.ones(2, dtype=torch.long, device="meta")})
    assert isinstance(count, torch.Tensor)
    assert count.shape == ()


def test_a_step_is_all_its_micro_batches_without_validation(clock: Any) -> None:
    meter = StepMeter()
    batch = {"num_tokens": 10}
    clock.now = 1.0
    meter.start(global_step=7)
    clock.now = 2.0
    assert meter.update(batch, global_step=7) is None
    clock.now = 4.0
    first = meter.update(batch, global_step=8)
    meter.pause()
    clock.now = 60.0
    meter.resume()
    clock.now = 60.5
    second = meter.update({"num_tokens": 3}, global_step=10)
    assert first is not None
    assert second is not None
    assert (first.count, first.seconds, first.tokens) == (1, 3.0, 20)
    assert (second.count, second.seconds, second.tokens) == (2, 0.5, 3)


def test_one_uncountable_micro_batch_makes_the_step_uncountable() -> None:
    meter = StepMeter()
    meter.start(0)
    meter.update({"num_tokens": 1}, 0)
    meter.update("text", 0)
    step = meter.update({"num_tokens": 1}, 1)
    assert step is not None
    assert step.tokens is None
    again = meter.update({"num_tokens": 1}, 2)
    assert again is not None
    assert again.tokens == 1


def test_peak_memory_of_a_cpu_process_grows_with_its_data() -> None:
    before, kind = peak_memory_bytes(torch.device("cpu"))
    assert kind == "process_peak_rss"
    assert 0.05 * GIB < before < 100 * GIB  # Python with torch: neither bytes nor KiB taken for the other
    size = before + 64 * 2**20  # so large that memory already freed to the process cannot hide it
    block = torch.ones(size, dtype=torch.uint8)
    after, _ = peak_memory_bytes(torch.device("cpu"))
    assert after >= block.numel()


@pytest.mark.parametrize("is_linux", [True, False])
def test_resident_set_is_the_processes_own(is_linux: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_linux:
        monkeypatch.setattr(measure, "_open_statm", lambda pid: None)
    before = rss_bytes()
    held = torch.ones(200 * 2**20, dtype=torch.uint8)
    assert abs(rss_bytes() - psutil.Process().memory_info().rss) < 2**24
    assert rss_bytes() > before + 0.9 * len(held)
    limit, (read, write) = before + 1.5 * len(held), os.pipe()
    if (child := os.fork()) == 0:  # has its own, without what the parent allocates later
        os.read(read, 1)
        os._exit(rss_bytes() > limit)
    more = torch.ones(200 * 2**20, dtype=torch.uint8)
    assert rss_bytes() > limit
    os.write(write, b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(more) == len(held)
    os.close(read)
    os.close(write)


def test_the_cpu_has_no_allocator_to_restart() -> None:
    assert restart_device_peak(torch.device("cpu")) is None


def test_restarting_the_peak_forgets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """With two devices whose peaks are 900 and 70, and 40 allocated when they are restarted."""
    peaks = {0: 900, 1: 70}

    def stats(device: torch.device) -> dict[str, Any]:
        counts = {"peak": peaks[device.index], "current": 40}
        return {"allocated_bytes": {"all": counts}, "reserved_bytes": {"all": {"peak": 1000, "current": 800}}}

    monkeypatch.setattr(measure, "_earlier_peaks", {})
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", stats)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peaks.update({device.index: 40}))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peaks[device.index])
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    assert restart_device_peak(first) == DevicePeak(allocated=900, reserved=1000, allocated_now=40)
    assert restart_device_peak(first) == DevicePeak(allocated=40, reserved=1000, allocated_now=40)
    assert peak_memory_bytes(first) == (900, "cuda_max_allocated")
    assert peak_memory_bytes(second) == (70, "cuda_max_allocated")
    peaks[0] = 1200
    assert peak_memory_bytes(first) == (1200, "cuda_max_allocated")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one CUDA GPU")
def test_peak_memory_of_a_gpu_is_the_allocators(monkeypatch: pytest.MonkeyPatch) -> None:
    device, size = torch.device("cuda", 0), 32 * 2**20
    restart_device_peak(device)
    monkeypatch.setattr(measure, "_earlier_peaks", {})
    before = torch.cuda.memory_allocated(device)
    torch.empty(size, dtype=torch.uint8, device=device)
    assert peak_memory_bytes(device) == (before + size, "cuda_max_allocated")
    restarted = restart_device_peak(device)
    assert restarted is not None
    assert (restarted.allocated, restarted.allocated_now) == (before + size, before)
    assert restarted.reserved >= before + size
    assert torch.cuda.max_memory_allocated(device) == before
    assert peak_memory_bytes(device) == (before + size, "cuda_max_allocated")


def test_the_first_steps_are_not_timed(clock: Any) -> None:
    steps = TimedSteps(count_tokens, warmup_steps=2)
    clock.now = 0.0
    steps.start(global_step=10)
    ends = [(100.0, 11), (101.0, 11), (150.0, 12), (152.0, 13), (155.0, 13), (158.0, 15)]
    timed = []
    for clock.now, global_step in ends:
        step, is_timed = steps.update({"num_tokens": 7}, global_step)
        timed.append(None if step is None else is_timed)
    assert timed == [False, None, False, True, None, True]
    assert steps.seconds == [2.0, 3.0, 3.0]
    assert steps.tokens == 21
    assert steps.step_time_s() == {"p50": 3.0, "p95": 3.0}
    assert steps.tokens_per_s([21, 19]) == 5.0
    assert steps.tokens_per_s([21, None]) is None
    steps.start(15)
    assert (steps.step_time_s(), steps.tokens_per_s([0])) == (None, None)


def test_a_stopwatch_adds_up_what_was_not_yet_taken(clock: Any) -> None:
    watch = Stopwatch()
    for seconds in (2.0, 0.5):
        clock.now += 10.0
        watch.start()
        clock.now += seconds
        watch.stop()
    assert watch.take() == 2.5
    assert watch.take() == 0.0


class Diary(Profiler):
    """Writes down what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def start(self, action_name: str) -> None:
        self.lines.append(f"+{action_name}")

    def stop(self, action_name: str) -> None:
        self.lines.append(f"-{action_name}")

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        self.lines.append(f"setup {stage}")

    def summary(self) -> str:
        return "a summary"

    def describe(self) -> None:
        self.lines.append("describe")

    def teardown(self, stage: str | None) -> None:
        self.lines.append(f"teardown {stage}")


def test_fetching_and_saving_are_observed_beside_the_trainers_own_profiler(
    trainer: Any, module: Any, batches: Any, tmp_path: Path
) -> None:
    """Fails if Lightning calls these two actions otherwise."""

    class Observer(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.forget = [
                observe(trainer, FETCH_BATCH, lambda: seen.append("+batch"), lambda: seen.append("-batch")),
                observe(trainer, SAVE_CHECKPOINT, lambda: seen.append("+save"), lambda: seen.append("-save")),
            ]

        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            for forget in self.forget * 2:
                forget()

    seen: list[str] = []
    diary = Diary()
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1)
    fit = trainer(Observer(), saving, max_steps=3, profiler=diary, num_sanity_val_steps=0)
    fit.fit(module(on_batch=lambda _: seen.append("step")), batches([1.0] * 3), batches([1.0]))
    fetch = ["+batch", "-batch", "step"]
    assert seen == [*fetch, *fetch, "+save", "-save", *fetch]
    assert fit.profiler is diary
    observed = [line for line in diary.lines if line[1:] in (FETCH_BATCH, SAVE_CHECKPOINT)]
    actions = [FETCH_BATCH, FETCH_BATCH, SAVE_CHECKPOINT, FETCH_BATCH]
    assert observed == [sign + action for action in actions for sign in "+-"]


def test_an_observed_profiler_is_still_itself(trainer: Any) -> None:
    made, diary = trainer(), Diary()
    made.profiler = diary
    nothing = lambda: None  # noqa: E731
    forget = [observe(made, action, nothing, nothing) for action in "ab"]
    made.profiler.setup("fit")
    made.profiler.describe()
    made.profiler.teardown("fit")
    assert diary.lines == made.profiler.lines == ["setup fit", "describe", "teardown fit"]
    assert made.profiler.summary() == "a summary"
    forget[0]()
    assert made.profiler is not diary
    forget[1]()
    assert made.profiler is diary


def test_percentiles_interpolate() -> None:
    assert percentile([5.0], 0.95) == 5.0
    assert percentile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert percentile([float(i) for i in range(101)], 0.95) == 95.0


def test_figures_for_people() -> None:
    values = {0.0: "0 ", 12.0: "12 ", 999.0: "999 ", 1234.0: "1.23 k", 24.1e12: "24.1 T", 5e18: "5e+03 P"}
    assert {value: with_prefix(value) for value in values} == values
    assert [rounded(value) for value in (12345.6, 10.4, 9.96, 0.482, 0.0)] == ["12,346", "10", "10", "0.48", "0"]
