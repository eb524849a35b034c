"""A Llama with a frozen 4-bit base, LoRA adapters and a loss that never holds all logits.

Shapes: B samples, S tokens a sample, H hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners import lora as peft_lora
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.utils import can_return_tuple

from lightning_qlora.modules.adapters import check_plain_lora
from lightning_qlora.modules.attention import IMPLEMENTATION, attention_inputs, register_attention
from lightning_qlora.modules.compilation import CompileMode, compile_region
from lightning_qlora.modules.linear_cross_entropy import LossHead
from lightning_qlora.modules.nf4_linear import NF4Linear, copy_local_rows, keep_dtype, local_tensor
from lightning_qlora.modules.offload_activations import offload_to_host
from lightning_qlora.modules.weights import LoadReport, SafetensorsCheckpoint, check_weights, load_weights

#: The seven projections of a Llama decoder layer, all of which QLoRA adapts (Dettmers et al. 2023, arXiv:2305.14314).
LLAMA_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def default_lora(r: int = 64, alpha: int | None = None, dropout: float = 0.0) -> LoraConfig:
    """LoRA on all seven projections, with ``alpha`` = 2 * ``r`` unless given."""
    return LoraConfig(
        r=r,
        lora_alpha=2 * r if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=list(LLAMA_PROJECTIONS),
        task_type="CAUSAL_LM",
    )


def check_lora(lora: LoraConfig) -> LoraConfig:
    """Return ``lora`` if these modules can train it.

    Raises:
        ValueError: For a rank below 1, a non-positive alpha, a dropout outside [0, 1), another initialisation than
            peft's default, or a variant of LoRA (see
            :func:`~lightning_qlora.modules.adapters.check_plain_lora`).
    """
    if lora.r < 1:
        raise ValueError(f"LoRA rank r must be at least 1, got {lora.r}.")
    if not lora.lora_alpha > 0:
        raise ValueError(f"lora_alpha must be positive, got {lora.lora_alpha}.")
    if not 0 <= lora.lora_dropout < 1:
        raise ValueError(f"lora_dropout must be in [0, 1), got {lora.lora_dropout}.")
    if lora.init_lora_weights is not True:
        raise ValueError(
            f"The LoraConfig has init_lora_weights={lora.init_lora_weights!r}, but adapters start here as peft's "
            "default does, equal for any number of ranks. Leave it True; to start otherwise, load an adapter that peft "
            "initialised (init_adapter)."
        )
    return check_plain_lora(lora, "The LoraConfig", "Nothing else is trained here: leave it at its default.")


def check_offload(*, checkpoint_activations: bool, offload_activations: bool) -> None:
    """Refuse to move activation checkpoints to the host where there are none.

    Raises:
        ValueError: For ``offload_activations`` without ``checkpoint_activations``.
    """
    if offload_activations and not checkpoint_activations:
        raise ValueError(
            "offload_activations moves activation checkpoints to the host, but checkpoint_activations is off: there "
            "are none. Set checkpoint_activations too, or leave offload_activations out."
        )


class LoraLinear(peft_lora.Linear):  # type: ignore[misc]
    """peft's LoRA layer, which computes the same with less traffic and memory.

    peft converts the input to the adapter's float32, for autocast to convert it back, a sixth of an uncompiled step of
    an 8B model; here the base's result says in what to compute. A and B are converted here, for autocast would keep
    its copies of all layers until the forward is over, 0.3 GiB for 8B and r 64. And peft scales the adapter's output
    [B, S, out], which keeps another tensor of that size in forward and in backward; here the r numbers of a token are
    scaled. A single adapter without dropout on a 4-bit base has no output of its own: see :class:`NF4Linear`. Variants
    of LoRA, which peft can add to a layer that stands already, are left to peft.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [B, S, in] -> [B, S, out]."""
        if self.disable_adapters or self.merged or args or kwargs:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        names = [name for name in self.active_adapters if name in self.lora_A]
        if any(name in self.lora_variant or self.lora_bias[name] for name in names):
            return super().forward(x)  # type: ignore[no-any-return]
        if len(names) == 1 and isinstance(self.base_layer, NF4Linear) and not self._drops(names[0]):
            a, b = self.lora_A[names[0]].weight, self.lora_B[names[0]].weight
            return self.base_layer(x, lora=(a, b, self.scaling[names[0]]))  # type: ignore[no-any-return]
        y: Tensor = self.base_layer(x)
        for name in names:
            a, b = (matrix[name].weight.to(y.dtype) for matrix in (self.lora_A, self.lora_B))
            low = F.linear(self.lora_dropout[name](x.to(y.dtype)), a)
            y = y + F.linear(low * self.scaling[name], b)
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As peft's, which ``merge_adapter`` and ``merge_and_unload`` call.

        Raises:
            ValueError: For a 4-bit base, which stays as it is.
        """
        if isinstance(self.base_layer, NF4Linear):
            raise ValueError(
                "A weight packed in 4 bits cannot take an adapter in. Save the adapter and merge the files with "
                "recipes/merge_adapter.py (lightning_qlora.modules.merge), which writes a dense checkpoint."
            )
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def _drops(self, name: str) -> bool:
        dropout = self.lora_dropout[name]
        return dropout.training and not isinstance(dropout, nn.Identity)


