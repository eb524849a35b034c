"""What every data module here does with its samples, whatever they are: deal, load, resume."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from .checks import refuse_changes
from .dataset import SampleDataset
from .loader import ResumableDataLoader
from .sampler import GlobalBatchSampler
from .samples import Collator, Sample


class ResumableDataModule(L.LightningDataModule):
    """Base of data modules whose order of batches is one for any number of ranks, and goes on after a restart.

    A subclass defines :meth:`load`, which sets ``train_set``, ``val_set``, ``collator``, ``num_train`` and
    ``fingerprint``.

    Args:
        batch_size: Rows of one batch on one device.
        seed: Seed of the training order.
        num_workers: Loader processes for each loader.
    """

    def __init__(self, *, batch_size: int, seed: int, num_workers: int) -> None:
        super().__init__()
        self.batch_size, self.seed, self.num_workers = batch_size, seed, num_workers
        self.train_set: SampleDataset | None = None
        self.val_set: SampleDataset | None = None
        self.collator: Collator
        self.num_train = 0
        """Samples to train on, packed or not."""
        self.num_val = 0
        """Samples to validate on, packed or not."""
        self.fingerprint = ""
        """SHA-256 of the training set."""

    def load(self) -> None:
        """Read and check the data, once; a second call does nothing."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Lightning's hook, run on every rank."""
        self.load()

    def steps_per_epoch(self, devices: int, accumulate: int = 1) -> int:
        """Optimizer steps in which all training samples are used once.

        Args:
            devices: Number of ranks.
            accumulate: Micro-batches per step. The last step of an epoch may have fewer.
        """
        train_set, _ = self._loaded()
        return math.ceil(math.ceil(len(train_set) / (self.batch_size * devices)) / accumulate)

    def batches_in(self, steps: int, devices: int, accumulate: int = 1) -> int:
        """Micro-batches per rank of ``steps`` optimizer steps.

        The last step of an epoch has what is left, which may be all of an epoch. That is said.
        """
        train_set, _ = self._loaded()
        per_epoch = math.ceil(len(train_set) / (self.batch_size * devices))
        if accumulate > per_epoch:
            rank_zero_info(
                f"The data are {per_epoch} micro-batches per device, fewer than --accumulate={accumulate}: every step "
                f"has {per_epoch}, all of the data."
            )
        epochs, rest = divmod(steps, self.steps_per_epoch(devices, accumulate))
        return epochs * per_epoch + rest * accumulate

    def train_dataloader(self) -> DataLoader[Sample]:
        """Return the loader of this rank's training batches.

        For ``Trainer(overfit_batches=...)``, which puts a sampler of its own into it, one that does not resume.
        """
        dataset = self._loaded()[0]
        if getattr(self.trainer, "overfit_batches", 0):  # Lightning sets it without declaring it
            return self._in_fixed_order(dataset)
        return ResumableDataLoader(dataset, self._sampler(dataset), self.collator, self._batches_done, self.num_workers)

    def val_dataloader(self) -> DataLoader[Sample] | list[DataLoader[Sample]]:
        """Return the loader of this rank's held-out batches, in fixed order; an empty list if nothing is held out."""
        dataset = self._loaded()[1]
        return self._in_fixed_order(dataset) if len(dataset) else []

    def _in_fixed_order(self, dataset: SampleDataset) -> DataLoader[Sample]:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=self._sampler(dataset, shuffle=False),
            collate_fn=self.collator,
            num_workers=self.num_workers,
            generator=torch.Generator().manual_seed(self.seed),  # as in ResumableDataLoader
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what the data are, for the check at resume; Lightning stores it in every checkpoint."""
        return self._identity()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that a checkpoint was made with these data.

        Raises:
            ValueError: If the training samples, the seed or the global batch size are others.
        """
        refuse_changes(state_dict, self._identity())

    def _identity(self) -> dict[str, Any]:
        return {**self._sampler(self._loaded()[0]).identity(), "fingerprint": self.fingerprint}

    def _loaded(self) -> tuple[SampleDataset, SampleDataset]:
        self.load()
        assert self.train_set is not None
        assert self.val_set is not None
        return self.train_set, self.val_set

    def _sampler(self, dataset: SampleDataset, shuffle: bool = True) -> GlobalBatchSampler:
        world_size, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        return GlobalBatchSampler(
            dataset, batch_size=self.batch_size, num_replicas=world_size, rank=rank, shuffle=shuffle, seed=self.seed
        )

    def _batches_done(self) -> int:
        """Batches of the epoch that are trained on; more than there are once the loop has taken its last."""
        if self.trainer is None:
            return 0
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        # `processed` and not `ready`: a checkpoint written while a batch is in flight (on an exception, say) makes
        # Lightning do that batch again. `completed` lags by one in on_train_batch_end, where most checkpoints are
        # written.
        done: int = progress.current.processed  # type: ignore[attr-defined]  # declared as the tracker's base class
        # With limit_train_batches the last one comes early; num_train batches are past the end in any case.
        return self.num_train if progress.is_last_batch and done == progress.current.ready else done


def digests(rows: Sequence[Mapping[str, Any]]) -> list[bytes]:
    """SHA-256 of each row of JSON types."""
    return [hashlib.sha256(json.dumps(row, sort_keys=True).encode()).digest() for row in rows]


def smallest(rows: Sequence[Mapping[str, Any]], most: int) -> list[bool]:
    """Mark at most ``most`` rows: those of the smallest SHA-256, each with its repetitions or not at all."""
    found = digests(rows)
    chosen = set()
    for digest, repetitions in sorted(Counter(found).items()):
        if repetitions <= most:
            chosen.add(digest)
            most -= repetitions
    return [digest in chosen for digest in found]
