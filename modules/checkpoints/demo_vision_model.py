"""A small vision-language model for demonstrations: SmolLM2-135M-Instruct behind a vision tower made on the spot.

No weights of a vision-language model come by pip, so this is a graft in the form of Llava 1.5: a SigLIP tower of a few
layers, trained here as a classifier of small images in seconds; a projector with random weights; and the demo model. It
cannot say anything of an image before the projector is trained.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from ..downloads import cache_lock, conversions_dir
from ..hardware import capabilities
from .demo_model import demo_model_directory

DEMO_VISION_MODEL = "smollm2-135m-vision"

#: Grows whenever the graft is made otherwise.
_VERSION = 1

_IMAGE_SIZE, _PATCH_SIZE, _WIDTH, _LAYERS, _HEADS = 32, 16, 64, 3, 4

#: A special token of SmolLM2 that chats do not use takes the image token's place, so that no embedding is added.
_SPARE_TOKEN, _IMAGE_TOKEN = "<filename>", "<image>"

_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def demo_vision_model_directory(images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> Path:
    """The model's directory, made at the first call and then kept.

    Args:
        images: uint8 [N, height, width] of grey, which the tower is trained on; none of those it is tested on.
        labels: Their classes, int64 [N], from 0 on.
    """
    data = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()[:8]
    target = conversions_dir() / f"{DEMO_VISION_MODEL}-{_VERSION}-{data}"
    with cache_lock(target):
        if not (target / "config.json").is_file():
            text = demo_model_directory()
            with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
                made = Path(scratch) / "model"  # a directory of its own: scratch ones are for this user alone
                made.mkdir()
                graft(text, made, images, labels)
                shutil.rmtree(target, ignore_errors=True)
                made.rename(target)
    return target


def graft(text: Path, directory: Path, images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> None:
    """Put a vision tower that is trained on ``images`` before a Llama, and write the model into ``directory``.

    Args:
        text: The Llama's directory: one file of safetensors with tied embeddings, and its tokenizer.
        directory: To write to.
        images, labels: As for :func:`demo_vision_model_directory`.
    """
    rank_zero_info(f"Making the demo vision model: training its tower on {len(images)} images takes some seconds.")
    image_token_id = _write_tokenizer(text, directory)
    size = {"height": _IMAGE_SIZE, "width": _IMAGE_SIZE}
    (directory / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "SiglipImageProcessor", "size": size}, indent=2)
    )
    processor = {"processor_class": "LlavaProcessor", "patch_size": _PATCH_SIZE, "num_additional_image_tokens": 0,
                 "vision_feature_select_strategy": "full", "image_token": _IMAGE_TOKEN}  # fmt: skip
    (directory / "processor_config.json").write_text(json.dumps(processor, indent=2))
    pixels = SiglipImageProcessorPil.from_pretrained(directory)(
        [Image.fromarray(image).convert("RGB") for image in images], return_tensors="pt"
    )["pixel_values"]
    tower = _train_tower(pixels, torch.from_numpy(labels))
    text_config = AutoConfig.from_pretrained(text)
    config = LlavaConfig(
        vision_config=tower.config, text_config=text_config, image_token_index=image_token_id,
        vision_feature_select_strategy="full", vision_feature_layer=-2, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    weights = {name.removeprefix("model."): value for name, value in load_file(text / "model.safetensors").items()}
    model.model.language_model.load_state_dict(weights)
    model.to(text_config.dtype).save_pretrained(directory)
    shutil.copyfile(text / "generation_config.json", directory / "generation_config.json")


def _write_tokenizer(text: Path, directory: Path) -> int:
    """Write the tokenizer with an image token, and return its id."""
    tokenizer = json.loads((text / "tokenizer.json").read_text(encoding="utf-8"))
    token_id: int = tokenizer["model"]["vocab"].pop(_SPARE_TOKEN)
    tokenizer["model"]["vocab"][_IMAGE_TOKEN] = token_id
    for token in tokenizer["added_tokens"]:
        if token["content"] == _SPARE_TOKEN:
            token["content"] = _IMAGE_TOKEN
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    shutil.copyfile(text / "tokenizer_config.json", directory / "tokenizer_config.json")
    (directory / "chat_template.jinja").write_text(_TEMPLATE, encoding="utf-8")
    return token_id


def _train_tower(pixels: Tensor, labels: Tensor, epochs: int = 30, batch_size: int = 64) -> Any:
    """A SigLIP tower whose patches tell the classes of ``pixels`` float32 [N, 3, size, size] apart.

    What Llava reads, the last layer but one, is trained: the mean of its patches goes through a linear classifier that
    is thrown away.
    """
    device = capabilities().device_type
    config = SiglipVisionConfig(
        hidden_size=_WIDTH, intermediate_size=2 * _WIDTH, num_hidden_layers=_LAYERS, num_attention_heads=_HEADS,
        image_size=_IMAGE_SIZE, patch_size=_PATCH_SIZE, vision_use_head=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tower = SiglipVisionModel(config).train().to(device)
        classifier = nn.Linear(_WIDTH, int(labels.max()) + 1).to(device)
        steps = epochs * (len(pixels) // batch_size)
        optimizer = torch.optim.AdamW([*tower.parameters(), *classifier.parameters()], lr=2e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        for _ in range(epochs):
            for batch in torch.randperm(len(pixels))[: len(pixels) // batch_size * batch_size].view(-1, batch_size):
                # Scans are not all in the middle: a shift by up to a scan's pixel makes more of few images.
                shift = torch.randint(-4, 5, (2,)).tolist()
                shifted = pixels[batch].to(device).roll(shift, dims=(2, 3))
                hidden = tower(shifted, output_hidden_states=True).hidden_states[-2]
                loss = nn.functional.cross_entropy(classifier(hidden.mean(1)), labels[batch].to(device))
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
    return tower.eval().cpu()
