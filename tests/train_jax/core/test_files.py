import contextlib
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


def test_a_failed_block_leaves_the_old_file_and_no_draft(tmp_path):
    path = tmp_path / "deep" / "answers.jsonl"
    for failing in (False, True):
        with contextlib.suppress(ZeroDivisionError), files.atomic(path) as draft, draft.open("w") as file:
            file.write(f"failing {failing}")
            assert path.exists() == failing  # the old file stays while the new one is written
            if failing:
                raise ZeroDivisionError
    assert path.read_text() == "failing False" and list(path.parent.iterdir()) == [path]


def test_a_folder_appears_whole_with_the_usual_permissions(tmp_path):
    with files.atomic(tmp_path / "set") as draft:
        draft.mkdir()
        (draft / "a").touch()
        assert not (tmp_path / "set").exists() and draft.name == "set"
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "set", tmp_path / "set/a"]
    (tmp_path / "other").mkdir()
    assert (tmp_path / "set").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_folder_that_holds_something_is_not_replaced(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a").touch()
    with pytest.raises(OSError, match="set"), files.atomic(tmp_path / "set") as draft:
        draft.mkdir()
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "set", tmp_path / "set/a"]


def test_new_files_replace_the_stale_ones_once_all_are_written(tmp_path):
    folder = tmp_path / "deep" / "model"
    for failing, count in ((False, 2), (True, 3), (False, 1)):
        with contextlib.suppress(ZeroDivisionError), files.replacing(folder, stale="part*") as draft:
            before = sorted(folder.glob("part*"))
            for number in range(count):
                (draft / f"part{number}").write_text(f"{count} parts")
            assert sorted(folder.glob("part*")) == before  # the old files stay while the new ones are written
            if failing:
                raise ZeroDivisionError
        (folder / "config").touch()
    assert sorted(folder.iterdir()) == [folder / "config", folder / "part0"]
    assert (folder / "part0").read_text() == "1 parts"


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    with files.atomic(tmp_path / "x") as first, files.atomic(tmp_path / "x") as second:
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "x").read_text() == "first" and list(tmp_path.iterdir()) == [tmp_path / "x"]


def test_a_folder_that_cannot_be_made_or_written_to(tmp_path, monkeypatch):
    assert files.make_folder(tmp_path / "a/b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/run cannot be made .Not a directory., expected a folder: choose another"):
        files.make_folder(tmp_path / "file/run")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(UserError, match="a/b may not be written to, expected a folder of your own"):
        files.make_folder(tmp_path / "a/b")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(b"{", "is not valid JSON"), (b"\xff", "is not valid JSON"), (b"[]", "holds list, expected an object")],
)
def test_a_broken_json_file_is_named(tmp_path, content, sentence):
    (tmp_path / "eval.json").write_bytes(content)
    with pytest.raises(UserError, match=f"eval.json {sentence}.*: restore the file, or remove it"):
        files.read_json_or_empty(tmp_path / "eval.json")
    assert files.read_json_or_empty(tmp_path / "none.json") == {}
