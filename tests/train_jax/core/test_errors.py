"""Values quoted in messages."""

import json

import pytest

from train_jax.core.errors import cut, quoted


def test_long_values_are_shortened_with_their_length():
    assert cut("a" * 80) == "a" * 80 and cut("a" * 8000) == "a" * 80 + "... (8,000 characters)"
    assert quoted("a" * 80) == repr("a" * 80) and quoted("a" * 8000) == f"'{'a' * 80}'... (8,000 characters)"
    assert quoted(bytes(100)).endswith("... (100 bytes)") and quoted([0] * 5) == "[0, 0, 0, 0, 0]"
    assert len(quoted(list(range(10**5)))) < 120


@pytest.mark.parametrize("text", ["half \ud83d", "line\nbreak", "bell\a"])
def test_unprintable_characters_are_escaped(text):
    assert quoted(text).isprintable() and quoted(text).encode()


def test_nested_values_are_shortened():
    deep = json.loads("[" * 900 + "]" * 900)
    assert len(quoted(deep)) < 120
    for _ in range(10**5):
        deep = [deep]
    assert quoted(deep) == "a list nested too deeply to be shown"
