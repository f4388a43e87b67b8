"""Opening the data of a config, and its division into training and tuning."""

import re
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from paligemma_jax.data.records import Record, RecordSource
from paligemma_jax.data.sources import splits as sources
from paligemma_jax.data.sources import synthetic as synthetic_source
from tests.paligemma_jax.mini import Rows
from train_jax.core.errors import UserError


def rows(counts, first=0):
    """counts[i] questions on image i + first."""
    return Rows([Record(b"", f"{i}", i + first, f"{i} {k}", "") for i, n in enumerate(counts) for k in range(n)])


def settings(**changes):
    return SimpleNamespace(
        **{"tune_fraction": 0.2, "tune_examples": 1000, "fraction": 1.0, "subset_seed": 42} | changes
    )


def names(source):
    return [source[i].prefix for i in range(len(source))]


def images(source):
    return {source[i].image_index for i in range(len(source))}


def test_training_and_tuning_share_no_image_and_lose_no_question():
    source = rows([3] * 20)
    train, tune = sources.training_and_tuning(source, settings())
    assert len(images(tune)) == 4 and len(images(train)) == 16
    assert not images(train) & images(tune)
    assert sorted(names(train) + names(tune)) == sorted(names(source))


def test_the_division_is_a_function_of_the_seed():
    source = rows([3] * 20)
    once, again = (sources.training_and_tuning(source, settings()) for _ in range(2))
    other = sources.training_and_tuning(source, settings(subset_seed=7))
    assert [names(part) for part in once] == [names(part) for part in again]
    assert images(once[1]) != images(other[1])
    assert once[0].fingerprint == again[0].fingerprint != other[0].fingerprint


def test_a_fraction_is_of_questions_and_never_changes_the_tuning_set():
    source = rows([10] * 20)
    whole, tune = sources.training_and_tuning(source, settings())
    part, same = sources.training_and_tuning(source, settings(fraction=0.1))
    assert len(part) == 16 and set(names(part)) < set(names(whole))
    assert len(images(part)) > 2  # not all questions of a few images
    assert names(tune) == names(same)
    few = sources.training_and_tuning(source, settings(tune_examples=7))[1]
    assert len(few) == 7 and set(names(few)) < set(names(tune))


@pytest.mark.parametrize("counts", [[1, 1], [4, 3, 3], [1, 0, 0, 1], [5] * 7])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_small_set_keeps_an_image_in_each_split(counts, share):
    train, tune = sources.training_and_tuning(rows(counts, first=3), settings(tune_fraction=share))
    assert len(train) and len(tune) and not images(train) & images(tune)


