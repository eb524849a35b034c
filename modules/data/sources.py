"""Where rows come from: the embedded sets, files, directories, data sets of a hub.

| file | holds |
|---|---|
| ``.json`` | one list of rows |
| ``.jsonl``, ``.ndjson`` | one row per line |
| ``.csv``, ``.tsv`` | a line of column names, then one row per line; every cell is text |
| ``.parquet`` | a table |

Text files may be compressed (``.jsonl.gz``); names may be in capitals. A directory is what ``save_to_disk`` of
``datasets`` wrote, or holds data files. Any other name is that of a data set on the Hugging Face hub. What a row may be
stands in :mod:`~lightning_qlora.modules.data.formats`.
"""

from __future__ import annotations

import csv
import functools
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

from lightning.pytorch.utilities import rank_zero_info

from .bfcl import BFCL_FUNCTIONS, bfcl_functions
from .checks import BadRows
from .formats import to_chat
from .samples import Chat
from .stdlib_docs import stdlib_api_cards
from .tool_requests import TOOL_REQUESTS, tool_requests

T = TypeVar("T")

DEFAULT_DATASET = "stdlib-api-cards"

#: Where a row stands, as in ``"line 3"``, and the row; or what is wrong with that place, so that others are still read.
PlacedRow = tuple[str, object]


@dataclass(frozen=True)
class Source:
    """An opened data set.

    Attributes:
        name: As messages name it.
        splits: For each of its splits, a function that reads the rows. A file has the split ``train`` alone.
        read_part: Reads what an expression such as ``"train[:10%]"`` says; ``None`` if the source knows none.
    """

    name: str
    splits: Mapping[str, Callable[[], Iterator[PlacedRow]]]
    read_part: Callable[[str], Iterator[PlacedRow]] | None = None

    def rows(self, split: str) -> Iterator[PlacedRow]:
        """Read the rows of a split.

        Raises:
            ValueError: If there is no such split.
        """
        if self.read_part is not None and any(mark in split for mark in "[+"):
            return self.read_part(split)
        if split not in self.splits:
            raise ValueError(
                f"{self.name} has no split {split!r}; its splits are: {', '.join(self.splits)}. Choose one with "
                "--split."
            )
        return self.splits[split]()


@dataclass(frozen=True)
class Placed(Generic[T]):
    """Rows that are read (chats or others), and where each of them stands in its source."""

    rows: list[T]
    places: list[str]

    def only(self, chosen: Sequence[bool]) -> Placed[T]:
        """Those that are chosen."""
        return Placed([*compress(self.rows, chosen)], [*compress(self.places, chosen)])


def load_chats(
    dataset: str | Path, *, split: str = "train", subset: str | None = None, skip_bad_rows: bool = False
) -> list[Chat]:
    """Read conversations from the embedded set, a file, a directory or a data set of the hub.

    Args:
        dataset: ``"stdlib-api-cards"``, a path or a name, as in the table of this module.
        split: Which split of a data set.
        subset: Which subset (configuration) of a data set on the hub.
        skip_bad_rows: Leave out rows that cannot be trained on, with a warning.

    Returns:
        One chat per row, in the order of the source.

    Raises:
        ValueError: If the source is missing, empty or damaged, or rows cannot be trained on (naming the first ten).
    """
    return read_chats(open_source(dataset, subset), split, skip_bad_rows).rows


def read_chats(
    source: Source,
    split: str,
    skip_bad_rows: bool,
    convert: Callable[[object, dict[str, None]], Any] = to_chat,
) -> Placed[Any]:
    """Read a split of a source as chats, or as what ``convert`` makes of a row, and say which columns are not used.

    Args:
        source: The data set.
        split: Which part of it.
        skip_bad_rows: Leave out rows that cannot be trained on, with a warning.
        convert: As :func:`~.formats.to_chat`: takes a row, and a dict that gets the names of what is not used.

    Raises:
        ValueError: As :func:`load_chats`.
    """
    unused = dict[str, None]()
    rows, places = read_rows(source, split, skip_bad_rows, lambda row: convert(row, unused))
    say_unused(source, unused)
    return Placed(rows, places)


def say_unused(source: Source, unused: Mapping[str, None]) -> None:
    """Name the columns and fields of a source that are not used."""
    if unused:
        rank_zero_info(f"{source.name}: not used, and without effect on training: {', '.join(unused)}")


def read_rows(
    source: Source, split: str, skip_bad_rows: bool, convert: Callable[[object], T]
) -> tuple[list[T], list[str]]:
    """Read a split of a source, each row through ``convert``, which raises a ValueError for a bad one.

    Returns:
        What ``convert`` returned, and where each row stands in its source.

    Raises:
        ValueError: As :func:`load_chats`.
    """
    bad = BadRows(source.name, skip_bad_rows)
    found: list[T] = []
    places: list[str] = []
    for where, row in source.rows(split):
        try:
            if isinstance(row, ValueError):
                raise row
            found.append(convert(row))
            places.append(where)
        except ValueError as error:
            bad.add(where, error)
    if not found and not bad.count:
        raise ValueError(f"{source.name}: the data set is empty; it needs at least one row")
    bad.settle(len(found) + bad.count)
    return found, places


