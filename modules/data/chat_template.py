"""Chats to token ids by the tokenizer's own chat template, with labels on what the assistant says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from .checks import BadRows
from .rendering import ChatRenderer, RenderedChat, TrainOn
from .samples import IGNORE_INDEX, Chat, Sample


@dataclass(frozen=True)
class TokenizedChats:
    """Result of :func:`tokenize_chats`."""

    samples: list[Sample]
    kept: list[int]
    """For each sample, the index of its chat. A chat has several samples if its template rewrites earlier turns."""
    num_truncated: int
    """Kept samples that lost tokens at the end."""
    num_dropped: int
    """Samples whose completions were cut away entirely."""
    turn_ends: tuple[int, ...]
    """The tokens that end the trained turns, in ascending order."""


def tokenize_chats(
    tokenizer: PreTrainedTokenizerBase,
    chats: Sequence[Chat],
    seq_len: int,
    *,
    train_on: TrainOn = "all",
    date: Mapping[str, str] | None = None,
    places: Sequence[str] | None = None,
    bad: BadRows | None = None,
) -> TokenizedChats:
    """Tokenize chats with the tokenizer's own chat template, with labels on what the assistant says.

    Labels cover a trained turn from where generation begins to the token that ends the turn, so that the model learns
    to stop; the prompts, the turn headers and what the template writes after the end token carry ``IGNORE_INDEX``. A
    token that begins in the header and ends in the content carries it too: in generation the header is given and such a
    token never comes up.

    Args:
        tokenizer: A fast tokenizer with a chat template.
        chats: Conversations as :func:`load_chats` returns them.
        seq_len: Tokens kept of a sample; what is longer loses its end.
        train_on: Train all assistant turns of a chat, or the last one alone.
        date: What the template writes of the date, from :func:`~lightning_qlora.modules.data.rendering.date_parts`;
            default: today.
        places: Where each chat stands in its source, for messages; default: ``"chat 1"`` and so on.
        bad: What to do with chats that cannot be trained on; default: refuse them.

    Returns:
        The samples that still have something to learn, and the counts of the others.

    Raises:
        ValueError: If the tokenizer cannot do this, chats cannot be trained on (naming the first ten and the causes),
            or no sample is left.
    """
    check_tokenizer(tokenizer, seq_len)
    places = places or [f"chat {number}" for number in range(1, len(chats) + 1)]
    bad = bad or BadRows("the data", skip=False)
    renderer = ChatRenderer(tokenizer, train_on, date)
    rendered: list[tuple[int, RenderedChat]] = []
    for index, chat in enumerate(chats):
        try:
            rendered += [(index, text) for text in renderer.render(chat["messages"], chat.get("tools", ()))]
        except ValueError as error:
            bad.add(places[index], error)
    # The templates write every special token themselves, the one that opens the text included.
    texts = [text.text for _, text in rendered]
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True) if texts else {"input_ids": []}
    markers = turn_markers(tokenizer)
    samples: list[Sample] = []
    kept: list[int] = []
    turn_ends: set[int] = set()
    num_truncated = num_dropped = 0
    for number, (index, text) in enumerate(rendered):
        ids: list[int] = encoded["input_ids"][number]
        try:
            labels, ends = completion_labels(ids, encoded["offset_mapping"][number], text, markers)
        except ValueError as error:
            bad.add(places[index], error)
            continue
        turn_ends.update(ends)
        labels = labels[:seq_len]
        if all(label == IGNORE_INDEX for label in labels[1:]):
            num_dropped += 1
            continue
        samples.append({"input_ids": ids[:seq_len], "labels": labels})
        kept.append(index)
        num_truncated += len(ids) > seq_len
    bad.settle(len(chats))
    if not samples:
        raise ValueError(
            f"seq_len={seq_len} cuts away the completion of all {num_dropped} samples, so nothing is left to learn; "
            f"raise seq_len (the longest sample has {max(map(len, encoded['input_ids']), default=0)} tokens)"
        )
    for note in renderer.notes:
        rank_zero_info(f"{note}.")
    return TokenizedChats(samples, kept, num_truncated, num_dropped, tuple(sorted(turn_ends)))


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, seq_len: int) -> None:
    """Check that samples of ``seq_len`` tokens can be made with this tokenizer.

    Raises:
        ValueError: If not.
    """
    if seq_len < 2:
        raise ValueError(f"seq_len must be at least 2, got {seq_len}: the first token of a sample is never predicted")
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} is a slow tokenizer without character offsets; load one with use_fast=True"
        )
    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template, so it is unknown how turns are written; use an instruct model, or "
            "name a template for this base model with --chat_template: plain fits every model, or a file with a Jinja "
            "template"
        )


def turn_markers(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that can end a turn: special and added ones, but not the runs of white space that some tokenizers add."""
    added = {i for token, i in tokenizer.get_added_vocab().items() if token.strip(" \n\t\r▁")}
    return added | set(tokenizer.all_special_ids)


def completion_labels(
    ids: list[int], offsets: list[tuple[int, int]], rendered: RenderedChat, markers: set[int]
) -> tuple[list[int], set[int]]:
    """Return the labels, and the tokens that end the turns.

    Labels are the token ids from the start of each turn to the last marker after its content, and ``IGNORE_INDEX``
    elsewhere. Markers inside the content, which an answer may quote, end nothing.
    """
    labels = [IGNORE_INDEX] * len(ids)
    last_tokens = set()
    for turn in rendered.turns:
        inside = [i for i, (begin, stop) in enumerate(offsets) if turn.start <= begin and stop <= turn.end]
        ends = [i for i in inside if ids[i] in markers and offsets[i][0] >= turn.content_end]
        if not ends:
            raise ValueError(
                "the chat template does not end an assistant turn with a special token, so a model trained on it would "
                "never stop; write the tokenizer's eos_token after the assistant's content in the template "
                "(--chat_template)"
            )
        for i in inside:
            if i <= ends[-1]:
                labels[i] = ids[i]
        last_tokens.add(ids[ends[-1]])
    return labels, last_tokens
