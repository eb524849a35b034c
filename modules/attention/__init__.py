"""Attention behind one name: causal, windows, soft caps, documents of packed rows; and its place in transformers.

To add a backend, write a subclass of :class:`AttentionBackend` and add it to the table in ``choice.py``; or pass an
object of it wherever a name is taken.
"""

from .backend import AttentionBackend, AttentionRequest
from .choice import BACKENDS, AttentionName, check_attention, choose_attention
from .transformers_interface import IMPLEMENTATION, attention_inputs, register_attention

__all__ = [
    "BACKENDS",
    "IMPLEMENTATION",
    "AttentionBackend",
    "AttentionName",
    "AttentionRequest",
    "attention_inputs",
    "check_attention",
    "choose_attention",
    "register_attention",
]
