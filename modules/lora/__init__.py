"""LoRA: its configuration, initial values, layer, and peft's files."""

from typing import TYPE_CHECKING

from ..lazy import import_on_first_use

if TYPE_CHECKING:
    from .adapter_files import load_adapter, read_adapter, save_adapter
    from .config import check_lora, default_lora
    from .linear import LoraLinear
else:
    __getattr__, __dir__ = import_on_first_use(__name__)

__all__ = ["LoraLinear", "check_lora", "default_lora", "load_adapter", "read_adapter", "save_adapter"]
