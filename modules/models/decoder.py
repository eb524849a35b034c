"""What all models here share, whatever their head: a decoder of transformers with mixins, compiled parts, shards.

Shapes: B samples, S tokens per sample, H hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..attention import AttentionBackend, attention_inputs
from ..lora.config import is_adapter
from ..quantization.nf4_linear import keep_dtype
from .compilation import CompileMode, compile_region
from .decoder_layer import CheckpointedLayer
from .families import Family


class QLoRADecoder(nn.Module):
    """Base of the models here: transformers' decoder in 4 bits with adapters, and a head that a subclass adds.

    Attributes:
        family: The model's row of the table.
        attention_backend: What computes attention; ``None`` for what transformers' configuration says.
        windows: The distinct attention windows of its layers in tokens, ``None`` for full causal attention.
        is_compiled: Whether :meth:`compile_regions` was called.
        unused_weights: Names of the base checkpoint's weights that this model has no place for, because its head
            replaces them.
        compiles_rotary: Whether its rotary embedding is one of the compiled regions.
    """

    unused_weights: ClassVar[tuple[str, ...]] = ()
    compiles_rotary: ClassVar[bool] = True
    config: PretrainedConfig
    family: Family
    attention_backend: AttentionBackend | None
    windows: tuple[int | None, ...]
    is_compiled: bool
    model: Any  # transformers' decoder, or what holds it and a vision tower

    @property
    def decoder(self) -> Any:
        """transformers' decoder: embed_tokens, layers, norm, rotary_emb."""
        return self.model

    def attention_kwargs(
        self,
        given: Tensor | None,
        *,
        attention_mask: Tensor | None,
        document_lengths: list[list[int]] | None,
        plain_rows: bool,
        past_key_values: Any = None,
    ) -> tuple[dict[str, Any], bool]:
        """Keyword arguments of the decoder that say who sees whom, and whether they came from our attention backend.

        Args:
            given: ``input_ids`` [B, S] or ``inputs_embeds`` [B, S, H].
            attention_mask: As transformers takes it, [B, S] or four-dimensional.
            document_lengths: Tokens of each document of each packed row.
            plain_rows: Whether attention is causal in whole rows: no mask, no positions of the caller's, no cache.
            past_key_values: A KV cache.

        Raises:
            ValueError: If ``document_lengths`` do not describe the batch, or are given with a mask or a cache, or
                without a backend that keeps documents apart.
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
        if given is None or self.attention_backend is None or not (plain_rows or document_lengths is not None):
            return {"attention_mask": attention_mask}, False
        prepared = attention_inputs(
            self.attention_backend, shape=(given.shape[0], given.shape[1]), device=given.device,
            document_lengths=document_lengths, windows=self.windows,
        )  # fmt: skip
        return prepared, True

    def checkpoint_layers(self, recomputed: int, *, offload: bool) -> None:
        """Recompute so many decoder layers in backward, the first ones.

        When their turn comes, what the others kept is free again.

        Args:
            recomputed: How many.
            offload: Whether what they are recomputed from waits on the host.
        """
        for index, layer in enumerate(self.decoder.layers):
            layer.checkpoint_activations, layer.offload_activations = index < recomputed, offload

    def compile_regions(self, mode: CompileMode = "default", *, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compile rotary embedding, decoder layers and final norm, each as one graph for any B and S.

        Call it before ``fully_shard``. Where no gradients are computed, the layers are one more graph and the norm runs
        as it is.

        Args:
            mode: ``"off"`` does nothing.
            backend: Of torch.compile, as in :func:`compile_region`.
        """
        if mode == "off":
            return
        for layer in self.decoder.layers:
            kind = (layer.self_attn.attention_window, layer.checkpoint_activations)
            compile_region(layer, mode, backend=backend, kind=kind)
        regions = [self.decoder.norm]
        kinds = self.decoder.rotary_emb.rope_type  # of each type of layer, in Gemma3
        on_host = {"dynamic", "longrope"} & set(kinds.values() if isinstance(kinds, dict) else [kinds])
        if self.compiles_rotary and not on_host:
            regions.append(self.decoder.rotary_emb)  # those two compute on the host, from the length
        for region in regions:
            compile_region(region, mode, backend=backend)
        self.is_compiled = True

    def is_trained(self, name: str) -> bool:
        """Whether the parameter of that name is trained: the one place that says so; all else reads requires_grad."""
        return is_adapter(name)

    def is_new(self, name: str) -> bool:
        """Whether the parameter of that name does not come from the base's checkpoint; by default, all that is trained.

        It gets its first value from :func:`~lightning_qlora.modules.lora.initialization.init_lora`, or from
        :meth:`init_trained`.
        """
        return self.is_trained(name)

    #: Ends the message about a module that LoRA may not adapt: what else it may.
    may_also_adapt: ClassVar[str] = ""

    def may_adapt(self, name: str) -> bool:
        """Whether LoRA may adapt the module of that name: the projections of decoder layers."""
        return name.rpartition(".")[2] in self.family.projections

    def quantizes(self, name: str) -> bool:
        """Whether the linear layer of that name is to be 4-bit, where the checkpoint does not say."""
        return True

    def init_trained(self, seed: int) -> None:
        """Give what is trained beside the adapters its initial values, equal for any number of ranks: nothing here."""

    def tie_head(self) -> None:
        """Make the head share the embedding's weight again, where the model is configured so: nothing here."""

    def shard_groups(self) -> list[list[nn.Module]]:
        """What FSDP2 gathers together, in the order of forward. What is not listed stays with the root."""
        raise NotImplementedError


