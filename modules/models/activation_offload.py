"""Activation checkpoints that wait for their backward in host memory.

``torch.autograd.graph.save_on_cpu`` moves whatever autograd saves. Of a compiled layer that would be its 4-bit weights
too, which FSDP2 frees and gathers again by itself; here it is the one tensor that is named.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def check_offload(*, checkpoint_activations: Any, offload_activations: bool) -> None:
    """Refuse to move activation checkpoints to the host where there are none.

    Raises:
        ValueError: For ``offload_activations`` without ``checkpoint_activations``.
    """
    if offload_activations and checkpoint_activations in (0, "none"):
        raise ValueError(
            "offload_activations moves activation checkpoints to the host, but checkpoint_activations is off: there "
            "are none. Set checkpoint_activations too, or leave offload_activations out."
        )


_OnHost = tuple[torch.device, Tensor]


def offload_to_host(tensor: Tensor) -> saved_tensors_hooks:
    """A context in which autograd saves ``tensor`` in host memory, pinned for a GPU, and all else where it is.

    Both copies are queued on the stream that computes, so the host waits for neither and the GPU's memory is free for
    what is queued next. torch's caching allocator gives the same pinned memory to the next step.

    Args:
        tensor: Of any shape and dtype. It must not be written to, and no one else may hold it, or its memory stays.
    """
    # Not its identity: FSDP2 and torch.compile hand aliases on. And the hooks must not hold it.
    address, shape = tensor.data_ptr(), tensor.shape

    def pack(saved: Tensor) -> Tensor | _OnHost:
        if saved.data_ptr() != address or saved.shape != shape:
            return saved
        host = torch.empty_like(saved, device="cpu", pin_memory=saved.is_cuda)
        return saved.device, host.copy_(saved, non_blocking=True)

    def unpack(packed: Tensor | _OnHost) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, host = packed
        return host.to(device, non_blocking=True)

    return saved_tensors_hooks(pack, unpack)
