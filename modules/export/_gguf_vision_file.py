"""A vision tower and its projector in the terms of llama.cpp's multimodal library: tensors and keys of an mmproj file.

Shapes: N rows, K columns of a weight.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, VisionProjectorType
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ._gguf_architecture import interleaved
from ._gguf_vision import (
    CLASS_EMBEDDING_ISSUE,
    VisionArchitecture,
    check_activation,
    image_token,
    vision_architecture_of,
)
from .vision_weights import VisionLanguageWeights


@dataclass(frozen=True)
class VisionTensor:
    """A tensor of the mmproj.

    Attributes:
        name: GGUF's.
        source: The weight's name (:mod:`.vision_weights`).
        shape: As it is written.
        part: Which part of the weight it is.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    part: int = 0


def vision_tensors(architecture: VisionArchitecture, weights: VisionLanguageWeights) -> list[VisionTensor]:
    """All tensors of the mmproj, in the order of the model's.

    Raises:
        ValueError: If the library has no tensor for a weight.
    """
    found = []
    blocks = architecture.tower(weights.model_config).blocks
    for source, shape in weights.vision_shapes.items():
        name = _gguf_name(architecture, weights.model_config, source)
        if name is None or (name.startswith("v.blk.") and int(name.split(".")[2]) >= blocks):
            continue
        if len(shape) == 5 and shape[2] != 2:
            raise ValueError(f"llama.cpp's Qwen-VL towers take frames by two, this model by {shape[2]}.")
        if len(shape) == 5:  # two frames of a video, which for a picture are the same: a convolution each
            halves = (*shape[:2], *shape[3:])
            found += [VisionTensor(name, source, halves), VisionTensor(f"{name}.1", source, halves, 1)]
        elif ".attn_qkv." in name and architecture.projector != VisionProjectorType.QWEN3VL:
            third = (shape[0] // 3, *shape[1:])
            found += [VisionTensor(name.replace("qkv", each), source, third, i) for i, each in enumerate("qkv")]
        else:
            found.append(VisionTensor(name, source, shape))
    if architecture.projector == VisionProjectorType.PIXTRAL:
        found.append(VisionTensor("v.token_embd.img_break", _EMBEDDING, (weights.config.hidden_size,)))
    return found


_EMBEDDING = "model.embed_tokens.weight"


def _gguf_name(architecture: VisionArchitecture, config: Any, source: str) -> str | None:
    if source.startswith("vision.head.") or (architecture.projector == "mlp" and "vision.post_layernorm" in source):
        return None  # which no hidden state passes
    stem, dot, suffix = source.rpartition(".")
    if suffix not in ("weight", "bias"):
        stem, dot, suffix = source, "", ""
    for pattern, name in architecture.tensors:
        if re.fullmatch(pattern, stem):
            found = re.sub(pattern, name, stem)
            if found.startswith("v.deepstack."):
                _, _, number, kind = found.split(".")
                found = f"v.deepstack.{config.vision_config.deepstack_visual_indexes[int(number)]}.{kind}"
            return f"{found}{dot}{suffix}"
    raise ValueError(f"llama.cpp's projector {architecture.projector!r} has no tensor for {source!r}.")


def vision_transformed(
    architecture: VisionArchitecture, weights: VisionLanguageWeights, tensor: VisionTensor, break_token: int | None
) -> Tensor:
    """A weight as the library computes with it, of :attr:`VisionTensor.shape`."""
    weight = weights.merged(tensor.source)
    if tensor.source == _EMBEDDING:
        assert break_token is not None
        return weight[break_token]
    if weight.ndim == 5:
        return weight[:, :, tensor.part]
    if weight.shape != tensor.shape:
        return weight.chunk(3)[tensor.part]
    if architecture.projector == VisionProjectorType.PIXTRAL and re.search(r"attn_[qk]\.", tensor.name):
        return interleaved(weight, weights.model_config.vision_config.num_attention_heads)
    if tensor.name == "mm.soft_emb_norm.weight":
        return weight.float() + 1
    return weight


# ------------------------------------------------------------------------------------------------------- configuration


def write_vision_configuration(
    writer: GGUFWriter, architecture: VisionArchitecture, weights: VisionLanguageWeights
) -> list[str]:
    """Write what the configuration and the image processor say as GGUF's keys.

    Returns:
        Notes for the user.

    Raises:
        ValueError: If llama.cpp would compute something else.
    """
    config, tower = weights.model_config, architecture.tower(weights.model_config)
    vision, projector, notes = config.vision_config, architecture.projector, [*architecture.notes]
    processor = read_image_processor(weights.checkpoint.directory)
    if tower.mlp == tower.width:
        raise ValueError(
            "The vision tower's MLPs are as wide as its hidden states; llama.cpp then takes their two matrices for "
            "each other (its guard for old files)."
        )
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(projector)
    writer.add_vision_projection_dim(weights.config.hidden_size)
    writer.add_vision_image_size(tower.image_size)
    writer.add_vision_patch_size(tower.patch_size)
    writer.add_vision_embedding_length(tower.width)
    writer.add_vision_feed_forward_length(tower.mlp)
    writer.add_vision_block_count(tower.blocks)
    writer.add_vision_head_count(tower.heads)
    writer.add_vision_attention_layernorm_eps(tower.eps)
    mean, std = _normalization(processor)
    writer.add_vision_image_mean(mean)
    writer.add_vision_image_std(std)
    activation = check_activation(tower.activation)
    if activation == "silu":
        writer.add_vision_use_silu(True)
    elif activation != "quick_gelu":  # the library's, if nothing is said
        writer.add_vision_use_gelu(True)
    if tower.activation == "gelu":
        notes.append("The vision tower's GELU is exact; llama.cpp computes its tanh approximation.")
    if projector == "mlp":
        writer.add_array("clip.vision.feature_layer", [tower.blocks])
        if vision.model_type == "clip_vision_model":
            notes.append(
                "Since its pull request 13321 (2025) llama.cpp puts a CLIP tower's class token last but reads "
                "it first: patches get their neighbours' positions, and the class token replaces the first patch "
                f"({CLASS_EMBEDDING_ISSUE}). The file is right for a version without this fault; with it, answers on "
                "images suffer. Towers without a class token (SigLIP) are not affected."
            )
    elif projector == VisionProjectorType.IDEFICS3:
        writer.add_vision_projector_scale_factor(tower.merge)
        longest = _longest_edge(processor, "size", tower.image_size)
        if (tile := _longest_edge(processor, "max_image_size", tower.image_size)) != tower.image_size:
            raise ValueError(
                f"The image processor's tiles have {tile} pixels (max_image_size), the vision tower has positions "
                f"for {tower.image_size}; llama.cpp takes the latter for both."
            )
        writer.add_vision_preproc_image_size(longest if processor.get("do_image_splitting", True) else tile)
    elif projector == VisionProjectorType.GEMMA3:
        writer.add_vision_projector_scale_factor(tower.merge)
    elif architecture.dynamic and projector != VisionProjectorType.PIXTRAL:
        if tower.merge != 2:
            raise ValueError(f"llama.cpp merges 2 x 2 patches of a Qwen-VL, this model {tower.merge} x {tower.merge}.")
        writer.add_vision_spatial_merge_size(tower.merge)
    if projector == VisionProjectorType.QWEN25VL:
        _write_windows(writer, vision)
    if projector == VisionProjectorType.QWEN3VL:
        writer.add_vision_is_deepstack_layers(
            [layer in vision.deepstack_visual_indexes for layer in range(tower.blocks)]
        )
    return notes


def write_language_configuration(writer: GGUFWriter, weights: VisionLanguageWeights) -> None:
    """Write what the language model's file says of the vision tower."""
    layers = getattr(weights.model_config.vision_config, "deepstack_visual_indexes", None)
    if layers is not None:
        writer.add_num_deepstack_layers(len(layers))


def image_tokens(weights: VisionLanguageWeights, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The tokens of which images consist in the training data, and those that llama.cpp writes around them."""
    architecture, vocab = vision_architecture_of(weights.model_config), tokenizer.get_vocab()
    config, words = weights.model_config, {token: text for text, token in vocab.items()}
    found = [architecture.begin, architecture.end, words.get(image_token(config), "")]
    return tuple(text for text in found if text in vocab)


def _longest_edge(processor: dict[str, Any], name: str, default: int) -> int:
    size = processor.get(name)
    return int(size.get("longest_edge", default)) if isinstance(size, dict) else default


def _write_windows(writer: GGUFWriter, vision: Any) -> None:
    full = list(vision.fullatt_block_indexes)
    period = full[0] + 1 if full else 0
    if not full or full != list(range(period - 1, vision.depth, period)):
        raise ValueError(
            f"The vision tower has full attention in the blocks {full}; llama.cpp's in every n-th block, and all "
            "others have windows."
        )
    if vision.window_size != 112:
        raise ValueError(f"llama.cpp's Qwen2.5-VL has windows of 112 pixels, this model of {vision.window_size}.")
    writer.add_vision_n_wa_pattern(period)


def read_image_processor(directory: Path) -> dict[str, Any]:
    """The image processor's configuration.

    Raises:
        ValueError: If there is none.
    """
    for name in ("processor_config.json", "preprocessor_config.json"):
        path = directory / name
        if path.is_file():
            raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            found: dict[str, Any] = raw.get("image_processor", raw)
            if "image_mean" in found and "image_std" in found:
                return found
    raise ValueError(
        f"{directory} has no preprocessor_config.json with image_mean and image_std, which the vision tower was "
        "trained with. Take it from where the model comes from."
    )


def _normalization(processor: dict[str, Any]) -> tuple[list[float], list[float]]:
    """What is subtracted from pixels between 0 and 1, and what they are then divided by, for each colour."""
    factor = float(processor.get("rescale_factor", 1 / 255))
    if not processor.get("do_rescale", True) or abs(factor * 255 - 1) > 1e-6:
        raise ValueError(
            "The image processor does not divide pixels by 255 (do_rescale, rescale_factor), as llama.cpp does."
        )
    if not processor.get("do_normalize", True):
        return [0.0] * 3, [1.0] * 3
    return [float(value) for value in processor["image_mean"]], [float(value) for value in processor["image_std"]]


def check_tokens(architecture: VisionArchitecture, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Check that the vocabulary has the tokens that llama.cpp writes around images.

    Returns:
        The id of the token between an image's rows, where the file holds its embedding.

    Raises:
        ValueError: If one is missing.
    """
    vocab = tokenizer.get_vocab()
    wanted = [text for text in (architecture.begin, architecture.end) if text]
    if architecture.projector == VisionProjectorType.PIXTRAL:
        wanted.append("[IMG_BREAK]")
    if architecture.projector == VisionProjectorType.IDEFICS3:
        wanted += ["<fake_token_around_image>", "<global-img>", "<row_1_col_1>"]
        for text in ("\n", "\n\n"):
            if len(tokenizer(text, add_special_tokens=False)["input_ids"]) != 1:
                raise ValueError(
                    f"llama.cpp writes {text!r} as one token around images, but the tokenizer has no such token."
                )
    if missing := [text for text in wanted if text not in vocab]:
        raise ValueError(
            f"The tokenizer lacks {', '.join(missing)}, which llama.cpp writes around images: it is not the tokenizer "
            "of this vision-language model."
        )
    return vocab["[IMG_BREAK]"] if architecture.projector == VisionProjectorType.PIXTRAL else None
