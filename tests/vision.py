"""Directories of tiny vision-language models without weights: configuration, image processor, tokenizer, template."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerFast

from tests.chats import make_tokenizer

PARTS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}PLACEHOLDER{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 400, "max_position_embeddings": 2048,
}  # fmt: skip

_QWEN = ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>")
_IDEFICS = (
    "<image>", "<fake_token_around_image>", "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in (1, 2, 3, 4) for column in (1, 2, 3, 4)),
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A tiny model of a family.

    Attributes:
        model_type: Of its configuration.
        tokens: What its tokenizer has for images; the first is the image token.
        processor: Its ``preprocessor_config.json``.
        config: What its configuration has beside the text part.
        written: What its chat template writes for an image; default the image token.
    """

    model_type: str
    tokens: tuple[str, ...]
    processor: dict[str, Any]
    config: dict[str, Any]
    text: dict[str, Any] = field(default_factory=dict)
    written: str | None = None


_VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_TILES = {"size": {"longest_edge": 96}, "max_image_size": {"longest_edge": 32}}


def _qwen(model_type: str, patch: int, vision: dict[str, Any]) -> Family:
    sizes = {"min_pixels": (2 * patch) ** 2, "max_pixels": 400 * patch**2}
    return Family(
        model_type, _QWEN, {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": patch, **sizes},
        {"vision_config": {"patch_size": patch, "depth": 2, "num_heads": 2, **vision}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}},
        "<|vision_start|><|image_pad|><|vision_end|>",
    )  # fmt: skip


FAMILIES = {
    "llava": Family(
        "llava", ("<image>",),
        {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 24},
         "crop_size": {"height": 24, "width": 24}},
        {"vision_config": {"model_type": "clip_vision_model", "image_size": 24, "patch_size": 8, **_VISION}},
    ),
    "llava-siglip": Family(
        "llava", ("<image>",),
        {"image_processor_type": "SiglipImageProcessor", "size": {"height": 24, "width": 24}},
        {"vision_config": {"model_type": "siglip_vision_model", "image_size": 24, "patch_size": 8, **_VISION},
         "vision_feature_select_strategy": "full"},
    ),
    "pixtral": Family(
        "llava", ("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        {"image_processor_type": "PixtralImageProcessor", "size": {"longest_edge": 64}, "patch_size": 8},
        {"vision_config": {"model_type": "pixtral", "image_size": 64, "patch_size": 8, **_VISION},
         "vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
        {"model_type": "mistral"},
    ),
    "qwen2_vl": _qwen("qwen2_vl", 4, {"embed_dim": 16, "hidden_size": 32}),
    "qwen2_5_vl": _qwen("qwen2_5_vl", 4, {"hidden_size": 16, "out_hidden_size": 32}),
    "qwen3_vl": _qwen("qwen3_vl", 4, {"hidden_size": 16, "out_hidden_size": 32}),
    "idefics3": Family(
        "idefics3", _IDEFICS, {"image_processor_type": "Idefics3ImageProcessor", **_TILES},
        {"vision_config": {"image_size": 32, "patch_size": 8, **_VISION}, "scale_factor": 2},
    ),
    "smolvlm": Family(
        "smolvlm", _IDEFICS, {"image_processor_type": "SmolVLMImageProcessor", **_TILES},
        {"vision_config": {"image_size": 32, "patch_size": 8, **_VISION}, "scale_factor": 2},
    ),
    "gemma3": Family(
        "gemma3", ("<image_soft_token>", "<start_of_image>", "<end_of_image>"),
        {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 32, "width": 32}},
        {"vision_config": {"image_size": 32, "patch_size": 8, **_VISION}, "mm_tokens_per_image": 4},
        {"head_dim": 16}, "<start_of_image>",
    ),
    "mllama": Family(
        "mllama", ("<|image|>", "<|python_tag|>"),
        {"image_processor_type": "MllamaImageProcessor", "size": {"height": 32, "width": 32}, "max_image_tiles": 4},
        {"vision_config": {
            "image_size": 32, "patch_size": 8, "hidden_size": 16, "attention_heads": 2, "num_hidden_layers": 2,
            "num_global_layers": 1, "intermediate_size": 32, "intermediate_layers_indices": [0],
            "vision_output_dim": 32, "max_num_tiles": 4,
            "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
        }},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "cross_attention_layers": [1]},
    ),
}  # fmt: skip


def vision_tokenizer(name: str) -> PreTrainedTokenizerFast:
    family = FAMILIES[name]
    template = PARTS.replace("PLACEHOLDER", family.written or family.tokens[0])
    tokenizer = make_tokenizer(template, extra=family.tokens)
    tokenizer.padding_side = "right"
    return tokenizer


def save_vision_model(directory: Path, name: str) -> tuple[PretrainedConfig, PreTrainedTokenizerFast]:
    """Write what a data module reads of a model."""
    family, tokenizer = FAMILIES[name], vision_tokenizer(name)
    ids = tokenizer.convert_tokens_to_ids(list(family.tokens))
    names = ("image_token_index", "boi_token_index", "eoi_token_index") if name == "gemma3" else ("image_token_id",)
    text = {"model_type": "llama", **_TEXT, **family.text}
    if name not in ("llava", "llava-siglip", "pixtral"):
        del text["model_type"]
    config = AutoConfig.for_model(
        family.model_type, text_config=text, **family.config, **dict(zip(names, ids, strict=False))
    )
    directory.mkdir(exist_ok=True)
    config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(json.dumps(family.processor))
    return config, tokenizer


def save_images(folder: Path, sizes: dict[str, tuple[int, int]]) -> None:
    """Files of random pixels by name, each of (width, height)."""
    draw = np.random.default_rng(0)
    for name, (width, height) in sizes.items():
        Image.fromarray(draw.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / name)
