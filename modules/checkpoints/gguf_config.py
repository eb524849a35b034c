"""What a GGUF file says about its model, as a configuration of transformers.

Keys are read as llama.cpp reads them, with its defaults. A key that would change what the model computes and is not
understood is an error: see :meth:`Metadata.check_all_taken`.

Shapes: D width of an attention head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import transformers
from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp stores the models of one of its architectures.

    Attributes:
        model: transformers' class.
        interleaved: Whether the rows of a head's query and key come in pairs of rotation instead of in two halves.
        norms_plus_one: Whether 1 was added to the weights of norms.
    """

    model: str
    interleaved: bool = False
    norms_plus_one: bool = False

    @property
    def model_class(self) -> type[PreTrainedModel]:
        """transformers' class of the causal language model."""
        found: type[PreTrainedModel] = getattr(transformers, self.model)
        return found


ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", interleaved=True),
    "qwen2": Architecture("Qwen2ForCausalLM"),
    "qwen3": Architecture("Qwen3ForCausalLM"),
    "phi3": Architecture("Phi3ForCausalLM"),
    "gemma2": Architecture("Gemma2ForCausalLM", norms_plus_one=True),
    "gemma3": Architecture("Gemma3ForCausalLM", norms_plus_one=True),
}

_MISSING: Any = object()

#: Keys that change nothing here, and why.
_WITHOUT_EFFECT = {
    "vocab_size": "the embedding's rows tell",
    "tensor_data_layout": "the layout is that of the architecture",
    "rope.scaling.finetuned": "llama.cpp only prints it",
    "rope.dimension_count_swa": "the same as that of other layers in all architectures here",
}

#: Tensors that describe rotary embeddings instead of being weights.
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


class Metadata:
    """The keys of a GGUF file that belong to its architecture; each is to be taken.

    Args:
        source: The file, for messages.
        fields: All its keys and values.

    Raises:
        ValueError: If it holds something other than a model, or one of another architecture than those here.
    """

    def __init__(self, source: str, fields: Mapping[str, Any]) -> None:
        self.source = source
        kind = fields.get("general.type", "model")
        if kind != "model":
            raise ValueError(f"{source} holds {kind!r}, not a language model. Pass --model with the model's own file.")
        self.name = str(fields.get("general.architecture"))
        if self.name not in ARCHITECTURES:
            raise ValueError(
                f"{source} holds a model of architecture {self.name!r}. GGUF files are read here of "
                f"{', '.join(ARCHITECTURES)}. Pass --model with the model's safetensors."
            )
        prefix = f"{self.name}."
        self._keys = {key.removeprefix(prefix): value for key, value in fields.items() if key.startswith(prefix)}

    def take(self, key: str, default: Any = _MISSING) -> Any:
        """The value of a key, which is then accounted for. A list with one value per layer is that value.

        Raises:
            ValueError: If there is none and no default, or layers differ in it.
        """
        value = self._keys.pop(key, default)
        if value is _MISSING:
            raise ValueError(f"{self.source} lacks the key {self.name}.{key}. Download it again.")
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise self.refusal(f"{self.name}.{key} differs between layers")
            value = value[0]
        if isinstance(value, float):
            value = float(str(np.float32(value)))  # 1e-05, not the 9.999999747378752e-06 that it is stored as
        return value

    def expect(self, key: str, *values: Any) -> None:
        """Check that a key, if it is there, has one of these values.

        Raises:
            ValueError: If it has another one.
        """
        if (value := self.take(key, values[0])) not in values:
            raise self.refusal(f"{self.name}.{key} is {value}")

    def refusal(self, what: str) -> ValueError:
        """The error for a model that transformers' class cannot compute."""
        return ValueError(
            f"{self.source}: {what}, which {ARCHITECTURES[self.name].model} cannot express, so another model would be "
            "trained. Pass --model with the model's safetensors."
        )

    def check_all_taken(self) -> None:
        """Check that every key was taken but those that change nothing.

        Raises:
            ValueError: Naming those that are left.
        """
        left = sorted(
            key for key, value in self._keys.items()
            if key not in _WITHOUT_EFFECT and not (key.startswith("expert_") and not value)
        )  # fmt: skip
        if left:
            raise self.refusal(", ".join(f"it has {self.name}.{key} = {self._keys[key]}" for key in left))


