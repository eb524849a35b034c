"""GGUF files of tiny models, written as llama.cpp's converter writes them."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "phi3": "phi3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}


def interleaved(values: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection in llama.cpp's order: rotary pairs are neighbours, not half a head apart."""
    return values.view(heads, 2, -1, *values.shape[1:]).transpose(1, 2).reshape(values.shape)


def rope_freqs(rope: Mapping[str, Any], head_dim: int) -> np.ndarray:
    """What llama.cpp divides each rotary frequency by under Llama 3.1's scaling: float32 [head_dim / 2]."""
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    original, factors = rope["original_max_position_embeddings"], []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / head_dim)
        smooth = (original / wavelength - low) / (high - low)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)


def write_gguf(
    source: Path,
    path: Path,
    *,
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
    leave_out: Callable[[str], bool] = lambda name: False,
    parts: int = 1,
) -> Path:
    """Write the model and tokenizer of ``source`` in float32.

    Args:
        source: A transformers directory with one safetensors file.
        path: The file; with ``parts``, what stands before ``-00001-of-00002.gguf``.
        keys: More keys of the architecture, without its name, or other values of those that it has.
        tensors: More tensors.
        leave_out: Says of a tensor, by llama.cpp's name, whether it is left out.
        parts: How many files.

    Returns:
        The first file.
    """
    config, tokenizer = AutoConfig.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    architecture = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(
        path, architecture, split_max_tensors=0 if parts == 1 else -(-_count(source) // parts), small_first_shard=False
    )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = getattr(config, "rope_parameters", {})
    rope = rope.get("full_attention", rope)
    values: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "rope.freq_base": rope["rope_theta"],
        "vocab_size": config.vocab_size,
        **(keys or {}),
    }
    for key, value in values.items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        (writer.add_uint32 if isinstance(value, int) else add)(f"{architecture}.{key}", value)
    _add_tokenizer(writer, tokenizer, config)
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", rope_freqs(rope, head_dim))
    for name, tensor in _tensors(source, config, architecture).items():
        if not leave_out(name):
            writer.add_tensor(name, tensor)
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if parts == 1 else path.with_name(f"{path.stem}-00001-of-{parts:05d}.gguf")


def _count(source: Path) -> int:
    return len(load_file(source / "model.safetensors"))


def _tensors(source: Path, config: PretrainedConfig, architecture: str) -> dict[str, np.ndarray]:
    known = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    names, found = gguf.get_tensor_name_map(known[architecture], config.num_hidden_layers), {}
    for name, tensor in load_file(source / "model.safetensors").items():
        stem, _, kind = name.rpartition(".")
        if architecture == "llama" and stem.endswith("q_proj"):
            tensor = interleaved(tensor, config.num_attention_heads)
        elif architecture == "llama" and stem.endswith("k_proj"):
            tensor = interleaved(tensor, config.num_key_value_heads)
        elif architecture.startswith("gemma") and stem.endswith("norm"):
            tensor = tensor.float() + 1
        found[f"{names.get_name(stem)}.{kind}"] = tensor.float().numpy()
    return found


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any, config: PretrainedConfig) -> None:
    words = {index: token for token, index in tokenizer.get_vocab().items()}
    tokens = [words.get(index, f"<unused{index}>") for index in range(config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges([" ".join(pair) for pair in tokenizer_state(tokenizer)["merges"]])
    writer.add_token_types([gguf.TokenType.CONTROL if t.startswith("<|") else gguf.TokenType.NORMAL for t in tokens])
    writer.add_bos_token_id(tokenizer.convert_tokens_to_ids("<|im_start|>"))
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)


def tokenizer_state(tokenizer: Any) -> dict[str, Any]:
    """What a fast tokenizer consists of."""
    state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return state