class Head(Protocol):
    """What turns transformers' causal language model, whose decoder has the mixins, into the model that is trained.

    Attributes:
        trained_modules: Names of its modules that are trained in full: ``modules_to_save`` of the saved adapter.
        task_type: peft's name of the task, in the saved adapter; ``None`` leaves what the LoRA configuration says.
        takes_images: Whether it belongs to a vision-language model.
    """

    @property
    def takes_images(self) -> bool: ...

    @property
    def trained_modules(self) -> tuple[str, ...]: ...

    @property
    def task_type(self) -> str | None: ...

    def with_targets(self, lora: LoraConfig, config: PretrainedConfig) -> LoraConfig:
        """``lora`` with the names of all that it adapts.

        Raises:
            ValueError: If it names what cannot be adapted.
        """

    def __call__(self, model: PreTrainedModel, family: Family) -> QLoRADecoder:
        """Add the head. The model is on the meta device."""


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


class Float32Buffers(nn.Module):
    """Mixin for rotary embeddings: frequencies stay float32 under ``.to(bfloat16)``, which would misplace positions."""

    def __call__(self, x: Tensor, position_ids: Tensor, *args: Any) -> Any:
        """Cosine and sine [1 or B, S, D] in the dtype of ``x``, whose shape does not matter (nor make a graph)."""
        return super().__call__(x.new_empty(()), position_ids, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Buffers:
        super()._apply(keep_dtype(fn, self.buffers(recurse=False)), recurse)  # type: ignore[no-untyped-call]
        return self


_MIXED: dict[tuple[type, type], Any] = {}


def mixed(mixin: type, cls: type) -> Any:
    """transformers' class ``cls`` with ``mixin`` in front: one for all modules of the class, which share its graphs."""
    if (mixin, cls) not in _MIXED:
        _MIXED[mixin, cls] = type(f"QLoRA{cls.__name__}", (mixin, cls), {"__module__": __name__})
    return _MIXED[mixin, cls]


def specialize(
    model: PreTrainedModel,
    family: Family,
    head: Head,
    *,
    attention: AttentionBackend | None,
    windows: list[int | None],
) -> QLoRADecoder:
    """Give the decoder of a model of transformers the mixins of this library, in place, and the model its head.

    Args:
        model: A causal language model of ``family``, on the meta device.
        family: Its row of the table.
        head: What is added to the decoder.
        attention: What computes attention; ``None`` leaves it to transformers.
        windows: The attention window of each layer.
    """
    decoder: Any = model.model if family.vision is None else model.model.get_submodule(family.vision.language_model)
    for layer, window in zip(decoder.layers, windows, strict=True):
        layer.__class__ = mixed(CheckpointedLayer, type(layer))
        layer.self_attn.attention_window = window
    decoder.norm.__class__ = mixed(_FlatNorm, type(decoder.norm))
    decoder.rotary_emb.__class__ = mixed(Float32Buffers, type(decoder.rotary_emb))
    with torch.device("meta"):
        specialized = head(model, family)
    specialized.family, specialized.attention_backend, specialized.is_compiled = family, attention, False
    specialized.windows = tuple(dict.fromkeys(windows))
    return specialized
