"""The weights of a finetuned model by name: a base in any form, its adapter merged, one tensor in memory at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from bitsandbytes.functional import QuantState
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PretrainedConfig

from ...kernels.nf4 import Quantized4bit, dequantize_4bit, dequantize_quant_state
from ..checkpoints.chat_format import ChatFormat
from ..checkpoints.resolve import base_name, resolve_model
from ..checkpoints.safetensors_files import SafetensorsCheckpoint
from ..lora.adapter_files import read_adapter
from ..lora.config import read_adapter_config
from ..models.build import restore_buffers
from ..models.families import family_of, load_config


@dataclass(frozen=True)
class LoraUpdate:
    """What an adapter adds to a weight [N, K].

    Attributes:
        a: float32 [R, K].
        b: float32 [N, R].
        scaling: Factor of ``b @ a``.
    """

    a: Tensor
    b: Tensor
    scaling: float

    def merged(self, weight: Tensor) -> Tensor:
        """float32 [N, K]."""
        return (self.b @ self.a).mul_(self.scaling).add_(weight)


@dataclass(frozen=True)
class Replacement:
    """A tensor that was trained in full, in place of the base's: of a vision-language model's projector.

    Attributes:
        trained: float32, of the base's shape.
    """

    trained: Tensor

    def merged(self, weight: Tensor) -> Tensor:
        """The trained tensor."""
        return self.trained


def adapter_config(adapter: str | Path, trained_modules: Sequence[str] | None = ()) -> LoraConfig:
    """The configuration of a peft adapter that can be merged.

    Args:
        adapter: Its directory.
        trained_modules: Modules that may have been trained in full, of a vision-language model its projector's;
            ``None`` allows any, for whoever checks them later.

    Raises:
        ValueError: If ``adapter`` is no directory of a LoRA adapter, or of a variant that is more than
            ``W + scaling * B @ A`` (DoRA, trained biases, ``modules_to_save``, ...).
    """
    return read_adapter_config(
        adapter, "Merge it with peft: PeftModel.from_pretrained(base, adapter).merge_and_unload().", trained_modules
    )


@dataclass(frozen=True)
class Base:
    """The base of an adapter.

    Attributes:
        directory: Where it is.
        trained_on: What the adapter calls its base; empty if it names none.
        same: Whether it is that one, going by its name.
    """

    directory: Path
    trained_on: str
    same: bool

    @property
    def warning(self) -> str | None:
        """What to tell the user if it is another one."""
        if self.same or not self.trained_on:
            return None
        return f"the adapter was trained on {self.trained_on}, not on {self.directory}; its effect may be another."


def find_base(model: str | None, adapter: str | Path) -> Base:
    """The directory of ``model``, or of the base that the adapter names.

    Raises:
        ValueError: If the adapter cannot be merged, or there is no such base.
    """
    trained_on = adapter_config(adapter, None).base_model_name_or_path or ""
    if not (model or trained_on):
        raise ValueError(f"{adapter} does not name its base. Pass --model.")
    try:
        directory = resolve_model(model or trained_on)
    except ValueError as error:
        if model:
            raise
        raise ValueError(f"{error} This is the base that the adapter names; pass --model to name another.") from error
    same = bool(trained_on) and _last_part(model or trained_on, directory) == _last_part(trained_on, Path(trained_on))
    return Base(directory, trained_on, same)


def _last_part(model: str, directory: Path) -> str:
    """What remains of a model's name when its directory or organisation changes."""
    return Path(base_name(model, directory)).name


