"""Rows of images and captions are functions of their index."""

import json

import numpy as np
import pytest

from paligemma_jax.data.sources.captioned import (
    NOISE_IMAGES,
    CaptionedFeatures,
    CaptionedScenes,
    encode_scenes,
    text_id,
)
from paligemma_jax.data.sources.pretraining_scenes import build
from paligemma_jax.data.tokenizers.text_tower import load_text_tokenizer

TOKENIZER = load_text_tokenizer("tiny", 32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build(tmp_path_factory.mktemp("captioned") / "scenes", 3, 24, 2, num_objects=(1, 2))


def test_scenes_have_the_requested_number_of_objects(folder):
    scenes = [json.loads(line) for line in (folder / "scenes.jsonl").read_text().splitlines()]
    assert {len(scene["objects"]) for scene in scenes} <= {1, 2}


def test_rows_are_a_function_of_their_index(folder):
    rows, again = CaptionedScenes(folder, TOKENIZER, 4), CaptionedScenes(folder, TOKENIZER, 4)
    assert len(rows) == 12
    for index in (0, 5, 11):
        for name, values in rows[index].items():
            np.testing.assert_array_equal(values, again[index][name], err_msg=name)
    first, view = rows[1], rows[4]  # two views of a scene: same image, another caption
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
    assert all(len(result) == 1 for result in ids.values())
    assert len(set.union(*ids.values())) == len(ids)
    assert text_id(b"a cube").dtype == np.int32


@pytest.mark.parametrize("noise", ["images", "texts", "pairs"])
def test_a_share_of_the_rows_is_noisy(folder, noise):
    """The rest of a noisy row, and every other row, is unchanged."""
    clean = CaptionedScenes(folder, TOKENIZER, 100)
    spoilt = CaptionedScenes(folder, TOKENIZER, 100, noise, 0.25)
    changed = {"image": 0, "tokens": 0}
    for index in range(len(clean)):
        one, other = clean[index], spoilt[index]
        for name in changed:
            changed[name] += not np.array_equal(one[name], other[name])
    own = "image" if noise == "images" else "tokens"
    assert changed.pop(own) / len(clean) == pytest.approx(0.25, abs=0.07)
    assert set(changed.values()) == {0}
    np.testing.assert_array_equal(spoilt[7]["tokens"], spoilt[7]["tokens"])  # a function of the row
    number = len(clean.scenes) + NOISE_IMAGES if noise == "images" else len(clean.scenes)
    assert spoilt.num_images == number


def test_noisy_texts_have_as_many_random_tokens(folder):
    clean, spoilt = CaptionedScenes(folder, TOKENIZER, 4), CaptionedScenes(folder, TOKENIZER, 4, "texts", 1.0)
    for index in range(4):
        one, other = clean[index]["tokens"], spoilt[index]["tokens"]
        ends = np.isin(one, (TOKENIZER.pad_id, TOKENIZER.eos_id))
        np.testing.assert_array_equal(one[ends], other[ends])
        assert (one[~ends] != other[~ends]).mean() > 0.5
        assert clean[index]["text_id"] != spoilt[index]["text_id"]


def test_features_replace_images(folder):
    """Features of noise images too; every image is encoded once, in batches of one size."""
    scenes, seen = CaptionedScenes(folder, TOKENIZER, 50, "images", 0.5), []

    def encode(images):
        assert len(images) == 8
        seen.extend(images)
        return images.reshape(8, 4, -1).astype(np.float32)

    rows = CaptionedFeatures(scenes, encode_scenes(scenes, encode, lambda done, total: None, batch_size=8))
    assert len(seen) == 8 * -(-scenes.num_images // 8)
    for index in range(len(scenes)):
        row, expected = rows[index], scenes[index]
        np.testing.assert_array_equal(row.pop("features").reshape(-1), expected.pop("image").reshape(-1))
        for name, values in expected.items():
            np.testing.assert_array_equal(row[name], values, err_msg=name)