class QLoRALlamaDecoderLayer(LlamaDecoderLayer):
    """transformers' decoder layer with activation checkpointing inside ``forward``.

    Hooks (FSDP2's gather the weights) then run outside the checkpoint, and torch.compile sees the recomputation: it
    leaves out what no gradient needs, such as the product with ``down_proj``. transformers' own checkpointing wraps
    ``__call__`` in some versions and ``forward`` in others.
    """

    checkpoint_activations = False
    offload_activations = False

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As ``forward``, around what is compiled: hidden_states wait for backward on the host if so configured."""
        offloads = self.offload_activations and self._is_recomputed(kwargs)
        with offload_to_host(hidden_states) if offloads else contextlib.nullcontext():
            return super().__call__(hidden_states, *args, **kwargs)  # type: ignore[no-any-return]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As ``LlamaDecoderLayer.forward``: hidden_states [B, S, H] -> [B, S, H]."""
        forward = functools.partial(super().forward, **kwargs)
        if not self._is_recomputed(kwargs):
            return forward(hidden_states, *args)  # type: ignore[no-any-return]
        options: dict[str, Any] = {}
        if _COMPILED_CHECKPOINTS_NEED_A_POLICY and torch.compiler.is_compiling():
            options["context_fn"] = _recompute_everything
        return torch.utils.checkpoint.checkpoint(  # type: ignore[no-any-return]
            forward, hidden_states, *args, use_reentrant=False, **options
        )

    def _is_recomputed(self, kwargs: dict[str, Any]) -> bool:
        learns = self.training and torch.is_grad_enabled()
        return self.checkpoint_activations and learns and kwargs.get("past_key_values") is None


#: Before 2.13, torch.compile recomputes what lies inside an autograd.Function only if a policy says so.
_COMPILED_CHECKPOINTS_NEED_A_POLICY = torch.__version__ < "2.13"


def _recompute_everything() -> Any:
    return torch.utils.checkpoint.create_selective_checkpoint_contexts(  # type: ignore[no-untyped-call]
        lambda context, operator, *args, **kwargs: torch.utils.checkpoint.CheckpointPolicy.PREFER_RECOMPUTE
    )


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
        self.model.rotary_emb = _Float32RotaryEmbedding(config=config)
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


class _Float32RotaryEmbedding(LlamaRotaryEmbedding):
    """Rotary frequencies that stay float32 under ``.to(bfloat16)``: 8 bits place distant positions wrongly."""

    def __call__(self, x: Tensor, position_ids: Tensor) -> Any:
        """Cosine and sine [1 or B, S, D] in the dtype of ``x``, whose shape does not matter (nor make a graph)."""
        return super().__call__(x.new_empty(()), position_ids)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Float32RotaryEmbedding:
        super()._apply(keep_dtype(fn, self.buffers(recurse=False)), recurse)
        return self