def open_source(dataset: str | Path, subset: str | None = None) -> Source:
    """Find out what ``dataset`` is, and which splits it has.

    Raises:
        ValueError: If there is no such data set, or a subset is asked of one that has none.
    """
    name, path = str(dataset), Path(dataset)
    reader = _READERS.get(_suffix(path))
    if subset is not None and (name in _EMBEDDED or path.is_file()):
        raise ValueError(f"{name} has no subsets; leave --subset out")
    if name in _EMBEDDED:
        return Source(name, _EMBEDDED[name])
    if path.is_file() and reader is None:
        raise ValueError(f"{name}: unknown file type {path.suffix!r}; known are {_KNOWN} and, of text files, .gz")
    if reader is not None and not path.is_dir():
        if not path.is_file():
            raise ValueError(f"{name}: no such file; pass a {_KNOWN} file, or {DEFAULT_DATASET!r}")
        return Source(name, {"train": lambda: reader(path)})
    return _open_with_datasets(name, subset)


def numbered(rows: Iterable[object]) -> Iterator[PlacedRow]:
    """Rows with their numbers, from 1 on."""
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", row


def _both(read: Callable[[str], Iterator[PlacedRow]]) -> dict[str, Callable[[], Iterator[PlacedRow]]]:
    return {split: functools.partial(read, split) for split in ("train", "validation")}


#: What needs no file: name and splits.
_EMBEDDED: dict[str, Mapping[str, Callable[[], Iterator[PlacedRow]]]] = {
    DEFAULT_DATASET: {"train": lambda: numbered(stdlib_api_cards())},
    TOOL_REQUESTS: _both(tool_requests),
    BFCL_FUNCTIONS: _both(bfcl_functions),
}


# --- files -----------------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> Iterator[PlacedRow]:
    with _open_text(path) as file:
        text = _read_text(path, file.read)
    if not text.strip():
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; one object per line is .jsonl" if error.msg == "Extra data" else ""
        raise ValueError(f"{path}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}{hint}") from error
    if not isinstance(rows, list):
        raise ValueError(
            f"{path}: holds a JSON {type(rows).__name__}, not a list of rows; one object per line is .jsonl"
        )
    yield from numbered(rows)


def _read_json_lines(path: Path) -> Iterator[PlacedRow]:
    with _open_text(path) as file:
        number = 0
        while line := _read_text(path, file.readline):
            number += 1
            if not line.strip():
                continue
            try:
                yield f"line {number}", json.loads(line.rstrip("\r\n"))
            except json.JSONDecodeError as error:
                yield f"line {number}", ValueError(f"not JSON at column {error.colno}: {error.msg}")


def _read_csv(path: Path, delimiter: str = ",") -> Iterator[PlacedRow]:
    limit = csv.field_size_limit(sys.maxsize)  # a text may be longer than the usual limit of 128 KiB
    try:
        with _open_text(path) as file:
            lines = iter(lambda: _read_text(path, file.readline), "")
            reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
            for row in reader:
                where = f"line {reader.line_num}"
                if None in row:
                    yield where, ValueError(f"has more cells than the {len(row) - 1} columns of the first line")
                else:
                    yield where, row
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.reader.line_num}: not CSV: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _read_tsv(path: Path) -> Iterator[PlacedRow]:
    return _read_csv(path, delimiter="\t")


def _read_parquet(path: Path) -> Iterator[PlacedRow]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as Parquet: {error}") from error


_READERS: dict[str, Callable[[Path], Iterator[PlacedRow]]] = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}

_KNOWN = ", ".join(_READERS)


def _suffix(path: Path) -> str:
    """What kind of file a name says, in small letters and without ``.gz``."""
    name = Path(path.name.lower())
    return name.with_suffix("").suffix if name.suffix == ".gz" else name.suffix


def _open_text(path: Path) -> IO[str]:
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    # Lines end at line feeds alone: JSON strings may hold U+2028 and friends, CSV cells whole texts.
    return opened(path, "rt", encoding="utf-8-sig", newline="\n")  # type: ignore[operator,no-any-return]


def _read_text(path: Path, read: Callable[[], str]) -> str:
    try:
        return read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error


# --- data sets -------------------------------------------------------------------------------------------------------


def _open_with_datasets(name: str, subset: str | None) -> Source:
    import datasets  # here: it takes a second to import, and files do not need it

    path = Path(name)
    saved = any((path / file).is_file() for file in ("dataset_dict.json", "state.json"))
    if saved and subset is not None:
        raise ValueError(f"{name} was written by save_to_disk and has no subsets; leave --subset out")

    def load(split: str | None = None) -> Any:
        try:
            return datasets.load_from_disk(name) if saved else datasets.load_dataset(name, subset, split=split)
        except Exception as error:  # the hub client raises a dozen unrelated types, and so do readers of data files
            part = f", split {split!r}," if split else ""
            raise ValueError(
                f"the data set {name!r}{part} cannot be loaded ({type(error).__name__}: {error}); pass "
                f"{DEFAULT_DATASET!r}, a {_KNOWN} file, a directory, or the name of a data set on a hub that this "
                "machine can reach, with --subset if it has several"
            ) from error

    loaded = load()
    splits = loaded if isinstance(loaded, Mapping) else {"train": loaded}
    return Source(
        name,
        {split: functools.partial(_read_table, rows) for split, rows in splits.items()},
        read_part=None if saved else lambda split: _read_table(load(split)),
    )


def _read_table(rows: Any) -> Iterator[PlacedRow]:
    """The rows of a data set as they are stored: images stay the bytes of their files."""
    batches = rows.with_format("arrow").iter(100)
    yield from numbered(row for batch in batches for row in batch.to_pylist())
