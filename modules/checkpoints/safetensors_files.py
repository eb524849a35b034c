"""Random access to the tensors of a directory's safetensors files, bitsandbytes' 4-bit format included.

Files are read, not mapped, because pages of a mapped file count as the process's memory.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...kernels.nf4 import TABLES, Quantized4bit, dequantize_4bit
from ..accounting import Unused, check_accounted, left_over
from .config import ONLY_BITSANDBYTES
from .vision_names import EMBEDDINGS, renamed

WEIGHTS_NAME = "model.safetensors"

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

#: What a weight may be stored as if it is not packed in 4 bits. Anything else is codes of some quantization.
_FLOATS = ("F16", "BF16", "F32", "F64")

#: Which quantization ends a tensor's name so.
_SCHEMES = {
    ".SCB": "bitsandbytes in 8 bits (LLM.int8)",
    ".weight_format": "bitsandbytes in 8 bits (LLM.int8)",
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "compressed-tensors or FP8",
    ".weight_scale_inv": "FP8",
    ".W_q": "HQQ",
    ".codebooks": "AQLM",
    ".scales": "GPTQ, AWQ or MLX",
}

_KNOWN_UNUSED = (
    Unused(r"(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)", "computed from config.json"),
    Unused(r"(.*\.)?embeddings\.position_ids", "the numbers from 0, which older versions saved"),
    Unused(r"(.*\.)?self_attn\.(bias|masked_bias|causal_mask)", "the causal mask, which older versions saved"),
)

_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies: ``nbytes`` bytes at ``offset`` of ``stream``."""

    stream: BufferedReader
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


def how_to_convert(source: str | Path) -> str:
    """What to do about weights in another format than safetensors, ``source`` being their directory or hub name."""
    return (
        "Weights in another format (pytorch_model.bin) are converted once by transformers: "
        'python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
        f"name, new = '{source}', 'converted'; M.from_pretrained(name, dtype='auto').save_pretrained(new); "
        'T.from_pretrained(name).save_pretrained(new)". Then pass --model converted.'
    )


