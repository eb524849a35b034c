"""Token ids and labels: what is learned, and what seq_len leaves of it."""

from datetime import datetime
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_qlora.modules.data.chat_template import tokenize_chats
from lightning_qlora.modules.data.rendering import date_parts
from lightning_qlora.modules.data.samples import IGNORE_INDEX
from tests.chats import CHATML, chat, learned_text, make_tokenizer


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


# --- templates that do more than write


def tokenized(template: str, *chats: Any, **options: Any) -> tuple[list[str], list[str]]:
    """The texts of all samples, and of each what is learned."""
    tokenizer = make_tokenizer(template, extra=("<|user|>", "<|eot|>"))
    samples = tokenize_chats(tokenizer, chats, 512, **options).samples
    texts = [tokenizer.decode(sample["input_ids"]) for sample in samples]
    return texts, [learned_text(tokenizer, sample["labels"]) for sample in samples]


# As DeepSeek's distilled models: answers are written without their thoughts, and generation begins with one.
OPENS_THOUGHT = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "<|im_start|>{{ message['content'].split('</think>')[-1] }}<|im_end|>"
    "{% else %}<|user|>{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|><think>\n{% endif %}"
)
# As Qwen3: the last answer has a thought, if only an empty one, and earlier ones have none.
KEEPS_LAST_THOUGHT = (
    "{% for message in messages %}{% set parts = message['content'].split('</think>') %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' and loop.last %}"
    "<think>\n{{ (message['reasoning_content'] or parts[0].split('<think>')[-1].strip() if parts | length > 1 "
    "or message['reasoning_content'] else '') }}\n</think>\n\n"
    "{% endif %}{{ parts[-1].lstrip() }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Phi-3: every turn ends, and then the text.
ENDS_TEXT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|eot|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}"
)
NO_END = CHATML.replace("<|im_end|>", "")
NO_HEADER = CHATML.replace("{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", "")
THOUGHT = "<think>\nwhy\n</think>\n\nso"


def test_an_answer_with_a_thought_follows_the_prompt_that_generation_gives(said):
    chats = [chat("q", THOUGHT), chat("q", THOUGHT, "r", THOUGHT), chat("q", "why\n</think>\n\nso")]
    texts, learned = tokenized(OPENS_THOUGHT, *chats)
    one = "<|user|>q<|im_start|><think>\nwhy\n</think>\n\nso<|im_end|>"
    # The first answer of the second chat is trained as it is generated, and then read as the template writes history.
    two = f"<|user|>q<|im_start|>\n\nso<|im_end|><|user|>r{one.removeprefix('<|user|>q')}"
    assert texts == [one, one, two, one]
    assert learned == ["why\n</think>\n\nso<|im_end|>"] * 4
    assert [note.split(":")[0] for note in said] == [
        "The chat template leaves thoughts out of answers. For training, an answer with a thought is written after the "
        "generation prompt as it stands in the data.",
        "The chat template rewrites earlier turns of a chat (templates of reasoning models leave out earlier thoughts)",
    ]
    assert tokenized(OPENS_THOUGHT, chats[1], train_on="last")[0] == [two]


def test_an_answer_without_the_thought_that_generation_opens_is_trained_and_that_is_said(said):
    texts, learned = tokenized(OPENS_THOUGHT, chat("q", "<b>a</b>"), chat("q", "a", "r", "b"))
    assert texts == [
        "<|user|>q<|im_start|><b>a</b><|im_end|>",
        "<|user|>q<|im_start|>a<|im_end|><|user|>r<|im_start|>b<|im_end|>",
    ]
    assert learned == ["<b>a</b><|im_end|>", "a<|im_end|>b<|im_end|>"]
    assert len(said) == 1
    assert "ends the prompt with '<think>\\n', which it does not write before the answers of these data" in said[0]


def test_turns_that_a_template_rewrites_later_are_trained_one_by_one(said):
    several = chat("q", "a", "r", THOUGHT)
    first = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    texts, learned = tokenized(KEEPS_LAST_THOUGHT, several, chat("q", "a"))
    assert texts[0] == f"{first}<think>\n\n</think>\n\na<|im_end|>\n" == texts[2]
    assert (
        texts[1] == f"{first}a<|im_end|>\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n{THOUGHT}<|im_end|>\n"
    )
    # What the template puts before an answer is generated too.
    assert learned == ["<think>\n\n</think>\n\na<|im_end|>", f"{THOUGHT}<|im_end|>", learned[0]]
    assert len(said) == 1
    assert said[0].endswith("each trained turn becomes a sample of its own.")
    assert tokenized(KEEPS_LAST_THOUGHT, several, train_on="last")[0] == texts[1:2]
    result = tokenize_chats(make_tokenizer(KEEPS_LAST_THOUGHT), [several, chat("q", "a")], 512)
    assert (result.kept, result.num_dropped) == ([0, 0, 1], 0)


def test_reasoning_beside_the_content_is_written_or_refused():
    reasoned: Any = chat("q", "so")
    reasoned["messages"][1]["reasoning_content"] = "why"
    _, learned = tokenized(KEEPS_LAST_THOUGHT, reasoned)
    assert learned == [f"{THOUGHT}<|im_end|>"]
    with pytest.raises(
        ValueError, match="does not write its reasoning_content; put it at the beginning of the content"
    ):
        tokenized(CHATML, reasoned)


