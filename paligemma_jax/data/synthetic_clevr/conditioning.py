"""The conditioning of a generator of single objects, by number: attributes, or a caption as a vector.

number  text                         attributes (size, color, material, shape)
     0  large gray rubber cube       0 0 0 0
     1  large gray rubber sphere     0 0 0 1
   ...
    95  small yellow metal cylinder  1 7 1 2
    96  (nothing)                    2 8 2 3
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from paligemma_jax.data.synthetic_clevr.attributes import ATTRIBUTES

SIZES = tuple(len(values) for values in ATTRIBUTES.values())
"""Number of values of each attribute; these numbers also stand for no value."""


class Descriptions(NamedTuple):
    """A table of N descriptions, and a last row for no description.

    Attributes:
      texts: the descriptions as text.
      attributes: {attribute: value} of those that each text names.
      table: int32 [N + 1, 4], or float32 [N + 1, E]; the last row stands for none.
      numbers: row number of each text.
    """

    texts: Sequence[str]
    attributes: Sequence[Mapping[str, str]]
    table: np.ndarray
    numbers: Mapping[str, int]


def of_attributes() -> Descriptions:
    """Returns all combinations of attributes, as indices into their values."""
    combined = list(itertools.product(*ATTRIBUTES.values()))
    texts = [" ".join(values) for values in combined]
    attributes = [dict(zip(ATTRIBUTES, values, strict=True)) for values in combined]
    table = list(itertools.product(*map(range, SIZES)))
    return Descriptions(texts, attributes, np.array([*table, SIZES], np.int32), _numbers(texts))


def of_captions(captions: Iterable[str], embed: Callable[[Sequence[str]], Float[np.ndarray, "N E"]]) -> Descriptions:
    """Returns all distinct captions as vectors; zeros stand for none.

    Args:
      captions: of single objects.
      embed: maps texts to vectors.
    """
    texts = sorted(set(captions))
    vectors = np.asarray(embed(texts), np.float32)
    table = np.concatenate([vectors, np.zeros_like(vectors[:1])])
    return Descriptions(texts, [named_attributes(text) for text in texts], table, _numbers(texts))


def text_of(item: Mapping[str, str]) -> str:
    """Returns the text of an object in `of_attributes`."""
    return " ".join(item[name] for name in ATTRIBUTES)


def named_attributes(caption: str) -> dict[str, str]:
    """Returns the attributes, with their values, that the caption of a single object names."""
    words = caption.split()
    return {name: value for name, values in ATTRIBUTES.items() for value in values if value in words}


def _numbers(texts: Sequence[str]) -> dict[str, int]:
    return {text: number for number, text in enumerate(texts)}
