"""Image data sets: files, folders, TFDS, held-out splits, bad files, flips; and refused settings."""

import numpy as np
import pytest
from PIL import Image

from flow_jax.data import image_decoding
from flow_jax.data.image_datasets import ImageData, open_data, read
from flow_jax.data.image_pairs import ImagePairs
from flow_jax.data.image_sets import ArrayImages, FolderImages, TfdsImages
from tests.flow_jax.images_on_disk import encoded, pixels, prepare, write_folder
from train_jax.config import base as configs
from train_jax.core.errors import UserError
from train_jax.core.row_errors import BadRow, BadRows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("tfds"))


def settings(**changes):
    config = configs.base_config("flow_jax.tasks.images:ImageFlow").data
    for key, value in {"image_size": 8, "held_out_fraction": 0.2, **changes}.items():
        config[key] = value
    return config


# Files.


def test_a_file_of_the_right_size_keeps_its_values():
    image = pixels(0)
    np.testing.assert_array_equal(image_decoding.decode(encoded(image), 8, 3), image)
    transparent = np.dstack([image, np.full((8, 8), 7, np.uint8)])
    np.testing.assert_array_equal(image_decoding.decode(encoded(transparent), 8, 3), image)
    np.testing.assert_array_equal(image_decoding.decode(encoded(image[..., 0]), 8, 3), image[..., :1].repeat(3, axis=2))
    assert image_decoding.decode(encoded(image), 8, 1).shape == (8, 8, 1)


def test_the_middle_is_cut_out_and_shrunk_with_antialiasing():
    """Stripes of one pixel beside a black margin: the square in the middle becomes their mean."""
    image = np.zeros((16, 32, 3), np.uint8)
    image[:, 8:24] = 100
    image[:, 8:24:2] = 200
    small = image_decoding.decode(encoded(image), 4, 3)
    assert np.abs(small.astype(int)[:, 1:-1] - 150).max() <= 3 and small.min() > 120


def test_a_photograph_stands_upright(tmp_path):
    image = pixels(1)
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by half a circle
    Image.fromarray(image).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(image_decoding.decode((tmp_path / "a.png").read_bytes(), 8, 3), image[::-1, ::-1])


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"text", "unknown image format"),
        (encoded(pixels(0))[:80], "cannot decode the image"),
        (encoded(np.ones((8, 8), np.uint16)), "expected 8 bits per channel"),
    ],
)
def test_a_file_that_is_not_an_image_is_a_bad_row(data, sentence):
    with pytest.raises(BadRow, match=sentence):
        image_decoding.decode(data, 8, 3)


# Sets.


def test_class_folders_are_labels(folder):
    image_set = FolderImages(folder, 8, 3)
    assert image_set.classes == ["a", "b", "c"] and len(image_set) == 30
    image, label = image_set[13]
    np.testing.assert_array_equal(image, pixels(103))
    assert label == image_set.label(13) == 1 and image_set.name(13) == "b/03.png"


def test_a_share_of_the_folder_is_held_out(folder):
    data = open_data(settings(name="folder", folder=str(folder)))
    sides = [{side.name(row) for row in range(len(side))} for side in (data.train, data.held_out)]
    assert [len(side) for side in sides] == [24, 6] and not sides[0] & sides[1] and data.num_classes == 3
    again = open_data(settings(name="folder", folder=str(folder)))
    assert again.train.fingerprint == data.train.fingerprint != data.held_out.fingerprint
    other = settings(name="folder", folder=str(folder), held_out_folder=str(folder))
    assert len(open_data(other).train) == len(open_data(other).held_out) == 30


