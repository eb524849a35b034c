"""Chats in, batches out: reading, tokenizing with the loss on completions only, and an order that survives a restart.

Three properties hold together and are what the training loop stands on:

* **The order depends on (seed, epoch) alone.** Global batch k holds the same samples in the same order on one device
  and on eight, so that losses can be compared step by step (:class:`GlobalBatchSampler`).
* **Every rank takes the same number of steps.** Where the end of an epoch leaves a rank without a sample, it gets a
  blank one that adds nothing to the loss, so that collectives stay in step.
* **A restart continues with the next sample that was not trained on**, whatever had been prefetched
  (:class:`ResumableDataLoader`).

With packing, what is ordered, dealt and resumed are packs: rows of several samples, each a *document* that attends to
itself alone.

Shapes: B = samples (or packs) in a batch of one rank, S = the longest of the batch, rounded up.
"""

import copy
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from itertools import compress, pairwise
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .chat_template import tokenize_chats
from .checks import BadRows, refuse_changes, require_at_least
from .collators import ChatCollator, PackedCollator, join_samples
from .dataset import ChatDataset, SampleDataset
from .named_templates import read_chat_template
from .options import DataOptions
from .packing import pack_samples
from .preview import SamplePreview, print_previews
from .rendering import date_parts
from .resumable import ResumableDataModule, digests, smallest
from .samples import Chat, Collator, Sample
from .sources import Placed, Source, open_source, read_chats
from .tool_formats import with_tools
from .vocabulary import check_token_ids, choose_pad_token_id


@dataclasses.dataclass(frozen=True)
class Part:
    """Samples to train or to validate on, each with its chat."""

    samples: list[Any]
    chats: list[Any]
    num_truncated: int = 0
    num_dropped: int = 0
    turn_ends: tuple[int, ...] = ()
    origin: str = "held out"
    """Of validation samples: where they are from."""

    def only(self, chosen: Sequence[bool]) -> "Part":
        """Those that are chosen, without the counts."""
        return Part([*compress(self.samples, chosen)], [*compress(self.chats, chosen)])


