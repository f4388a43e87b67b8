"""Scenes for pretraining the small base: images, scene graphs and patch labels, built once and cached.

Texts are not stored. They are generated when a row is read, from the scene and a seed of the row, so that a scene has
different texts in each of its `views`, and a row is still a function of its index.
"""

import json
import multiprocessing
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

from paligemma_jax.data.synthetic_clevr.attributes import ATTRIBUTES
from paligemma_jax.data.synthetic_clevr.build import split_scene
from paligemma_jax.data.synthetic_clevr.geometry import cast
from paligemma_jax.data.synthetic_clevr.pretraining_texts import pretraining_segments
from paligemma_jax.data.synthetic_clevr.renderer import render
from train_jax.core.files import atomic

TEXTS = zlib.crc32(b"pretraining texts")


def build(
    folder: Path,
    num_scenes: int,
    size: int,
    grid: int,
    stream: str = "pretraining",
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
    num_objects: tuple[int, int] = (1, 10),
) -> Path:
    """Writes images.npy, patches.npy and scenes.jsonl into `folder`, unless they are there; returns the folder.

    Args:
      num_scenes: number of scenes and images.
      size: pixels a side.
      grid: patches a side.
      stream: name of the split, which seeds the scenes: splits of different names have different scenes.
      workers: processes; the result does not depend on their number.
      progress: called with scenes done and the total.
      num_objects: fewest and most objects of a scene; pretraining starts with few, to learn objects before counting.
    """
    if (folder / "scenes.jsonl").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    images = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (num_scenes, size, size, 3))
    patches = np.lib.format.open_memmap(folder / "patches.npy", "w+", np.uint8, (num_scenes, grid**2, 4))
    jobs = ((stream, index, size, grid, num_objects) for index in range(num_scenes))
    with atomic(folder / "scenes.jsonl") as draft:  # exists only beside complete arrays
        with multiprocessing.get_context("spawn").Pool(workers) as pool, draft.open("w") as file:
            for index, (scene, image, labels) in enumerate(pool.imap(_make, jobs, chunksize=16)):
                images[index], patches[index] = image, labels
                file.write(json.dumps(scene) + "\n")
                if progress:
                    progress(index + 1, num_scenes)
        images.flush()
        patches.flush()
    return folder


def _make(job: tuple[str, int, int, int, tuple[int, int]]):
    """Returns a scene, its image and its patch labels."""
    stream, index, size, grid, num_objects = job
    scene = split_scene(0, stream, index, num_objects)
    return scene, render(scene, size, size), patch_labels(scene, size, grid)


def patch_labels(scene: dict, size: int, grid: int) -> UInt8[np.ndarray, "P 4"]:
    """Returns for every patch the attributes, in the order of ATTRIBUTES, of the object that fills most of it.

    Returns:
      Indices into the attribute's values plus one, or 0 if no object covers a tenth of the patch.
    """
    ids, _, _ = cast(scene, size, size)
    p = size // grid
    tiles = ids.reshape(grid, p, grid, p).transpose(0, 2, 1, 3).reshape(grid**2, p * p)
    counts = np.stack([(tiles == index).sum(1) for index in range(len(scene["objects"]))], axis=1)
    owner = np.where(counts.max(1) >= 0.1 * p * p, counts.argmax(1) + 1, 0)
    table = [[0] * 4] + [
        [values.index(item[name]) + 1 for name, values in ATTRIBUTES.items()] for item in scene["objects"]
    ]
    return np.array(table, np.uint8)[owner]


class PretrainingScenes:
    """Random access to (image, patch labels, texts); index i is view i // num_scenes of scene i % num_scenes."""

    def __init__(self, folder: Path, views: int, num_segments: int):
        self._images = np.load(folder / "images.npy", mmap_mode="r")
        self._patches = np.load(folder / "patches.npy", mmap_mode="r")
        self._scenes = (folder / "scenes.jsonl").read_text().splitlines()
        self._views, self._num_segments = views, num_segments

    def __len__(self) -> int:
        return len(self._scenes) * self._views

    def scene(self, index: int) -> dict:
        """Returns the scene graph."""
        return json.loads(self._scenes[index % len(self._scenes)])

    def read(self, index: int) -> tuple[UInt8[np.ndarray, "I I 3"], Int[np.ndarray, "P 4"], list[tuple[str, str]]]:
        """Returns the image, patch labels, and `num_segments` (prefix, suffix) pairs."""
        row = index % len(self._scenes)
        rng = np.random.Generator(np.random.PCG64((TEXTS, index)))
        segments = pretraining_segments(self.scene(index), rng, self._num_segments)
        return np.array(self._images[row]), self._patches[row].astype(np.int32), segments
