"""The data module: what is trained and validated on, in which batches, and what is said about it."""

import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_qlora.modules.data.data_module import ChatDataModule
from lightning_qlora.modules.data.options import DataOptions
from lightning_qlora.modules.data.samples import IGNORE_INDEX, Sample
from lightning_qlora.modules.data.sources import load_chats
from tests.chats import chat, write


def test_the_data_module_without_a_trainer(tokenizer, rows, monkeypatch, tmp_path):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    data = ChatDataModule(tokenizer, rows, batch_size=3, seq_len=64, pad_to_multiple_of=16)
    data.load()
    train_set = data.train_set
    data.setup("fit")
    assert data.train_set is train_set
    assert (data.num_train, data.num_val, data.num_dropped, data.num_truncated) == (11, 1, 0, 0)
    batches = list(data.train_dataloader())
    assert [len(batch["input_ids"]) for batch in batches] == [3, 3, 3, 2]
    for batch in batches:
        lengths = (batch["input_ids"] != tokenizer.pad_token_id).sum(1)
        assert batch["input_ids"].shape[1] == math.ceil(int(lengths.max()) / 16) * 16
        assert batch["num_tokens"] == int(lengths.sum())
        assert batch["num_loss_tokens"] == int((batch["labels"] != IGNORE_INDEX).sum())
    (val_batch,) = data.val_dataloader()
    assert data.val_chats[0]["messages"][1]["content"] in tokenizer.decode(val_batch["input_ids"][0])
    assert list(Path.cwd().iterdir()) == []


def test_the_same_chats_are_held_out_whatever_their_order_and_the_seed(tokenizer, tmp_path):
    chats = [chat(f"q{i}", f"a{i}") for i in range(50)]
    chats += chats[:20]  # a repeated chat must not be on both sides
    held_out = []
    for name, order, seed in (("a", chats, 0), ("b", chats[::-1], 7)):
        path = write(tmp_path / f"{name}.jsonl", *order)
        data = ChatDataModule(tokenizer, DataOptions(str(path), val_samples=5), batch_size=1, seq_len=64, seed=seed)
        data.load()
        assert data.num_train + data.num_val == len(chats)
        assert data.num_val == len(data.val_chats) >= 5
        assert data.train_set is not None
        assert data.val_set is not None
        train = {tuple(row["input_ids"]) for row in data.train_set.rows}
        assert not train & {tuple(row["input_ids"]) for row in data.val_set.rows}
        held_out.append(sorted(map(str, data.val_chats)))
    assert held_out[0] == held_out[1]


def test_small_data_are_not_eaten_by_the_held_out_part(tokenizer, tmp_path):
    path = write(tmp_path / "rows.jsonl", *(chat(f"q{i}", f"a{i}") for i in range(9)))
    data = ChatDataModule(tokenizer, path, batch_size=2, seq_len=64)
    assert data.val_dataloader() == []
    assert (data.num_train, data.num_val) == (9, 0)


def test_counts_of_cut_and_dropped_chats(tokenizer, tmp_path):
    path = write(tmp_path / "rows.jsonl", chat("q", "a"), chat("q" * 99, "a"), chat("q", "a" * 99))
    data = ChatDataModule(tokenizer, path, batch_size=2, seq_len=32)
    data.load()
    assert (data.num_train, data.num_dropped, data.num_truncated) == (2, 1, 1)


@pytest.mark.parametrize("distinct", [1, 2])
def test_texts_that_are_too_many_to_hold_out_are_trained_on(tokenizer, tmp_path, said, distinct):
    path = write(tmp_path / "rows.jsonl", *[chat("q", f"a{i % distinct}") for i in range(30)])
    data = ChatDataModule(tokenizer, path, batch_size=2, seq_len=64)
    assert data.val_dataloader() == []
    assert (data.num_train, data.num_val, data.example()) == (30, 0, None)
    assert any("nothing is held out: every text is there more than 3 times" in message for message in said)


@pytest.mark.parametrize(("repetitions", "held_out"), [(1, 5), (2, 4), (3, 3), (5, 5), (6, 0)])
def test_a_repeated_text_is_held_out_whole_or_not_at_all(tokenizer, tmp_path, repetitions, held_out):
    chats = [chat(f"q{i}", "a") for i in range(50)] * repetitions
    path = write(tmp_path / "rows.jsonl", *chats)
    data = ChatDataModule(tokenizer, DataOptions(str(path), val_samples=5), batch_size=2, seq_len=64)
    data.load()
    assert (data.num_train, data.num_val) == (len(chats) - held_out, held_out)
    assert all(data.val_chats.count(held) == repetitions for held in data.val_chats)


