"""Opens the images that a few-shot config names in `data.name`: synthetic classes, folders, or a user's own."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from ml_collections import ConfigDict

from paligemma_jax.data.few_shot.class_folders import open_images
from paligemma_jax.data.few_shot.dataset import SPLITS, FewShot
from paligemma_jax.data.few_shot.synthetic_classes import synthetic_classes
from paligemma_jax.data.sources.splits import Progress
from paligemma_jax.data.synthetic_clevr.classes import CLASSES, IN_OTHERS, in_halves
from train_jax.core.errors import UserError
from train_jax.core.import_path import check_arguments, named

OPENERS = {
    "scenes": "paligemma_jax.data.few_shot.openers:open_scenes",
    "images": "paligemma_jax.data.few_shot.openers:open_folders",
}
"""Short names of `data.name`; it may also be the import path of an opener."""


class DataSets(NamedTuple):
    """The data of a run: a data set to tune on and to test on, and by name further ones that are only tested."""

    source: FewShot
    targets: Mapping[str, FewShot] = {}


DataSetsOpener = Callable[[ConfigDict, int, Progress], DataSets]
"""Opens data sets: `open_data(data, size, progress)`, with the config's `data` and the pixels a side of the model."""


def open_data_sets(data: ConfigDict, size: int, progress: Progress) -> DataSets:
    """Returns the data sets that `data.name` names.

    Args:
      data: the config's `data`.
      size: pixels a side of synthetic images.
      progress: see tasks.common.progress.

    Raises:
      UserError: a name that names no opener, one that returns something else, or what the opener raises.
    """
    opener = named("data.name", data.name, OPENERS)
    check_arguments(f"data.name={data.name!r}", opener, "data", "size", "progress")
    opened = opener(data, size, progress)
    sets = opened if isinstance(opened, DataSets) else DataSets(opened)
    others = [each for each in (sets.source, *sets.targets.values()) if not isinstance(each, FewShot)]
    if others:
        raise UserError(
            f"data.name={data.name!r} returned {type(others[0]).__name__}, expected a FewShot "
            "(paligemma_jax/data/few_shot/dataset.py), or a DataSets of several (openers.py): correct the function."
        )
    return sets


def open_scenes(data: ConfigDict, size: int, progress: Progress) -> DataSets:
    """Returns the synthetic classes in the style of the run, and in the further styles; each is rendered once."""
    per_class: dict[str, int] = dict(zip(SPLITS, data.per_class, strict=True))

    def read(style: str, per_class: dict[str, int]) -> FewShot:
        with progress(f"rendering {style} classes") as on_progress:
            images = synthetic_classes(data.cache_dir, size, per_class, style, 0, data.build_workers, on_progress)
        images = images.ordered([values.name for values in in_halves(data.novel)])
        if data.words == IN_OTHERS:
            return images.renamed({values.name: values.in_other_words for values in CLASSES})
        return images

    test = {"test": per_class["test"]}
    return DataSets(read(data.style, per_class), {style: read(style, test) for style in data.target_styles})


def open_folders(data: ConfigDict, size: int, progress: Progress) -> DataSets:
    """Returns the images of `data.source`, and those of `data.targets` by the names of their folders.

    Raises:
      UserError: a folder without such images, or two targets of one name.
    """
    del size, progress
    targets: dict[str, FewShot] = {}
    for folder in data.targets:
        target = open_images(folder, cache=data.cache_dir)
        if target.name in targets:
            raise UserError(
                f"data.targets: {folder} is named {target.name!r}, as another of them is, expected names of their "
                "own: rename the folder or its split file."
            )
        targets[target.name] = target
    return DataSets(open_images(data.source, cache=data.cache_dir), targets)
