"""A GGUF file with its vision tower in a real llama.cpp: what it answers on images, and whether that is what
transformers answers on the same pixels and tokens.

llama.cpp resizes images by itself. So images are compared whose size is already right, which nothing resamples.

Shapes: S tokens.
"""

from __future__ import annotations

import base64
import io
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from gguf import GGUFReader, VisionProjectorType
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from ._gguf_types import FILE_TYPES
from ._gguf_vision import (
    CLASS_EMBEDDING_ISSUE,
    VisionArchitecture,
    image_token,
    vision_architecture_of,
)
from ._gguf_vision_file import read_image_processor
from .llama_cpp import LISTED, Found, Verified, judge, rounding, summary
from .llama_cpp_process import LlamaCpp
from .vision_weights import VisionLanguageWeights

#: What is asked about the first image, the second and both, which stand in place of ``{}``.
_QUESTIONS = ("{}What is shown here?", "{}What is shown here?", "Look: {}Which of both is darker, this or that? {}")

#: Tokens whose log-probabilities are compared for each question.
_POSITIONS = 4


def verify_images(
    path: str | Path,
    mmproj: str | Path,
    weights: VisionLanguageWeights,
    file_type: str,
    *,
    images: Sequence[Image.Image] | None = None,
    reference_images: Sequence[Image.Image] | None = None,
) -> Verified:
    """Run a file with its vision tower in llama.cpp, and compare it with the model that both were made from.

    The next-token distributions after questions about two images, and along an answer to each, must agree as those of
    texts must (:func:`~.llama_cpp.verify_gguf`).

    Args:
        path: The language model's GGUF file.
        mmproj: The vision tower's.
        weights: The model.
        file_type: The language model's type.
        images: Two images of a size that nothing resamples; by default coloured patterns.
        reference_images: What the model is shown instead of ``images``, to see that a difference is noticed.

    Returns:
        How they answer. A fault of llama.cpp that is known, and accounts for what differs, is told in the notes.

    Raises:
        ValueError: If llama.cpp cannot load the files, or they do not answer as the model.
    """
    kind = FILE_TYPES[file_type]
    tower_type = GGUFReader(mmproj).get_field("general.file_type")
    names = {each.id: each.name for each in FILE_TYPES.values()}
    tower_kind = FILE_TYPES[names[tower_type.contents()]] if tower_type else kind
    if not kind.is_quantized and tower_kind.kl_bound > kind.kl_bound:
        kind = tower_kind
    architecture = vision_architecture_of(weights.model_config)
    images = list(images or patterns(architecture, weights))
    shown, notes = list(reference_images or images), list[str]()
    with _one_tile(architecture, weights, Path(mmproj)) as used_mmproj:
        context = sum(len(_span(architecture, weights, each)) for each in images) + 256
        with LlamaCpp(path, context=context, mmproj=used_mmproj) as llama:
            prompts = [_prompt(llama, weights, question, notes) for question in _QUESTIONS]
            used = [
                range(2) if text.count(llama.media_marker) == 2 else range(i, i + 1) for i, text in enumerate(prompts)
            ]
            found: Found = [
                llama.log_probs_of_images(
                    text, [_png(images[i]) for i in which], _POSITIONS, min(LISTED, weights.config.vocab_size)
                )
                for text, which in zip(prompts, used, strict=True)
            ]
            rows = [
                _row(llama, architecture, weights, text, [shown[i] for i in which], notes)
                for text, which in zip(prompts, used, strict=True)
            ]
    processor = getattr(transformers, architecture.processor).from_dict(
        read_image_processor(weights.checkpoint.directory)
    )
    pixels = [_pixels(architecture, processor, [shown[i] for i in which]) for which in used]

    def expected(**options: Any) -> list[Tensor]:
        return [
            _log_probs(architecture, weights, ids, inputs, **options) for ids, inputs in zip(rows, pixels, strict=True)
        ]

    def compared(**options: Any) -> tuple[Verified, list[Tensor]]:
        exact = expected(**options)
        quantized = FILE_TYPES[file_type].is_quantized
        rounded = expected(rounded=rounding(path, weights), **options) if quantized else exact
        return summary(found, exact, rounded, tuple(dict.fromkeys(notes))), exact

    verified, exact = compared()
    effect = float((exact[0].exp() * (exact[0] - exact[1])).sum(-1).mean())
    if effect < 10 * kind.kl_bound:
        note = (
            f"The model answers nearly the same whichever of two images it sees (KL divergence {effect:.2g} nats). "
            "That llama.cpp does so too says little of the vision tower's file."
        )
        verified = replace(verified, notes=(*verified.notes, note))
    try:
        judge(verified, kind, found, exact)
    except ValueError as error:
        if weights.model_config.vision_config.model_type != "clip_vision_model":
            raise ValueError(f"On images: {error}") from error
        with_fault, exact = compared(prepare=_misplace_class_token)
        judge(with_fault, kind, found, exact)
        note = (
            f"This llama.cpp misplaces the class token of CLIP towers ({CLASS_EMBEDDING_ISSUE}): on images, its "
            f"log-probabilities differ from the model's by up to {verified.difference:.2g} (KL divergence "
            f"{verified.kl:.2g} nats). The file is right: with the same fault put into transformers, they differ by "
            f"{with_fault.difference:.2g}. Do not rely on its answers on images until it is mended there."
        )
        return replace(verified, notes=(*verified.notes, note))
    return verified


