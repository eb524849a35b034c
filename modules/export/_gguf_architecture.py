"""What llama.cpp's model code does, one row per architecture, and a model's configuration and tensors in its terms.

An architecture of llama.cpp computes some things always and reads others from the file. What a configuration asks for
and llama.cpp would not compute is an error here.

Shapes: N rows, K columns of a weight; D width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, RopeScalingType, get_tensor_name_map
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..models.families import FAMILIES, attention_softcap, family_of, head_dim, layer_windows


@dataclass(frozen=True)
class Architecture:
    """What must be known of one of llama.cpp's architectures.

    Attributes:
        name: llama.cpp's.
        interleaved_rope: Whether rotary pairs are neighbours in a head, so that the rows of q and k, whose pairs are
            half a head apart in transformers, are permuted.
        norm_offset: What transformers adds to a norm's weight, and llama.cpp does not.
        window_period: Every ``window_period``-th layer has full attention and the others a window; ``None`` if
            llama.cpp computes no windows.
        rope_scalings: The types of rope scaling that it computes.
        untied: Whether it can have a head of its own.
        no_rope_every: Every such layer has no rotary embedding, whatever the file says.
        rope_sections: Whether positions are time, height and width, each of which rotates a section of a head (M-RoPE).
    """

    name: str
    interleaved_rope: bool = False
    norm_offset: float = 0.0
    window_period: int | None = None
    rope_scalings: frozenset[str] = frozenset({"linear", "yarn"})
    untied: bool = True
    no_rope_every: int | None = None
    rope_sections: bool = False


_WITH_FACTORS = frozenset({"linear", "yarn", "llama3", "longrope"})

ARCHITECTURES: dict[str, Architecture] = {
    each.name: each
    for each in (
        Architecture("llama", interleaved_rope=True, rope_scalings=_WITH_FACTORS),
        Architecture("qwen2"),
        Architecture("qwen3"),
        Architecture("smollm3", interleaved_rope=True, no_rope_every=4),
        Architecture("granite", interleaved_rope=True, rope_scalings=_WITH_FACTORS),
        Architecture("olmo2"),
        Architecture("phi3", rope_scalings=frozenset({"longrope"})),
        Architecture("gemma2", norm_offset=1.0, window_period=2, untied=False),
        Architecture("gemma3", norm_offset=1.0, window_period=6),
        Architecture("qwen2vl", rope_sections=True, rope_scalings=frozenset()),
        Architecture("qwen3vl", rope_sections=True, rope_scalings=frozenset()),
    )
}

#: The language models of vision-language models that are no causal language models by themselves, by ``model_type``.
_OF_VISION_LANGUAGE = {"qwen2_vl_text": "qwen2vl", "qwen2_5_vl_text": "qwen2vl", "qwen3_vl_text": "qwen3vl"}


def architecture_of(config: PretrainedConfig) -> Architecture:
    """The row of a configuration's family.

    Raises:
        ValueError: If the family has no architecture in llama.cpp that is known here.
    """
    if config.model_type in _OF_VISION_LANGUAGE:
        return ARCHITECTURES[_OF_VISION_LANGUAGE[config.model_type]]
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"The language model is of the type {config.model_type!r}, whose architecture in llama.cpp is not known "
            f"here. Known: {', '.join([*FAMILIES, *_OF_VISION_LANGUAGE])}."
        )
    family = family_of(config)
    found = ARCHITECTURES.get(family.gguf_architecture)
    if found is None:
        raise ValueError(
            f"{family.name} is llama.cpp's architecture {family.gguf_architecture!r}, which is not known here. Known: "
            f"{', '.join(ARCHITECTURES)}."
        )
    return found


# ------------------------------------------------------------------------------------------------------------- tensors


@dataclass(frozen=True)
class Names:
    """GGUF's names of a model's tensors."""

    architecture: Architecture
    layers: int

    def __call__(self, name: str) -> str:
        """GGUF's name of transformers' ``name``, which ends in ``.weight`` or ``.bias``.

        Raises:
            ValueError: If llama.cpp has no such tensor.
        """
        number = next(number for number, each in MODEL_ARCH_NAMES.items() if each == self.architecture.name)
        found: str | None = get_tensor_name_map(MODEL_ARCH(number), self.layers).get_name(name, (".weight", ".bias"))
        if found is None:
            raise ValueError(f"llama.cpp's architecture {self.architecture.name!r} has no tensor for {name!r}.")
        return found


def transformed(architecture: Architecture, config: PretrainedConfig, name: str, weight: Tensor) -> Tensor:
    """A weight or bias as llama.cpp computes with it, in any dtype; norms in float32.

    Args:
        architecture: llama.cpp's.
        config: The model's.
        name: transformers'.
        weight: [N, K] or [N]; of an adapter its B, [N, R].
    """
    if name.endswith("norm.weight"):
        return weight.float() + architecture.norm_offset
    projection = name.split(".")[-2]
    if architecture.interleaved_rope and projection in ("q_proj", "k_proj"):
        heads = config.num_attention_heads if projection == "q_proj" else config.num_key_value_heads
        return interleaved(weight, heads)
    return weight


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows i and i + D/2 of each head become neighbours.

    Args:
        weight: [heads * D, ...].
        heads: How many.
    """
    halves = weight.view(heads, 2, -1, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


# ------------------------------------------------------------------------------------------------------- configuration


def write_configuration(
    writer: GGUFWriter, architecture: Architecture, config: PretrainedConfig
) -> tuple[dict[str, Tensor], list[str]]:
    """Write what the configuration says as GGUF's keys.

    Returns:
        Tensors of rope scaling by their GGUF name, float32 [D / 2], and notes for the user.

    Raises:
        ValueError: If llama.cpp would compute something else.
    """
    _check(architecture, config)
    notes: list[str] = []
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(_context_length(writer, architecture, config, notes))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for attribute, add in (
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
        ("attention_multiplier", writer.add_attention_scale),
        ("embedding_multiplier", writer.add_embedding_scale),
        ("residual_multiplier", writer.add_residual_scale),
        ("logits_scaling", writer.add_logit_scale),
    ):
        if (value := getattr(config, attribute, None)) is not None:
            add(float(value))
    return _write_rope(writer, architecture, config, notes), notes


def _check(architecture: Architecture, config: PretrainedConfig) -> None:
    name = architecture.name
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", "silu")
    expected = "gelu_pytorch_tanh" if name.startswith("gemma") else "silu"
    if activation != expected:
        raise ValueError(f"The model's activation is {activation!r}; llama.cpp's {name!r} computes {expected!r}.")
    if not architecture.untied and not config.tie_word_embeddings:
        raise ValueError(
            f"llama.cpp's {name!r} always uses the embeddings as head, but this model has a head of its own "
            "(tie_word_embeddings=false)."
        )
    if name == "gemma2" and (attention_softcap(config) is None or config.final_logit_softcapping is None):
        raise ValueError("llama.cpp's 'gemma2' always caps attention scores and logits, but this model does not.")
    if name == "gemma3" and attention_softcap(config) is not None:
        raise ValueError("llama.cpp's 'gemma3' does not cap attention scores, but this model does.")
    if (scalar := getattr(config, "query_pre_attn_scalar", None)) is not None:
        # llama.cpp tells the 27B models, which scale by the width per head, by their number of layers.
        is_27b = config.num_hidden_layers == {"gemma2": 46, "gemma3": 62}[name]
        used = config.hidden_size // config.num_attention_heads if is_27b else head_dim(config)
        if scalar != used:
            raise ValueError(
                f"The model divides attention scores by the root of query_pre_attn_scalar={scalar}; llama.cpp's "
                f"{name!r} by that of {used}."
            )
    if architecture.no_rope_every is not None:
        rope = [int((layer + 1) % architecture.no_rope_every != 0) for layer in range(config.num_hidden_layers)]
        if config.no_rope_layers != rope:
            raise ValueError(
                f"The model has rotary embeddings in the layers no_rope_layers={config.no_rope_layers}; llama.cpp's "
                f"{name!r} in all but each {architecture.no_rope_every}th."
            )


def _context_length(writer: GGUFWriter, architecture: Architecture, config: PretrainedConfig, notes: list[str]) -> int:
    """Tokens for which llama.cpp computes what the model computes; writes the windows that it knows."""
    windows, context = layer_windows(config), int(config.max_position_embeddings)
    if architecture.name == "phi3":
        writer.add_sliding_window(0)  # without the key, some versions of llama.cpp assume Phi-3-mini's
    window = next((each for each in windows if each), None)
    if window is None:
        if architecture.window_period is not None:
            raise ValueError(f"llama.cpp's {architecture.name!r} always has windows, but this model has none.")
        return context
    period = architecture.window_period
    if period is None:
        if window < context:
            notes.append(
                f"llama.cpp's {architecture.name!r} has no attention windows, and this model's are {window} tokens: "
                f"the context length is set to {window}, up to which both are the same (the model's own: {context})."
            )
        return min(window, context)
    expected = [None if (layer + 1) % period == 0 else window for layer in range(len(windows))]
    if windows != expected:
        raise ValueError(
            f"The model's layers have the windows {windows}; llama.cpp's {architecture.name!r} has full attention in "
            f"each {period}th layer and windows in all others."
        )
    writer.add_sliding_window(window)
    return context


def _write_rope(
    writer: GGUFWriter, architecture: Architecture, config: PretrainedConfig, notes: list[str]
) -> dict[str, Tensor]:
    by_layer_type = "full_attention" in config.rope_parameters
    layer_type = "full_attention" if by_layer_type else None
    rope: Mapping[str, Any] = config.rope_parameters[layer_type] if layer_type else config.rope_parameters
    if by_layer_type and (local := config.rope_parameters.get("sliding_attention")):
        if local.get("rope_type", "default") != "default":
            raise ValueError(f"llama.cpp scales no rotary embeddings in layers with windows; the model does: {local}.")
        writer.add_rope_freq_base_swa(float(local["rope_theta"]))
    base, kind = float(rope["rope_theta"]), rope.get("rope_type", "default")
    rotated = int(head_dim(config) * rope.get("partial_rotary_factor", 1.0))
    writer.add_rope_freq_base(base)
    writer.add_rope_dimension_count(rotated)
    if architecture.rope_sections:
        sections = [int(size) for size in rope.get("mrope_section") or ()]
        if len(sections) != 3 or sum(sections) != rotated // 2:
            raise ValueError(
                f"The model's mrope_section={sections or None} is not three sections of {rotated // 2} rotary pairs."
            )
        writer.add_rope_dimension_sections([*sections, 0])
        # Interleaved sections: llama.cpp's ggml_rope_multi leaves pairs beyond three times a section unrotated.
        left = [i for i in range(sum(sections)) if rope.get("mrope_interleaved") and i >= 3 * sections[i % 3]]
        if left:
            angle = config.max_position_embeddings * base ** (-2 * left[0] / rotated)
            notes.append(
                f"llama.cpp does not rotate the pairs {', '.join(map(str, left))} of each head (mrope_section="
                f"{sections}), which transformers rotates by up to {angle:.2g} radians at the end of the context."
            )
    if kind == "default":
        return {}
    if kind not in architecture.rope_scalings:
        raise ValueError(
            f"The model's rotary embeddings are scaled by {kind!r}; llama.cpp's {architecture.name!r} knows "
            f"{', '.join(sorted(architecture.rope_scalings))}."
        )
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), layer_type=layer_type)
    unscaled = 1.0 / base ** (torch.arange(0, rotated, 2, dtype=torch.float32) / rotated)
    if kind == "llama3":
        return {"rope_freqs.weight": unscaled / frequencies}
    if kind == "longrope":
        writer.add_rope_scaling_type(RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
        writer.add_rope_scaling_attn_factors(float(attention_factor))
        return {
            f"rope_factors_{which}.weight": torch.tensor(rope[f"{which}_factor"], dtype=torch.float32)
            for which in ("long", "short")
        }
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        return {}
    fixed = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
    if differing := {name: rope[name] for name, value in fixed.items() if rope.get(name, value) not in (value, None)}:
        raise ValueError(f"The model's yarn scaling has {differing}; llama.cpp always computes with {fixed}.")
    factor = float(rope["factor"])
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(factor)
    writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
    # llama.cpp multiplies by 1 + 0.1 ln(factor) itself.
    attention_factor /= 1 + 0.1 * math.log(factor)
    if abs(attention_factor - 1) > 1e-6:
        writer.add_rope_scaling_attn_factors(float(attention_factor))
    return {}
