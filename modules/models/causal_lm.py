"""Mixins that make a model of transformers trainable: a loss that never holds all logits, compiled parts, shards.

:func:`specialize` gives them to a model of any family; nothing here is written for one of them.

Shapes: B samples, S tokens per sample, H hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from ..attention import AttentionBackend, attention_inputs
from ..lora.config import is_adapter
from ..losses import LossHead
from ..quantization.nf4_linear import keep_dtype
from .compilation import CompileMode, compile_region
from .decoder_layer import CheckpointedLayer
from .families import Family


class QLoRAForCausalLM(nn.Module):
    """Mixin for a causal language model of transformers, whose head computes the loss in chunks when labels are given.

    Everything else (generation, configuration, adapter formats) is transformers' and peft's own.

    Attributes:
        family: The model's row of the table.
        attention_backend: What computes attention; ``None`` for what transformers' configuration says.
        windows: The distinct attention windows of its layers in tokens, ``None`` for full causal attention.
        is_compiled: Whether :meth:`compile_regions` was called.
    """

    config: PretrainedConfig
    family: Family
    attention_backend: AttentionBackend | None
    windows: tuple[int | None, ...]
    is_compiled: bool
    model: Any  # transformers' decoder: embed_tokens, layers, norm, rotary_emb
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

        The loss (float32, 0-dim) is the sum over predicted tokens divided by ``num_items_in_batch``, or their mean.
        ``num_loss_tokens`` is how many of ``labels[:, 1:]`` count: given it, the host need not wait for the device.
        ``loss_inputs`` are what the head's loss takes after the labels, each [B, S, ...]: the value at a position
        belongs to the token at that position, as its label does.

        ``document_lengths`` says how many tokens each document of a packed row has, and that none sees another;
        ``position_ids`` [B, S] then restart at 0 for each, and the label of a document's first token is -100.

        Raises:
            ValueError: If ``document_lengths`` do not describe the batch, or are given with a mask or a cache.
        """
        if document_lengths is not None and (attention_mask is not None or past_key_values is not None):
            raise ValueError(
                "document_lengths already defines the attention mask; do not pass attention_mask or a KV cache with "
                "it. Padding is a document of its own, at the end of its row."
            )
        if document_lengths is not None and self.attention_backend is None:
            raise ValueError(
                "document_lengths needs an attention backend of this library, which keeps documents apart; this model "
                "was built with transformers' own attention."
            )
        trains = labels is not None and attention_mask is None and position_ids is None
        given = input_ids if input_ids is not None else inputs_embeds
        if given is not None and self.attention_backend is not None and (trains or document_lengths is not None):
            use_cache = False
            prepared = attention_inputs(
                self.attention_backend, shape=(given.shape[0], given.shape[1]), device=given.device,
                document_lengths=document_lengths, windows=self.windows,
            )  # fmt: skip
            kwargs.update(prepared)
        else:
            kwargs["attention_mask"] = attention_mask
        if labels is None:
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
        # The last token predicts nothing; slicing it off would copy the hidden states of all others.
        targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        more = [value.roll(-1, dims=1) for value in loss_inputs]
        total = self.lm_head(outputs.last_hidden_state, targets, *more, num_tokens=num_loss_tokens)
        count = (targets != -100).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutputWithPast(
            loss=total / count, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def compile_regions(self, mode: CompileMode = "default", *, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compile rotary embedding, decoder layers and final norm, each as one graph for any B and S.

        The loss compiles itself (see ``linear_loss``). Call it before ``fully_shard``. Where no gradients are computed,
        the layers are one more graph and the norm runs as it is. Without ``labels`` the whole model goes on running
        uncompiled: a cache that grows by a token at a time would be compiled again and again.

        Args:
            mode: ``"off"`` does nothing.
            backend: Of torch.compile, as in :func:`compile_region`.
        """
        if mode == "off":
            return
        for layer in self.model.layers:
            kind = (layer.self_attn.attention_window, layer.checkpoint_activations)
            compile_region(layer, mode, backend=backend, kind=kind)
        regions = [self.model.norm]
        kinds = self.model.rotary_emb.rope_type  # of each type of layer, in Gemma3
        if not {"dynamic", "longrope"} & set(kinds.values() if isinstance(kinds, dict) else [kinds]):
            regions.append(self.model.rotary_emb)  # those two compute on the host, from the length
        for region in regions:
            compile_region(region, mode, backend=backend)
        self.is_compiled = True

    def is_trained(self, name: str) -> bool:
        """Whether the parameter of that name is trained: the one place that says so; all else reads requires_grad."""
        return is_adapter(name)

    def shard_groups(self) -> list[list[nn.Module]]:
        """What FSDP2 gathers together: each decoder layer; the embedding; final norm and head.

        Tied embeddings belong to one parameter used at both ends, so they stay with the root, like all that is not
        listed.
        """
        groups: list[list[nn.Module]] = [[layer] for layer in self.model.layers]
        if not self.config.tie_word_embeddings:
            groups = [[self.model.embed_tokens], *groups, [self.model.norm, self.lm_head]]
        return groups


class _FlatNorm(nn.Module):
    """Mixin for the norm before the head, over a list of tokens: one sample or many make no second graph.

    Without gradients it runs uncompiled, which spares validation a graph and costs it nothing that matters.
    """

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [..., H] -> [..., H]."""
        # Not an ordinary view, for torch.compile also guards the shape of what a tensor is a view of.
        tokens = torch.ops.aten._unsafe_view(hidden_states, [-1, hidden_states.shape[-1]])
        compiled = contextlib.nullcontext() if torch.is_grad_enabled() else torch.compiler.set_stance("force_eager")
        with compiled:
            return super().__call__(tokens).view_as(hidden_states)  # type: ignore[no-any-return]


class _Float32Buffers(nn.Module):
    """Mixin for rotary embeddings: frequencies stay float32 under ``.to(bfloat16)``, which would misplace positions."""

    def __call__(self, x: Tensor, position_ids: Tensor, *args: Any) -> Any:
        """Cosine and sine [1 or B, S, D] in the dtype of ``x``, whose shape does not matter (nor make a graph)."""
        return super().__call__(x.new_empty(()), position_ids, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Float32Buffers:
        super()._apply(keep_dtype(fn, self.buffers(recurse=False)), recurse)  # type: ignore[no-untyped-call]
        return self


_MIXED: dict[tuple[type, type], Any] = {}


def _mixed(mixin: type, cls: type) -> Any:
    """transformers' class ``cls`` with ``mixin`` in front: one for all modules of the class, which share its graphs."""
    if (mixin, cls) not in _MIXED:
        _MIXED[mixin, cls] = type(f"QLoRA{cls.__name__}", (mixin, cls), {"__module__": __name__})
    return _MIXED[mixin, cls]


def specialize(
    model: PreTrainedModel, family: Family, *, attention: AttentionBackend | None, windows: list[int | None]
) -> QLoRAForCausalLM:
    """Give a model of transformers the mixins of this module, in place, and a :class:`LossHead` for its head.

    Args:
        model: A causal language model of ``family``, on the meta device.
        family: Its row of the table.
        attention: What computes attention; ``None`` leaves it to transformers.
        windows: The attention window of each layer.
    """
    decoder: Any = model.model
    for layer, window in zip(decoder.layers, windows, strict=True):
        layer.__class__ = _mixed(CheckpointedLayer, type(layer))
        layer.self_attn.attention_window = window
    decoder.norm.__class__ = _mixed(_FlatNorm, type(decoder.norm))
    decoder.rotary_emb.__class__ = _mixed(_Float32Buffers, type(decoder.rotary_emb))
    with torch.device("meta"):
        head = LossHead(
            model.config.hidden_size, model.config.vocab_size, bias=False,
            logit_scale=family.logit_scale(model.config), softcap=family.logit_softcap(model.config),
        )  # fmt: skip
    head.weight = decoder.embed_tokens.weight if model.config.tie_word_embeddings else model.lm_head.weight
    model.lm_head = head
    model.__class__ = _mixed(QLoRAForCausalLM, type(model))
    assert isinstance(model, QLoRAForCausalLM)
    model.family, model.attention_backend, model.is_compiled = family, attention, False
    model.windows = tuple(dict.fromkeys(windows))
    return model
