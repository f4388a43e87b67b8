"""Declared keys: the ConfigDict that they make, what is known of each, and the values that are refused."""

import dataclasses
import math
import re
from typing import Any, Literal

import pytest

from train_jax.core.config_keys import Key, check_values, config_dict, declared, key, optional_keys, section
from train_jax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class View:
    """Used elsewhere too: its fields are no declarations."""

    crop: float = 1.0


@dataclasses.dataclass(frozen=True)
class Loss:
    name: str = key("sigmoid", "the loss", choices=("sigmoid", "softmax"), architecture=True)
    negatives: int | None = key(None, "per image", minimum=1)
    share: float = key(0.5, "of rows", minimum=0, maximum=1)


@dataclasses.dataclass(frozen=True)
class Keys:
    decay: float = key(0.9, "of an average", minimum=0, below=1)
    scale: float = key(1.0, "of logits", above=0)
    bias: float | None = key(-10.0, "of logits; None = none")
    folder: str = key(lambda: "here", "for files", resume_safe=True)
    limit: float = key(math.inf, "of a norm", minimum=0, maximum=math.inf)
    seed: int = key(0, "of noise", minimum=0, maximum=2**32 - 1)
    layers: tuple[int, ...] = key((), "numbers of layers", minimum=0)
    shares: tuple[float, float] = key((0.5, 0.5), "of rows", minimum=0, maximum=1)
    folders: tuple[str, ...] = key((), "of data")
    sides: tuple[str, ...] = key(("left",), "to turn to", choices=("left", "right"))
    loss: Loss = section(Loss)
    view: View = section(lambda: View(0.5), resume_safe=True)


@dataclasses.dataclass(frozen=True)
class SmallLoss(Loss):
    chunk: int = key(8, "texts at a time")


@dataclasses.dataclass(frozen=True)
class MoreKeys(Keys):
    loss: SmallLoss = section(SmallLoss)


def test_defaults_are_a_config():
    config = config_dict(Keys)
    assert config.to_dict() == {
        "decay": 0.9,
        "scale": 1.0,
        "bias": -10.0,
        "folder": "here",
        "limit": math.inf,
        "seed": 0,
        "layers": (),
        "shares": (0.5, 0.5),
        "folders": (),
        "sides": ("left",),
        "loss": {"name": "sigmoid", "negatives": None, "share": 0.5},
        "view": {"crop": 0.5},
    }
    config.bias, config.loss.negatives = None, 3
    assert config.loss.negatives == 3 and config.loss.get_type("negatives") is int
    with pytest.raises(TypeError):
        config.loss.name = 3


def test_a_section_may_have_further_keys():
    assert config_dict(MoreKeys).loss.to_dict() == config_dict(Keys).loss.to_dict() | {"chunk": 8}


def test_what_is_known_of_a_key():
    known = declared(Keys)
    assert list(known) == [
        *("decay", "scale", "bias", "folder", "limit", "seed", "layers", "shares", "folders", "sides"),
        *("loss.name", "loss.negatives", "loss.share", "view.crop"),
    ]
    assert known["loss.name"] == Key(
        "the loss", ("sigmoid", "softmax"), architecture=True, default="sigmoid", value_type=str
    )
    assert known["bias"].optional and known["bias"].default == -10.0 and known["bias"].value_type is float
    assert known["folder"].made and known["folder"].resume_safe
    assert (known["shares"].item_type, known["shares"].length) == (float, 2)
    assert (known["layers"].item_type, known["layers"].length) == (int, None)
    assert known["view.crop"].resume_safe and known["view.crop"].default == 0.5


@pytest.mark.parametrize(
    ("name", "good", "bad", "sentence"),
    [
        (
            "loss.name",
            "softmax",
            "sofmax",
            "config.loss.name='sofmax', expected one of sigmoid, softmax: change it; did",
        ),
        ("loss.negatives", None, 0, "config.loss.negatives=0, expected 1 or more: change it"),
        ("loss.share", 1, 1.5, "config.loss.share=1.5, expected a number from 0 to 1: change it"),
        ("decay", 0, 1.0, "config.decay=1.0, expected 0 or more and below 1: change it"),
        ("scale", 1e-9, 0, "config.scale=0, expected a number above 0: change it"),
        ("scale", 1e38, math.nan, "config.scale=nan, expected a number above 0, finite in float32: change it"),
        ("scale", 1, 1e39, "config.scale=1e+39, expected a number above 0, finite in float32: change it"),
        ("bias", -1e38, -math.inf, "config.bias=-inf, expected a number, finite in float32: change it"),
        ("limit", math.inf, math.nan, "config.limit=nan, expected a number from 0 to inf: change it"),
        ("loss.negatives", 2**31 - 1, 2**31, "negatives=2147483648, expected 1 or more, at most 2^31 - 1: change it"),
        ("seed", 2**32 - 1, 2**32, "config.seed=4294967296, expected a number from 0 to 2^32 - 1: change it"),
        ("layers", (0, 3), (0, -1), "config.layers=(0, -1), expected whole numbers of 0 or more: change it"),
        ("layers", (), (1.5,), "config.layers=(1.5,), expected whole numbers of 0 or more: change it"),
        ("layers", (1,), (True,), "config.layers=(True,), expected whole numbers of 0 or more: change it"),
        ("layers", (1,), (2**31,), "(2147483648,), expected whole numbers of 0 or more, at most 2^31 - 1: change it"),
        ("shares", (0, 1.0), (0.5,), "config.shares=(0.5,), expected 2 numbers from 0 to 1: change it"),
        ("shares", (0, 1.0), (0.5, math.nan), "config.shares=(0.5, nan), expected 2 numbers from 0 to 1: change it"),
        ("folders", ("a",), ("a", 1), "config.folders=('a', 1), expected strings: change it"),
        ("sides", ("left",), ("left", "rihgt"), "config.sides holds 'rihgt', expected some of left, right: change it"),
    ],
)
def test_values_out_of_range_are_refused(name, good, bad, sentence):
    check_values(declared(Keys), {name: good})
    with pytest.raises(UserError, match=re.escape(sentence)):
        check_values(declared(Keys), {name: bad})


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [(int | float, (float, False)), (int | float | None, (float, True)), (tuple[int, ...] | None, (tuple, True))],
)
def test_the_type_of_an_annotation(annotation, expected):
    keys = dataclasses.make_dataclass("K", [("x", annotation, key(None, "a value"))])
    assert (declared(keys)["x"].value_type, declared(keys)["x"].optional) == expected


@pytest.mark.parametrize("annotation", [int | str, Literal["a", "b"], Any, None])
def test_an_annotation_of_several_types_is_refused(annotation):
    keys = dataclasses.make_dataclass("K", [("x", annotation, key(None, "a value"))])
    with pytest.raises(UserError, match="the key x is annotated .*, expected one type, with `| None` or without"):
        declared(keys)


def test_optional_keys_are_none_and_keep_their_ranges():
    changes = optional_keys(Loss, "the method's own")
    assert config_dict(changes).to_dict() == dict.fromkeys(config_dict(Loss).keys())
    keys = declared(changes)
    assert all(entry.optional and entry.default is None for entry in keys.values())
    assert [keys[name].help for name in ("share", "negatives")] == ["of rows; None = the method's own", "per image"]
    assert keys["name"].choices == ("sigmoid", "softmax") and keys["name"].architecture
    config = config_dict(changes)
    config.share = 0.25  # a typed placeholder
    check_values(keys, config.to_dict())
    with pytest.raises(UserError, match=r"config.share=2, expected a number from 0 to 1"):
        check_values(keys, {"share": 2})
