"""GGUF files for llama.cpp: a base with its adapter merged, in any of GGUF's types, or the adapter alone.

Written tensor by tensor: beside the base's file, memory holds a weight as it is stored (in float32 if it is adapted or
4-bit) and as it is written. The file appears under its name when it is whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFType, GGUFWriter, Keys
from torch import Tensor
from transformers import PretrainedConfig

from ..checkpoints.tokenizer import load_tokenizer
from ..models.families import load_config
from ._gguf_architecture import Names, architecture_of, transformed, write_configuration
from ._gguf_file import Planned, Progress, count_types, staged_file, write_tensors
from ._gguf_tokenizer import read_vocabulary
from ._gguf_types import FileType, Place, find_file_type, tensor_type
from ._gguf_vision_file import image_tokens, write_language_configuration
from .llama_cpp import Verified, verify_gguf
from .llama_cpp_images import verify_images
from .vision_weights import VisionLanguageWeights, is_vision_language, read_weights
from .weights import FinetunedWeights, LoraUpdate, Replacement, adapter_config, read_updates


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
        verified_images: How it answers on images; ``None`` if it was not run with a vision tower.
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
    verified_images: Verified | None = None


def export_gguf(
    weights: FinetunedWeights,
    output: str | Path,
    *,
    file_type: str = "f16",
    name: str | None = None,
    progress: Progress | None = None,
    verify: bool = False,
    mmproj: str | Path | None = None,
) -> Exported:
    """Write a finetuned model as one GGUF file; of a vision-language model its language model.

    Args:
        weights: The model. Its base's directory must have a tokenizer.
        output: The file; must not exist.
        file_type: ``f16``, ``q8_0``, ``q4_k_m``, ...: see :func:`check_file_types`.
        name: ``general.name``; by default the base's.
        progress: Called after each tensor.
        verify: Run the file in llama.cpp before it gets its name, see
            :func:`~lightning_qlora.modules.export.llama_cpp.verify_gguf`.
        mmproj: The vision tower's file (:func:`~lightning_qlora.modules.export.mmproj.export_mmproj`), with which
            images are part of running it.

    Raises:
        ValueError: If llama.cpp cannot compute the model or its tokenizer, ``output`` exists, the disk is too small, or
            a weight is not finite in the type, or llama.cpp does not answer as the model. Nothing is left behind then.
    """
    began, output, kind = perf_counter(), Path(output), find_file_type(file_type)
    config, base = weights.config, weights.checkpoint.directory
    architecture = architecture_of(config)
    chat_format = weights.chat_format
    tokenizer = chat_format.tokenizer
    vision = weights if isinstance(weights, VisionLanguageWeights) else None
    marks = image_tokens(vision, tokenizer) if vision else ()
    vocabulary = read_vocabulary(tokenizer, config.vocab_size, chat_format.stops, marks)
    with staged_file(output) as staged:
        writer = GGUFWriter(None, architecture.name)
        writer.add_type(GGUFType.MODEL)
        writer.add_name(name or base.name)
        writer.add_file_type(kind.id)
        writer.add_quantization_version(GGML_QUANT_VERSION)
        extra, notes = write_configuration(writer, architecture, config)
        if vision:
            write_language_configuration(writer, vision)
        vocabulary.write(writer)
        planned = [Planned(key, tensor, tuple(tensor.shape), GGMLQuantizationType.F32) for key, tensor in extra.items()]
        planned += _plan(weights, kind)
        notes = [*vocabulary.notes, *notes, *_type_notes(kind, planned)]

        def tensor(each: Planned) -> Tensor:
            if isinstance(each.source, Tensor):
                return each.source  # of rope scaling
            return transformed(architecture, config, each.source, weights.merged(each.source))

        write_tensors(writer, staged, planned, tensor, progress)
        exported = Exported(
            output,
            kind.name,
            staged.stat().st_size,
            sum(name in weights.shapes for name in weights.updates),
            count_types(planned),
            perf_counter() - began,
            vocabulary.stop_tokens,
            tuple(notes),
        )
        if verify:
            verified = verify_gguf(staged, weights, tokenizer, kind.name, vocabulary.stop_tokens)
            exported = replace(exported, verified=verified)
            if vision and mmproj is not None:
                exported = replace(exported, verified_images=verify_images(staged, mmproj, vision, kind.name))
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
    config, updates = _read_adapter(base, adapter)
    architecture = architecture_of(config)
    names = Names(architecture, config.num_hidden_layers)
    alpha = float(adapter_config(adapter, None).lora_alpha)
    planned = []
    for source, update in updates.items():
        assert isinstance(update, LoraUpdate), "a language model has nothing that is trained in full"
        # llama.cpp scales by alpha / rank. What this layer's scaling is beyond that goes into B.
        b = update.b * (update.scaling / (alpha / update.b.shape[1]))
        b = transformed(architecture, config, source, b)
        for suffix, part in (("lora_a", update.a), ("lora_b", b)):
            kind_of_part = tensor_type(kind, tuple(part.shape), Place("", 0, 1, 1, is_head=False))
            planned.append(Planned(f"{names(source)}.{suffix}", part, tuple(part.shape), kind_of_part))
    with staged_file(output) as staged:
        writer = GGUFWriter(None, architecture.name)
        writer.add_type(GGUFType.ADAPTER)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_name(Path(adapter).resolve().name)
        writer.add_file_type(kind.id)
        writer.add_quantization_version(GGML_QUANT_VERSION)
        write_tensors(writer, staged, planned, _given, None)
        exported = Exported(
            output, kind.name, staged.stat().st_size, len(updates), count_types(planned), perf_counter() - began
        )
        if base_gguf is not None:
            weights = read_weights(base, adapter)
            verified = verify_gguf(base_gguf, weights, load_tokenizer(base), kind.name, lora=staged)
            exported = replace(exported, verified=verified)
    return exported


def _read_adapter(
    base: str | Path, adapter: str | Path
) -> tuple[PretrainedConfig, dict[str, LoraUpdate | Replacement]]:
    """The (language) model's configuration, and what the adapter adds to it."""
    if not is_vision_language(base):
        config = load_config(base)
        return config, read_updates(adapter, config)
    weights = VisionLanguageWeights(base, adapter)
    if beyond := [name for name in weights.updates if name not in weights.shapes]:
        raise ValueError(
            f"{adapter} changes the vision tower or the projector ({min(beyond)}), which llama.cpp's adapters cannot: "
            "leave --adapter_only out, so that both files are written merged."
        )
    return weights.config, weights.updates


def _given(planned: Planned) -> Tensor:
    assert isinstance(planned.source, Tensor)
    return planned.source


def check_file_types(names: Sequence[str]) -> list[str]:
    """The names of file types as they are spelled here.

    Raises:
        ValueError: If there is no such type, it needs a package that is not installed, or one is named twice.
    """
    found = [find_file_type(name).name for name in names]
    if len(set(found)) < len(found):
        raise ValueError(f"A type is named twice: {', '.join(found)}.")
    return found


def _plan(weights: FinetunedWeights, kind: FileType) -> list[Planned]:
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
        planned.append(Planned(name, source, shape, tensor_type(kind, shape, place)))
    return planned


def _type_notes(kind: FileType, planned: list[Planned]) -> list[str]:
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
