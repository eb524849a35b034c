"""The loader's place in an epoch, and where it continues."""

import json
from collections.abc import Callable

import pytest
import torch

from lightning_qlora.modules.data.collators import ChatCollator
from lightning_qlora.modules.data.loader import ResumableDataLoader
from lightning_qlora.modules.data.sampler import GlobalBatchSampler
from tests.chats import numbered


def make_loader(
    world_size: int = 1,
    rank: int = 0,
    batch_size: int = 4,
    count: int = 22,
    seed: int = 0,
    done: Callable[[], int] = lambda: 0,
) -> ResumableDataLoader:
    dataset = numbered(count)
    sampler = GlobalBatchSampler(dataset, batch_size=batch_size, num_replicas=world_size, rank=rank, seed=seed)
    return ResumableDataLoader(dataset, sampler, ChatCollator(pad_token_id=0), done)


def indices(loader: ResumableDataLoader) -> list[list[int]]:
    return [batch["input_ids"][:, 0].tolist() for batch in loader]


def test_the_state_is_what_was_trained_on_and_not_what_was_fetched():
    done = 0
    loader = make_loader(done=lambda: done)
    whole = indices(make_loader())
    fetched = iter(loader)
    for _ in range(4):
        next(fetched)
    done = 2
    state = loader.state_dict()
    assert state["next_sample"] == 8
    assert all(type(value) is int for value in state.values())
    resumed = make_loader()
    resumed.load_state_dict(json.loads(json.dumps(state)))
    assert resumed.state_dict() == state  # a checkpoint before the first batch does not lose the place
    assert indices(resumed) == whole[2:]
    resumed.order.set_epoch(1)
    assert len(indices(resumed)) == len(whole)


def test_the_place_moves_to_another_number_of_ranks():
    whole = indices(make_loader())
    saved = make_loader(done=lambda: 3)
    next(iter(saved))
    resumed = [make_loader(world_size=2, rank=rank, batch_size=2) for rank in range(2)]
    for loader in resumed:
        loader.load_state_dict(saved.state_dict())
    first, second = (indices(loader) for loader in resumed)
    joined = [[x for pair in zip(a, b, strict=True) for x in pair] for a, b in zip(first, second, strict=True)]
    assert joined == whole[3:]


def test_a_finished_epoch_resumes_at_the_start_of_the_next():
    saved = make_loader(done=lambda: 6)
    second_epoch = make_loader()
    second_epoch.order.set_epoch(1)
    expected = indices(second_epoch)
    indices(saved)
    resumed = make_loader()
    resumed.load_state_dict(saved.state_dict())
    resumed.order.set_epoch(2)  # as Lightning does with max_steps, one too many
    assert indices(resumed) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 2}, "global_batch_size 4 -> 2"),
        ({"world_size": 2}, "global_batch_size 4 -> 8"),
        ({"count": 21}, "dataset_size 22 -> 21"),
        ({"seed": 1}, "seed 0 -> 1"),
    ],
)
def test_a_place_in_another_order_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_loader(**arguments).load_state_dict(make_loader().state_dict())


def test_loading_leaves_the_global_random_state_alone():
    before = torch.random.get_rng_state()
    indices(make_loader())
    assert torch.equal(before, torch.random.get_rng_state())
