"""Token ids and the model's embedding: which token pads, and that every id has a row."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from .samples import Sample


def choose_pad_token_id(
    tokenizer: PreTrainedTokenizerBase, *, pad_token: str | None = None, vocab_size: int | None = None,
    taken: Collection[int] = (),
) -> int:  # fmt: skip
    """Return the id to pad with: the tokenizer's pad token, or another special token where that one cannot be taken.

    A pad token that ends texts as well is not taken: code that finds the end of a sample by its padding would hide the
    end-of-text token from the model. Nor is one without a row in the model's embedding. The tokenizer is not changed.

    Args:
        tokenizer: The model's.
        pad_token: The token to take, whatever the tokenizer says.
        vocab_size: Rows of the model's embedding; ``None`` if not known.
        taken: Tokens that mean something else to the model, such as those that stand for images.

    Raises:
        ValueError: If ``pad_token`` cannot be taken, or the vocabulary has no special token to spare.
    """
    eos = tokenizer.eos_token_id
    vocabulary = tokenizer.get_vocab()
    limit = len(tokenizer) if vocab_size is None else vocab_size
    if pad_token is not None:
        if pad_token not in vocabulary:
            raise ValueError(f"--pad_token {pad_token!r} is not a token of the vocabulary")
        if vocabulary[pad_token] == eos:
            raise ValueError(f"--pad_token {pad_token!r} is the token that ends texts; take another one")
        if vocabulary[pad_token] in taken:
            raise ValueError(f"--pad_token {pad_token!r} stands for something else in this model; take another one")
        if vocabulary[pad_token] >= limit:
            raise ValueError(
                f"--pad_token {pad_token!r} has id {vocabulary[pad_token]}, but the model's embedding has {limit} rows"
            )
        return int(vocabulary[pad_token])
    own = tokenizer.pad_token_id
    if own is not None and own != eos and own < limit and own not in taken:
        return int(own)
    in_use = {eos, tokenizer.bos_token_id, *taken}
    spare = {token: i for token, i in tokenizer.get_added_vocab().items() if i not in in_use and i < limit}
    candidates = [token for token in spare if "pad" in token.lower()]
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id not in in_use and tokenizer.unk_token_id < limit:
        spare[tokenizer.unk_token] = tokenizer.unk_token_id
        candidates.append(tokenizer.unk_token)
    candidates += [token for token in spare if "reserved" in token.lower()]
    if own is not None and own >= limit:
        why = f"has id {own}, past the {limit} rows of the model's embedding"
    else:
        why = "stands for an image" if own in taken else "is None or ends texts"
    if not candidates:
        raise ValueError(
            f"the tokenizer's pad token {tokenizer.pad_token!r} {why}, and no other token is free for it; name a token "
            "of the vocabulary that texts do not use with --pad_token (or set tokenizer.pad_token)"
        )
    rank_zero_info(f"pad token {tokenizer.pad_token!r} {why}: padding with {candidates[0]!r} instead")
    return int(spare[candidates[0]])


def check_token_ids(samples: Iterable[Sample], tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Check that the model's embedding has a row for every token of ``samples``.

    Args:
        samples: Tokenized data.
        tokenizer: Names the tokens.
        vocab_size: Rows of the model's embedding.

    Raises:
        ValueError: Naming the tokens that have none.
    """
    beyond = [[i for i in sample["input_ids"] if i >= vocab_size] for sample in samples]
    if not (ids := sorted({i for found in beyond for i in found})):
        return
    named = ", ".join(f"{tokenizer.convert_ids_to_tokens(i)!r} ({i})" for i in ids[:5])
    raise ValueError(
        f"{sum(map(bool, beyond))} samples hold tokens past the {vocab_size} rows of the model's embedding: {named}"
        f"{', ...' if len(ids) > 5 else ''}. The tokenizer is of another model, or tokens were added without resizing "
        "the embedding. If the chat template writes them, take another one (--chat_template plain needs no new "
        "tokens); else save the model after model.resize_token_embeddings(len(tokenizer))"
    )
