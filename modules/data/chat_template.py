"""Chats to token ids by the tokenizer's own chat template, with labels on what the assistant says."""

from collections.abc import Sequence
from dataclasses import dataclass

import jinja2
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from .samples import IGNORE_INDEX, Chat, Sample


@dataclass(frozen=True)
class TokenizedChats:
    """Result of :func:`tokenize_chats`."""

    samples: list[Sample]
    kept: list[int]
    """For each sample, the index of its chat."""
    num_truncated: int
    """Kept samples that lost tokens at the end."""
    num_dropped: int
    """Chats whose completions were cut away entirely."""


def tokenize_chats(tokenizer: PreTrainedTokenizerBase, chats: Sequence[Chat], seq_len: int) -> TokenizedChats:
    """Tokenize chats with the tokenizer's own chat template, with labels on what the assistant says.

    Labels cover the content of every assistant turn and the token that ends the turn, so that the model learns to stop;
    the prompts, the turn headers and what the template writes after the end token carry ``IGNORE_INDEX``. A token that
    begins in the header and ends in the content carries it too: in generation the header is given and such a token
    never comes up.

    Args:
        tokenizer: A fast tokenizer with a chat template.
        chats: Conversations as :func:`load_chats` returns them.
        seq_len: Tokens kept of a sample; what is longer loses its end.

    Returns:
        The samples that still have something to learn, and the counts of the others.

    Raises:
        ValueError: If the tokenizer cannot do this, the template does not render a chat as a continuation of its
            beginning, or no sample is left.
    """
    if seq_len < 2:
        raise ValueError(f"seq_len must be at least 2, got {seq_len}: the first token of a sample is never predicted")
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} is a slow tokenizer without character offsets; load one with use_fast=True"
        )
    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template, so it is unknown how turns are written; use an instruct model's "
            "tokenizer, or set tokenizer.chat_template to the Jinja template the model is to be trained on"
        )
    rendered = [_render(tokenizer, chat["messages"], number) for number, chat in enumerate(chats, start=1)]
    # The templates write every special token themselves, the one that opens the text included.
    encoded = tokenizer([text for text, _ in rendered], add_special_tokens=False, return_offsets_mapping=True)
    markers = set(tokenizer.get_added_vocab().values()) | set(tokenizer.all_special_ids)
    samples: list[Sample] = []
    kept: list[int] = []
    num_truncated = 0
    for index, (_, turns) in enumerate(rendered):
        ids: list[int] = encoded["input_ids"][index]
        labels = _completion_labels(ids, encoded["offset_mapping"][index], turns, markers, number=index + 1)[:seq_len]
        if all(label == IGNORE_INDEX for label in labels[1:]):
            continue
        samples.append({"input_ids": ids[:seq_len], "labels": labels})
        kept.append(index)
        num_truncated += len(ids) > seq_len
    if not samples:
        raise ValueError(
            f"seq_len={seq_len} cuts away the completion of all {len(chats)} samples, so nothing is left to learn; "
            f"raise seq_len (the longest sample has {max(map(len, encoded['input_ids']), default=0)} tokens)"
        )
    return TokenizedChats(samples, kept, num_truncated, num_dropped=len(chats) - len(samples))


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], number: int
) -> tuple[str, list[tuple[int, int]]]:
    """Return a chat's text and the [start, end) characters of its assistant turns, end markers included."""

    def render(count: int, header: bool = False) -> str:
        text = tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=header)
        assert isinstance(text, str)
        return text

    try:
        text = render(len(messages))
        turns = []
        for position, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = render(position, header=True), render(position + 1)
            if not (text.startswith(after) and after.startswith(before)):
                raise ValueError(
                    f"chat {number}, message {position + 1}: the chat template does not write a conversation as a "
                    "continuation of its beginning (some templates rewrite earlier turns), so the completion cannot "
                    "be located; split the chat into single-turn ones, or set tokenizer.chat_template to a template "
                    "that only appends"
                )
            turns.append((len(before), len(after)))
    except jinja2.TemplateError as error:
        raise ValueError(f"chat {number}: the tokenizer's chat template refuses it: {error}") from error
    return text, turns


def _completion_labels(
    ids: list[int], offsets: list[tuple[int, int]], turns: list[tuple[int, int]], markers: set[int], number: int
) -> list[int]:
    """Return the token ids from the start of each turn to its last marker token, ``IGNORE_INDEX`` elsewhere."""
    labels = [IGNORE_INDEX] * len(ids)
    for start, end in turns:
        inside = [i for i, (begin, stop) in enumerate(offsets) if start <= begin and stop <= end]
        ends = [i for i in inside if ids[i] in markers]
        if not ends:
            raise ValueError(
                f"chat {number}: the chat template does not end an assistant turn with a special token, so a model "
                "trained on it would never stop; write tokenizer.eos_token after the assistant's content in "
                "tokenizer.chat_template"
            )
        for i in inside:
            if i <= ends[-1]:
                labels[i] = ids[i]
    return labels


def choose_pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id to pad with: the tokenizer's pad token, or another special token where that one ends texts as well.

    Code that finds the end of a sample by its padding would otherwise hide the end-of-text token from the model. The
    tokenizer is not changed.

    Raises:
        ValueError: If the vocabulary has no special token to spare.
    """
    eos = tokenizer.eos_token_id
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != eos:
        return int(tokenizer.pad_token_id)
    in_use = {eos, tokenizer.bos_token_id}
    spare = {token: i for token, i in tokenizer.get_added_vocab().items() if i not in in_use}
    candidates = [token for token in spare if "pad" in token.lower()]
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id not in in_use:
        spare[tokenizer.unk_token] = tokenizer.unk_token_id
        candidates.append(tokenizer.unk_token)
    candidates += [token for token in spare if "reserved" in token.lower()]
    if not candidates:
        raise ValueError(
            f"the tokenizer pads with {tokenizer.pad_token!r}, which is None or its end-of-text token, and no other "
            "token is free for it; set tokenizer.pad_token to a token of the vocabulary that texts do not use"
        )
    rank_zero_info(f"pad token {tokenizer.pad_token!r} is None or ends texts: padding with {candidates[0]!r} instead")
    return int(spare[candidates[0]])
