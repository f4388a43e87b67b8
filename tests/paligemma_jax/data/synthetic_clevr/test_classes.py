"""Classes of single objects: base classes have every value, descriptions are true, scenes show their class."""

import itertools
import re
from collections import Counter

import pytest

from paligemma_jax.data.synthetic_clevr.attributes import ATTRIBUTES
from paligemma_jax.data.synthetic_clevr.captions import of_single_objects
from paligemma_jax.data.synthetic_clevr.classes import CLASSES, class_scenes, describe
from paligemma_jax.data.synthetic_clevr.wording import SYNONYMS

BASE, NOVEL = CLASSES[:48], CLASSES[48:]
VALUES = {value: (name, value) for name, values in ATTRIBUTES.items() for value in values}
CAPTIONS = {*re.findall(r"[a-z]+", " ".join(of_single_objects())), "of", "and"}  # the last two of several objects


def test_classes_are_all_combinations():
    assert set(CLASSES) == set(itertools.product(*ATTRIBUTES.values())) and len(CLASSES) == 96
    assert len({values.name for values in CLASSES}) == 96
    assert "small cyan metal cylinder" in {values.name for values in CLASSES}


def test_base_and_novel_classes_have_the_same_values_and_pairs_of_values():
    for size in (1, 2):
        for names in itertools.combinations(ATTRIBUTES, size):
            base, novel = (Counter(tuple(getattr(c, name) for name in names) for c in part) for part in (BASE, NOVEL))
            assert base == novel
            assert len(base) == len(list(itertools.product(*(ATTRIBUTES[name] for name in names))))


def test_a_novel_class_is_a_base_class_of_the_other_size():
    other = {"small": "large", "large": "small"}
    assert {values._replace(size=other[values.size]) for values in NOVEL} == set(BASE)


@pytest.mark.parametrize("values", CLASSES, ids=lambda values: values.name)
def test_descriptions_are_true_and_whole_and_in_the_words_of_captions(values):
    sentences = describe(values)
    assert len({*sentences, values.name, f"a {values.name}"}) == len(sentences) + 2 == 10
    for sentence in sentences:
        words = set(re.findall(r"[a-z]+", sentence))
        assert {VALUES[word] for word in words & set(VALUES)} == set(values._asdict().items())
        assert words <= CAPTIONS | {"no", "other"}


def test_other_words_say_the_same():
    assert CLASSES[0]._replace(size="small", color="cyan", material="metal", shape="cylinder").in_other_words == (
        "small shiny cyan cylinder"
    )
    means = {word: value for value, words in SYNONYMS.items() for word in words}
    for values in CLASSES:
        assert sorted(means.get(word, word) for word in values.in_other_words.split()) == sorted(values)


def test_no_two_classes_share_a_sentence():
    sentences = [sentence for values in CLASSES for sentence in describe(values)]
    assert len(set(sentences)) == len(sentences)


def test_scenes_show_their_class():
    scenes = list(class_scenes(0, "some", 2))
    assert Counter(label for label, _ in scenes) == dict.fromkeys(range(96), 2)
    for label, scene in scenes:
        (item,) = scene["objects"]
        assert tuple(item[name] for name in ATTRIBUTES) == CLASSES[label]
    one = list(class_scenes(0, "some", 1))
    assert [scene["image_index"] for _, scene in one] == [
        next(scene["image_index"] for other, scene in scenes if other == label) for label, _ in one
    ]
