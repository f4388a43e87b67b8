"""Writes a synthetic CLEVR split to disk in the layout of the official CLEVR_v1.0 folder."""

import io
import json
import multiprocessing
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from paligemma_jax.data.synthetic_clevr.geometry import WINDOW
from paligemma_jax.data.synthetic_clevr.questions import AnswerBalance, generate_questions
from paligemma_jax.data.synthetic_clevr.renderer import render
from paligemma_jax.data.synthetic_clevr.scenes import sample_scene
from train_jax.core.files import atomic, write_atomically

VERSION = 1
"""Version of the generator: raise it with every change of the scenes, images, questions or texts of a seed.

It is part of the names of cached sets, so that a set of an older generator is not reused.
"""

_SCENE_STREAM, _QUESTION_STREAM = 0, 1
_INFO = {"version": "1.0", "license": "Apache-2.0", "generator": f"paligemma_jax.data.synthetic_clevr {VERSION}"}


def split_seed(seed: int, split: str) -> tuple[int, int]:
    """Returns the seed of a split's random streams; splits of other names have others, the same on every machine."""
    return seed, zlib.crc32(split.encode())


def split_scene(seed: int, split: str, index: int, num_objects: tuple[int, int] = (3, 10)) -> dict[str, Any]:
    """Returns scene number `index` of a split, without building the split."""
    name = f"CLEVR_{split}_{index:06d}.png"
    return sample_scene((*split_seed(seed, split), _SCENE_STREAM, index), num_objects, index, name, split)


def encode_png(image) -> bytes:
    """Returns the PNG bytes of a uint8 [H, W, 3] image; with fixed options, a function of the image and zlib."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=6, optimize=False)
    return buffer.getvalue()


def build_tree(
    folder: str | Path,
    split: str,
    num_scenes: int,
    questions_per_scene: int,
    width: int,
    height: int,
    seed: int,
    first_index: int = 0,
    num_objects: tuple[int, int] = (3, 10),
    progress: Callable[[int, int], None] | None = None,
    workers: int = 1,
) -> None:
    """Adds one split to `folder`: images/<split>/*.png, scenes/ and questions/CLEVR_<split>_*.json.

    The files are a function of the arguments except `progress` (called with scenes done and the total) and `workers`
    (processes that sample and render). `pixel_coords` refer to the written size. The images, the scenes and the
    questions are each renamed into place when complete, the questions last: if they exist, the split is complete
    (`is_built`).
    """
    folder = Path(folder)
    images = folder / "images" / split
    scenes, questions, balance = [], [], AnswerBalance()
    make = partial(_render_scene, seed, split, num_objects, width, height)
    with atomic(images) as draft:
        draft.mkdir()
        for scene, png in ordered_map(make, range(first_index, first_index + num_scenes), workers):
            (draft / scene["image_filename"]).write_bytes(png)
            stream = (*split_seed(seed, split), _QUESTION_STREAM, scene["image_index"])
            texts = generate_questions(scene, questions_per_scene, stream, balance)
            questions += [item | {"question_index": len(questions) + k} for k, item in enumerate(texts)]
            scenes.append(_in_pixels(scene, width, height))
            if progress:
                progress(len(scenes), num_scenes)
        if images.exists():  # left by an interrupted call or an earlier build
            shutil.rmtree(images)
    for name, content in (("scenes", scenes), ("questions", questions)):
        text = json.dumps({"info": _INFO | {"split": split}, name: content}, separators=(",", ":"))
        write_atomically(folder / name / f"CLEVR_{split}_{name}.json", text)


def is_built(folder: str | Path, split: str) -> bool:
    """Returns whether `build_tree` has completed this split in the folder."""
    return (Path(folder) / "questions" / f"CLEVR_{split}_questions.json").is_file()


def _render_scene(seed: int, split: str, num_objects: tuple[int, int], width: int, height: int, index: int):
    """Returns (scene, PNG bytes); a module-level function, so that worker processes can import it."""
    scene = split_scene(seed, split, index, num_objects)
    return scene, encode_png(render(scene, width, height))


def ordered_map(function: Callable, items: Iterable, workers: int) -> Iterator:
    """Yields results in the order of the items, from this process or from `workers` spawned ones."""
    if workers <= 1:
        yield from map(function, items)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(function, items, chunksize=8)


def _in_pixels(scene: dict[str, Any], width: int, height: int) -> dict[str, Any]:
    """Returns the scene with `pixel_coords` in the written image instead of the official window."""
    scale = width / WINDOW[0], height / WINDOW[1]

    def scaled(item: dict[str, Any]) -> dict[str, Any]:
        x, y, depth = item["pixel_coords"]
        return item | {"pixel_coords": [round(x * scale[0]), round(y * scale[1]), depth]}

    return scene | {"objects": [scaled(item) for item in scene["objects"]]}
