"""Functions that config keys name by import path."""

import os.path

import pytest

from train_jax.core.errors import UserError
from train_jax.core.import_path import check_arguments, named


def test_a_short_name_and_an_import_path():
    assert named("data.name", "join", {"join": "os.path:join"}) is os.path.join
    assert named("data.name", "os.path:split", {}) is os.path.split


def test_what_is_no_function_is_refused():
    with pytest.raises(UserError, match="^data.name='os:path' is module, expected a function: name another$"):
        named("data.name", "os:path", {})


def test_arguments_of_a_function():
    check_arguments("f", lambda data, split, *more: None, "data", "split", "progress")
    check_arguments("f", print, "data")
    with pytest.raises(
        UserError, match=r"^data.name='x:f' takes \(data, split=None\), expected \(data, split, progress\)"
    ):
        check_arguments("data.name='x:f'", lambda data, split=None: None, "data", "split", "progress")
