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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from bitsandbytes.functional import QuantState
from huggingface_hub import split_torch_state_dict_into_shards
from peft import LoraConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PretrainedConfig

from ...kernels.nf4 import Quantized4bit, dequantize_4bit, dequantize_quant_state
from ..checkpoints.chat_format import copy_changes
from ..checkpoints.safetensors_files import INDEX_NAME, SafetensorsCheckpoint
from ..lora.adapter_files import read_adapter
from ..lora.config import check_plain_lora
from ..models.build import restore_buffers
from ..models.families import family_of, load_config
from .stock_layer import stock_layer

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


@dataclass(frozen=True)
class _Update:
    a: Tensor  # float32 [R, K]
    b: Tensor  # float32 [N, R]
    scaling: float

    def merged(self, weight: Tensor) -> Tensor:
        """float32 [N, K]."""
        return (self.b @ self.a).mul_(self.scaling).add_(weight)


def adapter_config(adapter: str | Path) -> LoraConfig:
    """The configuration of a peft adapter that can be merged.

    Raises:
        ValueError: If ``adapter`` is no directory of a LoRA adapter, or of a variant that is more than
            ``W + scaling * B @ A`` (DoRA, trained biases, ``modules_to_save``, ...).
    """
    path = Path(adapter) / "adapter_config.json"
    if not path.is_file():
        raise ValueError(f"{adapter} holds no LoRA adapter of peft: {path.name} is missing.")
    try:
        config = PeftConfig.from_pretrained(str(adapter))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    return check_plain_lora(
        config,
        f"The adapter in {adapter}",
        "Merge it with peft: PeftModel.from_pretrained(base, adapter).merge_and_unload().",
    )


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
        check_ids: Tokens int64 [S] whose logits are to agree: see :class:`Parity`.

    Raises:
        ValueError: If the adapter does not fit the base or cannot be merged, ``output`` exists, the disk is too small,
            a weight does not fit ``dtype``, or the check fails. Nothing is left behind then.
    """
    base, output = Path(base), Path(output)
    if output.exists():
        raise ValueError(f"{output} exists already. Name a new directory.")
    config = load_config(base)
    updates = _read_updates(adapter, config)
    weights = _BaseWeights(base, quantize_base, family_of(config).projections)
    dtype = dtype or weights.checkpoint.get("model.embed_tokens.weight").dtype
    with torch.device("meta"):
        model = family_of(config).model_class(config).to(dtype)
    state = model.state_dict()
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    for name, tensor in state.items():
        weights.check_shape(name, tuple(tensor.shape))
    weights.checkpoint.check_filled(state, tied_head=config.tie_word_embeddings)
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
                {name: _merged(weights, updates, name, dtype) for name in names},
                staged / filename,
                metadata={"format": "pt"},
            )
        if shards.is_sharded:
            index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            (staged / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        if check_ids is not None:
            for index in sorted({0, config.num_hidden_layers - 1}):
                _check_layer(base, staged, updates, index, Path(scratch) / f"layer-{index}", quantize_base)
            parity = _check_parity(weights, updates, staged, check_ids)
            if not parity.difference <= parity.tolerance:
                raise ValueError(
                    f"The merged model's logits differ by {parity.difference:.3g} from those of base and adapter, more "
                    f"than {parity.tolerance:.3g}, which rounding to {dtype} explains. It was not kept. Try --dtype "
                    "float32; if that differs too, the files are damaged."
                )
        staged.replace(output)
    weights.checkpoint.close()
    return Merged(
        output, dtype, len(updates), total_bytes, len(shards.filename_to_tensors), weights.is_4bit, parity
    )  # fmt: skip


def _read_updates(adapter: str | Path, config: PretrainedConfig) -> dict[str, _Update]:
    """Weight name -> update. peft itself says which layers are adapted, and with which scaling."""
    lora = adapter_config(adapter)
    state = read_adapter(adapter, lora)
    with torch.device("meta"):
        model = family_of(config).model_class(config)
    try:
        inject_adapter_in_model(lora, model, low_cpu_mem_usage=True)
    except ValueError as error:
        raise ValueError(f"{adapter} does not fit the base: {error}") from error
    updates = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if isinstance(layer.get_base_layer(), nn.Embedding) or (name == "lm_head" and config.tie_word_embeddings):
            raise ValueError(
                f"{adapter} adapts {name!r}. Only linear layers with a weight of their own can be merged: no "
                "embeddings, and no head that shares their weight."
            )
        a, b = (_take(state, adapter, f"base_model.model.{name}.lora_{part}.weight") for part in "AB")
        n, k = layer.out_features, layer.in_features
        rank = layer.r["default"]
        if a.shape != (rank, k) or b.shape != (n, rank):
            raise ValueError(
                f"{adapter}: A {tuple(a.shape)} and B {tuple(b.shape)} of {name!r} do not fit a weight {(n, k)} at "
                f"rank {rank}. The adapter was made for another model."
            )
        updates[f"{name}.weight"] = _Update(a, b, layer.scaling["default"])
    if state:
        raise ValueError(
            f"{adapter} holds {min(state)!r}, which is no LoRA weight of the base. It is for another model, or was "
            "saved with copies of base weights, which PeftModel.save_pretrained(save_embedding_layers=False) leaves "
            "out."
        )
    return updates


def _take(state: dict[str, Tensor], adapter: str | Path, key: str) -> Tensor:
    if key not in state:
        raise ValueError(f"{adapter} lacks {key!r}, which its adapter_config.json and the base imply.")
    tensor = state.pop(key).float()
    if not tensor.isfinite().all():
        raise ValueError(f"{adapter}: {key!r} is not finite; its training diverged. Take an earlier checkpoint.")
    return tensor


class _BaseWeights:
    """The base's weights by name, dense, whatever they are stored as."""

    def __init__(self, base: Path, quantize: bool, projections: Sequence[str]) -> None:
        self.checkpoint = SafetensorsCheckpoint(base)
        if quantize and self.checkpoint.is_quantized:
            raise ValueError(f"{base} is quantized already: leave quantize_base off.")
        self.quantize, self.projections = quantize, projections
        self.is_4bit = self.checkpoint.is_quantized or quantize

    def check_shape(self, name: str, expected: tuple[int, ...]) -> None:
        state = self.checkpoint.quant_state(name)
        shape = self.checkpoint.shape(name) if state is None else tuple(state["shape"])
        if shape != expected:
            raise ValueError(
                f"{self.checkpoint.directory}: {name!r} has shape {shape}, but config.json implies {expected}."
            )

    def dense(self, name: str) -> Tensor:
        """In the dtype that is stored; float32 where that is 4-bit."""
        stored = self.checkpoint.get(name)
        state = self.checkpoint.quant_state(name)
        if state is not None:
            prefix = f"{name}."
            parts = {key: self.checkpoint.get(key) for key in self.checkpoint if key.startswith(prefix)}
            quant_state = QuantState.from_dict(parts, device=torch.device("cpu"))
            return dequantize_quant_state(stored, quant_state, dtype=torch.float32)
        if self.quantize and name.endswith(tuple(f"{each}.weight" for each in self.projections)):
            return dequantize_4bit(Quantized4bit.quantize(stored), dtype=torch.float32)
        return stored


