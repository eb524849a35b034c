"""Rows from every kind of file and data set, with the same chats in each."""

import csv
import gzip
import json
from pathlib import Path

import datasets
import pytest

from lightning_qlora.modules.data.sources import DEFAULT_DATASET, load_chats, open_source
from tests.chats import chat, write

# What readers get wrong: Unicode's line ends and quotes inside texts, words that look like "nothing", long texts.
ROWS = [
    {"prompt": 'p\u2028"p",\nq', "completion": "NA"},
    {"prompt": "001", "completion": "null"},
    {"prompt": "x" * 200_000, "completion": "c"},
]
CHATS = [chat(row["prompt"], row["completion"]) for row in ROWS]


def save_as(path: Path) -> Path:
    """ROWS in the form that the name of ``path`` says."""
    plain = Path(str(path).lower().removesuffix(".gz"))
    if plain.suffix == ".parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    elif plain.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"], delimiter="," if plain.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
        if plain.suffix == ".json":
            text = json.dumps(ROWS, ensure_ascii=False)
        path.write_text(text, encoding="utf-8-sig")
    if path.suffix.lower() == ".gz":
        path.write_bytes(gzip.compress(path.read_bytes()))
    return path


@pytest.mark.parametrize(
    "name",
    ["a.json", "a.jsonl", "A.NDJSON", "a.csv", "a.tsv", "a.Parquet", "a.json.gz", "a.b.jsonl.GZ", "a.csv.gz"],
)
def test_files_of_all_kinds_hold_the_same_rows(tmp_path, name):
    path = save_as(tmp_path / name)
    assert load_chats(path) == load_chats(str(path)) == CHATS
    assert csv.field_size_limit() == 131072


def test_the_default_is_the_embedded_set():
    assert load_chats(DEFAULT_DATASET)[0]["messages"][0]["content"].startswith("Describe `")


def test_directories_of_save_to_disk_and_of_data_files_have_splits(tmp_path):
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": whole, "validation": whole.select([1])}).save_to_disk(tmp_path / "two")
    (tmp_path / "files").mkdir()
    write(tmp_path / "files" / "train.jsonl", *ROWS)
    write(tmp_path / "files" / "test.jsonl", ROWS[2])
    assert load_chats(tmp_path / "one") == load_chats(tmp_path / "two") == CHATS
    assert load_chats(tmp_path / "two", split="validation") == CHATS[1:2]
    # `datasets` keeps what it reads in its own cache: tests must not fill the user's.
    assert load_chats(tmp_path / "files", split="train[1:]+test") == [*CHATS[1:], CHATS[2]]
    with pytest.raises(ValueError, match="two has no split 'test'; its splits are: train, validation"):
        load_chats(tmp_path / "two", split="test")
    with pytest.raises(ValueError, match="has no subsets"):
        load_chats(tmp_path / "two", subset="en")


@pytest.fixture(autouse=True)
def cache_of_this_test(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_a_hub_name_goes_to_datasets(monkeypatch):
    asked = []

    def load_dataset(name: str, subset: str | None, *, split: str | None) -> datasets.DatasetDict:
        asked.append((name, subset, split))
        if name == "org/none":
            raise FileNotFoundError("no such repository")
        return datasets.DatasetDict({"train": datasets.Dataset.from_list([chat("q", "a"), chat("q2", "a2")])})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_chats("org/name", subset="en") == [chat("q", "a"), chat("q2", "a2")]
    assert asked == [("org/name", "en", None)]
    with pytest.raises(
        ValueError, match=r"'org/none' cannot be loaded \(FileNotFoundError: no such repository\); pass"
    ):
        load_chats("org/none")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "p", "completion": "c"}\n\nnot json\n', "line 3: not JSON at column 1: Expecting"),
        ("a.json", '[\n{"prompt": "p",\n"completion" "c"}]', "line 3, column 14: not JSON: Expecting ':' delimiter"),
        ("a.json", '{"prompt": "p", "completion": "c"}\n' * 2, r"line 2, .*one object per line is \.jsonl"),
        ("a.json", '{"prompt": "p", "completion": "c"}', "holds a JSON dict, not a list"),
        ("a.json", "", "the data set is empty"),
        ("a.json", "[]", "the data set is empty"),
        ("a.jsonl", "\n \n", "the data set is empty"),
        ("a.csv", "prompt,completion\n", "the data set is empty"),
        ("a.csv", 'prompt,completion\np,c\n"a\nb",c,d\n', "line 4: has more cells than the 2 columns of the"),
        ("a.csv", 'prompt,completion\np,"c', "line 2: not CSV: unexpected end of data"),
        ("a.csv", "prompt,completion\np\n", r"line 2: message 2 \(assistant\): the content must be .*, found None"),
        ("a.parquet", "no table", "a.parquet: cannot be read as Parquet"),
        ("a.jsonl.gz", "not packed", "a.jsonl.gz: cannot be read: Not a gzipped file"),
        ("a.xlsx", "", "unknown file type '.xlsx'; known are .json, .jsonl, .ndjson, .csv, .tsv, .parquet and"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_chats(tmp_path / name)


def test_a_file_that_is_not_text_or_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no such file; pass a \.json, \.jsonl"):
        load_chats(tmp_path / "none.jsonl")
    (tmp_path / "bytes.jsonl").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(ValueError, match="cannot be read as UTF-8"):
        load_chats(tmp_path / "bytes.jsonl")
    with pytest.raises(ValueError, match=r"bytes\.jsonl has no subsets"):
        open_source(tmp_path / "bytes.jsonl", subset="en")


def test_all_bad_rows_are_told_of_and_can_be_left_out(tmp_path, said):
    good, bad = {"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": ""}
    path = write(tmp_path / "rows.jsonl", good, bad, "{", *[bad] * 12, {"prompt": 1, "completion": ""}, good)
    lines = ", ".join(f"line {number}" for number in (2, *range(4, 13)))
    listed = (
        f"  {lines}, ...: message 2 (assistant): empty completion, nothing to learn; remove the row\n"
        "  line 3: not JSON at column 2: Expecting property name enclosed in double quotes\n"
        "  line 16: message 1 (user): the content must be text and nothing else, found 1"
    )
    with pytest.raises(ValueError, match=r"rows\.jsonl: 15 of 17 rows cannot be trained on:\n") as refused:
        load_chats(path)
    assert str(refused.value).splitlines()[1:] == [
        *listed.splitlines(), "Mend or remove them, or leave them out with --skip_bad_rows."
    ]  # fmt: skip
    assert load_chats(path, skip_bad_rows=True) == [chat("p", "c")] * 2
    assert said == [f"{path}: 15 of 17 rows are left out (--skip_bad_rows):\n{listed}"]
    with pytest.raises(ValueError, match="none of its 1 rows can be trained on"):
        load_chats(write(tmp_path / "one.jsonl", bad), skip_bad_rows=True)


def test_columns_without_effect_are_named_once(tmp_path, said):
    path = write(
        tmp_path / "rows.jsonl", *[{"prompt": "p", "completion": "c", "id": i, "score": 0.5} for i in range(3)]
    )
    load_chats(path)
    assert said == [f"{path}: not used, and without effect on training: column 'id', column 'score'"]
