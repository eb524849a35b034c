"""The vision side of a model at work: blocks that are recomputed and compiled, and attention per image without a mask.

Mixins for transformers' classes. Each image, or window of an image, is a *segment* whose patches see each other.

Shapes: P patches of all images of a batch, D width of the tower, N heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..attention.segments import segment_attention
from ..attention.transformers_interface import BatchAttention, attention
from .decoder import Float32Buffers, mixed
from .decoder_layer import CheckpointedLayer
from .families import Family


class TowerBlock(CheckpointedLayer):
    """Mixin for the blocks of a vision tower.

    Attributes:
        tower_learns: Whether anything in the tower is trained. If not, there is no backward to keep anything for.
    """

    tower_learns = False

    def _learns(self, kwargs: dict[str, Any]) -> bool:
        return self.tower_learns and super()._learns(kwargs)


class _QwenBlock(TowerBlock):
    """Of Qwen2-VL and its successors.

    Attributes:
        is_windowed: Whether patches see those of their window, instead of those of their image.
    """

    is_windowed = False

    def __call__(
        self, hidden_states: Tensor, *args: Any, segments: tuple[BatchAttention, BatchAttention] | None = None,
        **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """hidden_states [P, D] -> [P, D]; of ``segments`` the first are images and the second windows."""
        if segments is None:
            return super().__call__(hidden_states, *args, **kwargs)
        # Neither the boundaries as tensors nor the longest length, which would make a graph per number.
        return super().__call__(
            hidden_states, None, position_embeddings=kwargs["position_embeddings"],
            batch_attention=segments[self.is_windowed],
        )  # fmt: skip


class _QwenAttention(nn.Module):
    """Mixin for their attention, which would call SDPA once per image, or window of it."""

    num_heads: int
    scaling: float
    qkv: Any
    proj: Any

    def forward(
        self, hidden_states: Tensor, cu_seqlens: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None, batch_attention: BatchAttention | None = None,
        **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """hidden_states [P, D] -> [P, D]."""
        if batch_attention is None or position_embeddings is None:
            return super().forward(  # type: ignore[misc,no-any-return]
                hidden_states, cu_seqlens, position_embeddings=position_embeddings, **kwargs
            )
        split: Tensor = self.qkv(hidden_states).view(len(hidden_states), 3, self.num_heads, -1)
        query, key, value = split.unbind(1)
        query, key = (_rotate(each, *position_embeddings) for each in (query, key))
        query, key, value = (each.transpose(0, 1)[None] for each in (query, key, value))  # one row
        output, _ = attention(self, query, key, value, None, scaling=self.scaling, batch_attention=batch_attention)
        return self.proj(output.reshape(len(hidden_states), -1))  # type: ignore[no-any-return]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [P, N, D / N] in float32, ``cos`` and ``sin`` [P, D / N]."""
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (wide * cos.float().unsqueeze(1) + turned * sin.float().unsqueeze(1)).to(x.dtype)


