"""Modules for tests, from flat options, and the shape of Llama-3.1-8B."""

import dataclasses
from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers import LlamaConfig

from lightning_qlora.modules.models.options import ComputeOptions
from lightning_qlora.modules.training.causal_lm import QLoRACausalLM

LLAMA_8B = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256,
)  # fmt: skip

_OF_COMPUTE = {field.name for field in dataclasses.fields(ComputeOptions)}


def qlora(model_dir: str | Path, lora: LoraConfig | None = None, **options: Any) -> QLoRACausalLM:
    """A module, whose ``compute`` takes those of ``options`` that are its fields."""
    compute = {name: options.pop(name) for name in _OF_COMPUTE & options.keys()}
    return QLoRACausalLM(model_dir, lora, **options, compute=ComputeOptions(**compute))
