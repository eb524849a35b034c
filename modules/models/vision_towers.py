"""What turns images into tokens of the language model, per family: where it is, what it takes, and what can be adapted.

A vision-language model of transformers has a *tower* (blocks over patches of the images), a *projector* (from the
tower's width to the language model's) and a language model. Names here are those within ``model``, the part without the
language model's head.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

#: Linear layers of a tower's block in all families, by the last component of their names.
_TOWER_LINEARS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv", "proj", "gate_proj", "up_proj", "down_proj", "fc1",
    "fc2", "linear_fc1", "linear_fc2",
)  # fmt: skip

#: Where blocks are in a tower.
_BLOCKS = ("encoder.layers", "vision_model.encoder.layers", "transformer.layers", "blocks")


@dataclass(frozen=True)
class VisionSide:
    """The part of a vision-language model that turns images into tokens.

    Attributes:
        tower: Name of the tower.
        projectors: Names of the modules that map the tower's results to the language model.
        projector_linears: Names of their linear layers, as regular expressions.
        inputs: What a batch may hold for images, beside ``pixel_values``.
        language_model: Name of the decoder.
        mrope: Whether tokens have three positions (time, height, width), which come from ``image_grid_thw``.
        images_see_themselves: Whether the tokens of an image attend to each other in both directions.
    """

    tower: str
    projectors: tuple[str, ...]
    projector_linears: tuple[str, ...]
    inputs: tuple[str, ...] = ()
    language_model: str = "language_model"
    mrope: bool = False
    images_see_themselves: bool = False

    def blocks(self, inner: nn.Module) -> nn.ModuleList:
        """The tower's blocks, of ``model``."""
        tower = inner.get_submodule(self.tower)
        for name in _BLOCKS:
            try:
                found = tower.get_submodule(name)
            except AttributeError:
                continue
            assert isinstance(found, nn.ModuleList)
            return found
        raise AssertionError(f"No blocks are known in {type(tower).__name__}.")

    def last_block(self, config: PretrainedConfig) -> int | None:
        """How many blocks come to effect: Llava 1.5 takes the result of the last but one. ``None`` for all."""
        chosen = getattr(config, "vision_feature_layer", None)
        if chosen is None:
            return None
        depth = config.vision_config.num_hidden_layers
        layers = [chosen] if isinstance(chosen, int) else list(chosen)
        return max(layer if layer >= 0 else depth + 1 + layer for layer in layers)

    def projector_modules(self, config: PretrainedConfig) -> tuple[str, ...]:
        """The projector's modules, each element of a list by itself, as peft wants ``modules_to_save``."""
        names = []
        for name in self.projectors:
            elements = len(config.vision_config.deepstack_visual_indexes) if name.endswith("_list") else 0
            names += [f"{name}.{i}" for i in range(elements)] or [name]
        return tuple(names)

    def targets(self, config: PretrainedConfig, projections: Sequence[str], *, tower: bool, projector: bool) -> str:
        """peft's ``target_modules``, a regular expression over whole names: a list of last components would also match
        layers of the tower, which are called as those of the language model.

        Args:
            config: The model's.
            projections: Of the language model, by the last component of their names.
            tower: Whether to adapt the tower's blocks, those that come to effect.
            projector: Whether to adapt the projector.
        """
        names = [rf"{self.language_model}\.layers\.\d+\.\w+\.({'|'.join(sorted(projections))})"]
        if tower:
            used = self.last_block(config)
            number = r"\d+" if used is None else f"({'|'.join(map(str, range(used)))})"
            names.append(rf"{self.tower}\.(\w+\.)*(layers|blocks)\.{number}\.\w+\.({'|'.join(_TOWER_LINEARS)})")
        if projector:
            names += self.projector_linears
        return rf"model\.({'|'.join(names)})"

    def blank(self, config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Inputs of the smallest image that the tower takes. Not of zeros: Idefics3 takes those for padding."""
        vision = config.vision_config
        if self.mrope:
            merge = vision.spatial_merge_size
            width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
            return {
                "pixel_values": torch.ones(merge**2, width, device=device, dtype=dtype),
                "image_grid_thw": torch.tensor([[1, merge, merge]]),
            }
        size = vision.image_size
        if "image_sizes" in self.inputs and vision.model_type == "pixtral":
            size = vision.patch_size
            sizes = {"image_sizes": torch.tensor([[size, size]])}
        else:
            sizes = {}
        pixels = torch.ones(1, vision.num_channels, size, size, device=device, dtype=dtype)
        return {"pixel_values": pixels[None] if self is IDEFICS3 else pixels, **sizes}


LLAVA = VisionSide(
    tower="vision_tower",
    projectors=("multi_modal_projector",),
    projector_linears=(r"multi_modal_projector\.linear_[12]",),
    inputs=("image_sizes",),
)

_QWEN: dict[str, Any] = {
    "tower": "visual",
    "inputs": ("image_grid_thw", "mm_token_type_ids"),
    "mrope": True,
}

QWEN2_VL = QWEN2_5_VL = VisionSide(
    **_QWEN, projectors=("visual.merger",), projector_linears=(r"visual\.merger\.mlp\.\d",)
)

QWEN3_VL = VisionSide(
    **_QWEN,
    projectors=("visual.merger", "visual.deepstack_merger_list"),
    projector_linears=(r"visual\.(merger|deepstack_merger_list\.\d+)\.linear_fc[12]",),
)

IDEFICS3 = VisionSide(
    tower="vision_model",
    projectors=("connector",),
    projector_linears=(r"connector\.modality_projection\.proj",),
    inputs=("pixel_attention_mask",),
    language_model="text_model",
)

GEMMA3 = VisionSide(
    tower="vision_tower",
    projectors=("multi_modal_projector",),
    projector_linears=(),
    inputs=("token_type_ids", "mm_token_type_ids"),
    images_see_themselves=True,
)


def matches(pattern: str, name: str) -> bool:
    """Whether peft's regular expression ``pattern`` takes the module ``name``."""
    return re.fullmatch(pattern, name) is not None
