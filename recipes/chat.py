"""Talk to a finetuned model.

    python recipes/chat.py --adapter runs/fsdp2_qlora/adapter
    python recipes/chat.py --adapter runs/fsdp2_qlora/adapter --prompt "Describe `math.gcd(*integers)`."
    python recipes/chat.py --model my-merged-model

The model is as training left it: the 4-bit base with the adapter, its chat template and its stop tokens. Answers appear
while they are made. An empty line or Ctrl-D ends the chat, /new begins another. One GPU, or the CPU, where the demo
model writes a few tokens a second and takes 2 GiB.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import TextStreamer

from lightning_qlora.modules.checkpoints.chat_format import ChatFormat
from lightning_qlora.modules.checkpoints.resolve import resolve_model
from lightning_qlora.modules.cli import run_recipe
from lightning_qlora.modules.export.weights import find_base
from lightning_qlora.modules.hardware import capabilities, check_precision, compute_dtype
from lightning_qlora.modules.training.generation import generate_answer
from lightning_qlora.modules.training.inference import load_finetuned


def main(
    adapter: Path | None = None,
    model: str | None = None,
    system: str | None = None,
    prompt: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
) -> None:
    """Load the model and talk.

    Args:
        adapter: Directory of a LoRA adapter in peft's format.
        model: Base model, as for training. Default: the one that the adapter names.
        system: System message of each chat.
        prompt: Answer this and end, instead of a chat.
        max_new_tokens: Tokens after which an answer is cut.
        temperature: Of sampling. 0 takes the likeliest token each time.
    """
    if adapter is None and model is None:
        raise ValueError("Pass --adapter, or --model to talk to a model without an adapter.")
    if max_new_tokens < 1 or not temperature >= 0:
        raise ValueError(
            f"--max_new_tokens must be at least 1 and --temperature 0 or above, got {max_new_tokens} and {temperature}."
        )
    if adapter is None:
        directory = resolve_model(str(model))
    else:
        found = find_base(model, adapter)
        directory = found.directory
        if found.warning:
            print(f"warning: {found.warning}")
    chat_format = ChatFormat.of(directory, adapter)
    if not chat_format.tokenizer.chat_template:
        raise ValueError(f"{directory} has no chat template, so it cannot be talked to. Finetune it with one first.")
    finetuned = load_finetuned(directory, adapter)
    device = capabilities().device_type
    streamer = TextStreamer(chat_format.tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]

    def reply(messages: list[dict[str, str]]) -> str:
        dtype = compute_dtype(check_precision("auto"))
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            return generate_answer(
                finetuned, chat_format, messages, device=torch.device(device), max_new_tokens=max_new_tokens,
                temperature=temperature, streamer=streamer,
            )  # fmt: skip

    first = [{"role": "system", "content": system}] if system else []
    if prompt is not None:
        reply([*first, {"role": "user", "content": prompt}])
        return
    print("An empty line ends the chat, /new begins another.")
    messages = list(first)
    while question := ask():
        if question == "/new":
            messages = list(first)
            continue
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": reply(messages)})


def ask() -> str:
    """What the user types; empty at the end of the input."""
    try:
        return input("\n> ").strip()
    except (EOFError, KeyboardInterrupt):
        return ""


if __name__ == "__main__":
    sys.exit(run_recipe(main))
