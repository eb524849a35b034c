"""A decoder layer that decides inside its own ``forward`` what is recomputed in backward: everything, or what is cheap.

Shapes: B samples, S tokens per sample, H hidden size.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Literal

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy

from .activation_offload import offload_to_host

#: Which decoder layers are recomputed in backward: as few as the memory demands (``"auto"``), all (``True``), none
#: (``False``), or the first so many.
CheckpointChoice = Literal["auto", "all", "none"] | bool | int


def recomputed_layers(choice: CheckpointChoice, num_layers: int | None = None) -> int | Literal["auto"]:
    """How many of ``num_layers`` layers ``choice`` says; ``"auto"`` stays. Without ``num_layers`` it is only checked.

    Raises:
        ValueError: For another word, a number below 0, or more layers than there are.
    """
    if choice == "auto":
        return "auto"
    if isinstance(choice, bool) or choice in ("all", "none"):
        return (num_layers or 1) if choice in (True, "all") else 0
    if not isinstance(choice, int) or choice < 0 or (num_layers is not None and choice > num_layers):
        most = "" if num_layers is None else f" up to {num_layers}, the model's number of layers"
        raise ValueError(f"checkpoint_activations must be auto, all, none or a number of layers{most}, got {choice!r}.")
    return choice


class CheckpointedLayer(nn.Module):
    """Mixin for transformers' decoder layers: activation checkpointing inside ``forward``.

    Hooks (FSDP2's gather the weights) then run outside the checkpoint, and torch.compile sees the recomputation: it
    leaves out what no gradient needs, such as the product with ``down_proj``. transformers' own checkpointing wraps
    ``__call__`` in some versions and ``forward`` in others.

    A compiled layer that is not checkpointed keeps the results of matrix products and of attention. Results of
    elementwise operations (norms, rotary embedding, the MLP's gated product) are computed again in backward, inside
    kernels that read the same tensors anyway: a third less memory (Llama: 95 instead of 143 KB per token and layer of
    8B) for a few percent of the layer's time.

    Attributes:
        checkpoint_activations: Keep only the layer's input, and recompute the layer in backward.
        offload_activations: Keep that input in host memory.
    """

    checkpoint_activations = False
    offload_activations = False

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As ``forward``, around what is compiled: hidden_states wait for backward on the host if so configured."""
        offloads = self.offload_activations and self._is_recomputed(kwargs)
        with offload_to_host(hidden_states) if offloads else contextlib.nullcontext():
            return super().__call__(hidden_states, *args, **kwargs)  # type: ignore[no-any-return]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the layer's own forward: hidden_states [B, S, H] -> [B, S, H]."""
        forward = functools.partial(super().forward, **kwargs)
        compiling = torch.compiler.is_compiling()
        if self._is_recomputed(kwargs):
            policy = _recompute if compiling and _COMPILED_CHECKPOINTS_NEED_A_POLICY else None
        elif compiling and self._learns(kwargs):
            policy = _recompute_elementwise
        else:
            return forward(hidden_states, *args)  # type: ignore[no-any-return]
        options: dict[str, Any] = {}
        if policy is not None:
            options["context_fn"] = functools.partial(
                torch.utils.checkpoint.create_selective_checkpoint_contexts, policy
            )
        return torch.utils.checkpoint.checkpoint(  # type: ignore[no-any-return]
            forward, hidden_states, *args, use_reentrant=False, **options
        )

    def _learns(self, kwargs: dict[str, Any]) -> bool:
        return self.training and torch.is_grad_enabled() and kwargs.get("past_key_values") is None

    def _is_recomputed(self, kwargs: dict[str, Any]) -> bool:
        return (
            self._learns(kwargs) and self.checkpoint_activations
        )  # in this order: else both were graphs in validation


#: Before 2.13, torch.compile recomputes what lies inside an autograd.Function only if a policy says so.
_COMPILED_CHECKPOINTS_NEED_A_POLICY = torch.__version__ < "2.13"


def _recompute(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


#: Cheap operations that are not tagged as pointwise.
_CHEAP = {torch.ops.aten._to_copy.default, torch.ops.aten.mean.dim, torch.ops.aten.cat.default}


def _recompute_elementwise(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Sums are left to the compiler: of a product and an adapter's it should keep the sum, not both."""
    pointwise = torch.Tag.pointwise in getattr(operator, "tags", ()) and operator is not torch.ops.aten.add.Tensor
    return CheckpointPolicy.PREFER_RECOMPUTE if pointwise or operator in _CHEAP else CheckpointPolicy.PREFER_SAVE
