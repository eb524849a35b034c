"""The order of samples, and loaders that resume in the middle of an epoch."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from .samples import IGNORE_INDEX, Batch, PackedBatch, Sample


class ChatDataset(Dataset[Sample]):
    """Tokenized chats, plus one blank sample at index ``len(self)``: a single token without a label.

    Args:
        samples: The tokenized chats.
        blank_token_id: The token of the blank sample, usually the pad token.
    """

    def __init__(self, samples: Sequence[Sample], blank_token_id: int) -> None:
        # Arrow holds the lists: compact, and shared with loader workers instead of copied. Built in memory, so no cache
        # files.
        self.rows = datasets.Dataset.from_list(list(samples)) if samples else []
        self.blank: Sample = {"input_ids": [blank_token_id], "labels": [IGNORE_INDEX]}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        if index == len(self):
            return self.blank
        row: Sample = self.rows[index]
        return row


class GlobalBatchSampler(DistributedSampler[int]):
    """Deal the samples of each global batch to the ranks, one by one.

    Global batch k is items ``[k * G, (k + 1) * G)`` of the epoch's order, G = ``num_replicas * batch_size``, and rank r
    takes every ``num_replicas``-th item of it from r on. The order depends on ``seed`` and the epoch only, so that the
    same G gives the same global batches for any number of ranks. The last global batch of an epoch may be short:
    nothing is repeated or dropped. A rank that would get nothing of it yields the index ``len(dataset)``, the blank
    sample of :class:`ChatDataset`.

    It feeds a ``DataLoader`` that has the same ``batch_size`` and ``drop_last=False``. Being a ``DistributedSampler``,
    Lightning keeps it as it is and calls :meth:`set_epoch`.

    Args:
        dataset: What the indices point into.
        batch_size: Samples of one batch on one rank.
        num_replicas: Number of ranks.
        rank: This rank.
        shuffle: Draw a new order each epoch; else the order of the data set.
        seed: Non-negative seed of the order, the same on all ranks.

    Raises:
        ValueError: For a batch size below 1, a negative seed, or a rank outside of ``[0, num_replicas)``.
    """

    def __init__(
        self,
        dataset: ChatDataset,
        *,
        batch_size: int,
        num_replicas: int,
        rank: int,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        require_at_least(batch_size=(batch_size, 1), seed=(seed, 0))
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)
        self.dataset_size = len(dataset)
        self.batch_size = batch_size
        self.start_batch = 0
        """Batches the next iteration leaves out; it applies once, and ``len()`` does not change."""
        self.epoch_offset = 0
        """Added to the epoch that ``set_epoch`` announces."""

    @property
    def global_batch_size(self) -> int:
        """Samples of a full batch over all ranks."""
        return self.num_replicas * self.batch_size

    @property
    def num_batches(self) -> int:
        """Batches an epoch has, on every rank."""
        return math.ceil(self.dataset_size / self.global_batch_size)

    def __len__(self) -> int:
        """Indices this rank yields in a whole epoch, blank ones included."""
        full_batches, tail = divmod(self.dataset_size, self.global_batch_size)
        own_tail = max(1, len(range(self.rank, tail, self.num_replicas))) if tail else 0
        return full_batches * self.batch_size + own_tail

    def __iter__(self) -> Iterator[int]:
        start, self.start_batch = self.start_batch, 0
        order: Sequence[int] = range(self.dataset_size)
        if self.shuffle:
            # Not a torch.Generator: its manual_seed keeps 32 bits, and seed + epoch would repeat the next seed's
            # orders.
            order = (
                np.random.default_rng([self.seed, self.epoch + self.epoch_offset])
                .permutation(self.dataset_size)
                .tolist()
            )
        for first in range(start * self.global_batch_size, self.dataset_size, self.global_batch_size):
            own = order[first : first + self.global_batch_size][self.rank :: self.num_replicas]
            yield from own or [self.dataset_size]

    def identity(self) -> dict[str, int]:
        """What must not change between a checkpoint and its resume for the order to go on."""
        return {"global_batch_size": self.global_batch_size, "dataset_size": self.dataset_size, "seed": self.seed}


class ResumableDataLoader(DataLoader[Sample]):
    """A ``DataLoader`` whose place in the epoch goes into Lightning's checkpoints and comes back from them.

    The place is what the training loop has *processed*, not what workers have prefetched, counted in samples over all
    ranks, so that a run continues on another number of ranks with the same global batch. The state holds the epoch too:
    with ``max_steps``, Lightning 2.6 counts one epoch too many after a resume from a checkpoint written at the end of
    an epoch or of the run, and the order must not skip one.

    The order is drawn when the first batch is asked for and not before, because Lightning calls ``iter()`` first and
    ``set_epoch`` after it: workers would start on the order of the wrong epoch.

    Args:
        dataset: The samples.
        sampler: Their order on this rank; its batch size is the loader's.
        collate_fn: Makes a batch from samples.
        batches_done: Returns how many batches of the epoch are trained on; ``sampler.num_batches`` or more once the
            loop will take no more of them.
        num_workers: Loader processes; 0 loads in the training process.
    """

    def __init__(
        self,
        dataset: ChatDataset,
        sampler: GlobalBatchSampler,
        collate_fn: Callable[[list[Sample]], Batch | PackedBatch],
        batches_done: Callable[[], int],
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            dataset,
            batch_size=sampler.batch_size,
            sampler=sampler,
            collate_fn=collate_fn,
            num_workers=num_workers,
            # Each iterator draws a seed for its workers; from the global generator, that would shift the model's
            # dropout.
            generator=torch.Generator().manual_seed(sampler.seed),
        )
        self.order = sampler
        self.batches_done = batches_done
        self._drawn_epoch = 0
        self._resume_epoch: int | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch declares a private iterator class
        if self._resume_epoch is not None:
            self.order.epoch_offset = self._resume_epoch - self.order.epoch
            self._resume_epoch = None
        self._drawn_epoch = self.order.epoch + self.order.epoch_offset
        yield from super().__iter__()

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and the first sample of its order that is not trained on, with what they are valid for."""
        if self._resume_epoch is not None:  # loaded and not yet iterated
            epoch, batches = self._resume_epoch, self.order.start_batch
        else:
            epoch, batches = self._drawn_epoch, self.batches_done()
        if batches >= self.order.num_batches:
            epoch, batches = epoch + 1, 0
        return {"epoch": epoch, "next_sample": batches * self.order.global_batch_size, **self.order.identity()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue there with the next iteration.

        Raises:
            ValueError: If the global batch size, the data set's length or the seed is another.
        """
        refuse_changes(state_dict, self.order.identity())
        self._resume_epoch = state_dict["epoch"]
        self.order.start_batch = state_dict["next_sample"] // self.order.global_batch_size


def refuse_changes(saved: Mapping[str, object], current: Mapping[str, object]) -> None:
    """Raise if a checkpoint was made for other data or another order than this run has."""
    changed = [f"{key} {saved.get(key)} -> {value}" for key, value in current.items() if saved.get(key) != value]
    if changed:
        raise ValueError(
            f"the checkpoint's place in the data does not fit this run ({', '.join(changed)}): samples would be "
            "repeated or left out; resume with the same data, seq_len, packing, seed and batch_size * devices, or "
            "start a new run"
        )


def require_at_least(**values_and_least: tuple[int, int]) -> None:
    for name, (value, least) in values_and_least.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
