import itertools
import signal
import threading

import numpy as np
import pytest

from train_jax.core.data_source import DataSource
from train_jax.core.errors import UserError
from train_jax.data.pipeline import Pipeline

N = 23  # no multiple of any batch below


class Numbers(DataSource):
    """Example i has the number i and an array filled with i."""

    def __init__(self, size=N):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return {"id": np.int64(index), "row": np.full(3, index, np.float32)}


def pipeline(**changes):
    options = dict(batch_size=8, micro_batch=None, num_steps=12, seed=5, threads=2)
    return Pipeline(Numbers(), **(options | changes))


def ids(batches):
    return np.stack([batch["id"] for batch in batches])


def reference():
    return ids(pipeline().iterate()).reshape(12, 8)


def test_each_epoch_is_a_new_permutation():
    stream = ids(Pipeline(Numbers(), batch_size=N, num_steps=4, seed=1).iterate()).reshape(4, N)
    for epoch in stream:
        assert sorted(epoch) == list(range(N))
    for one, other in itertools.combinations(stream, 2):
        assert (one != other).any()


def test_epochs_are_shuffled_across_batches():
    stream = reference().ravel()
    assert sorted(stream[:N]) == list(range(N))
    assert sorted(stream[N : 2 * N]) == list(range(N))


def test_the_order_depends_on_the_seed():
    assert (ids(pipeline(seed=5).iterate()) == ids(pipeline(seed=5).iterate())).all()
    # No epoch of a seed equals an epoch of the next seed, as it would with order(seed + epoch).
    orders = [ids(Pipeline(Numbers(), N, num_steps=3, seed=seed).iterate()).reshape(3, N) for seed in (5, 6)]
    assert all((one != other).any() for one in orders[0] for other in orders[1])


def test_without_shuffle_the_order_repeats():
    stream = ids(pipeline(shuffle=False).iterate()).ravel()
    assert (stream == np.arange(12 * 8) % N).all()


def test_arrays_of_one_example_stay_together():
    for batch in pipeline(micro_batch=4).iterate():
        assert batch["row"].shape == (2, 4, 3) and batch["row"].dtype == np.float32
        assert (batch["row"] == batch["id"][..., None]).all()