class SafetensorsCheckpoint:
    """Random access to the tensors of a directory's safetensors files.

    Every shard is opened and its header checked at construction, before anything is allocated elsewhere. Names are
    those of transformers' causal language models: ``_orig_mod.``, which a compiled model writes into them, is left out,
    and ``model.`` added to those of a bare decoder. Those of vision-language models are brought into one form,
    whichever version of transformers wrote them: see :mod:`.vision_names`.

    Args:
        directory: A directory with ``model.safetensors``, or shards and their ``model.safetensors.index.json``.

    Attributes:
        files: The safetensors files.
        bytes_read: Bytes of tensors read so far.

    Raises:
        ValueError: If there are no safetensors files, a shard named by the index is missing, a file is truncated or
            not a safetensors file, the index names a tensor that its shard does not hold, or weights are quantized
            otherwise than in bitsandbytes' 4 bits.
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
            whole = [f for f in files if f.name == WEIGHTS_NAME]  # beside it, Mistral has the same in another form
            self.files = whole or [f for f in files if not f.name.startswith("adapter_")]
        if not self.files:
            raise ValueError(f"{self.directory} holds no *.safetensors weights. {how_to_convert(self.directory)}")
        for file in self.files:
            held = self._read_header(file)
            for name in sorted(name for name, shard in (index or {}).items() if shard == file.name):
                if name not in held:
                    raise ValueError(f"{file} does not hold {name!r}, as {INDEX_NAME} says. Download it again.")
            self._stored |= held
        if index and WEIGHTS_NAME not in index.values() and (self.directory / WEIGHTS_NAME).is_file():
            raise ValueError(
                f"{self.directory} holds two models: {WEIGHTS_NAME}, and the shards that {INDEX_NAME} names. "
                "transformers would read the first. Remove one of them."
            )
        self._rename()
        self._refuse_other_quantizations()

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

    def _rename(self) -> None:
        """Name tensors as transformers' causal language models do."""
        plain = {name: name.replace("_orig_mod.", "") for name in self._stored}
        model_type = self._model_type()
        if (new := renamed(model_type, plain)) is not None:
            plain = new
        elif not any(name.startswith("model.") for name in plain.values()):
            decoder = ("embed_tokens.", "layers.", "norm.")
            plain = {name: f"model.{new}" if new.startswith(decoder) else new for name, new in plain.items()}
        if len(set(plain.values())) < len(plain):
            raise ValueError(
                f"{self.directory} holds tensors twice, with and without '_orig_mod.' in their names, which a compiled "
                "model writes there. Save the model again, uncompiled (model._orig_mod)."
            )
        self._stored = {plain[name]: stored for name, stored in self._stored.items()}

    def _model_type(self) -> str | None:
        """Of ``config.json``, where there is one that says."""
        path = self.directory / "config.json"
        try:
            config = json.loads(path.read_text()) if path.is_file() else {}
        except (json.JSONDecodeError, UnicodeDecodeError):
            return None  # whoever needs more of it says so
        return config.get("model_type") if isinstance(config, dict) else None

    def _refuse_other_quantizations(self) -> None:
        for name, stored in self._stored.items():
            scheme = next((scheme for suffix, scheme in _SCHEMES.items() if name.endswith(suffix)), None)
            codes = name.endswith((".weight", ".bias")) and stored.dtype not in _FLOATS
            if codes and self.quant_state(name) is None:
                scheme = scheme or f"something that stores them as {stored.dtype}"
            elif scheme is None:
                continue
            raise ValueError(f"{self.directory} holds weights quantized by {scheme} ({name!r}). {ONLY_BITSANDBYTES}")

    def check_filled(self, wanted: Iterable[str], *, tied_head: bool = False, unused: Iterable[str] = ()) -> None:
        """Check from headers that a model's tensors are all there and that none is left over.

        What may be left over: rotary frequencies and causal masks, and the head's weight where it is the embedding's.
        The parts of a 4-bit tensor belong to it.

        Args:
            wanted: Names of the model's parameters.
            tied_head: Whether the model's head shares the embedding's weight.
            unused: Names of what the model leaves out knowingly, such as the head that a classifier replaces.

        Raises:
            ValueError: Naming what is missing and what nobody takes; or if a head that should be the embedding is not.
        """
        wanted = {*wanted, *(name for name in unused if name in self)}
        if tied_head and _HEAD in self and _HEAD not in wanted:
            self._check_tied()
            wanted.add(_HEAD)
        held = set(self) - {part for name in wanted if name in self for part in self._parts(name)}
        unused = left_over(wanted, held, _KNOWN_UNUSED)
        remedy = "config.json and the weights are not of one model: take both from the same place."
        if unused and all(name.endswith(".bias") for name in unused):
            remedy = "Those are biases: set attention_bias or mlp_bias to true in config.json, if this family has it."
        elif any("lora_" in name or ".base_layer." in name for name in unused):
            remedy = "Those are of a peft model saved with its base: save it after merge_and_unload()."
        check_accounted(self.directory, wanted=wanted, held=held, known=_KNOWN_UNUSED, remedy=remedy)

    def _parts(self, name: str) -> list[str]:
        """The other tensors of a 4-bit one: scales, tables and description; none of another."""
        if (state := self.quant_state(name)) is None:
            return []
        parts = ["absmax", "quant_map", f"quant_state.bitsandbytes__{state['quant_type']}"]
        return [f"{name}.{part}" for part in parts + ["nested_absmax", "nested_quant_map"] * state["nested"]]

    def _check_tied(self) -> None:
        name = self.embedding
        head, embedding = self._find(_HEAD), self._find(name)
        same = (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
        step = max(1, head.nbytes // 16)
        # 16 samples are enough, because heads that were trained apart differ everywhere.
        samples = [(start, start + 4096) for start in range(0, head.nbytes, step)]
        same = same and all(torch.equal(self.bytes(_HEAD, *s), self.bytes(name, *s)) for s in samples)
        if not same:
            raise ValueError(
                f"{self.directory} holds {_HEAD!r}, which is not {name!r} although config.json ties them. Set "
                "tie_word_embeddings to false in config.json if the head was trained on its own; else remove it."
            )

    @property
    def embedding(self) -> str:
        """The name of the language model's embedding."""
        return next((name for name in EMBEDDINGS if name in self), EMBEDDINGS[0])

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

    def dense(self, name: str) -> Tensor:
        """The whole tensor as numbers: in the dtype that is stored, or float32 if that is 4-bit.

        Raises:
            ValueError: As :meth:`get`, and for codes of another quantization.
        """
        state = self.quant_state(name)
        if state is None:
            if self._find(name).dtype not in _FLOATS:
                raise ValueError(f"{self.directory}: {name!r} is stored as {self._find(name).dtype}, not as numbers.")
            return self.get(name)
        nested = state["nested"]
        quantized = Quantized4bit(
            self.bytes(name),
            self.get(f"{name}.absmax"),
            self.get(f"{name}.nested_quant_map") if nested else None,
            self.get(f"{name}.nested_absmax") if nested else None,
            torch.tensor(state["nested_offset"]) if nested else None,
            torch.Size(state["shape"]),
            state["blocksize"],
            state["nested_blocksize"],
            quant_type=state["quant_type"],
        )
        return dequantize_4bit(quantized, dtype=torch.float32)

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
                self._check_table(name, quant_type)
                return {"nested_blocksize": 256, **state, "nested": nested}
        return None

    def _check_table(self, name: str, quant_type: str) -> None:
        """Refuse codes that stand for other values than those of NF4 or FP4."""
        table = f"{name}.quant_map"
        if table in self and not torch.allclose(self.get(table).float(), torch.tensor(TABLES[quant_type])):
            raise ValueError(f"{self.directory}: {table!r} is not the table of {quant_type}. {ONLY_BITSANDBYTES}")

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
