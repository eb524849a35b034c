"""Answers of a model while it is trained."""

from __future__ import annotations

from typing import Any

import torch

from ..checkpoints.chat_format import ChatFormat


@torch.no_grad()
def greedy_answer(
    model: Any, chat_format: ChatFormat, prompt: str, device: torch.device, max_new_tokens: int
) -> str:  # fmt: skip
    """The greedy answer of ``model``, which is in eval mode, to a one-turn chat with ``prompt``.

    Args:
        model: A causal language model of transformers; all ranks of a sharded one must call this together.
        chat_format: Its chat template, and where it stops.
        prompt: What the user says.
        device: Of the model.
        max_new_tokens: Tokens after which the answer is cut.
    """
    tokenizer = chat_format.tokenizer
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(device)
    tokens = model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, temperature=None, top_p=None, top_k=None,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=list(chat_format.stops) or None,
    )  # fmt: skip
    answer = tokens[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False)).strip()
