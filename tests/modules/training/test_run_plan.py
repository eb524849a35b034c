"""What a run chooses by itself, from the predicted memory alone."""

import dataclasses
from typing import Any

import pytest

from lightning_qlora.modules.distributed.strategies import StrategyOptions, build_strategy
from lightning_qlora.modules.hardware import Capabilities
from lightning_qlora.modules.lora.config import default_lora
from lightning_qlora.modules.models.options import ComputeOptions
from lightning_qlora.modules.training.memory_plan import GIB, plan_memory
from lightning_qlora.modules.training.run_plan import RunPlan, plan_run
from tests.training import LLAMA_8B


def planned_run(gib: float, capability: tuple[int, int] = (7, 5), *, devices: int = 2, **options: Any) -> RunPlan:
    """8B on GPUs of that memory."""
    limit = {name: options.pop(name) for name in ("memory_limit_gib",) if name in options}
    strategy = StrategyOptions("auto", devices=devices, precision="16-mixed", **options)
    return plan_run(
        LLAMA_8B, default_lora(64), strategy, ComputeOptions(compile="default", **limit), batch_size=1, seq_len=2048,
        device=Capabilities("cuda", "GPU", capability, int(gib * GIB), capability >= (8, 0)),
    )  # fmt: skip


def test_auto_takes_ddp_where_its_copy_fits():
    large, t4, small = planned_run(80), planned_run(14.6), planned_run(10)
    assert (large.strategy.strategy, large.compute.checkpoint_activations) == ("ddp", 0)
    assert large.choices[0].startswith("Strategy: ddp. DDP needs 15.")
    assert "no decoder layer is recomputed" in large.choices[1]
    assert t4.strategy.strategy == "ddp"  # which recomputes a few layers, and FSDP2 none
    assert 0 < t4.compute.checkpoint_activations <= 16
    assert 0.95 * 14.6 * GIB < t4.memory.device_bytes <= 14.6 * GIB
    assert small.strategy.strategy == "fsdp2"
    assert 0 < small.compute.checkpoint_activations < 32
    assert small.memory.device_bytes <= 10 * GIB < plan_memory(
        dataclasses.replace(small.memory.settings, strategy="ddp", checkpoint_activations="all")
    ).device_bytes  # fmt: skip


def test_auto_follows_what_is_asked_for():
    assert planned_run(80, devices=1).strategy.strategy == "single"
    assert planned_run(80, offload=True).strategy.strategy == "fsdp2"
    limited = planned_run(80, memory_limit_gib=10.0)
    assert limited.strategy.strategy == "fsdp2"
    assert limited.memory.device_bytes <= 10 * GIB
    with pytest.raises(ValueError, match="pass the options that plan_run"):
        build_strategy(StrategyOptions("auto", devices=2))
