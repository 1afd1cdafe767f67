"""Pictures for people: grids of images with their captions, as PNG."""

import io
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ldm_jax.config import write_bytes

_TILE = 112  # pixels a small image is enlarged to, so that its caption can be read
_LINES = 4


def grid(images: np.ndarray, columns: int, captions: Sequence[str] | None = None) -> Image.Image:
    """uint8 images [N,H,W,3] in rows of `columns`, each above its caption; small ones are enlarged by a whole factor."""
    n, height, width, _ = images.shape
    factor = max(1, _TILE // width)
    tile_w, tile_h = width * factor, height * factor
    font = ImageFont.load_default(size=10)
    text_h = 12 * _LINES if captions else 0
    rows = -(-n // columns)
    canvas = Image.new("RGB", (columns * (tile_w + 4) + 4, rows * (tile_h + text_h + 4) + 4), "white")
    draw = ImageDraw.Draw(canvas)
    for i, image in enumerate(images):
        x, y = 4 + i % columns * (tile_w + 4), 4 + i // columns * (tile_h + text_h + 4)
        canvas.paste(Image.fromarray(image).resize((tile_w, tile_h), Image.Resampling.NEAREST), (x, y))
        if captions:
            lines = textwrap.wrap(captions[i], max(8, tile_w // 5))[:_LINES]
            draw.multiline_text((x, y + tile_h), "\n".join(lines), fill="black", font=font, spacing=1)
    return canvas


def png_bytes(image: Image.Image) -> bytes:
    """The image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def save_grid(path: Any, images: np.ndarray, columns: int, captions: Sequence[str] | None = None) -> None:
    """Writes the grid as a PNG, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, png_bytes(grid(images, columns, captions)))