def load_config(directory: str | Path) -> LlamaConfig:
    """Read and check ``config.json``.

    Raises:
        ValueError: If there is none, it is not JSON or not valid, or it is not that of a Llama causal language model.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory} has no config.json: it is not a transformers model directory.")
    try:
        raw = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}).") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} is not a JSON object but a {type(raw).__name__}.")
    architectures = raw.get("architectures") or ["LlamaForCausalLM"]
    if raw.get("model_type") != "llama" or "LlamaForCausalLM" not in architectures:
        raise ValueError(
            f"{directory} is a {raw.get('model_type')!r} model ({', '.join(architectures)}); these recipes finetune "
            "Llama causal language models (model_type 'llama', LlamaForCausalLM), e.g. Llama 2/3, SmolLM, TinyLlama."
        )
    try:
        config: LlamaConfig = LlamaConfig.from_pretrained(directory)
    except StrictDataclassError as error:
        raise ValueError(f"{path} is not valid for a Llama: {' '.join(str(error).split())}") from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the 4-bit layers are ours; transformers must not look for its own
    return config


def build_llama(
    checkpoint: SafetensorsCheckpoint,
    lora: LoraConfig,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    sliding_window: int | None = None,
    checkpoint_activations: bool = False,
    offload_activations: bool = False,
) -> QLoRALlamaForCausalLM:
    """The model's structure on the meta device: 4-bit projections, LoRA in float32, everything else in ``dtype``.

    Whether a projection is 4-bit follows the checkpoint if that is quantized (some leave layers in 16 bit); all of
    them are if it is not.

    Args:
        checkpoint: The base model (only headers are read here).
        lora: The adapters, on any of ``LLAMA_PROJECTIONS``.
        dtype: Of embeddings, norms and head.
        attention: What :func:`~lightning_qlora.modules.attention.choose_attention` chose: a ``Backend`` or ``"eager"``.
        sliding_window: How many tokens one sees, itself included; ``None`` for all before it.
        checkpoint_activations: Recompute each decoder layer in backward (non-reentrant).
        offload_activations: Keep the inputs of recomputed layers in host memory.

    Raises:
        ValueError: If the model is not a Llama, ``lora`` is not supported, or there is nothing to offload.
    """
    check_offload(checkpoint_activations=checkpoint_activations, offload_activations=offload_activations)
    config = load_config(checkpoint.directory)
    register_attention()
    config._attn_implementation = attention if attention == "eager" else IMPLEMENTATION
    config.attention_window = sliding_window  # where masks are made, there is no model
    with torch.device("meta"):
        model = QLoRALlamaForCausalLM(config)
    model.attention_backend = None if attention == "eager" else attention
    for parent_name, parent in list(model.model.named_modules()):
        for attribute, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                name = f"model.{parent_name}.{attribute}.weight"
                state = checkpoint.quant_state(name)
                if state is not None or not checkpoint.is_quantized:
                    setattr(parent, attribute, _projection(child, state, dtype))
    _cast_unquantized(model, dtype)
    for layer in model.model.layers:
        layer.checkpoint_activations, layer.offload_activations = checkpoint_activations, offload_activations
    config = copy.copy(check_lora(lora))
    config._register_custom_module({nn.Linear: LoraLinear})  # documented, but experimental: hence the underscore
    inject_adapter_in_model(config, model, low_cpu_mem_usage=True)
    for name, module in model.named_modules():
        if isinstance(module, peft_lora.LoraLayer) and name.rpartition(".")[2] not in LLAMA_PROJECTIONS:
            raise ValueError(
                f"LoRA target_modules {lora.target_modules} match {name!r}, which is no projection of a decoder layer. "
                f"Choose from {LLAMA_PROJECTIONS}."
            )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"LoRA target_modules {lora.target_modules} match no layer. Choose from {LLAMA_PROJECTIONS}.")
    return model


def _projection(linear: nn.Linear, state: dict[str, Any] | None, dtype: torch.dtype) -> NF4Linear:
    """An empty 4-bit layer of the shape of ``linear``, in the checkpoint's format if that has one."""
    names = ("nested", "blocksize", "nested_blocksize", "quant_type")
    quantization = {} if state is None else {name: state[name] for name in names}
    return NF4Linear(
        linear.in_features, linear.out_features, linear.bias is not None, device="meta", dtype=dtype, **quantization
    )


def _cast_unquantized(model: nn.Module, dtype: torch.dtype) -> None:
    quantized = {id(p) for m in model.modules() if isinstance(m, NF4Linear) for p in m.parameters(recurse=False)}
    for parameter in model.parameters():
        if id(parameter) not in quantized:
            parameter.data = parameter.data.to(dtype)


