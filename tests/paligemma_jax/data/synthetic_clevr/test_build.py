"""The written tree: official layout, same bytes every time, disjoint splits, no incomplete results."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from paligemma_jax.data.synthetic_clevr import (
    VERSION,
    build,
    build_tree,
    is_built,
    pretraining_segments,
    render,
    split_scene,
)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clevr")
    build_tree(folder, "val", 6, 5, 48, 32, seed=7)
    build_tree(folder, "train", 6, 5, 48, 32, seed=7)
    return folder


def test_layout(tree):
    names = [f"CLEVR_val_{k:06d}.png" for k in range(6)]
    assert sorted(p.name for p in (tree / "images" / "val").iterdir()) == names
    assert sorted(p.name for p in tree.iterdir()) == ["images", "questions", "scenes"]
    scenes = json.loads((tree / "scenes" / "CLEVR_val_scenes.json").read_text())
    questions = json.loads((tree / "questions" / "CLEVR_val_questions.json").read_text())
    assert set(scenes) == {"info", "scenes"} and set(questions) == {"info", "questions"}
    assert [scene["image_filename"] for scene in scenes["scenes"]] == names
    assert [q["question_index"] for q in questions["questions"]] == list(range(30))
    keys = {"question", "answer", "program", "question_family_index", "image_index", "image_filename", "question_index"}
    assert all(set(q) == keys | {"split"} and q["split"] == "val" for q in questions["questions"])
    with Image.open(tree / "images" / "val" / names[0]) as image:
        assert image.size == (48, 32)


def test_images_are_those_of_the_scenes(tree):
    scenes = json.loads((tree / "scenes" / "CLEVR_val_scenes.json").read_text())["scenes"]
    image = np.asarray(Image.open(tree / "images" / "val" / scenes[3]["image_filename"]))
    assert np.array_equal(image, render(split_scene(7, "val", 3), 48, 32))
    assert np.array_equal(image, render(scenes[3], 48, 32))  # the stored scene is enough to render it again
    assert all(0 <= item["pixel_coords"][0] <= 48 for item in scenes[3]["objects"])


def test_same_bytes_whatever_the_workers(tree, tmp_path):
    build_tree(tmp_path, "train", 6, 5, 48, 32, seed=7, workers=2)
    build_tree(tmp_path, "val", 6, 5, 48, 32, seed=7)
    assert bytes_of(tmp_path) == bytes_of(tree)


def test_the_version_changes_with_the_generated_data(tree):
    """If this fails, the generator has changed: raise `build.VERSION` and add its digest."""
    digest = hashlib.sha256()
    for split in ("train", "val"):
        digest.update(
            json.dumps(json.loads((tree / f"scenes/CLEVR_{split}_scenes.json").read_text())["scenes"]).encode()
        )
        questions = json.loads((tree / f"questions/CLEVR_{split}_questions.json").read_text())["questions"]
        digest.update(json.dumps(questions).encode())
        for file in sorted((tree / "images" / split).iterdir()):
            digest.update(np.asarray(Image.open(file)).tobytes())
    for k in range(6):
        texts = pretraining_segments(split_scene(7, "val", k), np.random.Generator(np.random.PCG64(k)), 8)
        digest.update(json.dumps(texts).encode())
    assert digest.hexdigest()[:16] == {1: "99920f49208846d8"}[VERSION]


def test_splits_and_seeds_are_disjoint():
    scenes = [
        json.dumps(split_scene(seed, split, k)["objects"])
        for seed in (7, 8)
        for split in ("train", "val", "test")
        for k in range(15)
    ]
    assert len(set(scenes)) == len(scenes)


def test_first_index_continues_a_split(tmp_path):
    build_tree(tmp_path, "val", 2, 1, 48, 32, seed=7, first_index=4, num_objects=(3, 4))
    assert sorted(p.name for p in (tmp_path / "images" / "val").iterdir()) == [
        "CLEVR_val_000004.png",
        "CLEVR_val_000005.png",
    ]


def test_an_interrupted_build_leaves_nothing_and_can_be_repeated(tmp_path, monkeypatch):
    calls = []

    def fail_late(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return render(*args)

    monkeypatch.setattr(build, "render", fail_late)
    with pytest.raises(KeyboardInterrupt):
        build_tree(tmp_path, "val", 6, 5, 48, 32, seed=7)
    assert not is_built(tmp_path, "val") and list(tmp_path.rglob("*")) == [tmp_path / "images"]
    monkeypatch.undo()
    done = []
    build_tree(tmp_path, "val", 2, 1, 48, 32, seed=7, progress=lambda *at: done.append(at))
    assert is_built(tmp_path, "val") and done == [(1, 2), (2, 2)]
