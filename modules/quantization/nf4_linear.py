"""A frozen 4-bit linear layer whose packed bytes FSDP2 can shard, offload and gather as they are.

FSDP2 shards parameters, and before torch 2.13 only floating-point ones (``fully_shard`` builds an ``nn.Parameter`` that
would require a gradient). So the packed nibbles and the quantized absmax are parameters that *view* their bytes as
float32, and nothing may convert that view:

- float32 rather than float16: when all parameters of an FSDP group share one dtype, FSDP copies them with
  ``torch._foreach_copy_``, which on a GPU takes float16 and bfloat16 through float32 registers and so quiets bit
  patterns that happen to be signalling NaNs. float32 is copied as it is. peft, too, creates LoRA weights in the dtype
  of the base weight, and float32 is what they should have.
- A mixed-precision policy with a 16-bit ``param_dtype`` would convert the bytes: :func:`check_mixed_precision_policy`
  refuses it before sharding, and ``forward`` refuses a converted weight in any case.
- ``module.to(dtype)`` leaves these tensors alone.

Shapes: N out_features, K in_features, B number of blocks = ceil(N * K / blocksize).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import bitsandbytes.functional as bnb
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import MixedPrecisionPolicy

from ...kernels.nf4 import dequantize_4bit
from ..dtensor import copy_local_rows

#: How packed bytes are stored: see the module's docstring.
STORAGE_DTYPE = torch.float32

_BYTES = STORAGE_DTYPE.itemsize


@dataclass(frozen=True)
class Quantized4bit:
    """One weight in bitsandbytes' 4-bit format.

    Attributes:
        packed: uint8 [ceil(N * K / 2)], two values a byte, the first in the high nibble.
        absmax: uint8 [B] when the statistics are quantized too ("double quantization"), else float32 [B].
        code2: float32 [256], the code of the quantized absmax; ``None`` without double quantization, like the next two.
        absmax2: float32 [ceil(B / nested_blocksize)].
        offset: float32 0-dim, the mean that was subtracted from absmax.
        shape: (N, K).
    """

    packed: Tensor
    absmax: Tensor
    code2: Tensor | None
    absmax2: Tensor | None
    offset: Tensor | None
    shape: tuple[int, int]
    blocksize: int = 64
    nested_blocksize: int = 256
    quant_type: str = "nf4"

    @classmethod
    def quantize(
        cls, weight: Tensor, *, nested: bool = True, blocksize: int = 64, quant_type: str = "nf4"
    ) -> Quantized4bit:
        """Quantize ``weight`` [N, K] (float16, bfloat16 or float32) with bitsandbytes, on the weight's device."""
        packed, state = bnb.quantize_4bit(
            weight.contiguous(), blocksize=blocksize, compress_statistics=nested, quant_type=quant_type
        )
        return cls.from_quant_state(packed, state)

    @classmethod
    def from_quant_state(cls, packed: Tensor, state: bnb.QuantState) -> Quantized4bit:
        """Take over a bitsandbytes ``Params4bit.data`` and its ``quant_state`` without copying."""
        nested = state.state2
        return cls(
            packed=packed.reshape(-1).view(torch.uint8),
            absmax=state.absmax,
            code2=nested.code.float() if nested is not None else None,
            absmax2=nested.absmax.float() if nested is not None else None,
            offset=state.offset.float().reshape(()) if nested is not None else None,
            shape=(int(state.shape[0]), int(state.shape[1])),
            blocksize=int(state.blocksize),
            nested_blocksize=int(nested.blocksize) if nested is not None else 256,
            quant_type=state.quant_type,
        )


