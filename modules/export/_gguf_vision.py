"""What llama.cpp's multimodal library does with a vision tower, one row per architecture.

The library (``mtmd``) reads a second file, the mmproj, of the architecture ``clip``. As in the text model's rows, what
a configuration asks for and the library would not compute is an error here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gguf import VisionProjectorType

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
        processor: transformers' image processor, in the form that needs no torchvision.
        begin: What the library writes before an image's tokens.
        end: What it writes after them.
        dynamic: Whether images keep their size but for rounding to whole tokens; else all become squares of one size.
        notes: Where it treats images otherwise than transformers' processor.
    """

    projector: str
    tensors: tuple[tuple[str, str], ...]
    tower: Callable[[Any], Tower]
    processor: str
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
        "heads": vision.num_attention_heads, "eps": getattr(vision, "layer_norm_eps", None),
        "activation": vision.hidden_act, "image_size": vision.image_size, "patch_size": vision.patch_size,
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
    _check_projector(config)
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
    _check_projector(config)
    return _vit(vision, eps=1e-5)


def _check_projector(config: Any) -> None:
    if not config.projector_hidden_act.startswith("gelu"):
        raise ValueError(
            f"llama.cpp's projectors of Llava and Pixtral compute GELU, this model's {config.projector_hidden_act!r}."
        )


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

_QWEN_NOTES = (
    f"{_RESAMPLED} It takes 8 to 4096 tokens for an image, whatever min_pixels and max_pixels say in "
    "preprocessor_config.json; --image-min-tokens and --image-max-tokens set other limits.",
)

ARCHITECTURES: dict[str, VisionArchitecture] = {
    "llava": VisionArchitecture(
        "mlp",
        (*_VIT, (r"projector\.linear_1", "mm.0"), (r"projector\.linear_2", "mm.2")),
        _llava,
        "CLIPImageProcessorPil",
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
        "PixtralImageProcessorPil",
        end="[IMG_END]",
        dynamic=True,
        notes=(f"{_RESAMPLED} It takes 8 to 1024 tokens for an image, without row ends.",),
    ),
    "idefics3": VisionArchitecture(
        VisionProjectorType.IDEFICS3,
        (*_VIT, (r"projector\.modality_projection\.proj", "mm.model.fc")),
        _idefics3,
        "CLIPImageProcessorPil",  # does the same to a single tile; transformers 5.17 wants torchvision for Idefics3's
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
        "Qwen2VLImageProcessorPil",
        notes=_QWEN_NOTES,
        begin="<|vision_start|>",
        end="<|vision_end|>",
        dynamic=True,
    ),
    "qwen2_5_vl": VisionArchitecture(
        VisionProjectorType.QWEN25VL,
        (*_QWEN, (r"vision\.blocks\.(\d+)\.mlp\.(gate|up|down)_proj", r"v.blk.\1.ffn_\2")),
        _qwen25,
        "Qwen2VLImageProcessorPil",
        notes=_QWEN_NOTES,
        begin="<|vision_start|>",
        end="<|vision_end|>",
        dynamic=True,
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
        "Qwen2VLImageProcessorPil",
        notes=_QWEN_NOTES,
        begin="<|vision_start|>",
        end="<|vision_end|>",
        dynamic=True,
    ),
    "gemma3": VisionArchitecture(
        VisionProjectorType.GEMMA3,
        (
            *_VIT,
            (r"projector\.mm_soft_emb_norm", "mm.soft_emb_norm"),
            (r"projector\.mm_input_projection_weight", "mm.input_projection.weight"),
        ),
        _gemma3,
        "Gemma3ImageProcessorPil",
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


def check_activation(name: str) -> str:
    """The name itself if llama.cpp's towers compute it.

    Raises:
        ValueError: If not.
    """
    known = ("quick_gelu", "gelu", "gelu_pytorch_tanh", "silu")
    if name not in known:
        raise ValueError(f"The activation {name!r} is none of llama.cpp's vision towers: {', '.join(known)}.")
    return name


def image_token(config: Any) -> int:
    """The token whose embeddings an image's replace."""
    for name in ("image_token_id", "image_token_index"):
        if (found := getattr(config, name, None)) is not None:
            return int(found)
    raise ValueError("config.json names no image_token_id.")
