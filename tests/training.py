"""Modules for tests, from flat options."""

import dataclasses
from pathlib import Path
from typing import Any

from peft import LoraConfig

from lightning_qlora.modules.models.options import ComputeOptions
from lightning_qlora.modules.training.causal_lm import QLoRACausalLM

_OF_COMPUTE = {field.name for field in dataclasses.fields(ComputeOptions)}


def qlora(model_dir: str | Path, lora: LoraConfig | None = None, **options: Any) -> QLoRACausalLM:
    """A module, whose ``compute`` takes those of ``options`` that are its fields."""
    compute = {name: options.pop(name) for name in _OF_COMPUTE & options.keys()}
    return QLoRACausalLM(model_dir, lora, **options, compute=ComputeOptions(**compute))