def test_a_marker_that_an_answer_quotes_does_not_end_it():
    quoting = chat("q", "say <|im_end|> and <|im_start|> then", "r", "b")
    assert tokenized(CHATML, quoting)[1] == ["say <|im_end|> and <|im_start|> then<|im_end|>b<|im_end|>"]
    assert tokenized(ENDS_TEXT, quoting)[1] == ["say <|im_end|> and <|im_start|> then<|eot|>b<|eot|>\n<|im_end|>"]
    with pytest.raises(
        ValueError, match="chat 1: the chat template does not end an assistant turn with a special token"
    ):
        tokenized(NO_END, chat("q", "say <|im_start|> then"))


def test_a_header_that_no_generation_prompt_gives_is_not_trained(said):
    texts, learned = tokenized(NO_HEADER, chat("q", "assistant", "r", "b"))
    assert texts[0].count("<|im_start|>assistant\n") == 2
    assert learned == ["assistant<|im_end|>b<|im_end|>"]
    assert said == [
        "The chat template ignores add_generation_prompt: '<|im_start|>assistant\\n' before an answer is not trained, "
        "and where the model is used, prompts must end with it."
    ]


def test_only_the_turns_that_are_to_be_trained_are(said):
    three: Any = chat("q", "a", "r", "b", "s", "c")
    three["messages"][3]["train"] = False
    assert tokenized(CHATML, three)[1] == ["a<|im_end|>c<|im_end|>"]
    assert tokenized(CHATML, three, train_on="last")[1] == ["c<|im_end|>"]
    three["messages"][5]["train"] = False
    texts, learned = tokenized(CHATML, three)
    assert learned == ["a<|im_end|>"]
    assert texts == ["<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"]  # the rest teaches nothing
    assert said == []


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template.*with --chat_template: plain fits every model"),
        (
            CHATML + "{{ raise_exception('no system role') }}",
            "the tokenizer's chat template refuses it: no system role",
        ),
        (CHATML + "{{ 1 + 'a' }}", "the tokenizer's chat template refuses it: unsupported operand"),
        (
            CHATML.replace("message['content']", "message['content'] | upper"),
            r"message 2 \(assistant\): the chat template does not write its content as it is \('aß' became 'ASS'\)",
        ),
        (
            CHATML.replace("message['content']", "message['text']"),
            r"message 2 \(assistant\): .* does not write its content",
        ),
        (
            CHATML.replace("messages %}", "messages if message['role'] != 'system' %}"),
            r"message 1 \(system\): the chat template leaves its content out of the text",
        ),
        (
            CHATML.replace("assistant\n{% endif %}", "model\n{% endif %}"),
            r"message 2 \(assistant\): the chat template begins this turn in another way than for generation",
        ),
    ],
)
def test_templates_that_cannot_be_trained_on_are_refused_by_cause(template, message):
    chats: list[Any] = [chat("q", "aß")]
    if "system" in message:
        chats[0]["messages"].insert(0, {"role": "system", "content": "be brief"})
    with pytest.raises(ValueError, match=message):
        tokenized(template, *chats)


@pytest.mark.parametrize(
    "as_written",
    ["message['content'] | trim", "message['content'] | tojson", "message['content'] | replace('/no_think', '')"],
)
def test_a_prompt_in_another_form_is_no_part_that_vanished(as_written):
    of_users = f"({as_written}) if message['role'] == 'user' else message['content']"
    tokenized(CHATML.replace("message['content']", of_users), chat(' say "a"\n/no_think ', "a"))


# --- the date


def test_the_date_is_what_is_asked_for_and_not_what_the_clock_says():
    dated = "on {{ strftime_now('%d %b %Y') }}\n" + CHATML
    date = date_parts(dated, datetime(2026, 11, 9, 23, 59))
    assert date == {"%d": "09", "%b": "Nov", "%Y": "2026"}
    assert tokenized(dated, chat("q", "a"), date=date)[0][0].startswith("on 09 Nov 2026\n<|im_start|>user")
    assert tokenized(dated, chat("q", "a"))[0][0].startswith(f"on {datetime.now():%d %b %Y}")
    assert date_parts(CHATML) == {}
    # Only the date is replaced: all white space is as in the template.
    for spaced in ("\n  \n" + dated, "  {% if true %}\n x{% endif %}" + dated):
        tokenizer = make_tokenizer(spaced)
        text = tokenizer.apply_chat_template(chat("q", "a")["messages"], tokenize=False)
        found = tokenized(spaced, chat("q", "a"), date=date_parts(spaced))[0]
        assert found == [text]


# --- what cannot be


def test_a_slow_tokenizer_and_a_senseless_seq_len_are_refused():
    slow = SimpleNamespace(is_fast=False, chat_template=CHATML)
    with pytest.raises(ValueError, match="slow tokenizer"):
        tokenize_chats(slow, [chat("q", "a")], seq_len=8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seq_len must be at least 2, got 1"):
        tokenize_chats(make_tokenizer(), [chat("q", "a")], seq_len=1)
