"""Preferences: TRL's formats of rows, what is trained of them, batches side by side, and rows that are refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_qlora.modules.data.preference import PreferenceDataModule, PreferenceDataOptions
from lightning_qlora.modules.data.preference_formats import to_preference
from lightning_qlora.modules.data.stdlib_docs import is_api_card, stdlib_card_preferences
from tests.chats import CHATML, make_tokenizer

USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "how"), ("assistant", "so"), ("assistant", "no"))
)

PAIR = {"prompt": [USER], "completions": [[GOOD], [BAD]], "desirable": [True, False]}


def module(rows: list[Any], tmp_path: Path, *, paired: bool = True, **options: Any) -> PreferenceDataModule:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data_options = {name: options.pop(name) for name in ("skip_bad_rows", "val_samples") if name in options}
    return PreferenceDataModule(
        make_tokenizer(CHATML), PreferenceDataOptions(str(path), **data_options), paired=paired,
        **{"batch_size": 2, "seq_len": 64, **options},
    )  # fmt: skip


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "how", "chosen": "so", "rejected": "no"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "how", "chosen": [USER, GOOD], "rejected": [USER, BAD]},  # the question beside whole chats
        {"prompt": "how", "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": "how so", "rejected": "how no"},
        {"prompt": [{"from": "human", "value": "how"}], "chosen": "so", "rejected": "no", "label": None},
    ],
)
def test_trls_formats_say_the_same(row):
    unused: dict[str, None] = {}
    preference: Any = to_preference(row, unused, paired=True)
    contents = [[message["content"].strip() for message in answer] for answer in preference["completions"]]
    assert ([message["content"].strip() for message in preference["prompt"]], contents) == (["how"], [["so"], ["no"]])
    assert preference["desirable"] == [True, False]
    assert not unused


def test_systems_earlier_turns_and_labels_are_read():
    row = {"prompt": [USER, GOOD, USER], "completion": [BAD], "label": False, "system": "be brief", "score": 3}
    unused: dict[str, None] = {}
    preference = to_preference(row, unused, paired=False)
    assert [message["role"] for message in preference["prompt"]] == ["system", "user", "assistant", "user"]
    assert (preference["completions"], preference["desirable"]) == ([[BAD]], [False])
    assert list(unused) == ["column 'score'"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "there is no rejected answer ('rejected' is missing)"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "there is no rejected answer ('rejected' is empty)"),
        ({"prompt": "a", "chosen": None, "rejected": "b"}, "there is no chosen answer ('chosen' is missing)"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are equal: nothing is preferred"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD | {"weight": 1}]}, "are equal: nothing is preferred"),
        ({"chosen": [USER, GOOD], "rejected": [USER]}, "'rejected' is the beginning of 'chosen'"),
        ({"chosen": [USER, GOOD], "rejected": [{**USER, "content": "x"}, BAD]}, "no common beginning"),
        ({"chosen": [USER, USER, GOOD], "rejected": [USER, BAD]}, "begins with a message of the role 'user'"),
        ({"chosen": "yes", "rejected": "no"}, "write it into a column 'prompt'"),
        ({"chosen": "yes", "rejected": [BAD]}, "one of 'chosen' and 'rejected' is a text"),
        ({"prompt": "a", "chosen": [{"role": "robot", "content": "b"}], "rejected": "c"}, "is a text and the other"),
        ({"prompt": "a", "chosen": [{"role": "robot", "content": "b"}], "rejected": [BAD]}, "unknown role 'robot'"),
        ({"prompt": "a", "completion": "b", "label": True}, "--loss kto takes labels"),
        ({"messages": [USER, GOOD]}, "but a row needs 'chosen' and 'rejected'"),
        ("text", "expected an object with fields, found str"),
    ],
)
def test_rows_that_cannot_be_are_refused_by_name_or_left_out(row, message, tmp_path):
    good = {"prompt": "how", "chosen": "so", "rejected": "no"}
    with pytest.raises(ValueError, match="1 of 3 rows cannot be trained on:\n  line 2: ") as error:
        module([good, row, good], tmp_path).load()
    assert message in str(error.value)
    data = module([good, row, good], tmp_path, skip_bad_rows=True)
    with pytest.warns(UserWarning, match="1 of 3 rows are left out"):
        data.load()
    assert data.num_train == 2


@pytest.mark.parametrize(
    ("label", "message"), [(1, r"the label is 1 \(int\)"), ("true", "the label is 'true'"), (None, "the label is None")]
)
def test_labels_of_kto_are_true_or_false(label, message, tmp_path):
    rows = [{"prompt": f"p{i}", "completion": "c", "label": i % 2 == 0} for i in range(4)]
    with pytest.raises(ValueError, match=rf"line 3: {message}.*must be true or false"):
        module([*rows[:2], {**rows[2], "label": label}, rows[3]], tmp_path, paired=False).load()


def test_one_class_or_one_prompt_is_nothing_to_learn_from(tmp_path):
    rows = [{"prompt": f"p{i}", "completion": "c", "label": True} for i in range(4)]
    with pytest.raises(
        ValueError, match="all 4 answers to train on have the label true; there is nothing to tell apart"
    ):
        module(rows, tmp_path, paired=False, val_samples=0).load()
    rows = [{"prompt": "p", "completion": f"c {i}", "label": i % 2 == 0} for i in range(4)]
    with pytest.raises(ValueError, match="All answers are to the same prompt"):
        module(rows, tmp_path, paired=False).load()


def documents(batch: dict[str, Any], tokenizer: Any) -> list[tuple[str, str]]:
    """Text and trained text of each document that counts."""
    lengths = batch.get("document_lengths") or [[batch["input_ids"].shape[1]]] * len(batch["input_ids"])
    flat = [length for row in lengths for length in row]
    parts = zip(batch["input_ids"].flatten().split(flat), batch["labels"].flatten().split(flat), strict=True)
    texts = [
        (tokenizer.decode(ids[ids != tokenizer.pad_token_id]), tokenizer.decode(labels[labels != -100]))
        for ids, labels in parts
    ]
    return [texts[number] for number in batch["documents"].tolist()]


@pytest.mark.parametrize("packing", [False, True])
def test_a_pair_is_two_documents_side_by_side_of_which_answers_are_trained(packing, tmp_path):
    rows = [{"prompt": f"q{i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(5)]
    data = module(rows, tmp_path, packing=packing, val_samples=0, batch_size=2 if packing else 5)
    data.load()
    batches = list(data.train_dataloader())
    seen = []
    for batch in batches:
        found = documents(batch, data.tokenizer)
        assert len(found) == 2 * batch["num_pairs"] == 2 * len(batch["index"])
        assert batch["completion_tokens"].tolist() == [
            len(data.tokenizer(trained)["input_ids"]) for _, trained in found
        ]  # fmt: skip
        for place, (chosen, good), (rejected, bad) in zip(batch["index"], found[::2], found[1::2], strict=True):
            assert (good, bad) == (f"yes {place}<|im_end|>", f"no {place}<|im_end|>")
            assert f"q{place}" in chosen
            assert f"q{place}" in rejected
            seen.append(int(place))
    assert sorted(seen) == [*range(5)]
    assert packing == ("document_lengths" in batches[0])
    blank = data.reference_batch(None)
    assert (blank["num_pairs"], blank["num_loss_tokens"], len(blank["documents"])) == (0, 0, 0)
    indexes = [place for n in range(data.num_reference_batches) for place in data.reference_batch(n)["index"].tolist()]
    assert sorted(indexes) == [*range(5)]
    assert indexes == [place for n in range(data.num_reference_batches) for place in data.reference_index(n)]


@pytest.mark.parametrize("packing", [False, True])
def test_labelled_answers_come_with_answers_to_other_prompts(packing, tmp_path):
    """Pairs count as two, which stay together when some are held out."""
    rows: list[Any] = [{"prompt": f"q{i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(12)]
    rows += [{"prompt": f"l{i}", "completion": f"{i}", "label": True} for i in range(3)]
    data = module(rows, tmp_path, packing=packing, paired=False, val_samples=2, batch_size=3)
    data.load()
    assert (data.num_train, data.num_val) == (25, 2)
    held = [row["prompt"][0]["content"] for row in data.val_chats]
    assert held[0] == held[1]
    for batch in data.train_dataloader():
        own, other = documents(batch, data.tokenizer), documents(batch["other"], data.tokenizer)
        for (text, trained), (mixed, foreign), good in zip(own, other, batch["desirable"].tolist(), strict=True):
            assert good != trained.startswith("no")
            assert mixed.startswith(text.rstrip().removesuffix(trained))
            assert foreign != trained
            assert mixed.rstrip().endswith(foreign)


def test_what_seq_len_cuts_of_a_pair(tmp_path):
    """A pair whose answers differ only behind seq_len, or lose one, is left out and counted."""
    long = "x " * 40
    rows = [
        {"prompt": "q", "chosen": "yes", "rejected": "no"},
        {"prompt": "q2", "chosen": long + "yes", "rejected": long + "no"},
        {"prompt": long * 3, "chosen": "yes", "rejected": "no"},
    ]
    data = module(rows, tmp_path)
    data.load()
    assert (data.num_train, data.num_dropped) == (1, 2)


def test_the_demo_data_prefer_cards_over_prose():
    rows = [row for _, row in stdlib_card_preferences()]
    assert len(rows) > 2000
    assert all(is_api_card(row["chosen"]) and not is_api_card(row["rejected"]) for row in rows)
    assert not is_api_card(rows[0]["chosen"] + "\nmore")
    assert not is_api_card(rows[0]["chosen"].replace("kind: ", "kind: a "))
