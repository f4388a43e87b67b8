"""Rows to tune and to test on: seeded views, bad images of weight 0, the same after a resume."""

import dataclasses

import cloudpickle
import numpy as np
import pytest
from PIL import Image

from paligemma_jax.data.few_shot.class_folders import read_class_folders
from paligemma_jax.data.few_shot.rows import LabelledRows, TunedRows
from paligemma_jax.images import augment
from paligemma_jax.images.preprocessing import Preprocessing
from train_jax.core.errors import UserError
from train_jax.data.pipeline import Pipeline

PREPROCESSING = Preprocessing.siglip(16)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name in ("cat", "dog", "emu"):
        (root / name).mkdir()
        for k in range(8):
            Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(root / name / f"{k}.png")
    return read_class_folders(root).few_shot(3, 0)


@pytest.fixture(scope="module")
def broken(data, tmp_path_factory):
    """The data set with a first training image that cannot be decoded and a second that is missing."""
    root = tmp_path_factory.mktemp("broken")
    for rows in data.splits.values():
        for image, _ in rows:
            (root / image).parent.mkdir(exist_ok=True)
            (root / image).write_bytes((data.root / image).read_bytes())
    first, second = data.splits["train"][:2]
    (root / first.image).write_bytes(b"no image")
    (root / second.image).unlink()
    return dataclasses.replace(data, root=root)


def tuned_rows(data, seed=0, tuned=augment.LIGHT, frozen=augment.STRONG, **more):
    return TunedRows(data, PREPROCESSING, tuned, frozen, seed, **more)


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name, values in first.items():
        np.testing.assert_array_equal(values, second[name], err_msg=name)


def test_rows(data):
    rows = tuned_rows(data)
    batch = rows.get_batch(np.array([0, 4, 8]), 5)
    assert {name: (values.shape, values.dtype) for name, values in batch.items()} == {
        "image": ((3, 16, 16, 3), np.uint8),
        "image_augmented": ((3, 16, 16, 3), np.uint8),
        "label": ((3,), np.int32),
        "weight": ((3,), np.float32),
        "bad": ((3,), np.bool_),
        "draw": ((3,), np.float32),
    }
    assert len(rows) == 9 and batch["label"].tolist() == [0, 1, 2] and batch["weight"].tolist() == [1, 1, 1]
    assert len(set(batch["draw"])) == 1


def test_rows_are_a_function_of_seed_step_and_row(data):
    rows, again = tuned_rows(data), tuned_rows(data)
    batch = rows.get_batch(np.array([1, 7]), 3)
    assert_equal(batch, again.get_batch(np.array([1, 7]), 3))
    alone = again.get_batch(np.array([7]), 3)  # the other rows of a process do not matter
    assert_equal({name: values[1:] for name, values in batch.items()}, alone)
    assert_equal(rows[7], {name: values[0] for name, values in rows.get_batch(np.array([7]), 0).items()})
    for other in (rows.get_batch(np.array([1, 7]), 4), tuned_rows(data, 1).get_batch(np.array([1, 7]), 3)):
        assert not np.array_equal(batch["image"], other["image"])
        assert not np.array_equal(batch["image_augmented"], other["image_augmented"])


def test_the_two_views_are_drawn_apart(data):
    same = tuned_rows(data, tuned=augment.LIGHT, frozen=augment.LIGHT).get_batch(np.array([0]), 0)
    assert not np.array_equal(same["image"], same["image_augmented"])
    rows = tuned_rows(data, tuned=augment.NONE)
    np.testing.assert_array_equal(rows.get_batch(np.array([0]), 0)["image"], rows.get_batch(np.array([0]), 9)["image"])
    off = tuned_rows(data, tuned=augment.NONE, frozen=augment.NONE)[2]
    np.testing.assert_array_equal(off["image"], off["image_augmented"])


@pytest.mark.parametrize("threads, workers", [(0, 0), (2, 0)])
def test_a_resumed_run_sees_the_same_rows(data, threads, workers):
    def stream(start):
        pipeline = Pipeline(tuned_rows(data), 4, num_steps=6, threads=threads, workers=workers)
        batches = pipeline.iterate(start)
        result = list(batches)
        batches.close()
        return result

    whole, rest = stream(0), stream(3)
    assert len(rest) == 3
    for first, second in zip(whole[3:], rest, strict=True):
        assert_equal(first, second)
        assert "bad" not in first


def test_the_stream_does_not_depend_on_the_processes(data):
    rows = tuned_rows(data)
    whole = Pipeline(rows, 4, num_steps=2).batch_at(1)
    parts = [Pipeline(rows, 4, num_steps=2, process_index=k, process_count=2).batch_at(1) for k in (0, 1)]
    assert_equal(whole, {name: np.concatenate([part[name] for part in parts], axis=1) for name in whole})


def test_fingerprints_of_different_streams_differ(data):
    streams = [tuned_rows(data), tuned_rows(data, 1), tuned_rows(data, tuned=augment.NONE)]
    streams += [tuned_rows(data.base_to_novel()[0]), tuned_rows(dataclasses.replace(data, seed=5))]
    assert len({rows.fingerprint for rows in streams}) == 5
    assert tuned_rows(data).fingerprint == streams[0].fingerprint


def test_rows_can_be_pickled_for_worker_processes(data):
    copy = cloudpickle.loads(cloudpickle.dumps(tuned_rows(data)))  # as grain sends them
    assert_equal(copy.get_batch(np.array([3]), 2), tuned_rows(data).get_batch(np.array([3]), 2))


def test_bad_images_have_weight_0_and_are_named(broken):
    rows = tuned_rows(broken)
    batch = rows.get_batch(np.arange(9), 0)
    assert batch["weight"].tolist() == [0, 0] + [1] * 7 and batch["bad"].tolist() == [True, True] + [False] * 7
    assert not batch["image"][:2].any()
    images = [image for image, _ in broken.splits["train"][:2]]
    with pytest.raises(UserError, match=rf"2 of 9 rows read were bad \(22.2%; first: {images[0]}, "):
        rows.on_rows(np.arange(9), batch["bad"])
    with pytest.raises(UserError, match=f"{images[0]}: cannot decode"):
        tuned_rows(broken, on_error="raise")[0]
    with pytest.raises(UserError, match=f"cannot read {images[1]}"):
        tuned_rows(broken, on_error="raise")[1]


def test_test_images_are_resized_for_the_model(data, broken):
    rows = LabelledRows(data, PREPROCESSING)
    assert [int(rows[k]["label"]) for k in range(len(rows))] == [label for _, label in data.splits["test"]]
    for k, (name, _) in enumerate(data.splits["test"]):
        decoded = PREPROCESSING.decode((data.root / name).read_bytes())
        np.testing.assert_array_equal(rows[k]["image"], PREPROCESSING.resize(decoded))
    weights = [float(LabelledRows(broken, PREPROCESSING, "train")[k]["weight"]) for k in range(9)]
    assert weights == [0, 0] + [1] * 7
