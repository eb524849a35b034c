"""Models in: names, directories and files to weights, from safetensors (16-bit or bitsandbytes 4-bit) and GGUF."""

from typing import TYPE_CHECKING

from ..lazy import import_on_first_use

if TYPE_CHECKING:
    from .config import read_config
    from .loading import check_weights, load_weights
    from .resolve import base_name, resolve_model
    from .safetensors_files import SafetensorsCheckpoint
    from .tokenizer import load_tokenizer
else:
    __getattr__, __dir__ = import_on_first_use(__name__)

__all__ = [
    "SafetensorsCheckpoint",
    "base_name",
    "check_weights",
    "load_tokenizer",
    "load_weights",
    "read_config",
    "resolve_model",
]
