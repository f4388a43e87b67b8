"""Few-shot data sets: shots by seed and class, base and novel halves, and no test image that is tuned on."""

import numpy as np
import pytest

from paligemma_jax.data.few_shot.dataset import SPLITS, Example, FewShot, drawing_order
from tests.paligemma_jax.data.toys import COUNTS, example_set
from train_jax.core.errors import UserError


def counted(data, split):
    return tuple(np.bincount([label for _, label in data.splits[split]], minlength=len(data.classes)).tolist())


@pytest.mark.parametrize("shots", [1, 2, 4, 8, 16])
def test_a_class_gives_the_requested_shots_or_all(shots):
    drawn = example_set().few_shot(shots, 3)
    assert counted(drawn, "train") == tuple(min(n, shots) for n in COUNTS["train"])
    assert counted(drawn, "val") == tuple(min(n, shots, 4) for n in COUNTS["val"])
    assert drawn.splits["test"] == example_set().splits["test"]
    for split in SPLITS:
        assert set(drawn.splits[split]) <= set(example_set().splits[split])


def test_a_draw_is_a_function_of_seed_and_class():
    whole = example_set()
    four = whole.few_shot(4, 0)
    assert four == whole.few_shot(4, 0) and four.digest == whole.few_shot(4, 0).digest
    assert four.splits["train"] != whole.few_shot(4, 1).splits["train"]
    assert set(whole.few_shot(2, 0).splits["train"]) <= set(four.splits["train"])  # fewer shots are the first of more
    # The order of a file and the other classes do not matter.
    backwards = FewShot("toys", "nowhere", whole.classes, {name: rows[::-1] for name, rows in whole.splits.items()})
    for split in ("train", "val"):
        assert backwards.few_shot(4, 0).splits[split] == four.splits[split]
    alone = example_set({"train": (0, 0, 0, 7, 0)})
    alone = FewShot("toys", "x", ("d",), {"train": tuple(Example(image, 0) for image, _ in alone.splits["train"])})
    own = [image for image, label in four.splits["train"] if label == 3]
    assert [image for image, _ in alone.few_shot(4, 0).splits["train"]] == own


def test_drawing_orders_are_fixed_permutations():
    assert sorted(drawing_order(5, "train/a", 50)) == list(range(50))
    assert drawing_order(1, "train/cat", 6).tolist() == DRAWN


DRAWN = [2, 3, 5, 1, 4, 0]  # by numpy's PCG64, which is stable: a change would change every published draw


def test_base_classes_are_the_first_half_rounded_up():
    base, novel = example_set().base_to_novel()
    assert base.classes == ("a", "b", "c") and novel.classes == ("d", "e")
    assert (base.part, novel.part) == ("base", "novel")
    for split in SPLITS:
        assert counted(base, split) + counted(novel, split) == COUNTS[split]
        assert {label for _, label in novel.splits[split]} == {0, 1}
        assert all(image.startswith("de"[label]) for image, label in novel.splits[split])
        assert not {image for image, _ in base.splits[split]} & {image for image, _ in novel.splits[split]}


def test_another_class_order_changes_the_halves_but_not_the_shots():
    data = example_set().ordered(("e", "b", "a", "d", "c"))
    base, novel = data.base_to_novel()
    assert base.classes == ("e", "b", "a") and novel.classes == ("d", "c")
    for split in SPLITS:
        for image, label in data.splits[split]:
            assert image.startswith(data.classes[label])
    drawn = {image for image, _ in data.few_shot(2, 1).splits["train"]}
    assert drawn == {image for image, _ in example_set().few_shot(2, 1).splits["train"]}
    assert data.ordered(example_set().classes) == example_set()
    with pytest.raises(UserError, match=r"an order of 2 classes was given for the 5 .* each of them once"):
        data.ordered(("a", "b"))


def test_classes_may_be_renamed():
    names = {name: name * 2 for name in "abcdef"}
    data = example_set().renamed(names)
    assert data.classes == tuple(names[name] for name in example_set().classes)
    assert data.splits == example_set().splits and data.digest != example_set().digest
    with pytest.raises(UserError, match="4 of 5 classes .* have no new name .first: 'b'., expected one for each"):
        example_set().renamed({"a": "b"})
    with pytest.raises(UserError, match="twice"):
        example_set().renamed(names | {"a": "bb"})


def test_drawing_and_dividing_commute():
    drawn_first, divided_first = example_set().few_shot(4, 2).base_to_novel()[0], example_set().base_to_novel()[0]
    assert drawn_first == divided_first.few_shot(4, 2)


def test_dict_round_trip_and_digests():
    data = example_set().few_shot(2, 1)
    again = FewShot.from_dict(data.to_dict(), "elsewhere")
    assert again.digest == data.digest and again.splits == data.splits and again.shots == 2
    others = [example_set(), example_set().few_shot(2, 0), example_set().few_shot(1, 1), data.base_to_novel()[0]]
    assert len({data.digest, *(other.digest for other in others)}) == 5


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda: example_set().few_shot(0, 0), "0 shots of toys"),
        (lambda: example_set().few_shot(1, 0).few_shot(1, 0), "1 shots of toys with 1 images"),
        (lambda: example_set({"train": (1, 0, 0)}, "abc").few_shot(1, 0), "2 of 3 classes of toys have no training"),
        (lambda: example_set().base_to_novel()[0].base_to_novel(), r"toys \(base\)"),
        (lambda: example_set({"train": (1, 1)}, "aa"), "'a' occurs twice"),
        (lambda: FewShot("toys", "x", ("a",), {"train": [Example("a.png", 1)]}), "a.png has label 1, expected 0 to 0"),
        (
            lambda: FewShot("toys", "x", ("a",), {"train": [Example("1", 0)], "test": [Example("1", 0)]}),
            "1 occurs 2 times in the splits",
        ),
        (lambda: FewShot("toys", "x", ("a",), {"test": [Example("a/../../b", 0)]}), "leaves its folder"),
        (lambda: FewShot("toys", "x", ("a",), {"test": [Example("/etc/passwd", 0)]}), "leaves its folder"),
    ],
)
def test_errors(change, message):
    with pytest.raises(UserError, match=message):
        change()
