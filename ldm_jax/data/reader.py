"""What sources have in common: their interface, and readers of stored examples."""

import io
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Any, Protocol

import numpy as np

from ldm_jax.config import UserError
from ldm_jax.data.boxes import tidy_boxes
from ldm_jax.data.decode import decode_fields, image_size

FIELDS = ("text", "label", "boxes", "segmentation", "mask")
"""What an example may have beside its `image`."""

CALLED = {"text": "caption", "label": "class", "boxes": "boxes", "segmentation": "segmentation", "mask": "mask"}


class Source(Protocol):
    """A random-access sequence of examples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def fingerprint(self) -> str:
        """A string that changes whenever the content or order of the examples does."""
        ...


class Reader(ABC):
    """A source of stored examples: `image` uint8 [H, W, 3] of any size, and exactly the fields that are asked for.

    `text` is str, or in a source that has several captions for some picture, list[str] for all; `label` int; `boxes` float32 [n, 5] of
    class, x0, y0, x1, y1 in shares of the picture; `segmentation` uint8 [H, W]; `mask` bool [H, W], True in the hole.

    Args:
        needs: the fields, of `FIELDS`.

    Raises:
        any of `decode.BROKEN` on reading a damaged example, or one that lacks a field.
    """

    def __init__(self, needs: Collection[str] = ()) -> None:
        self.needs = tuple(field for field in FIELDS if field in needs)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int, fields: Collection[str]) -> dict[str, Any]:
        """The fields, "image" or of `FIELDS`, as they are stored: of the picture and maps the bytes of their files, or arrays.

        One that this example has not is left out or None.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """Where the example lies, for people."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A string that changes with the content and order of the examples, and with what is asked for."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        wanted = ("image", *self.needs)
        example = {field: value for field, value in self.read(index, wanted).items() if value is not None}
        if missing := [field for field in wanted if field not in example]:
            raise ValueError(f"it has no {CALLED.get(missing[0], missing[0])}")
        if "label" in example:
            example["label"] = _class_number(example["label"])
        if "boxes" in example:
            example["boxes"] = tidy_boxes(example["boxes"])
        return decode_fields(example)

    def caption(self, index: int) -> Any:
        """The text of an example, str or list[str], without its picture."""
        text = self.read(index, ("text",)).get("text")
        if text is None:
            raise ValueError("it has no caption")
        return text

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of the picture of an example, by the head of its file."""
        image = self.read(index, ("image",)).get("image")
        if image is None:
            raise ValueError("it has no image")
        height, width = image_size(io.BytesIO(image)) if isinstance(image, bytes) else image.shape[:2]
        return height, width


def _class_number(value: Any) -> int:
    try:
        return int(value)
    except TypeError as error:
        raise ValueError(f"its class is no number: {error}") from error


def check_complete(where: str, number: int, missing: Sequence[str], field: str, remedy: str) -> None:
    """Raises UserError where pictures lack a field: the count, the first name, and what to do."""
    if missing:
        raise UserError(
            f"data.path: {len(missing)} of {number} pictures in {where!r} have no {CALLED[field]}, the first is {missing[0]!r}; {remedy}"
        )


def captions(value: Any) -> list[str]:
    """The captions in a text or list of texts (str, or UTF-8 bytes), without the blanks around them; empty ones count for nothing.

    Raises:
        ValueError: not UTF-8.
    """
    values = [value] if isinstance(value, str | bytes) else [] if value is None else list(value)
    texts = (text.decode("utf-8") if isinstance(text, bytes) else str(text) for text in values)
    return [stripped for text in texts if (stripped := text.strip())]


def as_text(found: list[str], several: bool) -> str | list[str] | None:
    """The captions of an example in the form that all of its source have: a list where `several`, else the only one; None for none."""
    return None if not found else found if several else found[0]


def class_numbers(values: Sequence[Any]) -> tuple[np.ndarray, list[str]]:
    """Classes as int64 [n], and their names: whole numbers stay (no names); others become their places among the sorted distinct names."""
    if all(isinstance(value, int) or (isinstance(value, str) and value.strip().isdecimal()) for value in values):
        return np.array([int(value) for value in values], np.int64), []
    names = sorted({str(value) for value in values})
    place = {name: index for index, name in enumerate(names)}
    return np.array([place[str(value)] for value in values], np.int64), names
