"""What llama.cpp's multimodal library does with a vision tower, one row per architecture, and a tower in its terms.

The library (``mtmd``) reads a second file, the mmproj, of the architecture ``clip``. As in the text model's rows, what
a configuration asks for and the library would not compute is an error here.

Shapes: N rows, K columns of a weight; C channels, P pixels of a patch's side; D width of a head.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, VisionProjectorType
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ._gguf_architecture import interleaved
from .vision_weights import VisionLanguageWeights

#: llama.cpp's fault with towers that have a class embedding.
CLASS_EMBEDDING_ISSUE = "https://github.com/ggml-org/llama.cpp/issues/25814"


@dataclass(frozen=True)
class Tower:
    """What a file says of a vision tower.

    Attributes:
        width: Of its hidden states.
        mlp: Width within its MLPs.
        blocks: How many of its blocks are computed.
        heads: Attention heads.
        eps: Of its norms.
        activation: transformers' name of its MLPs' activation.
        image_size: Pixels of a side for which it has position embeddings.
        patch_size: Pixels of a patch's side.
        merge: Patches of a side that become one token.
    """

    width: int
    mlp: int
    blocks: int
    heads: int
    eps: float
    activation: str
    image_size: int
    patch_size: int
    merge: int = 1


@dataclass(frozen=True)
class VisionArchitecture:
    """What must be known of one of the library's projectors, and of the tower before it.

    Attributes:
        projector: llama.cpp's name.
        tensors: Pairs of a pattern of names (:mod:`.vision_weights`) without ``.weight`` or ``.bias``, and GGUF's name.
        tower: Reads the configuration.
        begin: What the library writes before an image's tokens.
        end: What it writes after them.
        dynamic: Whether images keep their size but for rounding to whole tokens; else all become squares of one size.
        notes: Where it treats images otherwise than transformers' processor.
    """

    projector: str
    tensors: tuple[tuple[str, str], ...]
    tower: Callable[[Any], Tower]
    begin: str = ""
    end: str = ""
    dynamic: bool = False
    notes: tuple[str, ...] = ()


_VIT = (
    (r"vision\.embeddings\.class_embedding", "v.class_embd"),
    (r"vision\.embeddings\.patch_embedding", "v.patch_embd"),
    (r"vision\.embeddings\.position_embedding", "v.position_embd"),
    (r"vision\.pre_layrnorm", "v.pre_ln"),
    (r"vision\.post_layernorm", "v.post_ln"),
    (r"vision\.encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj", r"v.blk.\1.attn_\2"),
    (r"vision\.encoder\.layers\.(\d+)\.self_attn\.out_proj", r"v.blk.\1.attn_out"),
    (r"vision\.encoder\.layers\.(\d+)\.layer_norm([12])", r"v.blk.\1.ln\2"),
    (r"vision\.encoder\.layers\.(\d+)\.mlp\.fc1", r"v.blk.\1.ffn_up"),
    (r"vision\.encoder\.layers\.(\d+)\.mlp\.fc2", r"v.blk.\1.ffn_down"),
)
_QWEN = (
    (r"vision\.patch_embed\.proj", "v.patch_embd"),
    (r"vision\.blocks\.(\d+)\.norm([12])", r"v.blk.\1.ln\2"),
    (r"vision\.blocks\.(\d+)\.attn\.qkv", r"v.blk.\1.attn_qkv"),
    (r"vision\.blocks\.(\d+)\.attn\.proj", r"v.blk.\1.attn_out"),
    (r"vision\.merger\.mlp\.(\d+)", r"mm.\1"),
    (r"vision\.merger\.(?:ln_q|norm)", "v.post_ln"),
)

_RESAMPLED = (
    "llama.cpp resizes images by its own bilinear filter where their size is not already right, transformers by "
    "Pillow's bicubic one: pixels differ a little."
)


def _vit(vision: Any, **other: Any) -> Tower:
    values = {
        "width": vision.hidden_size, "mlp": vision.intermediate_size, "blocks": vision.num_hidden_layers,
        "heads": vision.num_attention_heads, "eps": other.get("eps") or vision.layer_norm_eps, "activation": vision.hidden_act,
        "image_size": vision.image_size, "patch_size": vision.patch_size,
    }  # fmt: skip
    return Tower(**{**values, **other})


def _llava(config: Any) -> Tower:
    features = feature_layers(config)
    if len(features) != 1:
        raise ValueError(
            f"The model concatenates the hidden states of vision_feature_layer={config.vision_feature_layer}; only one "
            "layer's can be exported."
        )
    has_class = config.vision_config.model_type == "clip_vision_model"
    wanted = "default" if has_class else "full"
    if config.vision_feature_select_strategy != wanted:
        raise ValueError(
            f"llama.cpp computes a {config.vision_config.model_type} under vision_feature_select_strategy={wanted!r} "
            f"(all patches, no class token), but this model's is {config.vision_feature_select_strategy!r}."
        )
    _check_activation(config.projector_hidden_act)
    return _vit(config.vision_config, blocks=features[0])


def feature_layers(config: Any) -> list[int]:
    """After which blocks, counted from 1, a Llava takes the hidden states."""
    layers = config.vision_feature_layer
    layers = [layers] if isinstance(layers, int) else list(layers)
    return [layer if layer >= 0 else config.vision_config.num_hidden_layers + 1 + layer for layer in layers]


def _pixtral(config: Any) -> Tower:
    vision = config.vision_config
    if feature_layers(config) != [vision.num_hidden_layers]:
        raise ValueError(
            f"llama.cpp computes all blocks of a Pixtral tower, but vision_feature_layer={config.vision_feature_layer}."
        )
    if vision.head_dim * vision.num_attention_heads != vision.hidden_size:
        raise ValueError(
            "llama.cpp's Pixtral tower has heads of hidden_size / num_attention_heads; this model's differ."
        )
    rope = getattr(vision, "rope_parameters", None) or {}
    if (theta := float(rope.get("rope_theta", 10000.0))) != 10000:
        raise ValueError(f"llama.cpp's Pixtral tower always has rope_theta=10000, this model's has {theta:g}.")
    _check_activation(config.projector_hidden_act)
    return _vit(vision, eps=1e-5)


def _idefics3(config: Any) -> Tower:
    return _vit(config.vision_config, merge=config.scale_factor)


def _gemma3(config: Any) -> Tower:
    side = config.vision_config.image_size // config.vision_config.patch_size
    tokens = round(config.mm_tokens_per_image**0.5)
    return _vit(config.vision_config, merge=side // tokens)


def _qwen2(config: Any) -> Tower:
    vision = config.vision_config
    return Tower(
        vision.embed_dim, int(vision.embed_dim * vision.mlp_ratio), vision.depth, vision.num_heads, 1e-6,
        vision.hidden_act, _QWEN_SIDE * vision.patch_size, vision.patch_size, vision.spatial_merge_size,
    )  # fmt: skip


def _qwen25(config: Any) -> Tower:
    vision = config.vision_config
    return Tower(
        vision.hidden_size, vision.intermediate_size, vision.depth, vision.num_heads, 1e-6, vision.hidden_act,
        _QWEN_SIDE * vision.patch_size, vision.patch_size, vision.spatial_merge_size,
    )  # fmt: skip


def _qwen3(config: Any) -> Tower:
    vision = config.vision_config
    side = round(vision.num_position_embeddings**0.5)
    return Tower(
        vision.hidden_size, vision.intermediate_size, vision.depth, vision.num_heads, 1e-6, vision.hidden_act,
        side * vision.patch_size, vision.patch_size, vision.spatial_merge_size,
    )  # fmt: skip


#: Patches of a side of the image with which llama.cpp warms up: Qwen2-VL's tower has no size of its own.
_QWEN_SIDE = 40

_QWEN_MARKS = {"begin": "<|vision_start|>", "end": "<|vision_end|>", "dynamic": True}
_QWEN_NOTES = (
    f"{_RESAMPLED} It takes 8 to 4096 tokens for an image, whatever min_pixels and max_pixels say in "
    "preprocessor_config.json; --image-min-tokens and --image-max-tokens set other limits.",
)

ARCHITECTURES: dict[str, VisionArchitecture] = {
    "llava": VisionArchitecture(
        "mlp",
        (*_VIT, (r"projector\.linear_1", "mm.0"), (r"projector\.linear_2", "mm.2")),
        _llava,
        notes=(
            "llama.cpp pads images to squares; transformers' processor of Llava-1.5 cuts their longer side. Both see "
            f"the same only in square images. {_RESAMPLED}",
        ),
    ),
    "pixtral": VisionArchitecture(
        VisionProjectorType.PIXTRAL,
        (
            (r"vision\.patch_conv", "v.patch_embd"),
            (r"vision\.ln_pre", "v.pre_ln"),
            (r"vision\.transformer\.layers\.(\d+)\.attention\.([qkv])_proj", r"v.blk.\1.attn_\2"),
            (r"vision\.transformer\.layers\.(\d+)\.attention\.o_proj", r"v.blk.\1.attn_out"),
            (r"vision\.transformer\.layers\.(\d+)\.attention_norm", r"v.blk.\1.ln1"),
            (r"vision\.transformer\.layers\.(\d+)\.ffn_norm", r"v.blk.\1.ln2"),
            (r"vision\.transformer\.layers\.(\d+)\.feed_forward\.(gate|up|down)_proj", r"v.blk.\1.ffn_\2"),
            (r"projector\.linear_([12])", r"mm.\1"),
        ),
        _pixtral,
        end="[IMG_END]",
        dynamic=True,
        notes=(f"{_RESAMPLED} It takes 8 to 1024 tokens for an image, without row ends.",),
    ),
    "idefics3": VisionArchitecture(
        VisionProjectorType.IDEFICS3,
        (*_VIT, (r"projector\.modality_projection\.proj", "mm.model.fc")),
        _idefics3,
        notes=(
            "llama.cpp writes a tile and the whole image even where an image is one tile, which transformers' "
            f"processor then does not. {_RESAMPLED}",
        ),
    ),
    "qwen2_vl": VisionArchitecture(
        VisionProjectorType.QWEN2VL,
        (
            *_QWEN,
            (r"vision\.blocks\.(\d+)\.mlp\.fc1", r"v.blk.\1.ffn_up"),
            (r"vision\.blocks\.(\d+)\.mlp\.fc2", r"v.blk.\1.ffn_down"),
        ),
        _qwen2,
        notes=_QWEN_NOTES,
        **_QWEN_MARKS,
    ),
    "qwen2_5_vl": VisionArchitecture(
        VisionProjectorType.QWEN25VL,
        (*_QWEN, (r"vision\.blocks\.(\d+)\.mlp\.(gate|up|down)_proj", r"v.blk.\1.ffn_\2")),
        _qwen25,
        notes=_QWEN_NOTES,
        **_QWEN_MARKS,
    ),
    "qwen3_vl": VisionArchitecture(
        VisionProjectorType.QWEN3VL,
        (
            *_QWEN,
            (r"vision\.pos_embed", "v.position_embd"),
            (r"vision\.blocks\.(\d+)\.mlp\.linear_fc1", r"v.blk.\1.ffn_up"),
            (r"vision\.blocks\.(\d+)\.mlp\.linear_fc2", r"v.blk.\1.ffn_down"),
            (r"vision\.merger\.linear_fc1", "mm.0"),
            (r"vision\.merger\.linear_fc2", "mm.2"),
            (r"vision\.deepstack_merger_list\.(\d+)\.norm", r"v.deepstack.\1.norm"),
            (r"vision\.deepstack_merger_list\.(\d+)\.linear_(fc[12])", r"v.deepstack.\1.\2"),
        ),
        _qwen3,
        notes=_QWEN_NOTES,
        **_QWEN_MARKS,
    ),
    "gemma3": VisionArchitecture(
        VisionProjectorType.GEMMA3,
        (
            *_VIT,
            (r"projector\.mm_soft_emb_norm", "mm.soft_emb_norm"),
            (r"projector\.mm_input_projection_weight", "mm.input_projection.weight"),
        ),
        _gemma3,
        begin="<start_of_image>",
        end="<end_of_image>",
        notes=(
            "transformers' processor writes empty lines around an image, llama.cpp does not: write them into the "
            f"message. {_RESAMPLED}",
        ),
    ),
}
ARCHITECTURES["smolvlm"] = ARCHITECTURES["idefics3"]


def vision_architecture_of(config: Any) -> VisionArchitecture:
    """The row of a vision-language model's configuration.

    Raises:
        ValueError: If llama.cpp has no such vision tower.
    """
    kind = config.model_type
    tower = config.vision_config.model_type
    known = {"clip_vision_model": "llava", "siglip_vision_model": "llava", "pixtral": "pixtral"}
    if kind == "llava":
        if tower not in known:
            raise ValueError(
                f"A Llava with a vision tower of the type {tower!r} cannot be exported: {', '.join(known)}."
            )
        kind = known[tower]
    return ARCHITECTURES[kind]


# ------------------------------------------------------------------------------------------------------------- tensors


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


def vision_tensors(
    architecture: VisionArchitecture, weights: VisionLanguageWeights, tokenizer: PreTrainedTokenizerBase
) -> list[VisionTensor]:
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
    writer.add_vision_image_mean([float(value) for value in processor["image_mean"]])
    writer.add_vision_image_std([float(value) for value in processor["image_std"]])
    activation = _check_activation(tower.activation)
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
                "Versions of llama.cpp since April 2025 put a CLIP tower's class token last but read it first: patches "
                "get their neighbours' positions, and the class token replaces the first patch "
                f"({CLASS_EMBEDDING_ISSUE}). The file is as a corrected llama.cpp reads it; answers on images suffer "
                "until then. Towers without a class token (SigLIP) are not affected."
            )
    elif projector == VisionProjectorType.IDEFICS3:
        writer.add_vision_projector_scale_factor(tower.merge)
        writer.add_vision_preproc_image_size(int(processor["size"].get("longest_edge", tower.image_size)))
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


def image_token(config: Any) -> int:
    """The token whose embeddings an image's replace."""
    for name in ("image_token_id", "image_token_index"):
        if (found := getattr(config, name, None)) is not None:
            return int(found)
    raise ValueError("config.json names no image_token_id.")


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


def _check_activation(name: str) -> str:
    known = ("quick_gelu", "gelu", "gelu_pytorch_tanh", "silu")
    if name not in known:
        raise ValueError(f"The activation {name!r} is none of llama.cpp's vision towers: {', '.join(known)}.")
    return name


def read_image_processor(directory: Path) -> dict[str, Any]:
    """The image processor's configuration.

    Raises:
        ValueError: If there is none.
    """
    for name in ("processor_config.json", "preprocessor_config.json"):
        path = directory / name
        if path.is_file():
            raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            found = raw.get("image_processor", raw)
            if "image_mean" in found and "image_std" in found:
                return found
    raise ValueError(
        f"{directory} has no preprocessor_config.json with image_mean and image_std, which the vision tower was "
        "trained with. Take it from where the model comes from."
    )


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
