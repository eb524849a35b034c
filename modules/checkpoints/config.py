"""Reading ``config.json`` of a transformers model directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

#: Where a ``config.json`` describes a quantization: transformers, older compressed-tensors, MLX.
_QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")

#: What to do about any other quantization.
ONLY_BITSANDBYTES = (
    "A base model is read here in 16 or 32 bits, or in 4 bits as bitsandbytes writes them (NF4 or FP4); the codes of "
    "another quantization would be taken for weights. Pass --model with the unquantized model, or its bitsandbytes "
    "4-bit version (bnb-4bit)."
)


def read_config(directory: str | Path) -> dict[str, Any]:
    """The contents of ``config.json``.

    Raises:
        ValueError: If there is none, it is not a JSON object, or it names another quantization than bitsandbytes'
            in 4 bits.
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
    if scheme := _unknown_quantization(raw):
        raise ValueError(f"{directory} is quantized by {scheme}, as its config.json says. {ONLY_BITSANDBYTES}")
    return raw


def _unknown_quantization(raw: dict[str, Any]) -> str | None:
    """The name of the quantization in a ``config.json``, or ``None`` if there is none, or one that is read here."""
    found = next((raw[key] for key in _QUANTIZATION_KEYS if raw.get(key)), None)
    if found is None:
        return None
    if not isinstance(found, dict):
        return repr(found)
    is_4bit, is_8bit = (any(found.get(f"{_}load_in_{bits}bit") for _ in ("", "_")) for bits in (4, 8))
    method = found.get("quant_method") or ("bitsandbytes" if is_4bit or is_8bit else "an unnamed method")
    if method != "bitsandbytes":
        return str(method)
    return None if is_4bit and not is_8bit else "bitsandbytes in 8 bits (LLM.int8)"