@pytest.mark.parametrize("packing", [False, True])
def test_samples_beyond_the_models_positions_are_warned_of(tokenizer, rows, packing):
    def load(limit: int | None, seq_len: int = 128) -> ChatDataModule:
        data = ChatDataModule(
            tokenizer, rows, batch_size=2, seq_len=seq_len, packing=packing, max_position_embeddings=limit
        )  # fmt: skip
        data.load()
        return data

    longest = max(len(tokenizer.apply_chat_template(chat["messages"])["input_ids"]) for chat in load_chats(rows))
    with pytest.warns(UserWarning, match=f"sample has {longest} tokens, .* max_position_embeddings={longest - 1}:"):
        load(limit=longest - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(limit=None)
        load(limit=longest)  # packing makes longer rows, but their positions start at 0 in each document
        load(limit=longest - 1, seq_len=longest - 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("seq_len", 1),
        ("seed", -1),
        ("num_workers", -1),
        ("pad_to_multiple_of", 0),
    ],
)
def test_senseless_arguments_are_refused_before_any_reading(tokenizer, name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least .*, got {value}"):
        ChatDataModule(tokenizer, "none.jsonl", **({"batch_size": 1, "seq_len": 8} | {name: value}))


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_collator_of_the_users_own_makes_all_batches(tokenizer, rows, packing, num_workers):
    options: dict[str, Any] = {"batch_size": 3, "seq_len": 128, "packing": packing, "seed": 5}
    data = ChatDataModule(tokenizer, rows, collate_fn=pad_on_the_left, num_workers=num_workers, **options)
    usual = ChatDataModule(tokenizer, rows, **options)
    for own, batch in zip(
        [*data.train_dataloader(), *data.val_dataloader()],
        [*usual.train_dataloader(), *usual.val_dataloader()],
        strict=True,
    ):
        assert own.keys() == {"input_ids", "packed"}
        assert own["packed"] is packing
        # The same samples in the same order: only how they become a batch is the user's.
        for left, right in zip(own["input_ids"], batch["input_ids"], strict=True):
            assert left[left != 0].tolist() == right[right != 0].tolist()
    assert (data.fingerprint, data.state_dict()) == (usual.fingerprint, usual.state_dict())


def pad_on_the_left(samples: list[Sample]) -> dict[str, Any]:
    longest = max(len(sample["input_ids"]) for sample in samples)
    ids = [[0] * (longest - len(sample["input_ids"])) + sample["input_ids"] for sample in samples]
    return {"input_ids": torch.tensor(ids), "packed": all("document_lengths" in sample for sample in samples)}


def test_padding_for_a_collator_that_does_its_own_is_refused(tokenizer, rows):
    with pytest.raises(ValueError, match="pad_to_multiple_of=16 has no effect on your collate_fn"):
        ChatDataModule(tokenizer, rows, batch_size=1, seq_len=64, pad_to_multiple_of=16, collate_fn=pad_on_the_left)


@pytest.mark.parametrize("packing", [False, True])
def test_two_ranks_split_train_and_validation_batches(tokenizer, rows, packing):
    def loaders(world_size: int, rank: int, batch_size: int) -> tuple[list[Any], list[Any]]:
        data = ChatDataModule(tokenizer, rows, batch_size=batch_size, seq_len=64, packing=packing)
        data.trainer = SimpleNamespace(world_size=world_size, global_rank=rank)  # type: ignore[assignment]
        return list(data.train_dataloader()), list(data.val_dataloader())

    ranks = [loaders(2, rank, 2) for rank in range(2)]
    (train, val) = loaders(1, 0, 4)
    for part, single in enumerate((train, val)):
        assert len(ranks[0][part]) == len(ranks[1][part]) == len(single)
        for first, second, whole in zip(ranks[0][part], ranks[1][part], single, strict=True):
            for count in ("num_tokens", "num_loss_tokens"):
                assert first[count] + second[count] == whole[count]
    assert ranks[1][1][0]["num_loss_tokens"] == 0  # one held-out chat, so the second rank validates a blank


def documents(batch: Any) -> list[tuple[int, ...]]:
    """The tokens of each document, padding included."""
    return [
        tuple(tokens.tolist())
        for row, lengths in zip(batch["input_ids"], batch["document_lengths"], strict=True)
        for tokens in row.split(lengths)
    ]


def loss_tokens(loader: Any) -> int:
    return sum(batch["num_loss_tokens"] for batch in loader)


def test_packs_hold_the_samples_of_the_unpacked_data(tokenizer, rows, said):
    plain = ChatDataModule(tokenizer, rows, batch_size=3, seq_len=128)
    packed = ChatDataModule(tokenizer, rows, batch_size=2, seq_len=128, packing=True)
    assert packed.report_section() is None
    packed.load()
    plain.load()
    assert plain.train_set is not None
    samples = [tuple(sample["input_ids"]) for sample in plain.train_set.rows]
    lengths = sum(map(len, samples))
    packs = math.ceil(lengths / 128)
    batches = list(packed.train_dataloader())
    assert len(batches) == math.ceil(packs / 2) > 1
    found = [document for batch in batches for document in documents(batch) if set(document) != {0}]
    assert sorted(found) == sorted(samples)
    for batch in batches:
        assert batch["input_ids"].shape[1] <= 128
        assert "attention_mask" not in batch
    assert sum(batch["num_tokens"] for batch in batches) == lengths
    assert loss_tokens(batches) == loss_tokens(plain.train_dataloader())
    assert loss_tokens(packed.val_dataloader()) == loss_tokens(plain.val_dataloader()) > 0
    assert (packed.val_chats, packed.example()) == (plain.val_chats, plain.example())
    assert packed.report_section() == {
        **(plain.report_section() or {}),
        "train_packs": packs,
        "val_packs": 1,
        "fill": lengths / (packs * 128),
    }
    assert [message.removeprefix(f"{rows}: ") for message in said] == [
        f"11 samples to train on, 1 held out; packed into {packs} and 1 rows, {1 - lengths / packs / 128:.1%} of them "
        "empty",
        "11 samples to train on, 1 held out",
    ]


def test_what_seq_len_cut_is_said(tokenizer, tmp_path, said):
    path = write(tmp_path / "rows.jsonl", chat("q", "a"), chat("q" * 99, "a"), chat("q", "a" * 99))
    data = ChatDataModule(tokenizer, path, batch_size=2, seq_len=32, packing=True)
    data.load()
    assert len(said) == 1
    assert "2 samples to train on, 0 held out; seq_len=32 cut the end of 1 of them, and 1 more are left" in said[0]
    assert data.report_section() == {
        "train_samples": 2, "val_samples": 0, "truncated": 1, "dropped": 1, "train_packs": 2, "val_packs": 0,
        "fill": data.fill,
    }  # fmt: skip
    assert data.val_dataloader() == []
