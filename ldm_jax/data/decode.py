"""Files of pictures, label images and masks as arrays. What is damaged raises one of `BROKEN`; nothing is half read."""

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

# What Pillow raises on damaged files, besides OSError.
BROKEN = (OSError, ValueError, EOFError, SyntaxError, struct.error, Image.DecompressionBombError)

ImageFile.LOAD_TRUNCATED_IMAGES = False  # Pillow's default: where another package sets it, a file cut in half is a picture half gray

_ORIENTATION = 0x0112  # EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_ITS_SIDE = {_UPRIGHT[value] for value in (5, 6, 7, 8)}
_SCALED = {"L;2": 85, "L;4": 17}  # what Pillow multiplies gray values of 2 and 4 bits with


def decode_image(file: Path | io.BytesIO) -> np.ndarray:
    """Reads a picture as RGB, upright as its EXIF tag says, transparent parts over white, 16-bit values scaled to 8.

    Returns:
        uint8 [H, W, 3].

    Raises:
        any of `BROKEN` where the file is damaged.
    """
    with _open(file) as opened:
        opened.load()
        picture = _upright(opened)
        if picture.mode.startswith("I"):
            gray = np.asarray(picture).astype(np.int64).clip(0, 65535) // 257
            return np.repeat(gray.astype(np.uint8)[..., None], 3, axis=-1)
        if picture.has_transparency_data:
            colour = picture.convert("RGBA")
            white = Image.new("RGBA", colour.size, (255, 255, 255, 255))
            picture = Image.alpha_composite(white, colour)
        return np.asarray(picture.convert("RGB"))


def _open(file: Path | io.BytesIO) -> Image.Image:
    try:
        return Image.open(file)
    except UnidentifiedImageError as error:
        size = file.stat().st_size if isinstance(file, Path) else file.getbuffer().nbytes
        raise OSError("it is not a picture, or of a kind that is not known" if size else "it is empty") from error


def image_size(file: Path | io.BytesIO) -> tuple[int, int]:
    """(height, width) of what `decode_image` would give, by the head of the file alone. Raises any of `BROKEN`."""
    with _open(file) as opened:
        width, height = opened.size
        return (width, height) if _turn(opened) in _ON_ITS_SIDE else (height, width)


def _upright(picture: Image.Image) -> Image.Image:
    turn = _turn(picture)
    return picture if turn is None else picture.transpose(turn)


def _turn(picture: Image.Image) -> Image.Transpose | None:
    """What sets a picture upright, as its EXIF tag says; one whose EXIF data make no sense is as good as one without."""
    try:
        return _UPRIGHT.get(picture.getexif().get(_ORIENTATION, 1))
    except (*BROKEN, LookupError, TypeError, ArithmeticError):
        return None


def decode_map(file: Path | io.BytesIO) -> np.ndarray:
    """Reads a label image: the indices of a palette, or the gray values, are the classes, whatever colours they are shown in.

    Returns:
        uint8 [H, W].

    Raises:
        any of `BROKEN` where the file is damaged, has more than one channel, or a class above 255.
    """
    with _open(file) as opened:
        if opened.mode not in ("1", "L", "P") and not opened.mode.startswith("I"):
            raise ValueError(f"a label image has a palette or gray values, this one is {opened.mode}")
        tiles = getattr(opened, "tile", [])
        layout = tiles[0][3] if tiles else None
        labels = np.asarray(opened).astype(np.int64)
    if labels.size and labels.max() > 255:
        raise ValueError(f"a label image has classes up to 255, this one up to {labels.max()}")
    return (labels // _SCALED.get(layout, 1) if isinstance(layout, str) else labels).astype(np.uint8)


def decode_mask(file: Path | io.BytesIO) -> np.ndarray:
    """Reads a mask: bool [H, W], True (the hole) where it is white, or at least half-way. Raises as `decode_image`."""
    return decode_image(file).mean(axis=-1) >= 127.5


DECODERS = {"image": decode_image, "segmentation": decode_map, "mask": decode_mask}
"""Of the fields of an example that are pictures."""


def decode_fields(example: dict[str, Any]) -> dict[str, Any]:
    """The example with the bytes of its picture and maps decoded, arrays left as they are.

    Raises:
        any of `BROKEN`, also where a map has not the size of the picture.
    """
    decoded = dict(example)
    for field, decode in DECODERS.items():
        if isinstance(example.get(field), bytes):
            decoded[field] = decode(io.BytesIO(example[field]))
        if field in example and not isinstance(decoded[field], np.ndarray):
            raise ValueError(f"its {field} is no picture but {type(decoded[field]).__name__}")
        if field in example and decoded[field].shape[:2] != decoded["image"].shape[:2]:
            (height, width), (rows, columns) = decoded["image"].shape[:2], decoded[field].shape[:2]
            raise ValueError(f"its {field} has {columns}x{rows} pixels, the picture {width}x{height}")
    return decoded
