"""Which family a model is of, its image processor, and the chat template that its processor may hold."""

from __future__ import annotations

import copy
import importlib
import json
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from .image_processing import (
    Gemma3Images,
    Idefics3Images,
    ImageProcessing,
    LlavaImages,
    MllamaImages,
    PixtralImages,
    QwenImages,
)

#: By ``model_type``; of llava models by their tower's.
FAMILIES: dict[str, type[ImageProcessing]] = {
    "llava": LlavaImages,
    "llava/pixtral": PixtralImages,
    "qwen2_vl": QwenImages,
    "qwen2_5_vl": QwenImages,
    "qwen3_vl": QwenImages,
    "idefics3": Idefics3Images,
    "smolvlm": Idefics3Images,
    "gemma3": Gemma3Images,
    "mllama": MllamaImages,
}


#: Image processors, and the packages of transformers' models that have them.
_PIL_PACKAGES = {
    "CLIPImageProcessor": "clip",
    "SiglipImageProcessor": "siglip",
    "LlavaImageProcessor": "llava",
    "PixtralImageProcessor": "pixtral",
    "Qwen2VLImageProcessor": "qwen2_vl",
    "Idefics3ImageProcessor": "idefics3",
    "SmolVLMImageProcessor": "smolvlm",
    "Gemma3ImageProcessor": "gemma3",
    "MllamaImageProcessor": "mllama",
}


def image_family(config: PretrainedConfig) -> type[ImageProcessing]:
    """The class for a model.

    Raises:
        ValueError: For a model of an unknown family, or without a vision tower.
    """
    vision = getattr(config, "vision_config", None)
    name = f"{config.model_type}/{getattr(vision, 'model_type', None)}"
    family = FAMILIES.get(name) or FAMILIES.get(config.model_type)
    if family is None or vision is None:
        known = ", ".join(dict.fromkeys(name.partition("/")[0] for name in FAMILIES))
        raise ValueError(f"a {config.model_type} model takes no images here; the known families are {known}")
    return family


def load_image_processing(
    directory: str | Path, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> ImageProcessing:
    """What a model in a directory does with images.

    Raises:
        ValueError: If the model is of no known family, its image processor cannot be loaded, or the tokenizer lacks
            image tokens.
    """
    family = image_family(config)
    try:
        image_processor = _load_image_processor(Path(directory), family)
    except Exception as error:  # transformers raises many types for files that are missing or damaged
        raise ValueError(
            f"{directory}: its image processor cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())}"
            "); copy preprocessor_config.json or processor_config.json of the original model into it"
        ) from error
    return family(config, tokenizer, image_processor)


def _load_image_processor(directory: Path, family: type[ImageProcessing]) -> Any:
    """The image processor in a directory, in the variant that needs no torchvision.

    transformers' own choice (``AutoImageProcessor``) needs torchvision in 5.17, if only to be imported.
    """
    named: str | None = None
    for file, inside in (("processor_config.json", "image_processor"), ("preprocessor_config.json", None)):
        if named is None and (directory / file).is_file():
            found = json.loads((directory / file).read_text(encoding="utf-8"))
            named = (found.get(inside, {}) if inside else found).get("image_processor_type")
    name = (named or family.default_processor).removesuffix("Fast").removesuffix("Pil")
    if name not in _PIL_PACKAGES:
        raise ValueError(f"{name} is not known here; known are {', '.join(_PIL_PACKAGES)}")
    package = _PIL_PACKAGES[name]
    module = importlib.import_module(f"transformers.models.{package}.image_processing_pil_{package}")
    return getattr(module, f"{name}Pil").from_pretrained(directory)


def with_chat_template(directory: str | Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, or a copy with the processor's chat template if it has none itself."""
    if tokenizer.chat_template:
        return tokenizer
    for name in ("chat_template.json", "processor_config.json"):
        path = Path(directory) / name
        template = json.loads(path.read_text(encoding="utf-8")).get("chat_template") if path.is_file() else None
        if template:
            tokenizer = copy.deepcopy(tokenizer)
            tokenizer.chat_template = template
            break
    return tokenizer
