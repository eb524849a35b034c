"""A finetuned model in use: the 4-bit base with its adapter on one device, as training left them."""

from __future__ import annotations

from pathlib import Path

import torch

from ..checkpoints.safetensors_files import SafetensorsCheckpoint
from ..hardware import capabilities, check_precision, compute_dtype
from ..lora.adapter_files import load_adapter
from ..lora.config import adapter_lora, default_lora
from ..models.build import build_model, materialize
from ..models.causal_lm import QLoRAForCausalLM


def load_finetuned(model_dir: str | Path, adapter: str | Path | None = None) -> QLoRAForCausalLM:
    """The model that training left, in eval mode, on the GPU if there is one; 4-bit, as it was trained.

    Args:
        model_dir: Directory of the base, 16-bit (quantized while it is read) or bitsandbytes 4-bit.
        adapter: Directory of a LoRA adapter in peft's format; ``None`` gives the base alone.

    Raises:
        ValueError: If the base or the adapter cannot be read, or do not fit each other.
    """
    device = torch.device(capabilities().device_type)
    lora = default_lora(1) if adapter is None else adapter_lora(adapter)  # whose B is 0 until an adapter is loaded
    checkpoint = SafetensorsCheckpoint(model_dir)
    model = build_model(checkpoint, lora, dtype=compute_dtype(check_precision("auto")))
    materialize(model, checkpoint, device, seed=0)
    checkpoint.close()
    assert isinstance(model, QLoRAForCausalLM)  # the default head's
    if adapter is not None:
        load_adapter(model, adapter, lora)
    return model.eval()
