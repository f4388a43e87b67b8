"""Input pipeline: turns a random-access source into a stream of batches that is a pure function of (seed, step).

The global batches, and the examples that a source makes from a row (DataSource.get_batch), do not depend on the number
of processes, workers or threads, nor on the micro-batch:

    position k of the stream = step * batch_size + row,    example = order(seed, k)

where `order` is grain's global shuffle, a new permutation in every epoch, computed one step at a time (shuffle.py).
Examples of different lengths are laid out in one of a few shapes (layout.py), where the batch holds their rows as ROW.
Seeking to any step is free, and a run resumes from the step alone (grain's iterator state is invalid when the number of
workers changes). Axes: A micro-batches, b rows of a micro-batch.
"""

import math
import os
import signal
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import grain
import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from train_jax.core.data_source import BAD, POSITIONS, ROW, SLOTS, Batch, DataSource
from train_jax.core.errors import UserError
from train_jax.data.layout import SAMPLE, Layout
from train_jax.data.shuffle import Order
from train_jax.parallel.sharding import local_rows, mesh_shape


class Batches(Iterator[Batch]):
    """An iterator over batches that are prefetched in the background.

    Attributes:
      wait_seconds: time that the latest `next()` waited for its batch; near 0 if the input keeps up.
    """

    def __init__(self, batches: "_StepBatches", threads: int, workers: int):
        # Prefetches one batch more than there are threads, so memory does not grow with the size of the source.
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1 if threads else 0)
        dataset = grain.MapDataset.source(batches).to_iter_dataset(options)
        if workers:
            # grain's workers read absl's global flags, which are not parsed in a notebook or in pytest.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            _check_picklable(batches)
            dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers), _ignore_ctrl_c)
        self._iterator, self._batches, self._next = iter(dataset), batches, 0
        self.wait_seconds = 0.0

    def __next__(self) -> Batch:
        start = time.perf_counter()
        batch = next(self._iterator)
        self.wait_seconds = time.perf_counter() - start
        self._next += 1
        return self._batches.count_rows(self._next - 1, batch)

    def close(self) -> None:
        """Stops prefetching and ends the threads and workers."""
        self._iterator.close()


class _StepBatches:
    """Random access to the batches of steps `start`, `start + 1`, ... of one process."""

    def __init__(self, pipeline: "Pipeline", start: int):
        self._pipeline = pipeline
        self._start = start

    def __len__(self) -> int:
        return self._pipeline.num_steps - self._start

    def __getitem__(self, index: int) -> Batch:
        return self._pipeline.read(self._start + index)

    def count_rows(self, index: int, batch: Batch) -> Batch:
        """Passes the marks of bad rows to the source, which may raise; returns the batch without them."""
        bad = batch.pop(BAD, None)
        if bad is not None:
            indices = self._pipeline.rows_at(self._start + index, batch.get(ROW))
            self._pipeline.source.on_rows(indices.ravel(), bad.ravel())
        return batch


