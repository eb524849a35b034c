"""Models that QLoRA trains: transformers' classes with 4-bit layers, LoRA, activation checkpointing and compilation."""

from typing import TYPE_CHECKING

from ..lazy import import_on_first_use

if TYPE_CHECKING:
    from .build import build_model, materialize
    from .causal_lm import QLoRALlamaForCausalLM
    from .compilation import CompileMode, compile_region
else:
    __getattr__, __dir__ = import_on_first_use(__name__)

__all__ = ["CompileMode", "QLoRALlamaForCausalLM", "build_model", "compile_region", "materialize"]
