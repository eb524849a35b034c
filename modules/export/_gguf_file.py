"""A GGUF file written tensor by tensor, which gets its name when it is whole."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from torch import Tensor

from ._gguf_types import byte_shape, convert

#: Called with the bytes written so far and those of the whole file.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Planned:
    """A tensor to be written; ``source`` is transformers' name, or the tensor itself."""

    name: str
    source: str | Tensor
    shape: tuple[int, ...]
    kind: GGMLQuantizationType

    @property
    def nbytes(self) -> int:
        return int(np.prod(byte_shape(self.shape, self.kind)))


def count_types(planned: Sequence[Planned]) -> dict[str, int]:
    """How many tensors have which GGUF type."""
    return dict(Counter(each.kind.name for each in planned))


@contextmanager
def staged_file(output: Path) -> Iterator[Path]:
    """A path to write to, whose file gets the name ``output`` if nothing is raised, and else is removed."""
    if output.exists():
        raise ValueError(f"{output} exists already. Name a new file.")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        staged = Path(scratch) / output.name
        yield staged
        staged.replace(output)


def write_tensors(
    writer: GGUFWriter,
    path: Path,
    planned: list[Planned],
    tensor: Callable[[Planned], Tensor],
    progress: Progress | None,
) -> None:
    """Write a file: the keys of ``writer``, then the tensors, one in memory at a time.

    Args:
        writer: With all keys, and no tensors.
        path: The file.
        planned: The tensors.
        tensor: Returns a tensor in any floating dtype.
        progress: Called after each tensor.

    Raises:
        ValueError: If the disk is too small, or a value is not finite in its type.
    """
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
