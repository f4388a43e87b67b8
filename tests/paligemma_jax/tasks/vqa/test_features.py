"""Training on features encoded once: the same rows as with images, bad ones at the same places."""

import dataclasses
import pickle

import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.data.records import BadRow, Subset
from paligemma_jax.data.sources.jsonl import JsonlRecords
from paligemma_jax.tasks.vqa import features
from paligemma_jax.tasks.vqa.task import VQA
from tests.paligemma_jax.mini import Rows, png, task_of, write_rows
from train_jax.core.errors import UserError

pytestmark = pytest.mark.usefixtures("fast_compilation")


@pytest.fixture
def source(mini_options, mini_rows, monkeypatch):
    """The training source of a task whose data are these rows."""

    def make(rows=mini_rows, **changes):
        monkeypatch.setattr(VQA, "split", lambda task, name: rows)
        return task_of(mini_options | {key.replace("__", "."): value for key, value in changes.items()}).train_source()

    return make


@pytest.fixture
def broken(mini_rows):
    """One unreadable image with three questions, and one answer that does not fit."""
    records = list(mini_rows.records)
    records[3:6] = [dataclasses.replace(record, image=b"broken") for record in records[3:6]]
    records[9] = dataclasses.replace(records[9], suffix="red " * 100)
    return Rows(records)


def test_features_replace_images(source, mini_rows, mini_options):
    with_images, with_features = source(cache_features=False), source(cache_features=True)
    assert len(with_images) == len(with_features) == 13
    assert with_images.fingerprint == with_features.fingerprint
    task = task_of(mini_options)
    model = task.base()
    batch = {"image": jnp.asarray(np.stack([with_images[i]["image"] for i in range(13)]))}
    expected_features = np.asarray(features.batch_features(model, batch))
    for i in range(13):
        row, expected = with_features[i], with_images[i]
        np.testing.assert_allclose(row.pop("features"), expected_features[i], atol=1e-5)
        del expected["image"]
        assert row.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(row[name], value)


@pytest.mark.parametrize("cache", [False, True])
def test_bad_rows_keep_their_places(source, broken, cache, caplog):
    rows, good = source(broken, cache_features=cache, data__max_bad_fraction=0.5, data__on_truncation="skip"), source()
    examples = [rows[i] for i in range(13)]
    assert [float(example["weight"]) for example in examples] == [1, 1, 1, 0, 0, 0, 1, 1, 1, 0, 1, 1, 1]
    rows.on_rows(range(13), np.array([example["bad"] for example in examples]))
    assert rows.bad_rows == {3: "1.png", 4: "1.png", 5: "1.png", 9: "3.png"}
    for i in (0, 8, 12):
        np.testing.assert_array_equal(rows[i]["tokens"], good[i]["tokens"])
    assert {name: value.shape for name, value in rows[3].items()} == {
        name: value.shape for name, value in rows[0].items()
    }
    assert "Bad row 4 (1.png) skipped with weight 0" in caplog.text
    assert "Bad row 9 (3.png) skipped with weight 0: The suffix with EOS has" in caplog.text


@pytest.mark.parametrize("cache", [False, True])
def test_the_share_of_bad_rows_is_counted_by_row(source, broken, cache):
    rows = source(broken, cache_features=cache, data__max_bad_fraction=0.3, data__on_truncation="skip")
    marks = np.array([rows[i]["bad"] for i in range(13)])
    assert sum(marks) == 4
    with pytest.raises(UserError, match=r"4 of 13 rows read were bad \(30.8%"):
        rows.on_rows(range(13), marks)
    tolerant = source(broken, cache_features=cache, data__max_bad_fraction=0.31, data__on_truncation="skip")
    tolerant.on_rows(range(13), marks)
    tolerant.check()


@pytest.mark.parametrize("cache", [False, True])
def test_a_bad_image_stops_where_the_config_says_so(source, broken, cache):
    with pytest.raises(BadRow, match="1.png: cannot decode the image"):
        source(broken, cache_features=cache, data__on_error="raise", data__on_truncation="skip")[3]


