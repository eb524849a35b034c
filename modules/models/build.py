"""From a checkpoint to a trainable model: structure on the meta device, 4-bit layers, LoRA, then the weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.utils.checkpoint
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners import lora as peft_lora
from torch import nn
from transformers import GenerationConfig

from ..attention import IMPLEMENTATION, AttentionBackend, register_attention
from ..attention.choice import find_backend
from ..checkpoints.config import load_config
from ..checkpoints.loading import LoadReport, check_weights, load_weights
from ..checkpoints.safetensors_files import SafetensorsCheckpoint
from ..lora.config import LLAMA_PROJECTIONS, check_lora
from ..lora.initialization import init_lora
from ..lora.linear import LoraLinear
from ..quantization.nf4_linear import NF4Linear
from .activation_offload import check_offload
from .causal_lm import Float32RotaryEmbedding, QLoRALlamaForCausalLM


def build_model(
    checkpoint: SafetensorsCheckpoint,
    lora: LoraConfig,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str | AttentionBackend = "sdpa",
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
        attention: What :func:`~lightning_qlora.modules.attention.choose_attention` chose, or its name.
        sliding_window: How many tokens one sees, itself included; ``None`` for all before it.
        checkpoint_activations: Recompute each decoder layer in backward (non-reentrant).
        offload_activations: Keep the inputs of recomputed layers in host memory.

    Raises:
        ValueError: If the model is not a Llama, ``lora`` is not supported, or there is nothing to offload.
    """
    check_offload(checkpoint_activations=checkpoint_activations, offload_activations=offload_activations)
    config = load_config(checkpoint.directory)
    register_attention()
    config._attn_implementation = IMPLEMENTATION
    config.attention_window = sliding_window  # where masks are made, there is no model
    with torch.device("meta"):
        model = QLoRALlamaForCausalLM(config)
    model.attention_backend = find_backend(attention)
    for parent_name, parent in list(model.model.named_modules()):
        for attribute, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                name = f"model.{parent_name}.{attribute}.weight"
                state = checkpoint.quant_state(name)
                if state is not None or not checkpoint.is_quantized:
                    setattr(parent, attribute, _projection(child, state, dtype))
    _cast_unquantized(model, dtype)
    for layer in model.model.layers:
        layer.self_attn.attention_window = sliding_window
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
        model: From :func:`build_model`, sharded or not.
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
        rotary = Float32RotaryEmbedding(config=model.config)
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
