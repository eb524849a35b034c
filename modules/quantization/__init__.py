"""Frozen 4-bit linear layers that FSDP2 can shard."""

from .nf4_linear import NF4Linear
from .replace import quantize_linears

__all__ = ["NF4Linear", "quantize_linears"]