@pytest.mark.parametrize("micro_batch, processes", [(8, 1), (4, 1), (2, 2), (8, 2), (4, 4), (8, 8)])
def test_global_batches_do_not_depend_on_micro_batch_or_processes(micro_batch, processes):
    parts = [
        ids(pipeline(micro_batch=micro_batch, process_index=p, process_count=processes).iterate())
        for p in range(processes)
    ]
    assert parts[0].shape == (12, 8 // micro_batch, micro_batch // processes)  # [step, A, b_local]
    assert (np.concatenate(parts, axis=2).reshape(12, 8) == reference()).all()


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_order_does_not_depend_on_threads(threads):
    assert (ids(pipeline(threads=threads).iterate()).reshape(12, 8) == reference()).all()


@pytest.mark.slow
def test_order_does_not_depend_on_workers():
    batches = pipeline(workers=2).iterate(start_step=5)
    try:
        assert (ids(batches).reshape(7, 8) == reference()[5:]).all()
    finally:
        batches.close()


class Marked(Numbers):
    """Every fifth row is bad; counts of a copy in a worker process are lost."""

    def __init__(self, size=N):
        super().__init__(size)
        self.counted = []

    def __getitem__(self, index):
        return super().__getitem__(index) | {"bad": np.bool_(index % 5 == 0)}

    def on_rows(self, indices, bad):
        self.counted += zip(indices.tolist(), bad.tolist(), strict=True)


@pytest.mark.parametrize(
    "options", [{}, {"micro_batch": 4, "threads": 0}, pytest.param({"workers": 2}, marks=pytest.mark.slow)]
)
def test_rows_are_counted_when_their_batch_is_used(options):
    """Prefetched rows do not count, in any process."""
    source = Marked()
    batches = Pipeline(source, **dict(batch_size=8, num_steps=12, seed=5, threads=2) | options).iterate(start_step=3)
    try:
        for step in range(3, 9):
            assert next(batches).keys() == {"id", "row"}
            rows = reference()[3 : step + 1].ravel().tolist()
            assert source.counted == [(row, row % 5 == 0) for row in rows]
    finally:
        batches.close()


def test_batch_at_does_not_count_rows():
    source = Marked()
    assert Pipeline(source, 8, num_steps=2).batch_at(1).keys() == {"id", "row"} and not source.counted


class Handlers(Numbers):
    """Examples have the reading process's handler of Ctrl-C."""

    def __getitem__(self, index):
        return {"ignores": np.bool_(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)}


@pytest.mark.slow
def test_workers_ignore_ctrl_c():
    """A terminal sends Ctrl-C to workers too, and the run still needs their rows."""
    batches = Pipeline(Handlers(), 4, num_steps=1, workers=1).iterate()
    try:
        assert next(batches)["ignores"].all()
    finally:
        batches.close()


def test_a_source_that_cannot_be_pickled_is_refused():
    source = Numbers()
    source.lock = threading.Lock()
    with pytest.raises(UserError) as error:
        Pipeline(source, 4, num_steps=1, workers=1).iterate()
    assert str(error.value) == (
        "data.workers is above 0, and the training data cannot be sent to worker processes (TypeError: cannot pickle "
        "'_thread.lock' object): set data.workers=0 to read with threads, or make the source picklable"
    )


@pytest.mark.parametrize("start", [0, 1, 3, 11])
def test_seek_continues_the_stream(start):
    assert (ids(pipeline().iterate(start)).reshape(-1, 8) == reference()[start:]).all()


def test_batch_at_equals_iteration():
    one = pipeline()
    assert all((one.batch_at(step)["id"] == batch["id"]).all() for step, batch in enumerate(one.iterate()))


def test_seek_reads_only_what_it_returns():
    read = []

    class Counting(Numbers):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    batch = Pipeline(Counting(), 8, num_steps=10**9).batch_at(10**8)
    assert read == batch["id"].ravel().tolist()


def test_resuming_after_the_last_step_yields_no_batches():
    assert list(pipeline().iterate(12)) == []


def test_prefetching_is_bounded():
    read, lock = [], threading.Lock()

    class Counting(Numbers):
        def __getitem__(self, index):
            with lock:
                read.append(index)
            return super().__getitem__(index)

    batches = Pipeline(Counting(), 8, num_steps=1000, threads=2).iterate()
    next(batches)
    batches.close()
    assert len(read) <= (1 + 3) * 8  # the batch itself, and threads + 1 more


def test_wait_is_measured():
    release = threading.Event()

    class Slow(Numbers):
        def __getitem__(self, index):
            release.wait(0.05)
            return super().__getitem__(index)

    batches = Pipeline(Slow(), 4, num_steps=2, threads=0).iterate()
    next(batches)
    slow = batches.wait_seconds
    assert 0.19 < slow < 5  # four rows of 0.05 s
    release.set()
    next(batches)
    assert batches.wait_seconds < slow


def test_the_fingerprint_depends_on_the_stream_only():
    base = pipeline().fingerprint
    assert pipeline(micro_batch=2, threads=0, process_count=2, num_steps=99).fingerprint == base
    for change in ({"seed": 6}, {"batch_size": 4}, {"shuffle": False}):
        assert pipeline(**change).fingerprint != base
    assert Pipeline(Numbers(N + 1), 8, num_steps=12, seed=5).fingerprint != base


def test_the_fingerprint_includes_that_of_the_source():
    source = Numbers()
    source.fingerprint = "v1"
    assert Pipeline(source, 8, num_steps=1).fingerprint["source"] == "v1"


def test_errors_of_the_source_are_raised():
    class Broken(Numbers):
        def __getitem__(self, index):
            raise UserError("row 3 of x.jsonl is bad")

    with pytest.raises(UserError, match="row 3 of x.jsonl is bad"):
        next(Pipeline(Broken(), 4, num_steps=2).iterate())


def test_ragged_examples_are_named():
    class Ragged(Numbers):
        def __getitem__(self, index):
            return {"id": np.int64(index), "row": np.zeros(index)}

    with pytest.raises(ValueError, match="for 'row', expected one shape"):
        Pipeline(Ragged(), 4, num_steps=1).batch_at(0)


class Grouped(Numbers):
    """Examples have the arguments with which they were read."""

    def __init__(self, group):
        super().__init__()
        self.group, self.read = group, []

    def get_batch(self, indices, step, rows):
        self.read.append(len(rows))
        size = self.group or len(rows)
        first = rows // size * size
        return {
            "id": indices,
            "row": rows,
            "mates": np.stack([indices[np.isin(rows // size * size, k)] for k in first]),
        }


@pytest.mark.parametrize(("group", "read"), [(1, 2), (2, 4), (4, 8), (None, 8)])
def test_rows_of_a_group_are_read_together(group, read):
    """Two micro-batches of four rows over four processes: each process has one row of each."""
    source = Grouped(group)
    whole = Pipeline(source, 8, num_steps=4, seed=5).batch_at(3)
    assert source.read == [8] and (whole["row"] == np.arange(8)).all() and (whole["id"][0] == reference()[3]).all()
    parts = []
    for process in range(4):
        pipeline = Pipeline(source, 8, 4, num_steps=4, seed=5, process_index=process, process_count=4)
        parts.append(pipeline.batch_at(3))
        assert (pipeline.rows_at(3) == parts[-1]["id"]).all()
    assert source.read[1:] == [read] * 4
    for name, values in whole.items():
        result = np.concatenate([part[name] for part in parts], axis=1).reshape(values.shape)
        np.testing.assert_array_equal(result, values)


def test_groups_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(UserError, match="batch_size=8 does not divide into groups of 3 rows, in which the training"):
        Pipeline(Grouped(3), 8, num_steps=1)


def test_impossible_batches_are_refused():
    with pytest.raises(UserError, match="batch_size=8 does not divide into micro-batches of 3"):
        pipeline(micro_batch=3)
    with pytest.raises(UserError, match="a batch of 8 does not divide over 3 processes"):
        pipeline(process_count=3)
    with pytest.raises(UserError, match="the training data has no examples"):
        Pipeline(Numbers(0), 4, num_steps=1)


class Together(Numbers):
    """Reads all examples of a step at once, in the order of their indices."""

    def get_batch(self, indices, step, rows):
        return {"id": np.sort(indices), "step": np.full(len(indices), step)}


def test_a_source_may_read_all_examples_of_a_step_at_once():
    batches = list(Pipeline(Together(), 8, 4, num_steps=12, seed=5).iterate(3))
    assert len(batches) == 9
    for step, batch in enumerate(batches, start=3):
        assert (batch["id"].ravel() == np.sort(reference()[step])).all() and batch["id"].shape == (2, 4)
        assert (batch["step"] == step).all()
