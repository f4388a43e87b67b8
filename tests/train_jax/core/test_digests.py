"""Digests of files: equal for equal bytes, and computed again when a file changes."""

import os

import numpy as np
import pytest

from train_jax.core import digests


def test_a_digest_is_of_the_bytes():
    assert digests.digest(b"a") == digests.digest(b"a") != digests.digest(b"b")
    assert digests.digest(b"") == digests.digest(None) == bytes(digests.SIZE)


def test_numbers_are_equal_for_equal_keys_and_none_equals_nothing():
    assert digests.numbers(["x", None, "y", None, "x", "y"]).tolist() == [0, 1, 2, 3, 0, 2]
    assert digests.numbers([]).tolist() == []


def test_files_go_by_their_bytes(tmp_path):
    for name, data in (("a", b"1"), ("b", b"2"), ("c", b"1"), ("empty", b"")):
        (tmp_path / name).write_bytes(data)
    names = ["a", "b", "c", "empty", "absent", "x" * 300, "no\0name"]
    keys = digests.keys(digests.of_files([tmp_path / name for name in names]))
    assert keys[0] == keys[2] != keys[1] and keys[3:] == [None] * 4
    assert digests.numbers(keys).tolist() == [0, 1, 0, 2, 3, 4, 5]


@pytest.fixture
def kept(tmp_path):
    """A function that reads two files through what is kept, and how often it computed."""
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_text("1")
    count = []

    def compute():
        count.append(1)
        return {"sizes": np.array([file.stat().st_size if file.exists() else -1 for file in files])}

    return lambda: (digests.kept(tmp_path / "cache" / "kept.npz", files, compute)["sizes"].tolist(), len(count))


def test_what_is_kept_is_computed_again_when_size_or_time_change(kept, tmp_path):
    assert kept() == kept() == ([1, 1], 1)
    (tmp_path / "b").write_text("22")
    assert kept() == kept() == ([1, 2], 2)
    os.utime(tmp_path / "b", (1, 1))
    assert kept() == kept() == ([1, 2], 3)
    (tmp_path / "a").unlink()
    assert kept() == kept() == ([-1, 2], 4)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut"])
def test_a_broken_kept_file_is_made_again(kept, tmp_path, content):
    kept()
    (tmp_path / "cache/kept.npz").write_bytes(content)
    assert kept() == kept() == ([1, 1], 2)


def test_what_cannot_be_kept_costs_only_time(kept, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert kept() == ([1, 1], 1) and kept() == ([1, 1], 2)
