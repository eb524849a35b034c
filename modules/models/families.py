"""The model families that can be trained: one row per family says what the rest of the library must know of it.

transformers' own classes carry the architecture. To add a family, add a row; a family whose forward differs in more
than a row can say also needs a mixin beside those of :mod:`.causal_lm`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig, PreTrainedModel

from ..attention import AttentionRequest
from ..checkpoints.config import read_config
from .vision_towers import GEMMA3, IDEFICS3, LLAVA, QWEN2_5_VL, QWEN2_VL, QWEN3_VL, VisionSide

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Family:
    """What the library must know of a model family.

    Attributes:
        name: For readers.
        model_type: ``model_type`` of its ``config.json``.
        architecture: Name of its causal language model in transformers; also what ``architectures`` must say.
        projections: The linear layers of a decoder layer, by the last component of their names. They are quantized, and
            LoRA adapts all of them by default (Dettmers et al. 2023, arXiv:2305.14314).
        logits_divisor: Name of the configuration's number that logits are divided by.
        logits_softcap: Name of the configuration's number that caps logits (``c * tanh(logits / c)``), if it is set.
        gguf_architecture: llama.cpp's name of it.
        vision: What turns images into tokens, for a vision-language model; the rest then describes its language model.
    """

    name: str
    model_type: str
    architecture: str
    gguf_architecture: str
    projections: tuple[str, ...] = _PROJECTIONS
    logits_divisor: str | None = None
    logits_softcap: str | None = None
    vision: VisionSide | None = None

    @property
    def model_class(self) -> type[PreTrainedModel]:
        """transformers' class of the causal language model, or of the vision-language model."""
        found: type[PreTrainedModel] = getattr(transformers, self.architecture)
        return found

    def logit_scale(self, config: PretrainedConfig) -> float:
        """What the head's logits are multiplied by."""
        return 1.0 if self.logits_divisor is None else 1.0 / getattr(config.get_text_config(), self.logits_divisor)

    def logit_softcap(self, config: PretrainedConfig) -> float | None:
        """What caps the head's logits, or ``None``."""
        return None if self.logits_softcap is None else getattr(config.get_text_config(), self.logits_softcap)


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("Llama", "llama", "LlamaForCausalLM", "llama"),
        Family("Mistral", "mistral", "MistralForCausalLM", "llama"),
        Family("Qwen2 and Qwen2.5", "qwen2", "Qwen2ForCausalLM", "qwen2"),
        Family("Qwen3", "qwen3", "Qwen3ForCausalLM", "qwen3"),
        Family("SmolLM3", "smollm3", "SmolLM3ForCausalLM", "smollm3"),
        Family("OLMo2", "olmo2", "Olmo2ForCausalLM", "olmo2"),
        Family("Granite", "granite", "GraniteForCausalLM", "granite", logits_divisor="logits_scaling"),
        Family("Phi-3", "phi3", "Phi3ForCausalLM", "phi3", ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
        Family("Gemma2", "gemma2", "Gemma2ForCausalLM", "gemma2", logits_softcap="final_logit_softcapping"),
        Family("Gemma3 (text)", "gemma3_text", "Gemma3ForCausalLM", "gemma3", logits_softcap="final_logit_softcapping"),
    )
}

#: Vision-language models. What is said of projections, logits and layers is said of their language models.
VISION_FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("Llava 1.5 and Pixtral", "llava", "LlavaForConditionalGeneration", "llama", vision=LLAVA),
        Family("Qwen2-VL", "qwen2_vl", "Qwen2VLForConditionalGeneration", "qwen2vl", vision=QWEN2_VL),
        Family("Qwen2.5-VL", "qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", "qwen2vl", vision=QWEN2_5_VL),
        Family("Qwen3-VL", "qwen3_vl", "Qwen3VLForConditionalGeneration", "qwen3vl", vision=QWEN3_VL),
        Family("Idefics3", "idefics3", "Idefics3ForConditionalGeneration", "llama", vision=IDEFICS3),
        Family("SmolVLM", "smolvlm", "SmolVLMForConditionalGeneration", "llama", vision=IDEFICS3),
        Family("Gemma3", "gemma3", "Gemma3ForConditionalGeneration", "gemma3", vision=GEMMA3),
    )
}


