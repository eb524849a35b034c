"""The order of samples and each rank's part of it."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from lightning_qlora.modules.data.sampler import CostGroupedSampler, GlobalBatchSampler
from tests.chats import numbered


def epoch_of(
    count: int, batch_size: int, world_size: int, epoch: int = 0, seed: int = 0, start: int = 0
) -> list[list[list[int]]]:
    """For each rank, its batches of indices, through a real DataLoader."""
    ranks = []
    for rank in range(world_size):
        sampler = GlobalBatchSampler(range(count), batch_size=batch_size, num_replicas=world_size, rank=rank, seed=seed)
        sampler.set_epoch(epoch)
        sampler.start_batch = start
        loader = DataLoader(range(count + 1), batch_size=batch_size, sampler=sampler, collate_fn=list)  # type: ignore[arg-type]
        batches = list(loader)
        assert len(loader) == sampler.num_batches == len(batches) + start
        ranks.append(batches)
    return ranks


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(1, 40),
    batch_size=st.integers(1, 5),
    world_size=st.integers(1, 4),
    epoch=st.integers(0, 3),
    data=st.data(),
)
def test_the_ranks_together_see_the_single_device_batches(count, batch_size, world_size, epoch, data):
    (single,) = epoch_of(count, batch_size * world_size, 1, epoch)
    start = data.draw(st.integers(0, len(single) - 1))
    ranks = epoch_of(count, batch_size, world_size, epoch, start=start)
    assert {len(batches) for batches in ranks} == {math.ceil(count / (batch_size * world_size)) - start}
    for position, expected in enumerate(single[start:]):
        parts = [batches[position] for batches in ranks]
        assert all(part == [count] or count not in part for part in parts)
        interleaved = [part[i] for i in range(batch_size) for part in parts if i < len(part)]
        assert [index for index in interleaved if index != count] == expected


def test_a_rank_without_a_tail_sample_gets_one_blank():
    ranks = epoch_of(count=9, batch_size=2, world_size=4)
    assert [len(batches) for batches in ranks] == [2] * 4
    assert [batches[1] for batches in ranks][1:] == [[9]] * 3
    assert sorted(i for batches in ranks for batch in batches for i in batch) == [*range(9), 9, 9, 9]


def test_the_order_follows_seed_and_epoch():
    orders = {(seed, epoch): epoch_of(50, 4, 1, epoch, seed)[0] for seed in range(3) for epoch in range(3)}
    assert len({str(order) for order in orders.values()}) == len(orders)
    assert orders[1, 2] == epoch_of(50, 4, 1, 2, 1)[0]
    for order in orders.values():
        assert sorted(index for batch in order for index in batch) == list(range(50))


def test_start_batch_applies_to_one_iteration():
    sampler = GlobalBatchSampler(numbered(10), batch_size=3, num_replicas=1, rank=0)
    whole = list(sampler)
    sampler.start_batch = 2
    assert len(sampler) == 10
    assert list(sampler) == whole[6:]
    assert list(sampler) == whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"rank": 2}, "Invalid rank 2"),
    ],
)
def test_senseless_sampler_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GlobalBatchSampler(numbered(3), **({"batch_size": 1, "num_replicas": 2, "rank": 0} | arguments))


def grouped(costs: list[int], batch_size: int, world_size: int, rank: int, **options: int) -> CostGroupedSampler:
    return CostGroupedSampler(
        range(len(costs)), costs, batch_size=batch_size, num_replicas=world_size, rank=rank, **options
    )


@settings(deadline=None, max_examples=40)
@given(
    costs=st.lists(st.integers(1, 9), min_size=1, max_size=60), batch_size=st.integers(1, 4), epoch=st.integers(0, 2)
)
def test_grouped_samples_are_each_there_once_and_the_same_on_any_number_of_ranks(costs, batch_size, epoch):
    single = grouped(costs, 2 * batch_size, 1, 0, window=3)
    pair = [grouped(costs, batch_size, 2, rank, window=3) for rank in (0, 1)]
    for sampler in (single, *pair):
        sampler.set_epoch(epoch)
    order, (first, second) = list(single), map(list, pair)
    assert sorted(order) == list(range(len(costs)))
    whole = len(costs) // (2 * batch_size) * 2 * batch_size
    assert [index for both in zip(first, second, strict=False) for index in both][:whole] == order[:whole]
    single.start_batch = 1
    assert list(single) == order[2 * batch_size :]


def test_batches_hold_samples_of_about_equal_cost():
    """Half of the samples have an image: hardly a batch mixes them with the others, and no epoch repeats a batch."""
    costs = [1000 if index % 2 else 10 for index in range(256)]
    epochs = []
    for epoch in (0, 1):
        sampler = grouped(costs, 4, 2, 0)
        sampler.set_epoch(epoch)
        order = list(sampler)
        batches = [[costs[index] for index in order[start : start + 4]] for start in range(0, len(order), 4)]
        assert sum(len(set(batch)) > 1 for batch in batches) <= 1
        kinds = [batch[0] for batch in batches]
        assert kinds != sorted(kinds)
        epochs.append({frozenset(order[start : start + 4]) for start in range(0, len(order), 4)})
    assert not epochs[0] & epochs[1]
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        grouped(costs, 4, 2, 0, window=0)
