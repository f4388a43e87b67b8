"""Opens the data a config names, and divides it: questions to train on, to choose the checkpoint by, to report.

training    the subset `fraction` of the training split's questions, on images outside the tuning share
tuning      questions on a share of the training split's images that training never sees; chooses the checkpoint
reported    the validation split
"""

import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from paligemma_jax.data.clevr import ClevrQuestions, prepare_clevr
from paligemma_jax.data.jsonl import JsonlRecords
from paligemma_jax.data.parquet import ParquetQuestions
from paligemma_jax.data.records import Source, Subset
from paligemma_jax.data.synthetic_clevr.build import build_tree
from train_jax.errors import UserError

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
        return ClevrQuestions(prepare_clevr(source, folder), split, data.prompt)
    if data.name == "parquet":
        return ParquetQuestions(data.source, split, data.prompt)
    return JsonlRecords(data.source, split)


def _synthetic(data: ConfigDict, progress: Progress) -> Path:
    """The synthetic set of these numbers, rendered and prepared once."""
    size, numbers = data.image_size, (data.num_train_scenes, data.num_validation_scenes)
    name = f"synthetic-{size}-{numbers[0]}-{numbers[1]}-{data.questions_per_scene}-{data.scene_seed}"
    folder = Path(data.cache_dir).expanduser() / name
    for split, number in zip(("train", "val"), numbers, strict=True):
        if not (folder / "prepared").is_dir():
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


def training_and_tuning(source: Source, data: ConfigDict) -> tuple[Subset, Subset]:
    """Divides a training split by image, then takes the subset of questions; a function of the seeds alone.

    Args:
      source: all questions of the training split.
      data: `tune_fraction` of the images are kept for tuning, of whose questions at most `tune_examples` are used;
        of the rest, `fraction` of the questions (drawn with `subset_seed`) train.
    """
    images = source.image_numbers()
    order = np.argsort(np.random.PCG64(data.subset_seed).random_raw(int(images.max()) + 1), kind="stable")
    kept = np.zeros(len(order), bool)
    kept[order[: round(data.tune_fraction * len(order))]] = True
    if kept.all() or not kept.any():
        raise UserError(
            f"data.tune_fraction={data.tune_fraction} of {len(order)} images leaves nothing to tune on or to train on: "
            "choose a share that gives each at least one image."
        )
    rows = np.arange(len(source))
    train = Subset(source, indices=rows[~kept[images]])
    tune = Subset(source, indices=rows[kept[images]])
    share = min(1.0, data.tune_examples / len(tune))
    return Subset(train, data.fraction, seed=data.subset_seed), Subset(tune, share, seed=data.subset_seed)
