"""Opens the data a config names, and divides it: questions to train on, to choose the checkpoint by, to report.

training    the subset `fraction` of the training split's questions, on images outside the tuning share
tuning      questions on a share of the training split's images that training never sees; chooses the checkpoint
reported    the validation split
"""

import contextlib
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from paligemma_jax.data.records import Source, Subset
from paligemma_jax.data.sources.clevr import ClevrQuestions, prepare_clevr
from paligemma_jax.data.sources.jsonl import JsonlRecords
from paligemma_jax.data.sources.parquet import ParquetQuestions
from paligemma_jax.data.synthetic_clevr.build import VERSION, build_tree, is_built
from train_jax.core.errors import UserError

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

NAMES = ("synthetic_clevr", "clevr", "parquet", "jsonl")
Progress = Callable[[str], object]  # what is prepared -> context manager that yields told(done, total)


def open_source(data: ConfigDict, split: str, progress: Progress) -> Source:
    """All questions of one split.

    Args:
      data: the config's `data`: name, source, cache_dir, prompt, and for synthetic scenes their numbers.
      split: "train", "validation", "test", or another that the source has.
      progress: see tasks.common.progress.

    Raises:
      UserError: an unknown name, a missing source, or data that are not what the name says.
    """
    if data.name not in NAMES:
        raise UserError(f"data.name is {data.name!r}, expected one of {', '.join(NAMES)}: change it.")
    if data.name == "synthetic_clevr":
        return ClevrQuestions(_synthetic(data, progress), split, data.prompt)
    if data.source is None:
        raise UserError(f"data.name is {data.name!r} but data.source is not set: add --config.data.source=PATH.")
    if data.name == "clevr":
        source = Path(data.source).expanduser()
        if (source / "dataset_info.json").is_file() or (source / "clevr").is_dir():
            return ClevrQuestions(source, split, data.prompt)  # prepared before, by us or by TFDS
        folder = Path(data.cache_dir).expanduser() / f"clevr-{zlib.crc32(str(source.resolve()).encode()):08x}"
        with _locked(folder):
            return ClevrQuestions(prepare_clevr(source, folder), split, data.prompt)
    if data.name == "parquet":
        return ParquetQuestions(data.source, split, data.prompt, cache=data.cache_dir)
    return JsonlRecords(data.source, split, cache=data.cache_dir)


def synthetic_folder(data: ConfigDict) -> Path:
    """Where the synthetic set of these numbers is cached; a set of another generator lies elsewhere."""
    numbers = (data.image_size, data.num_train_scenes, data.num_validation_scenes, data.questions_per_scene)
    name = "-".join(map(str, ("synthetic", f"v{VERSION}", *numbers, data.scene_seed)))
    return Path(data.cache_dir).expanduser() / name


def _synthetic(data: ConfigDict, progress: Progress) -> Path:
    """The synthetic set of these numbers, rendered and prepared once."""
    size, numbers = data.image_size, (data.num_train_scenes, data.num_validation_scenes)
    folder = synthetic_folder(data)
    with _locked(folder):
        for split, number in zip(("train", "val"), numbers, strict=True):
            if is_built(folder / "CLEVR", split):
                continue
            with progress(f"rendering {number} {split} scenes") as told:
                build_tree(
                    folder / "CLEVR",
                    split,
                    number,
                    data.questions_per_scene,
                    size,
                    size,
                    data.scene_seed,
                    progress=told,
                    workers=data.build_workers,
                )
        return prepare_clevr(folder / "CLEVR", folder / "prepared")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Of several processes that want the data of a folder, one prepares them and the others wait (not on Windows)."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def training_and_tuning(source: Source, data: ConfigDict) -> tuple[Subset, Subset]:
    """Divides a training split by image, then takes the subset of questions; a function of the seeds alone.

    Args:
      source: all questions of the training split.
      data: `tune_fraction` of the images (one at least, and one stays) are kept for tuning, of whose questions at most
        `tune_examples` are used; of the rest, `fraction` of the questions (drawn with `subset_seed`) train.

    Raises:
      UserError: a share or a number out of range, or a single image, which cannot be divided.
    """
    if not 0 < data.tune_fraction < 1 or data.tune_examples < 1:
        raise UserError(
            f"data.tune_fraction is {data.tune_fraction} and data.tune_examples {data.tune_examples}, expected a share "
            "between 0 and 1 and at least one example: change them."
        )
    numbers, images = np.unique(source.image_numbers(), return_inverse=True)
    if len(numbers) < 2:
        raise UserError(
            "the training data hold one image, expected at least two, one to train on and one to choose the "
            "checkpoint by: add images."
        )
    order = np.argsort(np.random.PCG64(data.subset_seed).random_raw(len(numbers)), kind="stable")
    kept = np.zeros(len(numbers), bool)
    kept[order[: min(max(1, round(data.tune_fraction * len(numbers))), len(numbers) - 1)]] = True
    rows = np.arange(len(source))
    train = Subset(source, indices=rows[~kept[images]])
    tune = Subset(source, indices=rows[kept[images]])
    share = min(1.0, data.tune_examples / len(tune))
    return Subset(train, data.fraction, seed=data.subset_seed), Subset(tune, share, seed=data.subset_seed)
