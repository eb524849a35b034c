"""LoRA adapters to and from the files of peft: ``adapter_config.json`` and ``adapter_model.safetensors``.

A head that is trained in full is in the same file; ``modules_to_save`` names it.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..accounting import check_accounted
from ..dtensor import copy_local_rows
from .config import read_adapter_config

WEIGHTS_NAME = "adapter_model.safetensors"


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The full trained tensors on CPU under peft's file keys. Gathers sharded ones: all ranks must call it."""
    state = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            state[_peft_key(name)] = full.detach().cpu().contiguous()
    return state


def save_adapter(
    model: nn.Module, directory: str | Path, lora: LoraConfig, base_name: str, *, write: bool = True
) -> None:
    """Write the adapters of ``model`` as a directory that ``peft.PeftModel.from_pretrained`` loads.

    Args:
        model: With LoRA injected by peft, sharded or not. All ranks must call this.
        directory: Made if absent; an adapter in it is replaced.
        lora: The configuration that the adapters were made from.
        base_name: ``base_model_name_or_path`` of the saved configuration.
        write: Whether this rank writes (exactly one should).
    """
    state = adapter_state(model)
    if not write:
        return
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(lora)
    config.base_model_name_or_path = base_name
    config.inference_mode = True
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)  # equal runs then write equal files
    temporary = directory / f".{WEIGHTS_NAME}.tmp"
    save_file(state, temporary, metadata={"format": "pt"})
    config.save_pretrained(directory)
    temporary.replace(directory / WEIGHTS_NAME)


@torch.no_grad()
def load_adapter(model: nn.Module, directory: str | Path, lora: LoraConfig) -> None:
    """Copy a saved peft adapter into what is trained of ``model``; each rank of a sharded model takes its rows.

    Raises:
        ValueError: If the directory holds no adapter, it is damaged, or its rank, alpha or layers are not the model's.
    """
    state = read_adapter(directory, lora)
    parameters = {_peft_key(name): p for name, p in model.named_parameters() if p.requires_grad}
    check_accounted(
        f"Adapter {directory}", wanted=parameters, held=state,
        remedy="It does not adapt the same layers as this run: use its own target_modules.",
    )  # fmt: skip
    for key, parameter in parameters.items():
        if tuple(state[key].shape) != tuple(parameter.shape):
            raise ValueError(
                f"Adapter {directory}: {key!r} has shape {tuple(state[key].shape)}, not {tuple(parameter.shape)}."
            )
        copy_local_rows(parameter, state[key])


def read_adapter(directory: str | Path, lora: LoraConfig) -> dict[str, Tensor]:
    """Read an adapter's tensors after checking that it is plain LoRA of the rank and alpha of ``lora``.

    Raises:
        ValueError: If there is no adapter, it is damaged or not plain LoRA (see :func:`check_plain_lora`), or its r or
            alpha differ, in all layers or in some.
    """
    directory = Path(directory)
    config = read_adapter_config(directory, trained_modules=lora.modules_to_save or ())
    if not (directory / WEIGHTS_NAME).is_file():
        raise ValueError(f"{directory} holds no LoRA adapter of peft: {WEIGHTS_NAME} is missing.")
    try:
        stored: dict[str, Tensor] = load_file(directory / WEIGHTS_NAME)
    except SafetensorError as error:
        raise ValueError(f"The adapter in {directory} is damaged: {error}.") from error
    state = {name.replace("_orig_mod.", ""): tensor for name, tensor in stored.items()}  # as a compiled model saves it
    for option in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"):
        theirs, mine = getattr(config, option, None), getattr(lora, option)
        if theirs != mine:
            raise ValueError(
                f"The adapter in {directory} has {option}={theirs}, this run {option}={mine}. Use the same."
            )
    return state


def _peft_key(name: str) -> str:
    return "base_model.model." + name.replace(".default.", ".")
