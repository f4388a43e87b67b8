"""The check of texts that every reader of records uses."""

import pytest

from paligemma_jax.data.records import BadRow
from paligemma_jax.data.row_texts import check_prompt, check_texts, is_text, stored
from train_jax.core.errors import UserError


def test_texts_and_bytes_of_texts_pass_in_order():
    row = {"b": "zwei 漢字 😀", "a": "ünd".encode(), "c": 3}
    assert check_texts(row, ("a", "b"), "row 0") == ["ünd", "zwei 漢字 😀"]


@pytest.mark.parametrize("value", [None, 0, 3, 2.5, True, False, [], ["two"], {}, {"b": "b"}])
def test_values_that_are_not_text_are_bad_rows(value):
    for row in ({"a": value}, {}, [value], value):
        with pytest.raises(BadRow, match="^line 7 is .*, expected an object with the texts a, .*; correct it.$"):
            check_texts(row, ("a",), "line 7")


def test_half_surrogate_pairs_are_bad_rows():
    for text in ("cut \ud83d", "\udc80", "\ude00 end"):
        with pytest.raises(BadRow, match="line 7 has the a .*half a surrogate pair"):
            check_texts({"a": text}, ("a",), "line 7")
        assert not is_text(text)
    for data in (b"\xff", b"\xff\xfe", b"\xffred"):
        with pytest.raises(BadRow) as error:
            check_texts({"a": data}, ("a",), "line 7")
        assert f"line 7 has the a {data!r}, expected text in UTF-8" in str(error.value)


@pytest.mark.parametrize("value", ["cut \ud83d", None, 2.5, ["two"]])
def test_a_stored_non_text_is_refused_when_it_is_read(value):
    assert stored("two") == "two"
    with pytest.raises(BadRow, match="row 3 has the answer") as error:
        check_texts({"answer": stored(value)}, ("answer",), "row 3")
    assert (repr(value)) in str(error.value)


@pytest.mark.parametrize(
    "value, sentence",
    [
        (5, "the prompt 5 is of type int, expected text: give a string."),
        (None, "the prompt None is of type NoneType, expected text"),
        (b"x", "the prompt b'x' is of type bytes, expected text"),
        ("\udcff", r"the prompt '\\udcff' holds bytes that are not UTF-8"),
    ],
)
def test_a_prompt_that_is_not_text_is_refused_with_its_type(value, sentence):
    check_prompt("how many? \N{SNOWMAN}", "the prompt")
    with pytest.raises(UserError, match=sentence):
        check_prompt(value, "the prompt")
