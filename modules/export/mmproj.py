"""The vision tower and projector of a vision-language model as a GGUF file (mmproj) for llama.cpp, beside the language
model's file.

Matrices are written in 16 or 32 bits and never quantized: a tower is small beside its language model, and
llama.cpp's own tools leave it so. Embeddings of patches and positions, vectors and norms are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFType, GGUFWriter
from torch import Tensor

from ._gguf_file import Planned, Progress, count_types, staged_file, write_tensors
from ._gguf_types import FileType, find_file_type
from ._gguf_vision import vision_architecture_of
from ._gguf_vision_file import (
    check_tokens,
    vision_tensors,
    vision_transformed,
    write_vision_configuration,
)
from .gguf import Exported, export_gguf
from .vision_weights import VisionLanguageWeights
from .weights import FinetunedWeights


def export_vision_gguf(
    weights: FinetunedWeights,
    files: Mapping[str, Path],
    mmproj: str | Path,
    *,
    mmproj_type: str = "f16",
    name: str | None = None,
    progress: Callable[[], Progress] | None = None,
    verify: bool = False,
) -> tuple[list[Exported], Exported]:
    """Write a vision-language model as files of its language model, and one of its vision tower.

    Args:
        weights: The model.
        files: The language model's file by its type; none must exist.
        mmproj: The vision tower's file; must not exist.
        mmproj_type: ``f16``, ``bf16`` or ``f32``.
        name: ``general.name``; by default the base's.
        progress: Returns for each file what is called after each of its tensors.
        verify: Run each pair of files in llama.cpp, on texts and images, before the language model's gets its name; the
            vision tower's gets it last.

    Returns:
        What was written of the language model, and of the vision tower.

    Raises:
        ValueError: As :func:`~.gguf.export_gguf` and :func:`export_mmproj`.
    """
    if Path(mmproj) in files.values():
        raise ValueError(f"{mmproj} is to hold both the language model and the vision tower: name two files.")

    def told() -> Progress | None:
        return None if progress is None else progress()

    with staged_mmproj(weights, mmproj, file_type=mmproj_type, name=name, progress=told()) as (staged, tower):
        language = [
            export_gguf(weights, file, file_type=kind, name=name, progress=told(), verify=verify, mmproj=staged)
            for kind, file in files.items()
        ]
    return language, tower


def export_mmproj(
    weights: FinetunedWeights,
    output: str | Path,
    *,
    file_type: str = "f16",
    name: str | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Write the vision tower and projector of a vision-language model.

    Args:
        weights: The model. Its base's directory must have a tokenizer and ``preprocessor_config.json``.
        output: The file; must not exist.
        file_type: ``f16``, ``bf16`` or ``f32``.
        name: ``general.name``; by default the base's.
        progress: Called after each tensor.

    Raises:
        ValueError: If the model has no vision tower or llama.cpp cannot compute it, the type is quantized, ``output``
            exists, the disk is too small, or a weight is not finite in the type. Nothing is left behind then.
    """
    with staged_mmproj(weights, output, file_type=file_type, name=name, progress=progress) as (_, exported):
        return exported


@contextmanager
def staged_mmproj(
    weights: FinetunedWeights,
    output: str | Path,
    *,
    file_type: str = "f16",
    name: str | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[Path, Exported]]:
    """:func:`export_mmproj` as a context manager: the file, which gets its name at the end if nothing is raised, and
    what was written.
    """
    began, output, kind = perf_counter(), Path(output), find_file_type(file_type)
    if kind.is_quantized:
        raise ValueError(f"Vision towers are written as f32, f16 or bf16, not as {kind.name}: they are not quantized.")
    if not isinstance(weights, VisionLanguageWeights):
        raise ValueError(f"{weights.checkpoint.directory} is a text model: it has no vision tower to write.")
    architecture, tokenizer = vision_architecture_of(weights.model_config), weights.chat_format.tokenizer
    break_token = check_tokens(architecture, tokenizer)
    tensors = {each.name: each for each in vision_tensors(architecture, weights)}
    planned = [
        Planned(each.name, each.source, each.shape, _type(kind, each.name, each.shape)) for each in tensors.values()
    ]
    with staged_file(output) as staged:
        writer = GGUFWriter(None, "clip")
        writer.add_type(GGUFType.MMPROJ)
        writer.add_name(name or weights.checkpoint.directory.name)
        writer.add_file_type(kind.id)
        writer.add_quantization_version(GGML_QUANT_VERSION)
        notes = write_vision_configuration(writer, architecture, weights)

        def tensor(each: Planned) -> Tensor:
            return vision_transformed(architecture, weights, tensors[each.name], break_token)

        write_tensors(writer, staged, planned, tensor, progress)
        adapted = sum(name in weights.updates for name in weights.vision_shapes)
        yield staged, Exported(
            output, kind.name, staged.stat().st_size, adapted, count_types(planned), perf_counter() - began,
            notes=tuple(notes),
        )  # fmt: skip


def _type(kind: FileType, name: str, shape: tuple[int, ...]) -> GGMLQuantizationType:
    """Vectors and what is added to hidden states are float32, as llama.cpp requires; so are convolutions."""
    if len(shape) != 2 or "_embd" in name:
        return GGMLQuantizationType.F32
    return GGMLQuantizationType[kind.name.upper()]
