"""Images are found in nested folders; hidden names and other files are left out and logged."""

import pytest

from train_jax.core.formats.image_folders import ENDINGS, find_images


@pytest.fixture
def write(tmp_path):
    def files(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(b"x")
        return tmp_path

    return files


def test_every_extension_and_depth_is_found_and_the_rest_is_logged(write, caplog):
    names = [f"a/{number}{ending}" for number, ending in enumerate(ENDINGS)]
    root = write(*names, "a/x/y/deep.PNG", "b/1.png", "top.png", "c/notes.txt", ".d/1.png", "b/.1.png", "b/.x/2.png")
    result = find_images(root)
    assert result.classes == {"a": sorted([*names, "a/x/y/deep.PNG"]), "b": ["b/1.png"]} and result.loose == ["top.png"]
    assert sum(map(len, result.left_out.values())) == 4  # a hidden folder counts as one
    (line,) = caplog.messages
    assert "left out " in line and "3 hidden (first: '.d')" in line
    assert "1 without an image extension (first: 'c/notes.txt')" in line


def test_nothing_is_logged_if_nothing_is_left_out(write, caplog):
    assert find_images(write("a/1.png")).left_out == {} and not caplog.messages
    assert find_images(write() / "absent") == ({}, [], {})


def test_circular_links_are_left_out(write):
    root = write("a/1.png", "a/b/2.png")
    (root / "a/b/back").symlink_to(root / "a")
    result = find_images(root)
    assert result.classes == {"a": ["a/1.png", "a/b/2.png"]} and list(result.left_out.values()) == [["a/b/back"]]


def test_an_image_that_links_to_itself_is_reported_by_its_reader(write):
    root = write("a/1.png")
    (root / "a/2.png").symlink_to("2.png")
    (root / "a/x").symlink_to("x")
    result = find_images(root)
    assert result.classes == {"a": ["a/1.png", "a/2.png"]} and list(result.left_out.values()) == [["a/x"]]
