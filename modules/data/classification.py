"""Texts with labels or numbers: reading, checking, tokenizing, and batches, padded or packed.

Shapes: B rows of a batch, S the longest of them, rounded up; N texts (B, or more in packed rows); C labels.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, compress
from typing import Any, get_args

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from tokenizers.processors import Sequence as ProcessorSequence
from tokenizers.processors import TemplateProcessing
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from ..options import ProblemType, at_least
from .checks import require_at_least
from .dataset import SampleDataset
from .packing import pack_samples
from .resumable import ResumableDataModule, digests, smallest
from .reuters import REUTERS_R8, reuters_r8
from .sources import Source, open_source, read_rows
from .vocabulary import check_token_ids, choose_pad_token_id


@dataclass(frozen=True)
class ClassificationDataOptions:
    """Data.

    Args:
        dataset: reuters-r8 (news in eight classes, fetched with pip), a .json, .jsonl, .ndjson, .csv, .tsv or .parquet
            file (also .gz), a directory of save_to_disk, or the name of a data set on the Hugging Face hub.
        subset: Subset (configuration) of a data set on the hub.
        split: Split to train on, or a part of one, such as train[:10%].
        val_dataset: Data to validate on, like dataset; used whole.
        val_split: Split to validate on. Default: validation or else test, or else rows held out of the training data.
        val_samples: Maximum rows to validate on, or to hold out (never more than a tenth of the data). Default: all
            of a split, a tenth of data without one. 0 turns validation off.
        train_samples: Maximum rows to train on. Default: all.
        text_column: Column of the texts.
        label_column: Column of labels. A name or a whole number is a class, a list of them several labels, a fraction a
            number to predict.
        problem_type: What the labels are. Default: as the labels of the first row look.
        labels: Names of the classes in their order, separated by commas; labels that are numbers then count from 0 into
            this list. Default: the classes of the training data, in alphabetical or numerical order.
        skip_bad_rows: Leave out rows that cannot be trained on, with a warning, instead of refusing the data.

    Raises:
        ValueError: For a negative count, an unknown ``problem_type``, or names that occur twice.
    """

    dataset: str = REUTERS_R8
    subset: str | None = None
    split: str = "train"
    val_dataset: str | None = None
    val_split: str | None = None
    val_samples: int | None = None
    train_samples: int | None = None
    text_column: str = "text"
    label_column: str = "label"
    problem_type: ProblemType | None = None
    labels: str | None = None
    skip_bad_rows: bool = False

    def __post_init__(self) -> None:
        at_least(0, val_samples=self.val_samples or 0)
        at_least(1, train_samples=1 if self.train_samples is None else self.train_samples)
        if self.problem_type not in (None, *get_args(ProblemType)):
            raise ValueError(f"--problem_type must be one of {', '.join(get_args(ProblemType))}.")
        names = self.names or ()
        if len(set(names)) != len(names) or "" in names:
            raise ValueError(f"--labels must be names that differ, separated by commas, got {self.labels!r}.")

    @property
    def names(self) -> tuple[str, ...] | None:
        """``labels`` as a list."""
        return None if self.labels is None else tuple(name.strip() for name in self.labels.split(","))


@dataclass(frozen=True)
class LabelledTexts:
    """Texts, what each is labelled with, and where it stands in its source.

    Attributes:
        texts: Not empty.
        labels: For each text a class, a list of labels, or a number, as its source has it.
        places: As in ``"line 3"``.
    """

    texts: list[str]
    labels: list[Any]
    places: list[str]

    def only(self, chosen: Sequence[bool]) -> LabelledTexts:
        """Those that are chosen."""
        return LabelledTexts(*([*compress(part, chosen)] for part in (self.texts, self.labels, self.places)))

    def rows(self) -> list[dict[str, Any]]:
        """Texts with labels, of JSON types."""
        return [{"text": text, "label": label} for text, label in zip(self.texts, self.labels, strict=True)]


# --- labels ----------------------------------------------------------------------------------------------------------


def _number(label: object) -> float:
    """A label to predict as a number."""
    try:
        value = float(label) if isinstance(label, str | int | float) and not isinstance(label, bool) else math.nan
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"the label {label!r} is not a finite number, which a regression needs")
    return value


def _class(label: object) -> str | int:
    """A label that is a class: its name or its number. Numbers that a file stores as fractions are whole ones."""
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if isinstance(label, bool):
        return str(label)
    if isinstance(label, int) and label < 0:
        raise ValueError(f"the label is {label}; negative numbers stand for texts without a label")
    if isinstance(label, str) and not label.strip():
        raise ValueError("the label is empty")
    if not isinstance(label, str | int):
        raise ValueError(f"the label is {label!r}, not a name or a whole number (--problem_type says what labels are)")
    return label


def _labels(label: object) -> list[str | int]:
    """A list of labels; in a text file as JSON."""
    if isinstance(label, str):
        try:
            label = json.loads(label)
        except json.JSONDecodeError as error:
            raise ValueError(f"the labels {label!r} are not a JSON list: {error.msg}") from error
    if not isinstance(label, list):
        raise ValueError(f"the label is {label!r}, not a list of labels")
    return list(dict.fromkeys(map(_class, label)))


_CONVERTERS: dict[ProblemType, Callable[[object], Any]] = {
    "single_label_classification": _class,
    "multi_label_classification": _labels,
    "regression": _number,
}


def _guess(label: object) -> ProblemType:
    if isinstance(label, list):
        return "multi_label_classification"
    if isinstance(label, float) and not label.is_integer():
        return "regression"
    return "single_label_classification"


def _every(label: Any) -> list[str | int]:
    return label if isinstance(label, list) else [label]


def find_labels(
    data: LabelledTexts, problem_type: ProblemType, names: Sequence[str] | None, source: str
) -> tuple[str, ...]:
    """Names of the classes of training data.

    Args:
        data: The training data.
        problem_type: Not a regression.
        names: Those that the user gave, in order.
        source: The data set, as messages name it.

    Raises:
        ValueError: If labels are names in some rows and numbers in others, out of range of ``names``, or of one class
            only.
    """
    counts = Counter(label for labels in data.labels for label in _every(labels))
    if len({type(label) for label in counts}) > 1:
        examples = {
            type(label).__name__: f"{label!r} ({place})"
            for labels, place in zip(data.labels, data.places, strict=True)
            for label in _every(labels)
        }
        raise ValueError(
            f"{source}: some labels are names and others numbers, as in {' and '.join(examples.values())}. Write all "
            "of them as names, or all as numbers."
        )
    found = tuple(str(label) for label in sorted(counts))
    if names is not None:
        check_labels(data, names, source)
        if missing := [name for index, name in enumerate(names) if not counts.get(name, counts.get(index))]:
            rank_zero_warn(f"{source}: no training text has the label {', '.join(missing)}")
        found = tuple(names)
    if len(found if names is None else counts) < (2 if problem_type == "single_label_classification" else 1):
        only = ", ".join(map(repr, counts)) or "of an empty list"
        raise ValueError(
            f"{source}: all {len(data.texts)} texts have the label {only}; there is nothing to tell apart. Give texts "
            "of at least two classes."
        )
    return found


def check_labels(data: LabelledTexts, names: Sequence[str], source: str) -> None:
    """Check that all labels are among ``names``, or count from 0 into them.

    Raises:
        ValueError: Naming those that are not, and where they stand.
    """
    wrong: dict[Any, str] = {}
    for labels, place in zip(data.labels, data.places, strict=True):
        for label in _every(labels):
            if label_index(label, names) is None:
                wrong.setdefault(label, place)
    if not wrong:
        return
    listed = ", ".join(f"{label!r} ({place})" for label, place in list(wrong.items())[:5])
    if any(isinstance(label, int) for label in wrong):
        known = f"numbers run from 0 to {len(names) - 1}, for {', '.join(names)}"
    else:
        known = f"the known labels are {', '.join(names)}"
    raise ValueError(
        f"{source}: unknown labels {listed}{', ...' if len(wrong) > 5 else ''}; {known}. Mend them, leave these texts "
        "out, or add the labels to the training data or to --labels."
    )


def label_index(label: str | int, names: Sequence[str]) -> int | None:
    """The place of a label in ``names``, by name or, for a number that is no name, counted; ``None`` if it has none."""
    if str(label) in names:
        return names.index(str(label))
    return label if isinstance(label, int) and 0 <= label < len(names) else None


# --- reading ---------------------------------------------------------------------------------------------------------


def open_texts(dataset: str, subset: str | None = None) -> Source:
    """As :func:`~lightning_qlora.modules.data.sources.open_source`, with ``reuters-r8``."""
    if dataset != REUTERS_R8:
        return open_source(dataset, subset)
    if subset is not None:
        raise ValueError(f"{dataset} has no subsets; leave --subset out")
    return Source(dataset, {split: lambda split=split: reuters_r8(split) for split in ("train", "test")})  # type: ignore[misc]


def _text(row: object, column: str) -> str:
    if not isinstance(row, Mapping):
        raise ValueError(f"is a {type(row).__name__}, not an object with columns")
    if column not in row:
        raise ValueError(f"has no column {column!r}; its columns are {', '.join(map(str, row))} (--text_column)")
    text = row[column]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{column!r} is {'empty' if isinstance(text, str) else repr(text)}, not a text")
    return text


def read_texts(
    source: Source, split: str, options: ClassificationDataOptions, problem_type: ProblemType | None
) -> tuple[LabelledTexts, ProblemType]:
    """Read texts and labels; also what the labels are, which the first row says if ``problem_type`` does not.

    Raises:
        ValueError: As :func:`~lightning_qlora.modules.data.sources.load_chats`.
    """
    kind = problem_type

    def convert(row: object) -> tuple[str, Any]:
        nonlocal kind
        text, column = _text(row, options.text_column), options.label_column
        assert isinstance(row, Mapping)
        if row.get(column) is None:
            columns = ", ".join(map(str, row))
            raise ValueError(f"has no label in column {column!r}; its columns are {columns} (--label_column)")
        kind = kind or _guess(row[column])
        if isinstance(row[column], list) and kind != "multi_label_classification":
            raise ValueError(f"the label is the list {row[column]!r}, but other rows have single ones")
        return text, _CONVERTERS[kind](row[column])

    rows, places = read_rows(source, split, options.skip_bad_rows, convert)
    assert kind is not None
    return LabelledTexts([text for text, _ in rows], [label for _, label in rows], places), kind


# --- tokens ----------------------------------------------------------------------------------------------------------


def classification_tokenizer(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None
) -> PreTrainedTokenizerBase:
    """A copy that ends each text with the end-of-text token and pads with another one.

    The last token is what a text is classified by. Saved with an adapter, it makes the same tokens in transformers.

    Raises:
        ValueError: If the vocabulary has no token to pad with.
    """
    tokenizer = copy.deepcopy(tokenizer)
    pad = choose_pad_token_id(tokenizer, vocab_size=vocab_size)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    tokenizer.padding_side = "right"
    end, eos = tokenizer.eos_token, tokenizer.eos_token_id
    if eos is not None and tokenizer("a")["input_ids"][-1:] != [eos]:
        ending = TemplateProcessing(single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, eos)])
        backend = tokenizer.backend_tokenizer
        before = backend.post_processor
        backend.post_processor = ending if before is None else ProcessorSequence([before, ending])
    return tokenizer


@dataclass(frozen=True)
class ClassificationCollator:
    """Batches of texts, padded on the right.

    Args:
        pad_token_id: Fills ``input_ids``.
        problem_type: What the labels are.
        num_labels: C.
        packed: Whether rows hold several texts.
        pad_to_multiple_of: S is the longest row rounded up to a multiple of this.
    """

    pad_token_id: int
    problem_type: ProblemType
    num_labels: int
    packed: bool = False
    pad_to_multiple_of: int = 8

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch for :class:`~lightning_qlora.modules.training.sequence_classifier.QLoRASequenceClassifier`.

        A sample has ``input_ids``, ``lengths`` (tokens of each of its texts), ``targets`` (one per text) and ``index``
        (the place of each text in the data). One without texts is blank.

        Returns:
            ``input_ids`` int64 [B, S], ``last_tokens`` int64 [N], ``labels`` int64 [N] or float32 [N, C], ``index``
            int64 [N], ``num_tokens``; packed also ``position_ids`` [B, S] and ``document_lengths``, for which padding
            is a document.
        """
        longest = max(len(sample["input_ids"]) for sample in samples)
        width = math.ceil(longest / self.pad_to_multiple_of) * self.pad_to_multiple_of
        ids = [[*row, *[self.pad_token_id] * (width - len(row))] for row in (s["input_ids"] for s in samples)]
        ends = [row * width + end - 1 for row, sample in enumerate(samples) for end in accumulate(sample["lengths"])]
        targets = [target for sample in samples for target in sample["targets"]]
        single = self.problem_type == "single_label_classification"
        labels = torch.tensor(targets, dtype=torch.int64 if single else torch.float32)
        batch: dict[str, Any] = {
            "input_ids": torch.tensor(ids, dtype=torch.int64),
            "last_tokens": torch.tensor(ends, dtype=torch.int64),
            "labels": labels if single else labels.view(-1, self.num_labels),
            "index": torch.tensor([index for sample in samples for index in sample["index"]], dtype=torch.int64),
            "num_tokens": sum(sum(sample["lengths"]) for sample in samples),
        }
        if self.packed:
            lengths = [list(sample["lengths"]) for sample in samples]
            lengths = [[*row, width - sum(row)] if sum(row) < width else row for row in lengths]
            batch["position_ids"] = torch.stack([torch.cat([*map(torch.arange, row)]) for row in lengths])
            batch["document_lengths"] = lengths
        return batch


