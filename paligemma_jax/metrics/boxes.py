"""Scores of predicted boxes: parsing of answers, intersection over union, and matching by label.

    <loc0123><loc0456><loc0789><loc1000> small red metal cube ; <loc0001>...

Boxes are y0, x0, y1, x1 in 1024ths of the image. Axes: P predicted boxes, R reference boxes.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment

_LABELED_BOX = re.compile(r"((?:<loc\d{4}>){4})([^;<]*)")


class LabeledBox(NamedTuple):
    """A box of an answer with its label, which may be empty."""

    label: str
    box: tuple[int, int, int, int]


def parse_boxes(text: str) -> list[LabeledBox]:
    """Returns the boxes of an answer in order; text that is not four locations and a label is ignored."""
    boxes = []
    for locations, label in _LABELED_BOX.findall(text):
        y0, x0, y1, x1 = (int(location) for location in re.findall(r"\d{4}", locations))
        boxes.append(LabeledBox(label.strip(), (y0, x0, y1, x1)))
    return boxes


def intersection_over_union(
    predicted: Float[np.ndarray, "P 4"], reference: Float[np.ndarray, "R 4"]
) -> Float[np.ndarray, "P R"]:
    """Returns the intersection over union of every pair of boxes, 0 to 1; it is 0 for boxes without area."""
    low = np.maximum(predicted[:, None, :2], reference[None, :, :2])
    high = np.minimum(predicted[:, None, 2:], reference[None, :, 2:])
    intersection = np.prod(np.maximum(high - low, 0.0), axis=-1)
    areas = [np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0.0), axis=-1) for boxes in (predicted, reference)]
    union = areas[0][:, None] + areas[1][None] - intersection
    return np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)


def match(predicted: Sequence[LabeledBox], reference: Sequence[LabeledBox]) -> Float[np.ndarray, " R"]:
    """Returns the IoU of every reference box with its matched prediction, 0 for those without one.

    Boxes of equal label are matched one to one so that the sum of IoU is maximal (Hungarian algorithm). The order of
    the predictions does not matter, and of two predictions for one object only one is matched.
    """
    boxes = [np.array([item.box for item in items], float).reshape(-1, 4) for items in (predicted, reference)]
    same_label = np.array([[p.label == r.label for r in reference] for p in predicted], bool).reshape(
        len(predicted), len(reference)
    )
    overlap = intersection_over_union(*boxes) * same_label
    rows, columns = linear_sum_assignment(overlap, maximize=True)
    matched = np.zeros(len(reference))
    matched[columns] = overlap[rows, columns]
    return matched
