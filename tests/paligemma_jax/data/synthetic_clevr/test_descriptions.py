"""What a generator is told of single objects: every description by its number, and none."""

import numpy as np

from paligemma_jax.data.synthetic_clevr import descriptions
from paligemma_jax.data.synthetic_clevr.attributes import ATTRIBUTES

CUBE = {"size": "small", "color": "red", "material": "metal", "shape": "cube"}


def test_attributes_are_indices_into_their_values():
    told = descriptions.of_attributes()
    assert len(told.texts) == len(told.numbers) == 96 and told.table.shape == (97, 4)
    number = told.numbers[descriptions.text_of(CUBE)]
    assert told.texts[number] == "small red metal cube" and told.said[number] == CUBE
    for index, (name, values) in zip(told.table[number], ATTRIBUTES.items(), strict=True):
        assert values[index] == CUBE[name]
    np.testing.assert_array_equal(told.table[-1], [2, 8, 2, 3])  # one behind the last value of each
    assert len({tuple(row) for row in told.table.tolist()}) == 97


def test_captions_are_vectors_and_equal_ones_are_one():
    texts = ["a red cube", "one object: a small sphere", "a red cube"]
    told = descriptions.of_captions(texts, lambda texts: np.array([[len(text), 1.0] for text in texts]))
    assert list(told.texts) == ["a red cube", "one object: a small sphere"]
    np.testing.assert_array_equal(told.table, [[10, 1], [26, 1], [0, 0]])
    assert told.said[told.numbers["a red cube"]] == {"color": "red", "shape": "cube"}
    assert told.said[1] == {"size": "small", "shape": "sphere"}


def test_a_caption_names_what_its_words_are():
    assert descriptions.said("one object: a small red metal cube") == CUBE
    assert descriptions.said("a cylinder") == {"shape": "cylinder"}
    assert descriptions.said("a reddish thing") == {}
