"""Tiny random vision-language models of every family, with tokenizer, chat template and image processor."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 512

_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

#: What each family writes for an image in a chat, and the token among it that becomes the image.
_MARKS = {
    "llava": ("<image>\n", "<image>"),
    "pixtral": ("[IMG]", "[IMG]"),
    "idefics3": ("<image>", "<image>"),
    "qwen": ("<|vision_start|><|image_pad|><|vision_end|>", "<|image_pad|>"),
    "gemma3": ("\n\n<start_of_image>\n\n", "<image_soft_token>"),
}
_EXTRA = {
    "llava": ["<image>"],
    "pixtral": ["[IMG]", "[IMG_BREAK]", "[IMG_END]"],
    "idefics3": ["<image>", "<fake_token_around_image>", "<global-img>", "<row_1_col_1>", "<row_1_col_2>"],
    "qwen": ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"],
    "gemma3": ["<start_of_image>", "<end_of_image>", "<image_soft_token>"],
}

_TEXT: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCAB_SIZE, "max_position_embeddings": 512, "initializer_range": 0.1,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
_VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8, "initializer_range": 0.1,
}  # fmt: skip
_QWEN_VISION: dict[str, Any] = {
    "depth": 3, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
    "initializer_range": 0.1,
}  # fmt: skip


def _text(model_type: str, **options: Any) -> dict[str, Any]:
    return {"model_type": model_type, **_TEXT, **options}


#: Name -> transformers' class, kind of tokens, image processor, options of the configuration.
FAMILIES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "llava-clip": ("LlavaForConditionalGeneration", "llava", "CLIPImageProcessor", {
        "text_config": _text("llama"), "vision_config": {"model_type": "clip_vision_model", **_VISION},
        "vision_feature_layer": -2}),
    "llava-siglip": ("LlavaForConditionalGeneration", "llava", "SiglipImageProcessor", {
        "text_config": _text("mistral"),
        "vision_config": {"model_type": "siglip_vision_model", **_VISION, "vision_use_head": False},
        "vision_feature_layer": -2, "vision_feature_select_strategy": "full"}),
    "pixtral": ("LlavaForConditionalGeneration", "pixtral", "PixtralImageProcessor", {
        "text_config": _text("mistral", head_dim=16),
        "vision_config": {"model_type": "pixtral", **_VISION, "head_dim": 16, "hidden_act": "silu"},
        "vision_feature_layer": -1, "vision_feature_select_strategy": "full"}),
    "idefics3": ("Idefics3ForConditionalGeneration", "idefics3", "Idefics3ImageProcessor", {
        "text_config": _text("llama"), "vision_config": dict(_VISION), "scale_factor": 2}),
    "smolvlm": ("SmolVLMForConditionalGeneration", "idefics3", "SmolVLMImageProcessor", {
        "text_config": _text("llama"), "vision_config": dict(_VISION), "scale_factor": 2,
        "tie_word_embeddings": True}),
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", "qwen", "Qwen2VLImageProcessor", {
        "text_config": _text("qwen2_vl_text", **_MROPE),
        "vision_config": {**_QWEN_VISION, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}}),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", "qwen", "Qwen2VLImageProcessor", {
        "text_config": _text("qwen2_5_vl_text", **_MROPE), "tie_word_embeddings": True,
        "vision_config": {**_QWEN_VISION, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64,
                          "fullatt_block_indexes": [1], "depth": 3, "window_size": 112}}),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", "qwen", "Qwen2VLImageProcessor", {
        "text_config": _text("qwen3_vl_text", head_dim=16, num_hidden_layers=3, rope_parameters={
            "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2], "mrope_interleaved": True}),
        "vision_config": {**_QWEN_VISION, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64,
                          "patch_size": 16, "deepstack_visual_indexes": [0, 2], "num_position_embeddings": 64}}),
    "gemma3": ("Gemma3ForConditionalGeneration", "gemma3", "Gemma3ImageProcessor", {
        "text_config": _text("gemma3_text", head_dim=32, sliding_window=24, query_pre_attn_scalar=32,
                             num_hidden_layers=7, rope_parameters={
                                 "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                                 "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}),
        "vision_config": {**_VISION, "vision_use_head": False}, "mm_tokens_per_image": 4}),
}  # fmt: skip


def save_vision_model(directory: Path, name: str, *, seed: int = 0, **options: Any) -> Path:
    """Random weights in float16; norms are not one and biases not zero, so that they matter."""
    class_name, kind, processor_class, family = FAMILIES[name]
    model_class = getattr(transformers, class_name)
    tokenizer = _save_tokenizer(directory, kind)
    ids = {text: tokenizer.convert_tokens_to_ids(text) for text in _EXTRA[kind]}
    tokens = {"image_token_id": ids[_MARKS[kind][1]]}
    if kind == "llava" or kind == "pixtral":
        tokens = {"image_token_index": ids[_MARKS[kind][1]]}
    if kind == "qwen":
        tokens |= {"vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"],
                   "video_token_id": ids["<|video_pad|>"]}  # fmt: skip
    if kind == "gemma3":
        tokens |= {"boi_token_index": ids["<start_of_image>"], "eoi_token_index": ids["<end_of_image>"]}
        tokens = {**tokens, "image_token_index": tokens.pop("image_token_id")}
    torch.manual_seed(seed)
    config = model_class.config_class(**{**family, **tokens, **options})
    model = model_class(config)
    for key, parameter in model.named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, parameter.mean().item() if "norm" in key or "ln" in key else 0.0, 0.2)
        elif "language_model" not in key and "text_model" not in key and "lm_head" not in key:
            nn.init.normal_(parameter, std=0.5 / parameter[0].numel() ** 0.5 * 2)
    model.half().save_pretrained(directory)
    vision = model.config.vision_config
    processor: dict[str, Any] = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28], "do_rescale": True}
    size = getattr(vision, "image_size", 0)
    if kind == "qwen":
        processor |= {"patch_size": vision.patch_size, "merge_size": 2, "temporal_patch_size": 2}
    elif kind == "pixtral":
        processor |= {"patch_size": {"height": 8, "width": 8}, "size": {"longest_edge": 1024}}
    elif kind == "idefics3":
        processor |= {"size": {"longest_edge": 2 * size}, "max_image_size": {"longest_edge": size}}
    else:
        processor |= {"size": {"height": size, "width": size}}
    (directory / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": processor_class, **processor})
    )
    return directory


def _save_tokenizer(directory: Path, kind: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=_SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    texts = ["user assistant what is the name of a thing", "shown here\n\n", "\n\n"] * 5
    backend.train_from_iterator(texts, trainer)
    # The image's own token is one of no special ones in some tokenizers.
    backend.add_tokens([AddedToken(text, special=text != _MARKS[kind][1], normalized=False) for text in _EXTRA[kind]])
    mark = _MARKS[kind][0]
    template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
        "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        "{{ mark }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ).replace("{{ mark }}", "{{ '" + mark.replace("\n", "\\n") + "' }}")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=template
    )
    tokenizer.save_pretrained(directory)
    return tokenizer