def _merged(weights: _BaseWeights, updates: dict[str, _Update], name: str, dtype: torch.dtype) -> Tensor:
    weight = weights.dense(name)
    if name in updates:
        weight = updates[name].merged(weight)
    weight = weight.to(dtype)
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
    base: Path, merged: Path, updates: dict[str, _Update], index: int, scratch: Path, quantize_base: bool
) -> None:
    """Compare a layer of the merged files with the base as transformers reads it, plus the adapter's update."""
    stored = SafetensorsCheckpoint(merged)
    for name, weight in stock_layer(base, index, scratch, quantize=quantize_base).items():
        expected = weight.float()
        if update := updates.get(name):
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


def _check_parity(weights: _BaseWeights, updates: dict[str, _Update], merged: Path, ids: Tensor) -> Parity:
    """Compare logits of the merged files with those of base and adapter on ``ids`` int64 [S]."""
    config = load_config(merged)
    checkpoint = SafetensorsCheckpoint(merged)
    result = _streamed_logits(config, checkpoint.get, {}, ids)
    expected = _streamed_logits(config, weights.dense, updates, ids)
    unadapted = _streamed_logits(config, weights.dense, {}, ids)
    eps = torch.finfo(checkpoint.get("model.norm.weight").dtype).eps + 16 * torch.finfo(torch.float32).eps
    deviation = float((expected - expected.mean(-1, keepdim=True)).std())
    checkpoint.close()
    tolerance = 15 * eps / 4 * math.sqrt(7 * config.num_hidden_layers) * deviation
    return Parity(
        float((result - expected).abs().max()), tolerance, float((expected - unadapted).abs().max())
    )  # fmt: skip


@torch.no_grad()
def _streamed_logits(
    config: PretrainedConfig, weight: Callable[[str], Tensor], updates: dict[str, _Update], ids: Tensor
) -> Tensor:
    """Logits float32 [S, V] of a model whose layers get their weights when they are called and lose them after."""
    with torch.device("meta"):
        model = family_of(config).model_class(config).eval().float()
    restore_buffers(model, torch.device("cpu"))

    def load(module: nn.Module, name: str) -> None:
        for attribute, _ in list(module.named_parameters(recurse=False)):
            full = f"{name}.{attribute}"
            if full == "lm_head.weight" and config.tie_word_embeddings:
                full = "model.embed_tokens.weight"
            setattr(module, attribute, nn.Parameter(weight(full).float(), requires_grad=False))

    def finish(module: nn.Module, inputs: tuple[Tensor], output: Tensor, name: str) -> Tensor:
        module.to("meta")
        update = updates.get(f"{name}.weight")
        return output if update is None else output + inputs[0] @ update.a.T @ update.b.T * update.scaling

    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_pre_hook(lambda module, _, name=name: load(module, name))
            module.register_forward_hook(lambda module, i, o, name=name: finish(module, i, o, name))
    return model(input_ids=ids[None], use_cache=False).logits[0]  # type: ignore[no-any-return]
