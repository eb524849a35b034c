"""Merge a LoRA adapter into its base: one dense 16-bit model, for serving or further conversion.

    python recipes/merge_adapter.py --adapter runs/fsdp2_qlora/adapter --output_dir runs/merged
    python recipes/merge_adapter.py --adapter my-adapter --model meta-llama/Llama-3.1-8B-Instruct --output_dir merged

Runs on the CPU, weight by weight: beside one output file (--max_shard_size) it holds the adapter, and one weight in
float32 with its update, whatever the size of the model. The result is a transformers directory with its tokenizer, for
AutoModelForCausalLM.from_pretrained; it appears once it is complete and checked: the logits of the written files on
--prompt must be those of base and adapter, but for rounding. The demo model takes about 20 seconds and 0.3 GiB of disk.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import torch

from lightning_qlora.modules.checkpoints.tokenizer import load_tokenizer
from lightning_qlora.modules.cli import run_recipe
from lightning_qlora.modules.export.merge import merge_adapter
from lightning_qlora.modules.export.weights import find_base
from lightning_qlora.modules.training.run_directory import RunDirectory


def main(
    adapter: Path,
    output_dir: Path,
    model: str | None = None,
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto",
    max_shard_size: str = "2GB",
    quantize_base: bool = False,
    check: bool = True,
    prompt: str = "The capital of France is Paris. A list of prime numbers: 2, 3, 5, 7, 11, 13",
) -> None:
    """Merge, check and write.

    Args:
        adapter: Directory of a LoRA adapter in peft's format.
        output_dir: Directory for the merged model; must not exist.
        model: Base model, as for training. Default: the one that the adapter names.
        dtype: Dtype of the merged weights; auto keeps the base's.
        max_shard_size: Largest size of a weights file, such as 500MB. One file is held in memory.
        quantize_base: Round a 16-bit base to NF4 first, as QLoRA training on it did.
        check: Compare logits before the result is kept; reads all weights three more times.
        prompt: Text whose logits are compared.
    """
    try:
        found = find_base(model, adapter)
    except ValueError as error:
        if meant := RunDirectory.adapter_meant_by(adapter):
            raise ValueError(f"{error} Did you mean {meant}?") from error
        raise
    base, same = found.directory, found.same
    if found.warning:
        print(f"warning: {found.warning}")
    check_ids = torch.tensor(load_tokenizer(base)(prompt)["input_ids"]) if check else None
    if check_ids is not None and not len(check_ids):
        raise ValueError("--prompt has no tokens, so no logits can be compared. Give a text, or pass --check=false.")
    merged = merge_adapter(
        base, adapter, output_dir, dtype=None if dtype == "auto" else getattr(torch, dtype),
        max_shard_size=max_shard_size, quantize_base=quantize_base, check_ids=check_ids,
    )  # fmt: skip
    print(
        f"{output_dir}: {merged.adapted} weights merged, {str(merged.dtype).removeprefix('torch.')}, "
        f"{merged.total_bytes / 2**30:.2f} GiB in {merged.files} file(s)."
    )
    if merged.base_is_4bit:
        print(f"The base is what its 4-bit weights stand for{', which is what the adapter was trained on' * same}.")
    else:
        print("The base is not quantized. If training quantized it, --quantize_base merges into exactly what it saw.")
    if merged.parity is None:
        print("Logits were not checked.")
    else:
        print(
            f"Logits differ from those of base and adapter by at most {merged.parity.difference:.2g} (tolerance "
            f"{merged.parity.tolerance:.2g}, for rounding); the adapter moves them by up to "
            f"{merged.parity.adapter_effect:.2g}."
        )


if __name__ == "__main__":
    sys.exit(run_recipe(main))
