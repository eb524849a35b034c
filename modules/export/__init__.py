"""Models out: an adapter merged into its base, and GGUF files for llama.cpp."""

from typing import TYPE_CHECKING

from ..lazy import import_on_first_use

if TYPE_CHECKING:
    from .gguf import Exported, export_gguf, export_gguf_adapter
    from .llama_cpp import Verified, verify_gguf
    from .merge import Merged, merge_adapter
    from .mmproj import export_mmproj, export_vision_gguf
    from .vision_weights import VisionLanguageWeights
    from .weights import FinetunedWeights
else:
    __getattr__, __dir__ = import_on_first_use(__name__)

__all__ = [
    "Exported",
    "FinetunedWeights",
    "Merged",
    "Verified",
    "VisionLanguageWeights",
    "export_gguf",
    "export_gguf_adapter",
    "export_mmproj",
    "export_vision_gguf",
    "merge_adapter",
    "verify_gguf",
]
