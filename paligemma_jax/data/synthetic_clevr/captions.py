"""Captions of scenes for contrastive training: true of their scene, and rarely equal for two scenes.

    a small red metal cube
    two blue rubber spheres and a large cylinder left of a gray cube
    four objects: a small green cube, ...

Each attribute except the shape is sometimes left out, so that a word is learnt on its own and not as part of a name.
"""

import itertools
from collections import Counter

import numpy as np

from paligemma_jax.data.synthetic_clevr.attributes import ATTRIBUTES
from paligemma_jax.data.synthetic_clevr.wording import choose

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NAMED = ("size", "color", "material")  # attributes named before the shape, in this order
_P_ATTRIBUTE = 0.75  # probability that each of them is named
_P_TOTAL, _P_RELATION = 0.3, 0.5  # probabilities that a caption counts the objects, and names a relation of two
_PLACES = {"left": "left of", "right": "right of", "front": "in front of", "behind": "behind"}


def caption(scene: dict, rng: np.random.Generator) -> str:
    """Returns one random caption of a scene."""
    objects = scene["objects"]
    order = rng.permutation(len(objects)).tolist()
    names = Counter(_name(objects[index], rng) for index in order)
    listed = _join([f"a {name}" if count == 1 else f"{NUMBERS[count]} {name}s" for name, count in names.items()])
    if rng.random() < _P_TOTAL:
        listed = f"{NUMBERS[len(order)]} object{'s' if len(order) > 1 else ''}: {listed}"
    if len(order) > 1 and rng.random() < _P_RELATION:
        return listed + _relation(scene, rng)
    return listed


def of_single_objects() -> list[str]:
    """Returns every possible caption of a scene of one object."""
    choices = [("", *ATTRIBUTES[name]) for name in NAMED] + [ATTRIBUTES["shape"]]
    names = [" ".join(filter(None, words)) for words in itertools.product(*choices)]
    return [f"{total}a {name}" for total in ("", f"{NUMBERS[1]} object: ") for name in names]


def _name(item: dict, rng: np.random.Generator) -> str:
    words = [item[name] for name in NAMED if rng.random() < _P_ATTRIBUTE]
    return " ".join([*words, item["shape"]])


def _relation(scene: dict, rng: np.random.Generator) -> str:
    """Returns the relation of two random objects, by colour and shape; empty if these are the same."""
    first, second = rng.permutation(len(scene["objects"]))[:2].tolist()
    places = [word for name, word in _PLACES.items() if first in scene["relationships"][name][second]]
    names = [f"the {scene['objects'][index]['color']} {scene['objects'][index]['shape']}" for index in (first, second)]
    return "" if names[0] == names[1] else f", {names[0]} {choose(rng, places)} {names[1]}"


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