@pytest.mark.parametrize("on_error", ["skip", "raise"])
def test_truncation_has_a_policy_of_its_own(source, broken, on_error):
    texts = Rows(broken.records[6:])
    with pytest.raises(UserError, match="The suffix with EOS has 102 tokens but 4 fit"):
        source(texts, data__on_error=on_error, data__on_truncation="raise", data__max_bad_fraction=1.0)[3]
    skipped = source(texts, data__on_error=on_error, data__on_truncation="skip", data__max_bad_fraction=1.0)
    assert skipped[3]["weight"] == 0 and skipped[2]["weight"] == 1


def test_a_bad_first_row_of_a_file_makes_no_image_bad(source, tmp_path):
    """A malformed line is nobody's image, though it comes first."""
    (tmp_path / "a.png").write_bytes(png(0))
    (tmp_path / "b.png").write_bytes(png(1))
    write_rows(tmp_path, "train", [{"image": name, "prefix": "p", "suffix": "s"} for name in ("a.png", "b.png") * 3])
    file = tmp_path / "train.jsonl"
    file.write_text("{not JSON\n" + file.read_text())
    records = JsonlRecords(tmp_path, "train")
    assert len(set(records.image_numbers())) == 3
    rows = source(records, cache_features=True, data__max_bad_fraction=0.5)
    assert [float(rows[i]["weight"]) for i in range(7)] == [0, 1, 1, 1, 1, 1, 1]


def test_a_subset_finds_its_features(source, mini_rows):
    part = Subset(mini_rows, indices=[12, 4, 4, 1])
    rows, whole = source(part, cache_features=True), source(cache_features=True)
    for i, j in enumerate((12, 4, 4, 1)):
        np.testing.assert_allclose(rows[i]["features"], whole[j]["features"], atol=1e-6)


def test_features_that_take_too_much_memory_are_refused_before_any_image_is_read(source, mini_rows, monkeypatch):
    """13 questions on 5 images of 4 patches, 32 wide: 2,560 bytes."""
    monkeypatch.setattr(Rows, "__getitem__", lambda rows, index: pytest.fail("an image was read"))
    sentence = "cache_features needs 1 MiB of host memory for 5 images, expected at most cache_features_mb=0: raise it"
    with pytest.raises(UserError, match=sentence):
        source(cache_features=True, cache_features_mb=0)


def test_the_limit_counts_images():
    features._check_size(4 * 256 * 2048 * 500, 500, 1000)
    with pytest.raises(UserError, match="needs 1,002 MiB of host memory for 501 images"):
        features._check_size(4 * 256 * 2048 * 501, 501, 1000)


def test_black_images_are_encoded_once(source, broken, monkeypatch, mini_options):
    encoded, real = [], features.encoder

    def counting(model, mesh):
        encode = real(model, mesh)
        return lambda images: encoded.append(images) or encode(images)

    monkeypatch.setattr(features, "encoder", counting)
    options = {"data__blank_images": True, "data__max_bad_fraction": 0.5, "data__on_truncation": "skip"}
    rows = source(broken, cache_features=True, **options)
    assert len(encoded) == 1 and not encoded[0].any()
    assert rows._rows._features.shape == (1, 4, 32)
    with_images = source(broken, cache_features=False, **options)
    # An unreadable image is bad all the same: the control trains on the rows of the run.
    assert [rows[i]["weight"] for i in range(13)] == [with_images[i]["weight"] for i in range(13)]
    task = task_of(mini_options)
    black = features.batch_features(task.base(), {"image": jnp.asarray(with_images[12]["image"][None])})[0]
    for i in (0, 12):
        np.testing.assert_allclose(rows[i]["features"], black, atol=1e-5)


@pytest.mark.parametrize("cache", [False, True])
def test_worker_processes_may_have_a_copy(source, broken, cache):
    """What data.workers > 0 needs: sources survive pickling, and hold nothing of the weights."""
    rows = source(broken, cache_features=cache, data__max_bad_fraction=0.5, data__on_truncation="skip")
    pickled = pickle.dumps(rows)
    assert len(pickled) < 200_000  # the tokenizer and some small pictures or features, not a model
    copy = pickle.loads(pickled)
    for i in range(13):
        assert copy[i].keys() == rows[i].keys()
        for name, value in rows[i].items():
            np.testing.assert_array_equal(copy[i][name], value)
    assert copy.bad_rows == rows.bad_rows and copy.fingerprint == rows.fingerprint
