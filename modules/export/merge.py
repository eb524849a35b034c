"""Merging a LoRA adapter into its base: a dense checkpoint, written one tensor at a time on the CPU.

A merged weight is ``W + scaling * B @ A`` in float32, rounded once to the dtype of the result. Beside the shard that is
being written, memory holds one weight in float32 and its update.

Shapes: N out_features, K in_features, R rank, S tokens, V vocabulary.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoints.chat_format import copy_changes
from ..checkpoints.safetensors_files import INDEX_NAME, SafetensorsCheckpoint
from ..models.families import family_of
from .stock_layer import stock_layer
from .weights import FinetunedWeights, LoraUpdate, Replacement

#: What stands beside the weights in a transformers directory and holds as well for the merged model.
_COPIED = ("*.json", "*.model", "*.jinja", "*.txt", "LICENSE*")


@dataclass(frozen=True)
class Parity:
    """How far the merged model's logits are from those of base and adapter.

    Both models are transformers' own, computed in float32. Rounding a weight to a dtype of machine precision eps moves
    each of the 7 L products of L layers by a relative eps / 4 or so, independently of each other; the logits then by
    sqrt(7 L) eps / 4 of their standard deviation, and the largest of them by 5 times that (SmolLM2-135M: 3 to 5 times).
    The tolerance is three times as much. Sums of float32 products add an error of their own, 16 times its eps.

    Attributes:
        difference: Largest difference of a logit.
        tolerance: What rounding the merged weights may cause.
        adapter_effect: Largest change of a logit by the adapter, for comparison.
    """

    difference: float
    tolerance: float
    adapter_effect: float


@dataclass(frozen=True)
class Merged:
    """What :func:`merge_adapter` wrote.

    Attributes:
        directory: A transformers model directory.
        dtype: Of all its weights.
        adapted: How many weights the adapter changed.
        total_bytes: Size of all weights.
        files: Number of safetensors files.
        base_is_4bit: Whether the base was taken as quantized to 4 bits.
        parity: ``None`` if it was not asked for.
    """

    directory: Path
    dtype: torch.dtype
    adapted: int
    total_bytes: int
    files: int
    base_is_4bit: bool
    parity: Parity | None


def merge_adapter(
    base: str | Path,
    adapter: str | Path,
    output: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "2GB",
    quantize_base: bool = False,
    check_ids: Tensor | None = None,
) -> Merged:
    """Write ``base`` with ``adapter`` merged as a transformers directory of dense weights.

    The directory appears when all of it is written and has passed the check. A 4-bit base is dequantized: the merged
    weights are those that the adapter was trained on.

    Args:
        base: The base model's directory, 16-bit or bitsandbytes 4-bit.
        adapter: Directory of a LoRA adapter in peft's format.
        output: Must not exist.
        dtype: Of the result; ``None`` keeps the base's (that of its embeddings).
        max_shard_size: Largest file, in bytes or as ``"500MB"``. Memory holds one.
        quantize_base: Round the projections of a 16-bit base to NF4 and back, as training on them did.
        check_ids: Tokens int64 [S] whose logits are to agree: see :class:`Parity`. Of a vision-language model, this
            checks the language model; and its layers are not read by transformers for comparison, as others' are.

    Raises:
        ValueError: If the adapter does not fit the base or cannot be merged, ``output`` exists, the disk is too small,
            a weight does not fit ``dtype``, or the check fails. Nothing is left behind then.
    """
    base, output = Path(base), Path(output)
    if output.exists():
        raise ValueError(f"{output} exists already. Name a new directory.")
    weights = FinetunedWeights(base, adapter, quantize_base=quantize_base, vision=None)
    config = weights.config
    dtype = dtype or weights.dtype
    state = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in weights.shapes.items()}
    shards = split_torch_state_dict_into_shards(state, max_shard_size=max_shard_size)
    output.parent.mkdir(parents=True, exist_ok=True)
    total_bytes = sum(t.numel() * t.element_size() for t in state.values())
    _check_disk(output.parent, total_bytes)

    parity = None
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        staged = Path(scratch) / output.name
        staged.mkdir()
        for pattern in _COPIED:
            for file in base.glob(pattern):
                if file.name not in ("config.json", INDEX_NAME) and not file.name.startswith("adapter_"):
                    shutil.copy(file, staged)
        copy_changes(adapter, staged)
        config.dtype = dtype
        config.architectures = [family_of(config).architecture]
        config.save_pretrained(staged)
        for filename, names in shards.filename_to_tensors.items():
            save_file(  # no name for the tensors, which would keep them alive beside the next ones
                {name: _cast(weights, name, dtype) for name in names},
                staged / filename,
                metadata={"format": "pt"},
            )
        if shards.is_sharded:
            index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            (staged / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        if check_ids is not None:
            layers = sorted({0, config.get_text_config().num_hidden_layers - 1})
            for index in layers if family_of(config).vision is None else ():
                _check_layer(base, staged, weights.updates, index, Path(scratch) / f"layer-{index}", quantize_base)
            parity = _check_parity(weights, staged, check_ids)
            if not parity.difference <= parity.tolerance:
                raise ValueError(
                    f"The merged model's logits differ by {parity.difference:.3g} from those of base and adapter, more "
                    f"than {parity.tolerance:.3g}, which rounding to {dtype} explains. It was not kept. Try --dtype "
                    "float32; if that differs too, the files are damaged."
                )
        staged.replace(output)
    weights.close()
    return Merged(
        output, dtype, len(weights.updates), total_bytes, len(shards.filename_to_tensors), weights.is_4bit, parity
    )  # fmt: skip


def _cast(weights: FinetunedWeights, name: str, dtype: torch.dtype) -> Tensor:
    weight = weights.merged(name).to(dtype)
    if not weight.isfinite().all():
        raise ValueError(f"{name!r} is not finite in {dtype}: it has too small a range. Use --dtype bfloat16.")
    return weight.contiguous()


def _check_disk(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed + 64 * 2**20:  # tokenizers take up to some 20 MB
        raise ValueError(
            f"The merged weights need {needed / 2**30:.2f} GiB, but {directory} has {free / 2**30:.2f} GiB free. Free "
            "some, name a directory on another disk, or use a 16-bit --dtype."
        )


# --- the checks ------------------------------------------------------------------------------------------------------


def _check_layer(
    base: Path,
    merged: Path,
    updates: dict[str, LoraUpdate | Replacement],
    index: int,
    scratch: Path,
    quantize_base: bool,
) -> None:
    """Compare a layer of the merged files with the base as transformers reads it, plus the adapter's update."""
    stored = SafetensorsCheckpoint(merged)
    for name, weight in stock_layer(base, index, scratch, quantize=quantize_base).items():
        expected = weight.float()
        if isinstance(update := updates.get(name), LoraUpdate):
            expected = expected + update.scaling * (update.b @ update.a)
        found = stored.get(name)
        # One rounding to the dtype of the files, and the sums of the update in another order.
        dtype, float32 = torch.finfo(found.dtype), torch.finfo(torch.float32)
        tolerance = expected.abs() * dtype.eps / 2 + dtype.tiny * dtype.eps + expected.abs().max() * 16 * float32.eps
        difference = (found.float() - expected).abs()
        if not bool((difference <= tolerance).all()):
            raise ValueError(
                f"The merged {name!r} differs by up to {float(difference.max()):.3g} from what transformers reads as "
                "the base's weight, with the adapter's update added. It was not kept. The base is stored in a way that "
                "is misread here: merge with peft (merge_and_unload), and please report it."
            )
    stored.close()
    shutil.rmtree(scratch)


def _check_parity(weights: FinetunedWeights, merged: Path, ids: Tensor) -> Parity:
    """Compare logits of the merged files with those of base and adapter on ``ids`` int64 [S]."""
    result = FinetunedWeights(merged, vision=None)
    found, eps = result.logits(ids), torch.finfo(result.dtype).eps + 16 * torch.finfo(torch.float32).eps
    result.close()
    expected, unadapted = weights.logits(ids), weights.logits(ids, adapted=False)
    deviation = float((expected - expected.mean(-1, keepdim=True)).std())
    tolerance = 15 * eps / 4 * math.sqrt(7 * weights.config.get_text_config().num_hidden_layers) * deviation
    return Parity(
        float((found - expected).abs().max()), tolerance, float((expected - unadapted).abs().max())
    )  # fmt: skip