class ChatDataModule(ResumableDataModule):
    """Train and validation batches of chats, with the loss on completions only.

    ``load()`` does all the reading and checking and needs no Trainer: call it before building a model, so that bad data
    is refused in seconds. Validation uses ``val_dataset``, or else the split ``validation`` of the data, or else chats
    that are held out of them. The held-out chats are those whose SHA-256 is smallest: the choice depends on the texts
    alone, not on their order, the seed or the number of devices, and no text is in both parts. At most a tenth of the
    data is held out; a text that is repeated more often than that is trained on.

    A chat template may write the date. All ranks and every resumed run use the date of the first run, which is kept in
    checkpoints.

    With ``packing``, batches are :class:`PackedBatch`, for models that keep documents apart (``QLoRACausalLM`` does).
    The samples of both parts are packed once, by :func:`~lightning_qlora.modules.data.packing.pack_samples`; the packs
    are shuffled in each epoch. The loss of an epoch is that of the unpacked samples, in other batches.

    Args:
        tokenizer: A fast tokenizer, or a directory or hub name that has one. It is not changed: with another chat
            template, :attr:`tokenizer` is a copy. So it is where chats have tools and the template ignores them: see
            :func:`~lightning_qlora.modules.data.tool_formats.with_tools`.
        dataset: Anything :func:`load_chats` reads; or
            :class:`~lightning_qlora.modules.data.options.DataOptions`, which also say what to validate on, what to
            train of a chat, and how to write it.
        batch_size: Samples of one batch on one device; with ``packing``, packs.
        seq_len: Tokens kept of a sample; longer ones lose their end.
        packing: Fill rows of at most ``seq_len`` tokens with samples.
        seed: Seed of the training order.
        num_workers: Loader processes for each loader.
        pad_to_multiple_of: Batches are as long as their longest sample, rounded up to a multiple of this; default 8.
        collate_fn: Makes batches instead of :class:`ChatCollator` or, with ``packing``, :class:`PackedCollator`, and
            does all the padding. It gets a list of B samples (:class:`Sample`; with ``packing``, packs, which have
            ``document_lengths``) and returns a dict. Each sample must be in one row of the batch, in the order of the
            list. For ``QLoRACausalLM`` the dict holds

            * ``input_ids`` and ``labels``, int64 [B, S], padded on the right; labels are not shifted, and
              ``IGNORE_INDEX`` (-100) where no loss is taken;
            * ``num_loss_tokens``, a Python int: how many of ``labels[:, 1:]`` are not ``IGNORE_INDEX``. The loss of a
              step is divided by the sum of these, so a wrong count gives a wrong loss;
            * with ``packing``, ``position_ids`` and ``document_lengths`` as in :class:`PackedBatch`;
            * ``num_tokens``, a Python int, if tokens per second are to leave out the padding.

            What else the model's forward takes may be added. A blank sample (one token without a label) stands in for
            a rank's missing part of the last batch; its batch must have no loss tokens. :func:`choose_pad_token_id`
            gives the token to pad with. With ``num_workers`` the function must be picklable where processes are
            spawned.
        max_position_embeddings: The model's; longer samples are warned of. ``None`` is no limit.
        vocab_size: Rows of the model's embedding; tokens beyond are refused. ``None`` does not check.

    Raises:
        ValueError: For arguments out of range, or ``pad_to_multiple_of`` beside a ``collate_fn``, which would not know
            of it.
    """

    report_key = "data"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | str | Path,
        dataset: str | Path | DataOptions = DataOptions(),  # noqa: B008  frozen
        *,
        batch_size: int,
        seq_len: int,
        packing: bool = False,
        seed: int = 0,
        num_workers: int = 0,
        pad_to_multiple_of: int | None = None,
        collate_fn: Collator | None = None,
        max_position_embeddings: int | None = None,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        if collate_fn is not None and pad_to_multiple_of is not None:
            raise ValueError(
                f"pad_to_multiple_of={pad_to_multiple_of} has no effect on your collate_fn, which does the padding; "
                "leave pad_to_multiple_of out and round up in collate_fn"
            )
        pad_to_multiple_of = 8 if pad_to_multiple_of is None else pad_to_multiple_of
        require_at_least(
            batch_size=(batch_size, 1),
            seq_len=(seq_len, 2),
            seed=(seed, 0),
            num_workers=(num_workers, 0),
            pad_to_multiple_of=(pad_to_multiple_of, 1),
        )
        self.options = dataset if isinstance(dataset, DataOptions) else DataOptions(str(dataset))
        if isinstance(tokenizer, str | Path):
            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        self.tokenizer = tokenizer
        if self.options.chat_template is not None:
            self.tokenizer = copy.deepcopy(tokenizer)
            self.tokenizer.chat_template = read_chat_template(self.options.chat_template, tokenizer)
        self.seq_len = seq_len
        self.packing = packing
        self.pad_to_multiple_of = pad_to_multiple_of
        self.collate_fn = collate_fn
        self.max_position_embeddings = max_position_embeddings
        self.vocab_size = vocab_size
        self.val_chats: list[Chat] = []
        """The chats to validate on as text, e.g. for answers before and after training."""
        self.num_dropped = 0
        """Samples left out because ``seq_len`` cuts their completions away."""
        self.num_truncated = 0
        """Samples, train and held out, that lost tokens at the end."""
        self.fill: float | None = None
        """With packing, the part of ``seq_len`` tokens that a training pack holds, on average."""
        self.turn_ends: tuple[int, ...] = ()
        """Tokens that end the trained turns: the model learns to stop with them."""
        self.date: dict[str, str] = {}
        """What the chat template writes of the date, by directives of ``strftime``; empty if it writes none."""
        self.previews: list[SamplePreview] = []
        """The samples that ``show_samples`` asks for."""

    def load(self) -> None:
        """Read, check, tokenize and split the data, once; a second call does nothing.

        Raises:
            ValueError: As :func:`load_chats`, :func:`tokenize_chats`, :func:`choose_pad_token_id` and
                :func:`check_token_ids` do.
        """
        if self.train_set is not None:
            return
        pad_token_id = self._choose_pad_token_id()
        self.date = date_parts(self.tokenizer.get_chat_template()) if self.tokenizer.chat_template else {}
        train, val = self._read()
        self.val_set, self.train_set = self._empty_set(pad_token_id), self._empty_set(pad_token_id)
        self._hold(train, val)
        self.collator = self.collate_fn or self._make_collator(pad_token_id)
        rank_zero_info(self._summary(val.origin))
        samples = [*train.samples, *val.samples]
        longest = max(max(sample.get("document_lengths", [len(sample["input_ids"])])) for sample in samples)
        if self.max_position_embeddings is not None and longest > self.max_position_embeddings:
            rank_zero_warn(
                f"The longest sample has {longest} tokens, but the model's config.json says "
                f"max_position_embeddings={self.max_position_embeddings}: it has seen no positions beyond. With a "
                "seq_len of that, such samples lose their end."
            )
        self.previews = [self._preview(each) for each in train.samples[: self.options.show_samples]]
        rank_zero_only(print_previews)(self.previews)

    # What a subclass with other rows (data/preference.py, data/vision.py) defines anew:

    def _open(self, dataset: str, subset: str | None = None) -> Source:
        return open_source(dataset, subset)

    def _read_rows(self, source: Source, split: str) -> Placed[Any]:
        return read_chats(source, split, self.options.skip_bad_rows)

    def _empty_set(self, pad_token_id: int) -> SampleDataset:
        return ChatDataset([], pad_token_id)

    def _choose_pad_token_id(self) -> int:
        return choose_pad_token_id(self.tokenizer, pad_token=self.options.pad_token, vocab_size=self.vocab_size)

    def _make_collator(self, pad_token_id: int) -> Collator:
        return (PackedCollator if self.packing else ChatCollator)(pad_token_id, self.pad_to_multiple_of)

    def _preview(self, sample: Sample) -> SamplePreview:
        return SamplePreview.of(sample, self.tokenizer)

    def _to_rows(self, train: list[Any], val: list[Any]) -> tuple[list[Any], list[Any]]:
        """What the data sets hold of these samples, packed if they shall be."""
        if not self.packing:
            return train, val
        rows, val_rows = pack_chats(train, self.seq_len), pack_chats(val, self.seq_len)
        self.fill = sum(len(pack["input_ids"]) for pack in rows) / (len(rows) * self.seq_len)
        return rows, val_rows

    # --- reading -----------------------------------------------------------------------------------------------------

    def _read(self) -> tuple[Part, Part]:
        """Read and tokenize what to train and what to validate on."""
        options = self.options
        source = self._open(options.dataset, options.subset)
        train = self._tokenize(source, self._read_rows(source, options.split))
        if options.val_dataset is not None:
            other = self._open(options.val_dataset)
            split = next(split for split in ("validation", "train", *other.splits) if split in other.splits)
            val = self._tokenize(other, self._read_rows(other, split))
            val = dataclasses.replace(val, origin=f"of {other.name} to validate on")
        elif "validation" in source.splits and options.split != "validation" and options.val_samples:
            read = self._read_rows(source, "validation")
            chosen = smallest(read.rows, min(options.val_samples, len(read.rows)))
            val = self._tokenize(source, read.only(chosen))
            val = dataclasses.replace(
                val, origin=f"to validate on, of the {len(read.rows)} rows of its split validation"
            )
        else:
            most = min(options.val_samples, len(train.samples) // 10)
            held_out = smallest(train.chats, most)
            val = train.only(held_out)
            counts = {name: getattr(train, name) for name in ("num_truncated", "num_dropped", "turn_ends")}
            train = dataclasses.replace(train.only([not out for out in held_out]), **counts)
            if most and not val.samples:
                rank_zero_info(
                    f"nothing is held out: every text is there more than {most} times, and its repetitions stay "
                    "together"
                )
            return train, val
        known = set(digests(train.chats))
        if shared := sum(digest in known for digest in digests(val.chats)):
            rank_zero_warn(
                f"{shared} of the {len(val.chats)} samples to validate on are also trained on: val_loss will be lower "
                "than it is for new texts."
            )
        return train, val

    def _tokenize(self, source: Source, read: Placed[Any]) -> Part:
        if any("tools" in chat for chat in read.rows):
            self.tokenizer = with_tools(self.tokenizer)
        tokenized = tokenize_chats(
            self.tokenizer, read.rows, self.seq_len, train_on=self.options.train_on, date=self.date,
            places=read.places, bad=BadRows(source.name, self.options.skip_bad_rows),
        )  # fmt: skip
        if self.vocab_size is not None:
            check_token_ids(tokenized.samples, self.tokenizer, self.vocab_size)
        chats = [read.rows[index] for index in tokenized.kept]
        return Part(
            tokenized.samples, chats, tokenized.num_truncated, tokenized.num_dropped, tokenized.turn_ends
        )  # fmt: skip

    def _hold(self, train: Part, val: Part) -> None:
        """Put samples into the data sets, which loaders may have already, and note what is known of them."""
        train_set, val_set = self._loaded()
        self.val_chats = val.chats
        self.num_dropped = train.num_dropped + val.num_dropped
        self.num_truncated = train.num_truncated + val.num_truncated
        self.num_train, self.num_val = len(train.samples), len(val.samples)
        self.turn_ends = train.turn_ends
        rows, val_rows = self._to_rows(train.samples, val.samples)
        self.fingerprint = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        train_set.replace(rows)
        val_set.replace(val_rows)

    def _write_date(self, date: dict[str, str]) -> None:
        """Tokenize again with another date, if the chat template writes one and has written another."""
        self.load()
        if not date or date == self.date:
            return
        rank_zero_info(
            f"The chat template writes the date: it stays that of the first run ({' '.join(date.values())})."
        )
        self.date = date
        self._hold(*self._read())

    def report_section(self) -> dict[str, Any] | None:
        """For a run's report, under ``report_key``; ``None`` before :meth:`load`.

        ``train_samples``, ``val_samples``, ``truncated`` and ``dropped`` are the ``num_`` attributes; with packing
        there are also ``train_packs`` and ``val_packs``, the rows of both parts, and ``fill``; with ``show_samples``,
        ``samples``, each as a :class:`~lightning_qlora.modules.data.preview.SamplePreview`.
        """
        if self.train_set is None or self.val_set is None:
            return None
        section: dict[str, Any] = {
            "train_samples": self.num_train,
            "val_samples": self.num_val,
            "truncated": self.num_truncated,
            "dropped": self.num_dropped,
        }
        if self.packing:
            section |= {"train_packs": len(self.train_set), "val_packs": len(self.val_set), "fill": self.fill}
        if self.previews:
            section["samples"] = [dataclasses.asdict(preview) for preview in self.previews]
        return section

    def setup(self, stage: str) -> None:
        """Lightning's hook, run on every rank."""
        self.load()
        if self.date and self.trainer is not None and self.trainer.world_size > 1:
            # Ranks that started before and after midnight must not train on different texts.
            self._write_date(self.trainer.strategy.broadcast(self.date))

    def example(self) -> tuple[str, str] | None:
        """Return the last question and answer of the first held-out chat without tools; ``None`` if there is none."""
        self.load()
        for chat in self.val_chats:
            for answer, question in pairwise(chat["messages"][::-1]):
                if (answer["role"], question["role"]) == ("assistant", "user") and "tools" not in chat:
                    return question["content"], answer["content"]
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return what the data are, for the check at resume; Lightning stores it in every checkpoint."""
        return {**self._identity(), "date": self.date}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that a checkpoint was made with these data, after taking over the date that its texts have.

        Raises:
            ValueError: If the training samples, the seed or the global batch size are others.
        """
        self._write_date(state_dict.get("date", {}))
        refuse_changes(state_dict, self._identity())

    def _summary(self, origin: str) -> str:
        train_set, val_set = self._loaded()
        text = f"{self.options.dataset}: {self.num_train} samples to train on, {self.num_val} {origin}"
        if self.num_truncated or self.num_dropped:
            text += (
                f"; seq_len={self.seq_len} cut the end of {self.num_truncated} of them, and {self.num_dropped} more "
                "are left out, because it cut away what there was to learn"
            )
        if self.fill is not None:
            text += f"; packed into {len(train_set)} and {len(val_set)} rows, {1 - self.fill:.1%} of them empty"
        return text


def pack_chats(samples: Sequence[Sample], seq_len: int) -> list[Sample]:
    """Rows of at most ``seq_len`` tokens that hold all of these samples."""
    packs = pack_samples([len(sample["input_ids"]) for sample in samples], seq_len)
    return [join_samples(samples[index] for index in pack) for pack in packs]
