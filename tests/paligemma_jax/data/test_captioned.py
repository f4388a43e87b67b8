"""Rows of pictures and captions: a function of their index."""

import json

import numpy as np
import pytest

from paligemma_jax.data.captioned import CaptionedScenes, text_id
from paligemma_jax.data.pretraining_set import build
from paligemma_jax.data.text_tokens import load_text_tokenizer

TOKENIZER = load_text_tokenizer("tiny", 32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build(tmp_path_factory.mktemp("captioned") / "scenes", 3, 24, 2, num_objects=(1, 2))


def test_scenes_hold_as_many_objects_as_asked(folder):
    scenes = [json.loads(line) for line in (folder / "scenes.jsonl").read_text().splitlines()]
    assert {len(scene["objects"]) for scene in scenes} <= {1, 2}


def test_rows_are_a_function_of_their_index(folder):
    rows, again = CaptionedScenes(folder, TOKENIZER, 4), CaptionedScenes(folder, TOKENIZER, 4)
    assert len(rows) == 12
    for index in (0, 5, 11):
        for name, values in rows[index].items():
            np.testing.assert_array_equal(values, again[index][name], err_msg=name)
    first, view = rows[1], rows[4]  # two views of a scene: same picture, another caption
    np.testing.assert_array_equal(first["image"], view["image"])
    assert len({rows.text(index) for index in (1, 4, 7, 10)}) > 1
    assert not np.array_equal(first["image"], rows[2]["image"])
    (tokens,), (mask,) = TOKENIZER([rows.text(4)])
    np.testing.assert_array_equal(view["tokens"], tokens)
    np.testing.assert_array_equal(view["mask"], mask)


def test_equal_texts_have_equal_ids(folder):
    rows = CaptionedScenes(folder, TOKENIZER, 40)
    ids = {}
    for index in range(len(rows)):
        ids.setdefault(rows.text(index), set()).add(int(rows[index]["text_id"]))
    assert all(len(found) == 1 for found in ids.values())
    assert len(set.union(*ids.values())) == len(ids)
    assert text_id("a cube").dtype == np.int32
