"""Questions are answered by their programs, need the image, and are balanced over a split."""

import json
from collections import Counter

import numpy as np
import pytest

from paligemma_jax.data.sources.question_families import question_family
from paligemma_jax.data.synthetic_clevr import (
    ANSWERS,
    ATTRIBUTES,
    FAMILIES,
    AnswerBalance,
    answer,
    execute,
    generate_questions,
    last_function,
    sample_scene,
)

SCENES = [sample_scene((21, index), image_index=index, split="val") for index in range(50)]


@pytest.fixture(scope="module")
def balance_and_questions():
    balance = AnswerBalance()
    return balance, [q for k, scene in enumerate(SCENES) for q in generate_questions(scene, 10, (22, k), balance)]


@pytest.fixture(scope="module")
def questions(balance_and_questions):
    return balance_and_questions[1]


def test_a_seed_decides_the_questions():
    first, again, other = (generate_questions(SCENES[0], 10, seed) for seed in (1, 1, 2))
    assert json.dumps(first) == json.dumps(again) != json.dumps(other)


def test_every_scene_gets_its_number(questions):
    assert set(Counter(q["image_index"] for q in questions).values()) == {10}
    assert all(len({q["question"] for q in questions[k : k + 10]}) == 10 for k in range(0, len(questions), 10))


def test_answers_are_those_of_the_programs_and_of_clevr(questions):
    for q in questions:
        assert answer(q["program"], SCENES[q["image_index"]]) == q["answer"]
    assert {q["answer"] for q in questions} <= set(ANSWERS) and len(set(ANSWERS)) == len(ANSWERS) == 28


def test_families_have_equal_shares(questions):
    shares = Counter(q["question_family_index"] for q in questions)
    assert set(shares) == set(range(len(FAMILIES)))
    assert (
        max(shares.values()) - min(shares.values()) <= 2
    )  # a family without a question here is used in the next scene
    for q in questions:
        assert last_function(q["program"]) == FAMILIES[q["question_family_index"]].function


def test_no_answer_dominates_its_family(balance_and_questions):
    balance, _ = balance_and_questions
    for index, family in enumerate(FAMILIES):
        counts = balance.counts(index)
        bound = 0.6 if family.function != "query_color" else 0.4
        assert counts.most_common(1)[0][1] <= bound * counts.total(), (family, counts)


def test_the_family_is_recognised_from_the_text(questions):
    for q in questions:
        assert question_family(q["question"]) == last_function(q["program"]), q["question"]


def test_questions_do_not_name_the_attribute_asked_for(questions):
    """A query never names the attribute asked for in its referent, nor a comparison in either of its two."""
    for q in questions:
        kind, _, name = last_function(q["program"]).partition("_")
        if name not in ATTRIBUTES:
            continue
        for node in q["program"]:
            if node["function"] == f"query_{name}":
                at = node["inputs"][0] - 1  # before its `unique`
                while q["program"][at]["function"].startswith("filter_"):
                    assert q["program"][at]["function"] != f"filter_{name}"
                    at = q["program"][at]["inputs"][0]
                if kind == "query":
                    assert q["program"][at]["function"] != f"same_{name}"


def test_every_hop_matters(questions):
    """Removing the relation changes the set that the filters after it select."""
    checked = 0
    for q in questions:
        nodes, scene = q["program"], SCENES[q["image_index"]]
        for k, node in enumerate(nodes):
            if node["function"] != "relate" or any(n["function"] == "intersect" for n in nodes):
                continue
            end = k
            while nodes[end + 1]["function"].startswith("filter_"):
                end += 1
            with_hop = execute(nodes[: end + 1], scene)
            without = nodes[:k] + [{"function": "scene", "inputs": [], "value_inputs": []}] + nodes[k + 1 : end + 1]
            assert with_hop != execute(without, scene), q["question"]
            checked += 1
    assert checked > 100


def test_compared_sets_differ(questions):
    for q in questions:
        family = FAMILIES[q["question_family_index"]]
        if family.function in ("equal_integer", "less_than", "greater_than") and family.form == "zero":
            a, b = q["program"][-1]["inputs"]
            scene = SCENES[q["image_index"]]
            sets = [execute(q["program"][:k], scene) for k in (a, b)]
            assert sets[0] != sets[1]


def test_questions_need_the_image():
    """The same texts have other answers in other scenes, so the text alone does not give the answer."""
    mine = generate_questions(SCENES[0], 25, 5)
    changed = []
    for q in mine:
        for scene in SCENES[1:]:
            try:
                changed.append((q["question"], answer(q["program"], scene) != q["answer"]))
            except ValueError:  # the referent is not unique there
                continue
    by_question = {text: np.mean([c for t, c in changed if t == text]) for text, _ in changed}
    assert len(by_question) > 10 and np.mean([share > 0 for share in by_question.values()]) > 0.9


def test_balance_refuses_the_answer_that_is_ahead():
    balance = AnswerBalance()
    assert balance.accepts(0, "yes")
    balance.add(0, "yes")
    assert not balance.accepts(0, "yes") and balance.accepts(0, "no")
    balance.add(0, "no")
    assert balance.accepts(0, "yes")
    assert balance.due()[0] == 1 and balance.due()[-1] == 0
