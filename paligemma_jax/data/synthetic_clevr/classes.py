"""Classes of single objects: every size, colour, material and shape, 96 in all, named as captions name them.

The first half are base classes, the second half novel ones: a class is a base class if the positions of its four values
in ATTRIBUTES have an even sum. So every value of an attribute, and every pair of values of two attributes, is in as
many base classes as novel ones: only combinations are new, and every novel class differs from some base class in its
size alone.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from paligemma_jax.data.synthetic_clevr.attributes import ATTRIBUTES
from paligemma_jax.data.synthetic_clevr.build import split_scene
from paligemma_jax.data.synthetic_clevr.conditioning import text_of
from paligemma_jax.data.synthetic_clevr.wording import SYNONYMS
from train_jax.core.errors import UserError

OTHER_WORDS = {value: SYNONYMS[value][-1] for value in ("metal", "rubber", "cube", "sphere")}  # shiny matte block ball


class ObjectClass(NamedTuple):
    """The attributes of a class, in the order of ATTRIBUTES."""

    size: str
    color: str
    material: str
    shape: str

    @property
    def name(self) -> str:
        """The name in the words of captions, such as "small cyan metal cylinder"."""
        return text_of(self._asdict())

    @property
    def in_other_words(self) -> str:
        """The name in other words, such as "small shiny cyan block"; sizes, colours and "cylinder" stay."""
        return f"{self.size} {OTHER_WORDS[self.material]} {self.color} {OTHER_WORDS.get(self.shape, self.shape)}"


def _parity(values: ObjectClass, names: Iterable[str] = tuple(ATTRIBUTES)) -> int:
    """Returns the parity of the sum of the positions of some of a class's values."""
    return sum(ATTRIBUTES[name].index(getattr(values, name)) for name in names) % 2


CLASSES = tuple(sorted((ObjectClass(*values) for values in itertools.product(*ATTRIBUTES.values())), key=_parity))
"""All classes, base classes first; a class's position is its label."""


IN_CAPTIONS, IN_OTHERS = "captions", "others"
WORDS = (IN_CAPTIONS, IN_OTHERS)  # vocabularies of the names
COMBINATIONS, COLORS, PAIRINGS = "combinations", "colors", "pairings"
HALVES = (COMBINATIONS, COLORS, PAIRINGS)


def in_halves(novel: str) -> tuple[ObjectClass, ...]:
    """Returns all classes, base classes first.

    Args:
      novel: how novel classes differ from base classes: "combinations" of values that both have, as in CLASSES;
        "colors": novel classes have the last four of eight colours, base classes the first four; or "pairings": base
        classes have one material for each shape and novel classes the other, so that a cue which separates base classes
        misleads on novel ones.

    Raises:
      UserError: another value.
    """
    if novel not in HALVES:
        raise UserError(f"novel classes differ in {novel!r}, expected one of {', '.join(HALVES)}: change it.")
    if novel == COMBINATIONS:
        return CLASSES
    if novel == PAIRINGS:
        return tuple(sorted(CLASSES, key=lambda values: _parity(values, ("material", "shape"))))
    colors = ATTRIBUTES["color"]
    return tuple(sorted(CLASSES, key=lambda values: colors.index(values.color) >= len(colors) // 2))


def class_scenes(seed: int, stream: str, per_class: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (label, scene) for the first `per_class` scenes of each class in a stream of one-object scenes.

    Scenes come in the order of the stream. A larger `per_class` yields all scenes of a smaller one, and more.
    """
    labels = {values: label for label, values in enumerate(CLASSES)}
    missing = dict.fromkeys(labels.values(), per_class)
    for index in itertools.count():
        if not any(missing.values()):
            return
        scene = split_scene(seed, stream, index, (1, 1))
        item = scene["objects"][0]
        label = labels[ObjectClass(*(item[name] for name in ATTRIBUTES))]
        if missing[label]:
            missing[label] -= 1
            yield label, scene


def describe(values: ObjectClass) -> tuple[str, ...]:
    """Returns sentences that are true of the class, with the same forms in the same order for every class.

    They differ from captions but use the same words (except "no other"): the text tower of a SigLIP that was trained on
    captions alone reads other words as noise (docs/few_shot.md).
    """
    size, color, material, shape = values
    return (
        f"a {size} {color} {shape} of {material}",
        f"one object: a {size} {color} {shape} of {material}",
        f"one {shape}: a {size} {color} {material} {shape}",
        f"a {size} {color} {material} {shape} and no other object",
        f"a {color} {material} object: a {size} {shape}",
        f"a {color} {shape}, {size} and of {material}",
        f"a {material} {shape}, {size} and {color}",
        f"a {shape} of {material}, {color} and {size}",
    )
