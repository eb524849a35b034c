"""GGUF files converted to 16-bit safetensors, once, one tensor at a time, in a process of their own."""

from __future__ import annotations

import hashlib
import json
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from ..accounting import Unused, check_accounted
from ..downloads import cache_lock, conversions_dir
from .gguf_config import ARCHITECTURES, ROPE_TENSORS, Architecture, Metadata, build_config
from .safetensors_files import INDEX_NAME

_KNOWN_UNUSED = (
    *(Unused(re.escape(name), "part of rope_parameters") for name in ROPE_TENSORS),
    Unused(r"blk\.\d+\.attn_rot_embd(\.weight)?", "rotary frequencies, computed from config.json"),
)

#: Lists of a value per token, which take seconds to read; the tokenizer is transformers' matter.
_LONG_LISTS = ("ggml.tokens", "ggml.scores", "ggml.token_type", "ggml.merges")

#: How llama.cpp's tools name the parts of a model.
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


def parts_of(path: Path) -> list[Path]:
    """All files of the model that ``path`` is a part of: itself, if its name does not say ``-00001-of-00003.gguf``.

    Raises:
        ValueError: If one of them is not there.
    """
    match = _PART.search(path.name)
    if match is None:
        parts = [path]
    else:
        stem, count = path.name[: match.start()], int(match[2])
        parts = [path.with_name(f"{stem}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    if missing := [part for part in parts if not part.is_file()]:
        if len(parts) == 1:
            raise ValueError(f"There is no GGUF file {path}.")
        raise ValueError(
            f"{path} is one of {len(parts)} parts of a model, of which {', '.join(part.name for part in missing)} "
            "are not beside it. Download all parts into one directory."
        )
    return parts


def convert_gguf(path: Path) -> Path:
    """The directory that the model of a GGUF file, or of several parts, is converted to, once per content.

    Raises:
        ValueError: If a part is missing, the file is damaged, or it holds what cannot be expressed here.
    """
    parts = parts_of(path)
    digest = hashlib.sha256()
    for part in parts:
        with part.open("rb") as stream:
            while block := stream.read(2**24):
                digest.update(block)
    target = conversions_dir() / f"{_PART.sub('', parts[0].name).removesuffix('.gguf')}-{digest.hexdigest()[:16]}"
    with cache_lock(target):
        if not (target / "config.json").is_file():
            convert_in_child(parts[0], target)
    return target


def convert_in_child(path: Path, target: Path) -> None:
    """Convert in a process of its own, so that its memory and a parser's faults end with it.

    Raises:
        ValueError: As :func:`convert_gguf`.
    """
    # -P: in a directory that holds a package `kernels`, like this repository, transformers would import that one.
    command = [sys.executable, "-P", "-m", __name__, str(path), str(target)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode < 0:
        name = signal.Signals(-result.returncode).name
        raise ValueError(
            f"The conversion of {path} to safetensors was killed by {name}. If memory ran out, convert it on a larger "
            "machine, or pass --model with a directory of safetensors."
        )
    if result.returncode:
        raise ValueError(result.stdout.strip() or f"{path} could not be converted: see the traceback above.")


class _GGUFModel:
    """The tensors and keys of a GGUF file, or of all its parts together.

    Raises:
        ValueError: If a part is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            readers = [gguf.GGUFReader(part) for part in parts_of(path)]
            self.fields: dict[str, Any] = {
                key: field.contents() for key, field in readers[0].fields.items() if not key.endswith(_LONG_LISTS)
            }
        except (OSError, ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path} cannot be read as GGUF ({type(error).__name__}: {error}). Download it again."
            ) from error
        self.tensors = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
        count = self.fields.get("split.count", 0)
        if count > 1 and count != len(readers):
            raise ValueError(
                f"{path} is one of {count} parts of a model (split.count), but its name does not say so. Give the "
                f"parts their names back: NAME-00001-of-{count:05d}.gguf."
            )
        expected = self.fields.get("split.tensors.count", len(self.tensors))
        if expected != len(self.tensors):
            raise ValueError(
                f"{path} and its other parts hold {len(self.tensors)} of {expected} tensors. Download them again."
            )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors, as torch writes shapes."""
        return {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in self.tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """The values of a tensor, dequantized, in float32."""
        tensor = self.tensors[name]
        values: np.ndarray = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if not values.flags.writeable:  # the file's own memory, to which torch warns against writing
            values = values.copy()
        return values.reshape(self.shapes[name])


def _gguf_to_safetensors(path: Path, target: Path) -> None:
    stored = _GGUFModel(path)
    metadata = Metadata(str(path), stored.fields)
    shapes = stored.shapes
    if "token_embd.weight" not in shapes:
        raise ValueError(f"{path} lacks 'token_embd.weight': it is no language model, or is damaged.")
    config = build_config(metadata, shapes, {name: stored.read(name) for name in ROPE_TENSORS if name in shapes})
    architecture = ARCHITECTURES[metadata.name]
    wanted = _tensor_names(metadata.name, config)
    check_accounted(
        path, wanted=(name for name, _ in wanted.values()), held=shapes, known=_KNOWN_UNUSED,
        remedy="Another model would be trained. Download it again, or pass --model with the model's safetensors.",
    )  # fmt: skip
    for name, shape in wanted.values():
        if shapes[name] != shape:
            raise ValueError(
                f"{path}: {name!r} has shape {shapes[name]}, but its keys imply {shape}. Download it again."
            )
    tokenizer = _tokenizer(path)
    for key, of_config in (("bos", "bos"), ("eos", "eos"), ("padding", "pad")):
        setattr(config, f"{of_config}_token_id", stored.fields.get(f"tokenizer.ggml.{key}_token_id"))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        staged = Path(scratch) / "model"
        tokenizer.save_pretrained(staged)
        # A sum of a scale and a minimum in float16 keeps 11 bits in float16, and 8 in bfloat16, whose range is larger.
        for dtype in (torch.float16, torch.bfloat16):
            if _write_weights(stored, wanted, config, architecture, staged, dtype):
                break
        config.save_pretrained(staged)
        _generation_config(stored.fields, config).save_pretrained(staged)
        staged.replace(target)


def _tensor_names(architecture: str, config: PretrainedConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Of each of the model's tensors llama.cpp's name, and the shape."""
    with torch.device("meta"):
        state = getattr(transformers, (config.architectures or [])[0])(config).state_dict()
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    known = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known[architecture], config.num_hidden_layers)
    found = {}
    for name, tensor in state.items():
        stem, _, kind = name.rpartition(".")
        found[name] = (f"{names.get_name(stem)}.{kind}", tuple(tensor.shape))
    return found


def _tokenizer(path: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # transformers raises many types for a tokenizer that it cannot read
        raise ValueError(
            f"transformers cannot read the tokenizer of {path} ({type(error).__name__}: {error}). Pass --model with "
            "the model's safetensors."
        ) from error
    if tokenizer.pad_token in (None, tokenizer.eos_token) and "<|endoftext|>" in tokenizer.get_vocab():
        tokenizer.pad_token = "<|endoftext|>"  # distinct from eos, whose label must be learnt
    return tokenizer


def _generation_config(fields: Mapping[str, Any], config: PretrainedConfig) -> GenerationConfig:
    """With all tokens that end an answer: of the text, of a turn, of a message."""
    ends = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    stops = list(dict.fromkeys(token for token in ends if token is not None))
    generation = GenerationConfig.from_model_config(config)
    generation.eos_token_id = stops if len(stops) > 1 else (stops or [None])[0]
    return generation


def _write_weights(
    stored: _GGUFModel, wanted: Mapping[str, tuple[str, tuple[int, ...]]], config: PretrainedConfig,
    architecture: Architecture, directory: Path, dtype: torch.dtype,
) -> bool:  # fmt: skip
    """Write safetensors of ``dtype``; returns False if a value does not fit into it."""
    config.dtype = dtype
    state = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (_, shape) in wanted.items()}
    shards = split_torch_state_dict_into_shards(state, max_shard_size="2GB")
    for filename, names in shards.filename_to_tensors.items():
        tensors = {}
        for name in names:
            values = _as_trained(torch.from_numpy(stored.read(wanted[name][0])), name, config, architecture)
            if values.numel() and values.abs().max() > torch.finfo(dtype).max:
                return False
            tensors[name] = values.to(dtype).contiguous()
        save_file(tensors, directory / filename, metadata={"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (directory / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return True


def _as_trained(values: Tensor, name: str, config: PretrainedConfig, architecture: Architecture) -> Tensor:
    """Undo what llama.cpp's converter did to a tensor."""
    if architecture.norms_plus_one and name.endswith("norm.weight"):
        return values - 1
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if architecture.interleaved and heads:
        return values.view(heads, -1, 2, *values.shape[1:]).transpose(1, 2).reshape(values.shape)
    return values


if __name__ == "__main__":  # of convert_in_child()
    try:
        _gguf_to_safetensors(Path(sys.argv[1]), Path(sys.argv[2]))
    except ValueError as error:
        print(error)
        sys.exit(1)
