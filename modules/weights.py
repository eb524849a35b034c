"""Streaming weights from safetensors checkpoints into a (possibly sharded) model, quantizing on the way where needed.

Nothing is read twice and no rank ever holds more than one full tensor: a pre-quantized tensor is read row range by row
range, a 16-bit one is read whole, quantized (its nested statistics span all rows) and cut to the rank's rows.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lightning_qlora.modules.nf4_linear import (
    STORAGE_DTYPE,
    NF4Linear,
    Quantized4bit,
    as_storage,
    copy_local_rows,
    local_rows,
    local_tensor,
)

INDEX_NAME = "model.safetensors.index.json"


class SafetensorsCheckpoint:
    """Random access to the tensors of a directory's safetensors files.

    Every shard is opened and its header checked at construction, before anything is allocated elsewhere.

    Args:
        directory: A directory with ``model.safetensors``, or shards and their ``model.safetensors.index.json``.

    Raises:
        ValueError: If there are no safetensors files, a shard named by the index is missing, a file is truncated or
            not a safetensors file, or the index names a tensor that its shard does not hold.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._files = ExitStack()
        self._home: dict[str, Any] = {}
        index = self._read_index()
        if index is not None:
            missing = sorted({name for name in index.values() if not (self.directory / name).is_file()})
            if missing:
                raise ValueError(
                    f"{self.directory} lacks {', '.join(missing)}, which {INDEX_NAME} names. Download it again."
                )
            files = [self.directory / name for name in sorted(set(index.values()))]
        else:
            files = sorted(self.directory.glob("*.safetensors"))
            files = [f for f in files if not f.name.startswith("adapter_")]
        if not files:
            raise ValueError(
                f"{self.directory} holds no *.safetensors weights. Checkpoints in another format can be converted with "
                "transformers: AutoModelForCausalLM.from_pretrained(directory).save_pretrained(new_directory)."
            )
        for file in files:
            try:
                handle = self._files.enter_context(safe_open(str(file), framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{file} is damaged or not a safetensors file ({error}). Download it again."
                ) from error
            for name in handle.keys():  # noqa: SIM118 - not a mapping
                self._home[name] = handle
        absent = sorted(set(index or ()) - set(self._home))
        if absent:
            raise ValueError(
                f"{self.directory}: {INDEX_NAME} names {absent[0]!r}, but no shard holds it. Download it again."
            )
        self.files = files

    def _read_index(self) -> dict[str, str] | None:
        path = self.directory / INDEX_NAME
        if not path.is_file():
            return None
        try:
            weight_map = json.loads(path.read_text())["weight_map"]
            return {str(tensor): str(file) for tensor, file in weight_map.items()}
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is damaged ({error!r}). Download it again.") from error

    def __contains__(self, name: str) -> bool:
        return name in self._home

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def get(self, name: str) -> Tensor:
        """The whole tensor, on CPU.

        Raises:
            ValueError: If the checkpoint has no tensor of that name.
        """
        self._require(name)
        return self._home[name].get_tensor(name)  # type: ignore[no-any-return]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header alone."""
        self._require(name)
        return tuple(self._home[name].get_slice(name).get_shape())

    def bytes(self, name: str, start: int, stop: int) -> Tensor:
        """Bytes ``[start, stop)`` of a tensor that is one long column (as bitsandbytes saves packed weights): uint8."""
        self._require(name)
        column = self._home[name].get_slice(name)
        width = 1 if column.get_dtype() == "U8" else torch.empty((), dtype=_DTYPES[column.get_dtype()]).itemsize
        rows = column[start // width : math.ceil(stop / width)]
        flat: Tensor = rows.reshape(-1).view(torch.uint8)
        return flat[start - start // width * width :][: stop - start]

    def fingerprint(self) -> str:
        """16 hex digits that tell this model's weights from another's: the first mebibyte of each file."""
        digest = hashlib.sha256()
        for file in self.files:
            with file.open("rb") as stream:
                digest.update(file.stat().st_size.to_bytes(8, "little"))
                digest.update(stream.read(2**20))
        return digest.hexdigest()[:16]

    def close(self) -> None:
        """Unmap the files."""
        self._files.close()

    def _require(self, name: str) -> None:
        if name not in self._home:
            raise ValueError(f"{self.directory} has no tensor {name!r}: the checkpoint does not fit its config.json.")


_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


def prequantized_state(checkpoint: SafetensorsCheckpoint, weight_name: str) -> dict[str, Any] | None:
    """bitsandbytes' JSON description of a 4-bit tensor in ``checkpoint``, or ``None`` if it is stored unquantized."""
    for quant_type in ("nf4", "fp4"):
        key = f"{weight_name}.quant_state.bitsandbytes__{quant_type}"
        if key in checkpoint:
            state: dict[str, Any] = json.loads(bytes(checkpoint.get(key).tolist()))
            return {"nested_blocksize": 256, **state, "nested": f"{weight_name}.nested_absmax" in checkpoint}
    return None


@torch.no_grad()
def load_weights(model: nn.Module, checkpoint: SafetensorsCheckpoint, *, skip: tuple[str, ...] = ("lora_",)) -> None:
    """Fill the frozen weights of ``model`` from ``checkpoint``, each rank of a sharded model its own part.

    4-bit layers take a pre-quantized tensor as it is, and quantize an unquantized one on the layer's device. Everything
    else is converted to the dtype that the model's parameter has.

    Args:
        model: Materialized (not on the meta device), sharded or not. Names may carry peft's ``.base_layer``.
        checkpoint: The base model's tensors.
        skip: Parameters whose name contains one of these are left alone (the adapters).

    Raises:
        ValueError: If a tensor is missing or has another shape than the model's.
    """
    quantized: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, NF4Linear):
            _load_quantized(module, checkpoint, f"{_plain(name)}.weight")
            quantized.update(f"{name}.{part}" for part in ("weight", "absmax"))
    for name, parameter in model.named_parameters():  # visits a tied weight once, under its first name
        if name in quantized or any(part in name for part in skip):
            continue
        plain = _plain(name)
        _check_shape(checkpoint, plain, tuple(parameter.shape))
        _copy(parameter, checkpoint, plain)


def _plain(name: str) -> str:
    return name.replace(".base_layer", "")


def _check_shape(checkpoint: SafetensorsCheckpoint, name: str, expected: tuple[int, ...]) -> None:
    found = checkpoint.shape(name)
    if found != expected:
        raise ValueError(f"{checkpoint.directory}: {name!r} has shape {found}, but config.json implies {expected}.")


def _copy(parameter: Tensor, checkpoint: SafetensorsCheckpoint, name: str) -> None:
    copy_local_rows(parameter, checkpoint.get(name).to(parameter.dtype))


def _load_quantized(layer: NF4Linear, checkpoint: SafetensorsCheckpoint, name: str) -> None:
    if layer.bias is not None:
        _copy(layer.bias, checkpoint, name.removesuffix("weight") + "bias")
    state = prequantized_state(checkpoint, name)
    if state is None:
        _check_shape(checkpoint, name, (layer.out_features, layer.in_features))
        device = layer.code2.device if layer.code2 is not None else layer.weight.device
        weight = checkpoint.get(name).to(device)
        layer.load_quantized(
            Quantized4bit.quantize(weight, nested=layer.nested, blocksize=layer.blocksize, quant_type=layer.quant_type)
        )
        return
    expected = (layer.out_features, layer.in_features)
    if tuple(state["shape"]) != expected:
        raise ValueError(
            f"{checkpoint.directory}: {name!r} has shape {state['shape']}, but config.json implies {expected}."
        )
    row_bytes = layer.in_features // 2
    start, stop = local_rows(layer.weight)
    local = local_tensor(layer.weight)
    local.copy_(
        checkpoint.bytes(name, start * row_bytes, stop * row_bytes).clone().view(STORAGE_DTYPE).view(local.shape)
    )
    absmax = checkpoint.get(f"{name}.absmax")
    if layer.nested:
        absmax = as_storage(absmax)
        layer.get_buffer("code2").copy_(checkpoint.get(f"{name}.nested_quant_map"))
        layer.get_buffer("absmax2").copy_(checkpoint.get(f"{name}.nested_absmax"))
        layer.get_buffer("offset").fill_(state["nested_offset"])
    copy_local_rows(layer.absmax, absmax)
