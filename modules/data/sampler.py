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
