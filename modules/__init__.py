"""LightningModules, the FSDP2 strategy, data and the 4-bit building blocks."""

from typing import TYPE_CHECKING

from .lazy import import_on_first_use

if TYPE_CHECKING:
    from . import losses
    from .checkpoints import resolve_model
    from .data import ChatDataModule
    from .distributed import FSDP2Strategy, build_strategy
    from .export import export_gguf, merge_adapter
    from .lora import default_lora, save_adapter
    from .losses import cross_entropy, linear_loss
    from .quantization import NF4Linear, quantize_linears
    from .training import QLoRACausalLM, QLoRAPreference, QLoRASequenceClassifier, QLoRAVisionLanguage
else:
    __getattr__, __dir__ = import_on_first_use(__name__)

__all__ = [
    "ChatDataModule",
    "FSDP2Strategy",
    "NF4Linear",
    "QLoRACausalLM",
    "QLoRAPreference",
    "QLoRASequenceClassifier",
    "QLoRAVisionLanguage",
    "build_strategy",
    "cross_entropy",
    "default_lora",
    "export_gguf",
    "linear_loss",
    "losses",
    "merge_adapter",
    "quantize_linears",
    "resolve_model",
    "save_adapter",
]
