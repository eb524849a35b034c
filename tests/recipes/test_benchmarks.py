"""The benchmarks: the training step from its command line on the tiny shape, and what the others record."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest
import torch

from lightning_qlora.modules.checkpoints.random_weights import SHAPES, write_random_checkpoint
from lightning_qlora.modules.cli import flags_of, run_recipe
from tests.recipes.runs import arguments, call

BENCHMARKS = Path(__file__).parents[2] / "recipes" / "benchmarks"


@pytest.fixture(scope="module")
def scripts() -> Iterator[None]:
    """Benchmarks import each other as scripts of one directory do."""
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds tiny-4bit and tiny-bf16."""
    directory = tmp_path_factory.mktemp("checkpoints")
    for name, quantized in (("tiny-4bit", True), ("tiny-bf16", False)):
        write_random_checkpoint(directory / name, SHAPES["tiny"], quantized=quantized)
    return directory


# --- train_step.py


FLAGS = {"shape": "tiny", "warmup": 2, "steps": 3, "lora_r": 4}


def run_here(flags: dict[str, Any], script: str = "train_step") -> str:
    """The benchmark in this process, which is a rank of a pool and sees no GPU; returns what it prints."""
    sys.path.insert(0, str(BENCHMARKS))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert run_recipe(import_module(script).main, arguments(flags)) == 0
    return printed.getvalue()


def record(results: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((results / "train_step.json").read_text())
    return loaded


def test_ours_and_its_peer_do_the_same_work_and_share_a_record(ranks, checkpoints, tmp_path):
    common = FLAGS | {"checkpoints": checkpoints, "results": tmp_path, "precision": "32-true", "commit": "a"}
    for flags in ({"profile": True}, {"peer": "hf"}):
        ranks.run(1, "cpu", run_here, common | flags)
    found = record(tmp_path)
    assert [row[0] for row in found["rows"]] == ["lightning-qlora fsdp2", "transformers + peft"]
    assert all(len(row) == len(found["columns"]) for row in found["rows"])
    ours, peer = found["runs"].values()
    # bitsandbytes rounds dequantized weights to the dtype that was quantized, bfloat16.
    assert ours["losses"][0] == pytest.approx(peer["losses"][0], abs=5e-3)
    for name, figures in found["runs"].items():
        profiled = "lightning" in name
        assert len(figures["losses"]) == 5 + profiled
        assert figures["losses"][-1] != figures["losses"][0]
        assert len(figures["step_ms"]["all"]) == 3
        assert 0 < figures["step_ms"]["p20"] <= figures["step_ms"]["p50"] <= figures["step_ms"]["p80"]
        assert figures["tokens_per_s"] == pytest.approx(2 * 32 / figures["step_ms"]["p50"] * 1000)
        assert figures["load_s"][0] > 0
        assert figures["first_step_s"][0] > 0
        assert len(figures["train_allocated_gib"]) == 1
    (profile,) = tmp_path.glob("*.profile.txt")
    assert "lightning-qlora fsdp2, tiny" in profile.read_text()
    assert "lightning_qlora::dequantize_4bit" in profile.read_text()


def test_two_processes_report_both_and_replace_rows_of_another_commit(ranks, checkpoints, tmp_path):
    (tmp_path / "train_step.json").write_text(
        json.dumps({"device": "", "versions": {}, "commit": "old", "rows": [[1]], "runs": {}})
    )
    flags = {"devices": 2, "precision": "bf16-mixed", "commit": "new", "quantized": False}
    printed, _ = ranks.run(2, "cpu", run_here, FLAGS | {"checkpoints": checkpoints, "results": tmp_path} | flags)
    assert "its 1 rows are replaced" in printed
    (row,) = record(tmp_path)["rows"]
    assert row[:6] == ["lightning-qlora fsdp2, 16-bit checkpoint", "tiny", "bf16-mixed", 2, "2 x 32", 4]
    (figures,) = record(tmp_path)["runs"].values()
    assert len(figures["load_s"]) == len(figures["train_allocated_gib"]) == 2
    assert figures["tokens_per_s"] == pytest.approx(2 * 2 * 32 / figures["step_ms"]["p50"] * 1000)


def test_a_vision_language_model_and_its_peer_do_the_same_work(ranks, tmp_path):
    flags = {"shape": "tiny-vl", "warmup": 1, "steps": 2, "lora_r": 4, "batch_size": 2, "image_side": 8, "commit": "a"}
    flags |= {"checkpoints": tmp_path / "checkpoints", "results": tmp_path, "precision": "32-true"}
    for peer in ({}, {"peer": True}):
        ranks.run(1, "cpu", run_here, flags | peer, "vision_step")
    ours, theirs = json.loads((tmp_path / "vision_step.json").read_text())["runs"].values()
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=2e-3)


