"""Answers of a model, in training and after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from ..checkpoints.chat_format import ChatFormat
from ..distributed.collectives import is_distributed


@torch.no_grad()
def generate_answer(
    model: Any,
    chat_format: ChatFormat,
    messages: Sequence[Mapping[str, str]],
    *,
    device: torch.device,
    max_new_tokens: int,
    temperature: float = 0.0,
    streamer: BaseStreamer | None = None,
) -> str:
    """The answer of ``model``, which is in eval mode, to a chat.

    Args:
        model: A causal language model of transformers; all ranks of a sharded one must call this together.
        chat_format: Its chat template, and where it stops.
        messages: The chat so far, each with ``role`` and ``content``; the last one is the user's.
        device: Where it computes; offloaded parameters are elsewhere.
        max_new_tokens: Tokens after which the answer is cut.
        temperature: Of sampling; 0 takes the likeliest token each time.
        streamer: Is given the tokens while they are made.

    Returns:
        The text, without special tokens.
    """
    tokenizer = chat_format.tokenizer
    inputs = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(device)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        sampling |= {"do_sample": True, "temperature": temperature}
    tokens = model.generate(
        **inputs, **sampling, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=list(chat_format.stops) or None, streamer=streamer,
    )  # fmt: skip
    answer = tokens[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False)).strip()


@torch.no_grad()
def generate_answers(
    model: Any,
    chat_format: ChatFormat,
    prompts: Sequence[str],
    *,
    device: torch.device,
    max_new_tokens: int,
    batch_size: int,
) -> list[str]:
    """The greedy answers of ``model``, which is in eval mode, to many prompts.

    Args:
        model: A causal language model of transformers. All ranks of a sharded one must call this together, with as many
            prompts each.
        chat_format: Its tokenizer, and where it stops.
        prompts: Texts that end where the assistant's turn begins, with all special tokens.
        device: Where it computes.
        max_new_tokens: Tokens after which an answer is cut.
        batch_size: Prompts that are answered at once; those of similar length go together.

    Returns:
        The texts, without special tokens.
    """
    tokenizer = chat_format.tokenizer
    pad = (
        tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    )  # the mask tells it apart
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    answers = [""] * len(ids)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        longest = max(len(ids[index]) for index in batch)
        padded = [[pad] * (longest - len(ids[index])) + ids[index] for index in batch]
        mask = [[0] * (longest - len(ids[index])) + [1] * len(ids[index]) for index in batch]
        tokens = model.generate(
            input_ids=torch.tensor(padded, device=device), attention_mask=torch.tensor(mask, device=device),
            do_sample=False, temperature=None, top_p=None, top_k=None, max_new_tokens=max_new_tokens, pad_token_id=pad,
            eos_token_id=list(chat_format.stops) or None,
            synced_gpus=is_distributed(),  # a sharded model's ranks must make the same number of forwards
        )  # fmt: skip
        for index, row in zip(batch, tokens[:, longest:], strict=True):
            text = tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            answers[index] = str(text).strip()
    return answers