def family_of(config: PretrainedConfig) -> Family:
    """The row of a configuration that :func:`load_config` returned."""
    return FAMILIES[config.model_type] if config.model_type in FAMILIES else VISION_FAMILIES[config.model_type]


def load_config(directory: str | Path, *, vision: bool | None = False) -> PretrainedConfig:
    """Read and check ``config.json``.

    Args:
        directory: Of the model.
        vision: Whether it must be a vision-language model; ``None`` allows both.

    Raises:
        ValueError: If there is none, it is not JSON or not valid, or its architecture is not in :data:`FAMILIES`, or,
            with ``vision``, in :data:`VISION_FAMILIES`.
    """
    path = Path(directory) / "config.json"
    raw = read_config(directory)
    tables = {False: FAMILIES, True: VISION_FAMILIES, None: {**FAMILIES, **VISION_FAMILIES}}
    family = tables[vision].get(str(raw.get("model_type")))
    architectures = raw.get("architectures") or ([] if family is None else [family.architecture])
    if family is None or family.architecture not in architectures:
        known = ", ".join(f"{row.name} ({row.architecture})" for row in tables[vision].values())
        other = tables[None].get(str(raw.get("model_type")))
        raise ValueError(
            f"{directory} is a {raw.get('model_type')!r} model ({', '.join(architectures)}), which "
            + (
                f"is a language model without vision. Train it with QLoRACausalLM. Vision-language families: {known}."
                if other is not None and vision
                else f"takes images too. Train it with QLoRAVisionLanguage. Families of text: {known}."
                if other is not None and other.vision is not None
                else f"cannot be trained here. Known families: {known}."
            )
        )
    try:
        config = family.model_class.config_class.from_pretrained(directory)
    except (StrictDataclassError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not valid for {family.name}: {' '.join(str(error).split())}") from error
    assert isinstance(config, PretrainedConfig)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the 4-bit layers are ours; transformers must not look for its own
    return config


# ---------------------------------------------------------------------------------- what configurations say in one way


def head_dim(config: PretrainedConfig) -> int:
    """Width of an attention head."""
    config = config.get_text_config()
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def attention_softcap(config: PretrainedConfig) -> float | None:
    """What caps attention scores, or ``None``."""
    return getattr(config.get_text_config(), "attn_logit_softcapping", None)


def layer_windows(config: PretrainedConfig, sliding_window: int | None = None) -> list[int | None]:
    """The attention window of each decoder layer in tokens, the current one included; ``None``: full causal attention.

    Args:
        config: The model's.
        sliding_window: A window for all layers of a model that is configured without one.

    Raises:
        ValueError: For ``sliding_window`` with a model that has windows of its own, or a type of attention that is
            neither causal nor a window.
    """
    config = config.get_text_config()
    own = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["sliding_attention" if own else "full_attention"]
    if unknown := sorted(set(types) - {"full_attention", "sliding_attention"}):
        raise ValueError(
            f"config.json has layers of type {', '.join(map(repr, unknown))}; layers here attend to all tokens before "
            "them ('full_attention') or to a window ('sliding_attention')."
        )
    windows = [own if kind == "sliding_attention" else None for kind in types]
    if len(windows) == 1:
        windows *= config.num_hidden_layers
    if sliding_window is None:
        return windows
    if any(windows):
        raise ValueError(
            f"sliding_window={sliding_window} is for models without windows of their own, but config.json has a "
            f"sliding_window of {own}, which the model was trained with. Leave sliding_window out."
        )
    return [sliding_window] * config.num_hidden_layers


def attention_request(
    config: PretrainedConfig,
    *,
    packed: bool,
    sliding_window: int | None,
    compute_capability: tuple[int, int] | None,
    dtype: torch.dtype,
) -> AttentionRequest:
    """What a model needs of attention, for :func:`~lightning_qlora.modules.attention.choose_attention`.

    Args:
        config: The model's.
        packed: Whether rows hold several documents.
        sliding_window: As of :func:`layer_windows`.
        compute_capability: Of the CUDA device, or ``None`` for the CPU.
        dtype: Of queries, keys and values.

    Raises:
        ValueError: As :func:`layer_windows`.
    """
    return AttentionRequest(
        packed=packed,
        windows=tuple(dict.fromkeys(layer_windows(config, sliding_window))),
        softcap=attention_softcap(config) is not None,
        compute_capability=compute_capability,
        dtype=dtype,
        dropout=config.get_text_config().attention_dropout,
    )
