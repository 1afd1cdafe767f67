import subprocess
import sys

import numpy as np
import pytest

from ldm_jax.config import UserError
from ldm_jax.data.tfds import TfdsSource

_MAKE_TFDS = """
import io, sys
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

class TinyScenes(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        objects = {"bbox": tfds.features.BBoxFeature(), "label": tfds.features.ClassLabel(num_classes=9), "is_crowd": np.bool_}
        features = {"picture": tfds.features.Image(shape=(None, None, 3)), "caption": tfds.features.Text(),
                    "kind": tfds.features.ClassLabel(num_classes=3), "objects": tfds.features.Sequence(objects),
                    "map": tfds.features.Image(shape=(None, None, 1)), "captions": tfds.features.Sequence({"text": tfds.features.Text()})}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(5):
            file = io.BytesIO()
            Image.fromarray(np.full((8, 9, 3), i * 10, np.uint8)).save(file, "PNG")
            file.seek(0)
            labels = io.BytesIO()
            Image.fromarray(np.full((8, 9), i, np.uint8)).save(labels, "PNG")
            labels.seek(0)
            box = tfds.features.BBox(ymin=0.125, xmin=0.25, ymax=0.5, xmax=1.0)
            objects = [{"bbox": box, "label": i, "is_crowd": crowd} for crowd in (False, True)]
            texts = [{"text": f"value {i * 10}"}, {"text": "second"}]
            yield i, {"picture": file, "caption": f"value {i * 10}", "kind": i % 3, "objects": objects, "captions": texts,
                      "map": labels}

TinyScenes(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
"""


KEYS = {"image": "picture", "text": "caption", "label": "kind", "boxes": "objects", "segmentation": "map"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a set of five scenes, prepared as its users do."""
    path = tmp_path_factory.mktemp("tfds")
    (path / "make.py").write_text(_MAKE_TFDS)
    subprocess.run([sys.executable, str(path / "make.py"), str(path)], check=True, capture_output=True)
    return str(path)


def test_tfds_without_tensorflow(directory: str) -> None:
    source = TfdsSource("tiny_scenes", directory, "train", KEYS, ("text", "label", "boxes", "segmentation"))
    assert "tensorflow" not in sys.modules
    examples = [source[i] for i in range(len(source))]
    assert sorted(e["text"] for e in examples) == [f"value {v}" for v in (0, 10, 20, 30, 40)]
    for example in examples:
        value = int(example["text"].split()[1])
        np.testing.assert_array_equal(example["image"], np.full((8, 9, 3), value, np.uint8))
        assert example["label"] == value // 10 % 3
        np.testing.assert_array_equal(example["boxes"], [[value // 10, 0.25, 0.125, 1.0, 0.5]])  # the crowd is left out
        np.testing.assert_array_equal(example["segmentation"], np.full((8, 9), value // 10))
    assert source.name(3) == "tiny_scenes[train]:3" and source.caption(2) == examples[2]["text"]
    assert list(TfdsSource("tiny_scenes", directory, "train", KEYS)[0]) == ["image"]


def test_parts_of_features_and_several_captions(directory: str) -> None:
    source = TfdsSource("tiny_scenes", directory, "train", {**KEYS, "text": "captions/text"}, ("text",))
    assert sorted(source[i]["text"] for i in range(5)) == [[f"value {v}", "second"] for v in (0, 10, 20, 30, 40)]


def test_fingerprints_follow_the_split_and_the_features(directory: str) -> None:
    marks = [
        TfdsSource("tiny_scenes", directory, split, {**KEYS, "text": text}, needs).fingerprint()
        for split in ("train", "train[:3]")
        for text in ("caption", "captions/text")
        for needs in ((), ("text",))
    ]
    assert len(set(marks)) == 6  # without captions, which feature holds them is no matter


def test_what_a_set_has_not_is_refused(directory: str) -> None:
    def refused(message: str, name: str = "tiny_scenes", split: str = "train", needs: tuple[str, ...] = (), **keys: str) -> None:
        with pytest.raises(UserError, match=message):
            TfdsSource(name, directory, split, {**KEYS, **keys}, needs)

    refused("no feature 'image', only", image="image")
    refused("text_key is empty", needs=("text",), text="")
    refused("data.text_key: the first example .* it has no feature 'captions/words'", needs=("text",), text="captions/words")
    refused("data.boxes_key: the first example .* it has no feature 'bbox'", needs=("boxes",), boxes="captions")
    refused(r"test.*tfds build tiny_scenes", split="test")
    refused("not found", name="no_such_set")
    refused("tfds build mnist", name="mnist", image="image")
