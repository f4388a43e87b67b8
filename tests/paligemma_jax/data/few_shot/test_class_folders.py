"""Image folders: class folders divided by a seed, and CoOp's split files."""

import json

import pytest

from paligemma_jax.data.few_shot.class_folders import class_folders, open_images, read_class_folders
from paligemma_jax.data.few_shot.coop import read_coop, write_split_file
from train_jax.core.errors import UserError

COUNTS = {"cube": 10, "small_ball": 5, "cone": 2}
ROWS = {
    "train": [["b/1.jpg", 1, "border_collie"], ["a/1.jpg", 0, "cat"]],
    "val": [["a/2.jpg", 0, "cat"]],
    "test": [["b/3.jpg", 1, "border_collie"], ["c/1.jpg", 2, "duck"]],
}


@pytest.fixture
def folder(tmp_path):
    for name, number in COUNTS.items():
        (tmp_path / "toys" / name).mkdir(parents=True)
        for k in range(number):
            (tmp_path / "toys" / name / f"{k}.png").write_bytes(b"")
    return tmp_path / "toys"


def test_class_folders_are_divided_by_seed_and_class(folder):
    data = read_class_folders(folder, 1)
    assert data.classes == ("cone", "cube", "small ball") and data.name == "toys"
    sizes = {split: [sum(label == c for _, label in rows) for c in range(3)] for split, rows in data.splits.items()}
    assert sizes == {"train": [1, 5, 2], "val": [0, 2, 1], "test": [1, 3, 2]}
    images = [image for rows in data.splits.values() for image, _ in rows]
    assert len(set(images)) == len(images) == 17 and all((folder / image).is_file() for image in images)
    assert data == read_class_folders(folder, 1) and data != read_class_folders(folder, 2)
    (folder / "zebra").mkdir()  # another class does not change these
    for k in range(3):
        (folder / "zebra" / f"{k}.png").write_bytes(b"")
    more = read_class_folders(folder, 1)
    assert [row for row in more.splits["train"] if row.label < 3] == list(data.splits["train"])


def test_a_division_is_stored_as_a_split_file(folder):
    data = read_class_folders(folder, 1)
    write_split_file(data, folder)
    again = open_images(folder, 2)
    assert (again.name, again.classes, again.splits) == (data.name, data.classes, data.splits)
    assert all((again.root / image).is_file() for rows in again.splits.values() for image, _ in rows)
    assert read_coop(folder, images=".").splits == data.splits


def test_two_folders_of_a_class_are_refused(folder):
    (folder / "small ball").mkdir()
    assert class_folders(folder)["small ball"][0].parent.name == "small_ball"  # the other has no images
    (folder / "small ball/9.png").write_bytes(b"")
    with pytest.raises(UserError, match="holds 'small ball' and 'small_ball', both of the class 'small ball'"):
        class_folders(folder)


def test_hidden_names_are_skipped(folder):
    data = read_class_folders(folder, 1)
    (folder / ".thumbnails").mkdir()
    for name in (".thumbnails/0.png", ".thumbnails/1.png", "cube/._0.png"):
        (folder / name).write_bytes(b"")
    assert read_class_folders(folder, 1) == data


@pytest.mark.parametrize("link", ["cube/10.png", "zebra"])
def test_links_out_of_class_folders_are_refused(folder, link):
    (folder.parent / "out").mkdir()
    for k in range(2):
        (folder.parent / f"out/{k}.png").write_bytes(b"")
    (folder / "cube/9.png").unlink()
    (folder / "cube/9.png").symlink_to(folder / "cube/8.png")  # a link within the folder does not leave it
    read_class_folders(folder)
    (folder / link).symlink_to(folder.parent / ("out" if link == "zebra" else "out/0.png"))
    with pytest.raises(UserError, match=f"the image path '{link}.* leaves .*toys by a link, expected one within"):
        read_class_folders(folder)


@pytest.fixture
def coop(tmp_path):
    def write(content, name="OxfordPets", images="images"):
        (tmp_path / images).mkdir(exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / f"split_zhou_{name}.json").write_text(text)
        return tmp_path

    return write


@pytest.mark.parametrize(
    "name, images", [("OxfordPets", "images"), ("Caltech101", "101_ObjectCategories"), ("Mine", "images")]
)
def test_published_split_files_are_read(coop, name, images):
    data = open_images(coop(ROWS, name, images))
    assert data.name == name and data.root.name == images
    assert data.classes == ("cat", "border collie", "duck")
    assert data.splits == {split: tuple((image, label) for image, label, _ in rows) for split, rows in ROWS.items()}


