"""From a checkpoint to a trainable model: structure on the meta device, 4-bit layers, LoRA, then the weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.utils.checkpoint
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners import lora as peft_lora
from torch import nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from ..attention import IMPLEMENTATION, AttentionBackend, register_attention
from ..attention.choice import find_backend
from ..checkpoints.loading import LoadReport, check_weights, load_weights
from ..checkpoints.safetensors_files import SafetensorsCheckpoint
from ..lora.config import check_lora
from ..lora.initialization import init_lora
from ..lora.linear import LoraLinear
from ..quantization.nf4_linear import NF4Linear, can_be_4bit
from .activation_offload import check_offload
from .causal_lm import LanguageModelHead
from .decoder import Head, QLoRADecoder, specialize
from .decoder_layer import CheckpointChoice, recomputed_layers
from .families import family_of, layer_windows, load_config


def build_model(
    checkpoint: SafetensorsCheckpoint,
    lora: LoraConfig,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str | AttentionBackend = "sdpa",
    sliding_window: int | None = None,
    checkpoint_activations: CheckpointChoice = False,
    offload_activations: bool = False,
    head: Head = LanguageModelHead(),  # noqa: B008  frozen
) -> QLoRADecoder:
    """The model's structure on the meta device: 4-bit projections, what is trained in float32, the rest in ``dtype``.

    Whether a projection is 4-bit follows the checkpoint if that is quantized (some leave layers in 16 bit); all of
    them are if it is not.

    Args:
        checkpoint: The base model (only headers are read here).
        lora: The adapters, on any of the family's projections; on all of them if ``target_modules`` is ``None``.
        dtype: Of embeddings, norms and a frozen head.
        attention: What :func:`~lightning_qlora.modules.attention.choose_attention` chose, or its name.
        sliding_window: Attention window in tokens, the current one included, for a model without windows of its own.
        checkpoint_activations: Recompute all decoder layers in backward (non-reentrant), none, or the first so many.
            ``"auto"`` is for a memory plan to decide, and refused here.
        offload_activations: Keep the inputs of recomputed layers in host memory.
        head: What the model computes from the decoder's hidden states, and which of its modules are trained in full.

    Raises:
        ValueError: If the model's family is unknown, ``lora`` is not supported, a layer would stay unquantized that
            should not (a mixture of experts), or there is nothing to offload.
    """
    return build_structure(
        load_config(checkpoint.directory, vision=head.takes_images), lora, stored=checkpoint, dtype=dtype,
        attention=attention, sliding_window=sliding_window, checkpoint_activations=checkpoint_activations,
        offload_activations=offload_activations, head=head,
    )  # fmt: skip


def build_structure(
    config: PretrainedConfig,
    lora: LoraConfig,
    *,
    stored: SafetensorsCheckpoint | None = None,
    dtype: torch.dtype = torch.float32,
    attention: str | AttentionBackend = "sdpa",
    sliding_window: int | None = None,
    checkpoint_activations: CheckpointChoice = False,
    offload_activations: bool = False,
    head: Head = LanguageModelHead(),  # noqa: B008  frozen
) -> QLoRADecoder:
    """:func:`build_model` from a configuration alone, as :func:`~.families.load_config` returns it.

    Args:
        config: The model's; it is copied.
        lora: As of :func:`build_model`, like all that is not listed here.
        stored: The checkpoint whose format the projections get; ``None`` for NF4 with double quantization.
        dtype: As of :func:`build_model`.
        attention: As of :func:`build_model`.
        sliding_window: As of :func:`build_model`.
        checkpoint_activations: As of :func:`build_model`.
        offload_activations: As of :func:`build_model`.
        head: As of :func:`build_model`.

    Raises:
        ValueError: As :func:`build_model`.
    """
    check_offload(checkpoint_activations=checkpoint_activations, offload_activations=offload_activations)
    config = copy.deepcopy(config)
    family, windows = family_of(config), layer_windows(config, sliding_window)
    register_attention()
    config._attn_implementation = IMPLEMENTATION
    config.get_text_config().attention_window = sliding_window  # where masks are made, there is no model
    with torch.device("meta"):
        stock = family.model_class(config)
    model = specialize(stock, family, head, attention=find_backend(attention), windows=windows)
    _quantize(model, stored, dtype)
    _cast_unquantized(model, dtype)
    recomputed = recomputed_layers(checkpoint_activations, len(model.decoder.layers))
    if not isinstance(recomputed, int):
        raise ValueError("checkpoint_activations='auto' needs a memory plan, which gives a number: pass that.")
    model.checkpoint_layers(recomputed, offload=offload_activations)
    lora = head.with_targets(check_lora(lora, head.trained_modules), config)
    injected = copy.copy(lora)
    injected.modules_to_save = None  # what is trained in full is trained in place, without peft's copy
    injected._register_custom_module({nn.Linear: LoraLinear})  # documented, but experimental: hence the underscore
    inject_adapter_in_model(injected, model, low_cpu_mem_usage=True)
    for name, module in model.named_modules():
        if isinstance(module, peft_lora.LoraLayer) and not model.may_adapt(name):
            raise ValueError(
                f"LoRA target_modules {lora.target_modules} match {name!r}, which is not a projection of a decoder "
                f"layer{model.may_also_adapt}. Choose from {family.projections}."
            )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(model.is_trained(name))
        if model.is_trained(name):  # parts of vision-language models are built in the dtype of config.json
            parameter.data = parameter.data.float()
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"LoRA target_modules {lora.target_modules} match no layer. Choose from {family.projections}.")
    return model


def _quantize(model: QLoRADecoder, stored: SafetensorsCheckpoint | None, dtype: torch.dtype) -> None:
    """Replace linear layers below ``model.model`` by empty 4-bit ones: those that ``stored`` has in 4 bits, or, if it
    has none, those that ``model.quantizes``. What is trained in full stays."""
    of_text = {id(module) for module in model.decoder.modules()}
    for parent_name, parent in list(model.model.named_modules()):
        for attribute, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                name = ".".join(["model", *parent_name.split(".") * bool(parent_name), attribute, "weight"])
                # A vision tower's layer that cannot be packed stays: of Qwen2.5-VL, one of 3420 input features.
                if model.is_trained(name) or not (id(child) in of_text or can_be_4bit(child)):
                    continue
                state = None if stored is None else stored.quant_state(name)
                asked = model.quantizes(name) and (stored is None or not stored.is_quantized)
                if state is not None or asked:
                    setattr(parent, attribute, _projection(child, state, dtype))
    for name, parameter in model.decoder.named_parameters():
        if parameter.ndim > 2:
            raise ValueError(
                f"{name!r} has the shape {tuple(parameter.shape)}, as the experts of a mixture of experts do. Only "
                "linear layers are quantized here, so it would stay in 16 bits and fill the memory: mixtures of "
                "experts are not supported."
            )


def _projection(linear: nn.Linear, state: dict[str, Any] | None, dtype: torch.dtype) -> NF4Linear:
    """An empty 4-bit layer of the shape of ``linear``, in the checkpoint's format if that has one."""
    names = ("nested", "blocksize", "nested_blocksize", "quant_type")
    quantization = {} if state is None else {name: state[name] for name in names}
    return NF4Linear(
        linear.in_features, linear.out_features, linear.bias is not None, device="meta", dtype=dtype, **quantization
    )


