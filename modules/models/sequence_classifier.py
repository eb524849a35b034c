"""A classifier (or regressor) of whole texts of any family: the decoder's last token of each text, and a linear layer.

transformers' classes pool the rightmost token that is not the pad token, which is wrong where texts end with that
token, impossible without one, and unknown to packed rows. Here the end of a text comes from the mask, from the lengths
of packed documents, or from whoever made the batch.

Shapes: B rows, S tokens per row, N texts (B of them, or more if rows are packed), H hidden size, C classes (or labels,
or numbers).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from ..dtensor import copy_local_rows
from ..lora.config import with_targets
from ..quantization.nf4_linear import keep_dtype
from .decoder import QLoRADecoder
from .families import Family, family_of

#: Name of the head, in transformers' classes and in peft's files.
SCORE = "score"


class ScoreHead(nn.Linear):
    """A linear layer H -> C without bias that stays in float32, and computes in it under autocast too."""

    def __init__(self, hidden_size: int, num_labels: int) -> None:
        super().__init__(hidden_size, num_labels, bias=False, dtype=torch.float32)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [N, H], any dtype -> logits [N, C], float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ScoreHead:
        super()._apply(keep_dtype(fn, self.parameters(recurse=False)), recurse)  # type: ignore[no-untyped-call]
        return self


class QLoRAForSequenceClassification(QLoRADecoder):
    """The 4-bit decoder of a language model with adapters, and a trained head over the last token of each text.

    Attributes:
        model: transformers' decoder.
        score: The head.
    """

    unused_weights: ClassVar = ("lm_head.weight",)

    def __init__(self, decoder: nn.Module, num_labels: int) -> None:
        super().__init__()
        self.model: Any = decoder
        self.config = self.model.config
        self.config.tie_word_embeddings = False  # there is no language model's head to tie to
        self.config.num_labels = num_labels
        self.score = ScoreHead(self.config.hidden_size, num_labels)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        document_lengths: list[list[int]] | None = None,
        last_tokens: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Logits [N, C] in float32, one row per text.

        The texts end, in this order of precedence, where ``last_tokens`` says, at each of ``document_lengths``
        (padding, which is a document too, gets logits as well), at the last 1 of each row of ``attention_mask``, or at
        the end of each row. Attention is causal, so texts that are padded on the right need no mask beside
        ``last_tokens``.

        Args:
            input_ids: int64 [B, S].
            attention_mask: [B, S], 1 for tokens and 0 for padding, on either side.
            position_ids: int64 [B, S]. Default: from 0 at the first token of each row that is not padding.
            inputs_embeds: [B, S, H], instead of ``input_ids``.
            document_lengths: Tokens of each document of each packed row; ``position_ids`` restart at 0 for each.
            last_tokens: int64 [N], the place of each text's last token among all B * S tokens, row by row.

        Raises:
            ValueError: If ``document_lengths`` do not describe the batch or are given with a mask, or if a row of the
                mask has no token.
        """
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None:
            raise ValueError("Neither input_ids nor inputs_embeds are given. Give one of them.")
        if last_tokens is None:
            last_tokens = _last_tokens(given, attention_mask, document_lengths)
        if attention_mask is not None and position_ids is None:
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        prepared, _ = self.attention_kwargs(
            given, attention_mask=attention_mask, document_lengths=document_lengths,
            plain_rows=attention_mask is None and position_ids is None,
        )  # fmt: skip
        outputs = self.model(
            input_ids=input_ids, position_ids=position_ids, inputs_embeds=inputs_embeds, use_cache=False, **prepared
        )
        hidden = outputs.last_hidden_state.flatten(0, 1)
        return SequenceClassifierOutput(logits=self.score(hidden.index_select(0, last_tokens)))

    def is_trained(self, name: str) -> bool:
        """Adapters, and the head in full."""
        return super().is_trained(name) or name.split(".")[-2:] == [SCORE, "weight"]

    @torch.no_grad()
    def init_trained(self, seed: int) -> None:
        """Draw the head as transformers does, normal with ``initializer_range``, equal for any number of ranks."""
        full = torch.empty(self.score.weight.shape, dtype=torch.float32, device="cpu")
        full.normal_(0.0, self.config.initializer_range, generator=torch.Generator().manual_seed(seed))
        copy_local_rows(self.score.weight, full)

    def shard_groups(self) -> list[list[nn.Module]]:
        """The embedding; each decoder layer; final norm and head."""
        return [[self.model.embed_tokens], *([layer] for layer in self.model.layers), [self.model.norm, self.score]]


def _last_tokens(given: Tensor, mask: Tensor | None, lengths: list[list[int]] | None) -> Tensor:
    """The place of each text's last token among all tokens of a batch, int64 [N]."""
    rows, width = given.shape[:2]
    if lengths is not None:
        ends = [end - 1 for end in accumulate(length for row in lengths for length in row)]
        return torch.tensor(ends, device=given.device)
    first = torch.arange(rows, device=given.device) * width
    if mask is None:
        return first + width - 1
    if not bool(mask.any(1).all()):
        raise ValueError(
            "A row of attention_mask has no 1: there is no token to classify by. Leave empty texts out of the batch."
        )
    return first + width - 1 - mask.flip(1).long().argmax(1)


@dataclass(frozen=True)
class ClassificationHead:
    """The head of a sequence classifier: trained in full and saved with the adapter.

    Args:
        num_labels: C, how many numbers it gives for each text.

    Raises:
        ValueError: If that is below 1.
    """

    num_labels: int
    trained_modules: ClassVar[tuple[str, ...]] = (SCORE,)
    task_type: ClassVar[str | None] = "SEQ_CLS"
    takes_images: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.num_labels < 1:
            raise ValueError(f"num_labels must be at least 1, got {self.num_labels}.")

    def with_targets(self, lora: LoraConfig, config: PretrainedConfig) -> LoraConfig:
        """As :func:`~lightning_qlora.modules.lora.config.with_targets`, on the family's projections."""
        return with_targets(lora, family_of(config).projections)

    def __call__(self, model: PreTrainedModel, family: Family) -> QLoRAForSequenceClassification:
        """Put the head on the decoder of transformers' causal language model, whose own head is dropped."""
        return QLoRAForSequenceClassification(model.model, self.num_labels)
