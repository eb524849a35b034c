"""Chats with images in, batches for a vision-language model out.

What :mod:`~lightning_qlora.modules.data.data_module` says of order, ranks and restarts holds here too. Beside it,

* text-only samples and samples of one or many images are mixed in a batch, and nothing stands in for a missing image;
* the samples of a global batch cost about the same, counted in tokens and positions of the vision tower, so that no
  rank waits long for another (:class:`~lightning_qlora.modules.data.sampler.CostGroupedSampler`);
* all images are decoded once before training, so that a damaged one is found then.
"""

from __future__ import annotations

import hashlib
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from lightning.pytorch.utilities import rank_zero_info
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ..options import at_least
from .checks import BadRows
from .data_module import ChatDataModule, Part
from .dataset import SampleDataset
from .digits import DIGITS, digit_chats
from .image_collator import ImageCollator
from .image_processors import load_image_processing, with_chat_template
from .image_rows import to_image_chat
from .image_template import ImageLimits, OversizedImages, tokenize_image_chats
from .images import ImageTable
from .options import DataOptions
from .preview import SamplePreview
from .sampler import CostGroupedSampler, GlobalBatchSampler
from .samples import Collator, Sample
from .sources import Placed, Source, numbered, read_rows, say_unused
from .vocabulary import check_token_ids, choose_pad_token_id

#: Images that take longer to decode than a user waits without a word.
_MANY = 2000


@dataclass(frozen=True)
class ImageOptions:
    """Images.

    Args:
        image_folder: What relative paths of images are relative to. Default: the folder of the data file.
        max_image_size: Pixels of an image's longer side; larger images are shrunk, with their aspect. Fewer pixels are
            fewer tokens and less memory in most models. Default: what the model's image processor takes.
        max_image_pixels: Pixels of an image in all; larger images are shrunk, with their aspect.
        oversized_images: What to do with a sample that seq_len would cut inside an image: refuse it, or shrink its
            images until they fit.
        image_workers: Processes that decode images while the model computes. Default: 4 per GPU, none on a CPU.

    Raises:
        ValueError: For values out of range.
    """

    image_folder: Path | None = None
    max_image_size: int | None = None
    max_image_pixels: int | None = None
    oversized_images: OversizedImages = "refuse"
    image_workers: int | None = None

    def __post_init__(self) -> None:
        at_least(1, max_image_size=self.max_image_size or 1, max_image_pixels=self.max_image_pixels or 1)
        at_least(0, image_workers=self.image_workers or 0)
        if 0 in (self.max_image_size, self.max_image_pixels):
            raise ValueError("--max_image_size and --max_image_pixels must be at least 1.")
        if self.oversized_images not in get_args(OversizedImages):
            raise ValueError(f"--oversized_images must be 'refuse' or 'shrink', got {self.oversized_images!r}.")

    @property
    def limits(self) -> ImageLimits:
        """How large images may be."""
        return ImageLimits(self.max_image_size, self.max_image_pixels, self.oversized_images)

    @property
    def workers(self) -> int:
        """Loader processes."""
        return (4 if torch.cuda.is_available() else 0) if self.image_workers is None else self.image_workers


