"""Exact match by one forward is what greedy decoding gives."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from lightning_qlora.callbacks.exact_match import exact_matches


def test_one_forward_counts_what_generating_gives(tiny_llama_dir: Path) -> None:
    """Six prompts of different lengths with greedy answers, of which every second has one token altered."""
    model = LlamaForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32).eval()
    draw = torch.Generator().manual_seed(0)
    rows, labels = torch.zeros(7, 24, dtype=torch.int64), torch.full((7, 24), -100)
    for row in range(6):
        prompt = torch.randint(3, 300, (1, 4 + row), generator=draw)
        whole = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=5)[0]
        answer = whole[prompt.shape[1] :].clone()
        if row % 2:
            answer[row % len(answer)] += 1
        end = prompt.shape[1] + len(answer)
        rows[row, :end] = torch.cat([prompt[0], answer])
        labels[row, prompt.shape[1] : end] = answer
    batch: dict[str, Any] = {"input_ids": rows, "labels": labels, "num_tokens": 1, "num_loss_tokens": 1}

    def module(**inputs: Any) -> torch.Tensor:
        return model(**inputs).logits  # type: ignore[no-any-return]

    with torch.no_grad():
        assert exact_matches(module, batch).tolist() == [6, 3]
        blank = {"input_ids": rows[6:], "labels": labels[6:]}
        assert exact_matches(module, blank).tolist() == [0, 0]
