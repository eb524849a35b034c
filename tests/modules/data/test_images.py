"""What is accepted as an image, what is done to it, and what is refused in which words."""

import base64
import io
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image as stock_load_image

from lightning_qlora.modules.data.images import ImageTable, StoredImage, check_image, load_image, stored_image


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


PIXELS = np.random.default_rng(0).integers(0, 255, (6, 10, 3), dtype=np.uint8)
RGB = Image.fromarray(PIXELS)
PNG = encoded(RGB)


def rotated(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(RGB, "JPEG", exif=exif)


def test_references_of_all_forms(tmp_path: Path) -> None:
    path, text = tmp_path / "an image.png", base64.b64encode(PNG).decode()
    path.write_bytes(PNG)
    for value in (
        "an image.png", str(path), f"file://{tmp_path}/an%20image.png", PNG, f"data:image/png;base64,{text}",
        {"path": "an image.png"}, {"url": path.as_uri()}, {"base64": text}, {"bytes": PNG, "path": "gone.png"},
        {"bytes": None, "path": "an image.png"}, {"image_url": {"url": f"data:image/png;base64,{text}"}},
    ):  # fmt: skip
        assert load_image(stored_image(value, tmp_path)).tobytes() == RGB.tobytes(), value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("https://example.org/cat.png", "would have to be fetched over the network, which is never done here"),
        ({"url": "http://example.org/cat.png"}, "download it and give its path"),
        ("s3://bucket/cat.png", "fetched over the network"),
        ("file://server/cat.png", "is on the host 'server'; only files of this machine are read"),
        ({"base64": "not base64!"}, "the image is not base64"),
        ("data:image/png,abc", "a data: URL must hold base64"),
        ({}, "must be given as path, url (file:// only), base64 or bytes, found dict {}"),
        (7, "found int 7"),
        ("", "found str ''"),
    ],
)
def test_references_that_are_refused(value: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        stored_image(value, tmp_path)


def bomb() -> bytes:
    """A PNG whose header says 10000 x 10000 pixels."""
    large = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(large, "PNG")
    return large.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty (0 bytes)"),
        (b"not an image", "cannot be decoded (UnidentifiedImageError: unknown format)"),
        (PNG[:-40], "cannot be decoded ("),
        (encoded(RGB, "JPEG")[:-200], "cannot be decoded (OSError: "),
        (PNG.replace(b"IDAT", b"IDAX"), "cannot be decoded ("),
        (bomb(), "has more than 89 megapixels (10000 x 10000), which take too much memory"),
        (b"P6 30000 30000 255\n", "has more than 89 megapixels ("),
        (b"P6 0 5 255\n", "0 x 5"),
        (encoded(Image.new("F", (4, 4)), "TIFF"), "has 32 bits per pixel, so its brightest value is unknown"),
    ],
    ids=["empty", "text", "cut-png", "cut-jpeg", "damaged", "100-megapixels", "bomb", "zero-sized", "float"],
)
def test_what_cannot_be_trained_on_is_refused(data: bytes, message: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = ImageTable().check([StoredImage(data=data)])[0]
    assert isinstance(found, ValueError)
    assert message in str(found) or (message == "0 x 5" and "cannot be decoded" in str(found))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone.png cannot be read: No such file or directory"):
        check_image(stored_image("gone.png", tmp_path))


@pytest.mark.parametrize(
    ("data", "change"),
    [
        (encoded(RGB.convert("CMYK"), "JPEG"), "in CMYK (converted to RGB)"),
        (
            encoded(RGB, "GIF", save_all=True, append_images=[Image.new("RGB", RGB.size)]),
            "of several frames (the first is taken)",
        ),
        (rotated(6), "rotated or mirrored as their EXIF data say"),
        (rotated(2), "rotated or mirrored as their EXIF data say"),
        (encoded(RGB.convert("RGBA")), "with transparency (which is dropped)"),
        (encoded(RGB.convert("L")), None),
        (encoded(RGB.convert("P")), None),
        (PNG, None),
    ],
    ids=["cmyk", "animated", "exif-rotated", "exif-mirrored", "transparent", "grey", "palette", "plain"],
)
def test_pixels_are_those_of_stock_transformers(data: bytes, change: str | None, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(data)
    checked, pixels = check_image(StoredImage(str(path))), load_image(StoredImage(str(path)))
    expected = stock_load_image(str(path))
    assert pixels.tobytes() == expected.tobytes()
    assert pixels.size == (checked.width, checked.height)
    assert (change is None) == (checked.changes == ())
    assert change is None or change in checked.changes[0]


def test_16_bits_are_scaled() -> None:
    grey = np.array([[0, 257 * 5], [257 * 200, 65535]], np.uint16)
    image = StoredImage(data=encoded(Image.fromarray(grey)))
    assert check_image(image).changes == ("of 16 bits (scaled to 8)",)
    assert np.asarray(load_image(image))[..., 0].tolist() == [[0, 5], [200, 255]]


def test_shrinking_keeps_the_aspect_and_enlarges_nothing() -> None:
    image = StoredImage(data=encoded(Image.new("RGB", (300, 100))))
    assert [load_image(image, side).size for side in (None, 300, 150, 1)] == [(300, 100), (300, 100), (150, 50), (1, 1)]


def test_a_table_holds_each_content_once_and_notices_a_changed_file(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(PNG)
    table = ImageTable()
    first, second, again = table.check([stored_image(name, tmp_path) for name in ("a.png", "b.png", "a.png")])
    assert first == second == again
    assert len(table.images) == 1
    assert table.load(table.index(str(first)), 5).size == (5, 3)
    (tmp_path / "a.png").write_bytes(encoded(Image.new("RGB", (3, 3))))
    with pytest.raises(ValueError, match="had 10 x 6 pixels and now has others"):
        table.load(0, None)
