"""Decoder layers as transformers and bitsandbytes read them: what checks of an export compare with.

A check that reads through the exporter's own code approves whatever that code misunderstands. So a layer of the base is
loaded here by ``from_pretrained``, as a model of that one layer, which takes no more memory than the layer.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from ..checkpoints.safetensors_files import SafetensorsCheckpoint

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def stock_layer(base: Path, index: int, scratch: Path, *, quantize: bool = False) -> dict[str, Tensor]:
    """All weights of decoder layer ``index`` of ``base``, by their names in the model.

    Args:
        base: A transformers directory, 16-bit or bitsandbytes 4-bit.
        index: Which layer.
        scratch: Where a model of that layer may be written; it must not exist.
        quantize: Let bitsandbytes quantize a 16-bit base to NF4 with double quantization.

    Returns:
        CPU tensors in the dtype that is stored, float32 where that is 4-bit.

    Raises:
        ValueError: If transformers does not take all of the layer's tensors, or lacks some.
    """
    layer = _stored_layer(base, index)
    config = json.loads((base / "config.json").read_text())
    one_layer = _one_layer(config, index)
    scratch.mkdir()
    (scratch / "config.json").write_text(json.dumps(one_layer))
    dtype = functools.reduce(torch.promote_types, {t.dtype for t in layer.values() if t.dtype in _FLOATS})
    rest = {
        "model.embed_tokens.weight": torch.zeros(one_layer["vocab_size"], config["hidden_size"], dtype=dtype),
        "model.norm.weight": torch.zeros(config["hidden_size"], dtype=dtype),
    }
    renamed = {f"model.layers.0.{name}": tensor for name, tensor in layer.items()}
    save_file(renamed | rest, scratch / "model.safetensors", metadata={"format": "pt"})
    del layer, renamed
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    model, info = AutoModelForCausalLM.from_pretrained(
        scratch, dtype=dtype, device_map="cpu", output_loading_info=True,
        **({"quantization_config": BitsAndBytesConfig(**nf4)} if quantize else {}),
    )  # fmt: skip
    if wrong := [name for kind in info.values() for name in (kind or ())]:
        raise ValueError(
            f"transformers does not load layer {index} of {base} as it is stored: {sorted(map(str, wrong))}."
        )
    return {
        f"model.layers.{index}.{module_name}.{name}": _dense(parameter)
        for module_name, module in model.model.layers[0].named_modules()
        for name, parameter in module.named_parameters(recurse=False)
    }


def _stored_layer(base: Path, index: int) -> dict[str, Tensor]:
    """The layer's tensors as they are stored, under their names within the layer."""
    checkpoint = SafetensorsCheckpoint(base)  # only to learn which files hold the model
    checkpoint.close()
    found = {}
    for file in checkpoint.files:
        with safe_open(str(file), framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  no mapping
                match = re.fullmatch(rf"(?:.*\.)?layers\.{index}\.(.+)", name.replace("_orig_mod.", ""))
                if match and not match[1].endswith("rotary_emb.inv_freq"):
                    found[match[1]] = tensors.get_tensor(name)
    return found


def _one_layer(config: Mapping[str, Any], index: int) -> dict[str, Any]:
    """``config.json`` of a model that has only that layer, and few tokens."""
    layers = config["num_hidden_layers"]
    one = {
        name: [value[index]] if isinstance(value, list) and len(value) == layers else value
        for name, value in config.items()
    }
    quantization = dict(one.get("quantization_config") or {})
    if skipped := quantization.get("llm_int8_skip_modules"):  # by names, which have the layer's number in them
        here = [re.sub(rf"\blayers\.{index}\b", "layers.0", name) for name in skipped]
        quantization["llm_int8_skip_modules"] = [
            new for old, new in zip(skipped, here, strict=True) if new != old or not re.search(r"\blayers\.\d", old)
        ]
        one["quantization_config"] = quantization
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    return one | tokens | {"num_hidden_layers": 1, "vocab_size": 8, "tie_word_embeddings": True}


def _dense(parameter: Tensor) -> Tensor:
    if not isinstance(parameter, bnb.nn.Params4bit):
        return parameter.detach()
    state = parameter.quant_state
    shape = state.shape
    # In float32, where bitsandbytes would round to the dtype that was quantized; and as one row, because its CPU kernel
    # (0.50) takes the wrong blocks where 64 does not divide the rows.
    state.dtype, state.shape = torch.float32, torch.Size([1, shape.numel()])
    dense: Tensor = bnb.functional.dequantize_4bit(parameter.data, state)
    return dense.view(shape)
