"""Conditioning of a generator of single objects: every description by its number, and none."""

import numpy as np

from paligemma_jax.data.synthetic_clevr import conditioning
from paligemma_jax.data.synthetic_clevr.attributes import ATTRIBUTES

CUBE = {"size": "small", "color": "red", "material": "metal", "shape": "cube"}


def test_attributes_are_indices_into_their_values():
    conditions = conditioning.of_attributes()
    assert len(conditions.texts) == len(conditions.numbers) == 96 and conditions.table.shape == (97, 4)
    number = conditions.numbers[conditioning.text_of(CUBE)]
    assert conditions.texts[number] == "small red metal cube" and conditions.attributes[number] == CUBE
    for index, (name, values) in zip(conditions.table[number], ATTRIBUTES.items(), strict=True):
        assert values[index] == CUBE[name]
    np.testing.assert_array_equal(conditions.table[-1], [2, 8, 2, 3])  # one past the last value of each
    assert len({tuple(row) for row in conditions.table.tolist()}) == 97


def test_captions_are_vectors_and_equal_ones_are_one():
    texts = ["a red cube", "one object: a small sphere", "a red cube"]
    conditions = conditioning.of_captions(texts, lambda texts: np.array([[len(text), 1.0] for text in texts]))
    assert list(conditions.texts) == ["a red cube", "one object: a small sphere"]
    np.testing.assert_array_equal(conditions.table, [[10, 1], [26, 1], [0, 0]])
    assert conditions.attributes[conditions.numbers["a red cube"]] == {"color": "red", "shape": "cube"}
    assert conditions.attributes[1] == {"size": "small", "shape": "sphere"}


def test_attributes_named_by_a_caption():
    assert conditioning.named_attributes("one object: a small red metal cube") == CUBE
    assert conditioning.named_attributes("a cylinder") == {"shape": "cylinder"}
    assert conditioning.named_attributes("a reddish thing") == {}