def _cast_unquantized(model: QLoRADecoder, dtype: torch.dtype) -> None:
    quantized = {id(p) for m in model.modules() if isinstance(m, NF4Linear) for p in m.parameters(recurse=False)}
    for name, parameter in model.named_parameters():
        if id(parameter) not in quantized and not model.is_trained(name):
            parameter.data = parameter.data.to(dtype)


def materialize(
    model: QLoRADecoder, checkpoint: SafetensorsCheckpoint, device: torch.device, *, seed: int,
    parameters_on: torch.device | None = None,
) -> LoadReport:  # fmt: skip
    """Allocate a meta model (after ``fully_shard``, so only this rank's part), and load and initialise all of it.

    Args:
        model: From :func:`build_model`, sharded or not.
        checkpoint: The base model's weights.
        device: Where to compute, and where buffers live.
        seed: Of the initial values of what is trained, which do not depend on the number of ranks.
        parameters_on: Where parameters rest if not on ``device``: the CPU, when FSDP2 offloads them.

    Raises:
        ValueError: Before anything is allocated, if the checkpoint does not fill the model.
    """
    check_weights(model, checkpoint, skip=model.is_new)
    model.to_empty(device=parameters_on or device)
    restore_buffers(model, device)
    if parameters_on is not None and parameters_on != device:
        for module in model.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, buffer.to(device))
    model.tie_head()  # to_empty() unties them where FSDP does not hold them together
    report = load_weights(model, checkpoint, skip=model.is_new)
    init_lora(model, seed)
    model.init_trained(seed)
    if isinstance(model, PreTrainedModel) and (checkpoint.directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.directory)
    return report


def restore_buffers(model: Any, device: torch.device) -> None:
    """Compute the buffers of a model that are in no checkpoint, and which ``to_empty`` overwrites.

    Their modules may be compiled, so they stay. The embedding's scale (Gemma) is a plain number of the module.

    Raises:
        ValueError: If there is another such buffer.
    """
    for name, module in model.named_modules():
        computed: Any = None
        for buffer in sorted(module._non_persistent_buffers_set):
            if buffer in ("inv_freq", "original_inv_freq") or buffer.endswith("_inv_freq"):
                if computed is None:
                    with torch.device("cpu"):  # some of Lightning's strategies make the GPU the default, where
                        computed = type(module)(config=module.config)  # rounding differs
                value = computed.get_buffer(buffer)
            elif buffer == "position_ids":
                value = torch.arange(module.position_ids.shape[-1], device="cpu").expand(module.position_ids.shape)
            elif buffer == "embed_scale":
                value = torch.tensor(module.scalar_embed_scale)
            else:
                raise ValueError(
                    f"Buffer {buffer!r} of {name!r} is in no checkpoint, and how to compute it is unknown."
                )
            setattr(module, buffer, value.to(device))
