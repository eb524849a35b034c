"""GGUF files converted to 16-bit safetensors, once, in a process of their own."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..downloads import cache_dir, cache_lock


def convert_gguf(gguf: Path) -> Path:
    digest = hashlib.sha256()
    with gguf.open("rb") as stream:
        while block := stream.read(2**24):
            digest.update(block)
    target = cache_dir() / f"{gguf.stem}-{digest.hexdigest()[:16]}"
    with cache_lock(target):
        if not (target / "config.json").is_file():
            convert_in_child(gguf, target)
    return target


def convert_in_child(gguf: Path, target: Path) -> None:
    """:func:`_gguf_to_safetensors` in a process of its own, so that its memory and a parser's faults end with it."""
    # -P: in a directory that holds a package `kernels`, like this repository, transformers would import that one.
    command = [sys.executable, "-P", "-m", __name__, str(gguf), str(target)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode < 0:
        name = signal.Signals(-result.returncode).name
        raise ValueError(
            f"The conversion of {gguf} to safetensors was killed by {name}. If memory ran out, convert it on a larger "
            "machine, or pass --model with a directory of safetensors."
        )
    if result.returncode:
        raise ValueError(result.stdout.strip() or f"{gguf} could not be converted: see the traceback above.")


def _gguf_to_safetensors(gguf: Path, target: Path) -> None:
    try:
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except Exception as error:  # transformers raises many types for a file or an architecture that it cannot read
        raise ValueError(f"transformers cannot load {gguf}: {type(error).__name__}: {error}") from error
    # transformers marks GGUF models as quantized, although their weights are dense now.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    # A sum of a scale and a minimum in float16 keeps 11 bits in float16 and 8 in bfloat16, which has the larger range.
    largest = max(float(p.detach().abs().max()) for p in model.parameters())
    model.to(torch.float16 if largest < torch.finfo(torch.float16).max else torch.bfloat16)
    if tokenizer.pad_token in (None, tokenizer.eos_token) and "<|endoftext|>" in tokenizer.get_vocab():
        tokenizer.pad_token = "<|endoftext|>"  # distinct from eos, whose label must be learnt
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        staged = Path(scratch) / "model"
        tokenizer.save_pretrained(staged)
        model.save_pretrained(staged)
        staged.replace(target)


if __name__ == "__main__":  # of convert_in_child()
    try:
        _gguf_to_safetensors(Path(sys.argv[1]), Path(sys.argv[2]))
    except ValueError as error:
        print(error)
        sys.exit(1)
