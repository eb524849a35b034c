"""Tokens, step times and memory as the callbacks measure them."""

from collections import UserDict
from typing import Any

import pytest
import torch

from lightning_qlora.callbacks.measure import GIB, StepMeter, count_tokens, peak_memory_bytes


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one CUDA GPU")
def test_peak_memory_of_a_gpu_is_the_allocators() -> None:
    device = torch.device("cuda", 0)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    torch.empty(32 * 2**20, dtype=torch.uint8, device=device)
    assert peak_memory_bytes(device) == (before + 32 * 2**20, "cuda_max_allocated")
