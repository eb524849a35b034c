"""The weights of a finetuned vision-language model by name, as :mod:`.weights` gives a text model's.

Checkpoints, adapters and versions of transformers name the same weights differently. Here the language model's have the
names of a causal language model (``model.layers.0...``, ``lm_head.weight``); those of the vision tower begin with
``vision.``, and those between both with ``projector.``.
"""

from __future__ import annotations

import copy
import functools
import json
import re
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checkpoints.chat_format import TEMPLATE_FILE, ChatFormat, read_changes
from ..checkpoints.config import read_config
from ..lora.adapter_files import read_adapter
from ..models.families import FAMILIES, VISION_FAMILIES, family_of, load_config
from .weights import PROJECTORS, FinetunedWeights, LoraUpdate, Replacement, adapter_config, check_taken, take_updates

_NAMES = (
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^(?:model\.)?(?:language_model|text_model)\.(?:model\.)?"), "model."),
    (re.compile(r"^(?:model\.)?(?:vision_tower|vision_model|visual)\.(?:vision_model\.)?"), "vision."),
    (re.compile(r"^(?:model\.)?(?:multi_modal_projector|connector)\."), "projector."),
)

#: What checkpoints may hold beside a model's weights: indices, rotary frequencies, and the pooling head of SigLIP,
#: which only its classifier uses.
_UNUSED = re.compile(r".*(position_ids|inv_freq)$|vision\.head\..*")


def canonical(name: str) -> str:
    """The name here of a module, weight or bias that a checkpoint, an adapter or transformers calls ``name``."""
    for pattern, replacement in _NAMES:
        renamed = pattern.sub(replacement, name)
        if renamed != name:
            return renamed
    return name


def is_vision_language(directory: str | Path) -> bool:
    """Whether ``config.json`` describes a vision-language model that can be exported.

    Raises:
        ValueError: If it describes a Mllama, for which llama.cpp has no vision tower, or is not readable.
    """
    model_type = read_config(directory).get("model_type")
    if model_type == "mllama":
        raise ValueError(
            f"{directory} is a Mllama (Llama-3.2-Vision). llama.cpp has neither its vision tower nor the "
            "cross-attention layers of its language model (https://github.com/ggml-org/llama.cpp/issues/9643): it "
            "cannot be exported as GGUF. Merge the adapter instead and use transformers or vLLM."
        )
    return model_type in VISION_FAMILIES


def read_weights(
    base: str | Path, adapter: str | Path | None = None, *, quantize_base: bool = False
) -> FinetunedWeights:
    """A finetuned model's weights, be it a text or a vision-language model.

    Raises:
        ValueError: As :class:`~.weights.FinetunedWeights`.
    """
    kind = VisionLanguageWeights if is_vision_language(base) else FinetunedWeights
    return kind(base, adapter, quantize_base=quantize_base)


