"""A loader that resumes in the middle of an epoch."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from .checks import refuse_changes
from .sampler import GlobalBatchSampler
from .samples import Collator, Sample


class ResumableDataLoader(DataLoader[Sample]):
    """A ``DataLoader`` whose place in the epoch goes into Lightning's checkpoints and comes back from them.

    The place is what the training loop has *processed*, not what workers have prefetched, counted in samples over all
    ranks, so that a run continues on another number of ranks with the same global batch. The state holds the epoch too:
    with ``max_steps``, Lightning 2.6 counts one epoch too many after a resume from a checkpoint written at the end of
    an epoch or of the run, and the order must not skip one.

    The order is drawn when the first batch is asked for and not before, because Lightning calls ``iter()`` first and
    ``set_epoch`` after it: workers would start on the order of the wrong epoch.

    Args:
        dataset: The samples; at the index of its length, a blank one.
        sampler: Their order on this rank; its batch size is the loader's.
        collate_fn: Makes a batch from samples.
        batches_done: Returns how many batches of the epoch are trained on; ``sampler.num_batches`` or more once the
            loop will take no more of them.
        num_workers: Loader processes; 0 loads in the training process.
    """

    def __init__(
        self,
        dataset: Dataset[Sample],
        sampler: GlobalBatchSampler,
        collate_fn: Collator,
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
