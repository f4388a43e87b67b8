"""Classes of single objects: every size, colour, material and shape, 96 in all, named as captions name them.

The first half are base classes, the second novel ones: those whose places of the four values in ATTRIBUTES have an even
sum come first. So every value of an attribute, and every pair of values of two, is in as many base classes as novel
ones: only combinations are new, and every novel class differs from a base class in its size alone.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from paligemma_jax.data.synthetic_clevr.attributes import ATTRIBUTES
from paligemma_jax.data.synthetic_clevr.build import split_scene
from paligemma_jax.data.synthetic_clevr.descriptions import text_of
from paligemma_jax.data.synthetic_clevr.wording import SYNONYMS
from train_jax.core.errors import UserError

OTHER_WORDS = {value: SYNONYMS[value][-1] for value in ("metal", "rubber", "cube", "sphere")}  # shiny matte block ball


class ObjectClass(NamedTuple):
    """What an object is; values of ATTRIBUTES, in its order."""

    size: str
    color: str
    material: str
    shape: str

    @property
    def name(self) -> str:
        """E.g. "small cyan metal cylinder"."""
        return text_of(self._asdict())

    @property
    def in_other_words(self) -> str:
        """E.g. "small shiny cyan block" of a metal cube: sizes, colours and "cylinder" are the words of captions."""
        return f"{self.size} {OTHER_WORDS[self.material]} {self.color} {OTHER_WORDS.get(self.shape, self.shape)}"


def _parity(values: ObjectClass, names: Iterable[str] = tuple(ATTRIBUTES)) -> int:
    """Of the sum of places of some of its values."""
    return sum(ATTRIBUTES[name].index(getattr(values, name)) for name in names) % 2


CLASSES = tuple(sorted((ObjectClass(*values) for values in itertools.product(*ATTRIBUTES.values())), key=_parity))
"""All classes, base ones first; a class's place is its label."""


IN_CAPTIONS, IN_OTHERS = "captions", "others"
WORDS = (IN_CAPTIONS, IN_OTHERS)  # of which the names are
COMBINATIONS, COLORS, PAIRINGS = "combinations", "colors", "pairings"
HALVES = (COMBINATIONS, COLORS, PAIRINGS)


def in_halves(novel: str) -> tuple[ObjectClass, ...]:
    """All classes, base ones first.

    Args:
      novel: in what the novel ones differ from them: "combinations" of values that they share, as in CLASSES, or
        "colors": they have the last four of eight, of which no base class has one; or "pairings": base classes have
        one material for each shape, and novel ones the other, so that what tells base classes apart misleads here.

    Raises:
      UserError: another word.
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
    """(label, scene) of the first `per_class` scenes of each class in a stream of scenes of one object.

    Scenes come in the order of the stream; those of a smaller `per_class` are among those of a larger one.
    """
    labels = {values: label for label, values in enumerate(CLASSES)}
    room = dict.fromkeys(labels.values(), per_class)
    for index in itertools.count():
        if not any(room.values()):
            return
        scene = split_scene(seed, stream, index, (1, 1))
        item = scene["objects"][0]
        label = labels[ObjectClass(*(item[name] for name in ATTRIBUTES))]
        if room[label]:
            room[label] -= 1
            yield label, scene


def describe(values: ObjectClass) -> tuple[str, ...]:
    """Sentences that are true of the class, of the same forms in the same order for every class.

    Other sentences than captions, but of their words ("no other" excepted): the text tower of a SigLIP that was trained
    on captions alone reads others as noise (docs/few_shot.md).
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
