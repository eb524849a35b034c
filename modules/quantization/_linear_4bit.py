"""The product with a frozen 4-bit weight and its gradient, in eager mode and under ``torch.compile``.

:class:`Linear4bit` is what :class:`~.nf4_linear.NF4Linear` computes, without its bias. Tensors are loose here: autograd
Functions and operators of ``torch.library`` take nothing else.

Shapes: N out_features, K in_features, r the rank of LoRA.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...kernels.nf4 import Quantized4bit, dequantize_4bit


def dequantize_weight(
    weight: Tensor,
    absmax: Tensor,
    code2: Tensor | None,
    absmax2: Tensor | None,
    offset: Tensor | None,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    blocksize: int,
    nested_blocksize: int,
    quant_type: str,
) -> Tensor:
    """The dense weight [N, K] in ``dtype``, of the tensors as :class:`~.nf4_linear.NF4Linear` stores them."""
    if code2 is not None:
        blocks = -(-out_features * in_features // blocksize)
        absmax = absmax.view(torch.uint8)[:blocks]  # the storage is padded to whole float32 elements
    shape = (out_features, in_features)
    quantized = Quantized4bit(weight, absmax, code2, absmax2, offset, shape, blocksize, nested_blocksize, quant_type)
    return dequantize_4bit(quantized, dtype=dtype)


def _dequantize_weight_fake(
    weight: Tensor, absmax: Tensor, code2: Any, absmax2: Any, offset: Any, out_features: int, in_features: int,
    dtype: torch.dtype, *_: Any,
) -> Tensor:  # fmt: skip
    return weight.new_empty(out_features, in_features, dtype=dtype)


# Under torch.compile the dequantization is an operator and the matrix product an ordinary one, which the compiler can
# autotune and fuse with what follows. Forward and backward are traced into one graph before it is divided, and equal
# calls there are merged into one, whose result, the 16-bit weight, would then be kept in between. Hence two names.
_SIGNATURE = (
    "(Tensor weight, Tensor absmax, Tensor? code2, Tensor? absmax2, Tensor? offset, int out_features, int in_features, "
    "ScalarType dtype, int blocksize, int nested_blocksize, str quant_type) -> Tensor"
)

for _name in ("lightning_qlora::linear_4bit_weight", "lightning_qlora::linear_4bit_weight_backward"):
    torch.library.define(_name, _SIGNATURE, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(_name, "default", dequantize_weight)
    torch.library.register_fake(_name, _dequantize_weight_fake)


def add_product(y: Tensor, left: Tensor, right: Tensor) -> None:
    """y [..., N] += left [..., r] @ right [r, N], in place; y is contiguous. Nothing is recorded for autograd."""
    rows = y.view(-1, y.shape[-1])
    torch.addmm(rows, left.reshape(-1, left.shape[-1]), right, out=rows)  # addmm_, but PyTorch knows its FLOPs


def _refuse_gradients(y: Tensor, left: Tensor, right: Tensor) -> None:
    # A kernel of the Autograd key could ask this too, but costs one more Python call each time a compiled graph runs.
    if torch.is_grad_enabled() and (y.requires_grad or left.requires_grad or right.requires_grad):
        raise ValueError(
            "lightning_qlora::add_product_ has no gradient formula, but y, left or right requires a gradient, which "
            "would be lost silently. Call it under torch.no_grad() or in an autograd.Function that computes the "
            "gradients, or use torch.addmm."
        )


def _add_product_operator(y: Tensor, left: Tensor, right: Tensor) -> None:
    _refuse_gradients(y, left, right)
    add_product(y, left, right)


# Under torch.compile this is an operator too: an addmm would be taken apart, to add where the sum is read, and both
# products kept until then.
torch.library.define(
    "lightning_qlora::add_product_",
    "(Tensor(a!) y, Tensor left, Tensor right) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("lightning_qlora::add_product_", "default", _add_product_operator)
torch.library.register_fake("lightning_qlora::add_product_", _refuse_gradients)


class Linear4bit(torch.autograd.Function):
    """x [..., K] @ dequantized(weight).T + scaling * x @ a.T @ b.T -> [..., N] in the dtype of x, a and b.

    Without a [r, K] and b [N, r] there is no second product; else it is added in place. Backward, which cannot be
    differentiated again, needs the packed tensors, and with a and b also a, b, x @ a.T [..., r] and, if a learns, x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor | None,
        b: Tensor | None,
        scaling: float,
        weight: Tensor,
        absmax: Tensor,
        code2: Tensor | None,
        absmax2: Tensor | None,
        offset: Tensor | None,
        out_features: int,
        blocksize: int,
        nested_blocksize: int,
        quant_type: str,
    ) -> Tensor:
        ctx.format = (out_features, x.shape[-1], x.dtype, blocksize, nested_blocksize, quant_type)
        ctx.scaling = scaling
        dequantize, add = dequantize_weight, add_product
        if torch.compiler.is_compiling():
            ops = torch.ops.lightning_qlora
            dequantize, add = ops.linear_4bit_weight, ops.add_product_
        y = F.linear(x, dequantize(weight, absmax, code2, absmax2, offset, *ctx.format))
        adapter: tuple[Tensor | None, ...] = ()
        if a is not None and b is not None:
            low = F.linear(x, a) * scaling
            add(y, low, b.T)
            adapter = (x if ctx.needs_input_grad[1] else None, low, a, b)
        ctx.save_for_backward(weight, absmax, code2, absmax2, offset, *adapter)
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: an activation checkpoint hands it out once
        packed, adapter = saved[:5], saved[5:]
        needs_dx, needs_da, needs_db = ctx.needs_input_grad[:3]
        dx = da = db = None
        if adapter:
            x, low, a, b = adapter
            if needs_db:
                db = grad.reshape(-1, grad.shape[-1]).T @ low.reshape(-1, low.shape[-1])
            if needs_dx or needs_da:
                dlow = (grad @ b) * ctx.scaling
            if needs_da:
                da = dlow.reshape(-1, dlow.shape[-1]).T @ x.reshape(-1, x.shape[-1])
        if needs_dx:
            dequantize, add = dequantize_weight, add_product
            if torch.compiler.is_compiling():
                ops = torch.ops.lightning_qlora
                dequantize, add = ops.linear_4bit_weight_backward, ops.add_product_
            dx = grad @ dequantize(*packed, *ctx.format)
            if adapter:
                add(dx, dlow, a.to(dx.dtype))  # autocast may be on here and have been off in forward
        return (dx, da, db, *[None] * 10)
