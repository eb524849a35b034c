"""Llama checkpoints of named shapes with random weights, to measure training without downloading a model.

The time and memory of a training step depend on shapes and formats alone. Weights are drawn so that activations keep
their size from layer to layer, which makes losses finite (a little above log V) in 16 bits too.

Shapes: N out_features, K in_features, V vocabulary, H hidden size.
"""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import BitsAndBytesConfig, LlamaConfig

from .demo_model import DEMO_MODEL
from .resolve import resolve_model

BLOCKSIZE, NESTED_BLOCKSIZE = 64, 256

#: Where checkpoints of named shapes are kept.
CHECKPOINTS = Path(tempfile.gettempdir()) / "lightning_qlora_benchmarks"


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a Llama, named as in ``LlamaConfig``."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool = False

    def config(self) -> LlamaConfig:
        """A configuration of these sizes, with Llama 3's rotary base."""
        return LlamaConfig(
            **vars(self),
            architectures=["LlamaForCausalLM"],
            max_position_embeddings=131072,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            dtype="bfloat16",
        )

    def projections(self) -> dict[str, tuple[int, int]]:
        """(N, K) of a decoder layer's seven linear layers by name."""
        h, m = self.hidden_size, self.intermediate_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return {
            "self_attn.q_proj": (q, h),
            "self_attn.k_proj": (kv, h),
            "self_attn.v_proj": (kv, h),
            "self_attn.o_proj": (h, q),
            "mlp.gate_proj": (m, h),
            "mlp.up_proj": (m, h),
            "mlp.down_proj": (h, m),
        }


SHAPES = {
    "tiny": LlamaShape(2, 64, 192, 4, 2, 16, 300),
    "llama-3.2-1b": LlamaShape(16, 2048, 8192, 32, 8, 64, 128256, tie_word_embeddings=True),
    "llama-3.1-8b": LlamaShape(32, 4096, 14336, 32, 8, 128, 128256),
    "qwen2.5-32b": LlamaShape(64, 5120, 27648, 40, 8, 128, 152064),
}


def write_random_checkpoint(directory: str | Path, shape: LlamaShape, *, quantized: bool = True, seed: int = 0) -> Path:
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
    layer: dict[str, Tensor] = {}
    for name, size in shape.projections().items():
        layer |= make(f"{name}.weight", size, generator)
    for name in ("input_layernorm", "post_attention_layernorm"):
        layer[f"{name}.weight"] = torch.ones(shape.hidden_size, dtype=torch.bfloat16)
    table = (shape.vocab_size, shape.hidden_size)
    ends = {"model.norm.weight": torch.ones(shape.hidden_size, dtype=torch.bfloat16)}
    ends |= _dense_weight("model.embed_tokens.weight", table, generator)
    if not shape.tie_word_embeddings:
        ends |= _dense_weight("lm_head.weight", table, generator)

    config = shape.config()
    if quantized:
        config.quantization_config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ).to_dict()
    files = [{f"model.layers.{i}.{name}": t for name, t in layer.items()} for i in range(shape.num_hidden_layers)]
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


def checkpoint_of(name: str, directory: Path = CHECKPOINTS, quantized: bool = True) -> Path:
    """The checkpoint of a shape below ``directory``, written if it is not there.

    Raises:
        ValueError: If there is one of other sizes.
    """
    path, shape = directory / f"{name}-{'4bit' if quantized else 'bf16'}", SHAPES[name]
    if not path.exists():
        return write_random_checkpoint(path, shape, quantized=quantized)
    config = LlamaConfig.from_pretrained(path)
    if any(getattr(config, size) != value for size, value in vars(shape).items()):
        raise ValueError(f"{path} holds a model of other sizes than {shape}. Remove it.")
    return path


def model_or_random_weights(model: str | None) -> Path:
    """The directory of ``model``; for ``None`` the demo model's, on a GPU random weights of Llama-3.2-1B's shape."""
    if model is None and torch.cuda.is_available():
        return checkpoint_of("llama-3.2-1b")
    return resolve_model(model or DEMO_MODEL)


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
