"""Reading, tokenizing, ordering and resuming, each against a truth written out here or against an uninterrupted run."""

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import lightning.pytorch as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from lightning_qlora.modules.data.chat_template import choose_pad_token_id, tokenize_chats
from lightning_qlora.modules.data.collators import ChatCollator, PackedCollator, join_samples
from lightning_qlora.modules.data.data_module import ChatDataModule
from lightning_qlora.modules.data.dataset import ChatDataset
from lightning_qlora.modules.data.loader import ResumableDataLoader
from lightning_qlora.modules.data.sampler import GlobalBatchSampler
from lightning_qlora.modules.data.samples import IGNORE_INDEX, Sample
from lightning_qlora.modules.data.sources import DEFAULT_DATASET, load_chats

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Keeps the last answer only, as templates of reasoning models do with earlier thoughts.
REWRITING = CHATML.replace(
    "message['content']", "message['content'] if loop.last or message['role'] == 'user' else '...'"
)
NO_END = CHATML.replace("<|im_end|>", "")


def make_tokenizer(
    chat_template: str | None = CHATML, pad_token: str | None = "<|endoftext|>", extra: tuple[str, ...] = ()
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that can encode any text and has learned one merge of note, two line ends."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *extra]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["assistant\n\n\nuser hello world"] * 5, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token=pad_token)
    tokenizer.chat_template = chat_template
    return tokenizer


def chat(*contents: str) -> dict[str, list[dict[str, str]]]:
    """Alternating user and assistant turns."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]}


def learned_text(tokenizer: PreTrainedTokenizerFast, labels: list[int]) -> str:
    return tokenizer.decode([label for label in labels if label != IGNORE_INDEX])


# --- reading


def write(path: Path, *rows: object) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) if path.suffix == ".jsonl" else f"[{','.join(lines)}]", encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_all_row_forms_become_chats(tmp_path, suffix):
    path = write(
        tmp_path / f"rows{suffix}",
        {"messages": [{"role": "system", "content": "s", "weight": 1}, *chat("q", "a")["messages"]], "id": 3},
        {"instruction": "Add", "input": "1 2", "response": "3"},
        {"instruction": "Add", "input": "", "output": "0"},
        {"prompt": "p\u2028p", "completion": "c"},
    )
    assert load_chats(path) == [
        {"messages": [{"role": "system", "content": "s"}, *chat("q", "a")["messages"]]},
        chat("Add\n\n1 2", "3"),
        chat("Add", "0"),
        chat("p\u2028p", "c"),
    ]
    assert load_chats(str(path)) == load_chats(path)


def test_a_line_separator_inside_a_string_is_no_line_end(tmp_path):
    path = write(
        tmp_path / "rows.jsonl", json.dumps({"prompt": "a\u2028b", "completion": "c"}, ensure_ascii=False), "", "{"
    )
    with pytest.raises(ValueError, match="line 3, column 2: not JSON"):
        load_chats(path)


def test_the_default_is_the_embedded_set():
    assert load_chats(DEFAULT_DATASET)[0]["messages"][0]["content"].startswith("Describe `")


GOOD = {"prompt": "p", "completion": "c"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"text": "x", "id": 1}, r"row 2: found the fields \['id', 'text'\], but a row needs 'messages'"),
        ({"instruction": "x"}, r"row 2: found the fields \['instruction'\]"),
        (["p", "c"], "row 2: expected an object with fields, found list"),
        ({"messages": []}, "row 2: 'messages' must be a non-empty list"),
        ({"messages": "hi"}, "row 2: 'messages' must be a non-empty list"),
        ({"messages": ["hi"]}, "row 2, message 1: unknown role None"),
        (
            {"messages": [{"role": "human", "content": "x"}]},
            "row 2, message 1: unknown role 'human'; known roles: system, user",
        ),
        ({"messages": [{"role": ["user"], "content": "x"}]}, r"row 2, message 1: unknown role \['user'\]"),
        ({"messages": [{"role": "user", "content": None}]}, r"row 2, message 1 \(user\): the content must be text"),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]},
            "the content must be text and nothing else",
        ),
        ({"prompt": 3, "completion": "c"}, r"row 2, message 1 \(user\): the content must be text"),
        (chat("q", " \n"), "row 2, message 2: empty completion"),
        ({"instruction": "x", "response": ""}, "row 2, message 2: empty completion"),
        (chat("q"), "row 2: no assistant turn"),
        ({"prompt": "ab\ud83d", "completion": "c"}, r"row 2, message 1 \(user\): character 3 is half of a surrogate"),
        (chat("q", "\udc00"), r"row 2, message 2 \(assistant\): character 1 is half of a surrogate pair \('\\udc00'\)"),
        ({"messages": chat("q", "a")["messages"][1:]}, "row 2: the assistant speaks before any user turn"),
    ],
)
def test_a_row_that_cannot_be_trained_on_is_named(tmp_path, bad, message):
    with pytest.raises(ValueError, match=message):
        load_chats(write(tmp_path / "rows.json", GOOD, bad))


def test_a_bad_row_of_a_jsonl_file_is_named_by_its_line(tmp_path):
    with pytest.raises(ValueError, match="line 3: found the fields"):
        load_chats(write(tmp_path / "rows.jsonl", GOOD, "", {"text": "x"}))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "p", "completion": "c"}\nnot json\n', "line 2, column 1: not JSON: Expecting value"),
        ("a.json", '[\n{"prompt": "p",\n"completion" "c"}]', "line 3, column 14: not JSON: Expecting ':' delimiter"),
        ("a.json", '{"prompt": "p", "completion": "c"}\n' * 2, r"line 2, .*one object a line is \.jsonl"),
        ("a.json", '{"prompt": "p", "completion": "c"}', "holds a JSON dict, not a list"),
        ("a.json", "", "the data set is empty"),
        ("a.json", "[]", "the data set is empty"),
        ("a.jsonl", "\n \n", "the data set is empty"),
        ("a.csv", "prompt,completion\n", "unknown file type '.csv'"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_chats(tmp_path / name)


def test_a_file_that_is_not_text_or_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file; pass an existing"):
        load_chats(tmp_path / "none.jsonl")
    (tmp_path / "bytes.jsonl").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(ValueError, match="cannot be read as UTF-8"):
        load_chats(tmp_path / "bytes.jsonl")


def test_a_hub_name_goes_to_datasets(monkeypatch):
    asked = []

    def load_dataset(name: str, *, split: str) -> datasets.Dataset:
        asked.append((name, split))
        if name == "org/none":
            raise FileNotFoundError("no such repository")
        return datasets.Dataset.from_list([chat("q", "a"), chat("q2", "a2")])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_chats("org/name") == [chat("q", "a"), chat("q2", "a2")]
    assert asked == [("org/name", "train")]
    with pytest.raises(
        ValueError, match=r"'org/none' cannot be loaded \(FileNotFoundError: no such repository\); pass"
    ):
        load_chats("org/none")


# --- tokenization


def test_only_the_answers_and_their_end_tokens_are_learned():
    tokenizer = make_tokenizer()
    chats = [chat("hello", "world é漢"), chat("one", "two", "three", " four ")]
    chats[0]["messages"].insert(0, {"role": "system", "content": "assistant"})
    result = tokenize_chats(tokenizer, chats, seq_len=512)
    assert (result.kept, result.num_truncated, result.num_dropped) == ([0, 1], 0, 0)
    for sample, original in zip(result.samples, chats, strict=True):
        assert tokenizer.decode(sample["input_ids"]) == tokenizer.apply_chat_template(
            original["messages"], tokenize=False
        )
        assert all(
            label in (IGNORE_INDEX, token) for token, label in zip(sample["input_ids"], sample["labels"], strict=True)
        )
    assert learned_text(tokenizer, result.samples[0]["labels"]) == "world é漢<|im_end|>"
    assert learned_text(tokenizer, result.samples[1]["labels"]) == "two<|im_end|> four <|im_end|>"
    # The header is what generation is given, so the first label follows exactly its tokens.
    header = tokenizer.apply_chat_template(chats[0]["messages"][:2], tokenize=False, add_generation_prompt=True)
    labels = result.samples[0]["labels"]
    assert labels[: len(tokenizer(header)["input_ids"])] == [IGNORE_INDEX] * len(tokenizer(header)["input_ids"])
    assert labels[len(tokenizer(header)["input_ids"])] != IGNORE_INDEX


def test_a_token_across_header_and_answer_is_not_learned():
    tokenizer = make_tokenizer()
    sample = tokenize_chats(tokenizer, [chat("q", "\n\nhello")], seq_len=512).samples[0]
    # The header's line end and the answer's first one are one token, which generation, given the header, never meets.
    assert tokenizer.convert_tokens_to_ids("ĊĊ") in sample["input_ids"]
    assert learned_text(tokenizer, sample["labels"]) == "\nhello<|im_end|>"


def test_the_right_end_is_cut_and_samples_without_answer_are_dropped():
    tokenizer = make_tokenizer()
    chats = [chat("hello", "world"), chat("hello" * 30, "world"), chat("hello", "world" * 30)]
    whole = tokenize_chats(tokenizer, chats, seq_len=4096).samples
    seq_len = len(whole[0]["input_ids"])
    result = tokenize_chats(tokenizer, chats, seq_len)
    assert (result.kept, result.num_truncated, result.num_dropped) == ([0, 2], 1, 1)
    assert result.samples[0] == whole[0]
    assert result.samples[1] == {key: value[:seq_len] for key, value in whole[2].items()}


def test_the_shortest_useful_seq_len_keeps_one_learned_token():
    tokenizer = make_tokenizer()
    whole = tokenize_chats(tokenizer, [chat("q", "a")], seq_len=512).samples[0]
    first = next(i for i, label in enumerate(whole["labels"]) if label != IGNORE_INDEX)
    assert tokenize_chats(tokenizer, [chat("q", "a")], first + 1).samples[0]["labels"][-1] == whole["labels"][first]
    with pytest.raises(
        ValueError, match=f"seq_len={first} cuts away the completion of all 1 samples.*longest sample has"
    ):
        tokenize_chats(tokenizer, [chat("q", "a")], first)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        (REWRITING, "chat 2, message 2: the chat template does not write a conversation as a continuation"),
        (NO_END, "chat 1: the chat template does not end an assistant turn with a special token"),
        (
            CHATML + "{{ raise_exception('no system role') }}",
            "chat 1: the tokenizer's chat template refuses it: no system role",
        ),
    ],
)
def test_templates_that_cannot_be_trained_on_are_refused(template, message):
    with pytest.raises(ValueError, match=message):
        tokenize_chats(make_tokenizer(template), [chat("q", "a"), chat("q", "a", "q", "a")], seq_len=512)


def test_a_slow_tokenizer_and_a_senseless_seq_len_are_refused():
    slow = SimpleNamespace(is_fast=False, chat_template=CHATML)
    with pytest.raises(ValueError, match="slow tokenizer"):
        tokenize_chats(slow, [chat("q", "a")], seq_len=8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seq_len must be at least 2, got 1"):
        tokenize_chats(make_tokenizer(), [chat("q", "a")], seq_len=1)


def test_the_pad_token_is_never_the_end_token():
    assert choose_pad_token_id(make_tokenizer()) == 0
    for pad_token in (None, "<|im_end|>"):
        tokenizer = make_tokenizer(pad_token=pad_token, extra=("<|reserved_0|>", "<|right_pad|>"))
        assert tokenizer.convert_ids_to_tokens(choose_pad_token_id(tokenizer)) == "<|right_pad|>"
        assert tokenizer.pad_token == pad_token  # looking does not change it
    tokenizer = make_tokenizer(pad_token="<|im_end|>", extra=("<|reserved_0|>",))
    assert tokenizer.convert_ids_to_tokens(choose_pad_token_id(tokenizer)) == "<|reserved_0|>"
    tokenizer.unk_token = "<|endoftext|>"  # as in SmolLM2
    assert tokenizer.convert_ids_to_tokens(choose_pad_token_id(tokenizer)) == "<|endoftext|>"
    with pytest.raises(ValueError, match=r"set tokenizer\.pad_token"):
        choose_pad_token_id(make_tokenizer(pad_token=None))


# --- batches


def numbered(count: int) -> ChatDataset:
    """Samples that are told apart by their only token value: sample i is [i, i]."""
    return ChatDataset([{"input_ids": [i, i], "labels": [i, i]} for i in range(count)], blank_token_id=0)


def test_a_batch_is_padded_to_its_longest_sample_rounded_up():
    samples: list[Any] = [
        {"input_ids": [5, 6, 7], "labels": [IGNORE_INDEX, 6, 7]},
        {"input_ids": [8] * 5, "labels": [8] * 5},
    ]
    batch = ChatCollator(pad_token_id=9, pad_to_multiple_of=4)(samples)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 9, 9, 9, 9, 9], [8, 8, 8, 8, 8, 9, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 6, 7] + [-100] * 5, [8] * 5 + [-100] * 3]
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    # The first token of a sample is never predicted, so its label does not count.
    assert (batch["num_tokens"], batch["num_loss_tokens"]) == (8, 2 + 4)
    assert type(batch["num_tokens"]) is type(batch["num_loss_tokens"]) is int
    # Nothing is moved to the device that no model input needs; attention is causal and padding is on the right.
    assert batch.keys() == {"input_ids", "labels", "num_tokens", "num_loss_tokens"}


def test_a_blank_batch_counts_nothing():
    dataset = numbered(3)
    batch = ChatCollator(pad_token_id=0)([dataset[len(dataset)]])
    assert (batch["num_tokens"], batch["num_loss_tokens"]) == (0, 0)
    assert batch["input_ids"].tolist() == [[0] * 8]
    assert (batch["labels"] == IGNORE_INDEX).all()


def test_packs_are_padded_and_their_documents_told_apart():
    samples: list[Any] = [
        {"input_ids": [5, 6, 7], "labels": [IGNORE_INDEX, 6, 7]},
        {"input_ids": [8, 8], "labels": [8, 8]},
        {"input_ids": [9, 10, 11, 12], "labels": [9, IGNORE_INDEX, 11, 12]},
    ]
    packs = [join_samples(samples[:2]), samples[2]]
    assert packs[0] == {
        "input_ids": [5, 6, 7, 8, 8],
        "labels": [IGNORE_INDEX, 6, 7, 8, 8],
        "document_lengths": [3, 2],
    }
    batch = PackedCollator(pad_token_id=1, pad_to_multiple_of=5)(packs)
    tensors = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
    assert {key: tensor.tolist() for key, tensor in tensors.items()} == {
        "input_ids": [[5, 6, 7, 8, 8], [9, 10, 11, 12, 1]],
        "position_ids": [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]],
        # Neither 7 nor 8 predicts what another document begins with.
        "labels": [[-100, 6, 7, -100, 8], [-100, -100, 11, 12, -100]],
    }
    assert {tensor.dtype for tensor in tensors.values()} == {torch.int64}
    assert batch["document_lengths"] == [[3, 2], [4, 1]]
    assert (batch["num_tokens"], batch["num_loss_tokens"]) == (9, 3 + 2)
    counts = [batch["num_tokens"], batch["num_loss_tokens"], *batch["document_lengths"][1]]
    assert {type(count) for count in counts} == {int}
    # The counts are those of the same samples in a batch that is not packed.
    unpacked = ChatCollator(pad_token_id=1)(samples)
    assert (unpacked["num_tokens"], unpacked["num_loss_tokens"]) == (9, 5)


def test_a_blank_pack_counts_nothing_but_has_documents():
    dataset = numbered(3)
    batch = PackedCollator(pad_token_id=0)([dataset[len(dataset)]])
    assert (batch["num_tokens"], batch["num_loss_tokens"]) == (0, 0)
    assert (batch["labels"] == IGNORE_INDEX).all()
    assert batch["document_lengths"] == [[1, 7]]


@pytest.mark.parametrize("document_lengths", [[], [2], [2, 2], [3, 0], [4, -1]])
def test_document_lengths_that_do_not_divide_a_pack_are_refused(document_lengths):
    pack: Any = {"input_ids": [1, 2, 3], "labels": [1, 2, 3], "document_lengths": document_lengths}
    with pytest.raises(ValueError, match="do not divide the 3 tokens of their pack"):
        PackedCollator(pad_token_id=0)([pack])


# --- order


def epoch_of(
    count: int, batch_size: int, world_size: int, epoch: int = 0, seed: int = 0, start: int = 0
) -> list[list[list[int]]]:
    """For each rank, its batches of indices, through a real DataLoader."""
    ranks = []
    for rank in range(world_size):
        sampler = GlobalBatchSampler(range(count), batch_size=batch_size, num_replicas=world_size, rank=rank, seed=seed)
        sampler.set_epoch(epoch)
        sampler.start_batch = start
        loader = DataLoader(range(count + 1), batch_size=batch_size, sampler=sampler, collate_fn=list)  # type: ignore[arg-type]
        batches = list(loader)
        assert len(loader) == sampler.num_batches == len(batches) + start
        ranks.append(batches)
    return ranks


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(1, 40),
    batch_size=st.integers(1, 5),
    world_size=st.integers(1, 4),
    epoch=st.integers(0, 3),
    data=st.data(),
)
def test_the_ranks_together_see_the_single_device_batches(count, batch_size, world_size, epoch, data):
    (single,) = epoch_of(count, batch_size * world_size, 1, epoch)
    start = data.draw(st.integers(0, len(single) - 1))
    ranks = epoch_of(count, batch_size, world_size, epoch, start=start)
    assert {len(batches) for batches in ranks} == {math.ceil(count / (batch_size * world_size)) - start}
    for position, expected in enumerate(single[start:]):
        parts = [batches[position] for batches in ranks]
        assert all(part == [count] or count not in part for part in parts)
        interleaved = [part[i] for i in range(batch_size) for part in parts if i < len(part)]
        assert [index for index in interleaved if index != count] == expected


def test_a_rank_without_a_tail_sample_gets_one_blank():
    ranks = epoch_of(count=9, batch_size=2, world_size=4)
    assert [len(batches) for batches in ranks] == [2] * 4
    assert [batches[1] for batches in ranks][1:] == [[9]] * 3
    assert sorted(i for batches in ranks for batch in batches for i in batch) == [*range(9), 9, 9, 9]


def test_the_order_follows_seed_and_epoch():
    orders = {(seed, epoch): epoch_of(50, 4, 1, epoch, seed)[0] for seed in range(3) for epoch in range(3)}
    assert len({str(order) for order in orders.values()}) == len(orders)
    assert orders[1, 2] == epoch_of(50, 4, 1, 2, 1)[0]
    for order in orders.values():
        assert sorted(index for batch in order for index in batch) == list(range(50))


def test_start_batch_applies_to_one_iteration():
    sampler = GlobalBatchSampler(numbered(10), batch_size=3, num_replicas=1, rank=0)
    whole = list(sampler)
    sampler.start_batch = 2
    assert len(sampler) == 10
    assert list(sampler) == whole[6:]
    assert list(sampler) == whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"rank": 2}, "Invalid rank 2"),
    ],
)
def test_senseless_sampler_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GlobalBatchSampler(numbered(3), **({"batch_size": 1, "num_replicas": 2, "rank": 0} | arguments))


# --- resuming the loader


def make_loader(
    world_size: int = 1,
    rank: int = 0,
    batch_size: int = 4,
    count: int = 22,
    seed: int = 0,
    done: Callable[[], int] = lambda: 0,
) -> ResumableDataLoader:
    dataset = numbered(count)
    sampler = GlobalBatchSampler(dataset, batch_size=batch_size, num_replicas=world_size, rank=rank, seed=seed)
    return ResumableDataLoader(dataset, sampler, ChatCollator(pad_token_id=0), done)


def indices(loader: ResumableDataLoader) -> list[list[int]]:
    return [batch["input_ids"][:, 0].tolist() for batch in loader]


def test_the_state_is_what_was_trained_on_and_not_what_was_fetched():
    done = 0
    loader = make_loader(done=lambda: done)
    whole = indices(make_loader())
    fetched = iter(loader)
    for _ in range(4):
        next(fetched)
    done = 2
    state = loader.state_dict()
    assert state["next_sample"] == 8
    assert all(type(value) is int for value in state.values())
    resumed = make_loader()
    resumed.load_state_dict(json.loads(json.dumps(state)))
    assert resumed.state_dict() == state  # a checkpoint before the first batch does not lose the place
    assert indices(resumed) == whole[2:]
    resumed.order.set_epoch(1)
    assert len(indices(resumed)) == len(whole)


def test_the_place_moves_to_another_number_of_ranks():
    whole = indices(make_loader())
    saved = make_loader(done=lambda: 3)
    next(iter(saved))
    resumed = [make_loader(world_size=2, rank=rank, batch_size=2) for rank in range(2)]
    for loader in resumed:
        loader.load_state_dict(saved.state_dict())
    first, second = (indices(loader) for loader in resumed)
    joined = [[x for pair in zip(a, b, strict=True) for x in pair] for a, b in zip(first, second, strict=True)]
    assert joined == whole[3:]


def test_a_finished_epoch_resumes_at_the_start_of_the_next():
    saved = make_loader(done=lambda: 6)
    second_epoch = make_loader()
    second_epoch.order.set_epoch(1)
    expected = indices(second_epoch)
    indices(saved)
    resumed = make_loader()
    resumed.load_state_dict(saved.state_dict())
    resumed.order.set_epoch(2)  # as Lightning does with max_steps, one too many
    assert indices(resumed) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 2}, "global_batch_size 4 -> 2"),
        ({"world_size": 2}, "global_batch_size 4 -> 8"),
        ({"count": 21}, "dataset_size 22 -> 21"),
        ({"seed": 1}, "seed 0 -> 1"),
    ],
)
def test_a_place_in_another_order_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_loader(**arguments).load_state_dict(make_loader().state_dict())


def test_loading_leaves_the_global_random_state_alone():
    before = torch.random.get_rng_state()
    indices(make_loader())
    assert torch.equal(before, torch.random.get_rng_state())


# --- the data module


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def rows(tmp_path) -> Path:
    """12 chats of different length: 11 to train on, so 4 batches of 3, 3, 3 and 2, and one held out."""
    return write(tmp_path / "rows.jsonl", *(chat(f"question {i}", f"answer {i}" + "!" * i) for i in range(12)))


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
        data = ChatDataModule(tokenizer, path, batch_size=1, seq_len=64, seed=seed, val_samples=5)
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
    data = ChatDataModule(tokenizer, path, batch_size=2, seq_len=64, val_samples=5)
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
        ("val_samples", -1),
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


# --- packing in the data module


def documents(batch: Any) -> list[tuple[int, ...]]:
    """The tokens of each document, padding included."""
    return [
        tuple(tokens.tolist())
        for row, lengths in zip(batch["input_ids"], batch["document_lengths"], strict=True)
        for tokens in row.split(lengths)
    ]


def loss_tokens(loader: Any) -> int:
    return sum(batch["num_loss_tokens"] for batch in loader)


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """What the user is told. Not by caplog: whether Lightning's loggers reach it depends on what ran before."""
    messages: list[str] = []
    monkeypatch.setattr("lightning_qlora.modules.data.data_module.rank_zero_info", messages.append)
    return messages


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


# --- resuming a real Trainer


class Recorder(L.LightningModule):
    """One weight whose end value depends on every batch; remembers the batches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.seen: list[list[list[int]]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.seen.append(batch["input_ids"].tolist())
        return (self.weight * batch["input_ids"].double().mean()).square()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert batch["num_loss_tokens"] > 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-5)


class Stop(Exception):
    pass


class SaveAndStop(L.Callback):
    """Writes a checkpoint in one hook, after ``after`` micro-batches, and ends the run as a crash would."""

    def __init__(self, hook: str, after: int, path: Path) -> None:
        self.after, self.path = after, path
        setattr(self, hook, self.act)

    def act(self, trainer: L.Trainer, module: Recorder, *_: Any) -> None:
        if len(module.seen) == self.after and not trainer.sanity_checking:
            trainer.save_checkpoint(self.path)
            raise Stop


def fit(data: ChatDataModule, *callbacks: L.Callback, resume: Path | None = None, **options: Any) -> Recorder:
    module = Recorder()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        **options,
    )
    try:
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True if resume else None)
    except Stop:
        assert callbacks
    return module


def assert_resumes(make_data: Callable[[], ChatDataModule], path: Path, hook: str, after: int, **options: Any) -> None:
    """Stop after some micro-batches, resume in new objects, and compare with the run that was not interrupted."""
    whole = fit(make_data(), **options)
    stopped = fit(make_data(), SaveAndStop(hook, after, path), **options)
    assert path.is_file(), f"{hook} did not happen after {after} micro-batches"
    resumed = fit(make_data(), resume=path, **options)
    path.unlink()
    assert stopped.seen == whole.seen[:after], f"{hook} {after}"
    assert resumed.seen == whole.seen[after:], f"{hook} {after}"
    # Gradients of a half accumulated step are in no checkpoint; elsewhere the weight must be the same to the bit.
    if after % 4 % options.get("accumulate_grad_batches", 1) == 0:
        assert torch.equal(resumed.weight, whole.weight), f"{hook} {after}"


@pytest.fixture
def make_data(tokenizer, rows) -> Callable[..., ChatDataModule]:
    return lambda **options: ChatDataModule(tokenizer, rows, **({"batch_size": 3, "seq_len": 64, "seed": 5} | options))


pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("length", [{"max_epochs": 3}, {"max_steps": 6}], ids=["epochs", "steps"])
def test_a_run_resumes_with_the_next_sample(make_data, tmp_path, length, accumulate, packing):
    # Epochs have 4 micro-batches: 1 to 3 are inside the first, 4 ends it, 5 is inside the second.
    def make() -> ChatDataModule:
        return make_data(packing=True, seq_len=96, batch_size=1) if packing else make_data()

    assert len(make().train_dataloader()) == 4
    for after in range(1, 6):
        options = {"accumulate_grad_batches": accumulate, **length}
        assert_resumes(make, tmp_path / "c.ckpt", "on_train_batch_end", after, **options)


@pytest.mark.parametrize("length", [{"max_epochs": 3}, {"max_steps": 10}], ids=["epochs", "steps"])
@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_validation_end"])
def test_checkpoints_at_the_end_of_an_epoch_resume_with_the_next(make_data, tmp_path, hook, length):
    for after in (4, 8):
        assert_resumes(make_data, tmp_path / "c.ckpt", hook, after, **length)


def test_a_checkpoint_written_in_the_middle_of_a_step_repeats_that_step(make_data, tmp_path):
    for after in (1, 3, 4):
        assert_resumes(make_data, tmp_path / "c.ckpt", "on_train_batch_start", after, max_steps=7)


def test_epochs_that_are_cut_short_resume_too(make_data, tmp_path):
    for after in (1, 2, 3, 4):
        assert_resumes(make_data, tmp_path / "c.ckpt", "on_train_batch_end", after, max_epochs=3, limit_train_batches=2)


def test_loader_workers_start_on_the_order_of_the_right_epoch(make_data, tmp_path):
    assert_resumes(lambda: make_data(num_workers=1), tmp_path / "c.ckpt", "on_train_batch_end", 5, max_steps=7)


def test_a_finished_run_can_be_continued(make_data, tmp_path):
    """The end of a run by max_steps counts as the end of an epoch in Lightning, wherever it falls."""
    whole = fit(make_data(), max_steps=9)
    for first in (2, 4, 5):
        module = fit(make_data(), max_steps=first)
        module.trainer.save_checkpoint(tmp_path / "c.ckpt")
        resumed = fit(make_data(), resume=tmp_path / "c.ckpt", max_steps=9)
        assert module.seen + resumed.seen == whole.seen, first
        assert torch.equal(resumed.weight, whole.weight)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 2}, "global_batch_size 3 -> 2"),
        ({"seed": 6}, "seed 5 -> 6"),
        ({"val_samples": 0}, "dataset_size 11 -> 12"),
        ({"seq_len": 28}, "fingerprint"),
        ({"packing": True}, "fingerprint .*resume with the same data, seq_len, packing"),
    ],
)
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_epoch_end"])
def test_a_checkpoint_of_other_data_is_refused(make_data, tmp_path, hook, changed, message):
    path = tmp_path / "c.ckpt"
    fit(make_data(), SaveAndStop(hook, 4, path), max_epochs=2)
    with pytest.raises(ValueError, match=message):
        fit(make_data(**changed), resume=path, max_epochs=2)