# ------------------------------------------------------------------------------------------------------------- images


def patterns(architecture: VisionArchitecture, weights: VisionLanguageWeights) -> list[Image.Image]:
    """Two images of coloured blocks, of a size that nothing resamples."""
    tower = architecture.tower(weights.model_config)
    unit = tower.patch_size * tower.merge
    sizes = [(4, 3), (6, 5)] if architecture.dynamic else [(tower.image_size // unit,) * 2] * 2
    random = np.random.default_rng(0)
    found = []
    for width, height in sizes:
        blocks = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        size = (width * unit, height * unit) if architecture.dynamic else (tower.image_size,) * 2
        image = Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC)
        noise = random.integers(-20, 21, (size[1], size[0], 3))
        found.append(Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8)))
    return found


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def _pixels(architecture: VisionArchitecture, processor: Any, images: Sequence[Image.Image]) -> dict[str, Tensor]:
    """What the model takes for images, by transformers' own processor, which resizes nothing."""
    options: dict[str, Any] = {"do_resize": False, "return_tensors": "pt"}
    if architecture.processor.startswith("CLIP"):
        options["do_center_crop"] = False
    if architecture.projector == VisionProjectorType.IDEFICS3:
        images = [each for image in images for each in (image, image)]  # a tile, and the whole
        return {"pixel_values": processor(images, **options)["pixel_values"][None]}
    found = processor(list(images), **options)
    wanted = ("pixel_values", "image_grid_thw", "image_sizes")
    return {name: torch.as_tensor(np.asarray(found[name])) for name in wanted if name in found}


@contextmanager
def _one_tile(architecture: VisionArchitecture, weights: VisionLanguageWeights, mmproj: Path) -> Iterator[Path]:
    """The file; of an Idefics3 a copy that says that images are as large as one tile, because larger ones are resampled
    to become the whole image.
    """
    if architecture.projector != VisionProjectorType.IDEFICS3:
        yield mmproj
        return
    with tempfile.TemporaryDirectory(dir=mmproj.parent, prefix=f".{mmproj.name}-") as scratch:
        copied = Path(shutil.copy(mmproj, scratch))
        field = GGUFReader(copied, "r+").get_field("clip.vision.preproc_image_size")
        assert field is not None
        field.parts[field.data[0]][:] = architecture.tower(weights.model_config).image_size
        yield copied


# ------------------------------------------------------------------------------------------------------------- tokens


def _prompt(llama: LlamaCpp, weights: VisionLanguageWeights, question: str, notes: list[str]) -> str:
    """A question about images as text, in which llama.cpp's marker stands for an image and what surrounds it."""
    tokenizer, marker = weights.chat_format.tokenizer, llama.media_marker
    architecture = vision_architecture_of(weights.model_config)
    if not tokenizer.chat_template:
        return question.replace("{}", f"{marker}\n")
    parts: list[dict[str, Any]] = []
    before, *after = question.split("{}")
    parts += [{"type": "text", "text": before}] if before else []
    for text in after:
        parts += [{"type": "image"}, *([{"type": "text", "text": text}] if text else [])]
    rendered = str(
        tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True)
    )
    place = str(tokenizer.convert_ids_to_tokens(image_token(weights.model_config)))
    wrapped = f"{architecture.begin}{place}{architecture.end}"
    placed = next((each for each in (wrapped, architecture.begin, place) if each and each in rendered), None)
    if placed is None or rendered.count(placed) != len(after):
        raise ValueError(
            f"The chat template does not write {place!r} for an image. Take the template of the vision-language model "
            "(chat_template.json or chat_template.jinja) from where it comes from."
        )
    text = rendered.replace(placed, marker)
    theirs = llama.render([{"role": "user", "content": [_as_url(each) for each in parts]}])
    bos = tokenizer.bos_token or ""
    text, theirs = text.removeprefix(bos), theirs.removeprefix(bos)  # which llama.cpp puts there itself
    if theirs != text and not notes:
        notes.append(
            f"llama.cpp renders a message with an image as {theirs.replace(marker, '<image>')!r}; transformers' "
            f"template gives {text.replace(marker, '<image>')!r}, where <image> is the image."
        )
    return text


