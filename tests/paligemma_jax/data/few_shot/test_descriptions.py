"""Sentences about classes: read, checked, and drawn by the step."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.data.few_shot.descriptions import (
    fill_templates,
    positions,
    read_descriptions,
    uniform_of_step,
    write_descriptions,
)
from train_jax.core.errors import UserError

CLASSES = ("border collie", "cat")


@pytest.fixture
def written(tmp_path):
    def write(content):
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "descriptions.json").write_text(text)
        return tmp_path / "descriptions.json"

    return write


def test_sentences_come_in_the_order_of_the_classes(written):
    content = {"Cat": ["It purrs. "], "duck": ["no class of ours"], "border_collie": ["It herds.", "It is clever."]}
    assert read_descriptions(written(content), CLASSES) == (("It herds.", "It is clever."), ("It purrs.",))


def test_what_is_written_is_read(tmp_path):
    write_descriptions(tmp_path / "d.json", {"cat": ("Sie schläft.",), "border collie": ("a", "b")})
    assert read_descriptions(tmp_path / "d.json", CLASSES) == (("a", "b"), ("Sie schläft.",))


@pytest.mark.parametrize(
    "content, message",
    [
        ("no json", "cannot be read as JSON"),
        (["cat"], "holds no JSON object"),
        ({"cat": ["x"]}, r"no sentences about 1 of 2 classes \('border collie'\), expected a list"),
        ({"cat": [], "border collie": ["x"]}, r"for 1 of 2 classes \('cat'\)"),
        ({"cat": "x", "border collie": [" "]}, r"for 2 of 2 classes \('border collie', 'cat'\)"),
    ],
)
def test_missing_descriptions_are_reported(written, content, message):
    with pytest.raises(UserError, match=message) as error:
        read_descriptions(written(content), CLASSES)
    assert str(error.value).count("\n") == 0


def test_a_long_list_of_missing_classes_is_cut(written):
    with pytest.raises(UserError, match=r"about 30 of 30 classes \('0', '1', '2', \.\.\.\)"):
        read_descriptions(written({}), [str(k) for k in range(30)])


def test_templates():
    result = fill_templates(CLASSES, ("a photo of a {}.", "{}"))
    assert result == (("a photo of a border collie.", "border collie"), ("a photo of a cat.", "cat"))
    with pytest.raises(UserError, match="'a photo'"):
        fill_templates(CLASSES, ("a photo",))


def test_draws_are_a_function_of_seed_and_step():
    draws = np.array([uniform_of_step(0, step) for step in range(3000)])
    np.testing.assert_array_equal(draws[:5], [uniform_of_step(0, step) for step in range(5)])
    assert not np.array_equal(draws[:5], [uniform_of_step(1, step) for step in range(5)])
    assert draws.dtype == np.float32 and draws.min() >= 0 and draws.max() < 1
    counts = np.bincount(positions(draws, np.full(3000, 6)), minlength=6)
    assert counts.sum() == 3000 and np.abs(counts - 500).max() < 90  # 4.4 standard deviations


def test_positions_are_equal_for_lists_of_one_length_and_within_bounds():
    for value in (0.0, 0.3, 1 - 2.0**-16):
        result = positions(np.float32(value), np.array([5, 5, 1, 1000]))
        assert result.tolist() == [int(value * 5)] * 2 + [0, int(value * 1000)] and result.dtype == np.int32
        np.testing.assert_array_equal(positions(jnp.float32(value), jnp.array([5, 5, 1, 1000])), result)


@pytest.mark.parametrize("template", ["{} {photo}", "{0} of a {}", "a {{{}}}", "{} }", "{!r} {}", "%s {}"])
def test_other_braces_of_a_template_are_text(template):
    assert fill_templates(("cat", "{}"), (template,)) == ((template.replace("{}", "cat"),), (template,))


@pytest.mark.parametrize("classes, templates", [(("a\ud83d",), ("{}",)), (("a",), ("\udcff {}",))])
def test_half_characters_are_refused(classes, templates):
    with pytest.raises(UserError, match="holds bytes that are not UTF-8"):
        fill_templates(classes, templates)


def test_long_templates_are_cut_in_messages():
    with pytest.raises(UserError) as error:
        fill_templates(("cat",), ("a photo " * 1000,))
    assert len(str(error.value)) < 300 and "(8,000 characters)" in str(error.value)


@pytest.mark.parametrize("classes, templates", [("cat", ["{}"]), (["cat"], "a {}")])
def test_one_text_in_place_of_a_list_is_refused(classes, templates):
    with pytest.raises(UserError, match="expected a list: put it into one"):
        fill_templates(classes, templates)
