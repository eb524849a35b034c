"""A Llama with a frozen 4-bit base, LoRA adapters and a loss that never holds all logits.

Shapes: B samples, S tokens a sample, H hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.utils import can_return_tuple

from ..attention.attention import attention_inputs
from ..losses import LossHead
from ..quantization.nf4_linear import keep_dtype
from .compilation import CompileMode, compile_region
from .decoder_layer import QLoRALlamaDecoderLayer


class QLoRALlamaForCausalLM(LlamaForCausalLM):
    """transformers' Llama whose head computes the loss chunk by chunk when labels are given.

    Everything else (generation, configuration, adapter formats) is transformers' and peft's own.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model.layers = nn.ModuleList(
            [QLoRALlamaDecoderLayer(config, index) for index in range(config.num_hidden_layers)]
        )
        self.model.norm = _FinalNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.model.rotary_emb = Float32RotaryEmbedding(config=config)
        self.is_compiled = False
        self.attention_backend: str | None = None  # transformers' own, by name
        self.lm_head = LossHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

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
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As ``LlamaForCausalLM.forward``, but with ``labels`` [B, S] (int64, -100 = ignored) no logits are returned.

        The loss (float32, 0-dim) is the sum over predicted tokens divided by ``num_items_in_batch``, or their mean.
        ``num_loss_tokens`` is how many of ``labels[:, 1:]`` count: given it, the host need not wait for the device.

        ``document_lengths`` says how many tokens each document of a packed row has, and that none sees another;
        ``position_ids`` [B, S] then restart at 0 for each, and the label of a document's first token is -100.

        Raises:
            ValueError: If ``document_lengths`` do not describe the batch, or with a mask, a cache or an attention of
                transformers.
        """
        if document_lengths is not None:
            self._check_packed(attention_mask, past_key_values)
        trains = labels is not None and attention_mask is None and position_ids is None
        given = input_ids if input_ids is not None else inputs_embeds
        if given is not None and self.attention_backend is not None and (trains or document_lengths is not None):
            use_cache = False
            prepared = attention_inputs(
                self.attention_backend, shape=(given.shape[0], given.shape[1]), device=given.device,
                document_lengths=document_lengths, sliding_window=self.config.attention_window,
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
        total = self.lm_head(outputs.last_hidden_state, targets, num_tokens=num_loss_tokens)
        count = (targets != -100).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutputWithPast(
            loss=total / count, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def _check_packed(self, attention_mask: Tensor | None, past_key_values: Any) -> None:
        if self.attention_backend is None:
            raise ValueError(
                f"attention={self.config._attn_implementation!r} would let packed documents see each other. Build the "
                "model with attention='sdpa' (or 'flex', 'flash', 'xformers')."
            )
        if attention_mask is not None or past_key_values is not None:
            raise ValueError(
                "document_lengths say all there is to say of who sees whom: give no attention_mask and no cache with "
                "them. Padding is a document of its own, at the end of its row."
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
        regions = [*self.model.layers, self.model.norm]
        if self.model.rotary_emb.rope_type not in ("dynamic", "longrope"):  # those compute on the host, from the length
            regions.append(self.model.rotary_emb)
        for region in regions:
            compile_region(region, mode, backend=backend)
        self.is_compiled = True

    def shard_groups(self) -> list[list[nn.Module]]:
        """What FSDP2 gathers together: each decoder layer; the embedding; final norm and head.

        Tied embeddings belong to one parameter used at both ends, so they stay with the root, like all that is not
        listed.
        """
        groups: list[list[nn.Module]] = [[layer] for layer in self.model.layers]
        if not self.config.tie_word_embeddings:
            groups = [[self.model.embed_tokens], *groups, [self.model.norm, self.lm_head]]
        return groups


class _FinalNorm(LlamaRMSNorm):
    """The norm before the head, over a list of tokens: whether they are one sample or many makes no second graph.

    Without gradients it runs uncompiled, which spares validation a graph and costs it nothing that matters.
    """

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [..., H] -> [..., H]."""
        # Not an ordinary view, for torch.compile also guards the shape of what a tensor is a view of.
        tokens = torch.ops.aten._unsafe_view(hidden_states, [-1, hidden_states.shape[-1]])
        compiled = contextlib.nullcontext() if torch.is_grad_enabled() else torch.compiler.set_stance("force_eager")
        with compiled:
            return super().__call__(tokens).view_as(hidden_states)  # type: ignore[no-any-return]


class Float32RotaryEmbedding(LlamaRotaryEmbedding):
    """Rotary frequencies that stay float32 under ``.to(bfloat16)``: 8 bits place distant positions wrongly."""

    def __call__(self, x: Tensor, position_ids: Tensor) -> Any:
        """Cosine and sine [1 or B, S, D] in the dtype of ``x``, whose shape does not matter (nor make a graph)."""
        return super().__call__(x.new_empty(()), position_ids)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32RotaryEmbedding:
        super()._apply(keep_dtype(fn, self.buffers(recurse=False)), recurse)
        return self
