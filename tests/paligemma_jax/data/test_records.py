import dataclasses
import itertools
import pickle
from concurrent.futures import ThreadPoolExecutor

import grain
import numpy as np
import pytest

from paligemma_jax.data.records import BadRow, GuardedSource, Record, RecordSource, Subset, blank_record, fingerprint_of
from paligemma_jax.images.preprocessing import Preprocessing
from train_jax.core.errors import UserError


class Rows(RecordSource):
    """n rows; those in `unreadable` raise, those in `undecodable` have broken image bytes."""

    def __init__(self, n, image, unreadable=(), undecodable=(), fingerprint="rows"):
        self.n, self.image, self.unreadable, self.undecodable = n, image, set(unreadable), set(undecodable)
        self.fingerprint = fingerprint

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if i in self.unreadable:
            raise BadRow(f"line {i} is malformed")
        image = self.image[:40] if i in self.undecodable else self.image
        return Record(image, f"{i}.png", i // 2, f"question {i}", "answer")

    def image_numbers(self):
        return np.arange(self.n) // 2


def prepare(record):
    image = Preprocessing.big_vision(4).apply(Preprocessing.decode(record.image))
    return {"image": image, "length": np.int32(len(record.prefix))}


def take(guarded, indices):
    """Reads rows and counts them, as a run does."""
    examples = [guarded[i] for i in indices]
    guarded.on_rows(indices, [example["bad"] for example in examples])
    return examples


@pytest.fixture
def image(make_png):
    return make_png(0)


def test_subset_is_a_seeded_sample_of_rows_without_repetition(image):
    rows = Rows(1000, image)
    subset = Subset(rows, fraction=0.1, seed=42)
    assert len(subset) == 100 == len(set(subset.indices.tolist()))
    # Pinned: the subset of a published run must never change. PCG64's raw stream is guaranteed by numpy.
    assert subset.indices[:8].tolist() == [743, 740, 997, 810, 646, 774, 422, 594]
    assert subset[3] == rows[int(subset.indices[3])]
    np.testing.assert_array_equal(Subset(rows, fraction=0.1, seed=42).indices, subset.indices)
    assert set(Subset(rows, fraction=0.1, seed=43).indices) != set(subset.indices)


def test_larger_fraction_of_one_seed_extends_the_smaller(image):
    small, large = (Subset(Rows(997, image), fraction=f, seed=1).indices for f in (0.05, 0.4))
    np.testing.assert_array_equal(large[: len(small)], small)


def test_whole_fraction_is_a_permutation_and_a_tiny_one_keeps_a_row(image):
    assert sorted(Subset(Rows(51, image), fraction=1.0).indices) == list(range(51))
    assert len(Subset(Rows(51, image), fraction=1e-6)) == 1


def test_subset_is_uniform_over_rows(image):
    counts = np.zeros(20)
    for seed in range(2000):
        counts[Subset(Rows(20, image), fraction=0.25, seed=seed).indices] += 1
    # Each row is drawn with probability 1/4: 500 +- 19.4 of 2000; five standard deviations.
    assert np.abs(counts - 500).max() < 97


def test_subset_by_indices_keeps_their_order_and_bounds(image):
    rows = Rows(10, image)
    subset = Subset(rows, indices=[7, 2, 7])
    assert [subset[i].prefix for i in range(3)] == ["question 7", "question 2", "question 7"]
    assert subset[-1].prefix == "question 7"
    with pytest.raises(IndexError):
        subset[3]


def test_texts_of_a_subset_are_those_of_its_source(image):
    rows = Rows(10, image, unreadable=[3])
    subset = Subset(rows, indices=[7, 3])
    assert rows.texts(7) == subset.texts(0) == ("question 7", "answer") and subset.suffix(-2) == "answer"
    with pytest.raises(BadRow, match="line 3"):
        subset.suffix(1)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"fraction": 0.5, "indices": [1]},
        {"fraction": 0.0},
        {"fraction": 1.5},
        {"indices": [10]},
        {"indices": [-1]},
        {"indices": []},
    ],
)
def test_subset_refuses_invalid_arguments(image, arguments):
    with pytest.raises(UserError, match="expected"):
        Subset(Rows(10, image), **arguments)


def test_fingerprint_depends_on_rows_seed_fraction_and_source(image):
    rows = Rows(100, image)
    variants = [
        Subset(rows, fraction=0.1, seed=1),
        Subset(rows, fraction=0.1, seed=2),
        Subset(rows, fraction=0.2, seed=1),
        Subset(Rows(100, image, fingerprint="others"), fraction=0.1, seed=1),
        Subset(rows, indices=[1, 2]),
        Subset(rows, indices=[2, 1]),
    ]
    assert len({v.fingerprint for v in variants}) == len(variants)
    assert Subset(rows, fraction=0.1, seed=1).fingerprint == variants[0].fingerprint
    assert fingerprint_of(a=1, b="x") == fingerprint_of(b="x", a=1) != fingerprint_of(a=2, b="x")


def test_bad_rows_keep_their_slot_with_weight_zero(image, caplog):
    guarded = GuardedSource(Rows(10, image, unreadable=[3], undecodable=[5]), prepare, max_bad_fraction=0.5)
    examples = take(guarded, range(10))
    assert [float(e["weight"]) for e in examples] == [1, 1, 1, 0, 1, 0, 1, 1, 1, 1]
    assert [bool(e["bad"]) for e in examples] == [e["weight"] == 0 for e in examples]
    assert all(e["image"].shape == (4, 4, 3) and e["weight"].dtype == np.float32 for e in examples)
    np.testing.assert_array_equal(examples[3]["image"], -1.0)  # black
    np.testing.assert_array_equal(examples[4]["image"], prepare(Rows(10, image)[4])["image"])
    assert guarded.bad_rows == {3: "row 3", 5: "5.png"}