class VisionLanguageWeights(FinetunedWeights):
    """A vision-language model and, if there is one, its adapter, as dense weights.

    Args:
        base: The model's directory, 16-bit or bitsandbytes 4-bit.
        adapter: Directory of a LoRA adapter in peft's format. It may hold the projector whole (``modules_to_save``).
        quantize_base: Round the projections of the language model to NF4 and back, as training on them did.

    Attributes:
        model_config: The whole configuration; :attr:`config` is the language model's.
        shapes: The shape of each weight of the language model.
        vision_shapes: The shape of each weight of the vision tower and the projector.

    Raises:
        ValueError: As :class:`~.weights.FinetunedWeights`.
    """

    def __init__(self, base: str | Path, adapter: str | Path | None = None, *, quantize_base: bool = False) -> None:
        self.model_config = load_config(base, vision=True)
        self._class = family_of(self.model_config).model_class
        with torch.device("meta"):
            model = self._class(self.model_config)
        model.tie_weights()
        tied = model.lm_head.weight is model.get_input_embeddings().weight
        self.config = copy.deepcopy(self.model_config.get_text_config())
        self.config.tie_word_embeddings = tied
        family = FAMILIES.get(self.config.model_type, FAMILIES["llama"])
        self._open(base, adapter, quantize_base, family.projections, decoder="")
        shapes = {canonical(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        if tied:
            shapes.pop("lm_head.weight")
        self.vision_shapes = {name: each for name, each in shapes.items() if name.startswith(("vision.", "projector."))}
        self.shapes = {name: each for name, each in shapes.items() if name not in self.vision_shapes}
        self._stored = {canonical(name): name for name in self.checkpoint}
        self._check_files(shapes, tied)
        for name, expected in shapes.items():
            self._check_shape(name, expected)
        self.updates = {} if adapter is None else _read_adapter(adapter, model, shapes, tied)

    def _check_files(self, shapes: dict[str, tuple[int, ...]], tied: bool) -> None:
        """Check that the checkpoint holds all weights and no others."""
        names = {self._stored.get(name, name) for name in shapes}
        unused = [name for name in self.checkpoint if _UNUSED.match(canonical(name)) and name not in names]
        if tied and (head := self._stored.get("lm_head.weight")):
            if not torch.equal(self.checkpoint.get(head), self.checkpoint.get(self._stored[_EMBEDDING])):
                raise ValueError(
                    f"{self.checkpoint.directory} holds {head!r}, which is not the embeddings' weight although "
                    "config.json ties them. Set tie_word_embeddings to false in config.json if the head was trained."
                )
            unused.append(head)
        self.checkpoint.check_filled(names, unused=unused)

    @property
    def dtype(self) -> torch.dtype:
        """Of the base's embeddings."""
        return self.base(_EMBEDDING).dtype

    @functools.cached_property
    def chat_format(self) -> ChatFormat:
        """The base's tokenizer, chat template and stop tokens, with what the adapter's training changed. The chat
        template may stand in ``chat_template.json``, beside the tokenizer.
        """
        found = super().chat_format
        path = self.checkpoint.directory / "chat_template.json"
        changed = self.adapter is not None and TEMPLATE_FILE in read_changes(self.adapter)
        if not changed and not found.tokenizer.chat_template and path.is_file():
            found.tokenizer.chat_template = json.loads(path.read_text(encoding="utf-8"))["chat_template"]
        return found

    def _check_shape(self, name: str, expected: tuple[int, ...]) -> None:
        super()._check_shape(self._stored[name], expected)

    def base(self, name: str) -> Tensor:
        """A weight without its adapter, in the dtype that is stored; float32 where that is 4-bit."""
        quantized, self._quantized = self._quantized, self._quantized if name.startswith("model.") else ()
        try:
            return super().base(self._stored[name])
        finally:
            self._quantized = quantized

    def _own_name(self, name: str) -> str:
        return canonical(super()._own_name(canonical(name)))

    def _structure(self) -> PreTrainedModel:
        with torch.device("meta"):
            model = self._class(self.model_config)
        _compute_buffers(model, model)
        # Some models move their inputs to the device of their first parameter.
        for module in model.modules():
            if (first := next(module.named_parameters(recurse=False), None)) is not None:
                name, parameter = first
                setattr(module, name, nn.Parameter(torch.empty_like(parameter, device="cpu"), requires_grad=False))
                break
        return model


_EMBEDDING = "model.embed_tokens.weight"


def _read_adapter(
    adapter: str | Path, model: PreTrainedModel, shapes: dict[str, tuple[int, ...]], tied: bool
) -> dict[str, LoraUpdate | Replacement]:
    """An adapter's updates by name, and what it holds whole."""
    lora = adapter_config(adapter, None)
    if not all(PROJECTORS & {*name.split(".")} for name in lora.modules_to_save or ()):
        lora = adapter_config(adapter)  # says what is wrong with it
    prefix = "base_model.model."
    state = {}
    modules = {canonical(name): name for name, _ in model.named_modules()}
    for key, tensor in read_adapter(adapter, lora).items():
        if key.startswith(f"{prefix}model.layers."):
            raise ValueError(
                f"{adapter} is an adapter of a text model ({key!r}), but its base here is a vision-language model, "
                "whose language model's layers are called otherwise: peft would leave it out."
            )
        module, dot, end = key.removeprefix(prefix).partition(".lora_")
        state[f"{prefix}{modules.get(canonical(module), module)}{dot}{end}" if dot else canonical(module)] = tensor
    taken = take_updates(adapter, lora, state, model, tied_head=tied)
    updates: dict[str, LoraUpdate | Replacement] = {canonical(name): update for name, update in taken.items()}
    for name in [name for name in state if name.startswith(("projector.", "vision."))]:
        trained = state.pop(name).float()
        if shapes.get(name) != tuple(trained.shape):
            raise ValueError(
                f"{adapter}: {name!r} has shape {tuple(trained.shape)}, but the base's has {shapes.get(name)}."
            )
        if not trained.isfinite().all():
            raise ValueError(f"{adapter}: {name!r} is not finite; its training diverged. Take an earlier checkpoint.")
        updates[name] = Replacement(trained)
    check_taken(adapter, state)
    return updates


@torch.no_grad()
def _compute_buffers(model: nn.Module, owner: PreTrainedModel) -> None:
    """Give buffers that are in no checkpoint the values that transformers gives them when it loads a model."""
    for child in model.children():
        _compute_buffers(child, child if isinstance(child, PreTrainedModel) else owner)
    names = sorted(model._non_persistent_buffers_set)
    for name in names:
        buffer = model.get_buffer(name)
        unset = float("nan") if buffer.is_floating_point() else -1
        setattr(model, name, torch.full(buffer.shape, unset, dtype=buffer.dtype, device="cpu"))
    if names:
        owner._init_weights(model)
    for name in names:
        buffer = model.get_buffer(name)
        if bool((buffer.isnan() if buffer.is_floating_point() else buffer < 0).any()):
            raise ValueError(
                f"Buffer {name!r} of {type(model).__name__} is in no checkpoint, and how to compute it is unknown."
            )
