"""Triton kernels behind `torch.library` operators. One kernel a file."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .nf4 import Quantized4bit, dequantize_4bit, dequantize_quant_state

__all__ = ["Quantized4bit", "dequantize_4bit", "dequantize_quant_state"]


# Imported on demand: with the repository's root on sys.path, transformers takes this folder for PyPI's `kernels` and
# imports it under that name, where it would define the operators a second time, which torch refuses.
def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import nf4

    return getattr(nf4, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
