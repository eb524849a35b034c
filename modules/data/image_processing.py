"""Images for each family of vision-language models: what stands for one in the text, and the model's inputs.

transformers' processors do this too, but those of SmolVLM and Qwen-VL insist on a video processor, which needs
torchvision. Here are an image processor (its PIL variant), the tokenizer, and the placeholders; tests compare the
results with the stock processors'. How many tokens an image takes follows from its size alone, so that a data set's
tokens are counted without its pixels.

| ``model_type`` | class | an image takes |
|---|---|---|
| ``llava`` with CLIP or SigLIP | :class:`LlavaImages` | a fixed number of tokens |
| ``llava`` with a Pixtral tower | :class:`PixtralImages` | one token per patch, a break after each row |
| ``qwen2_vl``, ``qwen2_5_vl``, ``qwen3_vl`` | :class:`QwenImages` | one token per 2 x 2 patches |
| ``idefics3``, ``smolvlm`` | :class:`Idefics3Images` | a fixed number per tile and for the whole |
| ``gemma3`` | :class:`Gemma3Images` | a fixed number, again for each crop |
| ``mllama`` | :class:`MllamaImages` | one token; its features are read by cross attention |

Shapes: B samples, S tokens of a row, P patches of all images of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

#: An image of a batch with the longer side it is limited to, which only some families need once it is shrunk.
SizedImage = tuple[Image.Image, int | None]


class ImageProcessing:
    """What a family of models does with images. A subclass is a row of ``FAMILIES`` in ``image_processors.py``.

    Args:
        config: The model's.
        tokenizer: The model's.
        image_processor: The model's, in its PIL variant.

    Raises:
        ValueError: If the tokenizer lacks one of the family's image tokens.
    """

    default_processor: ClassVar[str]
    """transformers' class of the image processor, where its file does not name it."""
    fixed_size: ClassVar[bool] = False
    """Whether an image takes the same number of tokens whatever its size, so that shrinking it gains nothing."""
    least_side: int = 28
    """The longer side in pixels below which images are not shrunk to save tokens."""

    def __init__(self, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, image_processor: Any) -> None:
        self.config, self.tokenizer, self.image_processor = config, tokenizer, image_processor
        self.image_token_id: int = self._id("image_token_id")
        """The token at which the model puts an image's features."""
        self.image_token = self._token(self.image_token_id)
        names = self.tokens()
        vocabulary = tokenizer.get_vocab()
        if missing := [token for token in names if token not in vocabulary]:
            raise ValueError(
                f"the tokenizer lacks {', '.join(missing)}, which stands for images in a {config.model_type} model; "
                "copy the tokenizer files of the original model into its directory"
            )
        self.never_trained = frozenset(vocabulary[token] for token in names)
        """Ids of the tokens that only images bring into a text."""

    @property
    def embedding_rows(self) -> int:
        """Rows of the model's embedding of tokens."""
        return int(self.config.get_text_config().vocab_size)

    @property
    def placeholder(self) -> str:
        """What a chat template writes for an image, and :meth:`expansion` replaces."""
        return self.image_token

    @property
    def written(self) -> str:
        """What stands for an image in a text for which the chat template does not write it."""
        return self.placeholder

    def tokens(self) -> tuple[str, ...]:
        """The tokens that only images bring into a text."""
        return (self.image_token,)

    def expansion(self, width: int, height: int, max_side: int | None = None) -> str:
        """What takes the place of the placeholder of an image of ``width`` x ``height`` pixels.

        Args:
            width, height: After it is shrunk to ``max_side``.
            max_side: The longer side that images are limited to, for families that enlarge them.

        Raises:
            ValueError: If the family takes no images of this shape.
        """
        raise NotImplementedError

    def cost(self, width: int, height: int, max_side: int | None = None) -> int:
        """Positions of the vision tower for an image, arguments as for :meth:`expansion`."""
        raise NotImplementedError

    def longer_side(self, width: int, height: int, max_side: int | None = None) -> int:
        """The longer side in pixels that counts for the number of tokens, arguments as for :meth:`expansion`."""
        return max(width, height)

    def pixels(self, samples: Sequence[Sequence[SizedImage]]) -> dict[str, Tensor]:
        """The model's inputs for the images of a batch; samples may have none, but not all of them."""
        return self._process([image for sample in samples for image, _ in sample])

    def token_inputs(self, input_ids: Tensor, pixels: dict[str, Tensor]) -> dict[str, Tensor]:
        """What else the model takes for a batch: ``input_ids`` int64 [B, S], and what :meth:`pixels` returned.

        It may take entries out of ``pixels`` that are not for the model.
        """
        return {}

    def _process(self, images: Any, **options: Any) -> dict[str, Tensor]:
        return dict(self.image_processor(images, return_tensors="pt", **options))

    def _id(self, name: str) -> int:
        found = getattr(self.config, name, None)
        if not isinstance(found, int):
            raise ValueError(f"the model's config.json has no {name}, the token that stands for images")
        return found

    def _token(self, token_id: int) -> str:
        token = self.tokenizer.convert_ids_to_tokens(token_id) if token_id < len(self.tokenizer) else None
        if not isinstance(token, str):
            raise ValueError(
                f"the tokenizer has {len(self.tokenizer)} tokens, and none with the id {token_id}, which stands for "
                f"images in this {self.config.model_type} model; copy the tokenizer files of the original model into "
                "its directory"
            )
        return token

    def _image_type_ids(self, input_ids: Tensor) -> Tensor:
        return (input_ids == self.image_token_id).long()


