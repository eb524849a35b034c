"""Checkpoints of named shapes with random weights, to measure training without downloading a model.

The time and memory of a training step depend on shapes and formats alone. Weights are drawn so that activations keep
their size from layer to layer, which makes losses finite (a little above log V) in 16 bits too.

Shapes: N out_features, K in_features, V vocabulary, H hidden size.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from .demo_model import DEMO_MODEL
from .resolve import resolve_model

BLOCKSIZE, NESTED_BLOCKSIZE = 64, 256

#: Where checkpoints of named shapes are kept.
CHECKPOINTS = Path(tempfile.gettempdir()) / "lightning_qlora_benchmarks"


@dataclass(frozen=True)
class Shape:
    """A model's family and sizes, named as in its configuration in transformers.

    Attributes:
        model_type: As in ``config.json``.
        sizes: Attributes of the configuration.
    """

    model_type: str
    sizes: dict[str, Any]

    def config(self) -> PretrainedConfig:
        """A configuration of these sizes, in bfloat16."""
        config: PretrainedConfig = AutoConfig.for_model(self.model_type, dtype="bfloat16", **self.sizes)
        config.architectures = [type(self._model(config)).__name__]
        return config

    def structure(self) -> PreTrainedModel:
        """transformers' model on the meta device."""
        return self._model(self.config())

    @staticmethod
    def _model(config: PretrainedConfig) -> PreTrainedModel:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def _shape(
    model_type: str, layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, head_dim: int, vocab: int,
    **more: Any,
) -> Shape:  # fmt: skip
    sizes = {
        "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": intermediate,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim, "vocab_size": vocab,
        "tie_word_embeddings": False, "max_position_embeddings": 131072, **more,
    }  # fmt: skip
    return Shape(model_type, sizes)


_LLAMA3: dict[str, Any] = {
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
_GEMMA2: dict[str, Any] = {
    "tie_word_embeddings": True, "query_pre_attn_scalar": 256, "sliding_window": 4096,
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
}  # fmt: skip

SHAPES = {
    "tiny": _shape("llama", 2, 64, 192, 4, 2, 16, 300, **_LLAMA3),
    "llama-3.2-1b": _shape("llama", 16, 2048, 8192, 32, 8, 64, 128256, **_LLAMA3, tie_word_embeddings=True),
    "llama-3.1-8b": _shape("llama", 32, 4096, 14336, 32, 8, 128, 128256, **_LLAMA3),
    "qwen2.5-32b": _shape("qwen2", 64, 5120, 27648, 40, 8, 128, 152064),
    "qwen3-8b": _shape("qwen3", 36, 4096, 12288, 32, 8, 128, 151936),
    "gemma2-2b": _shape("gemma2", 26, 2304, 9216, 8, 4, 256, 256000, **_GEMMA2),
}


def write_random_checkpoint(directory: str | Path, shape: Shape, *, quantized: bool = True, seed: int = 0) -> Path:
    """Write a transformers directory of ``shape`` with random weights, and return it.

    One file a decoder layer, and one for embedding, final norm and head (bfloat16). All decoder layers hold the same
    values: drawing and quantizing 32 billion would take minutes.

    Args:
        directory: Must not exist. It appears when it is complete, never in part.
        shape: One of ``SHAPES`` or your own.
        quantized: Projections in bitsandbytes' NF4 with double quantization, written as such; else in bfloat16.
        seed: Of all values.

    Raises:
        ValueError: If ``directory`` exists.
    """
    directory = Path(directory)
    if directory.exists():
        raise ValueError(f"{directory} exists already. Remove it, or write the checkpoint elsewhere.")
    directory.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    make = _nf4_weight if quantized else _dense_weight
    config, structure = shape.config(), shape.structure()
    layer: dict[str, Tensor] = {}
    for name, parameter in structure.model.layers[0].named_parameters():
        if parameter.ndim == 2:
            layer |= make(name, tuple(parameter.shape), generator)
        else:
            layer[name] = _vector(name, parameter, shape)
    ends: dict[str, Tensor] = {}
    for name, parameter in structure.named_parameters():  # visits a tied weight once
        if ".layers." not in name:
            matrix = parameter.ndim == 2
            ends |= (
                _dense_weight(name, tuple(parameter.shape), generator)
                if matrix
                else {name: _vector(name, parameter, shape)}
            )
    if quantized:
        config.quantization_config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ).to_dict()
    files = [{f"model.layers.{i}.{name}": t for name, t in layer.items()} for i in range(config.num_hidden_layers)]
    files.append(ends)
    weight_map: dict[str, str] = {}
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        complete = Path(scratch) / directory.name
        config.save_pretrained(complete)
        for i, tensors in enumerate(files, start=1):
            file = f"model-{i:05d}-of-{len(files):05d}.safetensors"
            save_file(tensors, complete / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file)
        (complete / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        complete.rename(directory)
    return directory


#: Vision-language models: ``model_type``, and their configuration in transformers.
VISION_SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny-vl": ("qwen2_5_vl", {
        "image_token_id": 290, "video_token_id": 291, "vision_start_token_id": 292, "vision_end_token_id": 293,
        "text_config": {
            "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 300,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        },
        "vision_config": {
            "depth": 2, "hidden_size": 32, "intermediate_size": 44, "num_heads": 2, "out_hidden_size": 64,
            "window_size": 112, "fullatt_block_indexes": [1],
        },
    }),
    "qwen2.5-vl-7b": ("qwen2_5_vl", {
        "text_config": {
            "num_hidden_layers": 28, "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
            "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 128000,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        "vision_config": {
            "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
            "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
        },
    }),
    "llava-1.5-7b": ("llava", {
        "text_config": {
            "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 11008,
            "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064,
            "max_position_embeddings": 4096,
        },
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
            "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768,
        },
    }),
}  # fmt: skip