# --- all of it -------------------------------------------------------------------------------------------------------


class ClassificationDataModule(ResumableDataModule):
    """Train and validation batches of texts with labels, in an order that survives a restart.

    ``load()`` does all the reading and checking and needs no Trainer. The classes are those of the training data, or
    ``options.labels``; a label of the validation data that is none of them is an error. Texts end with the tokenizer's
    end-of-text token, also those that ``seq_len`` cuts.

    Args:
        tokenizer: A fast tokenizer. It is not changed: :attr:`tokenizer` is a copy, see
            :func:`classification_tokenizer`.
        options: What to read.
        batch_size: Texts of one batch on one device; with ``packing``, packed rows.
        seq_len: Tokens kept of a text.
        packing: Fill rows of at most ``seq_len`` tokens with texts.
        seed: Seed of the training order.
        num_workers: Loader processes for each loader.
        max_position_embeddings: The model's; longer texts are warned of. ``None`` is no limit.
        vocab_size: Rows of the model's embedding; tokens beyond are refused. ``None`` does not check.
        predict_dataset: Texts for ``Trainer.predict``, like ``options.dataset``; labels are not read.

    Raises:
        ValueError: For arguments out of range.
    """

    report_key = "data"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        options: ClassificationDataOptions = ClassificationDataOptions(),
        *,
        batch_size: int,
        seq_len: int,
        packing: bool = False,
        seed: int = 0,
        num_workers: int = 0,
        max_position_embeddings: int | None = None,
        vocab_size: int | None = None,
        predict_dataset: str | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        require_at_least(batch_size=(batch_size, 1), seq_len=(seq_len, 2), seed=(seed, 0), num_workers=(num_workers, 0))
        self.options, self.seq_len, self.packing = options, seq_len, packing
        self.max_position_embeddings, self.vocab_size = max_position_embeddings, vocab_size
        self.predict_dataset = predict_dataset
        self.tokenizer = classification_tokenizer(tokenizer, vocab_size)
        self.problem_type: ProblemType = "single_label_classification"
        """What the labels are; known after :meth:`load`, as all below."""
        self.labels: tuple[str, ...] = ()
        """Names of the C classes, or of the number that is predicted."""
        self.train: LabelledTexts
        self.val: LabelledTexts
        self.predict_texts: list[str] = []
        self.num_truncated = 0
        """Texts that lost tokens at the end."""

    def load(self) -> None:
        """Read, check, tokenize and split the data, once; a second call does nothing.

        Raises:
            ValueError: For data that cannot be read or trained on: see :func:`find_labels` and :func:`check_labels`.
        """
        if self.train_set is not None:
            return
        train, val, origin = self._read()
        self.train, self.val = train, val
        pad = self.tokenizer.pad_token_id
        self.collator = ClassificationCollator(pad, self.problem_type, len(self.labels), self.packing)
        blank = {"input_ids": [pad], "lengths": [], "targets": [], "index": []}
        rows, val_rows = (self._samples(part.texts, map(self._target, part.labels)) for part in (train, val))
        self.num_train, self.num_val = len(rows), len(val_rows)
        longest = max(len(sample["input_ids"]) for sample in (*rows, *val_rows))
        if self.max_position_embeddings is not None and longest > self.max_position_embeddings:
            rank_zero_warn(
                f"The longest text has {longest} tokens, but the model's config.json says "
                f"max_position_embeddings={self.max_position_embeddings}. Choose a --seq_len of that."
            )
        if self.packing:
            rows, val_rows = self._pack(rows), self._pack(val_rows)
        self.fingerprint = hashlib.sha256(json.dumps([self.labels, rows]).encode()).hexdigest()
        self.val_set = SampleDataset(val_rows, blank)
        if self.predict_dataset is not None:
            source = open_texts(self.predict_dataset)
            split = next(split for split in ("test", *source.splits) if split in source.splits)
            column = self.options.text_column
            self.predict_texts, _ = read_rows(source, split, False, lambda row: _text(row, column))
            filler = self._filler()
            texts = self._samples(self.predict_texts, [filler] * len(self.predict_texts))
            self.predict_set = SampleDataset(self._pack(texts) if self.packing else texts, blank)
        self.train_set = SampleDataset(rows, blank)
        rank_zero_info(self._summary(origin))

    def _read(self) -> tuple[LabelledTexts, LabelledTexts, str]:
        options = self.options
        source = open_texts(options.dataset, options.subset)
        train, self.problem_type = read_texts(source, options.split, options, options.problem_type)
        if options.train_samples is not None:
            train = train.only(smallest(train.rows(), options.train_samples))
        other, split = source, options.val_split
        if options.val_dataset is not None:
            other = open_texts(options.val_dataset)
            split = split or next(s for s in ("validation", "test", "train", *other.splits) if s in other.splits)
        elif split is None:
            split = next((s for s in ("validation", "test") if s in source.splits and s != options.split), None)
        if split is not None and options.val_samples != 0:
            val, _ = read_texts(other, split, options, self.problem_type)
            if options.val_samples is not None:
                val = val.only(smallest(val.rows(), min(options.val_samples, len(val.texts))))
            origin = f"to validate on, of {other.name}, split {split}"
            known = set(digests(train.rows()))
            if shared := sum(digest in known for digest in digests(val.rows())):
                rank_zero_warn(f"{shared} of the {len(val.texts)} texts to validate on are also trained on.")
        else:
            tenth = len(train.texts) // 10
            chosen = smallest(train.rows(), tenth if options.val_samples is None else min(options.val_samples, tenth))
            val, train = train.only(chosen), train.only([not held for held in chosen])
            origin = "held out"
        if self.problem_type == "regression":
            self.labels = (options.label_column,)
        else:
            self.labels = find_labels(train, self.problem_type, options.names, source.name)
            check_labels(val, self.labels, f"{other.name} to validate on")
        return train, val, origin

    def _target(self, label: Any) -> Any:
        if self.problem_type == "regression":
            return [label]
        if self.problem_type == "single_label_classification":
            return label_index(label, self.labels)
        there = {label_index(each, self.labels) for each in label}
        return [float(index in there) for index in range(len(self.labels))]

    def _filler(self) -> Any:
        """What stands for the label of a text that has none."""
        return 0 if self.problem_type == "single_label_classification" else [0.0] * len(self.labels)

    def _samples(self, texts: Sequence[str], targets: Any) -> list[dict[str, Any]]:
        if not texts:
            return []
        whole = self.tokenizer(list(texts), verbose=False)["input_ids"]
        self.num_truncated += sum(len(ids) > self.seq_len for ids in whole)
        cut = self.tokenizer(list(texts), truncation=True, max_length=self.seq_len)["input_ids"]
        samples = [
            {"input_ids": ids, "lengths": [len(ids)], "targets": [target], "index": [index]}
            for index, (ids, target) in enumerate(zip(cut, targets, strict=True))
        ]
        if self.vocab_size is not None:
            check_token_ids(samples, self.tokenizer, self.vocab_size)  # type: ignore[arg-type]
        return samples

    def _pack(self, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        packs = pack_samples([len(sample["input_ids"]) for sample in samples], self.seq_len)
        return [
            {key: [value for index in pack for value in samples[index][key]] for key in samples[0]} for pack in packs
        ]

    def balanced_weights(self) -> list[float]:
        """Weights under which all classes count the same: of single labels the mean over the training texts is 1;
        of several labels, texts without the label for each text with it.

        Raises:
            ValueError: For a regression, or a label that no training text has.
        """
        self.load()
        if self.problem_type == "regression":
            raise ValueError("Class weights are for classes, but the labels are numbers. Leave --class_weights out.")
        counts = self.counts()
        if missing := [name for name, count in counts.items() if not count]:
            raise ValueError(f"No training text has the label {', '.join(missing)}: its balanced weight is undefined.")
        texts = len(self.train.texts)
        if self.problem_type == "single_label_classification":
            return [texts / (len(counts) * count) for count in counts.values()]
        return [max(texts - count, 1) / count for count in counts.values()]

    def counts(self) -> dict[str, int]:
        """Training texts of each label."""
        found = Counter(label_index(label, self.labels) for labels in self.train.labels for label in _every(labels))
        return {name: found[index] for index, name in enumerate(self.labels)}

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the loader of this rank's batches of ``predict_dataset``, in fixed order."""
        self.load()
        return DataLoader(
            self.predict_set, batch_size=self.batch_size, sampler=self._sampler(self.predict_set, shuffle=False),
            collate_fn=self.collator, num_workers=self.num_workers,
        )  # fmt: skip

    def report_section(self) -> dict[str, Any] | None:
        """For a run's report, under ``report_key``; ``None`` before :meth:`load`."""
        if self.train_set is None:
            return None
        section: dict[str, Any] = {
            "train_samples": self.num_train, "val_samples": self.num_val, "truncated": self.num_truncated,
            "dropped": 0,
        }  # fmt: skip
        if self.packing:
            assert self.val_set is not None
            section |= {"train_packs": len(self.train_set), "val_packs": len(self.val_set)}
        return section

    def _summary(self, origin: str) -> str:
        what = f"{self.problem_type.replace('_', ' ')} with {len(self.labels)} labels ({', '.join(self.labels)})"
        text = f"{self.options.dataset}: {what}; {self.num_train} texts to train on, {self.num_val} {origin}"
        if self.num_truncated:
            text += f"; seq_len={self.seq_len} cut the end of {self.num_truncated} of them"
        return text
