"""A decoder layer that recomputes itself in backward, inside its own ``forward``.

Shapes: B samples, S tokens per sample, H hidden size.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from .activation_offload import offload_to_host


class CheckpointedLayer(nn.Module):
    """Mixin for transformers' decoder layers: activation checkpointing inside ``forward``.

    Hooks (FSDP2's gather the weights) then run outside the checkpoint, and torch.compile sees the recomputation: it
    leaves out what no gradient needs, such as the product with ``down_proj``. transformers' own checkpointing wraps
    ``__call__`` in some versions and ``forward`` in others.
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
        if not self._is_recomputed(kwargs):
            return forward(hidden_states, *args)  # type: ignore[no-any-return]
        options: dict[str, Any] = {}
        if _COMPILED_CHECKPOINTS_NEED_A_POLICY and torch.compiler.is_compiling():
            options["context_fn"] = _recompute_everything
        return torch.utils.checkpoint.checkpoint(  # type: ignore[no-any-return]
            forward, hidden_states, *args, use_reentrant=False, **options
        )

    def _is_recomputed(self, kwargs: dict[str, Any]) -> bool:
        learns = self.training and torch.is_grad_enabled()
        return self.checkpoint_activations and learns and kwargs.get("past_key_values") is None


#: Before 2.13, torch.compile recomputes what lies inside an autograd.Function only if a policy says so.
_COMPILED_CHECKPOINTS_NEED_A_POLICY = torch.__version__ < "2.13"


def _recompute_everything() -> Any:
    return torch.utils.checkpoint.create_selective_checkpoint_contexts(  # type: ignore[no-untyped-call]
        lambda context, operator, *args, **kwargs: torch.utils.checkpoint.CheckpointPolicy.PREFER_RECOMPUTE
    )