def _as_url(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] == "text":
        return part
    pixel = io.BytesIO()
    Image.new("RGB", (2, 2)).save(pixel, format="PNG")
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{base64.b64encode(pixel.getvalue()).decode()}"},
    }


def _row(
    llama: LlamaCpp,
    architecture: VisionArchitecture,
    weights: VisionLanguageWeights,
    text: str,
    images: Sequence[Image.Image],
    notes: list[str],
) -> Tensor:
    """The tokens that llama.cpp makes of a prompt with images, and of the answer: int64 [S]."""
    parts = [llama.tokenize(part, add_special=i == 0) for i, part in enumerate(text.split(llama.media_marker))]
    ids = list(parts[0])
    for image, part in zip(images, parts[1:], strict=True):
        ids += [*_span(architecture, weights, image), *part]
    tokenizer, token = weights.chat_format.tokenizer, image_token(weights.model_config)
    place = str(tokenizer.convert_ids_to_tokens(token))
    theirs = [each for part in parts for each in (token, *part)][1:]
    ours = tokenizer(text.replace(llama.media_marker, place), add_special_tokens=False)["input_ids"]
    if theirs[len(theirs) - len(ours) :] != ours:
        notes.append(
            "llama.cpp splits the text beside an image into other tokens than the tokenizer does: "
            f"{tokenizer.convert_ids_to_tokens(theirs)} instead of {tokenizer.convert_ids_to_tokens(ours)}. The "
            "log-probabilities are compared with llama.cpp's tokens."
        )
    return torch.tensor(ids + [llama.letter] * (_POSITIONS - 1))


def _span(architecture: VisionArchitecture, weights: VisionLanguageWeights, image: Image.Image) -> list[int]:
    """The tokens that llama.cpp writes for an image."""
    tokenizer, token = weights.chat_format.tokenizer, image_token(weights.model_config)
    tower = architecture.tower(weights.model_config)
    unit = tower.patch_size * tower.merge
    width, height = image.width // unit, image.height // unit

    def ids(*texts: str) -> list[int]:
        return [each for text in texts if text for each in tokenizer(text, add_special_tokens=False)["input_ids"]]

    if architecture.projector == VisionProjectorType.IDEFICS3:
        fake = "<fake_token_around_image>"
        picture = [token] * (width * height)
        return [*ids(fake, "<row_1_col_1>"), *picture, *ids("\n\n", fake, "<global-img>"), *picture, *ids(fake)]
    row = [token] * width
    if architecture.projector == VisionProjectorType.PIXTRAL:
        rows = [each for _ in range(height) for each in (*row, *ids("[IMG_BREAK]"))][:-1]
        return [*rows, *ids(architecture.end)]
    return [*ids(architecture.begin), *row * height, *ids(architecture.end)]


# ---------------------------------------------------------------------------------------------------------- reference


def _log_probs(
    architecture: VisionArchitecture,
    weights: VisionLanguageWeights,
    ids: Tensor,
    pixels: Mapping[str, Tensor],
    *,
    rounded: Callable[[str, Tensor], Tensor] | None = None,
    prepare: Callable[[PreTrainedModel], None] | None = None,
) -> Tensor:
    """Log-probabilities of the compared tokens, float32 [positions, V]."""
    inputs, is_image = dict(pixels), (ids == image_token(weights.model_config)).long()[None]
    if architecture.begin:
        # Positions of a Qwen-VL and Gemma3's attention within an image depend on it.
        name = "mm_token_type_ids" if architecture.dynamic else "token_type_ids"
        inputs[name] = is_image
    keep = torch.arange(len(ids) - _POSITIONS, len(ids))
    return weights.logits(ids, keep=keep, rounded=rounded, inputs=inputs, prepare=prepare).log_softmax(-1)


def _misplace_class_token(model: PreTrainedModel) -> None:
    """Put llama.cpp's fault with class tokens into a Llava: the class token comes last, position embeddings are added
    in that order, and the first of all outputs, which is now a patch's, is left out in its place.
    """
    modules = dict(model.model.vision_tower.named_modules())
    table = next(each for name, each in modules.items() if name.endswith("embeddings.position_embedding"))
    embeddings = next(each for name, each in modules.items() if name.endswith("embeddings"))
    # Positions are added with the class token first. So its own is the last one here, and the first patch's the first.
    table.register_forward_hook(lambda _, __, positions: positions.roll(1, dims=-2))
    embeddings.register_forward_hook(lambda _, __, hidden: hidden.roll(-1, dims=1))
