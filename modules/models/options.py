"""The flags that trade memory for time, and choose what computes."""

from __future__ import annotations

from dataclasses import dataclass

from ..attention import AttentionName, check_attention
from .activation_offload import check_offload
from .compilation import CompileMode, check_compile_mode
from .decoder_layer import CheckpointChoice, recomputed_layers


@dataclass(frozen=True)
class ComputeOptions:
    """Memory and compute.

    Args:
        checkpoint_activations: How many decoder layers are recomputed in backward, which saves most of their memory
            and takes about a third more time: all, none, a number, or auto: on a GPU as few as its memory demands, on
            a CPU none.
        offload_activations: Keep the inputs of recomputed layers in host memory.
        attention: Attention implementation. auto takes the fastest one that the hardware has for these settings.
        sliding_window: Attention window in tokens, including the current token. Default: full causal attention.
        memory_limit_gib: GiB that each process may use on its GPU. Default: all of it.
        compile: Compile each decoder layer and the loss with torch.compile: half a minute at the start, then faster
            steps. max-autotune also times Triton's matrix products against the vendor's library.

    Raises:
        ValueError: For an unknown attention or compile mode, a window or a number of layers that cannot be, or
            activations that are to be offloaded but not checkpointed.
    """

    checkpoint_activations: CheckpointChoice = "auto"
    offload_activations: bool = False
    attention: AttentionName = "auto"
    sliding_window: int | None = None
    memory_limit_gib: float | None = None
    compile: CompileMode = "off"

    def __post_init__(self) -> None:
        recomputed_layers(self.checkpoint_activations)
        check_offload(checkpoint_activations=self.checkpoint_activations, offload_activations=self.offload_activations)
        check_attention(self.attention, self.sliding_window)
        check_compile_mode(self.compile)
        if self.memory_limit_gib is not None and not self.memory_limit_gib > 0:
            raise ValueError(f"--memory_limit_gib must be above 0, got {self.memory_limit_gib}.")
