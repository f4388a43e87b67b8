"""The folders of synthetic scenes that tasks read: rendered on first use, kept in the cache."""

from pathlib import Path

from ml_collections import ConfigDict

from paligemma_jax.data.sources import pretraining_scenes
from paligemma_jax.data.synthetic_clevr import VERSION
from paligemma_jax.tasks import common


def rendered(
    data: ConfigDict, stream: str, number: int, size: int, grid: int, num_objects: tuple[int, int] = (1, 10)
) -> Path:
    """The folder of a stream's scenes, see pretraining_scenes.build.

    Args:
      data: has cache_dir and build_workers.
      stream: names what the scenes are for; two streams share no scene.
      number: of scenes.
      size, grid: pixels and patches a side.
      num_objects: fewest and most in a scene.
    """
    low, high = num_objects
    folder = Path(data.cache_dir).expanduser() / f"{stream}-v{VERSION}-{size}-{low}to{high}-{number}"
    with common.progress(f"rendering {number} {stream} scenes") as told:
        return pretraining_scenes.build(folder, number, size, grid, stream, data.build_workers, told, num_objects)
