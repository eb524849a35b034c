"""Chats, data files and a tokenizer for tests."""

import json
from datetime import datetime
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lightning_qlora.modules.data.dataset import ChatDataset
from lightning_qlora.modules.data.samples import IGNORE_INDEX

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(
    chat_template: str | None = CHATML, pad_token: str | None = "<|endoftext|>", extra: tuple[str, ...] = ()
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that can encode any text and has learned one merge of note, two line ends."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *extra]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["assistant\n\n\nuser hello world"] * 5, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token=pad_token)
    tokenizer.chat_template = chat_template
    return tokenizer


def chat(*contents: str) -> dict[str, list[dict[str, str]]]:
    """Alternating user and assistant turns."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]}


def learned_text(tokenizer: PreTrainedTokenizerFast, labels: list[int]) -> str:
    return tokenizer.decode([label for label in labels if label != IGNORE_INDEX])


def write(path: Path, *rows: object) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) if path.suffix == ".jsonl" else f"[{','.join(lines)}]", encoding="utf-8")
    return path


def numbered(count: int) -> ChatDataset:
    """Samples that are told apart by their only token value: sample i is [i, i]."""
    return ChatDataset([{"input_ids": [i, i], "labels": [i, i]} for i in range(count)], blank_token_id=0)


DATED = "on {{ strftime_now('%d %b') }}\n" + CHATML


class Clock:
    """Stands for ``datetime`` where it is a given day."""

    def __init__(self, day: int) -> None:
        self.day = datetime(2026, 11, day)

    def now(self) -> datetime:
        return self.day
