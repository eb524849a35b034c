"""The data module: what is trained and validated on, in which batches, and what is said about it."""

import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch

from lightning_qlora.modules.data.chat_template import tokenize_chats
from lightning_qlora.modules.data.data_module import ChatDataModule
from lightning_qlora.modules.data.options import DataOptions
from lightning_qlora.modules.data.samples import IGNORE_INDEX, Sample
from lightning_qlora.modules.data.sources import load_chats
from tests.chats import CHATML, DATED, Clock, chat, make_tokenizer, write


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


# --- what options ask for


def module(tokenizer: Any, dataset: Path, *, seq_len: int = 128, **options: Any) -> ChatDataModule:
    of_module = {name: options.pop(name) for name in ("vocab_size", "packing") if name in options}
    data = DataOptions(**({"dataset": str(dataset), "val_samples": 0} | options))
    return ChatDataModule(tokenizer, data, batch_size=2, seq_len=seq_len, **of_module)


def contents(data: ChatDataModule) -> list[str]:
    return [message["content"] for chat in data.val_chats for message in chat["messages"]]


def test_validation_data_of_their_own_are_used_whole(tokenizer, tmp_path, said):
    train = write(tmp_path / "train.jsonl", *[chat(f"q{i}", "a") for i in range(20)])
    val = write(tmp_path / "val.jsonl", *[chat(f"q{i}", "a") for i in range(18, 23)])
    data = module(tokenizer, train, val_dataset=str(val), val_samples=1)
    data.load()
    assert (data.num_train, data.num_val, contents(data)[::2]) == (20, 5, ["q18", "q19", "q20", "q21", "q22"])
    assert said == [
        "2 of the 5 samples to validate on are also trained on: val_loss will be lower than it is for new texts.",
        f"{train}: 20 samples to train on, 5 of {val} to validate on",
    ]