def vision_checkpoint_of(name: str, directory: Path = CHECKPOINTS) -> Path:
    """The bfloat16 checkpoint of a vision-language shape below ``directory``, written if it is not there.

    Decoder layers and blocks of the tower have a file each.
    """
    path, (model_type, sizes) = directory / f"{name}-bf16", VISION_SHAPES[name]
    if path.exists():
        return path
    config: PretrainedConfig = AutoConfig.for_model(model_type, dtype="bfloat16", tie_word_embeddings=False, **sizes)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    config.architectures = [type(model).__name__]
    generator, files = torch.Generator().manual_seed(0), dict[str, dict[str, tuple[int, ...]]]()
    for key, parameter in model.named_parameters():
        part = re.match(r".*\.(layers|blocks)\.\d+\.", key)
        files.setdefault("rest" if part is None else part[0], {})[key] = tuple(parameter.shape)
    directory.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        complete = Path(scratch) / path.name
        config.save_pretrained(complete)
        for number, shapes in enumerate(files.values(), start=1):
            file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
            tensors = {key: _any_weight(key, shape, generator) for key, shape in shapes.items()}
            save_file(tensors, complete / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file)
        (complete / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        complete.rename(path)
    return path


def _any_weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A norm's weight of ones, a bias of zeros, or random values by their fan-in."""
    if len(shape) == 1:
        return torch.full(shape, float(name.endswith("weight")), dtype=torch.bfloat16)
    return _dense_weight(name, (shape[0], math.prod(shape[1:])), generator)[name].view(shape)


def checkpoint_of(name: str, directory: Path = CHECKPOINTS, quantized: bool = True) -> Path:
    """The checkpoint of a shape below ``directory``, written if it is not there.

    Raises:
        ValueError: If there is one of other sizes.
    """
    path, shape = directory / f"{name}-{'4bit' if quantized else 'bf16'}", SHAPES[name]
    if not path.exists():
        return write_random_checkpoint(path, shape, quantized=quantized)
    config = AutoConfig.from_pretrained(path)
    if any(getattr(config, size) != value for size, value in shape.sizes.items() if size != "rope_parameters"):
        raise ValueError(f"{path} holds a model of other sizes than {shape}. Remove it.")
    return path


def model_or_random_weights(model: str | None) -> Path:
    """The directory of ``model``; for ``None`` the demo model's, on a GPU random weights of Llama-3.2-1B's shape."""
    if model is None and torch.cuda.is_available():
        return checkpoint_of("llama-3.2-1b")
    return resolve_model(model or DEMO_MODEL)


def _vector(name: str, parameter: Tensor, shape: Shape) -> Tensor:
    """A norm's weight that leaves its input as it is (Gemma's is added to 1), or a bias of zeros."""
    ones = "norm" in name and not shape.model_type.startswith("gemma")
    return torch.full(parameter.shape, float(ones), dtype=torch.bfloat16)


def _dense_weight(name: str, size: tuple[int, int], generator: torch.Generator) -> dict[str, Tensor]:
    """Uniform, of standard deviation K ** -0.5: from bytes, for normal values take ten times as long."""
    weight = _random_bytes(math.prod(size), generator).view(torch.int8).to(torch.bfloat16)
    return {name: weight.mul_((3 / size[1]) ** 0.5 / 128).view(size)}


def _nf4_weight(name: str, size: tuple[int, int], generator: torch.Generator) -> dict[str, Tensor]:
    """Random bytes are valid NF4 values; their absmax gives them the standard deviation K ** -0.5.

    Every code is equally likely, and absmax = offset + code2[byte] * absmax2 spreads over [0.7, 1.3] * offset.
    """
    n, k = size
    code = bnb.get_4bit_type("nf4", device="cpu")
    blocks = -(-n * k // BLOCKSIZE)
    offset = k**-0.5 / code.square().mean().sqrt()
    nested = bnb.QuantState(
        absmax=torch.full((-(-blocks // NESTED_BLOCKSIZE),), 0.3 * float(offset)),
        code=bnb.create_dynamic_map(),
        blocksize=NESTED_BLOCKSIZE,
        dtype=torch.float32,
    )
    state = bnb.QuantState(
        absmax=_random_bytes(blocks, generator),
        shape=torch.Size(size),
        code=code,
        blocksize=BLOCKSIZE,
        quant_type="nf4",
        dtype=torch.bfloat16,
        offset=offset,
        state2=nested,
    )
    packed = _random_bytes(-(-n * k // 2), generator).unsqueeze(1)
    return {name: packed} | {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}


def _random_bytes(count: int, generator: torch.Generator) -> Tensor:
    words = torch.empty(-(-count // 8), dtype=torch.int64)
    return words.random_(-(2**63), None, generator=generator).view(torch.uint8)[:count]
