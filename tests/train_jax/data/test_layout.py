"""Shapes and places of examples of different lengths, and the batches that the pipeline makes of them."""

import numpy as np
import pytest

from train_jax.core.data_source import BAD, POSITIONS, ROW, SLOTS, DataSource, Lengths
from train_jax.core.errors import UserError
from train_jax.data.layout import Layout
from train_jax.data.pipeline import Pipeline

CONTEXT, LIMIT = 16, 64


def lengths_of(**changes) -> Lengths:
    return Lengths(**{"context": CONTEXT, "limit": LIMIT, "shapes": 2} | changes)


def steps(count: int, batch: int = 32, seed: int = 0) -> np.ndarray:
    """Numbers of tokens of which most are small and some large."""
    return np.minimum(np.random.default_rng(seed).geometric(0.1, (count, batch)), LIMIT)


def test_a_step_takes_the_shortest_bucket_that_its_longest_example_fits_in():
    layout = Layout(lengths_of(), (1, 1, 2), np.array([7] * 8 + [25]))
    # What all of the sample fit in, and what saves most beside it.
    assert [tuple(shape) for shape in layout.shapes] == [(2, 24, 8), (2, 48, 32), (2, 80, 64)]
    for longest, length in ((1, 24), (8, 24), (9, 48), (32, 48), (33, 80), (64, 80)):
        laid_out = layout.for_step(np.array([1, longest]))
        assert laid_out.shape.length == length and laid_out.slots is None
        assert laid_out.numbers.tolist() == [[[0, 1]]]
    with pytest.raises(UserError, match="an example has 65 tokens, expected at most 64"):
        layout.for_step(np.array([1, 65]))


def test_a_shape_that_saves_little_is_not_chosen():
    assert len(Layout(lengths_of(), (1, 1, 2), np.array([60, 50])).shapes) == 1
    assert len(Layout(lengths_of(shapes=0), (1, 1, 2), np.array([1])).shapes) == 1
    one = Layout(lengths_of(shapes=1), (1, 1, 2), np.array([7] * 8 + [25]))
    assert [shape.tokens for shape in one.shapes] == [32, 64]


@pytest.mark.parametrize("size", [(1, 1, 32), (2, 4, 4), (4, 1, 8)])
def test_packed_examples_have_places_of_their_own(size):
    A, G, g = size
    layout = Layout(lengths_of(packed=True), size, steps(16).ravel())
    for tokens in steps(8, seed=1):
        shape, numbers, slots, positions = layout.for_step(tokens)
        assert sorted(numbers.ravel()) == list(range(32)) and numbers.shape == size
        assert slots.shape == (A, G, shape.rows, shape.length)
        width = CONTEXT + shape.tokens
        for group, slot, place in zip(numbers.reshape(-1, g), slots.reshape(A * G, -1),
                                      positions.reshape(A * G, g, width), strict=True):  # fmt: skip
            for example, number in enumerate(group):
                real = CONTEXT + tokens[number]
                assert (place[example, real:] == -1).all()
                run = place[example, :real]
                assert (np.diff(run) == 1).all() and run[0] // shape.length == run[-1] // shape.length  # one row
                assert (slot[run] == example * width + np.arange(real)).all()  # the inverse
            assert (slot >= 0).sum() == (CONTEXT + tokens[group]).sum()


def test_packing_leaves_little_padding():
    """Also on lengths with a long tail, and over micro-batches and devices."""
    for size in ((1, 1, 32), (2, 2, 8)):
        layout = Layout(lengths_of(packed=True, context=64, shapes=4), size, steps(32).ravel())
        placed = [(tokens, layout.for_step(tokens)) for tokens in steps(32, seed=2)]
        real = sum((64 + tokens).sum() for tokens, _ in placed)
        assert real > 0.93 * sum(laid_out.slots.size for _, laid_out in placed)
        assert len({laid_out.shape for _, laid_out in placed}) <= 4


def test_long_rows_cost_their_attention():
    rows = [
        Layout(lengths_of(packed=True, quadratic=q), (1, 1, 32), steps(16).ravel()).shapes[0].length for q in (0.0, 1.0)
    ]
    assert rows[1] < rows[0]


class Words(DataSource):
    """Example i has 1 + i % 40 tokens, all of them i; every fifth is bad."""

    def __init__(self, packed: bool):
        self.lengths, self.counted = lengths_of(packed=packed), []

    def __len__(self):
        return 90

    def __getitem__(self, index):
        return {"tokens": np.where(np.arange(LIMIT) < 1 + index % 40, index, -1), BAD: np.bool_(index % 5 == 0)}

    def lengths_of(self, indices):
        return 1 + indices % 40

    def trim(self, batch, length):
        return batch | {"tokens": batch["tokens"][:, :length]}

    def on_rows(self, indices, bad):
        self.counted += zip(indices.tolist(), bad.tolist(), strict=True)


OPTIONS = dict(batch_size=16, num_steps=6, seed=3, threads=0)


def plain() -> Pipeline:
    return Pipeline(Words(packed=False), micro_batch=None, **OPTIONS)


@pytest.mark.parametrize("packed", [False, True])
def test_a_step_holds_the_examples_that_it_holds_otherwise(packed):
    """With the same numbers, whatever the micro-batches, devices and processes; over the end of an epoch."""
    for micro, devices, processes in ((16, 1, 1), (8, 2, 1), (8, 4, 2), (4, 4, 4)):
        pipelines = [
            Pipeline(Words(packed), micro_batch=micro, devices=devices, process_index=p, process_count=processes,
                     **OPTIONS) for p in range(processes)
        ]  # fmt: skip
        for step in (0, 5):
            parts = [pipeline.batch_at(step) for pipeline in pipelines]
            batch = {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}
            assert (SLOTS in batch) == (ROW in batch) == packed
            numbers = batch[ROW].ravel() if packed else np.arange(16)
            assert sorted(numbers) == list(range(16)) and batch["tokens"].shape[:2] == (16 // micro, micro)
            indices = plain().rows_at(step).ravel()[numbers]
            tokens = batch["tokens"].reshape(16, -1)
            assert (tokens.max(1) == indices).all() and ((tokens >= 0).sum(1) == 1 + indices % 40).all()


def test_packed_batches_are_read_on_from_any_step():
    make = lambda: Pipeline(Words(True), micro_batch=8, devices=2, **OPTIONS)  # noqa: E731
    whole = list(make().iterate())
    for step, batch in enumerate(make().iterate(start_step=3), start=3):
        assert batch.keys() == whole[step].keys() == {"tokens", ROW, SLOTS, POSITIONS}
        assert all((batch[name] == whole[step][name]).all() for name in batch)


def test_bad_rows_of_packed_batches_are_counted_by_their_index():
    pipeline = Pipeline(Words(True), micro_batch=8, devices=2, **OPTIONS)
    next(iter(pipeline.iterate()))
    counted = pipeline.source.counted
    assert sorted(index for index, _ in counted) == sorted(plain().rows_at(0).ravel().tolist())
    assert all(bad == (index % 5 == 0) for index, bad in counted)


def test_a_source_with_lengths_and_without_trim_is_refused():
    class Without(Words):
        trim = DataSource.trim

    class Former(Without):
        def cut(self, batch, length): ...

    for source, change in ((Without(False), "add it"), (Former(False), "rename its method cut")):
        with pytest.raises(UserError, match=f"has `lengths`, expected a method trim: {change}"):
            Pipeline(source, **OPTIONS).batch_at(0)