def materialize(
    model: QLoRALlamaForCausalLM, checkpoint: SafetensorsCheckpoint, device: torch.device, *, seed: int,
    parameters_on: torch.device | None = None,
) -> LoadReport:  # fmt: skip
    """Allocate a meta model (after ``fully_shard``, so only this rank's part), and load and initialise all of it.

    Args:
        model: From :func:`build_llama`, sharded or not.
        checkpoint: The base model's weights.
        device: Where to compute, and where buffers live.
        seed: Of the LoRA initialisation, which does not depend on the number of ranks.
        parameters_on: Where parameters rest if not on ``device``: the CPU, when FSDP2 offloads them.

    Raises:
        ValueError: Before anything is allocated, if the checkpoint does not fill the model.
    """
    check_weights(model, checkpoint)
    model.to_empty(device=parameters_on or device)
    # inv_freq is in no checkpoint, and to_empty() has just overwritten it. The module itself may be compiled: keep it.
    with torch.device("cpu"):  # some of Lightning's strategies make the GPU the default, where rounding differs
        rotary = _Float32RotaryEmbedding(config=model.config)
    for name, buffer in rotary.named_buffers():
        setattr(model.model.rotary_emb, name, buffer.to(device))
    if parameters_on is not None and parameters_on != device:
        for module in model.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, buffer.to(device))
    if model.config.tie_word_embeddings:  # to_empty() unties them where FSDP does not hold them together
        model.lm_head.weight = model.model.embed_tokens.weight
    report = load_weights(model, checkpoint)
    init_lora(model, seed)
    if (checkpoint.directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.directory)
    return report


@torch.no_grad()
def init_lora(model: nn.Module, seed: int) -> None:
    """peft's default initialisation (A uniform as ``nn.Linear``'s, B zero), in float32 and equal for any number of
    ranks.

    Each full A is drawn on the CPU from a generator seeded by ``seed`` and its position; a rank keeps its rows.
    """
    for position, (name, parameter) in enumerate(sorted(model.named_parameters())):
        if ".lora_A." in name:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + position)
            bound = 1 / math.sqrt(parameter.shape[1])  # kaiming_uniform_(a=sqrt(5)) of [r, in]
            full = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
            full.uniform_(-bound, bound, generator=generator)
            copy_local_rows(parameter, full.to(parameter.dtype))
        elif ".lora_B." in name:
            local_tensor(parameter).zero_()


#: What older checkpoints do not hold.
_LATER_IN_IDENTITY = {"lora_use_rslora", "lora_rank_pattern", "lora_alpha_pattern"}


@dataclasses.dataclass(frozen=True)
class BaseIdentity:
    """What a training checkpoint must share with the model it is loaded into."""

    fingerprint: str
    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    lora_r: int
    lora_alpha: float
    lora_targets: tuple[str, ...]
    lora_use_rslora: bool
    lora_rank_pattern: tuple[tuple[str, int], ...]  # in order: the first that matches a layer's name counts
    lora_alpha_pattern: tuple[tuple[str, float], ...]

    @classmethod
    def of(cls, checkpoint: SafetensorsCheckpoint, lora: LoraConfig) -> BaseIdentity:
        """The identity of a base model together with its adapters' shape."""
        config = load_config(checkpoint.directory)
        return cls(
            checkpoint.fingerprint(), config.hidden_size, config.num_hidden_layers, config.vocab_size, lora.r,
            float(lora.lora_alpha), tuple(sorted(lora.target_modules or ())), lora.use_rslora,
            tuple((lora.rank_pattern or {}).items()), tuple((lora.alpha_pattern or {}).items()),
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in a checkpoint."""
        return {
            **dataclasses.asdict(self),
            "lora_targets": list(self.lora_targets),
            "lora_rank_pattern": [list(pair) for pair in self.lora_rank_pattern],
            "lora_alpha_pattern": [list(pair) for pair in self.lora_alpha_pattern],
        }

    def check(self, other: dict[str, Any], source: str | Path) -> None:
        """Refuse a checkpoint made for something else.

        Raises:
            ValueError: Naming each attribute that differs.
        """
        mine = self.to_dict()
        for key in _LATER_IN_IDENTITY - other.keys():
            del mine[key]  # that checkpoint cannot say
        differing = [
            f"{key} is {other.get(key)!r} there and {mine[key]!r} here" for key in mine if other.get(key) != mine[key]
        ]
        if differing:
            raise ValueError(
                f"{source} was made with another model or LoRA shape: {'; '.join(differing)}. Resume with the same "
                "--model and LoRA settings (--lora_r, --lora_alpha), or start in a new --output_dir."
            )