class VisionDataModule(ChatDataModule):
    """Train and validation batches of chats with images, as :class:`ChatDataModule` makes them of texts.

    Batches are those of :class:`~lightning_qlora.modules.data.image_collator.ImageCollator`.

    Args:
        directory: Of the model, with its image processor.
        config: The model's.
        tokenizer: The model's, a fast one. It is not changed.
        options: What to read; also ``sklearn-digits``.
        images: How images are read, and how large they may be.
        batch_size, seq_len, seed, pad_to_multiple_of: As for :class:`ChatDataModule`.

    Raises:
        ValueError: For arguments out of range, or a model whose images, tokens and chat template do not fit together.
    """

    def __init__(
        self,
        directory: str | Path,
        config: PretrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        options: DataOptions = DataOptions(dataset=DIGITS),  # noqa: B008  frozen
        images: ImageOptions = ImageOptions(),
        *,
        batch_size: int,
        seq_len: int,
        seed: int = 0,
        pad_to_multiple_of: int | None = None,
    ) -> None:
        text = config.get_text_config()
        super().__init__(
            with_chat_template(directory, tokenizer), options, batch_size=batch_size, seq_len=seq_len, seed=seed,
            num_workers=images.workers, pad_to_multiple_of=pad_to_multiple_of,
            max_position_embeddings=getattr(text, "max_position_embeddings", None),
        )  # fmt: skip
        self.image_options = images
        self.processing = load_image_processing(directory, config, self.tokenizer)
        self.vocab_size = self.processing.embedding_rows
        self.table = ImageTable()
        """All images of the data, each once."""
        self.num_shrunk = 0
        """Images that are made smaller than they are, over all samples."""
        self.image_tokens: list[int] = []
        """For each sample with images, how many of its tokens are an image's."""
        self._costs: list[int] = []

    def _choose_pad_token_id(self) -> int:
        return choose_pad_token_id(
            self.tokenizer, pad_token=self.options.pad_token, vocab_size=self.vocab_size,
            taken=self.processing.never_trained,
        )  # fmt: skip

    def _make_collator(self, pad_token_id: int) -> Collator:
        return ImageCollator(self.processing, self.table, pad_token_id, self.pad_to_multiple_of)

    def _preview(self, sample: Sample) -> SamplePreview:
        return SamplePreview.of(sample, self.tokenizer, repeated=self.processing.image_token_id)

    def _open(self, dataset: str, subset: str | None = None) -> Source:
        if dataset != DIGITS:
            return super()._open(dataset, subset)
        if subset is not None:
            raise ValueError(f"{dataset} has no subsets; leave --subset out")
        return Source(
            dataset,
            {
                "train": lambda: numbered(digit_chats("train")),
                "validation": lambda: numbered(digit_chats("validation")),
            },
        )

    def _read(self) -> tuple[Part, Part]:
        self.num_shrunk, self.image_tokens = 0, []
        return super()._read()

    def _read_rows(self, source: Source, split: str) -> Placed[Any]:
        """Read rows, and decode their images once."""
        unused, skip = dict[str, None](), self.options.skip_bad_rows
        folder = self._folder(source)
        rows, places = read_rows(source, split, skip, lambda row: to_image_chat(row, unused, folder))
        say_unused(source, unused)
        images = [image for _, held in rows for image in held]
        if len(images) > _MANY:
            rank_zero_info(f"{source.name}: decoding {len(images)} images once, to find damaged ones before training.")
        found = iter(self.table.check(images))
        bad = BadRows(source.name, skip)
        kept = Placed[Any]([], [])
        for (chat, held), place in zip(rows, places, strict=True):
            results = [next(found) for _ in held]
            errors = [result for result in results if isinstance(result, ValueError)]
            if errors:
                bad.add(place, errors[0])
                continue
            kept.rows.append({**chat, "images": [str(digest) for digest in results]})
            kept.places.append(place)
        bad.settle(len(rows))
        return kept

    def _folder(self, source: Source) -> Path:
        if self.image_options.image_folder is not None:
            return self.image_options.image_folder
        path = Path(source.name)
        return path if path.is_dir() else path.parent

    def _tokenize(self, source: Source, read: Placed[Any]) -> Part:
        made = tokenize_image_chats(
            self.processing, read.rows, self.table, self.seq_len, limits=self.image_options.limits,
            train_on=self.options.train_on, date=self.date, places=read.places,
            bad=BadRows(source.name, self.options.skip_bad_rows),
        )  # fmt: skip
        check_token_ids(made.samples, self.tokenizer, self.processing.embedding_rows)
        self.num_shrunk += made.num_shrunk
        self.image_tokens += made.image_tokens
        chats = [read.rows[index] for index in made.kept]
        return Part(made.samples, chats, made.num_truncated, made.num_dropped, made.turn_ends)

    def _hold(self, train: Part, val: Part) -> None:
        super()._hold(train, val)
        self._costs = [sample["cost"] for sample in train.samples]
        content = [digest for chat in train.chats for digest in chat.get("images", [])]
        self.fingerprint = hashlib.sha256("".join([self.fingerprint, *content]).encode()).hexdigest()

    def _sampler(self, dataset: SampleDataset, shuffle: bool = True) -> GlobalBatchSampler:
        plain = super()._sampler(dataset, shuffle)
        if not shuffle:
            return plain
        return CostGroupedSampler(
            dataset, self._costs, batch_size=self.batch_size, num_replicas=plain.num_replicas, rank=plain.rank,
            seed=self.seed,
        )  # fmt: skip

    @property
    def image_patches(self) -> int:
        """Positions of the vision tower in the largest batch of one rank, for planning its memory."""
        train_set, val_set = self._loaded()
        patches = [row["cost"] - len(row["input_ids"]) for dataset in (train_set, val_set) for row in dataset.rows]
        return sum(sorted(patches)[-self.batch_size :])

    def image_figures(self) -> dict[str, Any]:
        """How many images there are, and how many tokens they take; empty for data without any."""
        if not self.image_tokens:
            return {}
        tokens = self.image_tokens
        return {
            "images": len(self.table.images),
            "samples_with_images": len(tokens),
            "images_shrunk": self.num_shrunk,
            "image_tokens": {"min": min(tokens), "median": statistics.median(tokens), "max": max(tokens)},
            "image_share_of_seq_len": statistics.median(tokens) / self.seq_len,
        }

    def report_section(self) -> dict[str, Any] | None:
        """As of :class:`ChatDataModule`, with :meth:`image_figures` and what was done to images."""
        section = super().report_section()
        return None if section is None else {**section, **self.image_figures(), "image_changes": self.table.changes()}

    def _summary(self, origin: str) -> str:
        text = super()._summary(origin)
        if not (figures := self.image_figures()):
            return f"{text}. None has an image"
        tokens = figures["image_tokens"]
        shares = ", ".join(f"{count / self.seq_len:.0%}" for count in tokens.values())
        notes = [f"{self.num_shrunk} shrunk"] if self.num_shrunk else []
        notes += [f"{count} {change}" for change, count in self.table.changes().items()]
        noted = f" ({', '.join(notes)})" if notes else ""
        return (
            f"{text}. {figures['images']} images{noted} in "
            f"{figures['samples_with_images']} samples, which take {tokens['min']} to {tokens['max']} tokens of a "
            f"sample, median {tokens['median']:g} (min, median, max: {shares} of seq_len={self.seq_len})"
        )
