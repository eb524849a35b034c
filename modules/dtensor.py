"""What one rank holds of a parameter that may be sharded (a DTensor): its shard, its rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def local_tensor(tensor: Tensor) -> Tensor:
    """What this rank holds of ``tensor``: its shard if it is a DTensor, else all of it (no copy)."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_rows(parameter: Tensor) -> tuple[int, int]:
    """First and one-past-last row (of dim 0) of ``parameter`` that this rank holds; all rows when it is not sharded.

    FSDP2 splits dim 0 as ``torch.chunk`` does: ceil(rows / ranks) each, the last ranks may hold fewer or none.
    """
    if not isinstance(parameter, DTensor):
        return 0, parameter.shape[0]
    mesh = parameter.device_mesh
    # On a 2-D mesh (hybrid sharding, or Lightning's data x tensor mesh) the last dimension that shards counts.
    sharding = [i for i, placement in enumerate(parameter.placements) if placement.is_shard()]
    if not sharding:
        return 0, parameter.shape[0]
    rows_a_rank = -(-parameter.shape[0] // mesh.size(sharding[-1]))
    start = min(mesh.get_local_rank(sharding[-1]) * rows_a_rank, parameter.shape[0])
    return start, start + parameter.to_local().shape[0]


@torch.no_grad()
def copy_local_rows(parameter: Tensor, full: Tensor) -> None:
    """Copy this rank's rows of ``full`` (shape of the unsharded parameter) into ``parameter``, dtype converted."""
    start, stop = local_rows(parameter)
    local = local_tensor(parameter)
    local.copy_(full[start:stop])
