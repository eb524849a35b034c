"""The order of samples: one for any number of ranks, of which each takes its part."""

import math
from collections.abc import Iterator, Sequence, Sized

import numpy as np
from torch.utils.data import DistributedSampler

from .checks import require_at_least


class GlobalBatchSampler(DistributedSampler[int]):
    """Deal the samples of each global batch to the ranks, one by one.

    Global batch k is items ``[k * G, (k + 1) * G)`` of the epoch's order, G = ``num_replicas * batch_size``, and rank r
    takes every ``num_replicas``-th item of it from r on. The order depends on ``seed`` and the epoch only, so that the
    same G gives the same global batches for any number of ranks. The last global batch of an epoch may be short:
    nothing is repeated or dropped. A rank that would get nothing of it yields the index ``len(dataset)``, for which the
    data set must have a blank sample, as :class:`ChatDataset` does.

    It feeds a ``DataLoader`` that has the same ``batch_size`` and ``drop_last=False``. Being a ``DistributedSampler``,
    Lightning keeps it as it is and calls :meth:`set_epoch`.

    Args:
        dataset: What the indices point into; only its length is read.
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
        dataset: Sized,
        *,
        batch_size: int,
        num_replicas: int,
        rank: int,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        require_at_least(batch_size=(batch_size, 1), seed=(seed, 0))
        # DistributedSampler asks for a Dataset, but reads its length alone.
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self.batch_size = batch_size
        self.start_batch = 0
        """Batches the next iteration leaves out; it applies once, and ``len()`` does not change."""
        self.epoch_offset = 0
        """Added to the epoch that ``set_epoch`` announces."""

    @property
    def dataset_size(self) -> int:
        """Samples of the data set, the blank one excluded."""
        return len(self.dataset)  # type: ignore[arg-type]

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
            order = self._draw(np.random.default_rng([self.seed, self.epoch + self.epoch_offset]))
        for first in range(start * self.global_batch_size, self.dataset_size, self.global_batch_size):
            own = order[first : first + self.global_batch_size][self.rank :: self.num_replicas]
            yield from own or [self.dataset_size]

    def _draw(self, random: np.random.Generator) -> Sequence[int]:
        """The order of an epoch: each index once."""
        return random.permutation(self.dataset_size).tolist()  # type: ignore[no-any-return]

    def identity(self) -> dict[str, int]:
        """What must not change between a checkpoint and its resume for the order to go on."""
        return {"global_batch_size": self.global_batch_size, "dataset_size": self.dataset_size, "seed": self.seed}


class CostGroupedSampler(GlobalBatchSampler):
    """A :class:`GlobalBatchSampler` whose global batches hold samples of about equal cost.

    A rank waits for the slowest of all in each batch, and a batch is padded to its longest sample. So each epoch's
    random order is cut into windows of some global batches, the samples of a window are sorted by their cost and cut
    into batches, and the batches are shuffled. A sample is at most a window away from where chance put it.

    Args:
        costs: Of each sample of the data set, in any unit.
        window: Global batches that are sorted together.
        dataset, batch_size, num_replicas, rank, seed: As for :class:`GlobalBatchSampler`.

    Raises:
        ValueError: As :class:`GlobalBatchSampler`, or for a window below 1.
    """

    def __init__(
        self,
        dataset: Sized,
        costs: Sequence[int],
        *,
        batch_size: int,
        num_replicas: int,
        rank: int,
        seed: int = 0,
        window: int = 32,
    ) -> None:
        require_at_least(window=(window, 1))
        super().__init__(dataset, batch_size=batch_size, num_replicas=num_replicas, rank=rank, seed=seed)
        self.costs, self.window = costs, window

    def _draw(self, random: np.random.Generator) -> Sequence[int]:
        order, size = super()._draw(random), self.global_batch_size
        batches: list[Sequence[int]] = []
        for first in range(0, len(order), self.window * size):
            # A stable sort of a random order: samples of equal cost meet others in each epoch.
            group = sorted(order[first : first + self.window * size], key=lambda index: self.costs[index])
            batches += [group[start : start + size] for start in range(0, len(group), size)]
        # The short batch stays at the end, where the ranks expect it. Its samples are the most costly of their window.
        short = [batches.pop()] if len(batches[-1]) < size else []
        return [index for batch in (*(batches[i] for i in random.permutation(len(batches))), *short) for index in batch]
