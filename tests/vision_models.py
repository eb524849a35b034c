"""Tiny random vision-language models of every family, and batches as their processors make them."""

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qlora.modules.models.families import VISION_FAMILIES

VOCAB_SIZE, IMAGE = 120, 110

_TEXT: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCAB_SIZE, "max_position_embeddings": 128, "initializer_range": 0.1,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}

_QWEN_VISION: dict[str, Any] = {
    "depth": 3, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
    "initializer_range": 0.1,
}  # fmt: skip

_SIGLIP: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4, "initializer_range": 0.1,
}  # fmt: skip

#: By a name: the family's ``model_type`` and its configuration.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llava": ("llava", {
        "text_config": {"model_type": "llama", **_TEXT}, "image_token_index": IMAGE,
        "vision_config": {"model_type": "clip_vision_model", "projection_dim": 16, **_SIGLIP},
    }),
    "pixtral": ("llava", {
        "text_config": {"model_type": "mistral", "head_dim": 16, "sliding_window": None, **_TEXT},
        "image_token_index": IMAGE, "vision_feature_layer": -1, "vision_feature_select_strategy": "full",
        "vision_config": {"model_type": "pixtral", **_SIGLIP, "image_size": 32, "head_dim": 16},
    }),
    "qwen2_vl": ("qwen2_vl", {
        "text_config": {**_TEXT, "rope_parameters": _MROPE},
        "vision_config": {**_QWEN_VISION, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
    }),
    "qwen2_5_vl": ("qwen2_5_vl", {
        "text_config": {**_TEXT, "rope_parameters": _MROPE},
        # The MLP's last layer cannot be 4-bit, as in the real model.
        "vision_config": {**_QWEN_VISION, "hidden_size": 32, "intermediate_size": 44, "out_hidden_size": 64,
                          "window_size": 16, "fullatt_block_indexes": [1]},
    }),
    "qwen3_vl": ("qwen3_vl", {
        "text_config": {**_TEXT, "head_dim": 16, "rope_parameters": {**_MROPE, "mrope_interleaved": True}},
        "vision_config": {**_QWEN_VISION, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64,
                          "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 2]},
    }),
    "idefics3": ("idefics3", {
        "text_config": {"model_type": "llama", **_TEXT}, "scale_factor": 2, "vision_config": _SIGLIP,
    }),
    "smolvlm": ("smolvlm", {
        "text_config": {"model_type": "llama", **_TEXT}, "scale_factor": 2, "vision_config": _SIGLIP,
    }),
    "gemma3": ("gemma3", {
        "text_config": {**_TEXT, "head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16,
                        "layer_types": ["sliding_attention", "full_attention"]},
        "vision_config": _SIGLIP, "mm_tokens_per_image": 4,
    }),
}  # fmt: skip


def save(directory: Path, name: str, **options: Any) -> Path:
    """Random weights in bfloat16; norms are not one and biases not zero, so that they matter."""
    torch.manual_seed(0)
    model_type, shape = SHAPES[name]
    family = VISION_FAMILIES[model_type]
    tokens = {} if model_type == "llava" else {"image_token_id": IMAGE}
    if model_type in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        tokens |= {"video_token_id": 111, "vision_start_token_id": 112, "vision_end_token_id": 113}
    config = family.model_class.config_class(**{"tie_word_embeddings": False, **tokens, **shape, **options})
    model = family.model_class(config)
    for parameter_name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, parameter.mean().item() if "norm" in parameter_name else 0.0, 0.2)
        elif "mm_input_projection" in parameter_name:
            nn.init.normal_(parameter, 0.0, 0.1)
    model.to(torch.bfloat16).save_pretrained(directory)
    return directory


#: Sizes of images in patches, height and width, that are drawn one after another.
_SIZES = ((4, 4), (6, 4), (2, 8), (4, 6))


def batch_of(name: str, images_of_rows: list[int], length: int = 40, seed: int = 0) -> dict[str, Tensor]:
    """A batch of rows with so many images each, padded on the right, as the family's processor makes it.

    ``labels`` are -100 on images, padding and the first four tokens.
    """
    model_type, generator = SHAPES[name][0], torch.Generator().manual_seed(seed)
    sizes = iter(itertools.cycle(_SIZES))
    rows, pixels, grids = [], [], []
    varied = name == "pixtral" or model_type.startswith("qwen")
    for count in images_of_rows:
        row = torch.randint(3, 100, (3,), generator=generator).tolist()
        for _ in range(count):
            height, width = next(sizes) if varied else (4, 4)
            if model_type.startswith("qwen"):
                tokens = height * width // 4
                pixels.append(torch.randn(height * width, 3 * 2 * 4 * 4, generator=generator))
                grids.append([1, height, width])
            else:
                pixels.append(torch.randn(3, height * 4, width * 4, generator=generator))
                grids.append([height * 4, width * 4])
                tokens = height * width if model_type == "llava" else 4
            row += [112, *[IMAGE] * tokens, 113, *torch.randint(3, 100, (2,), generator=generator).tolist()]
        rows.append(row + torch.randint(3, 100, (4 + len(rows),), generator=generator).tolist())
    longest = max(length, *map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)], mask[index, : len(row)] = torch.tensor(row), 1
    labels = ids.masked_fill((ids >= IMAGE) | (mask == 0) | (torch.arange(longest) < 4), -100)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if not pixels:
        return batch
    if model_type.startswith("qwen"):
        batch |= {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.tensor(grids)}
        batch["mm_token_type_ids"] = (ids == IMAGE).int()
    elif name == "pixtral":
        side = [max(size[axis] for size in grids) for axis in (0, 1)]
        padded = torch.zeros(len(pixels), 3, *side)
        for index, image in enumerate(pixels):
            padded[index, :, : image.shape[1], : image.shape[2]] = image
        batch |= {"pixel_values": padded, "image_sizes": torch.tensor(grids)}
    elif model_type in ("idefics3", "smolvlm"):
        most = max(images_of_rows)
        padded = torch.zeros(len(rows), most, 3, 16, 16)
        seen = torch.zeros(len(rows), most, 16, 16, dtype=torch.int64)
        left = iter(pixels)
        for index, count in enumerate(images_of_rows):
            for number in range(count):
                padded[index, number], seen[index, number] = next(left), 1
        batch |= {"pixel_values": padded, "pixel_attention_mask": seen}
    else:
        batch["pixel_values"] = torch.stack(pixels)
        if model_type == "gemma3":
            batch["token_type_ids"] = (ids == IMAGE).int()
    return batch