class LlavaImages(ImageProcessing):
    """Llava 1.5: a CLIP or SigLIP tower, images of one size."""

    default_processor = "CLIPImageProcessor"
    fixed_size = True

    #: Towers by whether they have a class token beside the patches.
    _CLASS_TOKEN: ClassVar[dict[str, bool]] = {"clip_vision_model": True, "siglip_vision_model": False}

    @cached_property
    def _positions(self) -> int:
        vision = self.config.vision_config
        if vision.model_type not in self._CLASS_TOKEN:
            known = ", ".join(self._CLASS_TOKEN)
            raise ValueError(f"a llava model with a {vision.model_type} tower is not known here; known are {known}")
        height, width = self._process([Image.new("RGB", (32, 32))])["pixel_values"].shape[-2:]
        if (height, width) != (vision.image_size, vision.image_size):
            raise ValueError(
                f"preprocessor_config.json makes images of {width} x {height} pixels, but the model's tower takes "
                f"{vision.image_size} x {vision.image_size}; take the file of the original model"
            )
        return int((vision.image_size // vision.patch_size) ** 2) + self._CLASS_TOKEN[vision.model_type]

    def expansion(self, width: int, height: int, max_side: int | None = None) -> str:
        without_class_token = int(self.config.vision_feature_select_strategy == "default")
        return self.image_token * (self._positions - without_class_token)

    def cost(self, width: int, height: int, max_side: int | None = None) -> int:
        return self._positions


class PixtralImages(ImageProcessing):
    """Pixtral: images of any size up to a longest edge, rows of patches with a break token after each."""

    default_processor = "PixtralImageProcessor"
    _BREAK, _END = "[IMG_BREAK]", "[IMG_END]"

    def tokens(self) -> tuple[str, ...]:
        return (self.image_token, self._BREAK, self._END)

    def expansion(self, width: int, height: int, max_side: int | None = None) -> str:
        rows, columns = self._grid(width, height)
        row = self.image_token * columns
        return (row + self._BREAK) * (rows - 1) + row + self._END

    def cost(self, width: int, height: int, max_side: int | None = None) -> int:
        rows, columns = self._grid(width, height)
        return rows * columns

    def pixels(self, samples: Sequence[Sequence[SizedImage]]) -> dict[str, Tensor]:
        images = [image for sample in samples for image, _ in sample]
        return self._process(images, patch_size=self.config.vision_config.patch_size)

    def _grid(self, width: int, height: int) -> tuple[int, int]:
        from transformers.models.pixtral.image_processing_pil_pixtral import get_resize_output_image_size

        patch, size = self.config.vision_config.patch_size, self.image_processor.size
        longest = size["longest_edge"]
        shape = np.broadcast_to(np.zeros(1, np.uint8), (3, height, width))  # only its shape is read
        rows, columns = get_resize_output_image_size(shape, (longest, longest), (patch, patch), "channels_first")
        return rows // patch, columns // patch


class QwenImages(ImageProcessing):
    """Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images of nearly any size, and positions in three dimensions."""

    default_processor = "Qwen2VLImageProcessor"
    _START, _END = "<|vision_start|>", "<|vision_end|>"

    @property
    def written(self) -> str:
        return f"{self._START}{self.image_token}{self._END}"

    def tokens(self) -> tuple[str, ...]:
        return (self.image_token, self._START, self._END)

    def expansion(self, width: int, height: int, max_side: int | None = None) -> str:
        return self.image_token * (self.cost(width, height) // int(self.image_processor.merge_size) ** 2)

    def cost(self, width: int, height: int, max_side: int | None = None) -> int:
        return int(self.image_processor.get_number_of_image_patches(height, width))

    def token_inputs(self, input_ids: Tensor, pixels: dict[str, Tensor]) -> dict[str, Tensor]:
        # Without it Qwen2-VL raises, and Qwen2.5-VL silently takes positions of one dimension.
        return {"mm_token_type_ids": self._image_type_ids(input_ids)}


class Idefics3Images(ImageProcessing):
    """Idefics3 and SmolVLM: images are enlarged to a longest edge, cut into tiles, and shown as a whole."""

    default_processor = "Idefics3ImageProcessor"
    _FAKE, _GLOBAL = "<fake_token_around_image>", "<global-img>"

    def tokens(self) -> tuple[str, ...]:
        return (self.image_token, self._FAKE, self._GLOBAL)

    @cached_property
    def _per_tile(self) -> int:
        vision = self.config.vision_config
        return int((vision.image_size // vision.patch_size) ** 2 / self.config.scale_factor**2)

    @property
    def least_side(self) -> int:  # type: ignore[override]  # a constant of the other families
        """The edge of a tile."""
        return int(self.image_processor.max_image_size["longest_edge"])

    def longer_side(self, width: int, height: int, max_side: int | None = None) -> int:
        """The longest edge that an image is scaled to. Limited, it is a whole number of tiles."""
        own, tile = int(self.image_processor.size["longest_edge"]), self.least_side
        return own if max_side is None or max_side >= own else max(tile, max_side // tile * tile)

    def _grid(self, width: int, height: int, max_side: int | None) -> tuple[int, int]:
        options = {"size": {"longest_edge": self.longer_side(width, height, max_side)}}
        _, rows, columns = self.image_processor.get_number_of_image_patches(height, width, options)
        return rows, columns

    def expansion(self, width: int, height: int, max_side: int | None = None) -> str:
        rows, columns = self._grid(width, height, max_side)
        features = self.image_token * self._per_tile
        whole = f"{self._FAKE}{self._GLOBAL}{features}{self._FAKE}"
        if not rows:
            return whole
        tiles = [
            "".join(f"{self._FAKE}<row_{row}_col_{column}>{features}" for column in range(1, columns + 1)) + "\n"
            for row in range(1, rows + 1)
        ]
        return "".join(tiles) + "\n" + whole

    def cost(self, width: int, height: int, max_side: int | None = None) -> int:
        rows, columns = self._grid(width, height, max_side)
        vision = self.config.vision_config
        return int((rows * columns + 1) * (vision.image_size // vision.patch_size) ** 2)

    def pixels(self, samples: Sequence[Sequence[SizedImage]]) -> dict[str, Tensor]:
        """``pixel_values`` [B, N, 3, H, W] and ``pixel_attention_mask``, N tiles of the sample that has most.

        Samples of fewer tiles are filled up with zeros, which the model leaves out.
        """
        tiles = [
            [
                self._process([[image]], size={"longest_edge": self.longer_side(*image.size, side)})
                for image, side in sample
            ]
            for sample in samples
        ]
        return {
            key: _stack([torch.cat([one[key][0] for one in sample]) if sample else None for sample in tiles])
            for key in ("pixel_values", "pixel_attention_mask")
        }


class Gemma3Images(ImageProcessing):
    """Gemma 3: a fixed number of tokens between two marks, whose tokens see each other both ways."""

    default_processor = "Gemma3ImageProcessor"
    fixed_size = True

    @cached_property
    def _marks(self) -> tuple[str, str]:
        return self._token(self._id("boi_token_id")), self._token(self._id("eoi_token_id"))

    @property
    def placeholder(self) -> str:
        return self._marks[0]

    def tokens(self) -> tuple[str, ...]:
        return (self.image_token, *self._marks)

    def expansion(self, width: int, height: int, max_side: int | None = None) -> str:
        start, end = self._marks
        whole = f"\n\n{start}{self.image_token * self.config.mm_tokens_per_image}{end}\n\n"
        if not (crops := self._crops(width, height)):
            return whole
        return f"Here is the original image {whole} and here are some crops to help you see better " + " ".join(
            [whole] * crops
        )

    def cost(self, width: int, height: int, max_side: int | None = None) -> int:
        vision = self.config.vision_config
        return int((self._crops(width, height) + 1) * (vision.image_size // vision.patch_size) ** 2)

    def pixels(self, samples: Sequence[Sequence[SizedImage]]) -> dict[str, Tensor]:
        images = [image for sample in samples for image, _ in sample]
        found = self._process(images, do_convert_rgb=True, do_pan_and_scan=bool(self.image_processor.do_pan_and_scan))
        del found["num_crops"]
        return found

    def token_inputs(self, input_ids: Tensor, pixels: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"token_type_ids": self._image_type_ids(input_ids)}

    def _crops(self, width: int, height: int) -> int:
        processor = self.image_processor
        if not processor.do_pan_and_scan:
            return 0
        shape = np.broadcast_to(np.zeros(1, np.uint8), (3, height, width))  # only its shape is read
        options = ("min_crop_size", "max_num_crops", "min_ratio_to_activate")
        return len(processor.pan_and_scan(shape, *(getattr(processor, f"pan_and_scan_{name}") for name in options)))


class MllamaImages(ImageProcessing):
    """Llama 3.2 Vision: images are cut into tiles, which layers of cross attention read from one token on."""

    default_processor = "MllamaImageProcessor"
    fixed_size = True

    @property
    def embedding_rows(self) -> int:
        """Eight more than the vocabulary has, for the token of images."""
        return super().embedding_rows + 8

    def expansion(self, width: int, height: int, max_side: int | None = None) -> str:
        return self.image_token

    def cost(self, width: int, height: int, max_side: int | None = None) -> int:
        from transformers.models.mllama.image_processing_pil_mllama import get_optimal_tiled_canvas

        tile, vision = self.image_processor.size["height"], self.config.vision_config
        rows, columns = get_optimal_tiled_canvas(height, width, self.image_processor.max_image_tiles, tile)
        return int(rows * columns // tile**2 * ((vision.image_size // vision.patch_size) ** 2 + 1))

    def pixels(self, samples: Sequence[Sequence[SizedImage]]) -> dict[str, Tensor]:
        return self._process([[image for image, _ in sample] for sample in samples])

    def token_inputs(self, input_ids: Tensor, pixels: dict[str, Tensor]) -> dict[str, Tensor]:
        """``cross_attention_mask`` int64 [B, S, images, tiles]: which tokens read which tiles."""
        from transformers.models.mllama.processing_mllama import (
            convert_sparse_cross_attention_mask_to_dense,
            get_cross_attention_token_mask,
        )

        if not pixels:
            return {}
        reads = [get_cross_attention_token_mask(row, self.image_token_id) for row in input_ids.tolist()]
        mask = convert_sparse_cross_attention_mask_to_dense(
            reads, pixels.pop("num_tiles"), self.image_processor.max_image_tiles, input_ids.shape[1]
        )
        return {"cross_attention_mask": torch.from_numpy(mask)}


def _stack(rows: Sequence[Tensor | None]) -> Tensor:
    """[B, N, ...] of B tensors [n, ...], filled up with zeros; ``None`` is a row without any."""
    present = [row for row in rows if row is not None]
    most = max(row.shape[0] for row in present)
    stacked = present[0].new_zeros(len(rows), most, *present[0].shape[1:])
    for index, row in enumerate(rows):
        if row is not None:
            stacked[index, : row.shape[0]] = row
    return stacked
