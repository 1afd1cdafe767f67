"""The pictures of a configuration's data."""

from typing import Any

import numpy as np
import pytest

from ldm_jax.config import UserError
from ldm_jax.evaluation.data_pictures import DataPictures
from tests import tiny


class Buckets(tiny.Pictures):
    def __getitem__(self, index: int) -> dict:
        return {"image": np.zeros((16, 16 + 8 * (index == 9), 3), np.uint8)}


def test_pictures_are_those_of_the_source() -> None:
    source = tiny.Pictures()
    pictures = DataPictures(source, {"crop": "centre"})
    np.testing.assert_array_equal(pictures.read(3, 20), [source[i]["image"] for i in range(3, 20)])
    assert (len(pictures), pictures.size, pictures.labels, pictures.jpegs) == (64, (16, 16), None, 0)
    assert pictures.provenance == {"crop": "centre", "data": "pictures", "number": 64} and "64" in pictures.describe()
    assert pictures.read(5, 5).shape == (0, 16, 16, 3)


@pytest.mark.parametrize(("number", "taken"), [(10, 10), (64, 64), (1000, 64), (None, 64)])
def test_the_first_so_many(number: int | None, taken: int) -> None:
    pictures = DataPictures(tiny.Pictures(), {}, number)
    assert len(pictures) == taken and pictures.provenance["number"] == taken
    for start, stop in ((0, taken + 1), (-1, 2), (3, 2)):
        with pytest.raises(IndexError):
            pictures.read(start, stop)
    assert (pictures.fingerprint() == DataPictures(tiny.Pictures(), {}).fingerprint()) == (taken == 64)


def test_pictures_of_other_sizes_are_refused() -> None:
    pictures: Any = DataPictures(Buckets(), {})
    assert len(pictures.read(0, 9)) == 9
    with pytest.raises(UserError, match=r"different sizes: evaluate without data\.buckets"):
        pictures.read(0, 10)
