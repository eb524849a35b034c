"""Answers of a model, in training and after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from ..checkpoints.chat_format import ChatFormat


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
    """:func:`generate_answers` to one chat."""
    return generate_answers(
        model, chat_format, [messages], device=device, max_new_tokens=max_new_tokens, temperature=temperature,
        streamer=streamer,
    )[0]  # fmt: skip


@torch.no_grad()
def generate_answers(
    model: Any,
    chat_format: ChatFormat,
    chats: Sequence[Sequence[Mapping[str, str]]],
    *,
    device: torch.device,
    max_new_tokens: int,
    temperature: float = 0.0,
    streamer: BaseStreamer | None = None,
) -> list[str]:
    """The answers of ``model``, which is in eval mode, to chats, all in one batch.

    Args:
        model: A causal language model of transformers; all ranks of a sharded one must call this together.
        chat_format: Its chat template, and where it stops.
        chats: Each the messages so far, with ``role`` and ``content``; the last one is the user's.
        device: Where it computes; offloaded parameters are elsewhere.
        max_new_tokens: Tokens after which the answer is cut.
        temperature: Of sampling; 0 takes the likeliest token each time.
        streamer: Is given the tokens while they are made; for one chat only.

    Returns:
        The texts, without special tokens.
    """
    tokenizer = chat_format.tokenizer
    prompts = [
        tokenizer.apply_chat_template(list(chat), add_generation_prompt=True, return_dict=True)["input_ids"]
        for chat in chats
    ]
    longest, pad = max(map(len, prompts)), tokenizer.pad_token_id or 0
    inputs = {
        "input_ids": torch.tensor([[pad] * (longest - len(ids)) + ids for ids in prompts], device=device),
        "attention_mask": torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=device),
    }
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        sampling |= {"do_sample": True, "temperature": temperature}
    tokens = model.generate(
        **inputs, **sampling, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=list(chat_format.stops) or None, streamer=streamer,
    )  # fmt: skip
    texts = tokenizer.batch_decode(tokens[:, longest:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [str(text).strip() for text in texts]
