"""How well boxes in an answer fit those asked for: parsing, intersection over union, and a matching by label.

    <loc0123><loc0456><loc0789><loc1000> small red metal cube ; <loc0001>...

Boxes are y0, x0, y1, x1 in 1024ths of the picture. Axes: P predicted boxes, R reference boxes.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment

_LOCATED = re.compile(r"((?:<loc\d{4}>){4})([^;<]*)")


class Located(NamedTuple):
    """A box of an answer with its label, which may be empty."""

    label: str
    box: tuple[int, int, int, int]


def parse_boxes(text: str) -> list[Located]:
    """The boxes of an answer in its order; whatever is not four locations and a label is passed over."""
    found = []
    for places, label in _LOCATED.findall(text):
        y0, x0, y1, x1 = (int(place) for place in re.findall(r"\d{4}", places))
        found.append(Located(label.strip(), (y0, x0, y1, x1)))
    return found


def intersection_over_union(
    predicted: Float[np.ndarray, "P 4"], reference: Float[np.ndarray, "R 4"]
) -> Float[np.ndarray, "P R"]:
    """Of every pair of boxes the area they share over the area they cover, 0 to 1; a box without area shares none."""
    low = np.maximum(predicted[:, None, :2], reference[None, :, :2])
    high = np.minimum(predicted[:, None, 2:], reference[None, :, 2:])
    shared = np.prod(np.maximum(high - low, 0.0), axis=-1)
    areas = [np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0.0), axis=-1) for boxes in (predicted, reference)]
    covered = areas[0][:, None] + areas[1][None] - shared
    return np.divide(shared, covered, out=np.zeros_like(shared), where=covered > 0)


def match(predicted: Sequence[Located], reference: Sequence[Located]) -> Float[np.ndarray, " R"]:
    """IoU of every reference box with the predicted one that it is matched with; 0 of those left alone.

    Boxes of equal label are matched one to one, so that the sum of their IoU is largest (Hungarian): the order of an
    answer does not count, and a second box on one object finds nothing.
    """
    boxes = [np.array([item.box for item in items], float).reshape(-1, 4) for items in (predicted, reference)]
    same = np.array([[p.label == r.label for r in reference] for p in predicted], bool).reshape(
        len(predicted), len(reference)
    )
    overlap = intersection_over_union(*boxes) * same
    rows, columns = linear_sum_assignment(overlap, maximize=True)
    found = np.zeros(len(reference))
    found[columns] = overlap[rows, columns]
    return found
