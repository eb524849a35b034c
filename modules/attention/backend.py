"""What an attention backend is, and what is asked of one.

Shapes: B rows, S tokens per row, N heads of queries, K of keys and values (K divides N), D head dimension.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

#: First compute capability with FlashAttention 2, and with tensor cores in Triton.
FLASH_CAPABILITY = (8, 0)


@dataclasses.dataclass(frozen=True)
class AttentionRequest:
    """What a model and its batches need of attention, and where it runs.

    Attributes:
        packed: Whether rows hold several documents.
        windows: The distinct attention windows of the model's layers, in tokens, including the current one; ``None``
            stands for full causal attention.
        softcap: Whether scores are capped before the softmax: ``cap * tanh(score / cap)``.
        compute_capability: Of the CUDA device, or ``None`` for the CPU.
        dtype: Of queries, keys and values.
        dropout: Probability, of the attention weights.

    Raises:
        ValueError: For a window below 1, or no window at all.
    """

    packed: bool = False
    windows: tuple[int | None, ...] = (None,)
    softcap: bool = False
    compute_capability: tuple[int, int] | None = None
    dtype: torch.dtype = torch.float32
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not self.windows:
            raise ValueError("windows must not be empty: write (None,) for full causal attention.")
        for window in self.windows:
            check_window(window)

    @property
    def masked(self) -> str:
        """What needs more than a causal mask over whole rows, in words; ``""`` if nothing does."""
        windowed = any(window is not None for window in self.windows)
        return " and ".join([*["packed rows"] * self.packed, *["a sliding window"] * windowed])

    @property
    def device(self) -> str:
        """In words."""
        if self.compute_capability is None:
            return "the CPU"
        return f"a GPU of compute capability {'.'.join(map(str, self.compute_capability))}"

    @property
    def here(self) -> str:
        """Device and dtype, in words."""
        return f"{self.device} with {str(self.dtype).removeprefix('torch.')}"

    @property
    def new_gpu(self) -> bool:
        """Whether there is a GPU with FlashAttention 2 and with tensor cores in Triton."""
        return self.compute_capability is not None and self.compute_capability >= FLASH_CAPABILITY


def check_window(window: int | None) -> None:
    """Check an attention window.

    Raises:
        ValueError: If it is below 1.
    """
    if window is not None and window < 1:
        raise ValueError(
            f"sliding_window must be at least 1 (a token sees only itself), got {window}. Leave it out for full causal "
            "attention."
        )


class AttentionBackend(abc.ABC):
    """One way to compute attention. All compute the same: what differs is what they support, speed and memory.

    Attributes:
        name: For flags, messages and reports.
        description: What computes, on one line, for help texts and the table of recipes/README.md.
        caps_scores: Whether it supports soft caps.
        drops_out: Whether it supports dropout of attention weights.
        holds_scores: Whether it holds S x S scores per head.
    """

    name: str
    description: str
    caps_scores: ClassVar[bool] = False
    drops_out: ClassVar[bool] = False
    holds_scores: ClassVar[bool] = False

    def supports(self, request: AttentionRequest) -> str | None:
        """Why this backend cannot do what is asked, or ``None`` if it can. Depends on nothing but the request.

        The reason is a clause that continues the name: ``"needs a GPU, but this is the CPU"``. The table of
        recipes/README.md shows it up to ``", but"``. Subclasses name what they lack themselves and leave soft caps and
        dropout to this method.
        """
        if request.softcap and not self.caps_scores:
            return "cannot cap scores, because its kernels take only a scale and a mask"
        if request.dropout and not self.drops_out:
            return f"has no attention dropout, but the model's config.json sets attention_dropout={request.dropout}"
        return None

    def missing(self, request: AttentionRequest) -> str | None:
        """What must be installed on this machine first, as a clause like that of :meth:`supports`; or ``None``."""
        return None

    def gives_way(self, request: AttentionRequest) -> bool:
        """Whether the choice of ``"auto"`` runs, announced, where :meth:`supports` has a reason: otherwise an error."""
        return False

    def form(self, request: AttentionRequest) -> tuple[AttentionBackend, str]:
        """The backend that runs for a supported request, and a sentence about it: this one, unless it has variants."""
        return self, ""

    @abc.abstractmethod
    def prepare(
        self,
        *,
        shape: tuple[int, int],
        device: torch.device,
        document_lengths: list[list[int]] | None,
        windows: tuple[int | None, ...],
    ) -> Any:
        """What the layers need to know of a batch. Called once per batch, outside of compiled code.

        Args:
            shape: [B, S] of the batch.
            device: Of the batch.
            document_lengths: The lengths of the documents per row, which sum to S; ``None`` if a row is one document.
            windows: The distinct windows of the model's layers.

        Returns:
            Tensors in tuples and dicts, because torch.compile then takes their sizes for variables; or ``None``.
        """

    @abc.abstractmethod
    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prepared: Any,
        *,
        window: int | None,
        scale: float,
        softcap: float | None,
        dropout: float,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of one layer, differentiable; also called inside of compiled code.

        Args:
            module: The attention layer.
            query: [B, N, S, D], float16, bfloat16 or float32.
            key: [B, K, S, D], same dtype.
            value: [B, K, S, D], same dtype.
            prepared: From :meth:`prepare`.
            window: The layer's window, one of those that were prepared.
            scale: Of the scores.
            softcap: Cap of the scaled scores; ``None`` unless ``caps_scores``.
            dropout: Probability, 0 outside of training and unless ``drops_out``.
            options: What else transformers passes.

        Returns:
            [B, S, N, D], and the weights [B, N, S, S] if there are any.
        """


def document_numbers(lengths: list[list[int]] | None, shape: tuple[int, int], device: torch.device) -> Tensor | None:
    """[B, S], int32: the number of each token's document, counted over all rows; ``None`` if a row is one document."""
    if lengths is None:
        return None
    flat = torch.tensor([n for row in lengths for n in row], device="cpu")
    numbers = torch.repeat_interleave(torch.arange(len(flat), dtype=torch.int32, device="cpu"), flat)
    return numbers.view(shape).to(device, non_blocking=True)
