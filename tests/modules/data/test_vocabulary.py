"""The token that pads, and tokens that the model's embedding lacks."""

import pytest

from lightning_qlora.modules.data.samples import Sample
from lightning_qlora.modules.data.vocabulary import check_token_ids, choose_pad_token_id
from tests.chats import make_tokenizer


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


def test_a_pad_token_without_a_row_in_the_embedding_is_not_taken(said):
    tokenizer = make_tokenizer(pad_token="<|endoftext|>", extra=("<|pad_0|>", "[PAD]"))
    tokenizer.pad_token = "[PAD]"
    last = tokenizer.pad_token_id
    assert choose_pad_token_id(tokenizer, vocab_size=last + 1) == last
    assert choose_pad_token_id(tokenizer, vocab_size=last) == tokenizer.convert_tokens_to_ids("<|pad_0|>")
    assert said == [f"pad token '[PAD]' has id {last}, past the {last} rows of the model's embedding: padding with "
                    "'<|pad_0|>' instead"]  # fmt: skip
    with pytest.raises(ValueError, match=rf"'\[PAD\]' has id {last}, past the 3 rows .* with --pad_token"):
        choose_pad_token_id(tokenizer, vocab_size=3)


def test_a_pad_token_of_the_users_own_is_checked():
    tokenizer = make_tokenizer(extra=("<|right_pad|>",))
    own = tokenizer.convert_tokens_to_ids("<|right_pad|>")
    assert choose_pad_token_id(tokenizer, pad_token="<|right_pad|>") == own
    for pad_token, message in (("[PAD]", "not a token"), ("<|im_end|>", "ends texts"), ("<|right_pad|>", "has 3 rows")):
        with pytest.raises(ValueError, match=message):
            choose_pad_token_id(tokenizer, pad_token=pad_token, vocab_size=3)


def test_tokens_past_the_embedding_are_named():
    tokenizer = make_tokenizer()
    samples: list[Sample] = [{"input_ids": ids, "labels": ids} for ids in ([5, 7], [6, 5], [1, 7])]
    check_token_ids(samples, tokenizer, 8)
    names = [f"{tokenizer.convert_ids_to_tokens(i)!r} ({i})" for i in (6, 7)]
    with pytest.raises(ValueError, match="3 samples hold tokens past the 6 rows of the model's embedding: ") as refused:
        check_token_ids(samples, tokenizer, 6)
    assert f": {', '.join(names)}. The tokenizer is of another model" in str(refused.value)
