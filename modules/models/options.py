"""The flags that trade memory for time, and say what computes."""

from __future__ import annotations

from dataclasses import dataclass

from ..attention import AttentionName, check_attention
from .activation_offload import check_offload
from .compilation import CompileMode, check_compile_mode


@dataclass(frozen=True)
class ComputeOptions:
    """Memory and compute.

    Args:
        checkpoint_activations: Recompute each decoder layer in backward: less memory for about a third more compute.
        offload_activations: Keep the checkpointed activations in host memory; needs checkpoint_activations.
        attention: Attention implementation. auto takes the fastest one that the hardware has for these settings.
        sliding_window: Attention window in tokens, including the current token. Default: full causal attention.
        compile: Compile each decoder layer and the loss with torch.compile: half a minute at the start, then faster
            steps. max-autotune also times Triton's matrix products against the vendor's library.

    Raises:
        ValueError: For an unknown attention or compile mode, a window below 1, or activations that are to be offloaded
            but not checkpointed.
    """

    checkpoint_activations: bool = False
    offload_activations: bool = False
    attention: AttentionName = "auto"
    sliding_window: int | None = None
    compile: CompileMode = "off"

    def __post_init__(self) -> None:
        check_offload(checkpoint_activations=self.checkpoint_activations, offload_activations=self.offload_activations)
        check_attention(self.attention, self.sliding_window)
        check_compile_mode(self.compile)