@pytest.mark.slow
def test_a_peer_on_two_processes_trains_under_ddp(checkpoints, tmp_path):
    flags = FLAGS | {
        "checkpoints": checkpoints,
        "results": tmp_path,
        "devices": 2,
        "precision": "32-true",
        "peer": "hf",
    }
    command = [sys.executable, str(BENCHMARKS / "train_step.py"), *arguments(flags)]
    # No GPU, so that the peer computes what is computed here wherever the test runs.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (figures,) = record(tmp_path)["runs"].values()
    assert len(figures["load_s"]) == 2


@pytest.fixture(scope="module")
def train_step(scripts: None) -> ModuleType:
    return import_module("train_step")


def test_every_shape_can_be_asked_for(train_step):
    choices = next(choice for choice in get_args(get_type_hints(train_step.main)["shape"]) if choice is not type(None))
    assert set(get_args(choices)) == set(SHAPES)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"peer": "hf", "offload": True}, "A peer takes no --strategy, --offload"),
        ({"peer": "hf", "strategy": "ddp"}, "A peer takes no --strategy, --offload"),
        ({"peer": "hf", "quantized": False}, "starts from 4 bits"),
        ({"strategy": "single", "devices": 2}, "'single' uses one device"),
        ({"peer": "accelerate"}, "needs --devices 2 or more GPUs"),
        ({"warmup": 0}, "--warmup must be at least 1"),
        ({"batch_size": 0}, "--batch_size must be at least 1"),
        ({"memory_cap_gib": 14.5}, "there is no GPU"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_written(
    train_step, tmp_path, flags, message, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # on a machine with GPUs: on purpose
    with pytest.raises(ValueError, match=message):
        call(train_step, shape="tiny", checkpoints=tmp_path, results=tmp_path, **flags)
    assert list(tmp_path.iterdir()) == []


def test_the_device_is_busy_once_where_kernels_overlap(train_step, monkeypatch):
    meter = train_step.Meter(2, 1, None, with_profile=True)
    meter.device, meter.ends = torch.device("cpu"), [0.0, 0.010, 0.020, 0.032]

    def event(name: str, start: float, end: float, kind: str = "CPU", note: bool = False) -> SimpleNamespace:
        return SimpleNamespace(
            name=name, device_type=SimpleNamespace(name=kind), is_user_annotation=note, self_cpu_time_total=end - start,
            time_range=SimpleNamespace(start=start, end=end),
        )  # fmt: skip

    events = [
        event("a", 0, 4000),
        event("b", 2000, 6000),
        event("a", 3000, 5000),
        event("b", 8000, 9000),
        event("note", 0, 9000, note=True),
        event("other", 0, 9000, "CUDA"),
    ]
    meter._profiler = SimpleNamespace(events=lambda: events)
    head, _, *rows = meter.profile_table().splitlines()
    assert head == (
        "One step of rank 0: 12.0 ms (10.0 ms without the profiler), the device busy for 7.0 ms. "
        "4 kernels, copies and fills of 11.0 ms:"
    )
    assert [row.split() for row in rows] == [["6.000", "2", "a"], ["5.000", "2", "b"]]


def test_rows_of_some_of_a_machines_gpus_stay_in_its_record(scripts, tmp_path, monkeypatch):
    train_step, record = import_module("train_step"), import_module("record")
    figures: dict[str, Any] = {"tokens_per_s": 1.0, "step_ms": {"p50": 1.0}}
    figures |= {key: [1.0] for key in ("train_allocated_gib", "load_allocated_gib", "load_s", "load_host_gib")}

    def rows_after(device: str, what: str) -> list[str]:
        monkeypatch.setattr(record, "_device", lambda: device)
        train_step.record_run([what, "tiny", "32-true", 1, "1 x 8", 4], figures, tmp_path, "c", None)
        return [row[0] for row in json.loads((tmp_path / "train_step.json").read_text())["rows"]]

    assert rows_after("1x NVIDIA H200", "single") == ["single"]
    assert rows_after("2x NVIDIA H200", "fsdp2") == ["single", "fsdp2"]
    assert rows_after("2x Tesla T4", "fsdp2") == ["fsdp2"]


# --- what fits a T4


def test_a_configuration_that_does_not_fit_is_a_row_that_says_so(scripts, tmp_path, monkeypatch):
    t4_memory = import_module("t4_memory")
    figures = {"train_allocated_gib": [1.0, 2.0], "train_reserved_gib": [4.0, 3.0]}
    monkeypatch.setattr(t4_memory, "checkpoint_of", lambda *args, **kwargs: None)
    monkeypatch.setattr(t4_memory, "ON_CPU", [t4_memory.Configuration("llama-3.1-8b", batch_size=b) for b in (1, 40)])
    monkeypatch.setattr(t4_memory, "measure", lambda c, *args: figures if c.batch_size == 1 else None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    t4_memory.main(results=tmp_path)
    small, large = json.loads((tmp_path / "t4_memory.json").read_text())["rows"]
    assert small[-2:] == [2.0, 4.0]
    assert large[-2:] == ["does not fit"] * 2
    assert large[-3] > 2 * small[-3] > 8  # planned GiB


def test_the_plan_is_within_a_tenth_of_every_recorded_peak(scripts):
    t4_memory = import_module("t4_memory")
    record = json.loads((BENCHMARKS / "results" / "t4_memory.json").read_text())
    compared = []
    for shape, r, size, flags, _, measured, _ in record["rows"]:
        batch_size, seq_len = map(int, size.split(" x "))
        special = dict(flag.removeprefix("--").split("=") for flag in flags.split())
        values = {name: value == "true" if value in ("true", "false") else value for name, value in special.items()}
        row = t4_memory.Configuration(shape, batch_size, seq_len, r, **values)
        if measured == "does not fit":
            assert row.planned_gib("16-mixed", (9, 0)) > 0.9 * t4_memory.CAP_GIB
        else:
            compared.append(row)
            assert row.planned_gib("16-mixed", (9, 0)) == pytest.approx(measured, rel=0.1)
    assert len(compared) > 5


def test_an_error_that_is_not_of_memory_is_not_taken_for_one(scripts, monkeypatch):
    t4_memory = import_module("t4_memory")
    failed = SimpleNamespace(returncode=2, stderr="train_step.py: error: batch_size must be at least 1, got 0.")
    monkeypatch.setattr(t4_memory.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match="batch_size must be at least 1"):
        t4_memory.measure(t4_memory.Configuration("tiny", batch_size=0), "32-true", capped=False)


def test_a_run_is_told_all_that_its_row_says(scripts, monkeypatch):
    """train_step.py has other defaults, by which rows of one sample were once measured with two."""
    t4_memory = import_module("t4_memory")
    commands: list[list[str]] = []

    def fails(command: list[str], **_: Any) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=1, stderr="torch.OutOfMemoryError")

    monkeypatch.setattr(t4_memory.subprocess, "run", fails)
    assert t4_memory.measure(t4_memory.Configuration("tiny", offload=True), "32-true", capped=True) is None
    assert {"--batch_size=1", "--seq_len=2048", "--lora_r=64", "--strategy=fsdp2", "--offload=true"} <= {*commands[0]}
    known = {flag.name for flag in flags_of(import_module("train_step").main)}
    assert {flag.removeprefix("--").partition("=")[0] for flag in commands[0][2:]} <= known


def test_attention_by_itself_is_recorded(scripts, tiny_llama_dir, tmp_path):
    import_module("packed_attention").main(str(tiny_llama_dir), [512], 512, ["sdpa"], tmp_path, "c")
    record = json.loads((tmp_path / "attention.json").read_text())
    rows = [dict(zip(record["columns"], row, strict=True)) for row in record["rows"]]
    assert [(row["row"], row["rows"], row["attention"]) for row in rows] == [(512, 1, "causal"), (512, 1, "sdpa")]
    assert all(row["ms"] > 0 for row in rows)


@pytest.mark.parametrize(("length", "tokens"), [(512, 256), (8, 512), (512, 0)])
def test_rows_that_hold_no_sample_or_more_than_a_step_are_refused(scripts, tiny_llama_dir, tmp_path, length, tokens):
    with pytest.raises(ValueError, match="for the longest sample, and at most"):
        import_module("packed_attention").main(str(tiny_llama_dir), [length], tokens, ["sdpa"], tmp_path, "c")


@pytest.mark.parametrize("status", [0, 1])
def test_packing_records_what_the_recipe_measured_if_it_ended_well(scripts, tmp_path, monkeypatch, status):
    packing = import_module("packing")
    runs = [{"run": "padded 3", "tokens/s": 2.5}]
    report = {"tokens_of_samples": [7, 5, 9], "precision": "bf16-mixed", "runs": runs}

    def recipe(command: list[str], **_: Any) -> SimpleNamespace:
        assert command[1].endswith("packing_flex.py")
        assert command[-2:] == ["--max_steps", "2"]
        (Path(command[command.index("--output_dir") + 1]) / "report.json").write_text(json.dumps(report))
        return SimpleNamespace(returncode=status)

    monkeypatch.setattr(packing.subprocess, "run", recipe)
    monkeypatch.setattr(sys, "argv", ["packing.py", "--results", str(tmp_path), "--commit", "c", "--max_steps", "2"])
    assert packing.main() == status
    if status:
        assert not list(tmp_path.iterdir())
        return
    training = json.loads((tmp_path / "packing.json").read_text())
    assert (training["columns"], training["rows"]) == (["run", "tokens/s"], [["padded 3", 2.5]])
    assert training["notes"].startswith("Samples of 5 to 9 tokens")
