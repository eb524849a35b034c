"""Templates for base models, against the texts that they are to write."""

import pytest

from lightning_qlora.modules.data.chat_template import tokenize_chats
from lightning_qlora.modules.data.named_templates import NAMED_TEMPLATES, read_chat_template
from tests.chats import CHATML, chat, learned_text, make_tokenizer

LLAMA3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


@pytest.mark.parametrize(
    ("name", "text", "learned"),
    [
        (
            "plain",
            "System: s\n\nUser: q\n\nAssistant: a<|im_end|>\n\nUser: r\n\nAssistant: b<|im_end|>\n\n",
            "a<|im_end|>b<|im_end|>",
        ),
        (
            "chatml",
            "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
            "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n",
            "a<|im_end|>b<|im_end|>",
        ),
        (
            "llama3",
            "".join(
                f"<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>"
                for role, content in (
                    ("system", "s"),
                    ("user", "q"),
                    ("assistant", "a"),
                    ("user", "r"),
                    ("assistant", "b"),
                )
            ),
            "a<|eot_id|>b<|eot_id|>",
        ),
    ],
)
def test_named_templates_write_what_they_should(name, text, learned):
    tokenizer = make_tokenizer(None, extra=LLAMA3)
    tokenizer.chat_template = read_chat_template(name, tokenizer)
    turns = chat("q", "a", "r", "b")
    turns["messages"].insert(0, {"role": "system", "content": "s"})
    sample = tokenize_chats(tokenizer, [turns], 512).samples[0]
    assert tokenizer.decode(sample["input_ids"]) == text
    assert learned_text(tokenizer, sample["labels"]) == learned


def test_a_text_begins_as_the_tokenizer_begins_it():
    tokenizer = make_tokenizer(None)
    tokenizer.bos_token = "<|endoftext|>"
    assert "bos_token" not in read_chat_template("plain", tokenizer)
    tokenizer.add_bos_token = True
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    for name in ("plain", "chatml"):
        tokenizer.chat_template = read_chat_template(name, tokenizer)
        ids = tokenize_chats(tokenizer, [chat("q", "a")], 512).samples[0]["input_ids"]
        assert ids.count(tokenizer.bos_token_id) == 1
        assert ids[0] == tokenizer.bos_token_id


def test_a_template_of_a_file_and_what_cannot_be_one(tmp_path):
    tokenizer = make_tokenizer(None)
    (tmp_path / "own.jinja").write_text(CHATML)
    assert read_chat_template(str(tmp_path / "own.jinja"), tokenizer) == CHATML
    (tmp_path / "empty.jinja").write_text(" \n")
    assert [*NAMED_TEMPLATES] == ["plain", "chatml", "llama3"]
    for name, message in (
        (
            str(tmp_path / "none.jinja"),
            r"neither a named template \(plain, chatml, llama3\) nor a file that can be read",
        ),
        (str(tmp_path / "empty.jinja"), "the file is empty; it must hold a Jinja template"),
        ("llama3", r"needs the tokens <\|start_header_id\|>, .* take --chat_template plain"),
    ):
        with pytest.raises(ValueError, match=message):
            read_chat_template(name, tokenizer)
