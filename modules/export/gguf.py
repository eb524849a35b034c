"""GGUF files for llama.cpp: a base with its adapter merged, in any of GGUF's types, or the adapter alone.

Written tensor by tensor: beside the base's file, memory holds a weight as it is stored (in float32 if it is adapted or
4-bit) and as it is written. The file appears under its name when it is whole.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import numpy as np
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFType, GGUFWriter, Keys
from torch import Tensor

from ..checkpoints.tokenizer import load_tokenizer
from ..models.families import load_config
from ._gguf_architecture import Names, architecture_of, transformed, write_configuration
from ._gguf_tokenizer import read_vocabulary
from ._gguf_types import FileType, Place, byte_shape, convert, find_file_type, tensor_type
from .llama_cpp import Verified, verify_gguf
from .weights import FinetunedWeights, LoraUpdate, adapter_config, read_updates

#: Called with the bytes written so far and those of the whole file.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Exported:
    """What :func:`export_gguf` or :func:`export_gguf_adapter` wrote.

    Attributes:
        path: The file.
        file_type: Name of its type.
        total_bytes: Its size.
        adapted: How many weights the adapter changed.
        types: How many tensors have which GGUF type.
        seconds: How long writing took.
        stop_tokens: Ids that end an answer, that of the training's chat template first.
        notes: Where llama.cpp differs from transformers, or the file from what was asked for, in sentences.
        verified: How it answers in llama.cpp; ``None`` if it was not run.
    """

    path: Path
    file_type: str
    total_bytes: int
    adapted: int
    types: dict[str, int]
    seconds: float
    stop_tokens: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    verified: Verified | None = None


@dataclass(frozen=True)
class _Planned:
    """A tensor to be written; ``source`` is transformers' name, or the tensor itself."""

    name: str
    source: str | Tensor
    shape: tuple[int, ...]
    kind: GGMLQuantizationType

    @property
    def nbytes(self) -> int:
        return int(np.prod(byte_shape(self.shape, self.kind)))


def export_gguf(
    weights: FinetunedWeights,
    output: str | Path,
    *,
    file_type: str = "f16",
    name: str | None = None,
    progress: Progress | None = None,
    verify: bool = False,
) -> Exported:
    """Write a finetuned model as one GGUF file.

    Args:
        weights: The model. Its base's directory must have a tokenizer.
        output: The file; must not exist.
        file_type: ``f16``, ``q8_0``, ``q4_k_m``, ...: see :func:`check_file_types`.
        name: ``general.name``; by default the base's.
        progress: Called after each tensor.
        verify: Run the file in llama.cpp before it gets its name, see
            :func:`~lightning_qlora.modules.export.llama_cpp.verify_gguf`.

    Raises:
        ValueError: If llama.cpp cannot compute the model or its tokenizer, ``output`` exists, the disk is too small, or
            a weight is not finite in the type, or llama.cpp does not answer as the model. Nothing is left behind then.
    """
    began, output, kind = perf_counter(), Path(output), find_file_type(file_type)
    config, base = weights.config, weights.checkpoint.directory
    architecture = architecture_of(config)
    chat_format = weights.chat_format
    tokenizer = chat_format.tokenizer
    vocabulary = read_vocabulary(tokenizer, config.vocab_size, chat_format.stops)
    with _staged(output) as staged:
        writer = GGUFWriter(None, architecture.name)
        writer.add_type(GGUFType.MODEL)
        writer.add_name(name or base.name)
        writer.add_file_type(kind.id)
        writer.add_quantization_version(GGML_QUANT_VERSION)
        extra, notes = write_configuration(writer, architecture, config)
        vocabulary.write(writer)
        planned = [
            _Planned(key, tensor, tuple(tensor.shape), GGMLQuantizationType.F32) for key, tensor in extra.items()
        ]
        planned += _plan(weights, kind)
        notes = [*vocabulary.notes, *notes, *_type_notes(kind, planned)]

        def tensor(each: _Planned) -> Tensor:
            if isinstance(each.source, Tensor):
                return each.source  # of rope scaling
            return transformed(architecture, config, each.source, weights.merged(each.source))

        _write(writer, staged, planned, tensor, progress)
        exported = Exported(
            output,
            kind.name,
            staged.stat().st_size,
            len(weights.updates),
            _count(planned),
            perf_counter() - began,
            vocabulary.stop_tokens,
            tuple(notes),
        )
        if verify:
            verified = verify_gguf(staged, weights, tokenizer, kind.name, vocabulary.stop_tokens)
            exported = replace(exported, verified=verified)
    return exported


