"""Opens the data that a config names, and divides them: questions for training, tuning and reporting.

training    the subset `fraction` of the training split's questions, on images outside the tuning share
tuning      questions on a share of the training split's images that training never sees; selects the checkpoint
reported    the validation split
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

import numpy as np
from ml_collections import ConfigDict

from paligemma_jax.data.records import BadRow, Record, RecordSource, Subset
from train_jax.core.errors import UserError
from train_jax.core.import_path import check_arguments, named, takes

OPENERS = {
    "synthetic_clevr": "paligemma_jax.data.sources.synthetic:open_questions",
    "clevr": "paligemma_jax.data.sources.clevr:open_questions",
    "parquet": "paligemma_jax.data.sources.parquet:open_questions",
    "jsonl": "paligemma_jax.data.sources.jsonl:open_questions",
}
"""Short names of `data.name` for questions; it may also be the import path of an opener."""
WHOLE_PROMPTS = ("jsonl",)
"""Names of `data.name` whose rows are whole prompts, which `data.prompt` does not wrap. For a function of your own set
data.prompt="{question}"."""
# A description of the work -> context manager that yields on_progress(done, total).
Progress = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]
Opener = Callable[[ConfigDict, str, Progress], RecordSource]
"""Opens the records of a split: `open_split(data, split, progress)`; a user's own may leave out `progress`."""


def open_source(data: ConfigDict, split: str, progress: Progress, openers: Mapping[str, str] = OPENERS) -> RecordSource:
    """Returns all records of one split, opened by the function that `data.name` names.

    Args:
      data: the config's `data`: name, source, cache_dir, prompt, and for synthetic scenes their numbers.
      split: "train", "validation", "test", or another split of the source.
      progress: see tasks.common.progress.
      openers: {short name: import path of an `Opener`}; any other `data.name` is the import path itself.

    Raises:
      UserError: an unknown name, a function that takes other arguments or returns no records, a missing source, or
        data of another kind than the name says.
    """
    name = data.name
    function = named("data.name", name, openers)
    if takes(function, 2) and not takes(function, 3):
        source = function(data, split)
    else:
        check_arguments(f"data.name={name!r}", function, "data", "split", "progress")
        source = function(data, split, progress)
    if name in openers:
        return source
    if not isinstance(source, _Records):
        raise UserError(
            f"data.name={name!r} returned {type(source).__name__}, expected a RecordSource "
            "(paligemma_jax/data/records.py), or an object with its __len__, __getitem__, fingerprint and "
            "image_numbers: correct the function."
        )
    _check_first(name, source)
    return source if isinstance(source, RecordSource) else _OtherRecords(source)


@runtime_checkable
class _Records(Protocol):
    """What a user's object needs to be read as a RecordSource; also a RecordSource may lack a fingerprint."""

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def image_numbers(self) -> np.ndarray: ...


class _OtherRecords(RecordSource):
    """The records of a user's object that is not derived from RecordSource."""

    def __init__(self, records: _Records):
        self._records, self.fingerprint = records, records.fingerprint

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        return self._records[index]

    def image_numbers(self) -> np.ndarray:
        """Returns `image_index` of every row."""
        return self._records.image_numbers()


def _check_first(name: str, source: _Records) -> None:
    """Raises UserError if a source is empty or its first row is no Record; a row that cannot be read passes."""
    if not len(source):
        raise UserError(f"data.name={name!r} returned no rows, expected at least one: correct the function.")
    try:
        row = source[0]
    except (BadRow, OSError):
        return
    if not isinstance(row, Record):
        raise UserError(
            f"data.name={name!r} returned rows of {type(row).__name__}, expected Record "
            "(paligemma_jax/data/records.py): correct the function."
        )


def template_of(data: ConfigDict) -> str | None:
    """Returns the template that wraps questions into prompts, "{question}" for none; None for data without the key."""
    return "{question}" if data.get("name") in WHOLE_PROMPTS else data.get("prompt")


def own_source(data: ConfigDict) -> str:
    """Returns `data.source` of a config. Raises UserError if it is not set."""
    if data.source is None:
        raise UserError(f"data.name is {data.name!r} but data.source is not set: add --config.data.source=PATH.")
    return data.source


def training_and_tuning(source: RecordSource, data: ConfigDict) -> tuple[Subset, Subset]:
    """Divides a training split by image, then takes the subset of questions; a function of the seeds alone.

    Args:
      source: all questions of the training split.
      data: `tune_fraction` of the images (at least one, and not all) are for tuning, with at most `tune_examples` of
        their questions; `fraction` of the other images' questions (drawn with `subset_seed`) are for training.

    Raises:
      UserError: a single image, which cannot be divided.
    """
    numbers, images = np.unique(source.image_numbers(), return_inverse=True)
    if len(numbers) < 2:
        raise UserError(
            "the training data hold one image, expected at least two, one to train on and one to choose the "
            "checkpoint by: add images."
        )
    order = np.argsort(np.random.PCG64(data.subset_seed).random_raw(len(numbers)), kind="stable")
    tunes = np.zeros(len(numbers), bool)
    tunes[order[: min(max(1, round(data.tune_fraction * len(numbers))), len(numbers) - 1)]] = True
    rows = np.arange(len(source))
    train = Subset(source, indices=rows[~tunes[images]])
    tune = Subset(source, indices=rows[tunes[images]])
    share = min(1.0, data.tune_examples / len(tune))
    return Subset(train, data.fraction, seed=data.subset_seed), Subset(tune, share, seed=data.subset_seed)
