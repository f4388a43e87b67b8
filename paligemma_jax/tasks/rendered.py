"""Folders of synthetic scenes, rendered on first use and kept in the cache directory."""

import dataclasses
from pathlib import Path

from ml_collections import ConfigDict

from paligemma_jax.data.sources import pretraining_scenes
from paligemma_jax.data.synthetic_clevr import VERSION
from paligemma_jax.tasks import common
from train_jax.core.config_keys import key
from train_jax.core.files import cache_dir


@dataclasses.dataclass(frozen=True)
class RenderKeys:
    """Keys of `config.data` of a task that renders scenes."""

    cache_dir: str = key(cache_dir, "folder in which rendered scenes are kept", resume_safe=True)
    build_workers: int = key(2, "number of processes that render scenes", minimum=1, resume_safe=True)


@dataclasses.dataclass(frozen=True)
class CaptionKeys(RenderKeys):
    """Keys of `config.data` of a task that trains on captions of scenes."""

    views: int = key(100, "number of captions of a scene before they repeat", minimum=1)


def rendered(
    data: ConfigDict, stream: str, number: int, size: int, grid: int, num_objects: tuple[int, int] = (1, 10)
) -> Path:
    """Returns the folder of a stream's scenes, see pretraining_scenes.build.

    Args:
      data: `config.data`, with the keys of RenderKeys.
      stream: name of a set of scenes; two streams share no scene.
      number: number of scenes.
      size: pixels a side.
      grid: patches a side.
      num_objects: smallest and largest number of objects in a scene.
    """
    low, high = num_objects
    folder = Path(data.cache_dir).expanduser() / f"{stream}-v{VERSION}-{size}-{low}to{high}-{number}"
    with common.progress(f"rendering {number} {stream} scenes") as on_progress:
        return pretraining_scenes.build(
            folder, number, size, grid, stream, data.build_workers, on_progress, num_objects
        )
