"""The token that pads, and tokens that the model's embedding lacks."""

import pytest

from lightning_qlora.modules.data.vocabulary import choose_pad_token_id
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
