"""Images of data sets: where each one is, what is wrong or unusual about it, and its pixels.

Nothing is fetched from a network. Images are decoded twice: once by :meth:`ImageTable.check`, before training, so that
a damaged one is refused then, and again for each batch, because pixels of a data set do not fit into memory.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

#: Most pixels of an image, as Pillow's own bound against decompression bombs: a quarter of a GiB as RGB.
MOST_PIXELS = 1024**3 // 4 // 3

#: The EXIF tag of the orientation, and its values for which width and height change places.
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)


@dataclass(frozen=True)
class StoredImage:
    """Where an image is: in a file, or in memory as the bytes of one."""

    path: str | None = None
    data: bytes | None = None

    def read(self) -> bytes:
        """The bytes of the file.

        Raises:
            ValueError: If there is none, or it cannot be read.
        """
        if self.data is not None:
            return self.data
        assert self.path is not None
        try:
            return Path(self.path).read_bytes()
        except OSError as error:
            raise ValueError(f"the image {self.path} cannot be read: {error.strerror or error}") from error

    def __str__(self) -> str:
        return "the image" if self.path is None else f"the image {self.path}"


@dataclass(frozen=True)
class CheckedImage:
    """What is known of an image that can be decoded.

    Attributes:
        width, height: Pixels, as it is shown: after the rotation that its EXIF data ask for.
        digest: SHA-256 of its file.
        changes: What is done to it to make RGB pixels of it, beyond decoding.
    """

    width: int
    height: int
    digest: str
    changes: tuple[str, ...]


# --- references ------------------------------------------------------------------------------------------------------


def stored_image(value: object, folder: Path) -> StoredImage:
    """Read what a row says of an image.

    Args:
        value: A path, a ``file://`` URL, a ``data:`` URL, bytes; or a mapping with one of ``path``, ``url``,
            ``base64``, ``bytes`` and ``image``, which may again be any of these.
        folder: What relative paths are relative to.

    Raises:
        ValueError: For anything else, such as an address in a network.
    """
    if isinstance(value, bytes):
        return StoredImage(data=value)
    if isinstance(value, str) and value:
        return _from_text(value, folder)
    if isinstance(value, Mapping):
        if isinstance(value.get("base64"), str):
            return StoredImage(data=_decode_base64(value["base64"]))
        # ``datasets`` writes bytes and path, where the path may be the name that the file once had.
        for key in ("bytes", "image", "path", "url", "image_url"):
            if value.get(key) is not None:
                return stored_image(value[key], folder)
    raise ValueError(
        f"an image must be given as path, url (file:// only), base64 or bytes, found {_short(value)}; files that "
        "datasets wrote hold images as bytes"
    )


def _from_text(text: str, folder: Path) -> StoredImage:
    scheme = urlsplit(text).scheme.lower() if "://" in text[:16] or text[:5].lower() == "data:" else ""
    if scheme == "data":
        header, comma, body = text.partition(",")
        if not comma or not header.endswith(";base64"):
            raise ValueError(f"a data: URL must hold base64, found {header[:40]!r}")
        return StoredImage(data=_decode_base64(body))
    if scheme == "file":
        parts = urlsplit(text)
        if parts.netloc not in ("", "localhost"):
            raise ValueError(f"the image {text} is on the host {parts.netloc!r}; only files of this machine are read")
        return StoredImage(path=unquote(parts.path))
    if scheme:
        raise ValueError(
            f"the image {text:.80} would have to be fetched over the network, which is never done here; download it "
            "and give its path"
        )
    return StoredImage(path=str(folder / text))


def _decode_base64(text: str) -> bytes:
    if text[:5].lower() == "data:":
        text = text.partition(",")[2]
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"the image is not base64: {error}") from error


def _short(value: object) -> str:
    return f"{type(value).__name__} {value!r:.60}"


# --- decoding --------------------------------------------------------------------------------------------------------


def check_image(image: StoredImage) -> CheckedImage:
    """Decode an image, and say what is unusual about it.

    Raises:
        ValueError: If it cannot be read or decoded to its end, is empty, or has more than :data:`MOST_PIXELS`.
    """
    data = image.read()
    opened = _open(data, image)
    changes = []
    if getattr(opened, "n_frames", 1) > 1:
        changes.append("of several frames (the first is taken)")
    try:
        opened.load()
        orientation = opened.getexif().get(_ORIENTATION, 1)
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, zlib.error and others
        raise ValueError(f"{image} cannot be decoded ({type(error).__name__}: {error})") from error
    if orientation in range(2, 9):
        changes.append("rotated or mirrored as their EXIF data say")
    if opened.mode.startswith("I;16"):
        changes.append("of 16 bits (scaled to 8)")
    elif opened.mode in ("I", "F"):
        raise ValueError(
            f"{image} has 32 bits per pixel, so its brightest value is unknown; convert it to 8 or 16 bits"
        )
    elif opened.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        changes.append(f"in {opened.mode} (converted to RGB)")
    elif "A" in opened.mode or "a" in opened.mode or "transparency" in opened.info:
        changes.append("with transparency (which is dropped)")
    width, height = opened.size
    if orientation in _TURNED:
        width, height = height, width
    return CheckedImage(width, height, hashlib.sha256(data).hexdigest(), tuple(changes))


def _open(data: bytes, image: StoredImage) -> Image.Image:
    """Read the header of an image."""
    if not data:
        raise ValueError(f"{image} is empty (0 bytes)")
    try:
        opened = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise ValueError(_too_large(image, str(error))) from error
    except Exception as error:  # broken headers raise as many types as broken bodies
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else f"{error}"
        raise ValueError(f"{image} cannot be decoded ({type(error).__name__}: {reason})") from error
    width, height = opened.size
    if width < 1 or height < 1:
        raise ValueError(f"{image} has {width} x {height} pixels")
    if width * height > MOST_PIXELS:
        raise ValueError(_too_large(image, f"{width} x {height}"))
    return opened


def _too_large(image: StoredImage, size: str) -> str:
    return (
        f"{image} has more than {MOST_PIXELS / 1e6:.0f} megapixels ({size}), which take too much memory to decode; "
        "save a smaller one"
    )


def load_image(image: StoredImage, max_side: int | None = None) -> Image.Image:
    """Decode an image to RGB, upright, its first frame, its transparency dropped, as transformers' ``load_image``.

    Args:
        image: One that :func:`check_image` accepts.
        max_side: The longer side in pixels to which a larger image is shrunk, with its aspect.
    """
    opened = ImageOps.exif_transpose(_open(image.read(), image))
    if opened.mode.startswith("I;16"):
        opened = Image.fromarray((np.asarray(opened) // 257).astype(np.uint8))
    rgb = opened.convert("RGB")
    size = shrunk_size(rgb.width, rgb.height, max_side)
    return rgb if size == rgb.size else rgb.resize(size, Image.Resampling.BICUBIC)


def shrunk_size(width: int, height: int, max_side: int | None) -> tuple[int, int]:
    """Width and height of an image after its longer side is brought down to ``max_side`` pixels, where it is longer."""
    longer = max(width, height)
    if max_side is None or longer <= max_side:
        return width, height
    return max(1, round(width * max_side / longer)), max(1, round(height * max_side / longer))


# --- all images of a data set ----------------------------------------------------------------------------------------


class ImageTable:
    """The images of a data set, each content once."""

    def __init__(self) -> None:
        self.images: list[StoredImage] = []
        self.checked: list[CheckedImage] = []
        """For each of ``images``, what is known of it."""
        self._index: dict[str, int] = {}

    def check(self, images: Sequence[StoredImage]) -> list[str | ValueError]:
        """Decode images, on several threads, and keep those that can be.

        Returns:
            For each its digest, by which :meth:`index` finds it, or what is wrong with it.
        """
        different = list(dict.fromkeys(images))
        threads = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
        with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
            # Larger ones than its bound are refused here; Pillow would only warn of them.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            results = dict(zip(different, pool.map(_check_or_error, different), strict=True))
        for image, result in results.items():
            if isinstance(result, CheckedImage) and result.digest not in self._index:
                self._index[result.digest] = len(self.images)
                self.images.append(image)
                self.checked.append(result)
        return [result.digest if isinstance(result := results[image], CheckedImage) else result for image in images]

    def index(self, digest: str) -> int:
        """Where the image of this content stands in ``images``."""
        return self._index[digest]

    def changes(self) -> dict[str, int]:
        """What is done to images beyond decoding, and to how many."""
        return dict(Counter(change for image in self.checked for change in image.changes))

    def load(self, index: int, max_side: int | None) -> Image.Image:
        """As :func:`load_image`.

        Raises:
            ValueError: If the file is no longer the one that was checked.
        """
        image, checked = self.images[index], self.checked[index]
        loaded = load_image(image, max_side)
        if loaded.size != shrunk_size(checked.width, checked.height, max_side):
            raise ValueError(f"{image} had {checked.width} x {checked.height} pixels and now has others")
        return loaded


def _check_or_error(image: StoredImage) -> CheckedImage | ValueError:
    try:
        return check_image(image)
    except ValueError as error:
        return error