def test_tfds_is_read_by_row(prepared):
    data = open_data(settings(name="tfds", folder=str(prepared)))
    assert (len(data.train), len(data.held_out), data.num_classes) == (20, 10, 2)
    result = {image.tobytes(): label for image, label in (data.train[row] for row in range(20))}
    assert result == {pixels(number).tobytes(): number % 2 for number in range(20)}
    assert [data.train.label(row) for row in range(20)] == [data.train[row].label for row in range(20)]
    part = open_data(settings(name="tfds", folder=str(prepared), split="train[:25%]", conditional=False))
    assert len(part.train) == 5 and part.num_classes == 0
    assert part.train.fingerprint != data.train.fingerprint


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"name": "folder"}, "data.folder is None, expected the folder of the images"),
        ({"name": "folder", "folder": "nowhere"}, "there is no folder nowhere"),
        ({"name": "folder", "folder": "EMPTY"}, "contains no images, expected files that end in .png"),
        ({"name": "folder", "folder": "FOLDER/a"}, "has no labels, expected class folders"),
        ({"name": "folder", "folder": "FOLDER", "num_classes": 4}, "data.num_classes is 4, but the data have 3"),
        ({"name": "folder", "folder": "FOLDER", "held_out_folder": "FOLDER/a"}, "other class folders"),
        ({"name": "folder", "folder": "FOLDER", "held_out_fraction": 0.01}, "of 30 images holds out 0"),
        ({"name": "folder", "folder": "FOLDER", "channels": 4}, "config.data.channels=4, expected one of 1, 3"),
        ({"name": "folder", "folder": "FOLDER", "image_size": None}, "data.image_size is None, expected the side"),
        ({"name": "digits", "image_size": 16}, "data.image_size is 16, but digits have 8"),
        ({"name": "tfds", "folder": "FOLDER"}, "has no dataset_info.json"),
        ({"name": "tfds", "folder": "TFDS", "held_out": "validation"}, "has no split 'validation'"),
        ({"name": "tfds", "folder": "TFDS", "image": "picture"}, "has no feature 'picture', expected one of image"),
        ({"name": "tfds", "folder": "TFDS", "label": "class"}, "data.conditional=False"),
        ({"name": "tfds", "folder": "TFDS", "channels": 1}, "have 3 channel.s., expected 1: set data.channels=3"),
    ],
)
def test_what_is_refused(changes, sentence, folder, prepared, tmp_path):
    for key in {"folder", "held_out_folder"} & changes.keys():
        places = {"FOLDER": folder, "TFDS": prepared, "EMPTY": tmp_path}
        head, *rest = changes[key].split("/")
        changes = changes | {key: "/".join([str(places.get(head, head)), *rest])}
    with pytest.raises(UserError, match=sentence):
        open_data(settings(**changes))


def test_grey_images_need_one_channel(tmp_path):
    with pytest.raises(UserError, match="have 1 channel.s., expected 3: set data.channels=1"):
        TfdsImages(prepare(tmp_path, channels=1), "train", "image", "label", 8, 3)


def test_files_beside_class_folders_are_refused(tmp_path):
    write_folder(tmp_path, classes=1, each=1)
    (tmp_path / "stray.png").write_bytes(encoded(pixels(0)))
    with pytest.raises(UserError, match="contains stray.png beside folders of images"):
        FolderImages(tmp_path, 8, 3)


# What feeds the step.


def pairs_of(data: ImageData, coupling="independent", **options) -> ImagePairs:
    return ImagePairs(data, False, coupling, 5, **options)


def memory(number: int, classes: int = 2) -> ImageData:
    images = np.stack([pixels(row) for row in range(number)])
    image_set = ArrayImages(images, np.arange(number) % max(classes, 1))
    return ImageData(image_set, image_set, 8, 3, 256, classes)


def test_bad_files_keep_their_slot_with_weight_zero(tmp_path):
    root = write_folder(tmp_path, broken=("a/03.png", "b/07.png"))
    image_set = FolderImages(root, 8, 3)
    rows = np.array([2, 3, 4, 17, 20])
    for coupling in ("independent", "exact"):
        pairs = pairs_of(ImageData(image_set, image_set, 8, 3, 256, 3), coupling, max_bad_fraction=0.5)
        step = pairs.get_batch(rows, 0)
        np.testing.assert_array_equal(step["weight"], [1, 0, 1, 0, 1])
        np.testing.assert_array_equal(step["bad"], [False, True, False, True, False])
        np.testing.assert_allclose(step["x_1"][[0, 2]], np.stack([pixels(2), pixels(4)]) / 127.5 - 1, atol=1e-6)
        pairs.on_rows(rows, step["bad"])
        assert pairs.bad_rows == {3: "a/03.png", 17: "b/07.png"}
    with pytest.raises(BadRow, match="cannot decode the image"):
        pairs_of(ImageData(image_set, image_set, 8, 3, 256, 3), on_error="raise").get_batch(rows, 0)
    strict = pairs_of(ImageData(image_set, image_set, 8, 3, 256, 3))
    strict.on_rows(rows, step["bad"])
    with pytest.raises(UserError, match=r"2 of 5 rows read were bad \(40.0%; first: a/03.png, b/07.png\)"):
        strict.check()


def test_a_lost_file_is_a_bad_row(tmp_path):
    image_set = FolderImages(write_folder(tmp_path), 8, 3)
    (tmp_path / "a/00.png").unlink()
    with pytest.raises(BadRow, match="cannot be read"):
        image_set[0]


def test_held_out_images_are_read_without_bad_ones(tmp_path):
    image_set = FolderImages(write_folder(tmp_path, broken=("a/03.png",)), 8, 3)
    (images, labels), *rest = read(image_set, np.arange(12), BadRows(12, "skip", 0.5))
    assert not rest and len(images) == 11 and labels.tolist() == [0] * 9 + [1] * 2
    np.testing.assert_array_equal(images[3], pixels(4))
    with pytest.raises(UserError, match="1 of 12 rows read were bad"):
        list(read(image_set, np.arange(12), BadRows(12)))


