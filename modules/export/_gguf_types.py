"""GGUF's tensor types: which each file type gives to which tensor, and weights converted to them.

The mixes are those of llama.cpp's own ``llama-quantize``: the head, and of the K-quants also what errors hurt most
(values, the MLP's second matrix, more of them in the first and last layers), get more bits than the rest.

Shapes: N rows, K columns of a weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from numpy.typing import NDArray
from torch import Tensor

_T = GGMLQuantizationType
_CHUNK = 2**20  # weights converted at a time, so that float32 copies stay at 4 MiB

#: Types whose blocks of 256 only the ``libgguf`` package can write.
K_QUANTS = (_T.Q2_K, _T.Q3_K, _T.Q4_K, _T.Q5_K, _T.Q6_K)

#: What a K-quant becomes where 256 does not divide the row: a type of blocks of 32 with at least as many bits.
_SMALLER_BLOCKS = {_T.Q2_K: _T.Q4_0, _T.Q3_K: _T.Q4_0, _T.Q4_K: _T.Q5_0, _T.Q5_K: _T.Q5_1, _T.Q6_K: _T.Q8_0}


@dataclass(frozen=True)
class Place:
    """Where in the model a tensor is.

    Attributes:
        name: GGUF's name without layer and suffix, such as ``attn_v``.
        layer: Its layer; 0 outside the layers.
        layers: Number of layers.
        query_groups: Query heads per key-value head.
        is_head: Whether logits are computed with it: ``output``, or the embeddings if tied.
    """

    name: str
    layer: int
    layers: int
    query_groups: int
    is_head: bool

    @property
    def early(self) -> bool:
        """Whether it is in the first eighth of the layers."""
        return self.layer < self.layers // 8

    @property
    def sensitive(self) -> bool:
        """The layers to which mixed types give more bits: first and last eighth, and each third between."""
        eighth = self.layers // 8
        return self.early or self.layer >= 7 * self.layers // 8 or (self.layer - eighth) % 3 == 2


def _plain(kind: GGMLQuantizationType, head: GGMLQuantizationType | None = None) -> _Rule:
    return lambda place: head if head is not None and place.is_head else kind


_Rule = Callable[[Place], GGMLQuantizationType]


def _q2_k(place: Place) -> GGMLQuantizationType:
    if place.name == "attn_v":
        return _T.Q4_K if place.query_groups >= 4 else _T.Q3_K
    return _T.Q3_K if place.name in ("ffn_down", "attn_output") else _T.Q2_K


def _q3_k_m(place: Place) -> GGMLQuantizationType:
    if place.name == "attn_v":
        return _T.Q5_K if place.layer < 2 else _T.Q4_K
    if place.name == "ffn_down":
        return _T.Q5_K if place.layer < place.layers // 16 else _T.Q4_K if place.sensitive else _T.Q3_K
    return _T.Q4_K if place.name in ("attn_output", "attn_qkv") else _T.Q3_K


def _q3_k_l(place: Place) -> GGMLQuantizationType:
    if place.name == "attn_qkv":
        return _T.Q4_K
    return _T.Q5_K if place.name in ("attn_v", "ffn_down", "attn_output") else _T.Q3_K


def _q4_k_s(place: Place) -> GGMLQuantizationType:
    early = (place.name == "attn_v" and place.layer < 4) or (place.name == "ffn_down" and place.early)
    return _T.Q5_K if early else _T.Q4_K


def _q4_k_m(place: Place) -> GGMLQuantizationType:
    if place.name in ("attn_v", "ffn_down") and place.sensitive:
        return _T.Q6_K
    return _T.Q5_K if place.name == "attn_qkv" else _T.Q4_K


def _q5_k_m(place: Place) -> GGMLQuantizationType:
    better = place.name == "attn_qkv" or (place.name in ("attn_v", "ffn_down") and place.sensitive)
    return _T.Q6_K if better else _T.Q5_K


def _with_head(rule: _Rule) -> _Rule:
    return lambda place: _T.Q6_K if place.is_head else rule(place)


@dataclass(frozen=True)
class FileType:
    """One of the values of ``--type``.

    Attributes:
        name: As the user writes it.
        id: ``general.file_type``.
        rule: The type of a matrix by its place.
        kl_bound: Largest mean KL divergence from the unquantized model, in nats per token, that is taken for
            quantization and not for a fault: several times that of SmolLM2-135M, which is smaller and hence more
            sensitive than other models.
    """

    name: str
    id: LlamaFileType
    rule: _Rule
    kl_bound: float

    @property
    def is_quantized(self) -> bool:
        """Whether weights have fewer than 16 bits."""
        return self.name not in ("f32", "f16", "bf16")

    @property
    def needs_libgguf(self) -> bool:
        """Whether only the ``libgguf`` package can write it."""
        return "_k" in self.name


FILE_TYPES: dict[str, FileType] = {
    each.name: each
    for each in (
        FileType("f32", LlamaFileType.ALL_F32, _plain(_T.F32), 1e-4),
        FileType("f16", LlamaFileType.MOSTLY_F16, _plain(_T.F16), 1e-3),
        FileType("bf16", LlamaFileType.MOSTLY_BF16, _plain(_T.BF16), 0.01),
        FileType("q8_0", LlamaFileType.MOSTLY_Q8_0, _plain(_T.Q8_0), 0.04),
        FileType("q4_0", LlamaFileType.MOSTLY_Q4_0, _plain(_T.Q4_0, _T.Q8_0), 1.5),
        FileType("q4_1", LlamaFileType.MOSTLY_Q4_1, _plain(_T.Q4_1, _T.Q8_0), 1.0),
        FileType("q5_0", LlamaFileType.MOSTLY_Q5_0, _plain(_T.Q5_0, _T.Q8_0), 0.5),
        FileType("q5_1", LlamaFileType.MOSTLY_Q5_1, _plain(_T.Q5_1, _T.Q8_0), 0.4),
        FileType("q2_k", LlamaFileType.MOSTLY_Q2_K, _with_head(_q2_k), 4.0),
        FileType("q3_k_s", LlamaFileType.MOSTLY_Q3_K_S, _with_head(_plain(_T.Q3_K)), 3.0),
        FileType("q3_k_m", LlamaFileType.MOSTLY_Q3_K_M, _with_head(_q3_k_m), 2.0),
        FileType("q3_k_l", LlamaFileType.MOSTLY_Q3_K_L, _with_head(_q3_k_l), 2.0),
        FileType("q4_k_s", LlamaFileType.MOSTLY_Q4_K_S, _with_head(_q4_k_s), 1.0),
        FileType("q4_k_m", LlamaFileType.MOSTLY_Q4_K_M, _with_head(_q4_k_m), 1.0),
        FileType("q5_k_s", LlamaFileType.MOSTLY_Q5_K_S, _with_head(_plain(_T.Q5_K)), 0.4),
        FileType("q5_k_m", LlamaFileType.MOSTLY_Q5_K_M, _with_head(_q5_k_m), 0.4),
        FileType("q6_k", LlamaFileType.MOSTLY_Q6_K, _plain(_T.Q6_K), 0.1),
    )
}


def find_file_type(name: str) -> FileType:
    """The file type of a name in any case.

    Raises:
        ValueError: If there is none, or the package that writes it is not installed.
    """
    found = FILE_TYPES.get(name.lower())
    if found is None:
        raise ValueError(f"{name!r} is no GGUF type that can be written here. There are: {', '.join(FILE_TYPES)}.")
    if found.needs_libgguf:
        _libgguf(found.name)
    return found


def _libgguf(wanted: str) -> Any:
    try:
        import libgguf
    except ImportError as error:
        raise ValueError(
            f"{wanted} is a K-quant, which the gguf package cannot write. Install libgguf: pip install "
            "'lightning-qlora[libgguf]'; or take q8_0, q5_1, q5_0, q4_1 or q4_0."
        ) from error
    return libgguf


def tensor_type(file_type: FileType, shape: tuple[int, ...], place: Place) -> GGMLQuantizationType:
    """The type of a tensor. Vectors and norms stay in float32, as llama.cpp requires.

    Args:
        file_type: The file's.
        shape: [N] or [N, K].
        place: Where it is.

    Returns:
        The rule's type; one with smaller blocks, in the end F16, where rows are not whole blocks.
    """
    if len(shape) < 2 or place.name.endswith("_norm"):
        return _T.F32
    wanted = file_type.rule(place)
    if shape[-1] % GGML_QUANT_SIZES[wanted][0]:
        wanted = _SMALLER_BLOCKS.get(wanted, _T.F16)
    return wanted if shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0 else _T.F16


def byte_shape(shape: tuple[int, ...], kind: GGMLQuantizationType) -> tuple[int, ...]:
    """The shape of a tensor's bytes: [..., bytes per row]."""
    block, size = GGML_QUANT_SIZES[kind]
    return (*shape[:-1], shape[-1] // block * size)


def convert(tensor: Tensor, kind: GGMLQuantizationType, name: str) -> NDArray[np.uint8]:
    """A tensor in a GGUF type.

    Args:
        tensor: Any floating dtype, [N] or [N, K], K a multiple of the type's block.
        kind: The type.
        name: Of the tensor, for errors.

    Returns:
        uint8 of shape :func:`byte_shape`.

    Raises:
        ValueError: If a value is not finite in that type.
    """
    out = np.empty(byte_shape(tuple(tensor.shape), kind), dtype=np.uint8)
    # A vector is one row.
    rows, target = tensor.reshape(-1, tensor.shape[-1]), out.reshape(-1, out.shape[-1])
    step = max(1, _CHUNK // rows.shape[1])
    for start in range(0, len(rows), step):
        target[start : start + step] = _convert_rows(rows[start : start + step], kind, name)
    return out


def _convert_rows(rows: Tensor, kind: GGMLQuantizationType, name: str) -> NDArray[np.uint8]:
    dtypes = {_T.F32: torch.float32, _T.F16: torch.float16, _T.BF16: torch.bfloat16}
    values = rows.to(dtypes.get(kind, torch.float32))
    if not values.isfinite().all():
        raise ValueError(
            f"{name!r} has values that are not finite in {kind.name}"
            + (": its range ends at 65504. Use --type bf16 or q8_0." if rows.isfinite().all() else ".")
        )
    if kind in dtypes:
        return values.contiguous().view(torch.uint8).numpy()
    array = values.numpy()
    quantize = _libgguf(kind.name).quantize_rows if kind in K_QUANTS else gguf.quants.quantize
    quantized: NDArray[np.uint8] = quantize(array, kind)
    return quantized
