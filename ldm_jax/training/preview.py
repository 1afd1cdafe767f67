"""Pictures for people: grids of images with their captions, as PNG."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from colorsys import hsv_to_rgb
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from ldm_jax.paths import make_directory, write_bytes

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


def shown(inputs: Mapping[str, Sequence[Any]], height: int, width: int) -> np.ndarray | None:
    """What a model is told in pictures, uint8 [N,height,width,3], where it is told any: small pictures, pictures with gray holes, maps of
    classes in colours, frames of boxes."""
    if "mask" in inputs:
        return np.stack([np.where(hole[..., None] > 0, 128, image) for image, hole in zip(inputs["image"], inputs["mask"], strict=True)])
    if "low_res" in inputs:
        small = [Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST) for picture in inputs["low_res"]]
        return np.stack([np.asarray(picture) for picture in small])
    if "segmentation" in inputs:
        return np.stack([class_colors(classes) for classes in inputs["segmentation"]])
    if "boxes" in inputs:
        return np.stack([_frames(rows, height, width) for rows in inputs["boxes"]])
    return None


# Neighbouring classes have hues a golden angle apart; 0 is black.
_PALETTE = np.array([hsv_to_rgb(i * 0.618034 % 1, 0.75, min(i, 1) * (1 - i % 3 * 0.2)) for i in range(256)])
_PALETTE = np.round(_PALETTE * 255).astype(np.uint8)


def class_colors(labels: np.ndarray) -> np.ndarray:
    """A colour for each class, uint8 [...,3] of whole numbers [...]."""
    return _PALETTE[np.asarray(labels, int) % len(_PALETTE)]


def _frames(rows: np.ndarray, height: int, width: int) -> np.ndarray:
    canvas = Image.new("RGB", (width, height), "black")
    draw = ImageDraw.Draw(canvas)
    for label, x0, y0, x1, y1 in np.asarray(rows, np.float64).reshape(-1, 5):
        corners = [x0 * (width - 1), y0 * (height - 1), x1 * (width - 1), y1 * (height - 1)]
        draw.rectangle(corners, outline=tuple(_PALETTE[1 + int(label) % 255].tolist()))
    return np.asarray(canvas)


def alternating(above: np.ndarray, below: np.ndarray, columns: int) -> np.ndarray:
    """Two sets of images [N,H,W,3] in rows of `columns`, a row of each in turn."""
    starts = range(0, len(above), columns)
    return np.concatenate([part[start : start + columns] for start in starts for part in (above, below)])


def png_bytes(image: Image.Image, texts: Mapping[str, str] | None = None) -> bytes:
    """The image as a PNG file, with texts in its metadata."""
    info = PngInfo()
    for name, text in (texts or {}).items():
        info.add_itxt(name, text)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def save_grid(path: Any, images: np.ndarray, columns: int, captions: Sequence[str] | None = None) -> None:
    """Writes the grid as a PNG, complete or not at all."""
    make_directory(path.parent)
    write_bytes(path, png_bytes(grid(images, columns, captions)))
