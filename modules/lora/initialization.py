"""LoRA's initial values: peft's default, in float32, equal for any number of ranks."""

from __future__ import annotations

import math

import torch
import torch.utils.checkpoint
from torch import nn

from ..dtensor import copy_local_rows, local_tensor


@torch.no_grad()
def init_lora(model: nn.Module, seed: int) -> None:
    """peft's default initialisation (A uniform as ``nn.Linear``'s, B zero), in float32 and equal for any number of
    ranks.

    Each full A is drawn on the CPU from a generator seeded by ``seed`` and its position; a rank keeps its rows.
    """
    for position, (name, parameter) in enumerate(sorted(model.named_parameters())):
        if ".lora_A." in name:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + position)
            bound = 1 / math.sqrt(parameter.shape[1])  # kaiming_uniform_(a=sqrt(5)) of [r, in]
            full = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
            full.uniform_(-bound, bound, generator=generator)
            copy_local_rows(parameter, full.to(parameter.dtype))
        elif ".lora_B." in name:
            local_tensor(parameter).zero_()
