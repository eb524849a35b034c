"""peft's LoRA layer with less traffic and memory.

Shapes: B samples, S tokens per sample.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from peft.tuners import lora as peft_lora
from torch import Tensor, nn

from ..quantization.nf4_linear import NF4Linear


class LoraLinear(peft_lora.Linear):  # type: ignore[misc]
    """peft's LoRA layer, which computes the same with less traffic and memory.

    peft converts the input to the adapter's float32, for autocast to convert it back, a sixth of an uncompiled step of
    an 8B model; here the base's result says in what to compute. A and B are converted here, for autocast would keep
    its copies of all layers until the forward is over, 0.3 GiB for 8B and r 64. And peft scales the adapter's output
    [B, S, out], which keeps another tensor of that size in forward and in backward; here the r numbers of a token are
    scaled. A single adapter without dropout on a 4-bit base has no output of its own: see :class:`NF4Linear`. Variants
    of LoRA, which peft can add to a layer that stands already, are left to peft.

    Attributes:
        is_off: Compute the base layer alone: see :func:`adapters_off`.
    """

    is_off = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [B, S, in] -> [B, S, out]."""
        if self.is_off and not self.merged:
            return self.base_layer(x)  # type: ignore[no-any-return]
        if self.disable_adapters or self.merged or args or kwargs:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        names = [name for name in self.active_adapters if name in self.lora_A]
        if any(name in self.lora_variant or self.lora_bias[name] for name in names):
            return super().forward(x)  # type: ignore[no-any-return]
        if len(names) == 1 and isinstance(self.base_layer, NF4Linear) and not self._drops(names[0]):
            a, b = self.lora_A[names[0]].weight, self.lora_B[names[0]].weight
            return self.base_layer(x, lora=(a, b, self.scaling[names[0]]))  # type: ignore[no-any-return]
        y: Tensor = self.base_layer(x)
        for name in names:
            a, b = (matrix[name].weight.to(y.dtype) for matrix in (self.lora_A, self.lora_B))
            low = F.linear(self.lora_dropout[name](x.to(y.dtype)), a)
            y = y + F.linear(low * self.scaling[name], b)
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As peft's, which ``merge_adapter`` and ``merge_and_unload`` call.

        Raises:
            ValueError: For a 4-bit base, which stays as it is.
        """
        if isinstance(self.base_layer, NF4Linear):
            raise ValueError(
                "A weight packed in 4 bits cannot take an adapter in. Save the adapter and merge the files with "
                "recipes/merge_adapter.py (lightning_qlora.modules.export.merge), which writes a dense checkpoint."
            )
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def _drops(self, name: str) -> bool:
        dropout = self.lora_dropout[name]
        return dropout.training and not isinstance(dropout, nn.Identity)


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The base model alone, for as long as the context lasts, on whatever strategy: no parameter is touched.

    peft's own way to disable adapters takes ``requires_grad`` off them and puts it back, which neither FSDP2 nor DDP
    expects in training. A compiled layer has one graph more, made the first time.

    Raises:
        ValueError: If an adapter is merged into its layer.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    if merged := [layer for layer in layers if layer.merged]:
        raise ValueError(f"{len(merged)} adapters are merged into their layers and cannot be off. Unmerge them first.")
    try:
        for layer in layers:
            layer.is_off = True
        yield
    finally:
        for layer in layers:
            layer.is_off = False
