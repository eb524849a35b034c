"""Strategies for Lightning's Trainer (FSDP2, DDP, one device), with checkpoints of what is trained."""

from typing import TYPE_CHECKING

from ..lazy import import_on_first_use

if TYPE_CHECKING:
    from .fsdp2 import FSDP2Strategy
    from .strategies import OneDeviceStrategy, ReplicatedStrategy, StrategyName, build_strategy
    from .trained_checkpoints import read_checkpoint
else:
    __getattr__, __dir__ = import_on_first_use(__name__)

__all__ = [
    "FSDP2Strategy",
    "OneDeviceStrategy",
    "ReplicatedStrategy",
    "StrategyName",
    "build_strategy",
    "read_checkpoint",
]
