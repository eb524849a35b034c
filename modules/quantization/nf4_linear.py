"""A frozen 4-bit linear layer whose packed bytes FSDP2 can shard, offload and gather as they are.

FSDP2 shards parameters, and before torch 2.13 only floating-point ones (``fully_shard`` builds an ``nn.Parameter`` that
would require a gradient). So the packed nibbles and the quantized absmax are parameters that *view* their bytes as
float32, and nothing may convert that view:

- float32 rather than float16: when all parameters of an FSDP group share one dtype, FSDP copies them with
  ``torch._foreach_copy_``, which on a GPU takes float16 and bfloat16 through float32 registers and so quiets bit
  patterns that happen to be signalling NaNs. float32 is copied as it is. peft, too, creates LoRA weights in the dtype
  of the base weight, and float32 is what they should have.
- A mixed-precision policy with a 16-bit ``param_dtype`` would convert the bytes:
  :meth:`NF4Linear.check_mixed_precision_policy` refuses it before sharding, and ``forward`` refuses a converted weight
  in any case.
- ``module.to(dtype)`` leaves these tensors alone.

Shapes: N out_features, K in_features, B number of blocks = ceil(N * K / blocksize).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from ...kernels.nf4 import Quantized4bit, dequantize_4bit
from ..dtensor import copy_local_rows
from ._linear_4bit import Linear4bit

#: How packed bytes are stored: see the module's docstring.
STORAGE_DTYPE = torch.float32

_BYTES = STORAGE_DTYPE.itemsize


def can_be_4bit(linear: nn.Linear) -> bool:
    """Whether a row of its weight fills whole storage elements when it is packed."""
    return linear.in_features % (2 * _BYTES) == 0


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
        """Build the layer around weights that are quantized already.

        Raises:
            ValueError: If the weight is not a matrix.
        """
        if len(quantized.shape) != 2:
            raise ValueError(
                f"A linear layer needs a weight of shape [out_features, in_features], got {tuple(quantized.shape)}. "
                "Dequantize a weight of another shape with dequantize_4bit."
            )
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
        theirs = (tuple(quantized.shape), quantized.code2 is not None, quantized.blocksize, quantized.nested_blocksize,
                  quantized.quant_type)  # fmt: skip
        if mine != theirs:
            raise ValueError(
                "The quantized weight does not fit the layer: (shape, nested, blocksize, nested blocksize, type) is "
                f"{theirs} in the weight and {mine} in the layer."
            )
        packed = quantized.packed.reshape(-1).view(torch.uint8)[: self.out_features * self.in_features // 2]
        copy_local_rows(self.weight, packed.view(STORAGE_DTYPE).view(self.out_features, -1))
        absmax = quantized.absmax
        if self.nested:
            absmax = as_storage(absmax)
            for name in ("code2", "absmax2", "offset"):
                buffer = self.get_buffer(name)
                buffer.copy_(getattr(quantized, name).view(buffer.shape))
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
        return dequantize_4bit(self.quantized(), dtype=dtype)

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
        y: Tensor = Linear4bit.apply(  # type: ignore[no-untyped-call]
            x, a, b, scaling, self.weight, self.absmax, self.code2, self.absmax2, self.offset, self.out_features,
            self.blocksize, self.nested_blocksize, self.quant_type,
        )  # fmt: skip
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def check_mixed_precision_policy(self, policy: MixedPrecisionPolicy, name: str = "") -> None:
        """Refuse an FSDP2 policy that would convert packed bytes as if they were numbers.

        Args:
            policy: The policy that the layer is to be sharded with.
            name: The layer's name in its model, for the error message.

        Raises:
            ValueError: If ``policy.param_dtype`` is not ``None`` or the dtype that the bytes are stored as.
        """
        if policy.param_dtype not in (None, STORAGE_DTYPE):
            layer = repr(name) if name else f"a layer of {self.in_features} to {self.out_features} features"
            raise ValueError(
                f"MixedPrecisionPolicy(param_dtype={policy.param_dtype}) would convert the packed 4-bit bytes of "
                f"{layer} when gathering them. Use param_dtype=None: the compute dtype comes from autocast (Trainer "
                "precision), and only 4-bit bytes travel either way."
            )

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