@pytest.mark.parametrize(
    "source, changes, sentence",
    [
        (rows([5]), {}, "the training data hold one image, expected at least two"),
        (rows([1, 1]), {"fraction": 0.0}, "data fraction is 0.0"),
    ],
)
def test_splits_that_are_not_possible_are_refused(source, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        sources.training_and_tuning(source, settings(**changes))


# Opening


@contextmanager
def silent(what):
    yield lambda done, total: None


@pytest.fixture
def synthetic(tmp_path):
    return SimpleNamespace(
        name="synthetic_clevr",
        source=None,
        cache_dir=str(tmp_path),
        prompt="answer en {question}",
        image_size=24,
        num_train_scenes=3,
        num_validation_scenes=2,
        questions_per_scene=4,
        scene_seed=0,
        build_workers=1,
    )


def test_synthetic_scenes_are_rendered_once(synthetic, monkeypatch):
    train = sources.open_source(synthetic, "train", silent)
    validation = sources.open_source(synthetic, "validation", silent)
    assert len(train) == 12 and len(validation) == 8
    assert {train[i].image for i in range(12)}.isdisjoint({validation[i].image for i in range(8)})
    monkeypatch.setattr(synthetic_source, "build_tree", lambda *args, **options: pytest.fail("rendered again"))
    again = sources.open_source(synthetic, "train", silent)
    assert again.fingerprint == train.fingerprint
    np.testing.assert_array_equal(again.image_numbers(), train.image_numbers())


def test_another_generator_makes_another_set(synthetic, monkeypatch):
    train = sources.open_source(synthetic, "train", silent)
    before = synthetic_source.synthetic_folder(synthetic)
    monkeypatch.setattr(synthetic_source, "VERSION", synthetic_source.VERSION + 1)
    again = sources.open_source(synthetic, "train", silent)
    assert len(again) == len(train) == 12
    assert sorted(Path(synthetic.cache_dir).iterdir()) == sorted([before, synthetic_source.synthetic_folder(synthetic)])


def test_an_interrupted_preparation_is_continued(synthetic, monkeypatch):
    """A split that is complete is not rendered again."""
    made = []
    real = synthetic_source.build_tree

    def interrupted(folder, split, *args, **options):
        made.append(split)
        if split == "val" and made.count("val") == 1:
            raise KeyboardInterrupt
        real(folder, split, *args, **options)

    monkeypatch.setattr(synthetic_source, "build_tree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sources.open_source(synthetic, "train", silent)
    assert len(sources.open_source(synthetic, "train", silent)) == 12
    assert made == ["train", "val", "val"]


@pytest.mark.parametrize("name", ["clevr", "parquet", "jsonl"])
def test_a_source_that_is_not_set(synthetic, name):
    synthetic.name = name
    with pytest.raises(UserError, match=f"data.name is '{name}' but data.source is not set"):
        sources.open_source(synthetic, "train", silent)


def test_an_official_tree_is_prepared_in_the_cache(clevr_tree, synthetic):
    synthetic.name, synthetic.source = "clevr", str(clevr_tree)
    source = sources.open_source(synthetic, "validation", silent)
    assert source[0].prefix.startswith("answer en What is val")
    (folder,) = Path(synthetic.cache_dir).glob("clevr-*/clevr/3.1.0")
    synthetic.source = str(folder)  # prepared data are read where they are
    assert sources.open_source(synthetic, "validation", silent).fingerprint == source.fingerprint


def own_data(data, split, progress):
    return rows([2, 1]) if split == "train" else rows([1])


def test_a_source_of_the_users_own(synthetic):
    synthetic.name = f"{__name__}:own_data"
    assert len(sources.open_source(synthetic, "train", silent)) == 3
    synthetic.name = f"{__name__}:none_such"
    with pytest.raises(UserError, match="has no 'none_such'"):
        sources.open_source(synthetic, "train", silent)


class Plain:
    """Not derived from RecordSource."""

    def __init__(self):
        self.fingerprint = "plain"

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return Record(b"", f"{index}", index, f"question {index}", f"answer {index}")

    def image_numbers(self):
        return np.arange(2)


def test_an_object_with_the_methods_of_a_source(monkeypatch):
    monkeypatch.setattr(sources, "own", lambda data, split: Plain(), raising=False)
    source = sources.open_source(SimpleNamespace(name=f"{sources.__name__}:own"), "train", None)
    assert isinstance(source, RecordSource)
    assert (len(source), source.fingerprint, source.image_numbers().tolist()) == (2, "plain", [0, 1])
    assert source[1].image_index == 1 and source.texts(1) == ("question 1", "answer 1")


class Unnamed(RecordSource):
    """Derived from RecordSource, without a fingerprint."""

    __len__, __getitem__, image_numbers = Plain.__len__, Plain.__getitem__, Plain.image_numbers


class Dicts(Rows):
    def __getitem__(self, index):
        return {"prefix": "a"}


@pytest.mark.parametrize(
    "function, sentence",
    [
        (lambda data: None, "takes (data), expected (data, split, progress): correct it"),
        (
            lambda data, split, progress: None,
            "returned NoneType, expected a RecordSource (paligemma_jax/data/records.py), or an object with its",
        ),
        (
            lambda data, split, progress: [1],
            "returned list, expected a RecordSource",
        ),
        (lambda data, split, progress: Unnamed(), "returned Unnamed, expected a RecordSource"),
        (lambda data, split, progress: Rows([]), "returned no rows, expected at least one: correct the function"),
        (lambda data, split, progress: Dicts([1]), "returned rows of dict, expected Record"),
    ],
)
def test_a_function_that_returns_no_records(monkeypatch, function, sentence):
    monkeypatch.setattr(sources, "own", function, raising=False)
    with pytest.raises(UserError, match=re.escape(f"data.name='{sources.__name__}:own' {sentence}")):
        sources.open_source(SimpleNamespace(name=f"{sources.__name__}:own"), "train", None)


@pytest.mark.parametrize(
    "function", [lambda data, split, progress: rows([1, 2]), lambda data, split: rows([1, 2])], ids=["three", "two"]
)
def test_a_function_of_ones_own(monkeypatch, function):
    monkeypatch.setattr(sources, "own", function, raising=False)
    data = SimpleNamespace(name=f"{sources.__name__}:own")
    assert len(sources.open_source(data, "train", None)) == 3