def export_gguf_adapter(
    base: str | Path,
    adapter: str | Path,
    output: str | Path,
    *,
    file_type: str = "f16",
    base_gguf: str | Path | None = None,
) -> Exported:
    """Write an adapter alone, which llama.cpp adds to a GGUF file of its base (``--lora``).

    Args:
        base: The base model's directory.
        adapter: Directory of a LoRA adapter in peft's format.
        output: The file; must not exist.
        file_type: ``f32``, ``f16`` or ``bf16``.
        base_gguf: A GGUF file of the base in one of these types, in which llama.cpp runs the adapter before its file
            gets its name.

    Raises:
        ValueError: As :func:`export_gguf`.
    """
    began, output, kind = perf_counter(), Path(output), find_file_type(file_type)
    if kind.is_quantized:
        raise ValueError(f"Adapters are small: write them as f32, f16 or bf16, not as {kind.name}.")
    config = load_config(base)
    architecture = architecture_of(config)
    updates, names = read_updates(adapter, config), Names(architecture, config.num_hidden_layers)
    alpha = float(adapter_config(adapter).lora_alpha)
    planned = []
    for source, update in updates.items():
        assert isinstance(update, LoraUpdate), "load_config lets no vision-language model through"
        # llama.cpp scales by alpha / rank. What this layer's scaling is beyond that goes into B.
        b = update.b * (update.scaling / (alpha / update.b.shape[1]))
        b = transformed(architecture, config, source, b)
        for suffix, part in (("lora_a", update.a), ("lora_b", b)):
            kind_of_part = tensor_type(kind, tuple(part.shape), Place("", 0, 1, 1, is_head=False))
            planned.append(_Planned(f"{names(source)}.{suffix}", part, tuple(part.shape), kind_of_part))
    with _staged(output) as staged:
        writer = GGUFWriter(None, architecture.name)
        writer.add_type(GGUFType.ADAPTER)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_name(Path(adapter).resolve().name)
        writer.add_file_type(kind.id)
        writer.add_quantization_version(GGML_QUANT_VERSION)
        _write(writer, staged, planned, _given, None)
        exported = Exported(
            output, kind.name, staged.stat().st_size, len(updates), _count(planned), perf_counter() - began
        )
        if base_gguf is not None:
            weights = FinetunedWeights(base, adapter)
            verified = verify_gguf(base_gguf, weights, load_tokenizer(base), kind.name, lora=staged)
            exported = replace(exported, verified=verified)
    return exported


def _given(planned: _Planned) -> Tensor:
    assert isinstance(planned.source, Tensor)
    return planned.source


def _count(planned: list[_Planned]) -> dict[str, int]:
    return dict(Counter(each.kind.name for each in planned))


def check_file_types(names: Sequence[str]) -> list[str]:
    """The names of file types as they are spelled here.

    Raises:
        ValueError: If there is no such type, it needs a package that is not installed, or one is named twice.
    """
    found = [find_file_type(name).name for name in names]
    if len(set(found)) < len(found):
        raise ValueError(f"A type is named twice: {', '.join(found)}.")
    return found


@contextmanager
def _staged(output: Path) -> Iterator[Path]:
    """A path to write to, whose file gets the name ``output`` if nothing is raised, and else is removed."""
    if output.exists():
        raise ValueError(f"{output} exists already. Name a new file.")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        staged = Path(scratch) / output.name
        yield staged
        staged.replace(output)


def _plan(weights: FinetunedWeights, kind: FileType) -> list[_Planned]:
    config = weights.config
    names = Names(architecture_of(config), config.num_hidden_layers)
    planned = []
    for source, shape in weights.shapes.items():
        name = names(source)
        parts = name.split(".")
        place = Place(
            parts[-2],
            int(parts[1]) if parts[0] == "blk" else 0,
            config.num_hidden_layers,
            config.num_attention_heads // config.num_key_value_heads,
            is_head=parts[0] == ("token_embd" if config.tie_word_embeddings else "output"),
        )
        planned.append(_Planned(name, source, shape, tensor_type(kind, shape, place)))
    return planned


def _type_notes(kind: FileType, planned: list[_Planned]) -> list[str]:
    fallen = [each for each in planned if kind.is_quantized and len(each.shape) > 1 and each.kind.name == "F16"]
    blocks = {each.shape[-1] for each in planned if kind.needs_libgguf and len(each.shape) > 1 and each.shape[-1] % 256}
    notes = []
    if fallen:
        notes.append(
            f"{len(fallen)} matrices stay F16, because their rows are not multiples of 32, such as {fallen[0].name}."
        )
    if blocks:
        notes.append(
            f"K-quants have blocks of 256; matrices with rows of {', '.join(map(str, sorted(blocks)))} get types with "
            "blocks of 32, and the file becomes larger."
        )
    return notes


def _write(
    writer: GGUFWriter,
    path: Path,
    planned: list[_Planned],
    tensor: Callable[[_Planned], Tensor],
    progress: Progress | None,
) -> None:
    total = sum(each.nbytes for each in planned)
    _check_disk(path.parent, total)
    for each in planned:
        shape = byte_shape(each.shape, each.kind)
        writer.add_tensor_info(each.name, shape, np.dtype(np.uint8), each.nbytes, raw_dtype=each.kind)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done = 0
        for each in planned:
            # No name for the tensor, which would keep it alive beside the next one.
            writer.write_tensor_data(convert(tensor(each), each.kind, each.name))
            done += each.nbytes
            if progress is not None:
                progress(done, total)
    finally:
        writer.close()


def _check_disk(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed + 64 * 2**20:  # the vocabulary takes up to some 20 MB
        raise ValueError(
            f"The file needs {needed / 2**30:.2f} GiB, but {directory} has {free / 2**30:.2f} GiB free. Free some, "
            "name a file on another disk, or take a --type of fewer bits."
        )
