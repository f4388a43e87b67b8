import json
import os

import jax.numpy as jnp
import numpy as np
import pytest

from train_jax.core import files
from train_jax.core.errors import UserError


def test_to_json_is_valid_for_nonfinite_numbers():
    value = {"a": float("nan"), "b": [np.float32(1.5), jnp.int32(3)], 7: {"c": np.inf, "d": (True, None, "é")}}
    expected = {"a": None, "b": [1.5, 3], "7": {"c": None, "d": [True, None, "é"]}}
    assert json.loads(files.to_json(value)) == expected
    assert files.plain(np.array([1.0, np.nan])) == [1.0, None]


def test_flatten_joins_names():
    assert files.flatten({"rouge": {"f1": 1, "deep": {"x": 2}}, "loss": 3}, "eval") == {
        "eval/rouge/f1": 1,
        "eval/rouge/deep/x": 2,
        "eval/loss": 3,
    }


def test_a_failed_write_leaves_the_old_text(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "config.json"
    files.write_atomically(path, "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]
    monkeypatch.undo()
    files.write_atomically(path, "new")
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_or_written_to(tmp_path, monkeypatch):
    assert files.make_folder(tmp_path / "a/b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/run cannot be made .Not a directory., expected a folder: choose another"):
        files.make_folder(tmp_path / "file/run")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(UserError, match="a/b may not be written to, expected a folder of your own"):
        files.make_folder(tmp_path / "a/b")