class Pipeline:
    """The training batches of one process: {name: [A, b_local, ...]}, shuffled, across epochs without a gap.

    Attributes:
      source: the examples.
      num_steps: number of updates, after which iteration ends.
      micro_batch: b, rows of a micro-batch over all processes.
    """

    def __init__(
        self,
        source: DataSource,
        batch_size: int,
        micro_batch: int | None = None,
        *,
        num_steps: int,
        seed: int = 0,
        shuffle: bool = True,
        threads: int = 2,
        workers: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        devices: int = 1,
    ):
        """Prepares the stream without reading examples.

        Args:
          source: the examples.
          batch_size: examples of one update, over all micro-batches and processes.
          micro_batch: examples computed at once over all processes, a divisor of `batch_size`; None = all.
          num_steps: number of updates.
          seed: of the shuffle.
          shuffle: False repeats the source in order.
          threads: threads of this process (or of each worker) that prefetch batches; 0 reads on demand.
          workers: processes that read; 0 reads in this process, which is faster unless decoding holds the GIL.
          process_index: index of this process.
          process_count: number of processes that share every batch.
          devices: number of parts into which the mesh splits rows; packed rows are divided among them.

        Raises:
          UserError: the source is empty, or the batch does not divide into micro-batches, processes and groups.
        """
        if not len(source):
            raise UserError("the training data has no examples, expected at least one: check config.data")
        self.micro_batch = micro_batch or batch_size
        if batch_size % self.micro_batch:
            raise UserError(
                f"batch_size={batch_size} does not divide into micro-batches of {micro_batch}: "
                f"choose a micro_batch that divides it"
            )
        self.num_steps = num_steps
        self.source = source
        self._batch_size, self._seed, self._shuffle = batch_size, seed, shuffle
        self._threads, self._workers = threads, workers
        rows = local_rows(process_index, process_count, self.micro_batch)
        self._rows = np.arange(batch_size).reshape(-1, self.micro_batch)[:, rows]  # [A, b_local] of the global batch
        self._read_rows = _whole_groups(self._rows, batch_size, self.source.group)
        self._order = Order(len(source), seed if shuffle else None)
        groups = math.lcm(devices, process_count)
        self._groups = local_rows(process_index, process_count, groups)  # those of this process
        self._layout = self._make_layout(groups)

    def _make_layout(self, groups: int) -> Layout | None:
        """Chooses the shapes of batches by the lengths of the first examples, see layout.py."""
        if self.source.lengths is None:
            return None
        sample = self.source.lengths_of(self._order.at(np.arange(min(SAMPLE, len(self.source)))))
        micro_batches = self._batch_size // self.micro_batch
        layout = Layout(self.source.lengths, (micro_batches, groups, self.micro_batch // groups), sample)
        return layout if len(layout.shapes) > 1 else None  # the lengths of further examples need not be counted

    def iterate(self, start_step: int = 0) -> Batches:
        """Returns an iterator over the batches of steps `start_step` ... `num_steps` - 1."""
        return Batches(_StepBatches(self, start_step), self._threads, self._workers)

    def batch_at(self, step: int) -> Batch:
        """Reads the batch of one step without counting its bad rows: {name: [A, b_local, ...]}."""
        return {name: values for name, values in self.read(step).items() if name != BAD}

    def read(self, step: int) -> Batch:
        """Reads the batch of one step, with the marks of bad rows."""
        if self._layout is not None:
            return self._laid_out(step, self._layout)
        batch, shape = self._examples(step, self._read_rows), self._rows.shape
        if len(self._read_rows) > self._rows.size:  # some groups are shared with other processes
            own = np.searchsorted(self._read_rows, self._rows.ravel())
            batch = {name: values[own] for name, values in batch.items()}
        return {name: values.reshape(shape + values.shape[1:]) for name, values in batch.items()}

    def _laid_out(self, step: int, layout: Layout) -> Batch:
        """Reads the batch of one step in the shape that the lengths of its examples ask for."""
        assert self.source.group == 1, "examples of different lengths are read one by one"
        laid_out = layout.for_step(self.source.lengths_of(self._indices(step)))
        own = laid_out.numbers[:, self._groups]  # [A, G_local, g]
        order = np.argsort(own.ravel())
        batch = self._examples(step, own.ravel()[order])
        batch = {name: values[np.argsort(order)] for name, values in batch.items()}
        batch = self.source.trim(batch, laid_out.shape.tokens)
        batch_shape = (len(own), own[0].size)  # [A, b_local]
        batch = {name: values.reshape(batch_shape + values.shape[1:]) for name, values in batch.items()}
        if laid_out.slots is None or laid_out.positions is None:
            return batch
        positions = laid_out.positions[:, self._groups]
        return batch | {
            ROW: own.reshape(batch_shape).astype(np.int32),
            SLOTS: laid_out.slots[:, self._groups],
            POSITIONS: positions.reshape(*batch_shape, -1),
        }

    def _examples(self, step: int, rows: np.ndarray) -> Batch:
        """Reads some examples of a step, [n, ...]."""
        return self.source.get_batch(self._indices(step, rows), step, rows)

    def _indices(self, step: int, rows: np.ndarray | None = None) -> np.ndarray:
        """Returns the source indices of some rows of the global batch of a step; None: of all."""
        return self._order.at(step * self._batch_size + (np.arange(self._batch_size) if rows is None else rows))

    def rows_at(self, step: int, rows: np.ndarray | None = None) -> np.ndarray:
        """Returns the source indices of this process's rows of one step, int [A, b_local].

        Args:
          step: of the run.
          rows: `ROW` of a batch whose examples are packed.
        """
        return self._indices(step, self._rows if rows is None else rows)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Everything that determines the stream, as JSON; a run may only resume with an equal fingerprint.

        Includes a checksum of the first indices, to detect a change of the shuffle, and the source's `fingerprint`.
        """
        head = self._order.at(np.arange(min(len(self.source), 256)))
        return {
            "examples": len(self.source),
            "batch_size": self._batch_size,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "order": zlib.crc32(head.tobytes()),
            "source": self.source.fingerprint,
        }


def _whole_groups(rows: np.ndarray, batch_size: int, group: int | None) -> np.ndarray:
    """Returns the rows of a batch that share a group with any of `rows`, ascending; see DataSource.get_batch."""
    group = group or batch_size
    if batch_size % group:
        raise UserError(
            f"batch_size={batch_size} does not divide into groups of {group} rows, in which the training data are "
            "read: choose a group that divides it"
        )
    return (np.unique(rows // group)[:, None] * group + np.arange(group)[None]).ravel()


def _ignore_ctrl_c(worker_index: int, worker_count: int) -> None:
    """Makes a worker ignore Ctrl-C, which a terminal sends to all processes: the run still needs rows for its step."""
    del worker_index, worker_count
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _check_picklable(batches: _StepBatches) -> None:
    """Raises UserError if the source cannot be pickled for worker processes, which grain does with cloudpickle."""
    try:
        with Path(os.devnull).open("wb") as null:
            cloudpickle.dump(batches, null)
    except Exception as error:  # a class may raise any exception
        raise UserError(
            f"data.workers is above 0, and the training data cannot be sent to worker processes "
            f"({type(error).__name__}: {error}): set data.workers=0 to read with threads, or make the source picklable"
        ) from error


def training_batches(config: ConfigDict, source: DataSource, num_steps: int) -> Pipeline:
    """Returns the pipeline of this process for a run's training batches."""
    processes = jax.process_count()
    mesh = mesh_shape(config.mesh, jax.device_count(), processes)
    return Pipeline(
        source,
        config.batch_size,
        config.micro_batch,
        seed=config.seed,
        num_steps=num_steps,
        threads=config.data.threads,
        workers=config.data.workers,
        process_index=jax.process_index(),
        process_count=processes,
        devices=mesh["data"] * mesh["fsdp"],
    )
