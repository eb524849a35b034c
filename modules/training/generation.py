"""Answers of a model, in training and after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from ..checkpoints.chat_format import ChatFormat
from ..distributed.collectives import is_distributed


def prompt_of(chat_format: ChatFormat, messages: Sequence[Mapping[str, Any]]) -> str:
    """A chat as text that ends where the assistant's turn begins, with all special tokens."""
    return str(chat_format.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False))


def generate_answer(
    model: Any,
    chat_format: ChatFormat,
    messages: Sequence[Mapping[str, Any]],
    *,
    device: torch.device,
    max_new_tokens: int,
    temperature: float = 0.0,
    streamer: BaseStreamer | None = None,
) -> str:
    """The answer to one chat, whose last message is the user's; otherwise as :func:`generate_answers`."""
    return generate_answers(
        model, chat_format, [prompt_of(chat_format, messages)], device=device, max_new_tokens=max_new_tokens,
        temperature=temperature, streamer=streamer,
    )[0]  # fmt: skip


@torch.no_grad()
def generate_answers(
    model: Any,
    chat_format: ChatFormat,
    prompts: Sequence[str],
    *,
    device: torch.device,
    max_new_tokens: int,
    batch_size: int = 1,
    temperature: float = 0.0,
    streamer: BaseStreamer | None = None,
) -> list[str]:
    """The answers of ``model``, which is in eval mode, to many prompts.

    Args:
        model: A causal language model of transformers. All ranks of a sharded one must call this together, with as many
            prompts each.
        chat_format: Its tokenizer, and where it stops.
        prompts: As :func:`prompt_of` writes them.
        device: Where it computes; offloaded parameters are elsewhere.
        max_new_tokens: Tokens after which an answer is cut.
        batch_size: Prompts that are answered at once; those of similar length go together.
        temperature: Of sampling; 0 takes the likeliest token each time.
        streamer: Is given the tokens while they are made; for one prompt only.

    Returns:
        The texts, without special tokens.
    """
    tokenizer = chat_format.tokenizer
    # The attention mask tells padding apart, so any token will do.
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        sampling |= {"do_sample": True, "temperature": temperature}
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    answers = [""] * len(ids)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        longest = max(len(ids[index]) for index in batch)
        padded = [[pad] * (longest - len(ids[index])) + ids[index] for index in batch]
        mask = [[0] * (longest - len(ids[index])) + [1] * len(ids[index]) for index in batch]
        tokens = model.generate(
            input_ids=torch.tensor(padded, device=device), attention_mask=torch.tensor(mask, device=device), **sampling,
            max_new_tokens=max_new_tokens, pad_token_id=pad, eos_token_id=list(chat_format.stops) or None,
            synced_gpus=is_distributed(),  # a sharded model's ranks must make the same number of forwards
            streamer=streamer,
        )  # fmt: skip
        for index, row in zip(batch, tokens[:, longest:], strict=True):
            text = tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            answers[index] = str(text).strip()
    return answers
