"""Streaming weights from safetensors checkpoints into a (possibly sharded) model, quantizing on the way where needed.

Files are read, not mapped, for pages of a mapped file count as the process's memory. A rank reads its own rows, a few
megabytes at a time. Only a projection stored in 16 bits is read whole, because the nested statistics of its
quantization span all rows; it is quantized on the layer's device and cut to the rank's rows.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lightning_qlora.modules.nf4_linear import (
    STORAGE_DTYPE,
    NF4Linear,
    Quantized4bit,
    as_storage,
    local_rows,
    local_tensor,
)

INDEX_NAME = "model.safetensors.index.json"

#: Bytes read at once: much fewer, and calls dominate; more, and malloc maps and clears each buffer anew.
CHUNK_BYTES = 2**24

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies: ``nbytes`` bytes at ``offset`` of ``stream``."""

    stream: BufferedReader
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


class SafetensorsCheckpoint:
    """Random access to the tensors of a directory's safetensors files.

    Every shard is opened and its header checked at construction, before anything is allocated elsewhere.

    Args:
        directory: A directory with ``model.safetensors``, or shards and their ``model.safetensors.index.json``.

    Attributes:
        files: The safetensors files.
        bytes_read: Bytes of tensors read so far.

    Raises:
        ValueError: If there are no safetensors files, a shard named by the index is missing, a file is truncated or
            not a safetensors file, or the index names a tensor that its shard does not hold.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.bytes_read = 0
        self._open = ExitStack()
        self._stored: dict[str, _Stored] = {}
        self._quant_states: dict[str, dict[str, Any] | None] = {}
        index = self._read_index()
        if index is not None:
            missing = sorted({name for name in index.values() if not (self.directory / name).is_file()})
            if missing:
                raise ValueError(
                    f"{self.directory} lacks {', '.join(missing)}, which {INDEX_NAME} names. Download it again."
                )
            self.files = [self.directory / name for name in sorted(set(index.values()))]
        else:
            files = sorted(self.directory.glob("*.safetensors"))
            self.files = [f for f in files if not f.name.startswith("adapter_")]
        if not self.files:
            raise ValueError(
                f"{self.directory} holds no *.safetensors weights. Checkpoints in another format can be converted with "
                "transformers: AutoModelForCausalLM.from_pretrained(directory).save_pretrained(new_directory)."
            )
        for file in self.files:
            held = self._read_header(file)
            for name in sorted(name for name, shard in (index or {}).items() if shard == file.name):
                if name not in held:
                    raise ValueError(f"{file} does not hold {name!r}, as {INDEX_NAME} says. Download it again.")
            self._stored |= held

    def _read_index(self) -> dict[str, str] | None:
        path = self.directory / INDEX_NAME
        if not path.is_file():
            return None
        try:
            weight_map = json.loads(path.read_text())["weight_map"]
            return {str(tensor): str(file) for tensor, file in weight_map.items()}
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is damaged ({error!r}). Download it again.") from error

    def _read_header(self, file: Path) -> dict[str, _Stored]:
        try:
            with safe_open(str(file), framework="pt"):  # the library's checks of the header and of the file's length
                stream = self._open.enter_context(file.open("rb"))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is damaged or not a safetensors file ({error}). Download it again.") from error
        # The format, https://github.com/huggingface/safetensors#format: the header's length, JSON, then the tensors.
        length = int.from_bytes(stream.read(8), "little")
        header: dict[str, Any] = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        stored = {}
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            stored[name] = _Stored(stream, 8 + length + start, stop - start, entry["dtype"], tuple(entry["shape"]))
        return stored

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def get(self, name: str) -> Tensor:
        """The whole tensor, on CPU, in memory of its own.

        Raises:
            ValueError: If the checkpoint has no tensor of that name, or stores it in a dtype that is not supported.
        """
        return self.bytes(name).view(self._dtype(name)).view(self.shape(name))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``[start, stop)`` of a tensor of one dimension or more, on CPU; reads nothing else.

        Raises:
            ValueError: As :meth:`get`.
        """
        shape = self.shape(name)
        row = self.nbytes(name) // max(shape[0], 1)
        return self.bytes(name, start * row, stop * row).view(self._dtype(name)).view(-1, *shape[1:])

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header alone."""
        return self._find(name).shape

    def nbytes(self, name: str) -> int:
        """The size of a tensor in bytes, from the header alone."""
        return self._find(name).nbytes

    def bytes(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Bytes ``[start, stop)`` of a tensor, as of a slice: uint8 [stop - start], whatever its dtype.

        Raises:
            ValueError: If the checkpoint has no tensor of that name, or its file has shrunk since it was opened.
        """
        stored = self._find(name)
        start, stop, _ = slice(start, stop).indices(stored.nbytes)
        # Also under torch.device("cuda"), as Lightning builds models with some strategies.
        data = torch.empty(max(0, stop - start), dtype=torch.uint8, device="cpu")
        stored.stream.seek(stored.offset + start)
        if stored.stream.readinto(data.numpy().data) != data.numel():
            raise ValueError(f"{stored.stream.name} has become shorter: {name!r} cannot be read. Download it again.")
        self.bytes_read += data.numel()
        return data

    @functools.cached_property
    def is_quantized(self) -> bool:
        """Whether any tensor is stored in bitsandbytes' 4-bit format."""
        return any(".quant_state.bitsandbytes__" in name for name in self)

    def quant_state(self, name: str) -> dict[str, Any] | None:
        """bitsandbytes' JSON description of a 4-bit tensor, read once, or ``None`` if it is stored unquantized.

        Raises:
            ValueError: If the description is damaged or incomplete.
        """
        if name not in self._quant_states:
            self._quant_states[name] = self._read_quant_state(name)
        return self._quant_states[name]

    def _read_quant_state(self, name: str) -> dict[str, Any] | None:
        for quant_type in ("nf4", "fp4"):
            key = f"{name}.quant_state.bitsandbytes__{quant_type}"
            if key in self:
                nested = f"{name}.nested_absmax" in self
                try:
                    state: dict[str, Any] = json.loads(bytes(self.get(key).tolist()))
                    missing = {"shape", "blocksize", "quant_type", *["nested_offset"] * nested} - state.keys()
                except (ValueError, AttributeError) as error:
                    raise ValueError(f"{self.directory}: {key!r} is damaged ({error}). Download it again.") from error
                if missing:
                    raise ValueError(f"{self.directory}: {key!r} lacks {sorted(missing)}. Quantize the model again.")
                return {"nested_blocksize": 256, **state, "nested": nested}
        return None

    def fingerprint(self) -> str:
        """16 hex digits that tell this model's weights from others', a finetune's of it among them.

        Of the first mebibyte of each file, which describes all tensors, and 4 KiB from the middle of each tensor.
        """
        digest = hashlib.sha256()
        for file in self.files:
            with file.open("rb") as stream:
                digest.update(file.stat().st_size.to_bytes(8, "little"))
                digest.update(stream.read(2**20))
        for _, stored in sorted(self._stored.items()):
            stored.stream.seek(stored.offset + max(0, stored.nbytes - 4096) // 2)
            digest.update(stored.stream.read(min(stored.nbytes, 4096)))
        return digest.hexdigest()[:16]

    def close(self) -> None:
        """Close the files."""
        self._open.close()

    def _find(self, name: str) -> _Stored:
        if name not in self._stored:
            raise ValueError(f"{self.directory} has no tensor {name!r}: the checkpoint does not fit its config.json.")
        return self._stored[name]

    def _dtype(self, name: str) -> torch.dtype:
        stored = self._find(name).dtype
        if stored not in _DTYPES:
            raise ValueError(f"{self.directory}: {name!r} is stored as {stored}; supported are {', '.join(_DTYPES)}.")
        return _DTYPES[stored]


@dataclass(frozen=True)
class LoadReport:
    """What loading took.

    Attributes:
        seconds: From the first read to the last copy, as the host saw it.
        bytes_read: What this rank read of the checkpoint.
    """

    seconds: float
    bytes_read: int


def check_weights(model: nn.Module, checkpoint: SafetensorsCheckpoint, *, skip: tuple[str, ...] = ("lora_",)) -> None:
    """Check from headers alone that ``checkpoint`` fills ``model``, which may be on the meta device still.

    Args:
        model: As for :func:`load_weights`.
        checkpoint: The base model's tensors.
        skip: As for :func:`load_weights`.

    Raises:
        ValueError: If a tensor is missing, or its shape or size is not what the model's implies.
    """
    for name, target in _targets(model, skip):
        if not isinstance(target, NF4Linear):
            _check(checkpoint, name, "shape", checkpoint.shape(name), tuple(target.shape))
            continue
        expected = (target.out_features, target.in_features)
        state = checkpoint.quant_state(name)
        if state is None:
            _check(checkpoint, name, "shape", checkpoint.shape(name), expected)
            continue
        _check(checkpoint, name, "shape", tuple(state["shape"]), expected)
        sizes = {"": math.prod(expected) // 2, ".absmax": target.num_blocks * (1 if target.nested else 4)}
        if target.nested:
            sizes[".nested_absmax"] = target.get_buffer("absmax2").nbytes
            sizes[".nested_quant_map"] = target.get_buffer("code2").nbytes
        for part, size in sizes.items():
            _check(checkpoint, name + part, "size in bytes", checkpoint.nbytes(name + part), size)


@torch.no_grad()
def load_weights(
    model: nn.Module, checkpoint: SafetensorsCheckpoint, *, skip: tuple[str, ...] = ("lora_",)
) -> LoadReport:
    """Fill the frozen weights of ``model`` from ``checkpoint``, each rank of a sharded model its own part.

    4-bit layers take a pre-quantized tensor as it is, and quantize an unquantized one on the layer's device. Everything
    else is converted to the dtype that the model's parameter has.

    Args:
        model: Materialized (not on the meta device), sharded or not. Names may carry peft's ``.base_layer``.
        checkpoint: The base model's tensors.
        skip: Parameters whose name contains one of these are left alone (the adapters).

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


def _targets(model: nn.Module, skip: tuple[str, ...]) -> Iterator[tuple[str, Tensor | NF4Linear]]:
    """What is to be filled, under the checkpoint's names: 4-bit layers, then the other parameters."""
    quantized: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, NF4Linear):
            quantized |= {f"{name}.weight", f"{name}.absmax"}
            yield f"{_plain(name)}.weight", module
    for name, parameter in model.named_parameters():  # visits a tied weight once, under its first name
        if name not in quantized and not any(part in name for part in skip):
            yield _plain(name), parameter


def _plain(name: str) -> str:
    return name.replace(".base_layer", "")


def _check(checkpoint: SafetensorsCheckpoint, name: str, what: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise ValueError(f"{checkpoint.directory}: {name!r} has {what} {found}, but config.json implies {expected}.")


def _copy(parameter: Tensor, checkpoint: SafetensorsCheckpoint, name: str) -> None:
    """Read this rank's rows of a parameter, and convert them to its dtype."""
    start, stop = local_rows(parameter)
    local = local_tensor(parameter)
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
