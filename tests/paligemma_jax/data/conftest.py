"""A small CLEVR tree in the official layout, for the tests of the readers."""

import io
import json

import numpy as np
import pytest
from PIL import Image

COUNTS = {"train": 5, "val": 3, "test": 2}  # images


def png(seed: int, height: int = 6, width: int = 9) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), np.uint8)
    pixels[..., 3] = 255  # CLEVR's files are RGBA, opaque
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def scene(name: str, number: int) -> dict:
    thing = {"color": "red", "material": "metal", "shape": "cylinder", "size": "small", "rotation": 12.5}
    thing |= {"3d_coords": [1.0, -2.0, 0.35], "pixel_coords": [3.0, 4.0, 9.5], "mask": "ignored"}
    objects = [dict(thing, rotation=float(i), color=["cyan", "gray"][i % 2]) for i in range(number % 3 + 1)]
    return {"image_filename": name, "image_index": number, "objects": objects, "relationships": {"left": [[]]}}


def write_clevr_tree(root, counts=None, seed=0):
    """Every image i has i % 3 questions; the test split has no answers and no scenes file."""
    for kind in ("questions", "scenes"):
        (root / kind).mkdir(parents=True)
    for split, count in (counts or COUNTS).items():
        folder = root / "images" / split
        folder.mkdir(parents=True)
        questions, scenes = [], []
        for i in range(count):
            name = f"CLEVR_{split}_{i:06d}.png"
            (folder / name).write_bytes(png(1000 * seed + 10 * i + len(split)))
            scenes.append(scene(name, i))
            for k in range(i % 3):
                question = {"image_filename": name, "image_index": i, "question": f"What is {split} {seed} {i} {k}?"}
                answer = {} if split == "test" else {"answer": ["yes", "3", "rubber"][(i + k) % 3]}
                questions.append(question | answer | {"program": [{"function": "scene", "inputs": []}]})
        document = {"info": {"split": split, "questions": "not these"}, "questions": questions}
        (root / "questions" / f"CLEVR_{split}_questions.json").write_text(json.dumps(document))
        if split != "test":
            document = {"info": {}, "scenes": scenes}
            (root / "scenes" / f"CLEVR_{split}_scenes.json").write_text(json.dumps(document))
    return root


@pytest.fixture(scope="session")
def clevr_tree(tmp_path_factory):
    return write_clevr_tree(tmp_path_factory.mktemp("official") / "CLEVR_v1.0")


@pytest.fixture(scope="session")
def make_clevr_tree():
    return write_clevr_tree


@pytest.fixture(scope="session")
def prepared_clevr(clevr_tree, tmp_path_factory):
    from paligemma_jax.data.sources.clevr import prepare_clevr

    return prepare_clevr(clevr_tree, tmp_path_factory.mktemp("tfds"))


@pytest.fixture(scope="session")
def make_png():
    return png