def test_a_validation_split_is_used_and_its_size_is_bounded(tokenizer, tmp_path, said):
    whole = datasets.Dataset.from_list([chat(f"q{i}", "a") for i in range(30)])
    parts = {"train": whole.select(range(20)), "validation": whole.select(range(20, 30))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    data = module(tokenizer, tmp_path / "saved", val_samples=4)
    data.load()
    assert (data.num_train, data.num_val) == (20, 4)
    assert {*contents(data)[::2]} < {f"q{i}" for i in range(20, 30)}
    saved = tmp_path / "saved"
    assert said == [f"{saved}: 20 samples to train on, 4 to validate on, of the 10 rows of its split validation"]
    for options, expected in (({}, (20, 0)), ({"split": "validation", "val_samples": 4}, (9, 1))):
        data = module(tokenizer, saved, **options)
        data.load()
        assert (data.num_train, data.num_val) == expected


def test_bad_rows_of_reading_and_of_the_template_are_left_out(tmp_path, said):
    refusing = CHATML + "{% if 'no' in messages[0]['content'] %}{{ raise_exception('no!') }}{% endif %}"
    path = write(tmp_path / "rows.jsonl", chat("q", "a"), chat("q", ""), chat("no", "a"), chat("r", "a"))
    data = module(make_tokenizer(refusing), path, skip_bad_rows=True)
    data.load()
    assert data.num_train == 2
    left_out = "are left out (--skip_bad_rows):\n  line"
    assert said[:2] == [
        f"{path}: 1 of 4 rows {left_out} 2: message 2 (assistant): empty completion, nothing to learn; remove the row",
        f"{path}: 1 of 3 rows {left_out} 3: the tokenizer's chat template refuses it: no!",
    ]
    with pytest.raises(ValueError, match="1 of 4 rows cannot be trained on"):
        module(make_tokenizer(refusing), path).load()


def test_tokens_past_the_embedding_are_refused_before_training(tokenizer, rows):
    size = 1 + max(max(sample["input_ids"]) for sample in tokenize_chats(tokenizer, load_chats(rows), 64).samples)
    module(tokenizer, rows, vocab_size=size).load()
    with pytest.raises(ValueError, match=f"12 samples hold tokens past the {size - 1} rows of the model's embedding"):
        module(tokenizer, rows, vocab_size=size - 1).load()


def test_a_template_for_a_base_model_leaves_its_tokenizer_alone(rows):
    base = make_tokenizer(None)
    data = module(base, rows, chat_template="plain", pad_token="<|im_start|>")
    data.load()
    assert base.chat_template is None
    assert data.train_set is not None
    assert data.tokenizer.decode(data.train_set[0]["input_ids"]).startswith(
        "User: question 0\n\nAssistant: answer 0<|im_"
    )
    assert data.turn_ends == (base.eos_token_id,)
    assert data.train_set.blank["input_ids"] == [base.convert_tokens_to_ids("<|im_start|>")]


@pytest.mark.parametrize(("packing", "steps"), [(False, 3), (True, 1)])
def test_steps_of_an_epoch_are_counted_as_lightning_takes_them(tokenizer, rows, packing, steps):
    # 12 samples, 2 of them on each of 2 devices: 3 batches, of which 1.5 make a step. Packed, they are 3 rows: 1 batch.
    data = module(tokenizer, rows, packing=packing)
    assert data.steps_per_epoch(devices=2) == steps
    assert data.steps_per_epoch(devices=2, accumulate=2) == math.ceil(steps / 2)
    assert data.batches_in(7, devices=2) == 7
    # Without packing two steps take an epoch's 3 batches; else each step takes the only one.
    assert data.batches_in(7, devices=2, accumulate=2) == (3 * 3 + 2 if not packing else 7)


def test_a_step_that_holds_less_than_accumulate_is_told_of(tokenizer, rows, said):
    data = module(tokenizer, rows)
    assert data.batches_in(6, devices=2, accumulate=8) == 6 * 3
    assert "3 micro-batches per device, fewer than --accumulate=8: every step has 3, all of the data" in said[-1]


@pytest.mark.parametrize("packing", [False, True])
def test_samples_are_shown_with_what_is_trained(tokenizer, rows, capsys, packing):
    data = module(tokenizer, rows, show_samples=2, packing=packing)
    data.load()
    assert capsys.readouterr().out.split("--- ")[1] == (
        "sample 1: 5 of 15 tokens are trained, shown between [[ and ]]\n"
        "<|im_start|>user\nquestion 0<|im_end|>\n<|im_start|>assistant\n[[answer 0<|im_end|>]]\n\n"
    ).replace("5 of 15", f"{data.previews[0].trained} of {data.previews[0].tokens}")
    assert data.previews[0].text(color=True).endswith("assistant\n\x1b[32manswer 0<|im_end|>\x1b[0m\n")
    batch = next(iter(module(tokenizer, rows).train_dataloader()))
    assert data.previews[0].trained == sum(label != -100 for label in tokenize_chats(
        tokenizer, load_chats(rows), 64).samples[0]["labels"][1:])  # fmt: skip
    assert batch["num_tokens"] > 0
    samples = (data.report_section() or {})["samples"]
    assert len(samples) == 2
    assert samples[1]["runs"][1] == ("answer 1!<|im_end|>", True)


# --- the date


def test_ranks_that_start_around_midnight_train_on_the_same_texts(rows, monkeypatch, said):
    def on(day: int) -> ChatDataModule:
        monkeypatch.setattr("lightning_qlora.modules.data.rendering.datetime", Clock(day))
        data = module(make_tokenizer(DATED), rows)
        data.load()
        return data

    first, second = on(8), on(9)
    assert first.fingerprint != second.fingerprint
    strategy = SimpleNamespace(broadcast=lambda value: first.date)
    second.trainer = SimpleNamespace(world_size=2, global_rank=1, strategy=strategy)  # type: ignore[assignment]
    loader = second.train_dataloader()
    second.setup("fit")
    assert second.fingerprint == first.fingerprint
    text = make_tokenizer(DATED).decode(next(iter(loader))["input_ids"][0])
    assert text.startswith("on 08 Nov\n")
    assert said[-1] == "The chat template writes the date: it stays that of the first run (08 Nov)."
