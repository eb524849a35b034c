"""Answers of a model, in training and after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from ..checkpoints.chat_format import ChatFormat


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