def _dequantize(
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
    if code2 is not None:
        blocks = -(-out_features * in_features // blocksize)
        absmax = absmax.view(torch.uint8)[:blocks]  # the storage is padded to whole float32 elements
    return dequantize_4bit(
        weight, absmax, code2, absmax2, offset, shape=(out_features, in_features), dtype=dtype, blocksize=blocksize,
        nested_blocksize=nested_blocksize, quant_type=quant_type,
    )  # fmt: skip


def _dequantize_fake(
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
    torch.library.impl(_name, "default", _dequantize)
    torch.library.register_fake(_name, _dequantize_fake)


def _add_product(y: Tensor, left: Tensor, right: Tensor) -> None:
    """y [..., N] += left [..., r] @ right [r, N], in place; y is contiguous."""
    rows = y.view(-1, y.shape[-1])
    torch.addmm(rows, left.reshape(-1, left.shape[-1]), right, out=rows)  # addmm_, but PyTorch knows its FLOPs


# Under torch.compile this is an operator too: an addmm would be taken apart, to add where the sum is read, and both
# products kept until then.
torch.library.define(
    "lightning_qlora::add_product_",
    "(Tensor(a!) y, Tensor left, Tensor right) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)

torch.library.impl("lightning_qlora::add_product_", "default", _add_product)

torch.library.register_fake("lightning_qlora::add_product_", lambda y, left, right: None)


class _Linear4bit(torch.autograd.Function):
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
        dequantize, add_product = _dequantize, _add_product
        if torch.compiler.is_compiling():
            ops = torch.ops.lightning_qlora
            dequantize, add_product = ops.linear_4bit_weight, ops.add_product_
        y = F.linear(x, dequantize(weight, absmax, code2, absmax2, offset, *ctx.format))
        adapter: tuple[Tensor | None, ...] = ()
        if a is not None and b is not None:
            low = F.linear(x, a) * scaling
            add_product(y, low, b.T)
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
            dequantize, add_product = _dequantize, _add_product
            if torch.compiler.is_compiling():
                ops = torch.ops.lightning_qlora
                dequantize, add_product = ops.linear_4bit_weight_backward, ops.add_product_
            dx = grad @ dequantize(*packed, *ctx.format)
            if adapter:
                add_product(dx, dlow, a.to(dx.dtype))  # autocast may be on here and have been off in forward
        return (dx, da, db, *[None] * 10)


class NF4Linear(nn.Linear):
    """``y = x @ W.T + bias`` with W frozen in bitsandbytes' 4-bit format (NF4, or FP4 by ``quant_type``).

    An ``nn.Linear`` to peft, which wraps it with its stock LoRA layer. The product is computed in the dtype of ``x``,
    or in autocast's dtype where that is on. Forward and backward dequantize; autograd keeps packed tensors only.

    Parameters and buffers:
        weight: float32 [N, K / 8], the packed nibbles' bytes (0.5 byte a value).
        absmax: with double quantization float32 [ceil(B / 4)], the bytes of the quantized absmax; else float32 [B].
            Its sharding is independent of the weight's rows, so blocks may cross rows.
        code2, absmax2, offset: float32 [256], [ceil(B / nested_blocksize)] and 0-dim buffers (double quantization
            only), small and replicated.
        bias: [N] or ``None``.

    Raises:
        ValueError: If ``in_features`` is not a multiple of 8.
    """

    code2: Tensor | None
    absmax2: Tensor | None
    offset: Tensor | None
    absmax: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        nested: bool = True,
        blocksize: int = 64,
        nested_blocksize: int = 256,
        quant_type: str = "nf4",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own __init__ would allocate the dense weight
        if in_features % (2 * _BYTES):
            raise ValueError(
                f"in_features={in_features} is not a multiple of {2 * _BYTES}, so a row of 4-bit values does not "
                f"fill {STORAGE_DTYPE} elements. Leave this layer unquantized."
            )
        self.in_features, self.out_features = in_features, out_features
        self.nested, self.blocksize, self.nested_blocksize = nested, blocksize, nested_blocksize
        self.quant_type = quant_type
        blocks = self.num_blocks
        self.weight = _frozen(out_features, in_features // (2 * _BYTES), dtype=STORAGE_DTYPE, device=device)
        if nested:
            self.absmax = _frozen(-(-blocks // _BYTES), dtype=STORAGE_DTYPE, device=device)
            # float32 by name: Lightning's "true" precisions build modules under another default dtype.
            for name, size in (("code2", (256,)), ("absmax2", (-(-blocks // nested_blocksize),)), ("offset", ())):
                self.register_buffer(name, torch.empty(size, dtype=torch.float32, device=device))
        else:
            self.absmax = _frozen(blocks, dtype=torch.float32, device=device)
            self.code2 = self.absmax2 = self.offset = None
        self.register_parameter("bias", _frozen(out_features, dtype=dtype, device=device) if bias else None)

    @property
    def num_blocks(self) -> int:
        """B, the number of quantization blocks."""
        return -(-self.out_features * self.in_features // self.blocksize)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **quantization: Any) -> NF4Linear:
        """Quantize ``linear`` on its own device; keywords as for :class:`NF4Linear`."""
        quantized = Quantized4bit.quantize(linear.weight.data, **quantization)
        return cls.from_quantized(quantized, bias=linear.bias)

    @classmethod
    def from_quantized(cls, quantized: Quantized4bit, bias: Tensor | None = None) -> NF4Linear:
        """Build the layer around weights that are quantized already."""
        n, k = quantized.shape
        layer = cls(
            k, n, bias is not None, nested=quantized.code2 is not None, blocksize=quantized.blocksize,
            nested_blocksize=quantized.nested_blocksize, quant_type=quantized.quant_type,
            device=quantized.packed.device, dtype=None if bias is None else bias.dtype,
        )  # fmt: skip
        layer.load_quantized(quantized)
        if layer.bias is not None and bias is not None:
            layer.bias.data.copy_(bias.detach())
        return layer

    @torch.no_grad()
    def load_quantized(self, quantized: Quantized4bit) -> None:
        """Copy quantized weights into this layer; a rank of a sharded layer keeps its own rows.

        Raises:
            ValueError: If shape, block sizes or quantization type differ from the layer's.
        """
        mine = (
            (self.out_features, self.in_features),
            self.nested,
            self.blocksize,
            self.nested_blocksize,
            self.quant_type,
        )
        theirs = (quantized.shape, quantized.code2 is not None, quantized.blocksize, quantized.nested_blocksize,
                  quantized.quant_type)  # fmt: skip
        if mine != theirs:
            raise ValueError(
                "The quantized weight does not fit the layer: (shape, nested, blocksize, nested blocksize, type) is "
                f"{theirs} in the weight and {mine} in the layer."
            )
        copy_local_rows(self.weight, quantized.packed.view(STORAGE_DTYPE).view(self.out_features, -1))
        absmax = quantized.absmax
        if self.nested:
            absmax = as_storage(absmax)
            for name in ("code2", "absmax2", "offset"):
                self.get_buffer(name).copy_(getattr(quantized, name))
        copy_local_rows(self.absmax, absmax)

    def quantized(self) -> Quantized4bit:
        """The weight as bitsandbytes tensors (views). The layer must not be sharded, or be gathered at the moment."""
        absmax = self.absmax.data.view(torch.uint8)[: self.num_blocks] if self.nested else self.absmax.data
        return Quantized4bit(
            self.weight.data.view(torch.uint8).reshape(-1), absmax, self.code2, self.absmax2, self.offset,
            (self.out_features, self.in_features), self.blocksize, self.nested_blocksize, self.quant_type,
        )  # fmt: skip

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight [N, K] in ``dtype``; the layer must not be sharded, or be gathered at the moment."""
        return _dequantize(
            self.weight, self.absmax, self.code2, self.absmax2, self.offset, self.out_features, self.in_features, dtype,
            self.blocksize, self.nested_blocksize, self.quant_type,
        )  # fmt: skip

    def forward(self, x: Tensor, lora: tuple[Tensor, Tensor, float] | None = None) -> Tensor:
        """x [..., K] -> [..., N] in the dtype of x (under autocast: autocast's dtype).

        Args:
            x: The input, float16, bfloat16 or float32.
            lora: A [r, K], B [N, r] and a scale: ``scale * x @ A.T @ B.T`` is added in place, so that it needs no
                tensor of the output's size in forward, and none of the input's in backward. A and B may have any
                floating dtype; they are converted to the result's, and get gradients.

        Raises:
            ValueError: If A and B do not fit the layer, or the weight's bytes were converted as numbers.
        """
        if self.weight.dtype != STORAGE_DTYPE:
            raise ValueError(
                f"The packed 4-bit weight arrived as {self.weight.dtype}: its bytes were converted as if they were "
                "numbers, probably by fully_shard(..., mp_policy=MixedPrecisionPolicy(param_dtype=...)). Use "
                "param_dtype=None."
            )
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        a = b = None
        scaling = 1.0
        if lora is not None:
            a, b, scaling = lora[0].to(x.dtype), lora[1].to(x.dtype), lora[2]
            # Asked here, for a product that is added in place would make the sum as large as itself.
            if a.shape[1] != self.in_features or b.shape != (self.out_features, a.shape[0]):
                raise ValueError(
                    f"A {tuple(a.shape)} and B {tuple(b.shape)} of lora do not fit a layer of {self.in_features} to "
                    f"{self.out_features} features: they must be [r, {self.in_features}] and [{self.out_features}, r]. "
                    "A shard of either must be gathered first."
                )
        y: Tensor = _Linear4bit.apply(  # type: ignore[no-untyped-call]
            x, a, b, scaling, self.weight, self.absmax, self.code2, self.absmax2, self.offset, self.out_features,
            self.blocksize, self.nested_blocksize, self.quant_type,
        )  # fmt: skip
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NF4Linear:
        # `.to(dtype)`, `.half()` and Lightning's "true" precisions come through here. They may move the quantized
        # tensors but not convert them: float32 is only how their bytes are stored.
        quantized = [self.weight, self.absmax, self.code2, self.absmax2, self.offset]
        super()._apply(keep_dtype(fn, quantized), recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        """As ``nn.Linear``, with the quantization."""
        nested = f"+{self.nested_blocksize}" if self.nested else ""
        return f"{super().extra_repr()}, {self.quant_type}, blocksize={self.blocksize}{nested}"


def keep_dtype(fn: Callable[[Tensor], Tensor], tensors: Iterable[Tensor | None]) -> Callable[[Tensor], Tensor]:
    """For ``nn.Module._apply``: ``fn``, but moving ``tensors`` between devices without converting their dtype."""
    kept = {id(tensor) for tensor in tensors if tensor is not None}

    def apply(tensor: Tensor) -> Tensor:
        applied = fn(tensor)
        return tensor.to(applied.device) if id(tensor) in kept and applied.dtype != tensor.dtype else applied

    return apply


def _frozen(*size: int, dtype: torch.dtype | None, device: torch.device | str | None) -> nn.Parameter:
    return nn.Parameter(torch.empty(*size, dtype=dtype, device=device), requires_grad=False)


def as_storage(packed: Tensor) -> Tensor:
    """View uint8 ``packed`` [n] as ``STORAGE_DTYPE`` [ceil(n / 4)], padded with zero bytes to whole elements."""
    return F.pad(packed, (0, -packed.numel() % _BYTES)).view(STORAGE_DTYPE)


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
        if child.in_features % (2 * _BYTES):
            raise ValueError(
                f"{name} has {child.in_features} input features, not a multiple of {2 * _BYTES} as 4-bit rows need. "
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


def check_mixed_precision_policy(module: nn.Module, policy: MixedPrecisionPolicy) -> None:
    """Refuse an FSDP2 policy that would convert packed bytes as if they were numbers.

    Raises:
        ValueError: If ``policy.param_dtype`` is a 16-bit type and ``module`` holds an :class:`NF4Linear`.
    """
    if policy.param_dtype in (None, STORAGE_DTYPE):
        return
    for name, child in module.named_modules():
        if isinstance(child, NF4Linear):
            raise ValueError(
                f"MixedPrecisionPolicy(param_dtype={policy.param_dtype}) would convert the packed 4-bit bytes of "
                f"{name!r} when gathering them. Use param_dtype=None: the compute dtype comes from autocast (Trainer "
                "precision), and only 4-bit bytes travel either way."
            )
