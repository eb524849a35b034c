"""Preferences in, batches of documents out: pairs side by side, or labelled answers with those to other prompts.

A *document* is a prompt with one answer, of which the answer is trained.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from .chat_template import tokenize_chats
from .checks import BadRows
from .collators import join_samples
from .data_module import ChatDataModule, Part
from .dataset import SampleDataset
from .options import DataOptions
from .packing import pack_samples
from .preference_collator import OTHER, PreferenceCollator
from .preference_formats import Preference, to_preference
from .samples import IGNORE_INDEX, Collator, Sample
from .sources import Placed, Source, open_source, read_chats
from .stdlib_docs import stdlib_card_preferences
from .vocabulary import check_token_ids

CARD_PREFERENCES = "stdlib-card-preferences"


@dataclass(frozen=True)
class PreferenceDataOptions(DataOptions):
    """Data.

    Args:
        dataset: A .json, .jsonl, .ndjson, .csv, .tsv or .parquet file (also .gz), a directory of save_to_disk, the name
            of a data set on the Hugging Face hub, or stdlib-card-preferences, which is made from Python's own
            documentation. Rows are pairs (chosen, rejected, with a prompt or a common beginning), or for kto also
            labelled answers (prompt, completion, label).
        subset: Subset (configuration) of a data set on the hub.
        split: Split to train on, or a part of one, such as train[:10%].
        val_dataset: Data to validate on, like dataset; used whole. Default: the split validation of dataset, or else
            rows held out of it.
        val_samples: Maximum rows of the split validation to use, or to hold out (never more than a tenth of the data);
            0 turns both off.
        train_on: Train all assistant turns of an answer, or the last one alone.
        chat_template: How turns are written, for base models, which bring no template: plain, chatml, llama3, or a file
            with a Jinja template. Saved beside the adapter. Default: the tokenizer's own.
        pad_token: Token of the vocabulary that fills batches. Default: the tokenizer's, or another special token if
            that one ends texts too.
        skip_bad_rows: Leave out rows that cannot be trained on, with a warning, instead of refusing the data.
        show_samples: Print this many training samples with what is trained in colour, before training and in the
            report.
    """

    dataset: str = CARD_PREFERENCES


class PreferenceDataModule(ChatDataModule):
    """Train and validation batches of preferences, with the loss on answers only.

    As :class:`ChatDataModule`, with other rows: pairs of a chosen and a rejected answer, or labelled answers. What
    ``seq_len`` cuts is the end of a document; a pair is left out if it cuts one of its answers away, or all that they
    differ in. Packed rows hold whole pairs, up to ``2 * seq_len`` tokens; packed rows of labelled answers hold
    ``seq_len``.

    A labelled answer comes with an answer to another prompt, that of the next row whose prompt differs (the first ones
    follow the last), for the estimate of the KL term: the same in every epoch and for any number of ranks.

    Args:
        tokenizer: As of :class:`ChatDataModule`, like all that is not listed here.
        dataset: Anything with rows of :mod:`.preference_formats`, or options.
        batch_size: Pairs (or labelled answers) of one batch on one device; with ``packing``, packed rows.
        seq_len: Tokens kept of a document.
        paired: Whether the loss compares the answers of a pair; otherwise each is a labelled answer of its own.
        packing: As of :class:`ChatDataModule`.
        seed: As of :class:`ChatDataModule`.
        num_workers: As of :class:`ChatDataModule`.
        max_position_embeddings: As of :class:`ChatDataModule`.
        vocab_size: As of :class:`ChatDataModule`.

    Raises:
        ValueError: For arguments out of range.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        dataset: str | Path | PreferenceDataOptions = PreferenceDataOptions(),
        *,
        batch_size: int,
        seq_len: int,
        paired: bool = True,
        packing: bool = False,
        seed: int = 0,
        num_workers: int = 0,
        max_position_embeddings: int | None = None,
        vocab_size: int | None = None,
    ) -> None:
        options = dataset if isinstance(dataset, PreferenceDataOptions) else PreferenceDataOptions(str(dataset))
        super().__init__(
            tokenizer, options, batch_size=batch_size, seq_len=seq_len, packing=packing, seed=seed,
            num_workers=num_workers, max_position_embeddings=max_position_embeddings, vocab_size=vocab_size,
        )  # fmt: skip
        self.paired = paired
        self.val_fingerprint = ""
        """SHA-256 of the validation set."""

    @property
    def row_tokens(self) -> int:
        """Most tokens of a packed row."""
        return self.seq_len * (2 if self.paired else 1)

    @property
    def num_reference_batches(self) -> int:
        """How many batches :meth:`reference_batch` knows."""
        train, val = self._loaded()
        return -(-len(train) // self.batch_size) + -(-len(val) // self.batch_size)

    def reference_batch(self, number: int | None) -> dict[str, Any]:
        """Batch ``number`` of all rows in fixed order, training before validation, for any number of ranks.

        ``None`` makes a blank one. ``index`` goes on behind the training set for rows to validate on.
        """
        blank: Any = self._loaded()[0].blank
        return dict(self.collator([blank] if number is None else self._reference_rows(number)))

    def reference_index(self, number: int) -> list[int]:
        """``index`` of that batch."""
        return [index for row in self._reference_rows(number) for index in row["index"]]

    def _reference_rows(self, number: int) -> list[Any]:
        train, val = self._loaded()
        of_train = -(-len(train) // self.batch_size)
        rows, number = (train, number) if number < of_train else (val, number - of_train)
        places = range(number * self.batch_size, min((number + 1) * self.batch_size, len(rows)))
        return [rows[place] for place in places]

    def prompts(self, count: int) -> list[tuple[str, str | None]]:
        """Held-out one-turn prompts, each with its good answer if there is one: ``count`` at most."""
        self.load()
        found: dict[str, str | None] = {}
        rows: list[Any] = [*self.val_chats]
        for row in rows:
            if [message["role"] for message in row["prompt"]] != ["user"]:
                continue
            good = [c[0]["content"] for c, good in zip(row["completions"], row["desirable"], strict=True) if good]
            found.setdefault(row["prompt"][0]["content"], good[0] if good else None)
        return [*found.items()][:count]

    def example(self) -> tuple[str, str] | None:
        """Return the first held-out prompt that has a good answer, and that answer; ``None`` if there is none."""
        return next(((prompt, good) for prompt, good in self.prompts(self.num_val) if good is not None), None)

    # --- what differs from chats -------------------------------------------------------------------------------------

    def _open(self, dataset: str, subset: str | None = None) -> Source:
        if dataset != CARD_PREFERENCES:
            return open_source(dataset, subset)
        if subset is not None:
            raise ValueError(f"{dataset} has no subsets; leave --subset out")
        return Source(dataset, {"train": stdlib_card_preferences})

    def _read_rows(self, source: Source, split: str) -> Placed[Any]:
        def convert(row: object, unused: dict[str, None]) -> Preference:
            return to_preference(row, unused, self.paired)

        return read_chats(source, split, self.options.skip_bad_rows, convert)

    def _empty_set(self, pad_token_id: int) -> SampleDataset:
        blank: dict[str, Any] = {"input_ids": [pad_token_id], "labels": [IGNORE_INDEX], "document_lengths": [1]}
        if not self.paired:
            blank |= {OTHER + name: value for name, value in blank.items()} | {"desirable": []}
        return SampleDataset([], {**blank, "index": []})

    def _make_collator(self, pad_token_id: int) -> Collator:
        return PreferenceCollator(pad_token_id, self.packing, self.pad_to_multiple_of)

    def _tokenize(self, source: Source, read: Placed[Any]) -> Part:
        chats, places, owners = [], [], []
        for number, (row, place) in enumerate(zip(read.rows, read.places, strict=True)):
            for completion, good in zip(row["completions"], row["desirable"], strict=True):
                # The prompt's own answers are read and not trained.
                chats.append({"messages": [*row["prompt"], *completion]})
                places.append(f"{place} ({'chosen' if good else 'rejected'})" if len(row["completions"]) > 1 else place)
                owners.append(number)
        tokenized = tokenize_chats(
            self.tokenizer, chats, self.seq_len, train_on=self.options.train_on, date=self.date,  # type: ignore[arg-type]
            places=places, bad=BadRows(source.name, self.options.skip_bad_rows),
        )  # fmt: skip
        if self.vocab_size is not None:
            check_token_ids(tokenized.samples, self.tokenizer, self.vocab_size)
        documents: list[list[Sample]] = [[] for _ in chats]
        for sample, chat in zip(tokenized.samples, tokenized.kept, strict=True):
            documents[chat].append(sample)
        bad = BadRows(source.name, self.options.skip_bad_rows)
        for place, found in zip(places, documents, strict=True):
            if len(found) > 1:
                bad.add(
                    place,
                    "the chat template rewrites earlier turns, so an answer of several assistant turns is not one "
                    "text; move all but its last turn into the prompt, or choose --train_on last",
                )
                found.clear()
        bad.settle(len(chats))
        samples: list[dict[str, Any]] = []
        rows: list[Preference] = []
        dropped = 0
        for number, group in itertools.groupby(range(len(chats)), key=owners.__getitem__):
            row, kept = read.rows[number], [documents[chat][0] if documents[chat] else None for chat in group]
            made = self._samples_of(row, kept)
            samples += made
            rows += [row] * len(made)
            dropped += (1 if self.paired else len(kept)) - len(made)
        if not samples:
            raise ValueError(f"seq_len={self.seq_len} cuts away what all {dropped} pairs of {source.name} differ in.")
        return Part(samples, rows, tokenized.num_truncated, dropped, tokenized.turn_ends)

    def _samples_of(self, row: Preference, documents: Sequence[Sample | None]) -> list[dict[str, Any]]:
        """The pair, or the labelled answers, of a row of which ``seq_len`` has left something to learn."""
        if not self.paired:
            flags = zip(documents, row["desirable"], strict=True)
            return [{**join_samples([each]), "desirable": [good]} for each, good in flags if each is not None]
        there = [document for document in documents if document is not None]
        if len(there) < 2 or there[0]["input_ids"] == there[1]["input_ids"]:
            return []
        return [{**join_samples(there)}]

    def _to_rows(self, train: list[Any], val: list[Any]) -> tuple[list[Any], list[Any]]:
        samples = [{**sample, "index": [index]} for index, sample in enumerate((*train, *val))]
        if not self.paired:
            self._check_labels(train)
            samples = _with_other_answers(samples, self.seq_len)
        rows, val_rows = samples[: len(train)], samples[len(train) :]
        if self.packing:
            rows, val_rows = self._pack(rows), self._pack(val_rows)
            self.fill = sum(len(pack["input_ids"]) for pack in rows) / (len(rows) * self.row_tokens)
        self.val_fingerprint = hashlib.sha256(json.dumps(val_rows).encode()).hexdigest()
        return rows, val_rows

    def _check_labels(self, train: Sequence[Mapping[str, Any]]) -> None:
        flags = {flag for sample in train for flag in sample["desirable"]}
        if len(flags) < 2:
            only = str(flags.pop()).lower()
            raise ValueError(
                f"{self.options.dataset}: all {len(train)} answers to train on have the label {only}; there is nothing "
                "to tell apart. Give good and bad answers."
            )

    def _pack(self, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        lengths = [max(len(sample[name]) for name in sample if name.endswith("input_ids")) for sample in samples]
        return [
            {name: [value for index in pack for value in samples[index][name]] for name in samples[0]}
            for pack in pack_samples(lengths, self.row_tokens)
        ]


def _with_other_answers(samples: list[dict[str, Any]], seq_len: int) -> list[dict[str, Any]]:
    """Labelled answers, each also with its prompt followed by the answer of the next sample whose prompt differs.

    Raises:
        ValueError: If all prompts are equal.
    """
    split = [_prompt_length(sample["labels"]) for sample in samples]
    prompts = [sample["input_ids"][:length] for sample, length in zip(samples, split, strict=True)]
    count = len(samples)
    nexts = [0] * count
    following = None
    for place in range(2 * count - 1, -1, -1):  # twice around, because the first follow the last
        here, after = place % count, (place + 1) % count
        if prompts[here] != prompts[after]:
            following = after
        if following is not None:
            nexts[here] = following
    if following is None:
        raise ValueError(
            "All answers are to the same prompt, but kto measures how far the model has moved by answers to other "
            "prompts. Give data with several prompts, or take --loss dpo with pairs."
        )
    completed = []
    for sample, length, other in zip(samples, split, nexts, strict=True):
        ids = [*sample["input_ids"][:length], *samples[other]["input_ids"][split[other] :]][:seq_len]
        labels = [*[IGNORE_INDEX] * length, *samples[other]["labels"][split[other] :]][:seq_len]
        others = {"input_ids": ids, "labels": labels, "document_lengths": [len(ids)]}
        completed.append({**sample, **{OTHER + name: value for name, value in others.items()}})
    return completed


def _prompt_length(labels: Sequence[int]) -> int:
    return next(place for place, label in enumerate(labels) if label != IGNORE_INDEX)
