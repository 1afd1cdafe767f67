"""TensorFlow Datasets, read without TensorFlow."""

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from ldm_jax.data.reader import Reader, as_text, captions
from ldm_jax.errors import UserError, first_line


class TfdsSource(Reader):
    """A TensorFlow Datasets set prepared in the array_record format.

    Args:
        name: TFDS name, with config and version where wanted ("oxford_flowers102:2.1.1").
        data_dir: TFDS directory; None is TFDS's default.
        split: TFDS split, slices included ("train[:90%]").
        keys: the feature that holds each field, "image" and those of `needs`. "a/b" is the part b of the feature a, as "captions/text",
            several of an example. That of boxes has the parts `bbox` and `label`, and `is_crowd` where some are left out.
        needs: the fields to read.

    Raises:
        UserError: the set is not there in the array_record format, or lacks the split or a feature.
    """

    def __init__(self, name: str, data_dir: str | None, split: str, keys: Mapping[str, str], needs: Collection[str] = ()) -> None:
        super().__init__(needs)
        import tensorflow_datasets as tfds  # seconds long

        self._keys = {field: keys.get(field, "") for field in ("image", *self.needs)}
        if unnamed := [field for field, key in self._keys.items() if not key]:
            raise UserError(f"data.{unnamed[0]}_key is empty; say which feature of TFDS {name!r} holds it")
        self._shown = f"{name}[{split}]"
        try:
            builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
            features = builder.info.features
            if missing := [key for key in self._keys.values() if key.split("/")[0] not in features]:
                raise UserError(f"data: TFDS {name!r} has no feature {missing[0]!r}, only {list(features)}")
            pictures = {key for field, key in self._keys.items() if field in ("image", "segmentation", "mask")}
            self._source = builder.as_data_source(split=split, decoders={key: tfds.decode.SkipDecoding() for key in pictures})
        except (ValueError, LookupError, NotImplementedError, AssertionError, OSError) as error:
            reason = first_line(error)
            raise UserError(
                f"data.name: TFDS {name!r}, split {split!r}, cannot be read from {data_dir or 'the default data_dir'}: "
                f"{reason}; prepare it first with `tfds build {name} --file_format=array_record`"
            ) from error
        self._check_parts(name)
        checksum = [str(builder.info.full_name), split, len(self._source), builder.info.dataset_size, self._keys]
        self._fingerprint = f"tfds-{hashlib.sha256(json.dumps(checksum).encode()).hexdigest()[:16]}"

    def _check_parts(self, name: str) -> None:
        """Raises UserError where the first example lacks a part "a/b" of a feature."""
        first = self._source[0] if len(self._source) else {}
        for field, key in self._keys.items():
            try:
                _boxes(_part(first, key)) if field == "boxes" else _part(first, key)
            except ValueError as error:
                raise UserError(f"data.{field}_key: the first example of TFDS {name!r} cannot be read so: {error}") from error

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: int, fields: Collection[str]) -> dict[str, Any]:
        record = self._source[index]
        example = {field: _part(record, self._keys[field]) for field in fields}
        if "text" in example:
            several = isinstance(example["text"], list | tuple | np.ndarray)
            example["text"] = as_text(captions(example["text"]), several)
        if "boxes" in example:
            example["boxes"] = _boxes(example["boxes"])
        return example

    def name(self, index: int) -> str:
        """The set, the split and the number of the example in it."""
        return f"{self._shown}:{index}"

    def fingerprint(self) -> str:
        """Hash of name, config, version, split, numbers of examples and bytes, and the features that are read."""
        return self._fingerprint


def _part(record: Any, key: str) -> Any:
    """The feature "a", or the part "a/b" of one. Raises ValueError where there is none of the name."""
    for part in key.split("/"):
        if not isinstance(record, Mapping) or part not in record:
            raise ValueError(f"it has no feature {key!r}")
        record = record[part]
    return record


def _boxes(objects: Any) -> np.ndarray:
    """Rows of class, x0, y0, x1, y1 of TFDS's objects, whose boxes are y0, x0, y1, x1."""
    corners = np.asarray(_part(objects, "bbox"), np.float32).reshape(-1, 4)
    labels = np.asarray(_part(objects, "label"), np.float32).reshape(-1, 1)
    rows = np.concatenate([labels, corners[:, [1, 0, 3, 2]]], axis=1)
    crowd = np.asarray(objects["is_crowd"], bool) if "is_crowd" in objects else np.zeros(len(rows), bool)
    return rows[~crowd]
