"""What sample i is told."""

import numpy as np

from ldm_jax.evaluation.told import FromData, at_random, balanced, prompts


def test_classes_are_balanced_up_to_one() -> None:
    told = balanced(7)
    for number in (7, 50, 70):
        counts = np.bincount([told(i)["label"] for i in range(number)], minlength=7)
        assert counts.max() - counts.min() <= 1


def test_classes_at_random_are_a_function_of_seed_and_number() -> None:
    first, again, other = at_random(5, 3), at_random(5, 3), at_random(5, 4)
    labels = [first(i)["label"] for i in range(3000)]
    assert labels[::-1] == [again(i)["label"] for i in reversed(range(3000))]
    assert labels != [other(i)["label"] for i in range(3000)]
    counts = np.bincount(labels, minlength=5)
    assert len(counts) == 5 and ((counts - 600) ** 2 / 600).sum() < 18.5  # chi squared of 4: 0.001
    pairs = np.bincount([5 * a + b for a, b in zip(labels[::2], labels[1::2], strict=True)], minlength=25)
    assert ((pairs - 60) ** 2 / 60).sum() < 51.2  # of 24: 0.001
    assert all(isinstance(label, int) for label in labels[:3])


def test_prompts_come_again() -> None:
    told = prompts(["a", "b", "c"])
    assert [told(i)["text"] for i in range(7)] == list("abcabca")


class Source:
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict:
        return {"number": index, "label": index // 6, "text": ["one", "two", "three"] if index % 2 else "alone"}

    def fingerprint(self) -> str:
        return "source"


def test_examples_of_data_are_mixed_each_once_and_then_again() -> None:
    told, again = FromData(Source()), FromData(Source())
    numbers = [told[i]["number"] for i in range(24)]
    assert sorted(numbers[:12]) == list(range(12)) and numbers[:12] == numbers[12:] != sorted(numbers)
    assert len({told[i]["label"] for i in range(4)}) == 2  # the first are not all of one class
    for i in reversed(range(24)):
        assert told[i] == again[i] and isinstance(told[i]["text"], str)
    texts = {told[i]["text"] for i in range(240) if told[i]["number"] == 3}
    assert len(texts) > 1 and texts <= {"one", "two", "three"}  # another of its captions each time round
    assert len(told) == 12 and told.fingerprint() != Source().fingerprint()
