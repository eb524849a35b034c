"""Reading ``config.json`` of a transformers model directory."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig


def load_config(directory: str | Path) -> LlamaConfig:
    """Read and check ``config.json``.

    Raises:
        ValueError: If there is none, it is not JSON or not valid, or it is not that of a Llama causal language model.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory} has no config.json: it is not a transformers model directory.")
    try:
        raw = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}).") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} is not a JSON object but a {type(raw).__name__}.")
    architectures = raw.get("architectures") or ["LlamaForCausalLM"]
    if raw.get("model_type") != "llama" or "LlamaForCausalLM" not in architectures:
        raise ValueError(
            f"{directory} is a {raw.get('model_type')!r} model ({', '.join(architectures)}); these recipes finetune "
            "Llama causal language models (model_type 'llama', LlamaForCausalLM), e.g. Llama 2/3, SmolLM, TinyLlama."
        )
    try:
        config: LlamaConfig = LlamaConfig.from_pretrained(directory)
    except StrictDataclassError as error:
        raise ValueError(f"{path} is not valid for a Llama: {' '.join(str(error).split())}") from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the 4-bit layers are ours; transformers must not look for its own
    return config
