"""Steps for a comparison have the same samples, whether padded or packed."""

import itertools
from typing import Any

import torch

from lightning_qlora.modules.data.steps import demo_samples, draw_steps, packed_batches, padded_batches, token_counts


def test_steps_have_the_same_samples_in_every_form() -> None:
    samples: list[Any] = [{"input_ids": [i] * (20 + i % 31), "labels": [i] * (20 + i % 31)} for i in range(1, 200)]
    steps = draw_steps(samples, [100, 200, 400], tokens=800, steps=9)
    tokens = [sum(token_counts(step)) for step in steps]
    assert all(0.8 * 800 < count <= 800 for count in tokens)
    assert len({step[0]["input_ids"][0] for step in steps}) == 9
    for batches, most in (
        (padded_batches(steps, 99), 1),
        (padded_batches(steps, 4), 8),
        (packed_batches(steps, [200]), 1),
        (packed_batches(steps, [50, 100, 150]), 1),
    ):
        assert {len(step) for step in batches} <= set(range(1, most + 1))
        assert len({len(step) for step in batches}) == 1  # as many micro-batches in each step
        assert [sum(batch["num_tokens"] for batch in step) for step in batches] == tokens
        for step, batch in zip(steps, batches, strict=True):
            found = torch.cat([each["input_ids"].flatten() for each in batch])
            expected = torch.tensor([token for sample in step for token in sample["input_ids"]])
            assert torch.equal(found[found > 0].sort().values, expected.sort().values)
    for length, (batch,) in zip(itertools.cycle([50, 100, 150]), batches, strict=False):
        assert batch["input_ids"].shape[1] <= length + 7


def test_without_a_tokenizer_samples_have_the_usual_lengths() -> None:
    samples = demo_samples(None, vocab_size=300)
    counts = token_counts(samples)
    # SmolLM2's tokenizer: 62 to 156, 86 on average.
    assert 60 < min(counts) < max(counts) < 160
    assert 82 < sum(counts) / len(counts) < 90
    assert max(max(sample["input_ids"]) for sample in samples) < 300
    assert samples == demo_samples(None, vocab_size=300)
