import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from ldm_jax.data.decode import BROKEN, decode_fields, decode_image, decode_map, decode_mask
from tests.data.pictures import encoded, gray_png, noise, png


def raw_png(width: int, bits: int, colour: int, row: bytes) -> io.BytesIO:
    """A PNG of one row, in depths that Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, 1, bits, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + parts)


def test_decoding_of_every_mode_gives_rgb() -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    deep = decode_image(encoded(Image.fromarray(ramp), "PNG"))
    assert deep.shape == (8, 8, 3) and deep.dtype == np.uint8
    np.testing.assert_array_equal(deep[..., 1], ramp // 257)

    half_red = Image.new("RGBA", (2, 2), (255, 0, 0, 128))
    np.testing.assert_allclose(decode_image(encoded(half_red, "PNG"))[0, 0], [255, 127, 127], atol=1)
    clear_gray = Image.new("LA", (2, 2), (0, 0))
    np.testing.assert_array_equal(decode_image(encoded(clear_gray, "PNG"))[0, 0], [255, 255, 255])

    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    np.testing.assert_array_equal(decode_image(encoded(palette, "PNG"))[0], [[10, 20, 30], [40, 50, 60]])
    np.testing.assert_array_equal(decode_image(encoded(palette, "PNG", transparency=0))[0], [[255, 255, 255], [40, 50, 60]])
    np.testing.assert_array_equal(decode_image(encoded(Image.new("1", (2, 2), 1), "BMP")), 255)


def test_cmyk_jpeg_and_colours_of_16_bits() -> None:
    for cmyk, rgb in (((0, 255, 255, 0), (255, 0, 0)), ((255, 255, 0, 0), (0, 0, 255)), ((0, 0, 0, 128), (127, 127, 127))):
        picture = decode_image(encoded(Image.new("CMYK", (8, 8), cmyk), "JPEG", quality=95))
        np.testing.assert_allclose(picture[4, 4].astype(int), rgb, atol=6)
    deep = raw_png(2, 16, 2, struct.pack(">6H", 0, 0x80FF, 65535, 257, 514, 1000))
    np.testing.assert_array_equal(decode_image(deep)[0], [[0, 0x80, 255], [1, 2, 3]])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    """The file holds what a camera turned so would store of `upright`: undoing each turn by index arithmetic gives the picture back."""
    upright = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    transposed = upright.transpose(1, 0, 2)
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: transposed, 6: transposed[::-1], 7: transposed[::-1, ::-1], 8: transposed[:, ::-1],
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(decode_image(encoded(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)), upright)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF:UserWarning")
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0garbage",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04abcd\0\0\0\0",  # the orientation is a text
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0",  # the orientation is 99
        b"Exif\0\0MM\0*\xff\xff\xff\xff",
        b"",
    ],
)
def test_exif_data_that_make_no_sense_leave_the_picture_as_it_is(exif: bytes) -> None:
    picture = noise(16)
    plain = decode_image(encoded(picture, "JPEG"))
    np.testing.assert_array_equal(decode_image(encoded(picture, "JPEG", exif=exif)), plain)


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("BMP", {})])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_file_that_is_cut_is_broken_never_half_gray(kind: str, options: dict[str, bool], share: float) -> None:
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    whole = encoded(noise(), kind, **options).getvalue()
    assert decode_image(io.BytesIO(whole)).shape == (64, 64, 3)
    with pytest.raises(BROKEN):
        decode_image(io.BytesIO(whole[: int(len(whole) * share)]))


def test_a_label_image_keeps_its_numbers_whatever_its_colours() -> None:
    classes = np.array([[0, 1, 2], [7, 200, 255]], np.uint8)
    np.testing.assert_array_equal(decode_map(io.BytesIO(gray_png(classes))), classes)
    palette = Image.fromarray(classes, "L").convert("P")
    palette.putdata(classes.ravel().tolist())
    palette.putpalette([(37 * i) % 256 for i in range(768)])
    np.testing.assert_array_equal(decode_map(encoded(palette)), classes)
    np.testing.assert_array_equal(decode_map(encoded(Image.fromarray(classes.astype(np.uint16)))), classes)
    np.testing.assert_array_equal(decode_map(raw_png(4, 2, 0, bytes([0b00011011])))[0], [0, 1, 2, 3])
    np.testing.assert_array_equal(decode_map(raw_png(4, 4, 0, bytes([0x01, 0x2F])))[0], [0, 1, 2, 15])
    np.testing.assert_array_equal(decode_map(raw_png(8, 1, 0, bytes([0b01100001])))[0], [0, 1, 1, 0, 0, 0, 0, 1])
    with pytest.raises(ValueError, match="RGB"):
        decode_map(io.BytesIO(png(3)))
    with pytest.raises(ValueError, match="up to 256"):
        decode_map(encoded(Image.fromarray(np.full((2, 2), 256, np.uint16))))


def test_a_mask_is_true_where_white() -> None:
    values = np.array([[0, 127, 128, 255]], np.uint8)
    mask = decode_mask(io.BytesIO(gray_png(values)))
    assert mask.dtype == bool and mask.tolist() == [[False, False, True, True]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 255, 255, 0, 0, 0])  # the first colour is white
    palette.putpixel((1, 0), 1)
    assert decode_mask(encoded(palette)).tolist() == [[True, False]]


def test_fields_are_decoded_and_maps_must_have_the_size_of_the_picture() -> None:
    labels = np.arange(120, dtype=np.uint8).reshape(12, 10)
    example = decode_fields({"image": png(9), "segmentation": gray_png(labels), "mask": labels > 5, "text": "x"})
    assert example["image"].shape == (12, 10, 3) and example["text"] == "x"
    np.testing.assert_array_equal(example["segmentation"], labels)
    with pytest.raises(ValueError, match="mask has 12x10 pixels, the picture 10x12"):
        decode_fields({"image": png(9), "mask": labels.T > 5})
