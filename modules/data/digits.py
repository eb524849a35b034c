"""Handwritten digits with questions, mixed with chats without images: data for which nothing is downloaded.

scikit-learn brings 1 797 scans of 8 x 8 pixels (UCI's "Optical Recognition of Handwritten Digits", CC BY 4.0).
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image

DIGITS = "sklearn-digits"

DigitSplit = Literal["train", "validation"]

_QUESTIONS = ("Which digit is this?", "What number do you see?", "Read the digit.")


def digit_images(split: DigitSplit) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Images uint8 [N, 8, 8], the strokes bright, and the digits int64 [N]. Every fifth image is for validation.

    Raises:
        ValueError: If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(
            f"--dataset {DIGITS} needs scikit-learn, which brings the images: pip install lightning-qlora[yardstick]"
        ) from error
    found = load_digits()
    held_out = np.arange(len(found.target)) % 5 == 4
    chosen = held_out if split == "validation" else ~held_out
    return np.rint(found.images[chosen] * (255 / 16)).astype(np.uint8), found.target[chosen].astype(np.int64)


def digit_chats(split: DigitSplit) -> Iterator[dict[str, Any]]:
    """Rows of chats: of ``"validation"`` one image and one question each; of ``"train"`` also others.

    To train on there are, for ten images, about one row of two images and two rows without any.
    """
    images, digits = digit_images(split)
    draw = random.Random(0)
    if split == "validation":
        for image, digit in zip(images, digits.tolist(), strict=True):
            yield _row(_QUESTIONS[0], str(digit), [image])
        return
    for number, (image, digit) in enumerate(zip(images, digits.tolist(), strict=True)):
        yield _row(draw.choice(_QUESTIONS), str(digit), [image])
        if number % 10 == 0:
            other = draw.randrange(len(digits))
            yield _row("Which digits are these?", f"{digit}, {digits[other]}", [image, images[other]])
        if number % 5 == 0:
            smaller = draw.randrange(9)
            yield _row(f"What comes after {smaller}?", str(smaller + 1), [])


def _row(question: str, answer: str, images: Sequence[np.ndarray[Any, Any]]) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": [_png(image) for image in images]}


def _png(pixels: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
