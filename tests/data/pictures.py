"""Small picture files that the tests of the readers bring."""

import io
from pathlib import Path

import numpy as np
from PIL import Image


def save(path: Path, value: int = 100, size: tuple[int, int] = (10, 12)) -> None:
    """A picture of one colour, of (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value // 2, 255 - value)).save(path)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> io.BytesIO:
    """A picture as a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def png(value: int, size: tuple[int, int] = (10, 12)) -> bytes:
    """A picture of one colour as the bytes of a PNG."""
    return encoded(Image.new("RGB", size, (value, value // 2, 255 - value))).getvalue()


def noise(side: int = 64, seed: int = 0) -> Image.Image:
    """A picture that does not compress."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8))


def gray_png(values: np.ndarray) -> bytes:
    """A label image: the values as gray."""
    return encoded(Image.fromarray(values.astype(np.uint8))).getvalue()
