"""Models that QLoRA trains: transformers' classes with 4-bit layers, LoRA, activation checkpointing and compilation."""

from typing import TYPE_CHECKING

from ..lazy import import_on_first_use

if TYPE_CHECKING:
    from .build import build_model, materialize
    from .causal_lm import QLoRAForCausalLM
    from .compilation import CompileMode, compile_region
    from .families import FAMILIES, VISION_FAMILIES, Family, load_config
    from .sequence_classifier import QLoRAForSequenceClassification
    from .vision_language import QLoRAForVisionLanguage, VisionOptions
else:
    __getattr__, __dir__ = import_on_first_use(__name__)

__all__ = [
    "FAMILIES",
    "VISION_FAMILIES",
    "CompileMode",
    "Family",
    "QLoRAForCausalLM",
    "QLoRAForSequenceClassification",
    "QLoRAForVisionLanguage",
    "VisionOptions",
    "build_model",
    "compile_region",
    "load_config",
    "materialize",
]
