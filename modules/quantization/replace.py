"""Replacing the linear layers of a model by 4-bit ones."""

from __future__ import annotations

from typing import Any

from torch import nn

from .nf4_linear import STORAGE_DTYPE, NF4Linear

_MULTIPLE = 2 * STORAGE_DTYPE.itemsize  # of input features: a row of 4-bit values must fill whole storage elements


def quantize_linears(module: nn.Module, *, skip: tuple[str, ...] = ("lm_head",), **quantization: Any) -> nn.Module:
    """Replace every ``nn.Linear`` below ``module`` by an :class:`NF4Linear` of the same weights, in place.

    Args:
        module: Any module on a real device; layers on the meta device become empty 4-bit layers.
        skip: Last name components of layers to leave alone.
        quantization: ``nested``, ``blocksize``, ``quant_type`` of :class:`NF4Linear`.

    Raises:
        ValueError: Before any layer is replaced, if one cannot be, or ``module`` is itself the layer.
    """
    linears = [
        (name, child)
        for name, child in module.named_modules(remove_duplicate=False)  # a layer in two places stays one layer
        if type(child) is nn.Linear and name.rpartition(".")[2] not in skip
    ]
    for name, child in linears:
        if child is module:
            raise ValueError("module is a linear layer, which is replaced in its parent: use NF4Linear.from_linear().")
        if child.in_features % _MULTIPLE:
            raise ValueError(
                f"{name} has {child.in_features} input features, not a multiple of {_MULTIPLE} as 4-bit rows need. "
                f"Leave it as it is: skip={(*skip, name.rpartition('.')[2])}."
            )
    replaced: dict[nn.Module, NF4Linear] = {}
    for name, child in linears:
        if child in replaced:
            new = replaced[child]
        elif child.weight.is_meta:
            new = NF4Linear(child.in_features, child.out_features, child.bias is not None, device="meta",
                            dtype=child.weight.dtype, **quantization)  # fmt: skip
        else:
            new = NF4Linear.from_linear(child, **quantization)
        replaced[child] = new
        parent, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(parent), attribute, new.train(child.training))
    return module