class _QwenImages(nn.Module):
    """Mixin for the part of the model without a head: says where images and windows are."""

    visual: Any

    def get_image_features(
        self, pixel_values: Tensor, image_grid_thw: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """As transformers': pixel_values of P patches, image_grid_thw [images, 3], which may be on the host."""
        if image_grid_thw is None:
            raise ValueError("The batch holds pixel_values without image_grid_thw, which says how patches lie.")
        tower, grids = self.visual, image_grid_thw.tolist()
        images = [height * width for time, height, width in grids for _ in range(time)]
        segments = [segment_attention(images, pixel_values.device)] * 2
        if hasattr(tower, "fullatt_block_indexes"):
            windows = _windows(grids, tower.spatial_merge_size, tower.window_size, tower.patch_size)
            segments[1] = segment_attention(windows, pixel_values.device)
        return super().get_image_features(  # type: ignore[misc,no-any-return]
            pixel_values, image_grid_thw.to(pixel_values.device), return_dict=True, segments=tuple(segments)
        )


def _windows(grids: list[list[int]], merge: int, window_size: int, patch_size: int) -> list[int]:
    """Patches of each window of Qwen2.5-VL, in the order in which its tower lays them out."""
    side = window_size // merge // patch_size  # in tokens of merge x merge patches
    lengths = []
    for time, height, width in grids:
        rows, columns = height // merge, width // merge
        heights = [min(side, rows - top) for top in range(0, rows, side)]
        widths = [min(side, columns - left) for left in range(0, columns, side)]
        lengths += [h * w * merge**2 for _ in range(time) for h in heights for w in widths]
    return lengths


class _LlavaImages(nn.Module):
    """Mixin for Llava without a head: runs only the blocks that come to effect.

    transformers collects the results of all blocks by hooks, which torch.compile cannot trace.
    """

    config: Any
    vision_tower: Any
    multi_modal_projector: Any

    def get_image_features(
        self, pixel_values: Tensor, vision_feature_layer: Any = None, vision_feature_select_strategy: str | None = None,
        image_sizes: Tensor | None = None, **kwargs: Any,
    ) -> BaseModelOutputWithPooling:  # fmt: skip
        """As transformers'; ``pooler_output`` is a list with the features [tokens, H] of each image."""
        layer = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        strategy = vision_feature_select_strategy or self.config.vision_feature_select_strategy
        tower, chosen = self.vision_tower, [layer] if isinstance(layer, int) else list(layer)
        if self.config.vision_config.model_type == "pixtral":
            selected, counts = self._of_pixtral(pixel_values, image_sizes, chosen)
        else:
            tower = getattr(tower, "vision_model", tower)
            hidden = tower.embeddings(pixel_values)
            if hasattr(tower, "pre_layrnorm"):
                hidden = tower.pre_layrnorm(hidden)
            depth = len(tower.encoder.layers)
            indices = [index if index >= 0 else depth + 1 + index for index in chosen]
            results = [hidden]
            for block in tower.encoder.layers[: max(indices)]:
                results.append(block(results[-1], None))
            picked = [results[index][:, 1:] if strategy == "default" else results[index] for index in indices]
            selected, counts = torch.cat(picked, dim=-1), None
        features = self.multi_modal_projector(selected)
        split = list(features) if counts is None else list(features[0].split(counts))
        return BaseModelOutputWithPooling(last_hidden_state=selected, pooler_output=split)

    def _of_pixtral(
        self, pixel_values: Tensor, image_sizes: Tensor | None, chosen: list[int]
    ) -> tuple[Tensor, list[int]]:
        """The last block's results for all images in one row [1, P, D], and the patches of each."""
        if chosen != [-1]:
            raise ValueError(
                f"config.json has vision_feature_layer={chosen}, but of a Pixtral tower only the last block's results "
                "(-1) are taken here."
            )
        if image_sizes is None:
            image_sizes = torch.tensor([pixel_values.shape[-2:]] * len(pixel_values))
        sizes, patch = image_sizes.tolist(), self.vision_tower.patch_size
        counts = [(height // patch) * (width // patch) for height, width in sizes]
        outputs = self.vision_tower(
            pixel_values, image_sizes=sizes, batch_attention=segment_attention(counts, pixel_values.device)
        )
        return outputs.last_hidden_state, counts


class _PixtralBlock(TowerBlock):
    def __call__(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
        """hidden_states [1, P, D] -> [1, P, D], without the mask of P x P."""
        return super().__call__(hidden_states, None, **kwargs)


def specialize_tower(inner: Any, family: Family, config: PretrainedConfig) -> None:
    """Give the vision side of ``inner``, the model without its head, the mixins above, in place."""
    assert family.vision is not None
    tower, blocks = inner.get_submodule(family.vision.tower), family.vision.blocks(inner)
    block_mixin: type = TowerBlock
    if family.vision.mrope:
        inner.__class__, block_mixin = mixed(_QwenImages, type(inner)), _QwenBlock
        tower.rotary_pos_emb.__class__ = mixed(Float32Buffers, type(tower.rotary_pos_emb))
    elif family.model_type == "llava":
        inner.__class__ = mixed(_LlavaImages, type(inner))
        if config.vision_config.model_type == "pixtral":
            block_mixin, rotary = _PixtralBlock, tower.patch_positional_embedding
            rotary.__class__ = mixed(Float32Buffers, type(rotary))
    windowless = getattr(tower, "fullatt_block_indexes", range(len(blocks)))
    block: Any
    for index, block in enumerate(blocks):
        block.__class__ = mixed(block_mixin, type(block))
        if block_mixin is _QwenBlock:
            block.is_windowed = index not in windowless
            block.attn.__class__ = mixed(_QwenAttention, type(block.attn))
