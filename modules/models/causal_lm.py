"""A causal language model of any family whose head computes the loss and never holds all logits.

Shapes: B samples, S tokens per sample, H hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from ..lora.config import with_targets
from ..losses import LossHead
from .decoder import QLoRADecoder, mixed
from .families import Family, family_of


class QLoRAForCausalLM(QLoRADecoder):
    """Mixin for a causal language model of transformers, whose head computes the loss in chunks when labels are given.

    Everything else (generation, configuration, adapter formats) is transformers' and peft's own.
    """

    lm_head: LossHead

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        num_loss_tokens: int | None = None,
        document_lengths: list[list[int]] | None = None,
        loss_inputs: tuple[Tensor, ...] = (),
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As transformers' forward, but with ``labels`` [B, S] (int64, -100 = ignored) no logits are returned.

        The loss (float32, 0-dim) is the sum over predicted tokens divided by ``num_items_in_batch``, or their mean; if
        the head's ``reduction`` is ``"none"``, it is [B, S], and the value at a position is that of the *next* token.
        ``num_loss_tokens`` is how many of ``labels[:, 1:]`` count: given it, the host need not wait for the device.
        ``loss_inputs`` are what the head's loss takes after the labels, each [B, S, ...]: the value at a position
        belongs to the token at that position, as its label does.

        ``document_lengths`` says how many tokens each document of a packed row has, and that none sees another;
        ``position_ids`` [B, S] then restart at 0 for each, and the label of a document's first token is -100.

        Raises:
            ValueError: If ``document_lengths`` do not describe the batch, or are given with a mask or a cache.
        """
        prepared, ours = self.attention_kwargs(
            input_ids if input_ids is not None else inputs_embeds, attention_mask=attention_mask,
            document_lengths=document_lengths, past_key_values=past_key_values,
            plain_rows=labels is not None and attention_mask is None and position_ids is None,
        )  # fmt: skip
        use_cache = False if ours else use_cache
        kwargs.update(prepared)
        if labels is None:
            # Uncompiled: a cache that grows by a token at a time would be compiled again and again.
            with torch.compiler.set_stance("force_eager") if self.is_compiled else contextlib.nullcontext():
                return super().forward(
                    input_ids=input_ids,
                    position_ids=position_ids,
                    past_key_values=past_key_values,
                    inputs_embeds=inputs_embeds,
                    use_cache=use_cache,
                    logits_to_keep=logits_to_keep,
                    **kwargs,
                )
        outputs = self.model(
            input_ids=input_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            **kwargs,
        )
        loss = self.loss_of(outputs.last_hidden_state, labels, num_items_in_batch, num_loss_tokens, loss_inputs)
        return CausalLMOutputWithPast(loss=loss, hidden_states=outputs.hidden_states, attentions=outputs.attentions)

    def loss_of(
        self,
        hidden: Tensor,
        labels: Tensor,
        num_items_in_batch: int | Tensor | None,
        num_loss_tokens: int | None,
        loss_inputs: tuple[Tensor, ...],
    ) -> Tensor:
        """The loss of hidden states [B, S, H]; the other arguments are those of :meth:`forward`."""
        # The last token predicts nothing; slicing it off would copy the hidden states of all others.
        targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        more = [value.roll(-1, dims=1) for value in loss_inputs]
        total: Tensor = self.lm_head(hidden, targets, *more, num_tokens=num_loss_tokens)
        if self.lm_head.reduction != "sum":
            return total
        count = (targets != -100).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return total / count

    def tie_head(self) -> None:
        """Make the head share the embedding's weight again, where the model is configured so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.decoder.embed_tokens.weight

    def shard_groups(self) -> list[list[nn.Module]]:
        """What FSDP2 gathers together: each decoder layer; the embedding; final norm and head.

        Tied embeddings belong to one parameter used at both ends, so they stay with the root, like all that is not
        listed.
        """
        groups: list[list[nn.Module]] = [*self.first_groups(), *([layer] for layer in self.decoder.layers)]
        if not self.config.tie_word_embeddings:
            groups = [[self.decoder.embed_tokens], *groups, [self.decoder.norm, self.lm_head]]
        return groups

    def first_groups(self) -> list[list[nn.Module]]:
        """What FSDP2 gathers after the embedding and before the decoder layers: nothing here."""
        return []


@dataclass(frozen=True)
class LanguageModelHead:
    """The head of a causal language model, a :class:`~lightning_qlora.modules.losses.LossHead`: frozen."""

    trained_modules: ClassVar[tuple[str, ...]] = ()
    task_type: ClassVar[str | None] = None
    takes_images: ClassVar[bool] = False

    def with_targets(self, lora: LoraConfig, config: PretrainedConfig) -> LoraConfig:
        """As :func:`~lightning_qlora.modules.lora.config.with_targets`, on the family's projections."""
        return with_targets(lora, family_of(config).projections)

    def __call__(self, model: PreTrainedModel, family: Family) -> QLoRAForCausalLM:
        """Put the loss into the head of transformers' own model."""
        give_loss(model, family)
        model.__class__ = mixed(QLoRAForCausalLM, type(model))
        assert isinstance(model, QLoRAForCausalLM)
        model.tie_head()
        return model


def give_loss(model: PreTrainedModel, family: Family) -> None:
    """Replace the head of transformers' model by one of the same weight that computes the loss."""
    config = model.config.get_text_config()
    head = LossHead(
        config.hidden_size, config.vocab_size, bias=False,
        logit_scale=family.logit_scale(config), softcap=family.logit_softcap(config),
    )  # fmt: skip
    head.weight = model.lm_head.weight
    model.lm_head = head
