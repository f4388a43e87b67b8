"""Which files of a folder are pictures: nested ones are, hidden ones are not, and what is left out is told."""

import pytest

from train_jax.core.picture_folders import ENDINGS, pictures_below


@pytest.fixture
def write(tmp_path):
    def files(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(b"x")
        return tmp_path

    return files


def test_every_ending_and_depth_is_found_and_the_rest_told(write, caplog):
    names = [f"a/{number}{ending}" for number, ending in enumerate(ENDINGS)]
    root = write(*names, "a/x/y/deep.PNG", "b/1.png", "top.png", "c/notes.txt", ".d/1.png", "b/.1.png", "b/.x/2.png")
    found = pictures_below(root)
    assert found.classes == {"a": sorted([*names, "a/x/y/deep.PNG"]), "b": ["b/1.png"]} and found.loose == ["top.png"]
    assert sum(map(len, found.left_out.values())) == 4  # a hidden folder counts once
    (line,) = caplog.messages
    assert "is left out: " in line and "3 hidden (first: '.d')" in line
    assert "1 without an ending of pictures (first: 'c/notes.txt')" in line


def test_nothing_left_out_is_nothing_told(write, caplog):
    assert pictures_below(write("a/1.png")).left_out == {} and not caplog.messages
    assert pictures_below(write() / "absent") == ({}, [], {})


def test_links_in_a_circle_end(write):
    root = write("a/1.png", "a/b/2.png")
    (root / "a/b/back").symlink_to(root / "a")
    found = pictures_below(root)
    assert found.classes == {"a": ["a/1.png", "a/b/2.png"]} and list(found.left_out.values()) == [["a/b/back"]]


def test_a_picture_that_is_a_link_to_itself_is_for_its_reader_to_tell(write):
    root = write("a/1.png")
    (root / "a/2.png").symlink_to("2.png")
    (root / "a/x").symlink_to("x")
    found = pictures_below(root)
    assert found.classes == {"a": ["a/1.png", "a/2.png"]} and list(found.left_out.values()) == [["a/x"]]