@pytest.mark.parametrize("path", ["../secret.png", "/etc/passwd", "a/../../x.png", "link/x.png", "a\0b"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_paths_out_of_the_folder_are_refused(coop, path, split):
    folder = coop(ROWS | {split: [*ROWS[split], [path, 0, "cat"]]})
    (folder / "images/link").symlink_to(folder.parent)
    with pytest.raises(UserError, match="the image path .* leaves"):
        read_coop(folder)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "cannot be read as JSON"),
        ("[" * 10**5 + "]" * 10**5, "cannot be read as JSON"),
        ([], "holds no object with the lists train, val, test"),
        ({"train": 3}, "holds no object with the lists"),
        ({"train": [], "test": []}, "has no rows"),
        (ROWS | {"val": [["a.jpg", "0", "cat"]]}, r"has the row \['a.jpg', '0', 'cat'\]"),
        (ROWS | {"val": [["a.jpg", True, "cat"]]}, "has the row"),
        (ROWS | {"val": [["a.jpg", 0, "dog"]]}, "calls label 0 'cat' and 'dog'"),
        (ROWS | {"val": [["a.jpg", 4, "dog"]]}, "has 4 labels from 0 to 4"),
        (ROWS | {"val": [["b/3.jpg", 1, "border_collie"]]}, "b/3.jpg occurs 2 times"),
        (ROWS | {"val": [["x.jpg", 3, "duck"]]}, "'duck' occurs twice"),
    ],
)
def test_malformed_split_files(coop, content, message):
    with pytest.raises(UserError, match=message) as error:
        read_coop(coop(content))
    assert str(error.value).count("\n") == 0


def test_missing_files_and_images(tmp_path, coop, folder):
    with pytest.raises(UserError, match="no split_zhou_NAME.json, expected one"):
        read_coop(tmp_path)
    with pytest.raises(UserError, match="is no folder, expected the images of split_zhou_OxfordPets.json"):
        read_coop(coop(ROWS), images="pictures")
    with pytest.raises(UserError, match="holds split_zhou_.*, split_zhou_.*, expected one"):
        read_coop(coop(ROWS, "Other"))
    (folder / "cone/0.png").unlink()
    with pytest.raises(UserError, match="the class 'cone' of .* has one image"):
        read_class_folders(folder)
    with pytest.raises(UserError, match="the shares of train and val"):
        read_class_folders(folder, shares=(0.6, 0.4))


def test_nested_images_of_every_ending_are_found(folder, caplog):
    for name in ("cube/more/0.png", "cube/10.tif", "cube/11.GIF", "cube/notes.txt", "loose.png", ".hidden/0.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")
    result = class_folders(folder)
    assert {name: len(files) for name, files in result.items()} == {"cone": 2, "cube": 13, "small ball": 5}
    log = " ".join(caplog.messages)
    assert "notes.txt" in log and "1 in no class folder (first: loose.png)" in log and ".hidden" in log


def test_copies_of_an_image_are_in_one_split(folder):
    """Copies are in one split even across classes; the division of other images is unchanged."""
    for name, number in COUNTS.items():
        for k in range(number):
            (folder / name / f"{k}.png").write_bytes(f"{name} {k}".encode())
    before = read_class_folders(folder, 1)
    for k in range(10):
        (folder / "cube" / f"{k} copy.png").write_bytes((folder / "cube" / f"{k}.png").read_bytes())
        (folder / "small_ball" / f"{k} copy.png").write_bytes((folder / "cube" / f"{k}.png").read_bytes())
    data = read_class_folders(folder, 1)
    splits = {name: {(folder / image).read_bytes() for image, _ in examples} for name, examples in data.splits.items()}
    assert not any(splits[a] & splits[b] for a, b in (("train", "val"), ("train", "test"), ("val", "test")))
    cubes = {split: [row for row in rows if row[0].startswith("cube/")] for split, rows in before.splits.items()}
    for split, rows in cubes.items():
        assert set(rows) <= set(data.splits[split]), split


def test_a_class_of_copies_has_one_image(folder):
    for k in range(2):
        (folder / "cone" / f"{k}.png").write_bytes(b"the same")
    with pytest.raises(UserError, match="the class 'cone' of .* has one image"):
        read_class_folders(folder)


def test_copies_in_two_splits_are_refused_and_logged_for_published_files(coop, tmp_path, caplog):
    """Copies within one split are allowed."""
    folder = coop(ROWS, "Mine")
    for name, data in (("a/1", b"1"), ("a/2", b"22"), ("b/1", b"1"), ("b/3", b"3"), ("c/1", b"4")):
        (folder / "images" / name).parent.mkdir(exist_ok=True)
        (folder / "images" / f"{name}.jpg").write_bytes(data)
    assert len(read_coop(folder).splits["train"]) == 2
    (folder / "images/c/1.jpg").write_bytes(b"1")
    with pytest.raises(UserError, match=r"1 image\(s\) are in two splits \(first: b/1.jpg of train, c/1.jpg of test"):
        read_coop(folder, cache=tmp_path / "cache")
    (folder / "split_zhou_Mine.json").rename(folder / "split_zhou_OxfordPets.json")
    assert not caplog.messages and len(read_coop(folder).splits["test"]) == 2
    assert "the published split is used unchanged" in caplog.text


@pytest.mark.parametrize("row", [["a\ud83d.jpg", 0, "cat"], ["a.jpg", 0, "c\ud83d"]])
def test_half_surrogate_pairs_in_split_files(coop, row):
    with pytest.raises(UserError, match="has the row"):
        read_coop(coop(ROWS | {"val": [row]}))
