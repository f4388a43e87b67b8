"""Pretraining texts are true of their scene, cover the questions' words, and never use the questions' sentences."""

import re
from collections import Counter

import numpy as np
import pytest

from paligemma_jax.data.sources.question_families import OTHER, question_family
from paligemma_jax.data.synthetic_clevr import (
    ANSWERS,
    COLORS,
    MATERIALS,
    SHAPES,
    AnswerBalance,
    boxes,
    generate_questions,
    pretraining_segments,
    sample_scene,
)

SCENES = [sample_scene((31, index)) for index in range(50)]
WORD = re.compile(r"\w+|[^\w\s]")
NOUN_PHRASE = re.compile(
    r"\b(?:(?:large|big|small|tiny|metal|metallic|shiny|rubber|matte|"
    + "|".join(COLORS)
    + r") )*(?:thing|object|sphere|ball|cube|block|cylinder)s?\b"
)


@pytest.fixture(scope="module")
def segments():
    rng = np.random.Generator(np.random.PCG64(0))
    return [(scene, *pair) for scene in SCENES for pair in pretraining_segments(scene, rng, 25)]


@pytest.fixture(scope="module")
def questions():
    balance = AnswerBalance()
    return [q for k, scene in enumerate(SCENES) for q in generate_questions(scene, 6, k, balance)]


def test_a_seed_decides_the_segments():
    draw = [pretraining_segments(SCENES[0], np.random.Generator(np.random.PCG64(s)), 20) for s in (1, 1, 2)]
    assert draw[0] == draw[1] != draw[2]


def test_mixture(segments):
    shares = Counter(prefix.split()[0] for _, prefix, _ in segments)
    total = len(segments)
    assert abs(shares["answer"] / total - 0.7) < 0.04 and abs(shares["caption"] / total - 0.1) < 0.04
    assert set(shares) == {"answer", "caption", "detect", "point", "describe"}


def test_every_word_of_the_questions_occurs(segments, questions):
    """Case matters: "How" and "how" are different tokens, and embeddings are frozen when fine-tuning."""
    read = Counter(word for _, prefix, suffix in segments for word in WORD.findall(f"{prefix} {suffix}"))
    asked = {word for q in questions for word in WORD.findall(q["question"])} | set(ANSWERS)
    assert {word for word in asked if not read[word]} == set()


def test_no_sentence_pattern_is_shared_with_the_questions(segments, questions):
    def pattern(text):
        return NOUN_PHRASE.sub("X", text).lower().rstrip("?")

    mine = {pattern(prefix.removeprefix("answer en ")) for _, prefix, _ in segments if prefix.startswith("answer en ")}
    assert not mine & {pattern(q["question"]) for q in questions}


def test_the_questions_cover_yes_and_no_alike(segments):
    answers = Counter(suffix for _, prefix, suffix in segments if prefix.startswith("answer"))
    assert set(answers) <= set(ANSWERS)
    assert 0.7 < answers["yes"] / answers["no"] < 1.4


def test_plain_counts_colours_and_existence_are_true(segments):
    """The plainest phrasings are checked by a separate parser."""
    word = {
        "ball": "sphere",
        "block": "cube",
        "big": "large",
        "tiny": "small",
        "metallic": "metal",
        "shiny": "metal",
        "matte": "rubber",
    }

    def fits(item, phrase):
        wanted = {word.get(w, w) for w in re.sub(r"s$", "", phrase).split()} - {"thing", "object"}
        return wanted <= {item[name] for name in ("size", "color", "material", "shape")}

    checked = Counter()
    for scene, prefix, suffix in segments:
        for kind, form in (("number", r"number of (.*)"), ("any", r"any (.*)"), ("color", r"color of the (.*)")):
            match = re.fullmatch(f"answer en {form}", prefix)
            if match and NOUN_PHRASE.fullmatch(match[1]):
                result = [item for item in scene["objects"] if fits(item, match[1])]
                truth = {
                    "number": str(len(result)),
                    "any": "yes" if result else "no",
                    "color": result and result[0]["color"],
                }
                assert truth[kind] == suffix, (prefix, suffix)
                checked[kind] += 1
    assert len(checked) == 3


def test_detections_are_the_boxes_of_the_described_objects(segments):
    seen = 0
    for scene, prefix, suffix in segments:
        if not prefix.startswith("detect "):
            continue
        truth = {
            tuple(row): f"{item['size']} {item['color']} {item['material']} {item['shape']}"
            for row, item in zip(
                np.minimum(boxes(scene) * 1024, 1023).astype(int).tolist(), scene["objects"], strict=True
            )
        }
        result = re.findall(r"<loc(\d{4})><loc(\d{4})><loc(\d{4})><loc(\d{4})> ([a-z ]+?)(?: ;|$)", suffix)
        assert len(result) == suffix.count(";") + 1
        for *corners, name in result:
            assert truth[tuple(map(int, corners))] == name
        if prefix == "detect object":
            assert len(result) == len(truth)
        seen += 1
    assert seen > 50


def test_captions_name_every_object(segments):
    numbers = {"a": 1, "two": 2, "three": 3, "four": 4, "five": 5}
    for scene, prefix, suffix in segments:
        if prefix != "caption en":
            continue
        parts = [part.split(" ", 1) for part in suffix.split(".")[0].rpartition(": ")[2].split(", ")]
        assert suffix.startswith(f"{len(scene['objects'])} objects: ") or ":" not in suffix
        assert sum(numbers[number] for number, _ in parts) == len(scene["objects"])
        assert all(any(c in part for c in COLORS) and any(s in part for s in SHAPES) for _, part in parts)
        assert all(any(m in part for m in MATERIALS) for _, part in parts)


def test_single_objects_suffice():
    scene = sample_scene(1, num_objects=(1, 1))
    pairs = pretraining_segments(scene, np.random.Generator(np.random.PCG64(3)), 20)
    assert len(pairs) == 20 and all(prefix and suffix for prefix, suffix in pairs)


def test_texts_are_not_recognised_as_clevr_questions(segments):
    """`question_family` is for CLEVR's wording; most of these texts have none of its forms."""
    texts = [prefix.removeprefix("answer en ") for _, prefix, _ in segments if prefix.startswith("answer en ")]
    assert np.mean([question_family(text) == OTHER for text in texts]) > 0.8
