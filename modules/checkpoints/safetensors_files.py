"""Random access to the tensors of a directory's safetensors files, bitsandbytes' 4-bit format included.

Files are read, not mapped, because pages of a mapped file count as the process's memory.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX_NAME = "model.safetensors.index.json"

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