def build_config(
    metadata: Metadata, shapes: Mapping[str, tuple[int, ...]], rope_tensors: Mapping[str, np.ndarray]
) -> PretrainedConfig:
    """The configuration of a model from its keys.

    Args:
        metadata: The keys; all are taken.
        shapes: Of all its tensors, under llama.cpp's names.
        rope_tensors: Values of those of :data:`ROPE_TENSORS` that it has.

    Raises:
        ValueError: If a key is missing, or transformers' model cannot express what one says.
    """
    take = metadata.take
    heads, hidden = take("attention.head_count"), take("embedding_length")
    head_dim = take("attention.key_length", hidden // heads)
    metadata.expect("attention.value_length", head_dim)
    metadata.expect("attention.causal", True)
    layers, window = take("block_count"), take("attention.sliding_window", None)
    settings = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": take("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": take("attention.head_count_kv", heads),
        "rms_norm_eps": take("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": take("context_length"),
        "vocab_size": shapes["token_embd.weight"][0],
        "tie_word_embeddings": "output.weight" not in shapes,
    }
    model_class = ARCHITECTURES[metadata.name].model_class
    if metadata.name == "llama" and window:  # llama.cpp knows Mistral by the same name
        model_class = transformers.MistralForCausalLM
    if metadata.name.startswith("gemma"):
        # llama.cpp scales attention scores of the 27B models otherwise, and knows them by their number of layers.
        largest = layers == {"gemma2": 46, "gemma3": 62}[metadata.name]
        settings["query_pre_attn_scalar"] = hidden // heads if largest else head_dim
    if metadata.name == "gemma2":
        settings["attn_logit_softcapping"] = take("attn_logit_softcapping", 50.0)
        settings["final_logit_softcapping"] = take("final_logit_softcapping", 30.0)
        settings["sliding_window"] = window or 4096
    elif metadata.name == "gemma3":
        pattern = take("attention.sliding_window_pattern", 6)
        settings["layer_types"] = [
            "full_attention" if (layer + 1) % pattern == 0 else "sliding_attention" for layer in range(layers)
        ]
        settings["final_logit_softcapping"] = take("final_logit_softcapping", None)
        settings["sliding_window"] = window
    elif window:
        if metadata.name in ("qwen2", "qwen3"):
            raise metadata.refusal(f"it has {metadata.name}.attention.sliding_window = {window}")
        settings["sliding_window"] = window
    if metadata.name != "qwen2" or head_dim != hidden // heads:
        settings["head_dim"] = head_dim
    if metadata.name in ("llama", "qwen3"):
        settings["attention_bias"] = "blk.0.attn_q.bias" in shapes
    if metadata.name == "llama":
        settings["mlp_bias"] = "blk.0.ffn_gate.bias" in shapes
    settings["rope_parameters"] = _rope(metadata, head_dim, settings["max_position_embeddings"], rope_tensors)
    if original := settings["rope_parameters"].get("original_max_position_embeddings"):
        settings |= {"original_max_position_embeddings": original} if metadata.name == "phi3" else {}
    if metadata.name == "gemma3":
        local = {"rope_type": "default", "rope_theta": take("rope.freq_base_swa", 10000.0)}
        settings["rope_parameters"] = {"full_attention": settings["rope_parameters"], "sliding_attention": local}
    metadata.check_all_taken()
    config = model_class.config_class(**settings, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    assert isinstance(config, PretrainedConfig)
    config.architectures = [model_class.__name__]
    return config


def _rope(metadata: Metadata, head_dim: int, context: int, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Rotary embedding: ``rope_parameters`` as transformers writes them."""
    take = metadata.take
    theta = take("rope.freq_base", 10000.0)
    width = take("rope.dimension_count", head_dim)
    result: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if metadata.name == "phi3":
        result["partial_rotary_factor"] = width / head_dim
    elif width != head_dim:
        raise metadata.refusal(f"it rotates {width} of the {head_dim} dimensions of a head")
    kind, factor = take("rope.scaling.type", "linear"), take("rope.scaling.factor", take("rope.scale_linear", 0.0))
    original = take("rope.scaling.original_context_length", context)
    attention = take("rope.scaling.attn_factor", 1.0) * take("rope.scaling.yarn_attn_factor", 1.0)
    fast, slow = take("rope.scaling.yarn_beta_fast", 32.0), take("rope.scaling.yarn_beta_slow", 1.0)
    metadata.expect("rope.scaling.yarn_ext_factor", 1.0, -1.0)
    metadata.expect("rope.scaling.yarn_log_multiplier", 0.0)
    scaled = kind != "none" and factor not in (0.0, 1.0)

    freqs, long, short = (tensors.get(name) for name in ROPE_TENSORS)
    if long is not None and short is not None:
        return result | {
            "rope_type": "longrope",
            "factor": context / original,
            "long_factor": _numbers(long),
            "short_factor": _numbers(short),
            "original_max_position_embeddings": original,
            "attention_factor": attention,
        }
    if long is not None or short is not None or (freqs is not None and scaled):
        raise metadata.refusal(f"it has {' and '.join(tensors)} together with rope.scaling.factor {factor}")
    if freqs is not None and not np.allclose(freqs, 1):
        llama3 = _llama3(freqs, theta, width, original)
        if llama3 is None:
            raise metadata.refusal("rope_freqs.weight does not follow the rule of Llama 3.1's rope scaling")
        return result | llama3
    if kind == "yarn" and scaled:
        yarn = {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "beta_fast": fast,
            "beta_slow": slow,
        }
        # transformers multiplies by 0.1 ln(factor) + 1 as llama.cpp does, unless it is told what to multiply by.
        return (
            result | yarn | ({} if attention == 1 else {"attention_factor": attention * (0.1 * math.log(factor) + 1)})
        )
    if attention != 1:
        raise metadata.refusal(f"it has {metadata.name}.rope.scaling.attn_factor = {attention}")
    if kind == "linear" and scaled:
        return result | {"rope_type": "linear", "factor": factor}
    if kind not in ("none", "linear", "yarn"):
        raise metadata.refusal(f"it has {metadata.name}.rope.scaling.type = {kind}")
    return result


def _numbers(values: np.ndarray) -> list[float]:
    return [float(str(value)) for value in values.astype(np.float32)]


def _llama3(factors: np.ndarray, theta: float, width: int, original: int) -> dict[str, Any] | None:
    """The numbers of Llama 3.1's rope scaling, of which GGUF keeps only what they do to each of the D / 2 frequencies.

    Wavelengths above ``original / low`` are scaled by ``factor``, those below ``original / high`` not at all, and
    between them the inverse of the factor is a straight line over the inverse of the wavelength. Published models are
    tried first; else the line is fitted. Of ``original``, ``low`` and ``high`` only ratios count, so ``low`` is 1.

    Returns:
        ``None`` if no numbers give these factors.
    """
    largest = float(str(np.float32(factors.max())))
    for old, high in _candidates(factors, theta, width, original):
        numbers = {
            "factor": largest,
            "low_freq_factor": 1.0,
            "high_freq_factor": high,
            "original_max_position_embeddings": old,
        }
        if np.allclose(_llama3_factors(theta, width, largest, 1.0, high, old), factors, rtol=1e-5, atol=0):
            return {"rope_type": "llama3", **numbers}
    return None


def _candidates(factors: np.ndarray, theta: float, width: int, original: int) -> Iterator[tuple[int, float]]:
    yield from ((old, 4.0) for old in (8192, original, *(2**n for n in range(6, 21))))
    largest = factors.max()
    line = (1 / factors - 1 / largest) / (1 - 1 / largest)
    inside = (line > 1e-4) & (line < 1 - 1e-4)
    if inside.sum() >= 2:
        slope, start = np.polyfit(_inverse_wavelengths(theta, width)[inside], line[inside], 1)
        if start < 0 < slope:
            high = 1 - 1 / start
            yield round(-slope / start), float(round(high, 3))
            yield round(-slope / start), float(high)


def _inverse_wavelengths(theta: float, width: int) -> np.ndarray:
    return theta ** (-np.arange(0, width, 2) / width) / (2 * math.pi)


def _llama3_factors(theta: float, width: int, factor: float, low: float, high: float, original: int) -> np.ndarray:
    share = (original * _inverse_wavelengths(theta, width) - low) / (high - low)
    share = share.clip(0, 1)
    return 1 / ((1 - share) / factor + share)