def read_updates(adapter: str | Path, config: PretrainedConfig) -> dict[str, LoraUpdate | Replacement]:
    """Weight name -> update. peft itself says which layers are adapted, and with which scaling.

    What was trained in full is in it too, which only a vision-language model's projector may have been.

    Raises:
        ValueError: If the adapter does not fit a model of ``config``, is not finite, or cannot be merged.
    """
    vision = family_of(config).vision
    lora = adapter_config(adapter, () if vision is None else vision.projector_modules(config))
    state = read_adapter(adapter, lora)
    with torch.device("meta"):
        model = family_of(config).model_class(config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    in_full, lora = tuple(lora.modules_to_save or ()), copy.copy(lora)
    lora.modules_to_save = None
    try:
        inject_adapter_in_model(lora, model, low_cpu_mem_usage=True)
    except ValueError as error:
        raise ValueError(f"{adapter} does not fit the base: {error}") from error
    updates: dict[str, LoraUpdate | Replacement] = {}
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
        updates[f"{name}.weight"] = LoraUpdate(a, b, layer.scaling["default"])
    for name, shape in shapes.items():
        if any(f".{module}." in f".{name}" for module in in_full):
            trained = _take(state, adapter, f"base_model.model.{name}")
            if trained.shape != shape:
                raise ValueError(f"{adapter}: {name!r} has shape {tuple(trained.shape)}, not {tuple(shape)}.")
            updates[name] = Replacement(trained)
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


class FinetunedWeights:
    """A base and, if there is one, its adapter, as the dense weights of one model.

    Args:
        base: The base model's directory, 16-bit or bitsandbytes 4-bit.
        adapter: Directory of a LoRA adapter in peft's format.
        quantize_base: Round the language model's projections of a 16-bit base to NF4 and back, as training on them did.
        vision: As of :func:`~lightning_qlora.modules.models.families.load_config`.

    Attributes:
        config: The base's configuration.
        adapter: The adapter's directory.
        shapes: The shape of each weight by transformers' name for it. A head tied to the embeddings is none.
        updates: What the adapter changes, by weight name.
        is_4bit: Whether the base is taken as quantized to 4 bits.

    Raises:
        ValueError: If the base cannot be read or its weights are not those that its configuration implies, or the
            adapter does not fit it.
    """

    def __init__(
        self, base: str | Path, adapter: str | Path | None = None, *, quantize_base: bool = False,
        vision: bool | None = False,
    ) -> None:  # fmt: skip
        self.config = load_config(base, vision=vision)
        self.adapter = None if adapter is None else Path(adapter)
        self.updates = {} if adapter is None else read_updates(adapter, self.config)
        self.checkpoint = SafetensorsCheckpoint(base)
        if quantize_base and self.checkpoint.is_quantized:
            raise ValueError(f"{base} is quantized already: leave quantize_base off.")
        self._quantized = (
            tuple(f"{each}.weight" for each in family_of(self.config).projections) if quantize_base else ()
        )
        side = family_of(self.config).vision
        self._decoder = "model." if side is None else f"model.{side.language_model}."
        self.is_4bit = self.checkpoint.is_quantized or quantize_base
        with torch.device("meta"):
            state = family_of(self.config).model_class(self.config).state_dict()
        if self.config.tie_word_embeddings:
            state.pop("lm_head.weight", None)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        self.checkpoint.check_filled(self.shapes, tied_head=self.config.tie_word_embeddings)
        for name, expected in self.shapes.items():
            self._check_shape(name, expected)

    @property
    def chat_format(self) -> ChatFormat:
        """The base's tokenizer, chat template and stop tokens, with what the adapter's training changed."""
        return ChatFormat.of(self.checkpoint.directory, self.adapter)

    @property
    def dtype(self) -> torch.dtype:
        """Of the base's embeddings."""
        return self.checkpoint.get(self.checkpoint.embedding).dtype

    def _check_shape(self, name: str, expected: tuple[int, ...]) -> None:
        state = self.checkpoint.quant_state(name)
        shape = self.checkpoint.shape(name) if state is None else tuple(state["shape"])
        if shape != expected:
            raise ValueError(
                f"{self.checkpoint.directory}: {name!r} has shape {shape}, but config.json implies {expected}."
            )

    def base(self, name: str) -> Tensor:
        """A weight without its adapter, in the dtype that is stored; float32 where that is 4-bit."""
        stored = self.checkpoint.get(name)
        state = self.checkpoint.quant_state(name)
        if state is not None:
            prefix = f"{name}."
            parts = {key: self.checkpoint.get(key) for key in self.checkpoint if key.startswith(prefix)}
            quant_state = QuantState.from_dict(parts, device=torch.device("cpu"))
            return dequantize_quant_state(stored, quant_state, dtype=torch.float32)
        if name.startswith(self._decoder) and name.endswith(self._quantized):
            return dequantize_4bit(Quantized4bit.quantize(stored), dtype=torch.float32)
        return stored

    def merged(self, name: str) -> Tensor:
        """A weight with its adapter: float32 where it is adapted, else as :meth:`base`."""
        weight = self.base(name)
        return self.updates[name].merged(weight) if name in self.updates else weight

    @torch.no_grad()
    def logits(
        self,
        ids: Tensor,
        *,
        adapted: bool = True,
        keep: Tensor | None = None,
        rounded: Callable[[str, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Logits of transformers' own model in float32, whose layers get their weights when they are called and lose
        them after. The adapter is computed beside its layers, not merged.

        Args:
            ids: int64 [S] or [B, S]. Rows that are shorter may be filled up at their end with any token.
            adapted: Whether the adapter takes part.
            keep: The positions whose logits are wanted, int64 [P]; by default all S.
            rounded: Called with the name of each merged weight and the weight; returns what to compute with instead.

        Returns:
            float32 [P, V] or [B, P, V].
        """
        with torch.device("meta"):
            model = family_of(self.config).model_class(self.config).eval().float()
        model.set_attn_implementation("eager")  # the only one of transformers' that caps scores
        restore_buffers(model, torch.device("cpu"))
        updates = self.updates if adapted and rounded is None else {}
        weight = self.base if rounded is None else lambda name: rounded(name, self.merged(name))
        for name, module in model.named_modules():
            if next(module.parameters(recurse=False), None) is not None:
                tied = self.checkpoint.embedding if self.config.tie_word_embeddings else None
                update = updates.get(f"{name}.weight")
                module.register_forward_pre_hook(_load_before(weight, name, tied))
                module.register_forward_hook(_unload_after(update if isinstance(update, LoraUpdate) else None))
        batch = ids if ids.ndim == 2 else ids[None]
        logits: Tensor = model(input_ids=batch, use_cache=False, logits_to_keep=0 if keep is None else keep).logits
        return logits if ids.ndim == 2 else logits[0]

    def close(self) -> None:
        """Close the files."""
        self.checkpoint.close()


@dataclass(frozen=True)
class LogitDifference:
    """How the logits of two models differ.

    Attributes:
        largest: Largest difference of a logit.
        mean: Mean absolute difference of the logits.
        kl: Mean KL divergence of the second model's next-token distribution from the first's, in nats.
    """

    largest: float
    mean: float
    kl: float


def logit_difference(first: FinetunedWeights, second: FinetunedWeights, ids: Tensor) -> LogitDifference:
    """Compare the logits of two models of the same shapes.

    Args:
        first: The reference.
        second: Another.
        ids: Tokens int64 [S].

    Raises:
        ValueError: If their weights differ in names or shapes.
    """
    if first.shapes != second.shapes:
        name = sorted(first.shapes.items() ^ second.shapes.items())[0][0]
        raise ValueError(
            f"{second.checkpoint.directory} is no other form of {first.checkpoint.directory}: {name!r} differs."
        )
    expected, found = first.logits(ids), second.logits(ids)
    p, q = expected.log_softmax(-1), found.log_softmax(-1)
    difference = (found - expected).abs()
    return LogitDifference(
        float(difference.max()), float(difference.mean()), float((p.exp() * (p - q)).sum(-1).mean())
    )  # fmt: skip


def _load_before(weight: Callable[[str], Tensor], name: str, tied: str | None) -> Callable[[nn.Module, object], None]:
    def load(module: nn.Module, _: object) -> None:
        for attribute, _parameter in list(module.named_parameters(recurse=False)):
            full = f"{name}.{attribute}"
            if full == "lm_head.weight" and tied is not None:
                full = tied
            setattr(module, attribute, nn.Parameter(weight(full).float(), requires_grad=False))

    return load


def _unload_after(update: LoraUpdate | None) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
    def unload(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        module.to("meta")
        return output if update is None else output + inputs[0] @ update.a.T @ update.b.T * update.scaling

    return unload
