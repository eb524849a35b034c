"""Choosing what the flags leave to the memory: the strategy, and how many layers are recomputed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from peft import LoraConfig
from transformers import PretrainedConfig

from ..distributed.strategies import StrategyName, StrategyOptions
from ..hardware import Capabilities
from ..models.causal_lm import LanguageModelHead
from ..models.decoder import Head
from ..models.options import ComputeOptions
from .memory_plan import GIB, MemoryPlan, Settings, plan_memory


@dataclass(frozen=True)
class RunPlan:
    """What a run does with the memory of its devices.

    Attributes:
        strategy: The options of the run, with a strategy in place of ``"auto"``.
        compute: The options of the run, with a number of layers to recompute in place of ``"auto"``.
        memory: What that takes.
        choices: What was chosen, a sentence each; none on a CPU.
    """

    strategy: StrategyOptions
    compute: ComputeOptions
    memory: MemoryPlan
    choices: tuple[str, ...]

    @property
    def metadata(self) -> dict[str, Any]:
        """For a report, which tells the choices beside the flags."""
        return {"chosen": " ".join(self.choices)} if self.choices else {}

    def announce(self, *, dry_run: bool = False) -> int | None:
        """Print on the first rank what was chosen, and the whole plan if it does not fit or is all that is wanted.

        Returns:
            The exit status of a dry run: 1 if the plan does not fit. ``None`` to go on.
        """
        too_much = self.memory.check()
        rank_zero_only(self._print)(too_much, dry_run)
        return int(too_much is not None) if dry_run else None

    def _print(self, too_much: str | None, dry_run: bool) -> None:
        if dry_run or too_much:
            print(self.memory.table(), too_much or "", sep="\n", flush=True)
        if self.choices and not dry_run:
            print(*self.choices, sep="\n", flush=True)


def plan_run(
    config: PretrainedConfig, lora: LoraConfig, strategy: StrategyOptions, compute: ComputeOptions, *,
    batch_size: int, seq_len: int, accumulate: int = 1, device: Capabilities | None = None,
    head: Head = LanguageModelHead(),  # noqa: B008  frozen
    image_patches: int = 0,
) -> RunPlan:  # fmt: skip
    """Choose what the flags leave open: the strategy, and how many layers are recomputed.

    ``strategy="auto"`` is one device where there is one, FSDP2 on CPUs or if one of its options is set, and else DDP if
    its copy of the base fits and it recomputes no more than half of the layers that FSDP2 keeps. Recomputing all layers
    takes a third more time, and two GPUs were 10 to 20 % faster with DDP (8B, H200).

    Args:
        config: As of :class:`Settings`, like ``lora``, ``batch_size``, ``seq_len``, ``accumulate``, ``head`` and
            ``image_patches``.
        strategy: Its precision is not ``"auto"``: see :meth:`StrategyOptions.check`.
        compute: Activation checkpointing, memory limit and compilation.
        device: That of each rank; ``None`` for a CPU.

    Raises:
        ValueError: As :class:`Settings`.
    """

    def plan(name: StrategyName) -> MemoryPlan:
        options = dataclasses.replace(strategy, strategy=name)
        return plan_memory(
            Settings.of(
                config, lora, options, compute, batch_size=batch_size, seq_len=seq_len, accumulate=accumulate,
                device=device, head=head, image_patches=image_patches,
            )
        )  # fmt: skip

    on_gpu, choices = device is not None and device.device_type == "cuda", []
    name = strategy.strategy
    if name != "auto":
        memory = plan(name)
    elif strategy.world_size == 1 and not strategy.sharding_options:
        name, memory = "single", plan("single")
    elif strategy.sharding_options or not on_gpu:
        name, memory = "fsdp2", plan("fsdp2")
    else:
        ddp, fsdp2 = plan("ddp"), plan("fsdp2")
        more = ddp.settings.recomputed - fsdp2.settings.recomputed
        is_ddp = ddp.check() is None and more <= len(ddp.settings.model.layers) / 2
        name, memory = ("ddp", ddp) if is_ddp else ("fsdp2", fsdp2)
        needed = f"DDP needs {ddp.device_bytes / GIB:.2f} GiB of each device and FSDP2 {fsdp2.device_bytes / GIB:.2f}"
        recomputing = f"recomputing {ddp.settings.recomputed} and {fsdp2.settings.recomputed} layers"
        choices.append(f"Strategy: {name}. {needed}, {recomputing}.")
    if on_gpu:
        choices.append(memory.checkpointing)
    return RunPlan(
        dataclasses.replace(strategy, strategy=name),
        dataclasses.replace(compute, checkpoint_activations=memory.settings.recomputed),
        memory,
        tuple(choices),
    )