def test_each_bad_row_is_logged_once_by_name(image, caplog):
    guarded = GuardedSource(Rows(10, image, undecodable=[5]), prepare, max_bad_fraction=0.5)
    with caplog.at_level("WARNING", logger="absl"):
        for _ in range(3):
            guarded[5]
    assert [r.getMessage() for r in caplog.records if "5.png" in r.getMessage()] == [caplog.records[0].getMessage()]


def test_a_record_of_weight_zero_keeps_its_weight(image):
    class Weightless(Rows):
        def __getitem__(self, i):
            return dataclasses.replace(super().__getitem__(i), weight=0.0)

    example = GuardedSource(Weightless(1, image), prepare)[0]
    assert example["weight"] == 0 and not example["bad"]  # nothing is wrong with it


def test_raise_policy_stops_at_the_first_bad_row(image):
    guarded = GuardedSource(Rows(10, image, unreadable=[3]), prepare, on_error="raise")
    assert guarded[2]["weight"] == 1
    with pytest.raises(BadRow, match="line 3"):
        guarded[3]


def test_too_many_bad_rows_stop_the_run_naming_count_share_and_rows(image):
    guarded = GuardedSource(Rows(1000, image, undecodable=range(1000)), prepare, max_bad_fraction=0.1)
    take(guarded, range(19))
    with pytest.raises(UserError, match=r"20 of 20 rows .*100\.0%; first: 0\.png, 1\.png, 2\.png\).*at most 10\.0%"):
        take(guarded, range(19, 40))


def test_small_share_of_many_bad_rows_is_tolerated(image):
    guarded = GuardedSource(Rows(60, image, unreadable=range(30, 55)), prepare, max_bad_fraction=0.5)
    assert sum(example["weight"] for example in take(guarded, range(60))) == 35
    guarded.check()


def test_bad_rows_of_a_small_source_are_checked_after_its_first_epoch(image):
    guarded = GuardedSource(Rows(10, image, unreadable=[0, 1]), prepare, max_bad_fraction=0.1)
    take(guarded, range(9))
    with pytest.raises(UserError, match="2 of 10 rows"):
        take(guarded, [9])


def test_check_includes_an_epoch_that_ends_early(image):
    guarded = GuardedSource(Rows(10, image, unreadable=[0]), prepare, max_bad_fraction=0.1)
    guarded.check()
    take(guarded, [0])
    with pytest.raises(UserError, match="1 of 1 rows"):
        guarded.check()


def test_counts_are_exact_under_threads(image):
    bad = set(range(0, 400, 4))
    guarded = GuardedSource(Rows(400, image, unreadable=bad), prepare, max_bad_fraction=0.5)
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda start: take(guarded, range(start, start + 10)), range(0, 400, 10)))
    assert [float(example["weight"]) for part in parts for example in part] == [float(i not in bad) for i in range(400)]
    assert set(guarded.bad_rows) == bad
    assert guarded.bad_row_counts.seen == 400 and guarded.bad_row_counts.bad == 100


def test_bad_rows_read_by_copies_are_counted_with_their_names(image):
    """Like worker processes: each has a copy, reads its share, and counts nothing itself."""
    guarded = GuardedSource(Rows(40, image, unreadable=[3], undecodable=range(20, 40)), prepare, max_bad_fraction=0.1)
    copies = [pickle.loads(pickle.dumps(guarded)) for _ in range(2)]
    examples = [copies[i % 2][i] for i in range(40)]
    assert not any(copy.bad_rows for copy in copies) and not guarded.bad_rows
    with pytest.raises(UserError, match=r"20 of 39 rows read were bad \(51.3%; first: row 3, 20\.png, 21\.png\)"):
        guarded.on_rows(range(40), [example["bad"] for example in examples])


def test_other_exceptions_are_raised(image):
    def broken(record):
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        GuardedSource(Rows(3, image), broken)[0]
    with pytest.raises(IndexError):
        GuardedSource(Rows(3, image), prepare)[3]


def test_guarded_source_survives_pickling_with_its_counts(image):
    guarded = GuardedSource(Rows(10, image, unreadable=[3]), prepare, max_bad_fraction=0.5)
    take(guarded, [3])
    copy = pickle.loads(pickle.dumps(guarded))
    assert copy.bad_rows == {3: "row 3"} and copy.fingerprint == guarded.fingerprint
    assert copy[4]["weight"] == 1


@pytest.mark.parametrize("arguments", [{"on_error": "ignore"}, {"max_bad_fraction": 1.5}])
def test_unknown_policies_are_refused(image, arguments):
    with pytest.raises(UserError, match="expected"):
        GuardedSource(Rows(1, image), prepare, **arguments)


def test_blank_record_decodes_to_black():
    assert Preprocessing.decode(blank_record().image).tolist() == [[[0, 0, 0]]] and blank_record().weight == 0


def test_stream_is_a_function_of_the_step_also_with_bad_rows(image):
    def batches(unreadable):
        rows = Rows(24, image, unreadable=unreadable)
        dataset = grain.MapDataset.source(GuardedSource(rows, prepare_number, max_bad_fraction=1.0)).seed(7)
        dataset = dataset.shuffle().repeat().batch(4)
        return list(itertools.islice(dataset.to_iter_dataset(grain.ReadOptions(num_threads=4)), 12))

    def prepare_number(record):
        return {"row": np.array(int(record.image_name.split(".")[0] or -1))}

    clean, faulty = batches([]), batches([3, 11])
    for a, b in zip(clean, faulty, strict=True):
        np.testing.assert_array_equal(b["weight"], ~np.isin(a["row"], [3, 11]))
        np.testing.assert_array_equal(b["row"], np.where(b["weight"], a["row"], -1))
