"""Streaming a checkpoint's weights into a (possibly sharded) model, quantizing on the way where needed.

A rank reads its own rows, a few megabytes at a time. Only a projection stored in 16 bits is read whole, because the
nested statistics of its quantization span all rows; it is quantized on the layer's device and cut to the rank's rows.
And a head stored in 4 bits, which is dequantized.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.nf4 import Quantized4bit
from ..dtensor import local_rows, local_tensor
from ..quantization.nf4_linear import STORAGE_DTYPE, NF4Linear, as_storage
from .safetensors_files import SafetensorsCheckpoint

#: Bytes read at once: much fewer, and calls dominate; more, and malloc maps and clears each buffer anew.
CHUNK_BYTES = 2**24


@dataclass(frozen=True)
class LoadReport:
    """What loading took.

    Attributes:
        seconds: From the first read to the last copy, as the host saw it.
        bytes_read: What this rank read of the checkpoint.
    """

    seconds: float
    bytes_read: int


def _nothing(name: str) -> bool:
    return False


def check_weights(
    model: nn.Module, checkpoint: SafetensorsCheckpoint, *, skip: Callable[[str], bool] = _nothing
) -> None:
    """Check from headers alone that ``checkpoint`` is what fills ``model``, which may be on the meta device still.

    Every tensor is accounted for: see :meth:`SafetensorsCheckpoint.check_filled`.

    Args:
        model: As for :func:`load_weights`. Its ``unused_weights``, if it has any, name what it leaves out.
        checkpoint: The base model's tensors.
        skip: As for :func:`load_weights`.

    Raises:
        ValueError: If a tensor is missing or left over, or its shape or size is not what the model's implies.
    """
    targets = dict(_targets(model, skip))
    for name, target in targets.items():
        if name not in checkpoint:
            continue  # named below, with all others
        expected = (target.out_features, target.in_features) if isinstance(target, NF4Linear) else tuple(target.shape)
        state = checkpoint.quant_state(name)
        _check(checkpoint, name, "shape", checkpoint.shape(name) if state is None else tuple(state["shape"]), expected)
        if state is None or not isinstance(target, NF4Linear):
            continue
        sizes = {"": math.prod(expected) // 2, ".absmax": target.num_blocks * (1 if target.nested else 4)}
        if target.nested:
            sizes[".nested_absmax"] = target.get_buffer("absmax2").nbytes
            sizes[".nested_quant_map"] = target.get_buffer("code2").nbytes
        for part, size in sizes.items():
            _check(checkpoint, name + part, "size in bytes", checkpoint.nbytes(name + part), size)
    tied = bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
    checkpoint.check_filled(targets, tied_head=tied, unused=getattr(model, "unused_weights", ()))


@torch.no_grad()
def load_weights(
    model: nn.Module, checkpoint: SafetensorsCheckpoint, *, skip: Callable[[str], bool] = _nothing
) -> LoadReport:
    """Fill the frozen weights of ``model`` from ``checkpoint``, each rank of a sharded model its own part.

    4-bit layers take a pre-quantized tensor as it is, and quantize an unquantized one on the layer's device. Everything
    else is converted to the dtype that the model's parameter has.

    Args:
        model: Materialized (not on the meta device), sharded or not. Names may carry peft's ``.base_layer``.
        checkpoint: The base model's tensors.
        skip: Says of a parameter's name whether it is left alone, because the checkpoint does not hold it (adapters).

    Raises:
        ValueError: As :func:`check_weights`, before anything is read.
    """
    check_weights(model, checkpoint, skip=skip)
    start, before = perf_counter(), checkpoint.bytes_read
    for name, target in _targets(model, skip):
        if isinstance(target, NF4Linear):
            _load_quantized(target, checkpoint, name)
        else:
            _copy(target, checkpoint, name)
    return LoadReport(perf_counter() - start, checkpoint.bytes_read - before)


def _targets(model: nn.Module, skip: Callable[[str], bool]) -> Iterator[tuple[str, Tensor | NF4Linear]]:
    """What is to be filled, under the checkpoint's names: 4-bit layers, then the other parameters."""
    quantized: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, NF4Linear):
            quantized |= {f"{name}.weight", f"{name}.absmax"}
            yield f"{_plain(name)}.weight", module
    for name, parameter in model.named_parameters():  # visits a tied weight once, under its first name
        if name not in quantized and not skip(name):
            yield _plain(name), parameter


def _plain(name: str) -> str:
    # Before some version of transformers 5, CLIP's and SigLIP's towers had their parts one level deeper.
    return name.replace(".base_layer", "").replace("model.vision_tower.vision_model.", "model.vision_tower.")


def _check(checkpoint: SafetensorsCheckpoint, name: str, what: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise ValueError(f"{checkpoint.directory}: {name!r} has {what} {found}, but config.json implies {expected}.")


def _copy(parameter: Tensor, checkpoint: SafetensorsCheckpoint, name: str) -> None:
    """Read this rank's rows of a parameter, and convert them to its dtype. A 4-bit head is dequantized."""
    start, stop = local_rows(parameter)
    local = local_tensor(parameter)
    if checkpoint.quant_state(name) is not None:
        local.copy_(checkpoint.dense(name)[start:stop])
        return
    step = _chunk_rows(checkpoint.nbytes(name) // max(parameter.shape[0], 1))
    for row in range(start, stop, step):
        rows = checkpoint.rows(name, row, min(row + step, stop))
        local[row - start :][: len(rows)].copy_(rows)


def _chunk_rows(row_bytes: int) -> int:
    return max(1, CHUNK_BYTES // max(row_bytes, 1))


def _load_quantized(layer: NF4Linear, checkpoint: SafetensorsCheckpoint, name: str) -> None:
    state = checkpoint.quant_state(name)
    if state is None:
        device = layer.code2.device if layer.code2 is not None else layer.weight.device
        weight = checkpoint.get(name).to(device)
        layer.load_quantized(
            Quantized4bit.quantize(weight, nested=layer.nested, blocksize=layer.blocksize, quant_type=layer.quant_type)
        )
        return
    for parameter, stored in ((layer.weight, name), (layer.absmax, f"{name}.absmax")):
        _copy_bytes(parameter, checkpoint, stored)
    if layer.nested:
        layer.get_buffer("code2").copy_(checkpoint.get(f"{name}.nested_quant_map"))
        layer.get_buffer("absmax2").copy_(checkpoint.get(f"{name}.nested_absmax"))
        layer.get_buffer("offset").fill_(state["nested_offset"])


def _copy_bytes(parameter: Tensor, checkpoint: SafetensorsCheckpoint, name: str) -> None:
    """Read this rank's rows of a parameter that stores bytes as ``STORAGE_DTYPE``, the last padded with zeros."""
    start, stop = local_rows(parameter)
    local = local_tensor(parameter)
    row_bytes = parameter[:1].numel() * STORAGE_DTYPE.itemsize
    step = _chunk_rows(row_bytes)
    for row in range(start, stop, step):
        end = min(row + step, stop)
        stored = as_storage(checkpoint.bytes(name, row * row_bytes, end * row_bytes))
        local[row - start : end - start].copy_(stored.view(end - row, *local.shape[1:]))
