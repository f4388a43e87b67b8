"""Boxes in answers: parsing, intersection over union in closed form, and the matching by label."""

import itertools

import numpy as np
import pytest

from paligemma_jax.metrics.boxes import LabeledBox, intersection_over_union, match, parse_boxes


def test_boxes_are_parsed_in_order_and_other_text_is_ignored():
    text = (
        "a cube <loc0001><loc0002><loc0003><loc0004> red cube ; <loc0010><loc0020><loc0030> cut short ; "
        "<loc0100><loc0200><loc0300><loc1023>"
    )
    assert parse_boxes(text) == [LabeledBox("red cube", (1, 2, 3, 4)), LabeledBox("", (100, 200, 300, 1023))]
    assert parse_boxes("") == parse_boxes("no boxes ; at all") == []


def test_intersection_over_union_in_closed_form():
    square = [0.0, 0, 10, 10]
    others = np.array([square, [0, 5, 10, 15], [2, 2, 4, 7], [10, 0, 20, 10], [3, 3, 3, 9], [8, 8, 2, 2]], float)
    result = intersection_over_union(np.array([square]), others)[0]
    np.testing.assert_allclose(result, [1, 50 / 150, 10 / 100, 0, 0, 0])
    np.testing.assert_allclose(intersection_over_union(others, np.array([square]))[:, 0], result)
    assert intersection_over_union(np.zeros((1, 4)), np.zeros((1, 4))) == 0


def boxes(*starts, label="cube"):
    return [LabeledBox(label, (0, start, 10, start + 10)) for start in starts]


def test_the_matching_has_the_largest_sum():
    """The first prediction is nearest to the first reference, but the sum is larger if it takes the second."""
    reference, predicted = boxes(0, 7), boxes(3, -4)
    np.testing.assert_allclose(match(predicted[:1], reference), [7 / 13, 0])
    np.testing.assert_allclose(match(predicted, reference), [6 / 14, 6 / 14])


@pytest.mark.parametrize("seed", range(5))
def test_against_all_matchings(seed):
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.integers(0, 40, (7, 2, 2)), axis=1).reshape(7, 4)
    items = [LabeledBox("ab"[rng.integers(2)], tuple(map(int, row))) for row in corners]
    predicted, reference = items[:3], items[3:]
    overlap = intersection_over_union(
        *(np.array([item.box for item in part], float) for part in (predicted, reference))
    )
    overlap *= [[p.label == r.label for r in reference] for p in predicted]
    best = max(sum(overlap[p, r] for p, r in enumerate(chosen)) for chosen in itertools.permutations(range(4), 3))
    assert match(predicted, reference).sum() == pytest.approx(best)


def test_labels_and_surplus_boxes():
    assert match(boxes(0, label="ball"), boxes(0)).tolist() == [0]
    assert match(boxes(0, 0, 0), boxes(0)).tolist() == [1]  # of three boxes on one object one is matched
    assert match(boxes(0), boxes(0, 0)).tolist() in ([1, 0], [0, 1])
    assert match([], boxes(0, 5)).tolist() == [0, 0] and match(boxes(0), []).tolist() == []
