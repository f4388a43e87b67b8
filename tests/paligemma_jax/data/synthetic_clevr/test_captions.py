"""Captions are true of their scene, a function of the seed, and rarely alike."""

import re
from collections import Counter

import numpy as np
import pytest

from paligemma_jax.data.synthetic_clevr.attributes import COLORS, MATERIALS, SHAPES, SIZES
from paligemma_jax.data.synthetic_clevr.captions import NUMBERS, caption, of_single_objects
from paligemma_jax.data.synthetic_clevr.scenes import sample_scene

WORDS = {"size": SIZES, "color": COLORS, "material": MATERIALS, "shape": SHAPES}
PLACES = {"left of": "left", "right of": "right", "in front of": "front", "behind": "behind"}


def generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


@pytest.fixture(scope="module")
def pairs():
    scenes = [sample_scene((5, index), (1, 6)) for index in range(200)]
    return [(scene, caption(scene, generator(index))) for index, scene in enumerate(scenes)]


def parse(text: str):
    """Returns the total, [(count, attributes)] and (attributes, place, attributes) of a caption."""
    total, _, rest = text.rpartition(": ")
    relation = re.search(r", the (\w+ \w+) (left of|right of|in front of|behind) the (\w+ \w+)$", rest)
    groups = []
    for part in re.split(r", | and ", rest[: relation.start()] if relation else rest):
        number, *words = part.split()
        count = 1 if number == "a" else NUMBERS.index(number)
        words[-1] = words[-1].removesuffix("s")
        groups.append((count, {name: word for word in words for name, known in WORDS.items() if word in known}))
        assert len(groups[-1][1]) == len(words)
    return total, groups, relation


def test_captions_are_true(pairs):
    relations = 0
    for scene, text in pairs:
        total, groups, relation = parse(text)
        objects = scene["objects"]
        assert sum(count for count, _ in groups) == len(objects)
        if total:
            assert total == f"{NUMBERS[len(objects)]} object{'s' if len(objects) > 1 else ''}"
        for count, words in groups:
            assert sum(words.items() <= item.items() for item in objects) >= count
        if relation:
            relations += 1
            assert relation[1] != relation[3]
            first, second = (
                [k for k, item in enumerate(objects) if f"{item['color']} {item['shape']}" == name]
                for name in relation.group(1, 3)
            )
            standing = scene["relationships"][PLACES[relation[2]]]
            assert any(i in standing[j] for i in first for j in second)
    assert relations > 50


def test_every_object_is_named_by_a_name_of_its_own(pairs):
    """The names of a caption match the objects one to one: their shapes are those of the scene."""
    for scene, text in pairs:
        shapes = Counter()
        for count, words in parse(text)[1]:
            shapes[words["shape"]] += count
        assert shapes == Counter(item["shape"] for item in scene["objects"])


def test_a_seed_decides_the_caption(pairs):
    scene = pairs[0][0]
    assert caption(scene, generator(3)) == caption(scene, generator(3))
    assert len({caption(scene, generator(seed)) for seed in range(20)}) > 5


def test_captions_of_a_batch_are_rarely_equal():
    texts = [caption(sample_scene((6, index), (2, 6)), generator(index)) for index in range(500)]
    assert len(set(texts)) >= 495


def test_all_captions_of_single_objects_are_known():
    known = of_single_objects()
    assert len(known) == len(set(known)) == 2 * 3 * 9 * 3 * 3
    scenes = [sample_scene((7, index), (1, 1)) for index in range(20)]
    drawn = {caption(scene, generator(index)) for scene in scenes for index in range(60)}
    assert len(drawn) > 100 and drawn <= set(known)