def test_rows_stay_in_their_order_whatever_the_coupling():
    data, rows = memory(12), np.array([7, 0, 3, 11, 4, 2])
    plain, coupled = (pairs_of(data, name).get_batch(rows, 1) for name in ("independent", "exact"))
    for name in ("x_1", "label", "weight"):
        np.testing.assert_array_equal(plain[name], coupled[name])
    assert np.square(coupled["x_0"] - coupled["x_1"]).sum() < np.square(plain["x_0"] - plain["x_1"]).sum()


def test_without_labels_pairs_have_the_least_cost_of_all():
    rows = np.arange(12)
    within, across = (pairs_of(memory(12, classes), "exact").get_batch(rows, 1) for classes in (2, 0))
    assert "label" not in across
    cost = [float(np.square(step["x_0"] - step["x_1"]).sum()) for step in (within, across)]
    assert cost[1] < cost[0]


def test_flips_are_a_function_of_seed_step_and_image():
    data, rows = memory(40), np.arange(40)
    plain = pairs_of(data).get_batch(rows, 3)["x_1"]
    flipped = pairs_of(data, flip=True).get_batch(rows, 3)["x_1"]
    turned = np.array([not np.array_equal(a, b) for a, b in zip(plain, flipped, strict=True)])
    assert 10 < turned.sum() < 30
    np.testing.assert_array_equal(flipped[turned], plain[turned, :, ::-1])
    order = np.random.default_rng(0).permutation(40)[:25]  # other rows of a batch or a coupling change nothing
    other = pairs_of(data, "exact", flip=True).get_batch(order, 3, 7 + np.arange(25))["x_1"]
    np.testing.assert_array_equal(other, flipped[order])
    later = pairs_of(data, flip=True).get_batch(rows, 4)["x_1"]
    assert not np.array_equal(later, flipped)
    np.testing.assert_array_equal(data.train.images, np.stack([pixels(row) for row in range(40)]))


@pytest.mark.parametrize("classes", [2, 0])
def test_noise_and_grey_values_are_functions_of_seed_step_and_row(classes):
    data, rows = memory(40, classes), np.arange(40)
    pairs = ImagePairs(data, True, "exact", 5, group=8)
    whole = pairs.get_batch(rows, 3, rows)
    for part in (rows[8:16], rows[16:40]):
        result = pairs.get_batch(part, 3, part)
        for name, values in whole.items():
            np.testing.assert_array_equal(result[name], values[part], err_msg=name)
    same = pairs.get_batch(np.zeros(40, int), 3, rows)["x_1"]  # one picture in all rows
    assert len(np.unique(same.reshape(40, -1), axis=0)) == 40


def test_synthetic_images_differ_between_splits_and_rows():
    data = open_data(settings(name="shapes"))
    assert data.num_classes == 3 and len(data.train) == 2000 and len(data.held_out) == 200
    images = {side[row].pixels.tobytes() for side in (data.train, data.held_out) for row in range(50)}
    assert len(images) == 100
    np.testing.assert_array_equal(data.train[4].pixels, data.train[4].pixels)


def test_hidden_folders_are_no_classes_and_nested_files_belong_to_theirs(tmp_path, caplog):
    root = write_folder(tmp_path, each=2)
    for name in (".ipynb_checkpoints/1.png", "a/more/2.png", "a/more/still/3.tiff", "b/notes.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(pixels(7)))
    image_set = FolderImages(root, 8, 3)
    assert image_set.classes == ["a", "b", "c"] and len(image_set) == 8
    assert [image_set.label(row) for row in range(8)] == [0, 0, 0, 0, 1, 1, 2, 2]
    assert sum(map(len, image_set.left_out.values())) == 2 and "notes.txt" in caplog.text


def test_copies_of_an_image_are_in_one_split(tmp_path):
    root = write_folder(tmp_path)
    whole = open_data(settings(name="folder", folder=str(root)))
    held = {whole.held_out.name(row) for row in range(len(whole.held_out))}
    for file in sorted(root.glob("*/*.png")):
        (file.parent / f"{file.stem} copy.png").write_bytes(file.read_bytes())
    data = open_data(settings(name="folder", folder=str(root)))
    sides = [{side[row].pixels.tobytes() for row in range(len(side))} for side in (data.train, data.held_out)]
    assert len(sides[0]) == 24 and len(sides[1]) == 6 and not sides[0] & sides[1]
    assert len(held) == 6 and len(data.held_out) == 12
    for file in root.glob("*/*.png"):
        file.write_bytes(encoded(pixels(0)))
    with pytest.raises(UserError, match="1 different image.s. among 60 files"):
        open_data(settings(name="folder", folder=str(root)))


def test_the_fingerprint_is_of_the_bytes(tmp_path):
    root = write_folder(tmp_path, each=2)
    before = FolderImages(root, 8, 3, tmp_path / "cache").fingerprint
    assert FolderImages(root, 8, 3).fingerprint == before
    (root / "a/00.png").write_bytes(encoded(pixels(999)))
    assert FolderImages(root, 8, 3, tmp_path / "cache").fingerprint != before
