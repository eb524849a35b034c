"""Loss scaling where the loss is on a GPU and the gradients are offloaded to the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override


class HostGradScaler(torch.amp.GradScaler):
    """A GradScaler that keeps its numbers on the CPU, where gradients are.

    torch's keeps them with the loss, and for gradients on the CPU it copies factor and overflow flag there without
    waiting (``non_blocking=True``), into pinned memory: the CPU may read them before they have arrived, scale gradients
    by whatever was there, or skip a step. Seen on two H200s (torch 2.11) with other work on the machine: losses 1 to
    11 % off after the first step, and no error.

    Args:
        options: As of ``torch.amp.GradScaler``, but for the device.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__("cpu", **options)

    @classmethod
    def like(cls, scaler: torch.amp.GradScaler) -> HostGradScaler:
        """One in the state of ``scaler``."""
        new = cls(enabled=scaler.is_enabled())
        new.load_state_dict(scaler.state_dict())
        return new

    @override
    def scale(self, outputs: Tensor) -> Tensor:  # type: ignore[override]
        """``outputs``, a tensor of any shape on any device, times the scale."""
        return outputs * super().scale(torch.ones(())).to(outputs.device)
